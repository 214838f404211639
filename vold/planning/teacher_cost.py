"""`vold plan --teacher-gpus`: how long a step waits for a teacher on GPUs of its own, by their number.

Everything is at the GPU's published peaks, as in the plan's time table: a share of a step is right where sampling,
training and scoring reach the same part of their peaks. Lengths of responses are spread evenly around their mean, from
0 to twice the mean or up to the longest; a group is finished with its longest response. A teacher of k2 scores groups
while others are still sampled; whole distributions are asked for when a step's batch is packed, and nothing hides them.
A response's prompt is read with it each time, since vLLM's prefix cache holds no log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.table import Table

from vold.config.schema import RlConfig
from vold.models.architecture import Architecture
from vold.models.flops import active_parameters, language_model_parameters, segment_flops
from vold.objectives import Objective
from vold.objectives.routing import every, failed, failed_groups
from vold.planning.gpu_specs import GpuSpec
from vold.planning.memory_table import TABLE_STYLE
from vold.planning.stage_memory import kv_bytes
from vold.planning.step_sizes import StepSizes
from vold.planning.step_time import forward_flops, phase_bounds
from vold.report.teacher_figure import CostPoint, cost_figure

TARGET = 0.1
"""Part of a step that a teacher may take."""
ACCURACIES = (0.0, 0.4, 0.6, 0.8)
"""Of the figure, beside the one asked for."""
POINTS = 401
"""At which a step's sampling is looked at."""


def scored_share(objective: Objective, accuracy: float, responses: int) -> float:
    """The share of responses that the teacher scores, where `accuracy` of them are right, each on its own."""
    if objective.routing is failed:
        return 1.0 - accuracy
    if objective.routing is failed_groups:
        return (1.0 - accuracy) ** responses
    return 1.0 if objective.routing is every else 0.0


@dataclass(frozen=True)
class Sampling:
    """A step's sampling. seconds: until all responses have had so many tokens (or have ended), ascending; finished: the
    share of groups that are finished then."""

    seconds: np.ndarray
    finished: np.ndarray

    @classmethod
    def at_the_peaks(cls, sizes: StepSizes, spec: GpuSpec) -> Sampling:
        """On the student's GPUs, or on those of `rollout.vllm.urls`."""
        rollout, student, size = sizes.config.rollout, sizes.student, sizes.dtype.itemsize
        gpus = len(rollout.vllm.urls) * rollout.vllm.gpus if rollout.engine == "vllm" and rollout.vllm.urls else 0
        responses = sizes.config.prompts_per_step * sizes.responses_per_prompt / (gpus or sizes.processes)
        mean = sizes.response_tokens
        longest = min(2 * mean, rollout.max_new_tokens)
        token = np.linspace(0.0, longest, POINTS)
        ended = np.clip((token - (2 * mean - longest)) / max(2.0 * (longest - mean), 1e-9), 0.0, 1.0)
        ended[-1] = 1.0
        running = responses * (1.0 - ended)
        parameters = active_parameters(student)
        moved = size * parameters + running * (sizes.prompt_tokens + token) * kv_bytes(student, size)
        slowest = np.maximum(moved / spec.bandwidth, 2.0 * parameters * running / spec.flops)
        steps = (slowest[1:] + slowest[:-1]) / 2 * np.diff(token)
        return cls(np.concatenate([[0.0], np.cumsum(steps)]), ended**sizes.responses_per_prompt)

    def scored_after(self, scoring: float) -> float:
        """Seconds until a teacher that needs `scoring` for all groups, and takes them as they finish, has done so."""
        return float(np.max(self.seconds + scoring * (1.0 - np.concatenate([[0.0], self.finished[:-1]]))))


@dataclass(frozen=True)
class TeacherCost:
    """The teacher of one config beside `sizes`: its student on so many GPUs of `spec`. whole: it hands over whole
    distributions; lag: of the rollouts."""

    sizes: StepSizes
    spec: GpuSpec
    teacher: Architecture
    whole: bool
    lag: int

    @classmethod
    def from_sizes(cls, sizes: StepSizes, spec: GpuSpec) -> TeacherCost:
        """Raises ValueError for a config without a teacher, with several, or with one whose work is not known."""
        config, objective = sizes.config, sizes.objective
        if not isinstance(config, RlConfig) or objective is None or not objective.needs_teacher:
            raise ValueError("--teacher-gpus is of an rl config whose objective needs a teacher; leave it out")
        if config.teacher is None:
            raise ValueError(
                "--teacher-gpus is of one teacher; set teacher: PATH and leave teachers out, once for each of them"
            )
        teacher = Architecture.from_pretrained(config.teacher)
        return cls(sizes, spec, teacher, objective.divergence is not None, config.rollout.lag)

    def point(self, gpus: int, accuracy: float) -> CostPoint:
        """The step with so many GPUs for the teacher; 0: it is in the trainer, on the student's."""
        training = self._training_seconds
        share = self.scored_share(accuracy)
        scoring = self._scoring_seconds(gpus, share)
        finished, sampling = self._sampling, float(self._sampling.seconds[-1])
        on_the_way = gpus > 0 and not self.whole
        if not on_the_way:
            chains = (sampling, training + scoring)
        elif self.lag > 1:  # a batch is scored while the next one is sampled: nothing but its pace counts
            chains = (sampling, training, scoring)
        else:
            last_group = scoring / max(share * self.sizes.config.prompts_per_step, 1.0)
            chains = (finished.scored_after(scoring) + min(last_group, scoring), training)
        step = max(chains) if self.lag else sum(chains)
        waiting = step - (max(sampling, training) if self.lag else sampling + training)
        seconds = (scoring, sampling, training, waiting, step)
        return CostPoint(gpus, accuracy, self.lag > 0, self._fits(gpus), *seconds)

    @cached_property
    def _training_seconds(self) -> float:
        config = self.sizes.config.model_copy(update={"teacher_engine": "vllm"})
        bounds = phase_bounds(replace(self.sizes, config=config), self.spec)
        return sum(seconds for phase, seconds in bounds.items() if phase != "rollout")

    @cached_property
    def _sampling(self) -> Sampling:
        return Sampling.at_the_peaks(self.sizes, self.spec)

    def scored_share(self, accuracy: float) -> float:
        objective = self.sizes.objective
        assert objective is not None, "see from_sizes"
        return scored_share(objective, accuracy, self.sizes.responses_per_prompt)

    def _scoring_seconds(self, gpus: int, share: float) -> float:
        sizes = self.sizes
        if not gpus:  # a copy of the model scores its own responses, a prompt once for all of them
            parallel = sizes.config.parallel
            ranks = parallel.tp * parallel.pp * parallel.cp
            return share * forward_flops(sizes, self.teacher) / ranks / self.spec.flops
        length = sizes.prompt_tokens + sizes.response_tokens
        flop = segment_flops(self.teacher, length, length) / 3
        if self.whole:  # hidden states need no head
            flop -= 2.0 * self.teacher.vocab * self.teacher.hidden * length
        responses = share * sizes.config.prompts_per_step * sizes.responses_per_prompt
        return responses * flop / (gpus * self.spec.flops)

    def _fits(self, gpus: int) -> bool:
        """The weights, divided over the GPUs, and the keys and values of one sequence; in the trainer: see the plan."""
        length = self.sizes.prompt_tokens + self.sizes.response_tokens
        size = self.sizes.dtype.itemsize
        needed = size * language_model_parameters(self.teacher) + length * kv_bytes(self.teacher, size)
        return not gpus or needed <= gpus * self.spec.usable_memory

    def table(self, points: Sequence[CostPoint]) -> Table:
        """Seconds, shares and use of each number of GPUs."""
        accuracy = points[0].accuracy
        scored = self.scored_share(accuracy)
        columns = ("teacher GPUs", "scores, s", "step waits, s", "step, s", "of the step", "nothing hidden", "busy")
        table = Table(
            *columns,
            title=f"A teacher of its own beside {self.sizes.processes} GPUs: {scored:.0%} of responses are scored",
            header_style="bold",
            **TABLE_STYLE,
        )
        for column in table.columns:
            column.justify = "right"
        for point in points:
            name = str(point.gpus) if point.gpus else "in the trainer"
            if not point.fits:
                table.add_row(name, *["weights do not fit"], *[""] * 5, style="red")
                continue
            seconds = (f"{value:.3g}" for value in (point.scoring, point.waiting, point.step))
            busy = f"{point.scoring / point.step:.0%}" if point.gpus else ""
            style = "green" if point.share <= TARGET else ""
            table.add_row(name, *seconds, f"{point.share:.1%}", f"{point.unhidden:.1%}", busy, style=style)
        return table

    def note(self, points: Sequence[CostPoint]) -> str:
        """What was assumed, and the answer."""
        how = "groups are scored as they finish"
        if self.whole:
            how = "whole distributions are asked for when a batch is packed"
        fewest = next((p for p in points if p.gpus and p.fits and p.share <= TARGET), None)
        answer = (
            f"{fewest.gpus} GPUs are the fewest of these with which a step waits at most {TARGET:.0%} for its teacher"
            if fewest
            else f"with none of these does a step wait at most {TARGET:.0%} for its teacher"
        )
        mean, longest = self.sizes.response_tokens, self.sizes.config.rollout.max_new_tokens
        lengths = f"responses of {max(2 * mean - longest, 0)} to {min(2 * mean, longest)} tokens, evenly"
        return (
            f"Assumed: all reach the same part of their peaks; {how}; {lengths}; prompts of "
            f"{self.sizes.prompt_tokens}; lag {self.lag}. So {answer}."
        )


@dataclass(frozen=True)
class TeacherQuestion:
    """What is asked of a teacher on GPUs of its own. gpus: their numbers, ascending. accuracy: the share of right
    responses. plot: file of the figure."""

    gpus: Sequence[int]
    accuracy: float = 0.0
    plot: Path | None = None


def read_question(gpus: str, accuracy: float, plot: Path | None) -> TeacherQuestion | None:
    """The options of `vold plan`; None where they ask nothing. Raises ValueError for options that mean nothing."""
    if not gpus:
        if accuracy or plot:
            raise ValueError("--accuracy and --plot are of --teacher-gpus; add --teacher-gpus 1,2,4,8")
        return None
    parts = [part.strip() for part in gpus.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1 << 20 for part in parts):
        raise ValueError(f"--teacher-gpus {gpus!r} is no list of numbers of GPUs; write 1,2,4,8")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {plot} must end in .png or .svg")
    return TeacherQuestion(sorted({int(part) for part in parts}), accuracy, plot)


def write_figure(cost: TeacherCost, counts: Sequence[int], accuracy: float, path: Path) -> None:
    """The shares of a step for all accuracies, and what a step is made of for the one asked for."""
    accuracies = sorted({*ACCURACIES, accuracy}) if cost.scored_share(1.0) < cost.scored_share(0.0) else [accuracy]
    points = [cost.point(gpus, value) for value in accuracies for gpus in counts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cost_figure([p for p in points if p.fits], accuracy, TARGET, fmt=path.suffix[1:]))
