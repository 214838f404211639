"""Problem -> Prompt: one chat, rendered by the tokenizer's own template, as token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vold.config.schema import PromptConfig, SelfTeacherConfig
from vold.data.problems import Problem
from vold.types import Hint, Prompt


def build_prompts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    on_error: str = "stop",
    length: Callable[[Prompt], int] = lambda prompt: len(prompt.token_ids),
) -> list[Prompt]:
    """All prompts within prompt.max_tokens; a longer one stops the run, or is left out (on_error "skip") and named.
    Raises ValueError where none is left. `length` counts a prompt's tokens (PromptEncoder.length: of images too)."""
    built = [build_prompt(problem, tokenizer, config) for problem in problems]
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
    named = [f"{id} ({tokens} tokens)" for id, tokens in islice(too_long.items(), 8)]
    more = " …" if len(too_long) > len(named) else ""
    print(f"skipped {len(too_long)} prompts over prompt.max_tokens = {config.max_tokens}: {', '.join(named)}{more}")
    return [prompt for prompt in built if prompt.id not in too_long]


def build_prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Prompt:
    """Token ids with one image-pad id per image: expansion belongs to whoever runs a model."""
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": _content(problem, config.suffix)})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # many templates know no system turn
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{problem.id}: the tokenizer's chat template refuses this prompt: {reason}; leave prompt.system out"
        ) from None
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(
        id=problem.id,
        token_ids=token_ids,
        text=problem.question,
        gold=problem.gold,
        images=problem.images,
        choices=problem.choices,
        category=problem.category,
    )


def show_hint(
    prompt: Prompt, hint: Hint, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, form: SelfTeacherConfig
) -> Prompt:
    """The same problem as a self-teacher reads it. A part of the hint that is not there leaves its section out."""
    parts = {
        "problem": prompt.text,
        "demonstration": _section(form.demonstration, "demonstration", hint.demonstration),
        "feedback": _section(form.feedback, "feedback", hint.feedback),
    }
    # in one pass: what is put in may hold braces of its own
    question = re.sub(r"\{(problem|demonstration|feedback)\}", lambda found: parts[found[1]], form.template)
    return build_prompt(Problem(prompt.id, question, prompt.gold, prompt.images), tokenizer, config)


def _section(template: str, name: str, text: str | None) -> str:
    return "" if text is None else template.replace(f"{{{name}}}", text)


def _content(problem: Problem, suffix: str) -> str | list[dict]:
    """Plain text, or text and image items in the order of the problem's <image> marks."""
    if not problem.images:
        return problem.question + suffix
    first, *rest = (problem.question + suffix).split("<image>")
    items = [{"type": "text", "text": first}] if first else []
    for text in rest:
        items.append({"type": "image"})
        if text:
            items.append({"type": "text", "text": text})
    return items
