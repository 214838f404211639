"""Prompts from problems: one chat each, rendered by the tokenizer's own template, as token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
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
    built, lengths = _measured(render_prompts(problems, tokenizer, config), length, on_error)
    too_long = {id: tokens for id, tokens in lengths.items() if tokens > config.max_tokens}
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


def _measured(
    prompts: Iterable[Prompt], length: Callable[[Prompt], int], on_error: str
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that the model can read, and the tokens of each by its id. One that it cannot (its text spells out an
    image-pad token) raises ValueError, or is left out and logged (on_error "skip")."""
    kept, lengths, errors = [], {}, []
    for prompt in prompts:
        try:
            lengths[prompt.id] = length(prompt)
            kept.append(prompt)
        except ValueError as error:
            if on_error == "stop":
                raise ValueError(f"{error} (data.on_error=skip leaves such rows out)") from None
            errors.append(error)
    if not kept:
        raise ValueError(f"the model can read no prompt; the first: {errors[0]}")
    if errors:
        log.info(visible(f"skipped {len(errors)} prompts that the model cannot read, the first: {errors[0]}"))
    return kept, lengths


def build_prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Prompt:
    """One prompt; its token ids hold one image-pad id per image (see Prompt). Raises ValueError where the chat template
    refuses the messages."""
    (prompt,) = render_prompts([problem], tokenizer, config)
    return prompt


def render_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> list[Prompt]:
    """The prompts of problems, in order, whatever their length. Raises ValueError as `build_prompt` does."""
    chats = [_chat(problem, config) for problem in problems]
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
            history=problem.history,
            other_golds=problem.other_golds,
            metadata=problem.metadata,
        )
        for problem, text in zip(problems, texts, strict=True)
    ]


def _chat(problem: Problem, config: PromptConfig) -> list[dict]:
    """The messages of a problem. A system turn of its own stands in for prompt.system."""
    turns = [*problem.history, ("user", problem.question + config.suffix_text)]
    if config.system and turns[0][0] != "system":
        turns.insert(0, ("system", config.system))
    return [{"role": role, "content": _content(text, bool(problem.images))} for role, text in turns]


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
    problem = Problem(prompt.id, question, prompt.gold, prompt.images, history=prompt.history)
    return build_prompt(problem, tokenizer, config)


def _section(template: str, name: str, text: str | None) -> str:
    return "" if text is None else template.replace(f"{{{name}}}", text)


def _content(text: str, has_images: bool) -> str | list[dict]:
    """Plain text, or text and image items in the order of a turn's <image> marks."""
    if not has_images or "<image>" not in text:
        return text
    before, *after = text.split("<image>")
    items = [{"type": "text", "text": before}] if before else []
    for part in after:
        items.append({"type": "image"})
        if part:
            items.append({"type": "text", "text": part})
    return items
