"""`vold serve`: one vLLM engine in a process of its own, for a config that names it in `vllm.urls`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from vold.config.schema import EvalConfig, RlConfig, TracesConfig, VllmConfig
from vold.config.schema.run import SECRET
from vold.rollout.vllm.adapters import EngineAdapter
from vold.rollout.vllm.engines import engine_options, settings_for_scoring
from vold.rollout.vllm.guard import SETTINGS, Guard, Settings, read_secret
from vold.rollout.vllm.remote import is_local

NO_DOMAIN = "pictures-travel-in-requests.invalid"  # that pictures may be fetched from

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that weight sync uses
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # see vold.rollout.vllm.worker
    "VLLM_NO_USAGE_STATS": "1",
}


def serve_engine(
    config: RlConfig | EvalConfig | TracesConfig, *, where: dict[str, str | int], teacher: bool | str = False
) -> None:
    """Replace this process by vLLM's API server; does not return.

    It serves the model that the config's stage samples, or with `teacher` an rl config's teacher (a name: that one of
    its teachers), to those who have the run's secret (vold.rollout.vllm.guard). where: {"host", "port"}, or {"uds":
    path of a socket}. Raises ValueError where vLLM is not installed, there is no such teacher, or others may read the
    secret.
    """
    checkpoint, settings = _teacher(config, teacher) if teacher else _sampled_model(config)
    synced = config.synced_adapter if isinstance(config, RlConfig) and not teacher else None
    adapter = EngineAdapter(synced, checkpoint) if synced else None
    command = server_command(checkpoint, settings, dtype=config.dtype, where=where, adapter=adapter)
    if find_spec("vllm") is None:
        raise ValueError(
            "vold serve becomes vLLM's server, which is not installed here: "
            "pip install -c constraints-vllm.txt -e '.[vllm]'"
        )
    secret_file = settings.secret_file or config.run_dir / SECRET
    read_secret(secret_file)
    os.umask(0o077)  # a socket of ours alone
    environment = server_environment(checkpoint, settings, secret_file, where, adapters=adapter is not None)
    os.execvpe(command[0], command, {**os.environ, **environment})


def server_environment(
    checkpoint: Path, settings: VllmConfig, secret_file: Path, where: dict[str, str | int], *, adapters: bool = False
) -> dict[str, str]:
    """Environment variables of the server, with what its guard has to know. adapters: its policy comes as adapters."""
    paths = (str(path.resolve()) for path in (secret_file, checkpoint, settings.weights_dir))
    reachable = "host" in where and not is_local(f"http://{where['host']}")
    streams = settings.transport == "nccl" or (settings.transport == "auto" and reachable)
    guard = Settings(*paths, streams=streams, adapters=adapters)
    updating = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapters else {}
    return {**ENVIRONMENT, **updating, SETTINGS: json.dumps(asdict(guard))}


def server_command(
    checkpoint: Path,
    settings: VllmConfig,
    *,
    dtype: str,
    where: dict[str, str | int],
    adapter: EngineAdapter | None = None,
) -> list[str]:
    """Arguments that start vLLM's server by its module: builds of vLLM under another name have no `vllm` program."""
    options = {**engine_options(checkpoint, settings, dtype, adapter), **where, "enable_scale_out": True}
    options |= {"middleware": f"{Guard.__module__}.{Guard.__name__}", "allowed_media_domains": NO_DOMAIN}
    options["disable_fastapi_docs"] = True
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-log-stats"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            command += [f"--{flag}", *value]
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def _sampled_model(config: RlConfig | EvalConfig | TracesConfig) -> tuple[Path, VllmConfig]:
    if isinstance(config, RlConfig):
        return config.student, config.rollout.vllm
    return (config.checkpoint if isinstance(config, EvalConfig) else config.teacher), config.vllm


def _teacher(config: RlConfig, name: bool | str) -> tuple[Path, VllmConfig]:
    if config.teachers:
        if name not in config.teachers:
            raise ValueError(f"vold serve teacher: name one of {', '.join(config.teachers)} with --teacher")
        several = config.teachers[str(name)]
        return several.path, settings_for_scoring(several.path, several.vllm)
    if config.teacher is None:
        raise ValueError("vold serve teacher: this config has no teacher; set teacher: PATH")
    if isinstance(name, str):
        raise ValueError(f"vold serve teacher --teacher {name}: this config has one teacher; leave the name out")
    return config.teacher, settings_for_scoring(config.teacher, config.teacher_vllm)
