"""The chat template of a pair of student and teacher: decided once, by `prompt.chat_template`, for every stage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vold.config.schema import PromptConfig
from vold.models.checkpoint_dir import reading
from vold.models.tokenizer import load_tokenizer

TEMPLATE_FILE = "chat_template.jinja"
MAX_BYTES = 1 << 20


def load_chat_tokenizer(checkpoint: Path, prompt: PromptConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the chat template that renders this run's prompts: the one that `prompt`
    names, or its own, with `prompt.chat_template_kwargs` as its variables' values. Raises ValueError where there is
    none, or where it does not read such a variable."""
    tokenizer = load_tokenizer(checkpoint)
    template = _own_template(tokenizer, checkpoint)
    if prompt.chat_template is not None:
        template = _named_template(prompt.chat_template)
    if template is not None:
        tokenizer.chat_template = _with_values(template, prompt.chat_template_kwargs)
    elif prompt.chat_template_kwargs:
        raise ValueError(f"prompt.chat_template_kwargs: {checkpoint} has no chat template; set prompt.chat_template")
    return tokenizer


def pair_prompt(prompt: PromptConfig, student: Path) -> PromptConfig:
    """The section with which the teacher's tokenizer renders what the student's does."""
    return prompt if prompt.chat_template is not None else prompt.model_copy(update={"chat_template": student})


def own_rendering(prompt: PromptConfig) -> PromptConfig:
    """The section without a decision for the pair: each checkpoint's own template."""
    return prompt.model_copy(update={"chat_template": None, "chat_template_kwargs": {}})


def write_chat_template(directory: Path, prompt: PromptConfig) -> None:
    """Make the run's chat template the only one of a checkpoint directory, wherever it kept its own; leave it where the
    run has used its own."""
    if prompt.chat_template is None and not prompt.chat_template_kwargs:
        return
    template = load_chat_tokenizer(directory, prompt).chat_template
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        path = directory / name
        if path.is_file() and "chat_template" in (fields := json.loads(path.read_text(encoding="utf-8"))):
            fields["chat_template"] = template
            path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _own_template(tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> str | None:
    """The tokenizer's template, its `default` one of several; or that of the processor, in chat_template.json."""
    if tokenizer.chat_template is not None:
        return tokenizer.get_chat_template()
    path = checkpoint / "chat_template.json"
    if not path.is_file():
        return None
    with reading(path):
        return str(json.loads(_text(path))["chat_template"])


def _named_template(path: Path) -> str:
    if path.is_file():
        return _text(path)
    if not path.is_dir():
        raise ValueError(f"prompt.chat_template = {path} does not exist; name a checkpoint directory or a .jinja file")
    template = _own_template(load_tokenizer(path), path)
    if template is None:
        raise ValueError(f"prompt.chat_template = {path} has no chat template; name a checkpoint that has one")
    return template


def _text(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB is no chat template")
        return content.decode("utf-8-sig")


def _with_values(template: str, values: Mapping[str, bool | int | float | str]) -> str:
    """The template with defaults for its variables, so that it says the same wherever it is used."""
    defaults = ""
    for name, value in values.items():
        if not name.isidentifier() or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"prompt.chat_template_kwargs.{name}: the chat template has no such variable; leave it out"
            )
        defaults += f"{{%- if {name} is not defined -%}}{{%- set {name} = {json.dumps(value)} -%}}{{%- endif %}}"
    return defaults + template
