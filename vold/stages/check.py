"""`vold check`: what can be known to be wrong before a launch: config, layout, models, tokenizers, data, disk, memory,
versions. A line each, with the fix; two rows as the model will read them; bytes by rank. Changes nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from vold.config.schema import ParallelConfig, RlConfig, SftConfig
from vold.data.pack import Encoder
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.models.architecture import Architecture
from vold.models.images import encoder_of
from vold.models.language_model import build_chunks
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.models.weights import CheckpointReader, full_tensors
from vold.objectives import build_objective
from vold.parallel.launch import Layout, pretend, shutdown
from vold.records import Prompt, Sample
from vold.stages import machine, rl, show_row
from vold.stages.budget import Sizes, places, whole_parameters
from vold.stages.training import check_vision
from vold.trainer.memory import state_bytes
from vold.trainer.run_log import check_run_dir

GIB = 2**30
SHOWN = 2  # rows


@dataclass(frozen=True)
class Held:
    """One rank's part of a model. `tensors`: short name -> (shape of the whole, elements held here); `parameters` also
    counts the last stage's copy of a tied embedding."""

    layout: Layout
    parameters: int
    tensors: dict[str, tuple[tuple[int, ...], int]]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. ok: None where it cannot be told on this machine."""

    name: str
    ok: bool | None
    text: str


def run(config: SftConfig | RlConfig, processes: int, *, self_test: bool = False) -> None:
    """Print every line. Raises ValueError when one failed, after all were looked at. `self_test`: load the student
    twice and see that it is no nat away from itself."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # of Megatron's calls
    console, rows = Console(), Rows(config)
    tests: dict[str, Callable[[], str | tuple[None, str]]] = {
        "versions": lambda: machine.versions(config),
        "method": lambda: _method(config),
        "layout": lambda: _layout(config, processes),
        "student": lambda: _tensors(config.student, config, processes, train_merger=config.vision.train_merger),
        **({"teacher": lambda: _tensors(config.teacher, config, processes)} if _teacher_of(config) else {}),
        "tokenizers": lambda: _tokenizers(config),
        "data": rows.check_training,
        **({"evaluation": rows.check_evaluation} if config.evaluation.sets else {}),
        "run_dir": lambda: _run_dir(config),
        "disk": lambda: _disk(config),
        "memory": lambda: _memory(config, processes),
        **({"self-test": lambda: _self_test(config)} if self_test else {}),
    }
    failed = []
    for name, test in tests.items():
        line = _looked_at(name, test)
        failed += [line.name] if line.ok is False else []
        console.print(_shown(line), soft_wrap=True)
    for row in rows.shown():
        console.print(row)
    console.print("")
    if not {"layout", "student", "teacher"} & set(failed):
        show_models(config, processes)
    if failed:
        raise ValueError(f"{len(failed)} of {len(tests)} checks failed: {', '.join(failed)}")


def _looked_at(name: str, test: Callable[[], str | tuple[None, str]]) -> Line:
    try:
        found = test()
    except ValueError as error:
        return Line(name, False, str(error))
    return Line(name, True, found) if isinstance(found, str) else Line(name, *found)


def _shown(line: Line) -> Text:
    mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "yellow")}[line.ok]
    return Text.assemble((f"{mark} ", style), (f"{line.name:<11} ", "bold"), (line.text, "" if line.ok else style))


# The lines ------------------------------------------------------------------------------------------------------------


def _teacher_of(config: SftConfig | RlConfig) -> Path | None:
    """The teacher whose tokenizer the student must share."""
    return config.pair_with if isinstance(config, SftConfig) else config.teacher


def _method(config: SftConfig | RlConfig) -> str:
    if isinstance(config, SftConfig):
        if config.max_tokens > config.microbatch_tokens:
            raise ValueError(
                f"microbatch_tokens = {config.microbatch_tokens} cannot hold max_tokens = {config.max_tokens}; raise it"
            )
        return f"maximum likelihood, {config.steps} steps of {config.batch_size} sequences"
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    rl.check_config(config, objective)
    teaches = (
        "the student's average" if objective.teaches_itself else config.teacher if objective.needs_teacher else None
    )
    return (
        f"{config.objective.preset}, {config.steps} steps of {config.prompts_per_step} prompts × "
        f"{config.rollout.responses_per_prompt} responses; teacher: {teaches or 'none is asked'}"
    )


def _layout(config: SftConfig | RlConfig, processes: int) -> str:
    layout = pretend(0, processes, **config.parallel.model_dump())
    shutdown()
    return f"{processes} processes = dp {layout.dp} × tp {layout.tp} × pp {layout.pp}"


def _tensors(path: Path, config: SftConfig | RlConfig, processes: int, **options) -> str:
    arch = Architecture.from_pretrained(path)
    held = every_rank(arch, config.parallel, processes, **options)
    check_tensors(held, path)
    names = {name for rank in held for name in rank.tensors}
    return f"{path}: {arch.model_type}, {whole_parameters(arch):,} parameters in {len(names)} tensors, shapes as built"


def _tokenizers(config: SftConfig | RlConfig) -> str:
    teacher = _teacher_of(config)
    if teacher is not None:
        found = check_pair(config.student, teacher)
        rows = f"heads of {found.student_head_rows} and {found.teacher_head_rows} rows"
        return f"{found.shared_vocab_size} ids mean the same to student and teacher; {rows}"
    ids, rows = len(load_tokenizer(config.student)), Architecture.from_pretrained(config.student).vocab
    if ids > rows:
        raise ValueError(f"{ids} token ids do not fit the {rows} head rows of {config.student}: enlarge its head first")
    return f"{ids} ids, a head of {rows} rows"


def _run_dir(config: SftConfig | RlConfig) -> str:
    verb = "rl" if isinstance(config, RlConfig) else "sft"
    if not (config.run_dir / "config.yaml").is_file():
        return f"{config.run_dir} is free"
    check_run_dir(config, verb, resume=True)
    return f"{config.run_dir} holds this run; it goes on with --resume"


def _disk(config: SftConfig | RlConfig) -> str:
    """Checkpoints that are kept and the one being written, and the finished model."""
    parameters = whole_parameters(Architecture.from_pretrained(config.student))
    size = getattr(torch, config.dtype).itemsize
    each = parameters * (size + 8 + (4 if size < 4 else 0))
    kept = config.keep_checkpoints + 1 + (config.evaluation.best is not None)
    needed, free = kept * each + parameters * size, machine.free_disk(config.run_dir)
    line = (
        f"{kept} checkpoints of {each / GIB:.2f} GiB and the model need {needed / GIB:.2f}, {free / GIB:.2f} GiB free"
    )
    if needed > free:
        raise ValueError(f"{line} at {config.run_dir}; make room, or lower keep_checkpoints")
    return line


def _memory(config: SftConfig | RlConfig, processes: int) -> str | tuple[None, str]:
    """Against the least free GPU of this machine, or its own memory where no more processes are asked than cores."""
    cards = machine.free_gpu_memory()
    peak = max(place.peak for place in places(Sizes(config, processes), "cuda" if cards else "cpu"))
    line = f"{peak / GIB:.2f} GiB a process at the longest responses"
    if cards:
        if peak > min(cards):
            raise ValueError(f"{line}, a GPU here has {min(cards) / GIB:.2f} free; `vold plan` says what would fit")
        return f"{line}, {min(cards) / GIB:.2f} GiB free on a GPU here"
    free = machine.free_memory()
    if processes > (os.cpu_count() or 1):
        return None, f"{line}; no GPU here to compare with: see `vold plan`"
    if peak * processes > free:
        raise ValueError(f"{line}, {processes} of them and {free / GIB:.2f} GiB free here (no GPU); see `vold plan`")
    return f"{line}, {free / GIB:.2f} GiB free here (no GPU)"


def _self_test(config: SftConfig | RlConfig) -> str:
    from vold.stages.self_test import divergence_from_itself

    tokens, worst = divergence_from_itself(config)
    if worst != 0.0:
        raise ValueError(
            f"the student as its own teacher is up to {worst:.3g} nats away from itself on {tokens} tokens: the two "
            "ways of reading disagree; report it with the versions above"
        )
    return f"the student as its own teacher: KL exactly 0 on each of {tokens} tokens"


class Rows:
    """Training and evaluation rows, as the stage would load them."""

    def __init__(self, config: SftConfig | RlConfig):
        self._config = config
        self._found: Sequence[Prompt] | Sequence[Sample] = ()
        self._seen: list[Prompt] = []  # those with images
        self._encode: Encoder | None = None

    def check_training(self) -> str:
        config, skipped = self._config, []
        tokenizer, self._encode = load_tokenizer(config.student), encoder_of(config.student)
        if isinstance(config, SftConfig):
            samples = load_samples(config.data, tokenizer, config.prompt, max_tokens=config.max_tokens)
            self._found, what = samples, "traces"
            prompts = [samples[place].prompt for place in range(len(samples))]
        else:
            problems = load_problems(config.data, skipped.append)
            options = (config.prompt, config.data.on_error, self._encode.length)
            self._found = prompts = build_prompts(problems, tokenizer, *options)
            what = "problems"
            skipped += ["too long"] * (len(problems) - len(prompts))
        if not prompts:
            raise ValueError(f"{config.data.path} holds no row within prompt.max_tokens = {config.prompt.max_tokens}")
        check_vision(config.vision, prompts)
        self._seen += [prompt for prompt in prompts[SHOWN:] if prompt.images][:1]
        return f"{config.data.path}: {_counted(prompts, what, self._encode)}" + _left_out(skipped)

    def check_evaluation(self) -> str:
        config, found = self._config, []
        tokenizer, encode = load_tokenizer(config.student), encoder_of(config.student)
        for name, data in config.evaluation.sets.items():
            skipped: list[str] = []
            problems = load_problems(data, skipped.append)
            prompts = build_prompts(problems, tokenizer, config.prompt, data.on_error, encode.length)
            skipped += ["too long"] * (len(problems) - len(prompts))
            self._seen += [prompt for prompt in prompts if prompt.images]
            found.append(f"{name}: {_counted(prompts, 'problems', encode)}" + _left_out(skipped))
        return "; ".join(found)

    def shown(self) -> Iterator[Group]:
        """The first training rows, and the first with an image, of an evaluation set if need be."""
        if self._encode is None:
            return
        tokenizer = load_tokenizer(self._config.student)
        first = [self._found[place] for place in range(min(SHOWN, len(self._found)))]
        for row in (*first, *self._seen[:1]):
            yield show_row.as_the_model_reads(row, tokenizer, self._encode)


def _counted(prompts: Sequence[Prompt], what: str, encode: Encoder) -> str:
    lengths = sorted(map(encode.length, prompts))
    seeing = sum(bool(prompt.images) for prompt in prompts)
    images = f", {seeing} with images" if seeing else ""
    return f"{len(prompts)} {what}{images}; prompts of {lengths[0]} to {lengths[-1]} tokens"


def _left_out(skipped: Sequence[str]) -> str:
    return f"; {len(skipped)} rows left out, the first: {skipped[0]}" if skipped else ""


# What each rank holds -------------------------------------------------------------------------------------------------


def show_models(config: SftConfig | RlConfig, processes: int) -> None:
    """Print bytes by rank. Raises ValueError where the layout fits neither the processes nor the models, or where a
    checkpoint's tensors are not those of its config.json."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    paths = {"student": config.student, "teacher": getattr(config, "teacher", None)}
    held = {}
    for role, path in paths.items():
        if path is not None:
            train_merger = role == "student" and config.vision.train_merger
            arch = Architecture.from_pretrained(path)
            held[role] = every_rank(arch, config.parallel, processes, train_merger=train_merger)
            check_tensors(held[role], path)
    _show(held, config, processes)


def every_rank(
    arch: Architecture, parallel: ParallelConfig, processes: int, *, train_merger: bool = False
) -> list[Held]:
    """What each of `processes` ranks would build. Leaves this process without process groups."""
    held = []
    for rank in range(processes):
        layout = pretend(rank, processes, **parallel.model_dump())
        with torch.device("meta"):
            chunks = build_chunks(arch, layout, torch.bfloat16, train_merger=train_merger)
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        held.append(Held(layout, count, {name: (shape, here) for name, shape, here in full_tensors(chunks)}))
    shutdown()
    return held


def check_tensors(held: Sequence[Held], checkpoint: Path) -> None:
    """Raises ValueError naming the first tensor of the checkpoint that has another shape than the model's."""
    with CheckpointReader(checkpoint) as reader:
        for name, shape in _shapes(held).items():
            reader.check_shape(name, shape)


def bytes_of_student(rank: Held, dtype: str) -> dict[str, float]:
    """Weights, gradients and optimizer, see state_bytes."""
    state = state_bytes(rank.parameters, 0, rank.layout, getattr(torch, dtype), "cpu")
    return {name: state[name] for name in ("weights", "gradients", "optimizer")}


def _rows(held: dict[str, list[Held]], config: SftConfig | RlConfig) -> Iterator[tuple[str, ...]]:
    """One for each place in a model copy; its data-parallel ranks hold the same."""
    size = getattr(torch, config.dtype).itemsize
    teachers = held.get("teacher") or [None] * len(held["student"])
    samples = isinstance(config, RlConfig) or bool(config.evaluation.every and config.evaluation.sets)
    sampler = samples * size * sum(math.prod(shape) for shape in _shapes(held["student"]).values())
    for student, teacher in zip(held["student"], teachers, strict=True):
        if student.layout.dp_rank:
            continue
        needs = bytes_of_student(student, config.dtype)
        needs["teacher"] = teacher.parameters * size if teacher else 0.0
        if _teaches_itself(config):  # the student's average, accumulated in fp32
            needs["teacher"] = float(student.parameters * (size if size == 4 else size + 4))
        needs["sampler"] = float(sampler)
        place = f"tp {student.layout.tp_rank} pp {student.layout.pp_rank}"
        yield place, *(f"{value / GIB:.3g}" for value in (*needs.values(), sum(needs.values())))


def _teaches_itself(config: SftConfig | RlConfig) -> bool:
    if not isinstance(config, RlConfig):
        return False
    return build_objective(config.objective, config.rollout.max_new_tokens).teaches_itself


def _shapes(held: Sequence[Held]) -> dict[str, tuple[int, ...]]:
    return {name: shape for rank in held for name, (shape, _) in rank.tensors.items()}


def _show(held: dict[str, list[Held]], config: SftConfig | RlConfig, processes: int) -> None:
    copies = held["student"][0].layout.dp
    caption = "Without frozen vision towers; what each phase adds: vold plan."
    if getattr(config, "teacher_offload", False):
        caption += " The teacher waits in CPU memory while the student trains."
    table = Table(
        *("rank", "weights", "gradients", "optimizer", "teacher", "sampler", "sum"),
        title=f"{processes} processes, {copies} copies of the model, GiB on each rank",
        caption=caption,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for row in _rows(held, config):
        table.add_row(*row)
    Console().print(table)
