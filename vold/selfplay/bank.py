"""The memory bank: every question that the solver was trained on, with where it came from, on disk.

    bank/iteration-0001.parquet, iteration-0002.parquet, ...      one row a question

It only grows: an iteration's questions are one segment, written beside its place, flushed to the disk and renamed, so
that a killed run leaves a segment whole or absent. Pages carry checksums. Nothing but the batch being read is held in
memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

ROWS_AT_ONCE = 4096
_SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("challenger", pa.string()),
        ("seed", pa.int64()),
        ("question", pa.string()),
        ("label", pa.string()),
        ("pass_rate", pa.float64()),
        ("embedding", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class BankedQuestion:
    """iteration: 1-based; challenger: the checkpoint that posed it, below run_dir; seed: it was drawn with; label: the
    majority's answer; pass_rate: share of the solver's answers that agreed with it; embedding: unit length, E numbers,
    or empty where none was made."""

    iteration: int
    challenger: str
    seed: int
    question: str
    label: str
    pass_rate: float
    embedding: tuple[float, ...] = ()


class Bank:
    """Segments in `directory`, in order of their iteration; a damaged last one is named and left out, for the iteration
    that wrote it can be done again. Damage before it raises ValueError."""

    def __init__(self, directory: Path):
        self._directory = directory

    def iterations(self) -> list[int]:
        """The iterations whose questions are here, ascending. Every page is read and checked."""
        numbers = sorted(int(path.stem[-4:]) for path in self._directory.glob("iteration-*.parquet") if _is_ours(path))
        for number in numbers:
            if problem := _damage(self._path(number)):
                if number != numbers[-1]:
                    raise ValueError(
                        f"{self._path(number)} is damaged ({problem}) and later iterations learnt beside it; restore "
                        "it, or start another run_dir"
                    )
                print(f"vold: {self._path(number)} is damaged ({problem}) and left out", flush=True)
                return numbers[:-1]
        return numbers

    def append(self, iteration: int, questions: Sequence[BankedQuestion]) -> None:
        """Write the iteration's segment, whole or not at all. Raises ValueError where the bank holds it already."""
        if iteration in self.iterations():
            raise ValueError(f"{self._path(iteration)} exists already: a bank only grows")
        self._directory.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([asdict(question) for question in questions], schema=_SCHEMA)
        partial = self._directory / f".iteration-{iteration:04d}.partial"
        parquet.write_table(table, partial, row_group_size=ROWS_AT_ONCE, write_page_checksum=True)
        _flush(partial)
        os.replace(partial, self._path(iteration))
        _flush(self._directory)

    def count(self, iterations: Sequence[int]) -> int:
        """How many questions these iterations have."""
        return sum(parquet.read_metadata(self._path(number)).num_rows for number in iterations)

    def read(self, iterations: Sequence[int]) -> Iterator[BankedQuestion]:
        """Questions of these iterations, in order, without their embeddings."""
        names = [field.name for field in fields(BankedQuestion) if field.name != "embedding"]
        for batch in self._batches(iterations, names):
            yield from (BankedQuestion(**row) for row in batch.to_pylist())

    def embeddings(self, iterations: Sequence[int]) -> Iterator[np.ndarray]:
        """Their embeddings in the same order, float32 [M, E] at a time; E is 0 where none were made."""
        for batch in self._batches(iterations, ["embedding"]):
            if batch.num_rows:
                yield batch.column("embedding").flatten().to_numpy().reshape(batch.num_rows, -1)

    def similarity(self, embeddings_QE: np.ndarray, iterations: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """For each unit row its greatest and its mean cosine with the questions of these iterations, float64 [Q] each;
        where there are none -1 and 0, which no penalty knows."""
        nearest_Q, total_Q, count = np.full(len(embeddings_QE), -1.0), np.zeros(len(embeddings_QE)), 0
        for bank_ME in self.embeddings(iterations):
            cosine_QM = embeddings_QE @ bank_ME.T
            nearest_Q = np.maximum(nearest_Q, cosine_QM.max(1))
            total_Q, count = total_Q + cosine_QM.sum(1), count + len(bank_ME)
        return nearest_Q, total_Q / max(count, 1)

    def _batches(self, iterations: Sequence[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
        for number in iterations:
            try:
                with parquet.ParquetFile(self._path(number), page_checksum_verification=True) as segment:
                    yield from segment.iter_batches(ROWS_AT_ONCE, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self._path(number)} is damaged ({_first_line(error)}); restore it") from None

    def _path(self, iteration: int) -> Path:
        return self._directory / f"iteration-{iteration:04d}.parquet"


def _is_ours(path: Path) -> bool:
    return re.fullmatch(r"iteration-[0-9]{4}", path.stem) is not None


def _damage(path: Path) -> str | None:
    """What is wrong with a segment, read page by page against its checksums; None: nothing."""
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as segment:
            if segment.schema_arrow.names != _SCHEMA.names:
                return f"its columns are {', '.join(segment.schema_arrow.names)}"
            for _ in segment.iter_batches(ROWS_AT_ONCE):
                pass
    except (pa.ArrowException, OSError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
