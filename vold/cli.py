"""The `vold` command: its subcommands and exit codes.

A user's mistake is one line on standard error and exit code 2; a bug keeps its traceback, with 1. A rank that died or
hangs is named, and ends the job with exit code 1. SIGTERM, SIGHUP and Ctrl-C end training
after the step, saved, with 128 plus the signal.

torchrun --nproc-per-node 8 -m vold rl configs/qwen2.5-vl-3b/vold.yaml optimizer.lr=1e-6 --resume
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from vold.config import load_config, load_training_config, schema
from vold.file_errors import file_error_line
from vold.io import configure_logging, one_line, set_console_level

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
USAGE_ERROR = typer.BadParameter.__base__  # click's UsageError, or that of the click inside newer typers
TRAINING_CONFIGS = {"sft": schema.SftConfig, "rl": schema.RlConfig}

KEYS = (
    "Keys of a config: [bold]vold keys[/bold] lists all, [bold]vold init[/bold] writes a commented one. The main ones: "
)
MAIN_KEYS = {
    "sft": "student, data.path, data.layout, steps, batch_size, microbatch_tokens, optimizer.lr, save_every, run_dir",
    "rl": "student, teacher, data.path, data.layout, steps, prompts_per_step, rollout.engine, rollout.max_new_tokens, "
    "rollout.responses_per_prompt, objective.preset, objective.beta, microbatch_tokens, optimizer.lr, save_every, "
    "run_dir",
}  # shown by --help
TRAIN, MODELS, PREPARE, INSPECT = "Train", "Models", "Before a launch", "Runs and answers"  # groups in --help

Config = Annotated[Path, typer.Argument(help="YAML file of the stage; configs/ holds examples")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="keys of the config to set: optimizer.lr=1e-6 rollout.top_p=0.9; or YAML files, laid over the first",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in run_dir after its latest checkpoint")]
Processes = Annotated[int, typer.Option(min=1, help="processes that the launch will have: nodes x GPUs per node")]


def _console_level(level: int):
    return lambda chosen: set_console_level(level) if chosen else None


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_console_level(logging.WARNING), help="print warnings and errors alone"),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_console_level(logging.DEBUG), help="also print saves and seconds by phase"
    ),
]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"vold {metadata.version('vold')}")
        raise typer.Exit


@app.callback()
def vold(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train a vision-language model to reason from text alone.

    On several GPUs: torchrun --nproc-per-node N -m vold rl CONFIG
    """


@app.command(rich_help_panel=TRAIN)
def traces(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stage 0: sample the teacher's answers to the prompts and write them as traces for stage 1."""
    traces_config = load_config(schema.TracesConfig, config, overrides or ())
    _module("train.teacher_traces").generate_traces(traces_config, resume=resume)


@app.command(rich_help_panel=TRAIN, epilog=KEYS + MAIN_KEYS["sft"])
def sft(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stage 1: fine-tune the student on the teacher's traces."""
    _module("train.sft").train_sft(load_config(schema.SftConfig, config, overrides or ()), resume=resume)


@app.command(rich_help_panel=TRAIN, epilog=KEYS + MAIN_KEYS["rl"])
def rl(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stage 2: train the student on its own rollouts with GRPO and on-policy distillation."""
    _module("train.rl").train_rl(load_config(schema.RlConfig, config, overrides or ()), resume=resume)


@app.command(rich_help_panel=TRAIN)
def selfplay(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a challenger that poses problems and a solver, in turn (R-Zero, R-Diverse)."""
    selfplay_config = load_config(schema.SelfplayConfig, config, overrides or ())
    _module("selfplay.loop").run_selfplay(selfplay_config, resume=resume)


@app.command("eval", rich_help_panel=MODELS)
def evaluate(
    config: Config,
    overrides: Overrides = None,
    vlmevalkit: Annotated[
        bool, typer.Option("--vlmevalkit", help="run the paper's ten benchmarks in VLMEvalKit")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the accuracy of a checkpoint directory on text and image problems."""
    eval_config = load_config(schema.EvalConfig, config, overrides or ())
    if vlmevalkit:
        _module("evaluation.vlmevalkit").run_vlmevalkit(eval_config)
    else:
        _module("evaluation.evaluator").evaluate(eval_config)


@app.command(rich_help_panel=MODELS)
def export(config: Config, overrides: Overrides = None) -> None:
    """Write a checkpoint of a run as a model directory that transformers and vLLM load."""
    _module("commands.export").export_model(load_config(schema.ExportConfig, config, overrides or ()))


@app.command("profile", rich_help_panel=PREPARE)
def profile_steps(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps; three untimed ones are added")] = 5,
    beside: Annotated[
        list[Path] | None, typer.Option(help="run_dir of an earlier profile, drawn in the same timeline figure")
    ] = None,
) -> None:
    """Measure time and memory by phase over a few steps of an rl or sft config. Writes to run_dir/profile."""
    training_config = load_training_config(config, overrides or ())
    _module("commands.profile").profile_steps(training_config, steps=steps, beside=beside or ())


@app.command(rich_help_panel=PREPARE)
def init(
    stage: Annotated[Literal["traces", "sft", "rl", "eval"], typer.Argument(help="stage to write a config for")],
    out: Annotated[Path, typer.Argument(help="YAML file to write")],
    student: Annotated[Path | None, typer.Option(help="checkpoint directory of the student")] = None,
    teacher: Annotated[Path | None, typer.Option(help="checkpoint directory of the teacher")] = None,
    data: Annotated[Path | None, typer.Option(help="file or folder of problems or traces; its layout is found")] = None,
) -> None:
    """Write a commented config for models and data of your own: the keys that matter first, with their meaning."""
    paths = {"student": student, "teacher": teacher, "data": data}
    _module("commands.init").write_config(stage, out, paths)


@app.command(rich_help_panel=PREPARE)
def keys(
    word: Annotated[str, typer.Argument(help="a section or a part of a name: optimizer, lr, vllm")] = "",
) -> None:
    """List the keys of a config with type, default and meaning. The same table: docs/config.md."""
    _module("commands.keys").print_keys(word)


@app.command(rich_help_panel=PREPARE)
def check(
    stage: Annotated[Literal["sft", "rl", "selfplay"], typer.Argument(help="stage that CONFIG is for")],
    config: Config,
    overrides: Overrides = None,
    processes: Processes = 1,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="also load the student as its own teacher: their KL must be exactly 0")
    ] = False,
) -> None:
    """Check a config before a launch, one line per check: versions, layout, models, tokenizers, data, disk, memory.

    Also shows data rows as the model reads them and memory by rank. Needs no GPU; exit code 2 when a check fails.
    """
    if stage == "selfplay":
        _module("selfplay.check").check_selfplay(load_config(schema.SelfplayConfig, config, overrides or ()), processes)
        return
    training_config = load_config(TRAINING_CONFIGS[stage], config, overrides or ())
    _module("planning.check").check_config(training_config, processes, self_test=self_test)


@app.command(rich_help_panel=PREPARE)
def plan(
    stage: Annotated[Literal["sft", "rl"], typer.Argument(help="stage that CONFIG is for")],
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        Literal["rtx4090-24g", "a100-40g", "a100-80g", "h100-80g", "h200"], typer.Option(help="GPU of every process")
    ] = ...,
    processes: Processes = 1,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="mean length of a response, for the time")] = None,
    rates: Annotated[Path | None, typer.Option(help="run_dir of a profile on such GPUs, to estimate the time")] = None,
    teacher_gpus: Annotated[
        str, typer.Option(help="numbers of GPUs of a teacher's own engines to compare: 1,2,4,8")
    ] = "",
    accuracy: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of right responses, which a masked teacher does not score")
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="file (.png, .svg) of the comparison's figure")] = None,
) -> None:
    """Compute memory by phase and the least time of a step on GPUs that need not be there.

    Reads the checkpoints' config.json alone. Exit code 2 when the step does not fit, with settings that do.
    """
    options: dict = {"gpu": gpu, "processes": processes, "response_tokens": response_tokens, "rates": rates}
    options["beside"] = _module("planning.teacher_cost").read_question(teacher_gpus, accuracy, plot)
    _module("planning.plan").print_plan(load_config(TRAINING_CONFIGS[stage], config, overrides or ()), **options)


@app.command(rich_help_panel=MODELS)
def serve(
    stage: Annotated[
        Literal["rl", "eval", "traces", "teacher"],
        typer.Argument(help="stage whose sampled model is served; teacher: the teacher of an rl config"),
    ],
    config: Config,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="port, as in the config's vllm.urls or teacher_vllm.urls")] = 8000,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    socket: Annotated[
        Path | None, typer.Option(help="listen on this unix socket instead, named unix:/PATH in the config's urls")
    ] = None,
    teacher: Annotated[str, typer.Option(help="of an rl config with several teachers: the name of one")] = "",
) -> None:
    """Start one vLLM engine as a server, for a config that names it in vllm.urls.

    It answers those who have the secret in run_dir/engines.secret (vllm.secret_file).
    """
    config_type = {"eval": schema.EvalConfig, "traces": schema.TracesConfig}.get(stage, schema.RlConfig)
    where = {"host": host, "port": port} if socket is None else {"uds": str(socket.absolute())}
    serve_config = load_config(config_type, config, overrides or ())
    _module("commands.serve").serve_engine(serve_config, where=where, teacher=stage == "teacher" and (teacher or True))


@app.command(rich_help_panel=INSPECT)
def grade(
    file: Annotated[Path, typer.Argument(help='JSONL rows {"gold": ..., "response": ...}; - reads standard input')],
    workers: Annotated[int, typer.Option(min=1, help="processes for answers that need symbolic algebra")] = 2,
) -> None:
    """Grade responses. Prints every row with verdict, extracted answer and deciding rule as one line of JSON."""
    _module("commands.grade").grade_file(file, workers=workers)


@app.command(rich_help_panel=INSPECT)
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    _module("commands.report").write_report_page(runs, out)


@app.command(rich_help_panel=INSPECT)
def watch(run: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """Follow a run in the terminal: metrics, phases, time left, warnings. q quits. Off a terminal it prints once."""
    _module("commands.watch").watch_run(run)


@app.command("prepare-student", rich_help_panel=PREPARE)
def prepare_student(
    student: Annotated[Path, typer.Argument(help="checkpoint directory of the student")],
    teacher: Annotated[Path, typer.Argument(help="checkpoint directory of the teacher")],
    out: Annotated[Path, typer.Argument(help="checkpoint directory to write")],
) -> None:
    """Add the teacher's extra tokens (<think> ...) to the student, at the same ids."""
    _module("commands.prepare").prepare_student(student, teacher, out)


@app.command(rich_help_panel=PREPARE)
def convert(
    gguf: Annotated[Path, typer.Argument(help="GGUF file of a Llama, Qwen2 or Qwen3")],
    out: Annotated[Path, typer.Argument(help="checkpoint directory to write")],
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="float32 holds the file's values exactly, bfloat16 rounds")
    ] = "float32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="checkpoint directory to take the tokenizer of, instead of the file's")
    ] = None,
) -> None:
    """Write a GGUF file as a checkpoint directory: config, dequantised weights, tokenizer, chat template."""
    _module("commands.convert").convert(gguf, out, dtype=dtype, tokenizer=tokenizer)


def _module(name: str):
    """Import vold.NAME on first use, so that --help is instant, without the libraries' own messages: progress bars, and
    advice about packages that are absent by design (apex, TransformerEngine)."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    # A CUDA build of torch on a machine with nvcc and no GPU warns that it has found CUDA_HOME.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return import_module(f"vold.{name}")


def main() -> None:
    """Console entry point."""
    configure_logging()
    try:
        raise SystemExit(app(prog_name="vold", standalone_mode=False))
    except (ValueError, USAGE_ERROR, OSError) as error:
        if isinstance(error, OSError) and file_error_line(error) is None:
            raise
        _print_error(_error_line(error), _rank_after_others())
        raise SystemExit(2) from None
    except RuntimeError as error:
        _exit_if_rank_lost(error)
        raise


def _print_error(message: str, rank: str = "") -> None:
    """Print one line on standard error, whatever characters the message took from files or the command line."""
    print(f"vold{rank}: {one_line(message)}", file=sys.stderr, flush=True)


def _error_line(error: Exception) -> str:
    """A user's mistake with its fix."""
    if isinstance(error, OSError):
        return file_error_line(error) or str(error)
    if not isinstance(error, USAGE_ERROR):
        return str(error)
    command = error.ctx.command_path if error.ctx else "vold"
    return f"{error.format_message().rstrip('.') or 'a verb is missing'}; see {command} --help"


def _rank_after_others() -> str:
    """Wait, on ranks above 0, and return " (rank N)"; "" on rank 0.

    torchrun ends the other ranks as soon as rank 0 exits. A mistake that all ranks make is thus printed once, and one
    that a single rank makes is printed with its number.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    time.sleep(3)
    return f" (rank {rank})"


def _exit_if_rank_lost(error: RuntimeError) -> None:
    """End the process with exit code 1 where a collective failed because a rank died or hangs, and name the rank.

    Returns where the error has another cause.
    """
    collectives = sys.modules.get("vold.parallel.collectives")
    if collectives is None or not (collectives.is_lost_peer(error) or isinstance(error, collectives.RanksLost)):
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end this process first: it names the dead rank itself
    if isinstance(error, collectives.RanksLost):
        _print_error(str(error), f" (rank {os.environ.get('RANK', '0')})")
        os._exit(1)
    if not (unresponsive := collectives.unresponsive_ranks()):
        return
    names = ", ".join(map(str, unresponsive))
    _print_error(
        f"rank {names} died or hangs (no answer for timeout_seconds); the job ends, --resume continues after its "
        f"latest checkpoint. What failed here: {' '.join(str(error).split())[:200]}",
        f" (rank {os.environ.get('RANK', '0')})",
    )
    os._exit(1)  # an orderly exit would wait for the broken process groups
