"""`vold serve`: the server command it runs. `make test-vllm` runs the server itself."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from vold.commands import serve
from vold.config.schema import VllmConfig


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name)


@pytest.mark.parametrize("stage", ["rl", "eval", "traces"])
def test_the_engine_has_the_model_that_the_stage_samples(load, tmp_path, world, monkeypatch, stage):
    calls = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: calls.append(call))
    section = "rollout.vllm" if stage == "rl" else "vllm"
    settings = [f"{section}.kv_cache_gib=0.5", f"{section}.urls=[http://127.0.0.1:8001]"]
    where = {"host": "127.0.0.1", "port": 8001}
    serve.serve_engine(load(stage, tmp_path / "run", *settings), where=where)
    ((_, command, environment),) = calls
    options = dict(pairwise(command))
    assert options["--model"] == str(world.teacher if stage == "traces" else world.student)
    assert options["--dtype"] == "float32" and options["--kv-cache-memory-bytes"] == str(2**29)
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8001")
    assert "--no-enforce-eager" in command and "--enable-scale-out" in command and "--max-model-len" not in command
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert options["--middleware"] == "vold.rollout.vllm.guard.Guard"
    guard = json.loads(environment["VOLD_SERVE_GUARD"])
    assert guard["secret_file"] == str(tmp_path / "run" / "engines.secret") and not guard["streams"]
    assert (tmp_path / "run" / "engines.secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run" / "engines.secret").read_text().strip() not in json.dumps([command, dict(environment)])


@pytest.mark.parametrize(
    ("transport", "where", "streams"),
    [
        ("auto", {"host": "127.0.0.1", "port": 8001}, False),
        ("auto", {"host": "draw", "port": 8001}, True),
        ("nccl", {"host": "127.0.0.1", "port": 8001}, True),
        ("files", {"host": "draw", "port": 8001}, False),
        ("auto", {"uds": "/tmp/engine.sock"}, False),
    ],
)
def test_an_engine_receives_streams_only_where_the_transport_needs_them(transport, where, streams, tmp_path):
    settings = VllmConfig(transport=transport)
    environment = serve.server_environment(tmp_path, settings, tmp_path / "secret", where)
    assert json.loads(environment["VOLD_SERVE_GUARD"])["streams"] is streams
    options = dict(pairwise(serve.server_command(tmp_path, settings, dtype="float32", where=where)))
    assert all(options[f"--{name}"] == str(value) for name, value in where.items())


def test_the_teacher_of_an_rl_config_has_room_to_score(load, tmp_path, world, monkeypatch):
    """It has its own engine settings and one token more: vLLM samples one behind a response of full length."""
    calls = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: calls.append(call))
    config = load("rl", tmp_path / "run", "teacher_vllm.max_model_len=64", "teacher_vllm.kv_cache_gib=0.5")
    serve.serve_engine(config, where={"host": "127.0.0.1", "port": 8001}, teacher=True)
    ((_, command, _),) = calls
    options = dict(pairwise(command))
    assert options["--model"] == str(world.teacher) and options["--kv-cache-memory-bytes"] == str(2**29)
    assert options["--max-model-len"] == "65"


def test_no_teacher_to_serve_is_one_line(load, tmp_path):
    config = load("rl", tmp_path / "run", "teacher=null", "objective.preset=grpo")
    with pytest.raises(ValueError, match="this config has no teacher; set teacher: PATH"):
        serve.serve_engine(config, where={"host": "127.0.0.1", "port": 8001}, teacher=True)


def test_one_of_several_teachers_is_served_by_name(load, tmp_path, world, monkeypatch):
    calls, where = [], {"host": "127.0.0.1", "port": 8001}
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: calls.append(call))
    several = (
        f"teachers={{a: {{path: {world.teacher}, vllm: {{tensor_parallel_size: 2}}}}, b: {{path: {world.student}}}}}"
    )
    config = load("rl", tmp_path / "run", "teacher=null", several)
    for name, path, size in (("a", world.teacher, "2"), ("b", world.student, "1")):
        serve.serve_engine(config, where=where, teacher=name)
        options = dict(pairwise(calls[-1][1]))
        assert options["--model"] == str(path) and options["--tensor-parallel-size"] == size
    for name in (True, "c"):
        with pytest.raises(ValueError, match="name one of a, b with --teacher"):
            serve.serve_engine(config, where=where, teacher=name)
    with pytest.raises(ValueError, match="this config has one teacher; leave the name out"):
        serve.serve_engine(load("rl", tmp_path / "one"), where=where, teacher="a")
