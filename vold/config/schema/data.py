"""Data files and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vold.config.schema.base import Positive, Strict


class DataConfig(Strict):
    """A file of problems or traces."""

    path: Path
    """.json, .jsonl, .tsv or .parquet file, or a folder of .parquet files."""
    layout: Literal[
        "orz",
        "orz-eval",
        "gsm8k",
        "geometry3k",
        "virl39k",
        "vlaa",
        "vqa",
        "vlmevalkit",
        "messages",
        "prompt-response",
        "traces",
    ]
    """The public data set whose row schema the file follows (docs/your-own-data.md)."""
    image_root: Path | None = None
    """Folder that images must lie below; the data file's own folder when null."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at the first bad row, or report it and leave it out."""
    shuffle: bool = True
    """Permute the rows anew in each epoch; false: training reads them in the file's order."""
    limit: Positive | None = None
    """Number of rows that are read; all when null."""


class PromptConfig(Strict):
    """The chat made of a problem: [system], user (problem + suffix), rendered by the tokenizer's own template."""

    system: str | None = None
    """System message; none when null."""
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Text after the problem in the user message."""
    max_tokens: Positive = 2048
    """Tokens of the longest prompt, image tokens included; data.on_error decides about a longer one."""
