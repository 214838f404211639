"""The student's prompts as a vision-language teacher reads them: in the chat template of the pair, with the teacher's
own number of tokens for an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from vold.config.schema import PromptConfig
from vold.data.packing import EncodedPrompt
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import ImageTransform, load_prompt_encoder
from vold.types import Prompt, TokenIds


class TeacherPromptEncoder:
    """A PromptEncoder that renders the problem behind a student's prompt with the teacher's tokenizer and image
    processor, in the chat template that `config` names (see load_chat_tokenizer).

    transform: applied to every image first (see ImageProcessor)
    """

    def __init__(
        self,
        teacher: Path,
        problems: Iterable[Problem],
        config: PromptConfig,
        transform: ImageTransform | None = None,
    ):
        self._encode, self._tokenizer = load_prompt_encoder(teacher, transform), load_chat_tokenizer(teacher, config)
        self._config, self._problems = config, {problem.id: problem for problem in problems}
        self._token_ids = cache(self._render)

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        return self._encode(self._teacher_prompt(prompt))

    def length(self, prompt: Prompt) -> int:
        return self._encode.length(self._teacher_prompt(prompt))

    def _teacher_prompt(self, prompt: Prompt) -> Prompt:
        return replace(prompt, token_ids=self._token_ids(prompt.id))

    def _render(self, id: str) -> TokenIds:
        return build_prompt(self._problems[id], self._tokenizer, self._config).token_ids
