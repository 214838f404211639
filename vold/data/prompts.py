"""Prompts from problems: one chat each, rendered by the tokenizer's own template, as token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from vold.config.schema import PromptConfig, SelfTeacherConfig
from vold.data.problems import Problem
from vold.data.templates import ChatRefused, render_chats
from vold.io import log, one_line_errors, visible
from vold.types import Hint, Prompt


@one_line_errors()
def build_prompts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    on_error: str = "stop",
    length: Callable[[Prompt], int] = lambda prompt: len(prompt.token_ids),
) -> list[Prompt]:
    """The prompts of problems, in order, each within prompt.max_tokens. A longer one raises ValueError, or is left out
    (on_error "skip") and logged. Raises ValueError where none is left. length: a prompt's tokens; an encoder's `length`
    counts those of images too."""
    built = _build(problems, tokenizer, config)
    too_long = {prompt.id: tokens for prompt in built if (tokens := length(prompt)) > config.max_tokens}
    if not too_long:
        return built
    if on_error == "stop":
        id, tokens = next(iter(too_long.items()))
        raise ValueError(
            f"{id}: prompt of {tokens} tokens exceeds prompt.max_tokens = {config.max_tokens}; raise it, or set "
            "data.on_error=skip"
        )
    if len(too_long) == len(built):
        raise ValueError(f"every prompt exceeds prompt.max_tokens = {config.max_tokens}; raise it")
    names = ", ".join(f"{id} ({tokens} tokens)" for id, tokens in islice(too_long.items(), 8))
    more = " …" if len(too_long) > 8 else ""
    log.info(visible(f"skipped {len(too_long)} prompts over prompt.max_tokens = {config.max_tokens}: {names}{more}"))
    return [prompt for prompt in built if prompt.id not in too_long]


def build_prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Prompt:
    """One prompt; its token ids hold one image-pad id per image (see Prompt). Raises ValueError where the chat template
    refuses the messages."""
    (prompt,) = _build([problem], tokenizer, config)
    return prompt


def _build(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[Prompt]:
    system = [{"role": "system", "content": config.system}] if config.system else []
    chats = [[*system, {"role": "user", "content": _content(problem, config.suffix)}] for problem in problems]
    try:
        texts = render_chats(tokenizer, chats, add_generation_prompt=True)
    except ChatRefused as error:  # many templates know no system turn
        raise ValueError(
            f"{problems[error.number].id}: the tokenizer's chat template refuses this prompt: {error}; leave "
            "prompt.system out"
        ) from None
    return [
        Prompt(
            id=problem.id,
            token_ids=tokenizer(text, add_special_tokens=False)["input_ids"],
            text=problem.question,
            gold=problem.gold,
            images=problem.images,
            choices=problem.choices,
            category=problem.category,
        )
        for problem, text in zip(problems, texts, strict=True)
    ]


def show_hint(
    prompt: Prompt, hint: Hint, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, form: SelfTeacherConfig
) -> Prompt:
    """The prompt of a self-teacher: `form.template` with the problem and the sections of the hint's parts."""
    parts = {
        "problem": prompt.text,
        "demonstration": _section(form.demonstration, "demonstration", hint.demonstration),
        "feedback": _section(form.feedback, "feedback", hint.feedback),
    }
    # in one pass: the inserted texts may hold braces of their own
    question = re.sub(r"\{(problem|demonstration|feedback)\}", lambda match: parts[match[1]], form.template)
    return build_prompt(Problem(prompt.id, question, prompt.gold, prompt.images), tokenizer, config)


def _section(template: str, name: str, text: str | None) -> str:
    return "" if text is None else template.replace(f"{{{name}}}", text)


def _content(problem: Problem, suffix: str) -> str | list[dict]:
    """Plain text, or text and image items in the order of the problem's <image> marks."""
    if not problem.images:
        return problem.question + suffix
    before, *after = (problem.question + suffix).split("<image>")
    items = [{"type": "text", "text": before}] if before else []
    for text in after:
        items.append({"type": "image"})
        if text:
            items.append({"type": "text", "text": text})
    return items
