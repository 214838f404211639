"""A run directory with anything in its files: what was asked for, or one line that names the file."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vold.config import dump_config
from vold.config.schema import RlConfig
from vold.run.resumption import check_run_dir, read_config
from vold.run.run_dir import read_rows
from vold.trainer.checkpoint import Checkpoints, shard_files, verify

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sha256", "state.json", "step"]) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
BYTES = st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))


def one_line(read, path):
    try:
        return read()
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
        return None


@FUZZ
@given(content=BYTES | ANYTHING.map(lambda value: json.dumps(value).encode()) | st.just(b"a: &a [*a]"))
def test_any_config(tmp_path, content):
    config = RlConfig(
        run_dir=tmp_path,
        student="s",
        data={"path": "d", "layout": "orz"},
        steps=1,
        rollout={"max_new_tokens": 8},
        optimizer={"lr": 1e-5},
    )
    (tmp_path / "config.yaml").write_bytes(content)
    one_line(lambda: read_config(tmp_path / "config.yaml"), tmp_path)
    one_line(lambda: check_run_dir(config, "rl", resume=True), tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config, "rl"))
    check_run_dir(config, "rl", resume=True)


@FUZZ
@given(lines=st.lists(BYTES | ANYTHING.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_any_metrics(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(lines))
    rows = one_line(lambda: read_rows(path), path)
    assert rows is None or (rows[0] == {"step": 1} and all(isinstance(row, dict) for row in rows))


@FUZZ
@given(pointer=BYTES)
def test_any_pointer(tmp_path, pointer):
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True, exist_ok=True)
    (tmp_path / "checkpoints" / "latest").write_bytes(pointer)
    step = one_line(Checkpoints(tmp_path, None).latest_step, tmp_path)
    assert step is None or (tmp_path / "checkpoints" / f"step-{step:06d}").is_dir()


@FUZZ
@given(manifest=BYTES | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_any_manifest(tmp_path, manifest):
    (tmp_path / "manifest.json").write_bytes(manifest)
    (tmp_path / "state.json").write_text("{}")
    one_line(lambda: verify(tmp_path), tmp_path)
    one_line(lambda: shard_files(tmp_path), tmp_path)
