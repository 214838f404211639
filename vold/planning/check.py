"""`vold check`: what can be known to be wrong before a launch: config, layout, models, tokenizers, data, disk, memory,
versions. A line each, with the fix; two rows as the model will read them; bytes by rank. Changes nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.text import Text

from vold.config.schema import RlConfig, SftConfig
from vold.data.packing import Encoder
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.models.architecture import Architecture
from vold.models.images import encoder_of
from vold.models.tokenizer import check_pair, load_tokenizer
from vold.objectives import build_objective
from vold.parallel.launch import fake_layout, shutdown
from vold.planning import machine
from vold.planning import row_preview as show_row
from vold.planning.rank_shapes import RankShard, checked, show
from vold.planning.stage_memory import Sizes, places, whole_parameters
from vold.run.run_dir import check_run_dir
from vold.run.timers import GIB
from vold.train.components import check_rl_config, check_sft_config, check_trained_vision
from vold.types import Prompt, Sample

SHOWN = 2  # rows
Test = Callable[[], str | tuple[None, str]]
"""What was found; None with what cannot be told here. ValueError: what is wrong, with the fix."""


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
    console, rows, found = Console(), Rows(config), {}
    teacher = getattr(config, "teacher", None)
    tests: dict[str, Test | None] = {
        "versions": lambda: machine.versions(config),
        "method": lambda: _method(config),
        "layout": lambda: _layout(config, processes),
        "student": lambda: _tensors("student", config.student, config, processes, found),
        "teacher": (lambda: _tensors("teacher", teacher, config, processes, found)) if teacher else None,
        "tokenizers": lambda: _tokenizers(config),
        "data": rows.check_training,
        "evaluation": rows.check_evaluation if config.evaluation.sets else None,
        "run_dir": lambda: _run_dir(config),
        "disk": lambda: _disk(config),
        "memory": lambda: _memory(config, processes),
        "self-test": (lambda: _self_test(config)) if self_test else None,
    }
    lines = [_looked_at(name, test, console) for name, test in tests.items() if test]
    for row in rows.shown():
        console.print(row)
    console.print("")
    failed = {line.name: line.text for line in lines if line.ok is False}
    if not {"student", "teacher"} & failed.keys():
        show(found, config, processes)
    if failed:
        names, first = ", ".join(failed), next(iter(failed.values()))
        raise ValueError(f"{len(failed)} of {len(lines)} checks failed ({names}): {first}")


def _looked_at(name: str, test: Test, console: Console) -> Line:
    """Its line, printed."""
    try:
        found = test()
        line = Line(name, True, found) if isinstance(found, str) else Line(name, *found)
    except ValueError as error:
        line = Line(name, False, str(error))
    mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "yellow")}[line.ok]
    shown = ((f"{mark} ", style), (f"{name:<11} ", "bold"), (line.text, "" if line.ok else style))
    console.print(Text.assemble(*shown), soft_wrap=True)
    return line


# The lines ------------------------------------------------------------------------------------------------------------


def _teacher_of(config: SftConfig | RlConfig) -> Path | None:
    """The teacher whose tokenizer the student must share."""
    return config.pair_with if isinstance(config, SftConfig) else config.teacher


def _method(config: SftConfig | RlConfig) -> str:
    if isinstance(config, SftConfig):
        check_sft_config(config)
        return f"maximum likelihood, {config.steps} steps of {config.batch_size} sequences"
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    check_rl_config(config, objective)
    teacher = f"teacher {config.teacher}" if objective.needs_teacher else "no teacher"
    return (
        f"{config.objective.preset}, {config.steps} steps of {config.prompts_per_step} prompts × "
        f"{config.rollout.responses_per_prompt} responses, "
        + ("the student's average teaches" if objective.teaches_itself else teacher)
    )


def _layout(config: SftConfig | RlConfig, processes: int) -> str:
    layout = fake_layout(0, processes, **config.parallel.model_dump())
    shutdown()
    return f"{processes} processes = dp {layout.dp} × tp {layout.tp} × pp {layout.pp}"


def _tensors(
    role: str, path: Path, config: SftConfig | RlConfig, processes: int, found: dict[str, list[RankShard]]
) -> str:
    """Adds to `found` what each rank would hold."""
    arch, found[role] = Architecture.from_pretrained(path), checked(path, role, config, processes)
    names = {name for rank in found[role] for name in rank.tensors}
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
    from vold.planning.self_test import divergence_from_itself

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
        check_trained_vision(config.vision, prompts)
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
        for place in range(min(SHOWN, len(self._found))):
            yield show_row.as_the_model_reads(self._found[place], tokenizer, self._encode)
        for prompt in self._seen[:1]:
            yield show_row.as_the_model_reads(prompt, tokenizer, self._encode)


def _counted(prompts: Sequence[Prompt], what: str, encode: Encoder) -> str:
    lengths = sorted(map(encode.length, prompts))
    seeing = sum(bool(prompt.images) for prompt in prompts)
    images = f", {seeing} with images" if seeing else ""
    return f"{len(prompts)} {what}{images}; prompts of {lengths[0]} to {lengths[-1]} tokens"


def _left_out(skipped: Sequence[str]) -> str:
    return f"; {len(skipped)} rows left out, the first: {skipped[0]}" if skipped else ""
