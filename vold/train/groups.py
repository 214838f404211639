"""Prompts -> rollouts -> graded groups on one rank, and what a step shows of them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from vold.config.schema import RewardConfig, RolloutConfig
from vold.evaluation.evaluator import answer_row
from vold.grading import Grader, reward
from vold.objectives import Objective
from vold.rollout import Sampler
from vold.run.job import Job
from vold.types import Group, Prompt, Rollout, Sample, StepReport, Verdict

Phase = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of a step that are asked together, from the step's place `first` on; `number`: of the step's portions."""

    step: int
    number: int
    first: int
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts that one rank asks of its sampler at once, from the step's place `first` on. What is drawn for them
    depends on the seed, not on who draws it."""

    first: int
    prompts: Sequence[Prompt]
    seed: int


def rollout_calls(portion: PromptBatch, config: RolloutConfig, ranks: int, *, seed: int) -> list[SamplingRequest]:
    """As many calls that no rank is idle, and of at most `sequences_per_call` responses where the engine does not batch
    by itself as it has room."""
    prompts, of_a_rank = portion.prompts, -(-len(portion.prompts) // ranks)
    room = of_a_rank if config.batches_by_itself else config.sequences_per_call // config.responses_per_prompt
    each = max(1, min(room, of_a_rank))
    return [
        SamplingRequest(
            portion.first + start,
            prompts[start : start + each],
            _sampling_seed(seed, portion.step, number, portion.number),
        )
        for number, start in enumerate(range(0, len(prompts), each))
    ]


def _sampling_seed(seed: int, step: int, call: int, portion: int) -> int:
    """A pure function of where we are, so that a resumed run draws what the uninterrupted one would have."""
    return int(np.random.SeedSequence([seed, step, call, portion]).generate_state(1)[0])


class RemoteTeacher(Protocol):
    """A teacher in processes of its own, asked for a group as soon as it is graded."""

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[Sequence[float] | None]]:
        """Log-probs (nats, at the rollouts' temperature) of each response's ids; None where the call failed."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RankRollouts:
    """One rank's share of a step. groups: by place of the prompt in the step; one that is missing was lost.
    finished: seconds from the start at which each came; seconds: until all were there."""

    groups: dict[int, Group]
    finished: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class StepGroups:
    """groups: what a step learns from, in the order their prompts were asked, the same on every rank; metrics: of all
    that were drawn for it."""

    groups: list[Group]
    metrics: dict[str, float]


class RewardFunction(Protocol):
    """What responses are worth."""

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """Verdicts on (response, gold, truncated), in order, as they come: a group's rewards."""
        ...

    def compare(self, step: int, drawn: StepGroups) -> StepGroups:
        """The groups of 0-based `step` once all are known, with the rewards they are trained on. All ranks call."""
        ...


class VerdictReward:
    """The verdict on the answer, and nothing else."""

    def __init__(self, job: Job, grader: Grader):
        self.grade = grader.grade

    def compare(self, step: int, drawn: StepGroups) -> StepGroups:
        """See Judge."""
        return drawn


@dataclass(frozen=True)
class RolloutWorker:
    """One rank's sampler with what looks at its responses. Whoever calls `draw` has sampler and grader to himself."""

    sampler: Sampler
    judge: RewardFunction
    objective: Objective
    config: RolloutConfig
    reward: RewardConfig
    teacher: RemoteTeacher | None = None
    stop: threading.Event = field(default_factory=threading.Event)  # nobody waits for these groups any more

    def draw(self, calls: Sequence[SamplingRequest], phase: Phase, watch: Callable[[str], None]) -> RankRollouts:
        """Every group graded as it finishes, its teacher asked while others are still drawn. `watch` is told how it
        goes."""
        started, finished, groups = time.perf_counter(), [], {}
        asked, tokens = sum(len(call.prompts) for call in calls), 0
        scores: dict[int, Future[list[Sequence[float] | None]]] = {}
        for place, rollouts in self._stream(calls, phase):
            seconds = time.perf_counter() - started
            with phase("grade"):
                groups[place] = grade_group(rollouts, self.judge, self.reward)
            if self.teacher and (wanted := self._distilled(groups[place])):
                scores[place] = self.teacher.submit(wanted)
            finished.append(seconds)
            tokens += sum(len(rollout.response_ids) for rollout in rollouts)
            watch(f"{asked - len(finished)} of {asked} prompts running, {tokens / max(seconds, 1e-9):.0f} tok/s")
        watch("")
        if scores:
            with phase("teacher"):
                groups |= {place: self._with_scores(groups[place], found.result()) for place, found in scores.items()}
        return RankRollouts(groups, tuple(finished), finished[-1] if finished else 0.0)

    def _stream(self, calls: Sequence[SamplingRequest], phase: Phase) -> Iterator[tuple[int, list[Rollout]]]:
        """Siblings with the place of their prompt. The time until they come is that of the phase `rollout`."""
        for call in calls:
            places: dict[str, deque[int]] = defaultdict(deque)  # a small data set is asked the same prompt twice
            for offset, prompt in enumerate(call.prompts):
                places[prompt.id].append(call.first + offset)
            responses = self.config.responses_per_prompt
            stream = self.sampler.stream(call.prompts, self.config, responses=responses, seed=call.seed)
            while not self.stop.is_set():
                with phase("rollout"):
                    rollouts = next(stream, None)
                if rollouts is None:
                    break
                assert len(rollouts) == responses, "a group is complete or does not come"
                yield places[rollouts[0].prompt.id].popleft(), rollouts

    def _distilled(self, group: Group) -> list[Rollout]:
        wanted = self.objective.needs_teacher_logprobs(group)
        return [rollout for rollout, wants in zip(group.rollouts, wanted, strict=True) if wants]

    def _with_scores(self, group: Group, found: Sequence[Sequence[float] | None]) -> Group:
        scored = iter(found)
        rollouts = [
            replace(rollout, logp_teacher=next(scored) or ()) if wants else rollout
            for rollout, wants in zip(group.rollouts, self.objective.needs_teacher_logprobs(group), strict=True)
        ]
        return replace(group, rollouts=tuple(rollouts))


def grade_group(rollouts: Sequence[Rollout], judge: RewardFunction, config: RewardConfig) -> Group:
    """Siblings with their rewards."""
    verdicts = judge.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    rewards = tuple(reward(rollout, verdict, config) for rollout, verdict in zip(rollouts, verdicts, strict=True))
    return Group(rollouts[0].prompt, tuple(rollouts), tuple(verdicts), rewards)


def pass_rate(group: Group | None) -> float | None:
    """Share of right answers; None for a group that was lost, or where the grader broke on every response."""
    judged = [verdict.outcome for verdict in group.verdicts if verdict.outcome != "broken"] if group else []
    return judged.count("correct") / len(judged) if judged else None


def mask_unscored(samples: Sequence[Sample]) -> list[Sample]:
    """Without the samples' weights for which the teacher did not answer: they stay in their group's baseline and in
    the normaliser, and teach nothing."""
    return [sample.without_weights() if sample.kl_weight and sample.teacher_failed else sample for sample in samples]


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length and shares of a step's groups."""
    if not groups:
        return {"response_tokens": 0.0}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    outcomes = [{verdict.outcome for verdict in group.verdicts} for group in groups]
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return {
        "reward": sum(rewards) / max(len(rewards), 1),
        "response_tokens": float(tokens),
        "response_length": tokens / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "broken": float(len(rollouts) - len(rewards)),
        "groups_solved": outcomes.count({"correct"}) / len(groups),
        "groups_failed": outcomes.count({"wrong"}) / len(groups),
    }


def teacher_metrics(samples: Sequence[Sample], length: Callable[[Prompt], int]) -> dict[str, float]:
    """`teacher_saved`: share of a step's tokens, prompts included, that no teacher reads because their KL weight is 0;
    `teacher_failed`: responses that it was asked about and did not answer. `length`: of a prompt, images included (see
    PromptEncoder)."""
    lengths = [length(sample.prompt) + len(sample.response_ids) for sample in samples]
    read = sum(tokens for tokens, sample in zip(lengths, samples, strict=True) if sample.kl_weight)
    failed = sum(sample.kl_weight != 0.0 and sample.teacher_failed for sample in samples)
    return {"teacher_saved": 1.0 - read / max(sum(lengths), 1), "teacher_failed": float(failed)}


def teacher_skipped_images(weighed: Sequence[Sample], scorable: Sequence[Sample]) -> dict[str, float]:
    """`teacher_skipped_images`: responses that lost their KL term because the teacher does not see their images."""
    return {
        "teacher_skipped_images": float(sum(a.kl_weight != b.kl_weight for a, b in zip(weighed, scorable, strict=True)))
    }


def logged_sample_ids(groups: Sequence[Group], limit: int) -> list[int]:
    """Which graded responses samples.jsonl shows: up to `limit`, spread over the groups, by place among the samples."""
    graded = sum(verdict.outcome != "broken" for group in groups for verdict in group.verdicts)
    stride = max(graded // max(limit, 1), 1)
    return list(range(0, graded, stride))[:limit]


def group_rows(
    groups: Sequence[Group], samples: Sequence[Sample], report: StepReport, shown: Sequence[int], tokenizer
) -> list[dict]:
    """Rows for samples.jsonl, of the responses at the places `shown`. One that was trained on has its `tokens` with
    `logp` and `logp_teacher` of each (nats, to 3 decimals)."""
    graded = [
        (rollout, verdict, reward)
        for group in groups
        for rollout, verdict, reward in zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        if reward is not None
    ]
    rows = []
    for place in shown:
        rollout, verdict, reward = graded[place]
        row = answer_row(rollout, verdict)
        row |= {"reward": reward, "advantage": samples[place].advantage, "mean_kl": report.mean_kl.get(place)}
        if logps := report.tokens.get(place):
            row["tokens"] = token_texts(tokenizer, rollout.response_ids.tolist())
            row |= {name: [round(logp, 3) for logp in values] for name, values in logps.items()}
        rows.append(row)
    return rows


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id, special tokens included. A character spelled by several ids is the last one's."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        split = text.endswith("\ufffd") and len(pending) < 4 and len(texts) + 1 < len(ids)  # UTF-8: 4 bytes at most
        texts.append("" if split else text)
        pending = pending if split else []
    return texts
