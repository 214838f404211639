"""Runs the pages' commands one after the other in the directory of conftest.py.

Each command has the arguments of the page, then overrides that make it small. Its outcome is exit code, standard
output and standard error.
"""

from __future__ import annotations

import io
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

from commands import BLOCK

import vold
from vold import cli

RUN = ["dtype=float32"]
EVALUATION = ["evaluation.sampling.max_new_tokens=4"]
TRAIN = [*RUN, *EVALUATION, "steps=1", "optimizer.warmup_steps=0", "microbatch_tokens=256"]
ROLLOUT = [
    "rollout.engine=transformers",
    "rollout.max_new_tokens=6",
    "rollout.responses_per_prompt=2",
    "prompts_per_step=4",
]
SIZES = {
    "traces": [
        *RUN,
        "engine=transformers",
        "prompt.suffix=''",
        "sampling={max_new_tokens: 30}",
        "max_tokens=64",
        "prompts_per_shard=8",
    ],
    "sft": [*TRAIN, "batch_size=4", "max_tokens=128"],
    "rl": [*TRAIN, *ROLLOUT, "prompt.max_tokens=240", "grader_workers=1"],
    "profile": [*TRAIN, *ROLLOUT, "prompt.max_tokens=240", "grader_workers=1", "--steps", "1"],
    "eval": [*RUN, "engine=transformers", *EVALUATION, "grader_workers=1"],
}
STAGES = ("train.teacher_traces", "train.sft", "train.rl", "evaluation.evaluator")
OUTPUTS = {name: lambda config: config.run_dir for name in STAGES}  # module -> directory that it writes
OUTPUTS |= {"commands.profile": lambda config: config.run_dir / "profile", "commands.export": lambda config: config.out}
# A run of one step has no step 50, and only one config keeps its best checkpoint.
EXPORTED = {"step=50": "step=1", "step=best": "run=runs/qwen2.5-vl-3b/geometry3k"}


def outcomes(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Of each command's arguments, or of [BLOCK, Python]."""
    import_module = cli._module
    cli._module = lambda name: FreshOutputs(name, import_module(name))
    try:
        return [
            run_block(arguments[1]) if arguments[0] == BLOCK else run([*arguments, *_sizes(arguments)])
            for arguments in commands
        ]
    finally:
        cli._module = import_module


def _sizes(arguments: list[str]) -> list[str]:
    if "--help" in arguments:
        return []
    if arguments[0] in ("check", "plan"):  # of a run that is not there yet
        return [*SIZES[arguments[1]], "run_dir=runs/ahead"] if arguments[1] in SIZES else []
    return SIZES.get(arguments[0], [EXPORTED[word] for word in arguments if word in EXPORTED])


def run(arguments: list[str]) -> tuple[int, str, str]:
    """`vold ARGUMENTS`: exit code, standard output, standard error."""
    sys.argv = ["vold", *arguments]
    return outcome_of(cli.main)


def run_block(code: str) -> tuple[int, str, str]:
    """A page's Python, with the sizes of SIZES: exit code, standard output, standard error."""
    load = vold.load_config

    def small(path, *overrides, **options):
        stage = type(load(path, *overrides, **options)).__name__.removesuffix("Config").lower()
        return load(path, *overrides, *SIZES[stage], **options)

    vold.load_config = small
    try:
        Path("block.py").write_text(code)
        return outcome_of(lambda: runpy.run_path("block.py"))
    finally:
        vold.load_config = load


def outcome_of(program: Callable[[], object]) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            program()
        except SystemExit as end:
            return end.code or 0, out.getvalue(), error.getvalue()
        except BaseException:  # what the interpreter would print
            return 1, out.getvalue(), error.getvalue() + traceback.format_exc()
    return 0, out.getvalue(), error.getvalue()


class FreshOutputs:
    """A module of vold whose functions first remove what an earlier command of the pages wrote in the same place."""

    def __init__(self, name: str, module: ModuleType):
        self._output_of, self._module = OUTPUTS.get(name), module

    def __getattr__(self, name: str):
        function = getattr(self._module, name)

        def call(*arguments, **options):
            if self._output_of is not None and not options.get("resume"):
                shutil.rmtree(self._output_of(arguments[0]), ignore_errors=True)
            return function(*arguments, **options)

        return call
