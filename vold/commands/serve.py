"""`vold serve`: one vLLM engine in a process of its own, for a config that names it in `vllm.urls`."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from vold.config.schema import EvalConfig, RlConfig, TracesConfig, VllmConfig
from vold.rollout.vllm.engines import engine_options, settings_for_scoring

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that weight sync uses
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # see vold.rollout.vllm.worker
    "VLLM_NO_USAGE_STATS": "1",
}


def serve_engine(config: RlConfig | EvalConfig | TracesConfig, *, host: str, port: int, teacher: bool = False) -> None:
    """Replace this process by vLLM's API server; does not return.

    It serves the model that the config's stage samples, or with `teacher` an rl config's teacher. Anyone who reaches
    the port can replace the weights: keep it on loopback, or inside the cluster's private network. Raises ValueError
    where vLLM is not installed or there is no teacher.
    """
    checkpoint, settings = _teacher(config) if teacher else _sampled_model(config)
    command = server_command(checkpoint, settings, dtype=config.dtype, host=host, port=port)
    if find_spec("vllm") is None:
        raise ValueError("vold serve becomes vLLM's server, which is not installed here: pip install 'vold[vllm]'")
    os.execvpe(command[0], command, {**os.environ, **ENVIRONMENT})


def server_command(checkpoint: Path, settings: VllmConfig, *, dtype: str, host: str, port: int) -> list[str]:
    """Arguments that start vLLM's server by its module: builds of vLLM under another name have no `vllm` program."""
    options = {**engine_options(checkpoint, settings, dtype), "host": host, "port": port, "enable_scale_out": True}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-log-stats"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def _sampled_model(config: RlConfig | EvalConfig | TracesConfig) -> tuple[Path, VllmConfig]:
    if isinstance(config, RlConfig):
        return config.student, config.rollout.vllm
    return (config.checkpoint if isinstance(config, EvalConfig) else config.teacher), config.vllm


def _teacher(config: RlConfig) -> tuple[Path, VllmConfig]:
    if config.teacher is None:
        raise ValueError("vold serve teacher: this config has no teacher; set teacher: PATH")
    return config.teacher, settings_for_scoring(config.teacher, config.teacher_vllm)
