"""The memory bank on disk: every question that the solver was trained on, with its origin.

    bank/iteration-0001.parquet, iteration-0002.parquet, ...      one row a question

It only grows: an iteration's questions are one segment, which a killed run leaves complete or absent. Pages carry
checksums. Only the batch being read is held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vold.io import atomic_path, log

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
    """A question with its origin.

    iteration   1-based
    challenger  the run that posed it, below run_dir
    seed        of the sampling request
    label       the majority answer
    pass_rate   share of the solver's answers that agree with the label
    embedding   E numbers, of unit length; empty where questions have no embeddings
    """

    iteration: int
    challenger: str
    seed: int
    question: str
    label: str
    pass_rate: float
    embedding: tuple[float, ...] = ()


class Bank:
    """The segments in `directory`, in the order of their iterations.

    A damaged last segment is named in a warning and left out, because its iteration can be repeated. Any other damage
    raises ValueError.
    """

    def __init__(self, directory: Path):
        self._directory = directory

    def iterations(self) -> list[int]:
        """The iterations of all segments, ascending. Every page is read and checked."""
        numbers = sorted(
            int(path.stem[-4:]) for path in self._directory.glob("iteration-*.parquet") if _is_segment(path)
        )
        for number in numbers:
            if problem := _damage(self._path(number)):
                if number != numbers[-1]:
                    raise ValueError(
                        f"{self._path(number)} is damaged ({problem}) and later iterations learnt beside it; restore "
                        "it, or start another run_dir"
                    )
                log.warning(f"{self._path(number)} is damaged ({problem}) and left out")
                return numbers[:-1]
        return numbers

    def append(self, iteration: int, questions: Sequence[BankedQuestion]) -> None:
        """Write the iteration's segment, complete or not at all. Raises ValueError where the bank holds it already."""
        if iteration in self.iterations():
            raise ValueError(f"{self._path(iteration)} exists already: a bank only grows")
        self._directory.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([asdict(question) for question in questions], schema=_SCHEMA)
        with atomic_path(self._path(iteration), durable=True) as partial:
            parquet.write_table(table, partial, row_group_size=ROWS_AT_ONCE, write_page_checksum=True)

    def count(self, iterations: Sequence[int]) -> int:
        """Number of questions of these iterations."""
        return sum(parquet.read_metadata(self._path(number)).num_rows for number in iterations)

    def read(self, iterations: Sequence[int]) -> Iterator[BankedQuestion]:
        """Questions of these iterations, in order, without their embeddings."""
        names = [field.name for field in fields(BankedQuestion) if field.name != "embedding"]
        for batch in self._batches(iterations, names):
            yield from (BankedQuestion(**row) for row in batch.to_pylist())

    def embeddings(self, iterations: Sequence[int]) -> Iterator[np.ndarray]:
        """Embeddings in the order of `read`, in parts of float32 [M, E]; E is 0 where questions have none."""
        for batch in self._batches(iterations, ["embedding"]):
            if batch.num_rows:
                yield batch.column("embedding").flatten().to_numpy().reshape(batch.num_rows, -1)

    def similarity(self, embeddings_QE: np.ndarray, iterations: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Greatest and mean cosine of each unit row with the questions of these iterations, float64 [Q] each; -1 and 0,
        which have no penalty, where there are no questions."""
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


def _is_segment(path: Path) -> bool:
    return re.fullmatch(r"iteration-[0-9]{4}", path.stem) is not None


def _damage(path: Path) -> str | None:
    """The damage of a segment, read page by page against its checksums; None for an intact one."""
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as segment:
            if not segment.schema_arrow.equals(_SCHEMA):
                return f"its columns are {', '.join(f'{c.name} {c.type}' for c in segment.schema_arrow)}"
            for _ in segment.iter_batches(ROWS_AT_ONCE):
                pass
    except (pa.ArrowException, OSError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
