"""Runs the pages' commands one after the other in a stand-in of what a reader has: `execute.py WORDS.json`.

A program of its own, because `vold check` replaces the process groups. Each command has the words of the page, and
behind them the sizes of the stand-in. Prints a JSON list of [exit code, standard output, standard error].
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from vold import cli

RUN = ["dtype=float32"]
EVALUATION = ["evaluation.sampling.max_new_tokens=4"]
TRAIN = [*RUN, *EVALUATION, "steps=1", "optimizer.warmup_steps=0", "microbatch_tokens=256"]
ROLLOUT = ["rollout.max_new_tokens=6", "rollout.responses_per_prompt=2", "prompts_per_step=4"]
SIZES = {
    "traces": [*RUN, "prompt.suffix=''", "sampling={max_new_tokens: 30}", "max_tokens=64", "prompts_per_shard=8"],
    "sft": [*TRAIN, "batch_size=4", "max_tokens=128"],
    "rl": [*TRAIN, *ROLLOUT, "prompt.max_tokens=240", "grader_workers=1"],
    "profile": [*TRAIN, *ROLLOUT, "prompt.max_tokens=240", "grader_workers=1"],
    "eval": [*RUN, *EVALUATION, "grader_workers=1"],
}
STAGES = ("traces", "sft", "rl", "evaluate")
WRITES = {name: lambda config: config.run_dir for name in STAGES}
WRITES |= {"profile": lambda config: config.run_dir / "profile", "export": lambda config: config.out}
# A run of one step has no fiftieth, and only one config keeps its best.
EXPORTED = {"step=50": "step=1", "step=best": "run=runs/qwen2.5-vl-3b/geometry3k"}


def main(file: str) -> None:
    imported = cli._stage
    cli._stage = lambda name: _from_scratch(name, imported(name))
    found = [run([*words, *_sizes(words)]) for words in json.loads(Path(file).read_text())]
    json.dump(found, sys.stdout)


def _sizes(words: list[str]) -> list[str]:
    if "--help" in words:
        return []
    if words[0] in ("check", "plan"):  # of a run that is not there yet
        return [*SIZES[words[1]], "run_dir=runs/ahead"] if words[1] in SIZES else []
    return SIZES.get(words[0], [EXPORTED[word] for word in words if word in EXPORTED])


def run(words: list[str]) -> tuple[int, str, str]:
    """`vold WORDS`: exit code, standard output, standard error."""
    out, error = io.StringIO(), io.StringIO()
    sys.argv = ["vold", *words]
    with redirect_stdout(out), redirect_stderr(error):
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, out.getvalue(), error.getvalue()
        except BaseException:  # what the interpreter would print
            return 1, out.getvalue(), error.getvalue() + traceback.format_exc()


def _from_scratch(name: str, stage) -> SimpleNamespace:
    """The pages show the same run_dir more than once; a reader has one run in it."""

    def run(*arguments, **options):
        if name in WRITES and not options.get("resume"):
            shutil.rmtree(WRITES[name](arguments[0]), ignore_errors=True)
        return stage.run(*arguments, **options)

    return SimpleNamespace(**vars(stage) | {"run": run})


if __name__ == "__main__":
    main(sys.argv[1])
