"""What a teacher reads in the place of a student's prompt: the pair's chat template or its own, its own number of
tokens for an image, other images, or a text that the student does not get (privileged: a hint, a description)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vold.config.schema import DataConfig, PromptConfig, TeacherViewConfig
from vold.data.conversations import IMAGE
from vold.data.packing import EncodedPrompt
from vold.data.pictures import picture_path
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.io import visible
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import ImageTransform, load_prompt_encoder
from vold.types import Prompt


class TeacherView:
    """Prompt -> the prompt that the teacher reads: the problem behind the student's, rendered by the teacher's
    tokenizer.

    prompt: the section that renders it (see load_chat_tokenizer). data: of the problems, where a column of `view` holds
    images. sees: whether the teacher reads images; one that does not reads a row whose text has no <image> mark without
    its images. key: of the view in the config.
    """

    def __init__(
        self,
        checkpoint: Path,
        problems: Iterable[Problem],
        prompt: PromptConfig,
        *,
        view: TeacherViewConfig = TeacherViewConfig(),
        data: DataConfig | None = None,
        sees: bool = True,
        key: str = "teacher_view",
    ):
        self._key, self._view, self._data, self._sees = key, view, data, sees
        self._prompt, self._tokenizer = prompt, load_chat_tokenizer(checkpoint, prompt)
        self._problems = {problem.id: problem for problem in problems}
        self._rendered = cache(self._render)

    def __call__(self, prompt: Prompt) -> Prompt:
        return replace(prompt, **self._rendered(prompt.id))

    def reads(self, prompt: Prompt) -> bool:
        """Whether the teacher can read what it would be asked."""
        return self._sees or not self._seen(self._problems[prompt.id]).images

    def check(self) -> set[Path]:
        """The images that the teacher reads. Raises ValueError for a column that no row has, or a cell that is no text
        and no image, before a model is loaded."""
        for name in ("prompt_column", "images_column", "degraded_column"):
            column = getattr(self._view, name)
            if column is not None and not any(_is_given(p, column) for p in self._problems.values()):
                where = self._data.path if self._data else "the data"
                raise ValueError(
                    f"{self._key}.{name} = {column!r} is in no row of {where}, or is read as another field; correct it"
                )
        if self._view.images_column is not None and not self._sees:
            raise ValueError(f"{self._key}.images_column: this teacher reads text only; leave it out")
        return {image for problem in self._problems.values() for image in self._seen(problem).images}

    def degraded(self, prompt: Prompt) -> Prompt:
        """The prompt with the images of `degraded_column`, VA-OPD's second reading."""
        seen, problem = self(prompt), self._problems[prompt.id]
        images = self._images(problem, self._view.degraded_column)
        if images is not None and len(images) != len(seen.images):
            raise ValueError(
                f"{visible(problem.id)}: {self._view.degraded_column!r} has {len(images)} images and the problem "
                f"{len(seen.images)}"
            )
        return seen if images is None else replace(seen, images=images)

    def _render(self, id: str) -> dict[str, Any]:
        prompt = build_prompt(self._seen(self._problems[id]), self._tokenizer, self._prompt)
        return {"token_ids": prompt.token_ids, "images": prompt.images}

    def _seen(self, problem: Problem) -> Problem:
        images = self._images(problem, self._view.images_column)
        changed = replace(problem, images=problem.images if images is None else images)
        if (column := self._view.prompt_column) is not None and _is_given(problem, column):
            text = problem.metadata[column]
            if not isinstance(text, str):
                raise ValueError(f"{visible(problem.id)}: column {column!r} must be a text")
            changed = replace(changed, question=text)
        marks = sum(text.count(IMAGE) for _, text in changed.history) + changed.question.count(IMAGE)
        if marks == len(changed.images):
            return changed
        if marks == 0 and not self._sees:
            return replace(changed, images=())
        if marks == 0:
            return replace(changed, question=IMAGE * len(changed.images) + changed.question)
        raise ValueError(
            f"{visible(problem.id)}: what {self._key} reads has {marks} {IMAGE} marks and {len(changed.images)} images"
        )

    def _images(self, problem: Problem, column: str | None) -> tuple[Path, ...] | None:
        if column is None or not _is_given(problem, column):
            return None
        assert self._data is not None, "images come with the set that they are in"
        folder = self._data.path if self._data.path.is_dir() else self._data.path.parent
        value: Any = problem.metadata[column]
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        try:
            return tuple(picture_path(each, self._data, folder) for each in values)
        except ValueError as error:
            raise ValueError(f"{visible(problem.id)}: column {column!r}: {error}") from None


class TeacherPromptEncoder:
    """A PromptEncoder of what a teacher reads (view), by its own image processor.

    transform: applied to every image first (see ImageProcessor). degraded: see TeacherView.degraded.
    """

    def __init__(
        self, checkpoint: Path, view: TeacherView, transform: ImageTransform | None = None, *, degraded: bool = False
    ):
        self._encode = load_prompt_encoder(checkpoint, transform)
        self._view = view.degraded if degraded else view

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        return self._encode(self._view(prompt))

    def length(self, prompt: Prompt) -> int:
        return self._encode.length(self._view(prompt))


def _is_given(problem: Problem, column: str) -> bool:
    value = problem.metadata.get(column)
    return value is not None and not (isinstance(value, str | list | tuple) and not value)
