"""`vold export`: a checkpoint of a run as a directory that from_pretrained and vLLM load."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from vold.config.schema import AdapterConfig, ExportConfig, PromptConfig
from vold.io import log
from vold.models.chat_template import write_chat_template
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.peft_directory import write_adapter
from vold.models.student import load_chunks
from vold.models.weights import export_adapters, export_weights
from vold.parallel.launch import initialise
from vold.run.resumption import read_config
from vold.trainer.checkpoint import Checkpoints
from vold.untrusted import as_vold_writes


def export_model(config: ExportConfig) -> None:
    """Write config.out. Tokenizer, processor and frozen tensors come from the run's own student, and so does the
    chat template, unless prompt.chat_template names another.

    Raises ValueError where config.run holds no sft or rl run, or not the checkpoint that config.step names.
    """
    config_path = config.run / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"run = {config.run} holds no config.yaml; give the run_dir of an sft or rl run")
    settings = read_config(config_path)
    if settings.get("verb") not in ("sft", "rl"):
        raise ValueError(f"run = {config.run} is a {settings.get('verb')!r} run; only sft and rl runs have checkpoints")
    if missing := {"student", "dtype"} - settings.keys():
        raise ValueError(f"{config_path} has no {min(missing)}; write the run's own config back")
    if not isinstance(settings["student"], str) or settings["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"{config_path} has no path as student or no known dtype; write the run's own config back")
    layout = initialise(seed=0)
    checkpoints = Checkpoints(config.run, layout)
    step = checkpoints.best_step() if config.step == "best" else config.step or checkpoints.latest_step()
    if step is None:
        which = "best checkpoint (set evaluation.best)" if config.step else "checkpoint yet (see save_every)"
        raise ValueError(f"run = {config.run} has no {which}")
    if step not in (steps := sorted(checkpoints.saved())):
        raise ValueError(f"step = {step} is none of run = {config.run}'s checkpoints: {', '.join(map(str, steps))}")
    student = Path(settings["student"])
    train_merger = isinstance(vision := settings.get("vision"), dict) and vision.get("train_merger") is True
    with as_vold_writes(config_path):
        train = settings.get("train") and tuple(map(str, settings["train"]))
        adapter = AdapterConfig(**settings["adapter"]) if settings.get("adapter") else None
        rendering = {key: value for key, value in settings.get("prompt", {}).items() if key.startswith("chat_template")}
        prompt = PromptConfig(**rendering)
    if config.adapter and adapter is None:
        raise ValueError(f"adapter = true, but run = {config.run} trained the whole model; leave it out")
    if config.adapter and (train or train_merger):
        raise ValueError(
            f"adapter = true, but run = {config.run} trained weights beside the adapter, which would be left out; "
            "export the merged model"
        )
    dtype = getattr(torch, settings["dtype"])
    chunks = load_chunks(student, layout, dtype, train=train, train_merger=train_merger, adapter=adapter)
    checkpoints.load_weights(chunks, step)
    if config.adapter:
        write_adapter(config.out, student, adapter, export_adapters(chunks))
        log.info(f"{config.out}: adapter of step {step} of {config.run}, for {student}")
        return
    amend = partial(write_chat_template, prompt=prompt)
    export_checkpoint(student, config.out, export_weights(chunks), amend=amend)
    log.info(f"{config.out}: step {step} of {config.run}; to evaluate it: vold eval CONFIG checkpoint={config.out}")
