"""Damaged run directories: a page or one line, whatever their files hold."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vold.report import find_runs, read_run, write_report

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "step",
    "reward",
    "loss",
    "kl_teacher",
    "prompt",
    "response",
    "images",
    "verdict",
    "gold",
    "sets",
    "steps",
    "verb",
]
OBJECTS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=5)
LINES = st.lists(OBJECTS.map(json.dumps) | st.text(max_size=20), max_size=4).map(
    lambda lines: "\n".join(lines).encode("utf-8", "replace")
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "config.yaml": LINES | st.binary(max_size=30),
        "metrics.jsonl": LINES | st.binary(max_size=30),
        "samples.jsonl": LINES,
        "evaluation.json": LINES,
    },
)


def written(folder, files):
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES)
def test_any_files_are_read(tmp_path, files):
    record = read_run(written(tmp_path, files))
    assert len({len(column) for column in record.metrics.values()}) <= 1
    assert record.verb and record.skipped >= 0
    if not files:
        with pytest.raises(ValueError, match="holds no run"):
            find_runs(tmp_path)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES.filter(bool))
def test_a_page_comes_of_them(tmp_path_factory, files):
    run = written(tmp_path_factory.mktemp("run"), files)
    out = tmp_path_factory.mktemp("out") / "report.html"
    write_report([run], out, title="x")
    assert out.read_text().rstrip().endswith("</html>")
