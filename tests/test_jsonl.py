"""JSONL files that were cut off: the last line may be missing, others may not."""

from __future__ import annotations

import pytest

from vold.jsonl import parse_row, read_jsonl


def test_an_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", ["[1]", '{"a"', "nonsense", "[" * 100_000])
def test_other_damage_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    assert parse_row(line) is None
    with pytest.raises(ValueError, match=r"rows.jsonl line 2 is damaged; mend it or delete the lines from there on"):
        read_jsonl(path)


def test_rows_may_have_to_be_valid(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": "x"}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_jsonl(path, lambda row: isinstance(row["step"], int))
