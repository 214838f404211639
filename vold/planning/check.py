"""`vold check`: one line for everything that can be known to be wrong before a launch, with its fix; then rows of the
data as the model reads them, and memory by rank. Nothing is changed on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vold.config.schema import ParallelConfig, RlConfig, SftConfig
from vold.data.responses import turn_end
from vold.io import visible
from vold.models.adapters import check_targets
from vold.models.architecture import Architecture
from vold.models.flops import active_parameters, language_model_parameters
from vold.models.peft_directory import adapter_tensors
from vold.models.quantised import open_bitsandbytes
from vold.models.served import ServedModel
from vold.models.student import check_rates
from vold.models.tokenizer import check_checkpoint, check_pair, load_tokenizer, stop_ids
from vold.objectives import build_objective
from vold.parallel.launch import fake_layout, shutdown
from vold.planning import machine
from vold.planning.data_check import DataCheck
from vold.planning.memory_table import fullest, rank_table
from vold.planning.rank_shapes import check_tensors, rank_shards
from vold.planning.rendering_check import RenderingCheck
from vold.planning.stage_memory import StageMemory, stage_memories
from vold.planning.step_sizes import StepSizes
from vold.run import leftovers
from vold.run.lock import living_holder
from vold.run.resumption import check_run_dir
from vold.run.timers import GIB
from vold.teacher import TeacherChoice
from vold.train.config_checks import check_rl_config, check_sft_config
from vold.train.reward_terms import check_reward_terms


class Undecided(str):
    """The text of a check that cannot be decided on this machine."""


Check = Callable[[], str]
"""Returns a summary, an Undecided one included. Raises ValueError with the problem and its fix."""


@dataclass(frozen=True)
class CheckResult:
    """One printed line. ok: None where the check is undecided."""

    name: str
    ok: bool | None
    text: str


def check_config(config: SftConfig | RlConfig, processes: int, *, self_test: bool = False) -> None:
    """Run every check and print its line. `self_test`: load the student as its own teacher and compare the two.

    Raises ValueError when a check failed, after all have run.
    """
    machine.hide_gpus()
    console, data, rendering, stages = Console(), DataCheck(config), RenderingCheck(config), []
    teacher = getattr(config, "teacher", None)
    checks: dict[str, Check | None] = {
        "versions": lambda: machine.check_versions(config),
        "method": lambda: _check_method(config),
        "reward": (lambda: _check_reward(config)) if _has_own_terms(config) else None,
        "layout": lambda: _check_layout(config.parallel, processes),
        "student": lambda: _check_model("student", config, processes),
        "teacher": (lambda: _check_model("teacher", config, processes)) if teacher else None,
        "teachers": (lambda: _check_teachers(config, processes)) if getattr(config, "teachers", None) else None,
        "tokenizers": lambda: _check_tokenizers(config),
        "rendering": rendering.check,
        "columns": data.check_columns,
        "data": data.check_training,
        "evaluation": data.check_evaluation if config.evaluation.sets else None,
        "run_dir": lambda: _check_run_dir(config),
        "leftovers": lambda: _check_leftovers(config),
        "disk": lambda: _check_disk(config),
        "memory": lambda: _check_memory(StepSizes(config, processes), stages),
        "self-test": (lambda: _self_test(config)) if self_test else None,
    }
    results = [_run_check(name, check, console) for name, check in checks.items() if check]
    if table := rendering.table():
        console.print(table)
    for row in data.previews():
        console.print(row)
    console.print("")
    failed = {result.name: result.text for result in results if result.ok is False}
    if stages and not {"student", "teacher"} & failed.keys():
        console.print(rank_table(stages, StepSizes(config, processes)))
    if failed:
        names, first = ", ".join(failed), next(iter(failed.values()))
        raise ValueError(f"{len(failed)} of {len(results)} checks failed ({names}): {first}")


def print_rank_memory(config: SftConfig | RlConfig, processes: int) -> None:
    """Print memory by rank. Raises ValueError where the layout fits neither the processes nor the models, or where a
    checkpoint's tensors differ from its config.json."""
    machine.hide_gpus()
    for role in ("student", "teacher"):
        if getattr(config, role, None):
            _check_model(role, config, processes)
    sizes = StepSizes(config, processes)
    Console().print(rank_table(stage_memories(sizes, "cpu"), sizes))


def _run_check(name: str, check: Check, console: Console) -> CheckResult:
    """Run one check and print its line."""
    try:
        text = check()
        result = CheckResult(name, None if isinstance(text, Undecided) else True, visible(text))
    except ValueError as error:
        result = CheckResult(name, False, visible(str(error)))
    mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "yellow")}[result.ok]
    parts = ((f"{mark} ", style), (f"{name:<11} ", "bold"), (result.text, "" if result.ok else style))
    console.print(Text.assemble(*parts), soft_wrap=True)
    return result


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_method(config: SftConfig | RlConfig) -> str:
    if isinstance(config, SftConfig):
        check_sft_config(config)
        return f"maximum likelihood, {config.steps} steps of {config.batch_size} sequences"
    objective = build_objective(config.objective, config.rollout.max_new_tokens)
    check_rl_config(config, objective)
    taught_by = f"teacher {config.teacher}" if config.teacher else f"teachers {', '.join(config.teachers)}"
    teacher = taught_by if objective.needs_teacher else "no teacher"
    return (
        f"{config.objective.preset}, {config.steps} steps of {config.prompts_per_step} prompts × "
        f"{config.rollout.responses_per_prompt} responses, "
        + ("the student's average teaches" if objective.uses_self_teacher else teacher)
    )


def _has_own_terms(config: SftConfig | RlConfig) -> bool:
    return isinstance(config, RlConfig) and config.reward.has_own_terms


def _check_reward(config: RlConfig) -> str:
    files = check_reward_terms(config, build_objective(config.objective, config.rollout.max_new_tokens))
    weights = {name: weight for name, weight in config.reward.weights.items() if weight}
    terms = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
    judge = f"; scores by {config.reward.judge.url}, which was not asked" if config.reward.judge else ""
    return terms + (f"; code of {', '.join(sorted(files))}" if files else "") + judge


def _check_layout(parallel: ParallelConfig, processes: int) -> str:
    layout = fake_layout(0, processes, **parallel.model_dump())
    shutdown()
    context = f" × cp {layout.cp}" if layout.cp > 1 else ""
    line = f"{processes} processes = dp {layout.dp} × tp {layout.tp} × pp {layout.pp}{context}"
    experts = layout.experts
    if experts.ep * experts.etp == 1:
        return line
    return f"{line}; of experts ep {experts.ep} × etp {experts.etp}, each in {experts.dp} copies"


def _check_model(role: str, config: SftConfig | RlConfig, processes: int) -> str:
    """Compare the tensors that the ranks would build with those in the checkpoint of the `student` or `teacher`."""
    path: Path = getattr(config, role)
    if role == "teacher" and config.teacher_engine != "trainer":
        model = ServedModel.from_pretrained(path)
        return f"{path}: {model.config.model_type}, a head of {model.vocab} × {model.hidden}, in vLLM"
    arch = Architecture.from_pretrained(path)
    trained = {"train": config.train, "train_merger": config.vision.train_merger} if role == "student" else {}
    tensors = check_tensors(rank_shards(arch, config.parallel, processes, **trained), path, arch)
    if role == "student":
        check_rates(arch, config.optimizer.lr_groups, config.train, config.adapter, config.vision.train_merger)
    if role == "student" and config.adapter:
        check_targets(arch, config.adapter)
        if config.adapter.base_bits:
            open_bitsandbytes()
    if role == "student" and config.adapter and config.adapter.path:
        with adapter_tensors(config.adapter):
            pass
    parameters = f"{language_model_parameters(arch):,} parameters"
    if arch.mixture:
        parameters += f" ({active_parameters(arch):,} active)"
    return f"{path}: {arch.model_type}, {parameters} in {tensors} tensors, shapes as built"


def _check_teachers(config: RlConfig, processes: int) -> str:
    """Compare each of several teachers with the student, and those in the trainer with what its ranks would build."""
    TeacherChoice.from_config(config.teachers, config.teacher_column)
    described = []
    for name, teacher in config.teachers.items():
        check_pair(config.student, teacher.path, served=teacher.engine != "trainer")
        if teacher.engine == "trainer":
            arch = Architecture.from_pretrained(teacher.path)
            check_tensors(rank_shards(arch, config.parallel, processes), teacher.path, arch)
        model = ServedModel.from_pretrained(teacher.path).config.model_type
        where = {"trainer": "in the trainer", "vllm": "in vLLM", "openai": "behind a server"}[teacher.engine]
        described.append(f"{name} ({model}, {teacher.rows} rows, {where})")
    return f"{', '.join(described)}: the student's tokens"


def _check_tokenizers(config: SftConfig | RlConfig) -> str:
    """Compare the student's tokenizer with the teacher's, or with the student's own head where there is no teacher."""
    teacher = config.pair_with if isinstance(config, SftConfig) else config.teacher
    if teacher is not None:
        served = isinstance(config, RlConfig) and config.teacher_engine != "trainer"
        pair = check_pair(config.student, teacher, served=served)
        heads = f"heads of {pair.student_head_rows} and {pair.teacher_head_rows} rows"
        return f"{pair.shared_vocab_size} ids mean the same to student and teacher; {heads}" + _ends(config.student)
    rows = Architecture.from_pretrained(config.student).vocab
    return f"{check_checkpoint(config.student)} ids, a head of {rows} rows" + _ends(config.student)


def _ends(student: Path) -> str:
    """The tokens at which sampler and evaluation stop; SFT teaches the first."""
    tokenizer = load_tokenizer(student)
    ids = stop_ids(student, tokenizer)
    taught = turn_end(tokenizer, ids)
    names = tokenizer.convert_ids_to_tokens([taught, *(token_id for token_id in ids if token_id != taught)])
    return "; responses end with " + " or ".join(map(repr, names))


def _check_run_dir(config: SftConfig | RlConfig) -> str:
    verb = "rl" if isinstance(config, RlConfig) else "sft"
    if holder := living_holder(config.run_dir):
        raise ValueError(f"run_dir = {config.run_dir} is in use by {holder}; wait for it, or choose another run_dir")
    try:
        check_run_dir(config, verb, resume=False)
    except ValueError:
        if not (config.run_dir / "config.yaml").is_file():  # --resume would not help
            raise
        check_run_dir(config, verb, resume=True)
        return f"{config.run_dir} holds this run; it goes on with --resume"
    if (config.run_dir / "config.yaml").is_file():
        return f"{config.run_dir} holds an attempt that never finished a step; a run starts there anew"
    return f"{config.run_dir} is free"


def _check_leftovers(config: SftConfig | RlConfig) -> str:
    """What killed runs left in shared memory and in the run directory."""
    engines = [config.rollout.vllm, config.teacher_vllm] if isinstance(config, RlConfig) else []
    engines += [teacher.vllm for teacher in getattr(config, "teachers", {}).values()]
    folders = sorted({engine.weights_dir for engine in engines})
    dead = [path for folder in folders for path in leftovers.dead_weights(folder)] + leftovers.unfinished(
        config.run_dir
    )
    unknown = [path for folder in folders for path in leftovers.unknown_weights(folder)]
    found = [f"{_sized(dead)}: of dead processes, removed at the next start"] if dead else []
    found += (
        [f"{_sized(unknown)}: of an unknown or another machine's process; remove what no run uses"] if unknown else []
    )
    return Undecided("; ".join(found)) if found else "no weights or unfinished files of dead processes"


def _sized(paths: list[Path]) -> str:
    return ", ".join(f"{path} ({leftovers.size_of(path) / GIB:.2f} GiB)" for path in paths)


def _check_disk(config: SftConfig | RlConfig) -> str:
    """Compare free disk space with the checkpoints that are kept, the one being written, and the exported model."""
    sizes = StepSizes(config, processes=1)
    parameters, itemsize = language_model_parameters(sizes.student), sizes.dtype.itemsize
    checkpoint = sizes.trained_parameters * (
        itemsize + 8 + (4 if itemsize < 4 else 0)
    )  # weights, Adam's moments, fp32 masters
    kept = config.keep_checkpoints + 1 + (config.evaluation.best is not None)
    needed, free = kept * checkpoint + parameters * itemsize, machine.free_disk(config.run_dir)
    line = (
        f"{kept} checkpoints of {checkpoint / GIB:.2f} GiB and the model need {needed / GIB:.2f}, "
        f"{free / GIB:.2f} GiB free"
    )
    if needed > free:
        raise ValueError(f"{line} at {config.run_dir}; make room, or lower keep_checkpoints")
    return line


def _check_memory(sizes: StepSizes, stages: list[StageMemory]) -> str:
    """Compare the planned peak with the GPU that has least memory free, or with this machine's memory where it has no
    GPU and a core for each process. Adds each pipeline stage's memory to `stages`."""
    gpus = machine.free_gpu_memory()
    stages += stage_memories(sizes, "cuda" if gpus else "cpu")
    peak, processes = fullest(stages).peak, sizes.processes
    line = f"{peak / GIB:.2f} GiB a process at the longest responses"
    if gpus:
        if peak > min(gpus):
            raise ValueError(f"{line}, a GPU here has {min(gpus) / GIB:.2f} free; `vold plan` says what would fit")
        return f"{line}, {min(gpus) / GIB:.2f} GiB free on a GPU here"
    free = machine.free_memory()
    if processes > (os.cpu_count() or 1):
        return Undecided(f"{line}; no GPU here to compare with: see `vold plan`")
    if peak * processes > free:
        raise ValueError(f"{line}, {processes} of them and {free / GIB:.2f} GiB free here (no GPU); see `vold plan`")
    return f"{line}, {free / GIB:.2f} GiB free here (no GPU)"


def _self_test(config: SftConfig | RlConfig) -> str:
    from vold.planning.self_test import self_divergence

    tokens, worst = self_divergence(config.student, config.dtype, config.seed)
    if worst != 0.0:
        raise ValueError(
            f"the student as its own teacher is up to {worst:.3g} nats away from itself on {tokens} tokens: the two "
            "ways of reading disagree; report it with the versions above"
        )
    return f"the student as its own teacher: KL exactly 0 on each of {tokens} tokens"
