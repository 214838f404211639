"""Verbs only. A user's mistake is one line on standard error and exit code 2; a bug keeps its traceback, with 1. A rank
that died or hangs is named and ends the job with exit code 1; SIGTERM ends training after the step, saved, with 143.

torchrun --nproc-per-node 8 -m vold rl configs/qwen2.5-vl-3b/vold.yaml optimizer.lr=1e-6 --resume
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from vold.config import load_config, load_training_config, schema

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # the file system's, not a bug's
USAGE_ERROR = typer.BadParameter.__base__  # click's, or that of the click inside newer typers

Config = Annotated[Path, typer.Argument(help="YAML file, see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="optimizer.lr=1e-6 rollout.top_p=0.9, or YAML files laid over CONFIG")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in run_dir after its latest checkpoint")]


@app.command()
def traces(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Stage 0: the teacher answers the prompts; writes its token ids."""
    traces_config = load_config(schema.TracesConfig, config, overrides or ())
    _module("train.teacher_traces").generate_traces(traces_config, resume=resume)


@app.command()
def sft(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Stage 1: the student learns the teacher's traces."""
    _module("train.sft").train_sft(load_config(schema.SftConfig, config, overrides or ()), resume=resume)


@app.command()
def rl(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Stage 2: GRPO and on-policy distillation on the student's own rollouts."""
    _module("train.rl").train_rl(load_config(schema.RlConfig, config, overrides or ()), resume=resume)


@app.command()
def selfplay(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Challenger and solver train each other: R-Zero, R-Diverse."""
    selfplay_config = load_config(schema.SelfplayConfig, config, overrides or ())
    _module("selfplay.loop").run_selfplay(selfplay_config, resume=resume)


@app.command("eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    vlmevalkit: Annotated[bool, typer.Option("--vlmevalkit", help="the paper's ten benchmarks, by VLMEvalKit")] = False,
) -> None:
    """Accuracy of a checkpoint directory on text and image problems."""
    eval_config = load_config(schema.EvalConfig, config, overrides or ())
    if vlmevalkit:
        _module("evaluation.vlmevalkit").run_vlmevalkit(eval_config)
    else:
        _module("evaluation.evaluator").evaluate(eval_config)


@app.command()
def export(config: Config, overrides: Overrides = None) -> None:
    """A run's checkpoint as a directory for transformers and vLLM."""
    _module("commands.export").run(load_config(schema.ExportConfig, config, overrides or ()))


@app.command("profile")
def profile_steps(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps; three more are run around them")] = 5,
    beside: Annotated[list[Path] | None, typer.Option(help="a profiled run_dir, for the timeline's picture")] = None,
) -> None:
    """Where the time and memory of an rl or sft config's steps go; writes run_dir/profile."""
    _module("commands.profile").run(load_training_config(config, overrides or ()), steps=steps, beside=beside or ())


@app.command()
def check(
    stage: Annotated[Literal["sft", "rl", "selfplay"], typer.Argument(help="the stage that CONFIG is for")],
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="how many would be launched: nodes x GPUs")] = 1,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="load the student as its own teacher: KL must be exactly 0")
    ] = False,
) -> None:
    """What can go wrong, a line each with its fix: versions, layout, models, tokenizers, data, disk, memory. Shows rows
    as the model reads them and what each rank would hold. Changes nothing; exit code 2 when a line fails."""
    if stage == "selfplay":
        _module("selfplay.check").check_selfplay(load_config(schema.SelfplayConfig, config, overrides or ()), processes)
        return
    of = {"sft": schema.SftConfig, "rl": schema.RlConfig}[stage]
    _module("planning.check").run(load_config(of, config, overrides or ()), processes, self_test=self_test)


@app.command()
def plan(
    stage: Annotated[Literal["sft", "rl"], typer.Argument(help="the stage that CONFIG is for")],
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[Literal["a100-40g", "a100-80g", "h100-80g", "h200"], typer.Option(help="of every process")] = ...,
    processes: Annotated[int, typer.Option(min=1, help="how many would be launched: nodes x GPUs")] = 1,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="of a mean response, for the time")] = None,
    rates: Annotated[Path | None, typer.Option(help="run_dir of a run profiled on such a machine")] = None,
) -> None:
    """Memory by rank and phase and a step's time, before anything is launched; exit code 2 when it does not fit."""
    of = {"sft": schema.SftConfig, "rl": schema.RlConfig}[stage]
    options = {"gpu": gpu, "processes": processes, "response_tokens": response_tokens, "rates": rates}
    _module("planning.plan").run(load_config(of, config, overrides or ()), **options)


@app.command()
def serve(
    what: Annotated[
        Literal["rl", "eval", "traces", "teacher"],
        typer.Argument(help="the model CONFIG's stage samples; or rl's teacher"),
    ],
    config: Config,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="as in the config's vllm.urls or teacher_vllm.urls")] = 8000,
    host: Annotated[str, typer.Option(help="whoever reaches it can replace the weights")] = "127.0.0.1",
) -> None:
    """One vLLM engine in a process of its own, for a config that names it in vllm.urls."""
    of = {"eval": schema.EvalConfig, "traces": schema.TracesConfig}.get(what, schema.RlConfig)
    teacher = what == "teacher"
    _module("commands.serve").run(load_config(of, config, overrides or ()), host=host, port=port, teacher=teacher)


@app.command()
def grade(
    file: Annotated[Path, typer.Argument(help='JSONL rows {"gold": ..., "response": ...}; - reads standard input')],
    workers: Annotated[int, typer.Option(min=1, help="processes that compare what only algebra can")] = 2,
) -> None:
    """Verdict, extracted answer and deciding rule of every row: one JSON object a line on standard output."""
    _module("commands.grade").run(file, workers=workers)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
) -> None:
    """One self-contained HTML page over one or several runs."""
    _module("commands.report").run(runs, out)


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """A live run in the terminal: metrics, phases, time left, warnings. q quits; off a terminal it prints once."""
    _module("commands.watch").run(run)


@app.command("prepare-student")
def prepare_student(
    student: Annotated[Path, typer.Argument(help="checkpoint directory of the student")],
    teacher: Annotated[Path, typer.Argument(help="checkpoint directory of the teacher")],
    out: Annotated[Path, typer.Argument(help="new checkpoint directory")],
) -> None:
    """Give the student the teacher's extra tokens (<think> ...) at the same ids."""
    _module("commands.prepare").run(student, teacher, out)


def _module(name: str):
    """Imported when asked for, so that --help is instant. Libraries' progress bars and advice about packages that are
    absent by design (apex, TransformerEngine) would bury the one line a person looks for."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return import_module(f"vold.{name}")


def main() -> None:
    """Console entry point."""
    try:
        raise SystemExit(app(prog_name="vold", standalone_mode=False))
    except (ValueError, USAGE_ERROR, OSError) as error:
        if isinstance(error, OSError) and error.errno not in REFUSALS:
            raise
        print(f"vold{_speaker()}: {_mistake(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        _name_lost_ranks(error)
        raise


def _mistake(error: Exception) -> str:
    """In one line, with the fix."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a file could not be written'}: {error.strerror}; make room, or choose another path"
    if not isinstance(error, USAGE_ERROR):
        return str(error)
    asked = error.ctx.command_path if error.ctx else "vold"
    return f"{error.format_message().rstrip('.') or 'a verb is missing'}; see {asked} --help"


def _name_lost_ranks(error: RuntimeError) -> None:
    """A collective failed because a rank died or hangs: say which, and end. Returns when that is not what happened."""
    run_on_all_ranks = sys.modules.get("vold.parallel.collectives")
    if run_on_all_ranks is None or not run_on_all_ranks.is_lost_peer(error):
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end us first: it names the dead itself
    if not (absent := run_on_all_ranks.unresponsive_ranks()):
        return
    names = ", ".join(map(str, absent))
    print(
        f"vold (rank {os.environ.get('RANK', '0')}): rank {names} died or hangs (no answer for "
        "timeout_seconds); the job ends, --resume continues after its latest checkpoint. What failed here: "
        + " ".join(str(error).split())[:200],
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # an orderly exit would wait for the broken process groups


def _speaker() -> str:
    """Rank 0 speaks for all: torchrun ends the other ranks as soon as it exits. One that fails alone is heard, named,
    a moment later."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    time.sleep(3)
    return f" (rank {rank})"
