"""How a teacher that sees reads the student's prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from vold.config.schema import PromptConfig
from vold.data.packing import Encoded
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.images import Change, encoder_of
from vold.models.tokenizer import load_tokenizer
from vold.types import Prompt, TokenIds


class TeacherPromptEncoder:
    """An Encoder that renders the problem behind a prompt with the teacher's chat template and image processor;
    `change`: see ImageReader."""

    def __init__(self, teacher: Path, problems: Iterable[Problem], config: PromptConfig, change: Change | None = None):
        self._encode, self._tokenizer, self._config = encoder_of(teacher, change), load_tokenizer(teacher), config
        self._problems = {problem.id: problem for problem in problems}
        self._token_ids = cache(self._render)

    def __call__(self, prompt: Prompt) -> Encoded:
        return self._encode(self._own(prompt))

    def length(self, prompt: Prompt) -> int:
        return self._encode.length(self._own(prompt))

    def _own(self, prompt: Prompt) -> Prompt:
        return replace(prompt, token_ids=self._token_ids(prompt.id))

    def _render(self, id: str) -> TokenIds:
        return build_prompt(self._problems[id], self._tokenizer, self._config).token_ids
