"""`vold plan`: a step's memory by rank and phase, and its time, on a GPU that is not there; what will not fit is
refused, with the nearest settings that do."""

from __future__ import annotations

import csv
import heapq
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vold.config.schema import RlConfig, SftConfig, Strict
from vold.models.architecture import Architecture
from vold.models.flops import language_model_parameters, mlp_flops_share, segment_flops
from vold.planning.gpu_specs import GPU_SPECS, GpuSpec
from vold.planning.stage_memory import Sizes, StageMemory, Traces, kv_bytes, places
from vold.run.timers import GIB

MARGIN = 0.1
"""Of a card's memory, left to CUDA, NCCL and what the allocator cannot use. Assumed, not measured."""
COMPONENTS = ("weights", "gradients", "optimizer", "teacher", "sampler", "vision", "KV cache", "activations", "working")
COMPONENTS += ("batch",)
LOOK = {"box": SIMPLE_HEAD, "header_style": "bold", "title_justify": "left", "caption_justify": "left"}
MOST_TRIES = 400


def run(
    config: SftConfig | RlConfig,
    *,
    gpu: str,
    processes: int,
    response_tokens: int | None = None,
    rates: Path | None = None,
) -> None:
    """Print the plan. Raises ValueError where the layout fits neither the processes nor the models, or a phase does
    not fit the card. `response_tokens`: of a mean response, for time; memory is planned for the longest. `rates`:
    run_dir of a run that `vold profile` looked at."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # of Megatron's calls
    card, sizes, traces = GPU_SPECS[gpu], Sizes(config, processes), Traces()
    measured = measured_rates(rates) if rates else {}
    found = places(sizes, "cuda", traces)
    console = Console()
    console.print(memory_table(found, sizes, gpu, card))
    for line in _notes(found, sizes, card):
        console.print(line, highlight=False)
    console.print("")
    timed = replace(sizes, response_tokens=response_tokens)
    console.print(time_table(timed, card, measured))
    console.print(_time_note(timed, gpu, card), highlight=False)
    if not fits(found, card):
        raise ValueError(_refusal(found, sizes, gpu, card, traces))


def fits(found: list[StageMemory], card: GpuSpec) -> bool:
    return max(place.peak for place in found) <= (1 - MARGIN) * card.memory


# Memory --------------------------------------------------------------------------------------------------------------


def memory_table(found: list[StageMemory], sizes: Sizes, gpu: str, card: GpuSpec) -> Table:
    """Of the fullest place."""
    room, place = (1 - MARGIN) * card.memory, max(found, key=lambda place: place.peak)
    table = Table(
        *("GiB", *place.phases),
        title=f"{sizes.processes} × {gpu}, {sizes.copies} copies of the model: {place.name}",
        **LOOK,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in COMPONENTS:
        values = [place.resident.get(name, 0.0) + added.get(name, 0.0) for added in place.phases.values()]
        if any(values):
            table.add_row(name, *(f"{value / GIB:.2f}" if value else "·" for value in values))
    table.add_section()
    totals = [place.total(phase) for phase in place.phases]
    table.add_row("sum", *(f"{total / GIB:.2f}" for total in totals), style="bold")
    of_card = (
        Text(f"{total / card.memory:.0%} {'✗' if total > room else '✓'}", "red" if total > room else "green")
        for total in totals
    )
    table.add_row(f"of {card.memory / GIB:.4g}", *of_card)
    return table


def _notes(found: list[StageMemory], sizes: Sizes, card: GpuSpec) -> Iterator[str]:
    if len(found) > 1:
        yield "Peak by stage: " + ", ".join(f"{place.name} {place.peak / GIB:.1f}" for place in found)
    yield (
        f"Micro-batches of {sizes.micro_batch} tokens, {sizes.micro_batches} a step. A tenth of the card is left to "
        "CUDA, NCCL and the allocator (assumed, not measured). Layers as with liger-kernel and flash-attn; not counted "
        "are vLLM's own activations and CUDA graphs."
    )
    host = max(place.host for place in found)
    if host:
        yield f"The teacher waits in CPU memory: {host / GIB:.1f} GiB for each process of a node."


def _refusal(found: list[StageMemory], sizes: Sizes, gpu: str, card: GpuSpec, traces: Traces) -> str:
    worst = max(found, key=lambda place: place.peak)
    phase = max(worst.phases, key=worst.total)
    line = (
        f"phase {phase} needs {worst.peak / GIB:.1f} GiB on {worst.name} and {gpu} has "
        f"{(1 - MARGIN) * card.memory / GIB:.1f} to give; "
    )
    nearest = proposal(sizes, card, traces)
    if nearest is None:
        return line + f"no setting that was tried fits {sizes.processes} processes: plan more, or a larger GPU"
    overrides, peak = nearest
    return line + f"{' '.join(overrides)} fits, with {peak / GIB:.1f}"


# What would fit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """A setting that costs time and saves memory. `levels`: values from the config's own on; `cost` of one more level,
    in the order in which a person would try them."""

    key: str
    levels: tuple
    cost: int


def proposal(sizes: Sizes, card: GpuSpec, traces: Traces) -> tuple[list[str], float] | None:
    """The cheapest change of settings that fits, as overrides, with its peak; None when none was found."""
    knobs = _knobs(sizes)
    for levels in itertools.islice(_by_cost(knobs), 1, MOST_TRIES):
        chosen = {knob.key: knob.levels[level] for knob, level in zip(knobs, levels, strict=True) if level}
        config = changed(sizes.config, chosen | ({"parallel.sp": True} if chosen.get("parallel.tp", 1) > 1 else {}))
        candidate = replace(sizes, config=config)
        try:
            found = places(candidate, "cuda", traces)
        except ValueError:  # does not divide heads, layers or the processes
            continue
        if fits(found, card):
            sp = ["parallel.sp=true"] if config.parallel.sp and not sizes.config.parallel.sp else []
            return [f"{key}={_yaml(value)}" for key, value in chosen.items()] + sp, max(p.peak for p in found)
    return None


def _knobs(sizes: Sizes) -> list[Knob]:
    config, parallel = sizes.config, sizes.config.parallel
    modes = ("none", "selective", "full")
    longest = config.max_tokens if isinstance(config, SftConfig) else sizes.prompt + sizes.response
    knobs = [
        Knob("parallel.distributed_optimizer", (False, True)[parallel.distributed_optimizer :], 1),
        Knob("parallel.recompute", modes[modes.index(parallel.recompute) :], 4),
        Knob("microbatch_tokens", _halves(config.microbatch_tokens, longest), 3),
        Knob("parallel.tp", _doubles(parallel.tp, sizes.processes), 8),
        Knob("parallel.pp", _doubles(parallel.pp, sizes.processes), 10),
    ]
    if config.evaluation.every and config.evaluation.sets:
        knobs.append(_sampling("evaluation.sampling.sequences_per_call", config.evaluation.sampling))
    if isinstance(config, RlConfig):
        if sizes.teacher is not None:
            knobs.append(Knob("teacher_offload", (False, True)[config.teacher_offload :], 2))
        if config.rollout.engine == "transformers":
            knobs.append(_sampling("rollout.sequences_per_call", config.rollout))
        elif not config.rollout.vllm.urls:
            knobs.append(Knob("rollout.vllm.sleep", (False, True)[config.rollout.vllm.sleep :], 2))
    return knobs


def _sampling(key: str, sampling) -> Knob:
    return Knob(key, _halves(sampling.sequences_per_call, 4), 2)


def _halves(value: int, least: int) -> tuple[int, ...]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(found[:5])


def _doubles(value: int, most: int) -> tuple[int, ...]:
    return tuple(value * 2**n for n in range(4) if value * 2**n <= most)


def _by_cost(knobs: list[Knob]) -> Iterator[tuple[int, ...]]:
    """Levels of every knob, the config's own first, then by cost."""
    start = (0,) * len(knobs)
    heap, seen = [(0, start)], {start}
    while heap:
        cost, levels = heapq.heappop(heap)
        yield levels
        for place, knob in enumerate(knobs):
            more = (*levels[:place], levels[place] + 1, *levels[place + 1 :])
            if more[place] < len(knob.levels) and more not in seen:
                seen.add(more)
                heapq.heappush(heap, (cost + knob.cost, more))


def changed(config: Strict, overrides: Mapping[str, object]) -> Strict:
    """The config with some keys set."""
    for key, value in overrides.items():
        name, _, rest = key.partition(".")
        config = config.model_copy(update={name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one rank in one phase: FLOP, bytes of memory moved, and over all ranks tokens by which its rate is counted."""

    flop: float
    moved: float
    tokens: float = 0.0


def work(sizes: Sizes) -> dict[str, Work]:
    """By phase, of a step whose teacher scores every response. Of what is moved only weights, gradients, keys and
    values are counted: times that follow from it are lower bounds."""
    config, student = sizes.config, sizes.student
    ranks_a_copy = config.parallel.tp * config.parallel.pp
    found: dict[str, Work] = {}
    if isinstance(config, RlConfig) and not config.rollout.vllm.urls:
        found["rollout"] = _drawing(sizes)
    tokens = float(sizes.prompts_per_copy * sizes.siblings * sizes.response * sizes.copies)
    if sizes.teacher is not None:
        weights = float(sizes.itemsize * language_model_parameters(sizes.teacher) * sizes.micro_batches / ranks_a_copy)
        found["teacher"] = Work(_forward(sizes, sizes.teacher) / ranks_a_copy, weights, tokens)
    forward = _forward(sizes, student) / ranks_a_copy
    weights = float(sizes.itemsize * language_model_parameters(student) * sizes.micro_batches / ranks_a_copy)
    found["student_forward"] = Work(forward, weights, tokens)
    again = {"none": 0.0, "selective": mlp_flops_share(student), "full": 1.0}[config.parallel.recompute]
    # Backward reads weights twice, and reads and writes the fp32 gradients of each micro-batch.
    found["student_backward"] = Work((2 + again) * forward, 6 * weights, tokens)
    sharing = sizes.copies if config.parallel.distributed_optimizer else 1
    # fp32 gradient, master and moments read; master, moments and the bf16 weight written
    found["optimizer"] = Work(0.0, language_model_parameters(student) / ranks_a_copy * 30 / sharing)
    return found


def _forward(sizes: Sizes, arch: Architecture) -> float:
    """Of a step's tokens in one model copy; segment_flops counts forward and backward, three times as much."""
    first = segment_flops(arch, sizes.prompt + sizes.response, sizes.prompt + sizes.response)
    others = (sizes.siblings - 1) * segment_flops(arch, sizes.response, sizes.prompt + sizes.response)
    return sizes.prompts_per_copy * (first + others) / 3


def _drawing(sizes: Sizes) -> Work:
    """Every rank draws its share. Each new token reads the weights, once for all responses side by side, and the keys
    and values of what is before it."""
    config, arch = sizes.config, sizes.student
    prompts = -(-config.prompts_per_step // sizes.processes)
    responses = prompts * sizes.siblings
    calls = -(-responses // config.rollout.sequences_per_call) if config.rollout.engine == "transformers" else 1
    read = responses * sizes.response * (sizes.prompt + sizes.response / 2) * kv_bytes(arch, sizes.itemsize)
    moved = calls * sizes.response * sizes.itemsize * language_model_parameters(arch) + read
    flop = _forward(sizes, arch) * prompts / sizes.prompts_per_copy
    return Work(flop, moved, float(config.prompts_per_step * sizes.siblings * sizes.response))


def measured_rates(run_dir: Path) -> dict[str, float]:
    """Phase -> tokens a second of one process, from a profile's table. Raises ValueError when there is none."""
    path = run_dir / "profile" / "phases.csv"
    if not path.is_file():
        raise ValueError(f"--rates {run_dir}: no {path}; run `vold profile` on this machine first")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    processes = len({row["rank"] for row in rows})
    return {
        row["phase"]: float(row["tokens_per_second"]) / processes
        for row in rows
        if row["rank"] == "0" and row["tokens_per_second"]
    }


def _idle(sizes: Sizes) -> float:
    """Of training, how much longer it takes for the pipeline's stages waiting for each other."""
    parallel = sizes.config.parallel
    return (parallel.pp - 1) / (sizes.micro_batches * (parallel.vpp or 1))


def _time_note(sizes: Sizes, gpu: str, card: GpuSpec) -> str:
    peaks = f"{card.flops / 1e12:.0f} TFLOP/s and {card.bandwidth / 1e12:.4g} TB/s"
    idle = f" Waiting for other stages: {_idle(sizes):.1%} more of training." if sizes.config.parallel.pp > 1 else ""
    return f"At least: at the {gpu}'s published {peaks}; a bound, not a forecast.{idle}"


def time_table(sizes: Sizes, card: GpuSpec, rates: Mapping[str, float]) -> Table:
    idle = _idle(sizes)
    table = Table(
        *("phase", "TFLOP", "GB moved", "at least, s", "tokens/s", "estimate, s"),
        title=f"A step's time on a rank, responses of {sizes.response} tokens",
        **LOOK,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    bounds, estimates = [], []
    for phase, one in work(sizes).items():
        bounds.append(max(one.flop / card.flops, one.moved / card.bandwidth))
        bounds[-1] *= 1 + idle if phase.startswith("student") else 1
        rate = rates.get(phase)
        estimates.append(one.tokens / (rate * sizes.processes) if rate and one.tokens else None)
        row = (f"{one.flop / 1e12:,.0f}", f"{one.moved / 1e9:,.0f}", _seconds(bounds[-1]))
        measured = "" if not one.tokens else f"{rate:,.0f}" if rate else "not measured"
        table.add_row(phase, *row, measured, "" if estimates[-1] is None else _seconds(estimates[-1]))
    known = [value for value in estimates if value is not None]
    whole = _seconds(sum(known)) if known else "not measured"
    table.add_section()
    table.add_row("step", "", "", _seconds(sum(bounds)), "", whole, style="bold")
    return table


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
