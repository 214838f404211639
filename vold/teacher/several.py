"""Several teachers, each in vLLM: chosen for a prompt by a column of its row or by a rule, and mixed by weights.

With weights w_k of the teachers of a response, W their sum and t_k their log-probs of a sampled token,

    sum_k w_k 1/2 (logp - t_k)^2  =  W 1/2 (logp - sum_k w_k t_k / W)^2  +  a constant,

so the k2 terms of a mixture are one k2 term, towards the weighted mean of log-probs, with W times the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vold.config.schema import TeacherConfig
from vold.io import visible
from vold.models.served import ServedModel
from vold.teacher.scorer import NoTeacher
from vold.teacher.vllm import Scores, VllmTeacher
from vold.types import Prompt, Rollout, Sample


@dataclass(frozen=True)
class TeacherChoice:
    """The teachers of each prompt. column: of a row, names its teachers; rows without it follow the teachers' rules."""

    teachers: Mapping[str, TeacherConfig]
    column: str | None
    sees: Mapping[str, bool]

    @classmethod
    def from_config(cls, teachers: Mapping[str, TeacherConfig], column: str | None) -> TeacherChoice:
        """Reads each checkpoint's config.json. Raises ValueError for a rule that its teacher cannot follow."""
        sees = {name: ServedModel.from_pretrained(teacher.path).sees for name, teacher in teachers.items()}
        for name, teacher in teachers.items():
            if teacher.rows == "images" and not sees[name]:
                raise ValueError(f"teachers.{name}.rows = 'images' and {teacher.path} reads text only; choose another")
        return cls(teachers, column, sees)

    def weights(self, prompt: Prompt) -> dict[str, float]:
        """Teacher -> weight; empty where none scores responses to this prompt. Raises ValueError for a column that
        names a teacher which the config has not, or gives no weights."""
        named = self._named(prompt)
        if named is None:
            kind = "images" if prompt.images else "text"
            named = {name: 1.0 for name, teacher in self.teachers.items() if teacher.rows in ("all", kind)}
        able = {name: weight for name, weight in named.items() if self.sees[name] or not prompt.images}
        return {name: weight * self.teachers[name].weight for name, weight in able.items() if weight}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError as `weights` does, or where no teacher has anything to score."""
        used = {name for prompt in prompts for name in self.weights(prompt)}
        if idle := sorted(self.teachers.keys() - used):
            raise ValueError(
                f"teachers.{idle[0]} scores no row of the data; change its rows, name it in the column "
                f"{self.column or 'teacher'!r} (teacher_column), or leave it out"
            )

    def _named(self, prompt: Prompt) -> dict[str, float] | None:
        """What the row's column says: a name, several, or {name: weight}; None where it says nothing."""
        value = prompt.metadata.get(self.column) if self.column else None
        if value is None or value == "":
            return None
        named: Any = value
        if isinstance(value, str):
            named = {value: 1.0}
        elif isinstance(value, Sequence):
            named = dict.fromkeys(value, 1.0)
        where = f"prompt {visible(prompt.id)}: column {self.column!r}"
        if not isinstance(named, Mapping):
            raise ValueError(f"{where} must be a teacher's name, several, or a mapping of names to weights")
        for name, weight in named.items():
            if name not in self.teachers:
                choices = ", ".join(self.teachers)
                raise ValueError(
                    f"{where} names {visible(repr(name)[:100])}, none of the teachers {choices}; correct it"
                )
            if weight is not None and (type(weight) not in (int, float) or not 0 <= weight < 1e6):
                raise ValueError(f"{where} gives {name} the weight {visible(repr(weight)[:100])}; use a number >= 0")
        return {name: float(weight) for name, weight in named.items() if weight}  # a parquet struct has all its keys


class ChosenTeachers(NoTeacher):
    """The part of the choice that the weights of a step's samples have: the log-probs come with the rollouts."""

    def __init__(self, choice: TeacherChoice):
        self._choice = choice

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their KL weights times the sum of their teachers' weights; 0 where there is none."""
        return [
            replace(sample, kl_weight=sample.kl_weight * sum(self._choice.weights(sample.prompt).values()))
            if sample.kl_weight
            else sample
            for sample in samples
        ]


class SeveralTeachers:
    """Sends each response to its teachers and returns the weighted mean of their log-probs; a RemoteTeacher."""

    def __init__(self, choice: TeacherChoice, opened: Mapping[str, VllmTeacher]):
        self._choice, self._opened = choice, opened

    def scores(self, prompt: Prompt) -> bool:
        """Whether a teacher scores responses to this prompt."""
        return bool(self._choice.weights(prompt))

    def submit(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        """See VllmTeacher. None where one of a response's teachers failed."""
        weights = [self._choice.weights(rollout.prompt) for rollout in rollouts]
        parts: list[tuple[str, list[int], Future[Scores]]] = []
        for name, teacher in self._opened.items():
            if indices := [index for index, of_rollout in enumerate(weights) if name in of_rollout]:
                parts.append((name, indices, teacher.submit([rollouts[index] for index in indices])))
        return _Mean(parts, weights)

    def close(self) -> None:
        for teacher in self._opened.values():
            teacher.close()


class _Mean(Future):
    """The mean of several futures' scores, once they are there; nothing waits before `result` is asked for."""

    def __init__(self, parts: Sequence[tuple[str, list[int], Future[Scores]]], weights: Sequence[Mapping[str, float]]):
        super().__init__()
        self._parts, self._weights = parts, weights

    def done(self) -> bool:
        return all(future.done() for _, _, future in self._parts)

    def result(self, timeout: float | None = None) -> Scores:
        sums: list[Any] = [0.0] * len(self._weights)
        for name, indices, future in self._parts:
            for index, scores in zip(indices, future.result(timeout), strict=True):
                share = self._weights[index][name] / sum(self._weights[index].values())
                missing = scores is None or sums[index] is None
                sums[index] = None if missing else sums[index] + share * np.asarray(scores, np.float64)
        return [None if total is None else total.tolist() for total in sums]


def metrics_by_teacher(
    choice: TeacherChoice, samples: Sequence[Sample], mean_kl: Mapping[int, float]
) -> dict[str, float]:
    """Of each teacher: `teacher_NAME_responses`, those it scored, and `teacher_NAME_kl`, the mean over them of a
    response's mean 1/2 (logp - logp_teacher)^2, nats^2, towards the mixture where it is one of several."""
    metrics: dict[str, float] = {}
    of_sample = [choice.weights(sample.prompt) if sample.kl_weight else {} for sample in samples]
    for name in choice.teachers:
        indices = [index for index, weights in enumerate(of_sample) if name in weights]
        metrics[f"teacher_{name}_responses"] = float(len(indices))
        if kl := [mean_kl[index] for index in indices if index in mean_kl]:
            metrics[f"teacher_{name}_kl"] = sum(kl) / len(kl)
    return metrics
