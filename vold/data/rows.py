"""Rows of a data set, one at a time, whatever holds them: a file, a folder, `save_to_disk`, a hub snapshot or a hub id.

`datasets` reads what is typed (Parquet, Arrow, `save_to_disk`, configurations in a data set's README); the hub's client
brings a hub id onto this machine. Text formats are read by Python's json and csv, cell by cell as they are written: the
readers of `datasets` guess types by column, and turn the answers "007", "NA" and "2024-01-01" into 7, nothing and a
date."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from vold.config.schema import DataConfig
from vold.data.sources import COMPRESSED, find_files, suffix_of
from vold.jsonl import bounded_lines
from vold.untrusted import JSON_BYTES, check_regular, check_size

BATCH = 256  # rows of a Parquet file that are decoded together
MAX_JSON = 8 * JSON_BYTES
"""Bytes, and characters once unpacked, of a JSON file: it is read whole."""


@dataclass(frozen=True)
class Row:
    """A row's cells and where it stands. number: from 1, through all files of the set; folder: the set's, which paths
    in the row are below."""

    number: int
    where: str
    cells: Any
    folder: Path


def read_rows(config: DataConfig) -> Iterator[Row]:
    """All rows of the set in order. Raises ValueError, one line that names the file, for what cannot be read."""
    data_files, number = find_files(config), 0
    if data_files.table is not None:
        for number, cells in enumerate(_table_cells(data_files.table), start=1):
            yield Row(number, f"{config.path} row {number}", cells, data_files.folder)
    for file in data_files.files:
        for within, cells in enumerate(_read_file(file), start=1):
            number += 1
            yield Row(number, f"{file} row {within}", cells, data_files.folder)


def _read_file(file: Path) -> Iterator:
    check_regular(file)
    try:
        yield from READERS.get(suffix_of(file), _read_json)(file)
    except UnicodeError as error:
        raise ValueError(f"{file} cannot be read: {error}; save it as UTF-8") from None
    except (pa.ArrowException, csv.Error, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


# -- typed formats -------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> Iterator[dict]:
    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        decode = _json_columns(table.schema_arrow)
        for batch in table.iter_batches(batch_size=BATCH):
            yield from (decode(row) for row in batch.to_pylist())


def _table_cells(table: pa.Table) -> Iterator[dict]:
    decode = _json_columns(table.schema)
    for batch in table.to_batches(max_chunksize=BATCH):
        yield from (decode(row) for row in batch.to_pylist())


def _json_columns(schema: pa.Schema) -> Callable[[dict], dict]:
    """A function that decodes the columns that `datasets` keeps as JSON text. Pictures stay {bytes, path}."""
    if b"huggingface" not in (schema.metadata or {}) or b'"Json"' not in schema.metadata[b"huggingface"]:
        return lambda row: row
    from datasets import Features  # slow to import, and rarely needed

    features = Features.from_arrow_schema(schema)
    return lambda row: {name: _decoded(features.get(name), cell) for name, cell in row.items()}


def _decoded(feature: Any, cell: Any) -> Any:
    if type(feature).__name__ == "Json" and isinstance(cell, str):
        return json.loads(cell)
    if isinstance(feature, dict) and isinstance(cell, dict):
        return {name: _decoded(feature.get(name), value) for name, value in cell.items()}
    inner = getattr(feature, "feature", None)
    if inner is not None and isinstance(cell, list):
        return [_decoded(inner, value) for value in cell]
    return cell


# -- text formats --------------------------------------------------------------------------------------------------


def _open_text(file: Path, newline: str) -> IO[str]:
    return io.TextIOWrapper(_open(file), encoding=_encoding(file), newline=newline)


def _encoding(file: Path) -> str:
    """UTF-8, or what the byte order mark says (Excel and Notepad write UTF-8 and UTF-16 with one)."""
    with _open(file) as binary:
        start = binary.read(4)
    if start in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"):
        return "utf-32"
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))  # type: ignore[arg-type]
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)(file, "rb")


def _read_jsonl(file: Path) -> Iterator:
    """The rows of its lines; an error in the place of a line that cannot be read."""
    with _open(file) as binary:
        for number, line in enumerate(_lines(binary, _encoding(file)), start=1):
            where = f"{file} line {number}"
            if line is None:
                yield ValueError(f"{where} is too long to be a row")
            elif line.strip():
                try:
                    yield _json(line, where)
                except ValueError as error:
                    yield error


def _lines(binary: IO[bytes], encoding: str) -> Iterator[bytes | None]:
    """Lines in UTF-8, which end at \n alone: \x85 and \u2028 are part of one."""
    if encoding == "utf-8-sig":
        yield from bounded_lines(binary)  # type: ignore[arg-type]
    else:
        yield from (line.encode() for line in io.TextIOWrapper(binary, encoding, newline="\n"))


def _read_json(file: Path) -> Iterator:
    """A list of rows; or a row on each line, as in many files that are called .json."""
    check_size(file, MAX_JSON)
    with _open_text(file, newline="\n") as text:
        content = text.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ValueError(f"{file} has over {MAX_JSON} characters; keep so many rows as .jsonl or .parquet")
    try:
        rows = _json(content, str(file))
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        yield from _read_jsonl(file)
        return
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, list(rows)[:8]))}" if isinstance(rows, dict) else ""
        raise ValueError(f"{file} must hold a list of rows, found {type(rows).__name__}{keys}")
    yield from rows


def _read_table(file: Path) -> Iterator[dict]:
    """Rows of a CSV or TSV file by its header, without their empty cells. An image may be given as the index of a row
    that holds it, as in VLMEvalKit's tables."""
    named = {row["image"] for row in _table_rows(file) if "index" in row and len(row.get("image", "x" * 99)) <= 64}
    rows = _table_rows(file) if named else ()
    held = {row["index"]: row["image"] for row in rows if row.get("index") in named and "image" in row}
    for row in _table_rows(file):
        yield row | {"image": held.get(row["image"], row["image"])} if held and "image" in row else row


def _table_rows(file: Path) -> Iterator[dict]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    with _open_text(file, newline="") as text:
        header = text.readline()
        delimiter = "\t" if suffix_of(file) == ".tsv" else ","
        if delimiter == "," and "," not in header and ";" in header:
            delimiter = ";"  # Excel's where a comma is the decimal sign
        table = csv.DictReader(chain([header], text), delimiter=delimiter)
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        names = [name for name in table.fieldnames if name]
        if len(set(names)) < len(names):
            raise ValueError(f"{file} has two columns {max(names, key=names.count)!r}; rename one")
        for number, row in enumerate(table, start=1):
            if row.get(None):
                raise ValueError(
                    f"{file} row {number} has more cells than the header; put those with a delimiter in quotes"
                )
            yield {name: cell for name, cell in row.items() if name and cell}


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, a thousand brackets
        raise ValueError(f"{where} is not JSON: {error}") from None


READERS: dict[str, Callable[[Path], Iterator]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
assert not READERS.keys() & COMPRESSED
