"""The chat template of a pair in the terminal: how this run renders a prompt, beside what the other model's own would
say."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from vold.config.schema import PromptConfig, RlConfig, SftConfig
from vold.data.renderings import Rendering
from vold.io import visible
from vold.models.chat_template import load_chat_tokenizer, own_rendering


class RenderingCheck:
    """Renders one question for a config's student and, in its own way, for its teacher."""

    def __init__(self, config: SftConfig | RlConfig):
        self._config = config
        self._shown: dict[str, str] = {}

    def check(self) -> str:
        """Returns whose chat template asks in this run, and whether the other model's own would ask the same."""
        config, prompt = self._config, _section(self._config)
        source = prompt.chat_template or config.student
        values = ", ".join(f"{name} = {value}" for name, value in prompt.chat_template_kwargs.items())
        line = f"prompts in the chat template of {source}" + (f" with {values}" if values else "")
        mine = _example(config.student, prompt)
        self._shown = {f"this run ({source})": mine}
        other = config.pair_with if isinstance(config, SftConfig) else config.teacher
        if other is None:
            return line
        theirs = _example(other, own_rendering(prompt))
        self._shown[f"{other} on its own"] = theirs
        if theirs == mine:
            return f"{line}; {other} would ask the same"
        return f"{line}; {other} would ask otherwise, see below"

    def table(self) -> Table | None:
        """The renderings side by side; None before `check`."""
        if not self._shown:
            return None
        table = Table(title="a prompt, from which a response is sampled", title_justify="left")
        for name in self._shown:
            table.add_column(visible(name), overflow="fold")
        table.add_row(*(Text(visible(text, multiline=True)) for text in self._shown.values()))
        return table


def _section(config: SftConfig | RlConfig) -> PromptConfig:
    return config.prompt.without_grading() if isinstance(config, SftConfig) else config.prompt


def _example(checkpoint: Path, prompt: PromptConfig) -> str:
    tokenizer = load_chat_tokenizer(checkpoint, prompt)
    if tokenizer.chat_template is None:
        raise ValueError(f"{checkpoint} has no chat template; set prompt.chat_template to a checkpoint that has one")
    return Rendering.of(tokenizer, prompt).example
