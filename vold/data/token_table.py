"""Token ids of traces as an Arrow table: in memory while it is small, else in one memory-mapped file that all ranks
share; or read again from the source in every epoch (data.streaming)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from filelock import FileLock

from vold.config.schema import DataConfig
from vold.io import atomic_path, log
from vold.types import Prompt, Sample

IN_MEMORY = 64 << 20
"""Bytes of token ids and texts above which a table goes to disk."""
TABLE = pa.schema(
    {
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "gold": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "images": pa.list_(pa.string()),
        "prompt_tokens": pa.int32(),  # those of its images included
    }
)

Batches = Callable[[], Iterator[pa.RecordBatch]]
"""A set's rows by the schema TABLE, from the beginning at each call."""


def open_table(config: DataConfig, batches: Batches, key: Any) -> pa.Table:
    """The table of a set. What is too large for memory is written to data.cache_dir once, under a name made of `key`,
    which says all that the rows depend on. Raises ValueError where that cannot be written."""
    folder = config.cache_dir or config.path.with_name(f"{config.path.name}.arrow")
    path = folder / f"{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]}.arrow"
    if path.exists():
        return _mapped(path)
    rest, first, size = batches(), [], 0
    for batch in rest:
        first.append(batch)
        size += batch.nbytes
        if size > IN_MEMORY:
            break
    else:
        return pa.Table.from_batches(first, TABLE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the ranks of a node: one writes, the others wait
            if not path.exists():
                _write(path, chain(first, rest))
    except OSError as error:
        raise ValueError(
            f"token ids of {config.path} cannot be kept: {error}; set data.cache_dir to a folder with room, or "
            "data.streaming=true and data.shuffle=false"
        ) from None
    return _mapped(path)


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    with atomic_path(path) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, TABLE) as writer:
        for batch in batches:
            writer.write_batch(batch)
    log.info(f"token ids are kept in {path} ({path.stat().st_size >> 20} MiB), memory-mapped; it can be deleted")


def _mapped(path: Path) -> pa.Table:
    from datasets import Dataset

    return Dataset.from_file(str(path)).data.table


class TraceTable(Sequence[Sample]):
    """Samples of at most max_tokens, made from a table's rows on access: all of them at once would take more memory.
    rows: of the table, longer ones included."""

    def __init__(self, table: pa.Table, max_tokens: int):
        self._table, self.rows = table, len(table)
        self._kept = np.flatnonzero(_lengths(table) <= max_tokens)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        return _sample(self._table, int(self._kept[index]))

    def pictures(self) -> list[str]:
        """The image files of all rows, once each."""
        return compute.unique(compute.list_flatten(self._table["images"])).to_pylist()


class TraceStream(Sequence[Sample]):
    """The same samples, read in order: one batch of rows is in memory. Going back starts again at the first row."""

    def __init__(self, batches: Batches, max_tokens: int):
        self._batches = batches
        lengths = [_lengths(batch) for batch in batches()]
        self.rows = sum(map(len, lengths))
        self._kept = np.flatnonzero(np.concatenate(lengths or [np.empty(0)]) <= max_tokens)
        self._rewind()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        row = int(self._kept[index])
        if row < self._first:
            self._rewind()
        while row >= self._first + len(self._window):
            self._first += len(self._window)
            self._window = next(self._rest)
        return _sample(self._window, row - self._first)

    def pictures(self) -> list[str]:
        """None: the rows would have to be read once more."""
        return []

    def _rewind(self) -> None:
        self._rest, self._first = self._batches(), 0
        self._window = pa.RecordBatch.from_pylist([], TABLE)


def _lengths(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    lengths = compute.add(rows["prompt_tokens"], compute.list_value_length(rows["response_ids"]))
    return lengths.to_numpy(zero_copy_only=False) if isinstance(lengths, pa.Array) else lengths.to_numpy()


def _sample(rows: pa.Table | pa.RecordBatch, row: int) -> Sample:
    prompt_ids, response_ids = (rows[name][row].values.to_numpy() for name in ("prompt_ids", "response_ids"))
    id, text, gold, images = (rows[name][row].as_py() for name in ("prompt_id", "prompt", "gold", "images"))
    prompt = Prompt(id, prompt_ids, text, gold, tuple(map(Path, images or ())))
    return Sample(prompt, response_ids, advantage=0.0, pg_weight=0.0, kl_weight=0.0)
