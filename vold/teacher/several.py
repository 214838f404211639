"""Several teachers: chosen for a prompt by a column of its row or by a rule, and mixed by weights.

With weights w_k of the teachers of a response, W their sum and t_k their log-probs of a sampled token,

    sum_k w_k 1/2 (logp - t_k)^2  =  W 1/2 (logp - sum_k w_k t_k / W)^2  +  a constant,

so the k2 terms of a mixture are one k2 term, towards the weighted mean of log-probs, with W times the weight. Teachers
with a divergence of whole distributions have a term each (MicroBatch.further_terms), of weight w_k.

N targets of a micro-batch, n of them with a weight in a term, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vold.config.schema import TeacherConfig
from vold.io import visible
from vold.models.served import ServedModel
from vold.objectives.divergences import VocabularyDivergence
from vold.parallel.context import is_own
from vold.parallel.launch import Layout
from vold.teacher.scorer import Teacher
from vold.teacher.vllm import Scores, VllmTeacher
from vold.teacher.vllm_distributions import AskedTeacher
from vold.types import Batch, MicroBatch, Prompt, Rollout, Sample


@dataclass(frozen=True)
class TeacherChoice:
    """The teachers of each prompt. column: of a row, names its teachers; rows without it follow the teachers' rules.
    reads: whether a teacher with a view of its own can read a prompt. by_distribution: names of those with a divergence
    of whole distributions."""

    teachers: Mapping[str, TeacherConfig]
    column: str | None
    sees: Mapping[str, bool]
    reads: Mapping[str, Callable[[Prompt], bool]] = field(default_factory=dict)
    by_distribution: frozenset[str] = frozenset()

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
        able = {name: weight for name, weight in named.items() if self._can_read(name, prompt)}
        return {name: weight * self.teachers[name].weight for name, weight in able.items() if weight}

    def _can_read(self, name: str, prompt: Prompt) -> bool:
        return self.reads[name](prompt) if name in self.reads else self.sees[name] or not prompt.images

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


class Inside(NamedTuple):
    """A teacher that scores batches, and its divergence; None: k2."""

    teacher: Teacher | AskedTeacher
    divergence: VocabularyDivergence | None


class ChosenTeachers:
    """The part of several teachers that concerns a step's batches: weights by the choice, and the teachers that score
    batches (`inside`); the log-probs of the others come with the rollouts."""

    def __init__(self, choice: TeacherChoice, layout: Layout | None = None, inside: Mapping[str, Inside] | None = None):
        self._choice, self._layout, self._inside = choice, layout, dict(inside or {})
        self.metrics: dict[str, float] = {}

    def drop_unscorable(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their KL weights times the sum of their teachers' weights; 0 where there is none."""
        return [
            replace(sample, kl_weight=sample.kl_weight * sum(self._choice.weights(sample.prompt).values()))
            if sample.kl_weight
            else sample
            for sample in samples
        ]

    def score(self, batch: Batch) -> Batch:
        """The batch with one k2 term for the teachers that have it, and a term for each of the others, on the last
        pipeline stage. A response that a teacher failed to score loses all its terms. Ranks call as for Teacher."""
        if not self._inside:
            return batch
        assert self._layout is not None
        shares = {name: [self._share_N(name, micro) for micro in batch.micro_batches] for name in self._choice.teachers}
        scored = {}
        for name, (teacher, _) in self._inside.items():
            parts = zip(batch.micro_batches, shares[name], strict=True)
            scored[name] = teacher.score(
                Batch(tuple(replace(m, kl_weight_N=m.kl_weight_N * x_N, logp_teacher_N=None) for m, x_N in parts))
            )
        failed = {name: x.teacher.metrics.get("teacher_failed") for name, x in self._inside.items()}
        self.metrics = {f"teacher_{name}_failed": value for name, value in failed.items() if value is not None}
        batch = batch.to(self._layout.device)
        if not self._layout.is_last_stage:
            return batch
        return Batch(
            tuple(
                self._joined(
                    micro,
                    {name: x[number].to(micro.kl_weight_N) for name, x in shares.items()},
                    {name: x.micro_batches[number] for name, x in scored.items()},
                )
                for number, micro in enumerate(batch.micro_batches)
            )
        )

    def _share_N(self, name: str, micro: MicroBatch) -> Tensor:
        """The part of each token's KL weight that is this teacher's."""
        shares = []
        for sample in micro.samples_B:
            weights = self._choice.weights(sample.prompt)
            shares.append(weights.get(name, 0.0) / (sum(weights.values()) or 1.0))
        return torch.tensor([*shares, 0.0], dtype=torch.float32)[micro.sequence_N.cpu()]

    def _joined(self, micro: MicroBatch, shares: Mapping[str, Tensor], scored: Mapping[str, MicroBatch]) -> MicroBatch:
        assert self._layout is not None
        k2_N, logp_N = torch.zeros_like(micro.kl_weight_N), torch.zeros_like(micro.kl_weight_N)
        for name in shares.keys() - scored.keys():
            k2_N += shares[name]
        if micro.logp_teacher_N is not None:
            logp_N += k2_N * micro.logp_teacher_N
        lost_N, terms = torch.zeros_like(k2_N, dtype=torch.bool), list(micro.further_terms)
        for name, part in scored.items():
            lost_N |= (micro.kl_weight_N * shares[name] != 0) & (part.kl_weight_N == 0)
            divergence = self._inside[name].divergence
            if divergence is None:
                assert part.logp_teacher_N is not None
                k2_N, logp_N = k2_N + shares[name], logp_N + shares[name] * part.logp_teacher_N
            elif (term := divergence.term(f"teacher_{name}", part)) is not None:
                terms.append(term)
        has_k2_N = k2_N > 0
        micro = replace(
            micro,
            kl_weight_N=micro.kl_weight_N * k2_N,
            logp_teacher_N=torch.where(has_k2_N, logp_N / k2_N.clamp_min(1e-30), 0.0),
            further_terms=tuple(terms),
        )
        return _without(micro, lost_N, is_own(micro.source_N, self._layout)) if bool(lost_N.any()) else micro


def _without(micro: MicroBatch, lost_N: Tensor, own_N: Tensor) -> MicroBatch:
    """The micro-batch without weights at these tokens. own_N: this rank's tokens."""

    def kept(weight_N: Tensor) -> Tensor:
        return weight_N.masked_fill(lost_N, 0.0)

    return replace(
        micro,
        pg_weight_N=kept(micro.pg_weight_N),
        kl_weight_N=kept(micro.kl_weight_N),
        reference_weight_N=None if micro.reference_weight_N is None else kept(micro.reference_weight_N),
        further_terms=tuple(term.without(lost_N, own_N) for term in micro.further_terms),
    )


class SeveralTeachers:
    """Sends each response to those of its teachers that are `opened`, and returns the weighted mean of their log-probs;
    a RemoteTeacher."""

    def __init__(self, choice: TeacherChoice, opened: Mapping[str, VllmTeacher]):
        self._choice, self._opened = choice, opened

    def scores(self, prompt: Prompt) -> bool:
        """Whether a teacher scores responses to this prompt."""
        return bool(self._weights(prompt))

    def _weights(self, prompt: Prompt) -> dict[str, float]:
        return {name: weight for name, weight in self._choice.weights(prompt).items() if name in self._opened}

    def submit(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        """See VllmTeacher. None where one of a response's teachers failed."""
        weights = [self._weights(rollout.prompt) for rollout in rollouts]
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
    response's mean 1/2 (logp - logp_teacher)^2, nats^2, towards the mixture where it is one of several. With a
    divergence of whole distributions the trainer has the latter, nats a token."""
    metrics: dict[str, float] = {}
    of_sample = [choice.weights(sample.prompt) if sample.kl_weight else {} for sample in samples]
    for name in choice.teachers:
        indices = [index for index, weights in enumerate(of_sample) if name in weights]
        metrics[f"teacher_{name}_responses"] = float(len(indices))
        kl = [mean_kl[index] for index in indices if index in mean_kl]
        if kl and name not in choice.by_distribution:
            metrics[f"teacher_{name}_kl"] = sum(kl) / len(kl)
    return metrics
