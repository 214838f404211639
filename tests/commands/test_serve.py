"""`vold serve`: the server command it runs. `make test-vllm` runs the server itself."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vold.commands import serve


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name)


@pytest.mark.parametrize("stage", ["rl", "eval", "traces"])
def test_the_engine_has_the_model_that_the_stage_samples(load, tmp_path, world, monkeypatch, stage):
    calls = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: calls.append(call))
    section = "rollout.vllm" if stage == "rl" else "vllm"
    settings = [f"{section}.kv_cache_gib=0.5", f"{section}.urls=[http://127.0.0.1:8001]"]
    serve.serve_engine(load(stage, tmp_path / "run", *settings), host="127.0.0.1", port=8001)
    ((_, command, environment),) = calls
    options = dict(pairwise(command))
    assert options["--model"] == str(world.teacher if stage == "traces" else world.student)
    assert options["--dtype"] == "float32" and options["--kv-cache-memory-bytes"] == str(2**29)
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8001")
    assert "--no-enforce-eager" in command and "--enable-scale-out" in command and "--max-model-len" not in command
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_teacher_of_an_rl_config_has_room_to_score(load, tmp_path, world, monkeypatch):
    """It has its own engine settings and one token more: vLLM samples one behind a response of full length."""
    calls = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: calls.append(call))
    config = load("rl", tmp_path / "run", "teacher_vllm.max_model_len=64", "teacher_vllm.kv_cache_gib=0.5")
    serve.serve_engine(config, host="127.0.0.1", port=8001, teacher=True)
    ((_, command, _),) = calls
    options = dict(pairwise(command))
    assert options["--model"] == str(world.teacher) and options["--kv-cache-memory-bytes"] == str(2**29)
    assert options["--max-model-len"] == "65"


def test_no_teacher_to_serve_is_one_line(load, tmp_path):
    config = load("rl", tmp_path / "run", "teacher=null", "objective.preset=grpo")
    with pytest.raises(ValueError, match="this config has no teacher; set teacher: PATH"):
        serve.serve_engine(config, host="127.0.0.1", port=8001, teacher=True)
