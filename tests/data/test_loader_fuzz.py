"""Whatever a data file holds: problems, traces, or one line that names the file."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import PROBLEM_LAYOUTS, TRACE_LAYOUTS, load_problems, load_text_traces
from vold.data.rows import READERS
from vold.data.traces import SCHEMA, load_samples
from vold.io import visible
from vold.models.tokenizer import load_tokenizer

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LOADERS = {**dict.fromkeys(PROBLEM_LAYOUTS, load_problems), **dict.fromkeys(TRACE_LAYOUTS, load_text_traces)}
HIDDEN = ["\x1e", "\x85", "\u2028", "\x1b[2J", "\u202e", "\n", "\x0c", "\x00"]
"""Separators of records, of lines and of pages, an escape sequence, a bidirectional override."""
FIELDS = ["question", "answer", "messages", "content", "prompt", "response", "images", "image", "choices", "index", "A"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["<image>", "<image 2>", "#### 4", "['a', 'b']", "\\boxed{4}", "../x.png"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def one_line(load, config: DataConfig) -> None:
    try:
        load(config)
    except ValueError as error:
        assert visible(str(error)) == str(error), repr(str(error))
        assert str(config.path) in str(error) and len(str(error).splitlines()) == 1, str(error)


@FUZZ
@given(
    content=st.binary(max_size=80)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from([b"[" * 100_000, b"9" * 5000, b'{"question": ' + b"9" * 5000 + b"}", b'"', b"\xef\xbb\xbf[]"]),
    suffix=st.sampled_from([".json", *READERS]),
    layout=st.sampled_from(sorted(LOADERS)),
)
def test_any_bytes(tmp_path, content, suffix, layout):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    one_line(LOADERS[layout], DataConfig(path=path, layout=layout))


@FUZZ
@given(
    rows=st.lists(VALUES, max_size=3),
    suffix=st.sampled_from([".json", ".jsonl"]),
    layout=st.sampled_from(sorted(LOADERS)),
)
def test_any_rows(tmp_path, rows, suffix, layout):
    path = tmp_path / f"data{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    one_line(LOADERS[layout], DataConfig(path=path, layout=layout))
    one_line(LOADERS[layout], DataConfig(path=path, layout=layout, on_error="skip"))


@FUZZ
@given(
    cells=st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=12),
    header=st.lists(st.sampled_from(FIELDS), max_size=6),
    layout=st.sampled_from(["vlmevalkit", "vqa"]),
)
@example(cells=["\x0c"], header=["images"], layout="vqa")
@example(cells=["\x85"], header=["image"], layout="vlmevalkit")
def test_any_table(tmp_path, cells, header, layout):
    path = tmp_path / "data.tsv"
    path.write_text("\t".join(header) + "\n" + "\t".join(cells), encoding="utf-8")
    one_line(LOADERS[layout], DataConfig(path=path, layout=layout))


@pytest.mark.parametrize("hidden", HIDDEN, ids=ascii)
def test_hidden_characters_in_rows_and_file_names_stay_on_one_line(tmp_path, hidden):
    """As a value, as a key, as an image's name and in the data file's own name; skipped rows are reported so too."""
    rows = [
        {"question": "q", "answer": f"1{hidden}\\frac{{"},
        {hidden: 1},
        {"question": "q", "answer": "1", "image": f"{hidden}.png"},
        {"question": [hidden], "answer": "1"},
        {"question": "q", "answer": f"x{hidden}", "choices": [hidden, "b"]},
    ]
    for row in rows:
        path = tmp_path / f"data{hidden.replace(chr(0), '')}.json"
        path.write_text(json.dumps([row]))
        with pytest.raises(ValueError) as error:
            load_problems(DataConfig(path=path, layout="vqa"))
        assert visible(str(error.value)) == str(error.value)
        notes: list[str] = []
        with pytest.raises(ValueError) as error:
            load_problems(DataConfig(path=path, layout="vqa", on_error="skip"), notes.append)
        assert visible(str(error.value)) == str(error.value) and [visible(note) for note in notes] == notes != []


@pytest.mark.parametrize("hidden", HIDDEN, ids=ascii)
def test_hidden_characters_in_a_trace_files_name_stay_on_one_line(tmp_path, tokenizer, hidden):
    path = tmp_path / f"t{hidden.replace(chr(0), '')}.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as traces") as error:
        load_samples(DataConfig(path=path, layout="traces"), tokenizer, PromptConfig(), max_tokens=64)
    assert visible(str(error.value)) == str(error.value)


@pytest.fixture(scope="module")
def tokenizer(tiny_student_dir):
    return load_tokenizer(tiny_student_dir)


@pytest.fixture(scope="module")
def written() -> bytes:
    """A table as `vold traces` writes it."""
    row = {"prompt_id": "a", "prompt": "1+1?", "gold": "2", "prompt_ids": [9], "response": "2", "response_ids": [8, 1]}
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([row | {"finish_reason": "stop"}] * 9, SCHEMA)
    parquet.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


@FUZZ
@given(cut=st.integers(0, 4000))
def test_traces_that_are_cut_off(tmp_path, tokenizer, written, cut):
    path = tmp_path / "traces.parquet"
    path.write_bytes(written[: min(cut, len(written) - 1)])
    with pytest.raises(ValueError, match=r"traces.parquet cannot be read as traces") as error:
        load_samples(DataConfig(path=path, layout="traces"), tokenizer, PromptConfig(), max_tokens=64)
    assert len(str(error.value).splitlines()) == 1


def test_a_flipped_bit_in_a_page_of_traces_is_found(tmp_path, tokenizer, written):
    damaged = bytearray(written)
    damaged[written.index(b"1+1?")] ^= 1
    path = tmp_path / "traces.parquet"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"traces.parquet cannot be read as traces.*(?i:crc|checksum)"):
        load_samples(DataConfig(path=path, layout="traces"), tokenizer, PromptConfig(), max_tokens=64)


COLUMNS = {
    "prompt_ids": [[[1]], [None], [[-1]], [[54]], [["x"]], [[]], [7]],
    "response_ids": [[[1]], [None], [[2**40]], [[]]],
    "prompt": [["q"], [None], [3]],
    "gold": [["2"], [None]],
    "prompt_id": [["a"], [None]],
}


@FUZZ
@given(columns=st.fixed_dictionaries({}, optional={name: st.sampled_from(found) for name, found in COLUMNS.items()}))
def test_any_columns_of_traces(tmp_path, tokenizer, columns):
    """What is accepted can be trained on: every id is one of the tokenizer's."""
    path = tmp_path / "traces.parquet"
    parquet.write_table(pa.table(columns or {"x": [1]}), path)
    found = []
    config = DataConfig(path=path, layout="traces")
    one_line(lambda config: found.extend(load_samples(config, tokenizer, PromptConfig(), max_tokens=64)), config)
    for sample in found:
        assert all(0 <= token < len(tokenizer) for token in (*sample.prompt.token_ids, *sample.response_ids))
