"""`vold serve`: which server it becomes. That the server works is what `make test-vllm` shows."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vold.commands import serve


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name)


@pytest.mark.parametrize("stage", ["rl", "eval", "traces"])
def test_the_engine_has_the_model_that_the_stage_samples(load, tmp_path, world, monkeypatch, stage):
    become = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: become.append(call))
    section = "rollout.vllm" if stage == "rl" else "vllm"
    settings = [f"{section}.kv_cache_gib=0.5", f"{section}.urls=[http://127.0.0.1:8001]"]
    serve.run(load(stage, tmp_path / "run", *settings), host="127.0.0.1", port=8001)
    ((_, command, environment),) = become
    given = dict(pairwise(command))
    assert given["--model"] == str(world.teacher if stage == "traces" else world.student)
    assert given["--dtype"] == "float32" and given["--kv-cache-memory-bytes"] == str(2**29)
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8001")
    assert "--no-enforce-eager" in command and "--enable-scale-out" in command and "--max-model-len" not in command
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_teacher_of_an_rl_config_has_room_to_score(load, tmp_path, world, monkeypatch):
    """Its engine's own settings, and one token more: vLLM draws one behind a response of full length."""
    become = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *call: become.append(call))
    config = load("rl", tmp_path / "run", "teacher_vllm.max_model_len=64", "teacher_vllm.kv_cache_gib=0.5")
    serve.run(config, host="127.0.0.1", port=8001, teacher=True)
    ((_, command, _),) = become
    given = dict(pairwise(command))
    assert given["--model"] == str(world.teacher) and given["--kv-cache-memory-bytes"] == str(2**29)
    assert given["--max-model-len"] == "65"


def test_no_teacher_to_serve_is_one_line(load, tmp_path):
    config = load("rl", tmp_path / "run", "teacher=null", "objective.preset=grpo")
    with pytest.raises(ValueError, match="this config has no teacher; set teacher: PATH"):
        serve.run(config, host="127.0.0.1", port=8001, teacher=True)
