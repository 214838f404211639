"""Data files and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field as FieldInfo
from pydantic import model_validator

from vold.config.schema.base import Positive, Strict

Field = Literal[
    "question", "answer", "images", "choices", "category", "hint", "system", "messages", "prompt", "response", "input"
]
"""What a row is made of, whatever its columns are called; `prompt` is another name for `question`."""


class DataConfig(Strict):
    """A set of problems or traces: a file, a folder, or a data set of the Hugging Face hub."""

    path: Path
    """.parquet, .jsonl, .json, .csv or .tsv file (also .gz, .bz2, .xz, .zst); a folder of such files, of a hub
    snapshot or of `save_to_disk`; or a hub id (OWNER/NAME) that is cached or can be downloaded."""
    layout: Literal[
        "orz",
        "orz-eval",
        "gsm8k",
        "geometry3k",
        "virl39k",
        "vlaa",
        "vqa",
        "vlmevalkit",
        "mmmu",
        "alpaca",
        "messages",
        "prompt-response",
        "traces",
    ]
    """The row schema that the file follows (docs/your-own-data.md)."""
    columns: dict[Field, str] = FieldInfo(default={})
    """The file's own column for each field, e.g. {question: problem, answer: reward_model.ground_truth}: dots reach
    into nested columns. Fields that are left out are read from the layout's columns."""
    split: str | None = None
    """The split that is read (train, validation, test, …) of a folder that holds several."""
    subset: str | None = None
    """The configuration that is read of a data set that has several (openai/gsm8k: main or socratic)."""
    answer_in: Literal["cell", "hashes", "boxed", "answer_tag"] | None = None
    """Where in its cell the gold answer is: the whole cell, behind the last ####, in the last \\boxed{}, or between
    <answer> tags. When null, as the layout has it: behind #### in gsm8k, in the box if there is one in virl39k."""
    targets: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation stage 1 trains on; with all, each becomes a sample of its own behind the
    turns before it."""
    image_root: Path | None = None
    """Folder that images must lie below; the data file's own folder when null."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at the first bad row, or report it and leave it out."""
    shuffle: bool = True
    """Permute the rows anew in each epoch; false: training reads them in the file's order."""
    limit: Positive | None = None
    """Number of rows that are read; all when null."""
    streaming: bool = False
    """Stage 1 on a large set: read the files again in each epoch, in their order, without a copy on disk. Needs
    shuffle: false."""
    cache_dir: Path | None = None
    """Folder for the token ids of sets over 64 MiB, which are memory-mapped; beside the data, in PATH.arrow, when null.
    Smaller sets stay in memory."""

    @model_validator(mode="after")
    def _stream_in_order(self):
        if self.streaming and self.shuffle:
            raise ValueError("data.streaming = true reads rows in their order: set data.shuffle=false")
        return self


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class PromptConfig(Strict):
    """The chat made of a problem: [system], [earlier turns], user (problem + suffix), rendered by one chat
    template."""

    system: str | None = None
    """System message of problems that have none of their own; none when null."""
    suffix: str | None = None
    """Text after the problem in the user message. When null, the request for a \\boxed{} answer in stage 2 and in
    evaluation, where answers are graded, and nothing in stages 0 and 1."""
    max_tokens: Positive = 2048
    """Tokens of the longest prompt, image tokens included; data.on_error decides about a longer one."""
    chat_template: Path | None = None
    """Checkpoint directory or .jinja file whose chat template renders the prompts of every stage and is exported with
    the student; when null, that of the model that is asked (the teacher in `vold traces`, else the student)."""
    chat_template_kwargs: dict[str, bool | int | float | str] = FieldInfo(default={})
    """Values of the chat template's variables, e.g. {enable_thinking: false}."""

    @property
    def suffix_text(self) -> str:
        """The suffix of a prompt whose answers are graded."""
        return BOXED if self.suffix is None else self.suffix

    def without_grading(self) -> PromptConfig:
        """The rendering of stages 0 and 1: a suffix only where it was asked for."""
        return self if self.suffix is not None else self.model_copy(update={"suffix": ""})
