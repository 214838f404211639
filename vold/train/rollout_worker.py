"""One rank's rollout worker: samples responses, grades each group as it finishes, and sends it to a remote teacher."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from vold.config.schema import RewardConfig, RolloutConfig
from vold.objectives import Objective
from vold.rollout import Sampler
from vold.run.timers import BusyTimer
from vold.seeding import derive_seed
from vold.teacher.vllm import Scores
from vold.train.reward_function import PendingGroup, RewardFunction, grade_group, start_grading
from vold.train.reward_terms import RewardTerms
from vold.types import Group, Prompt, Rollout

PhaseTimer = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of a step that all ranks sample together. `number`: of the step's batches; `first`: the position in the
    step of its first prompt."""

    step: int
    number: int
    first: int
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts that one rank passes to its sampler at once; `first`: the position in the step of its first prompt. The
    sampled ids depend on the seed, not on the rank."""

    first: int
    prompts: Sequence[Prompt]
    seed: int


def sampling_requests(batch: PromptBatch, config: RolloutConfig, ranks: int, *, seed: int) -> list[SamplingRequest]:
    """Divide a batch into requests: enough that no rank is idle, and of at most `sequences_per_call` responses unless
    the engine batches by itself. Seeds derive from the position alone, so that a resumed run repeats them."""
    prompts, per_rank = batch.prompts, -(-len(batch.prompts) // ranks)
    limit = per_rank if config.batches_by_itself else config.sequences_per_call // config.responses_per_prompt
    size = max(1, min(limit, per_rank))
    return [
        SamplingRequest(
            batch.first + start,
            prompts[start : start + size],
            derive_seed(seed, batch.step, number, batch.number),
        )
        for number, start in enumerate(range(0, len(prompts), size))
    ]


class RemoteTeacher(Protocol):
    """A teacher outside the trainer, which scores each group as soon as it is graded."""

    def scores(self, prompt: Prompt) -> bool:
        """Whether it scores responses to this prompt."""
        ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        """Start scoring responses, at the rollouts' temperature."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RankRollouts:
    """One rank's groups of a prompt batch.

    groups          by the prompt's position in the step; a missing position was lost
    finish_seconds  when each group finished, from the start
    seconds         until all were finished
    """

    groups: dict[int, Group]
    finish_seconds: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class RolloutWorker:
    """One rank's sampler, reward function and remote teacher. Sampler and grader have one user at a time: the caller of
    `sample_groups`.

    stop: set where nobody waits for the groups any more. busy: notes when the teacher has something to score.
    """

    sampler: Sampler
    reward_function: RewardFunction
    objective: Objective
    config: RolloutConfig
    reward: RewardConfig
    teacher: RemoteTeacher | None = None
    terms: RewardTerms | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    busy: BusyTimer | None = None

    def sample_groups(
        self, requests: Sequence[SamplingRequest], phase: PhaseTimer, show_status: Callable[[str], None]
    ) -> RankRollouts:
        """Sample all requests, grading each group as it finishes and submitting it to the teacher while others are
        still sampled. `show_status` gets a line of progress after each group, and "" at the end."""
        started, finish_seconds, groups = time.perf_counter(), [], {}
        pending: dict[int, PendingGroup] = {}
        prompts, tokens = sum(len(request.prompts) for request in requests), 0
        scores: dict[int, Future[Scores]] = {}
        for position, rollouts in self._stream(requests, phase):
            seconds = time.perf_counter() - started
            with phase("grade"):
                if self.terms is None:
                    finished = {position: grade_group(rollouts, self.reward_function, self.reward)}
                else:
                    pending[position] = start_grading(rollouts, self.reward_function, self.terms)
                    finished = self._finish([i for i, group in pending.items() if group.is_done], pending)
            finished = self._unmasked(finished)
            groups |= finished
            scores |= self._submit(finished)
            finish_seconds.append(seconds)
            tokens += sum(len(rollout.response_ids) for rollout in rollouts)
            running = prompts - len(finish_seconds)
            show_status(f"{running} of {prompts} prompts running, {tokens / max(seconds, 1e-9):.0f} tok/s")
        show_status("")
        if pending:
            with phase("judge"):
                finished = self._unmasked(self._finish(list(pending), pending))
            groups |= finished
            scores |= self._submit(finished)
        if scores:
            with phase("teacher_wait"):
                groups |= {i: self._with_scores(groups[i], future.result()) for i, future in scores.items()}
        return RankRollouts(groups, tuple(finish_seconds), finish_seconds[-1] if finish_seconds else 0.0)

    def _finish(self, positions: Sequence[int], pending: dict[int, PendingGroup]) -> dict[int, Group]:
        """The groups at these positions, which are taken out of `pending`. Waits for a judge."""
        return {i: pending.pop(i).finish(self.reward, self.objective.routed_by) for i in positions}

    def _unmasked(self, groups: dict[int, Group]) -> dict[int, Group]:
        """The groups; where the objective needs no reward, a response that could not be graded counts all the same."""
        if self.objective.needs_reward:
            return groups
        rewards = {i: tuple(0.0 if r is None else r for r in group.rewards) for i, group in groups.items()}
        return {i: replace(group, rewards=rewards[i]) for i, group in groups.items()}

    def _submit(self, groups: Mapping[int, Group]) -> dict[int, Future[Scores]]:
        """Ask the remote teacher for what it has to score of these groups."""
        if self.teacher is None:
            return {}
        scorable = {position: group for position, group in groups.items() if self.teacher.scores(group.prompt)}
        to_score = {position: self._rollouts_to_score(group) for position, group in scorable.items()}
        return {position: self._ask(rollouts) for position, rollouts in to_score.items() if rollouts}

    def _ask(self, rollouts: Sequence[Rollout]) -> Future[Scores]:
        assert self.teacher is not None
        if self.busy is None:
            return self.teacher.submit(rollouts)
        self.busy.begin()
        try:
            asked = self.teacher.submit(rollouts)
        except BaseException:
            self.busy.end()
            raise
        asked.add_done_callback(lambda _: self.busy and self.busy.end())
        return asked

    def _stream(self, requests: Sequence[SamplingRequest], phase: PhaseTimer) -> Iterator[tuple[int, list[Rollout]]]:
        """(position in the step, responses) of each prompt as it finishes. Waiting counts as phase `rollout`."""
        for request in requests:
            positions: dict[str, deque[int]] = defaultdict(deque)  # a small data set may repeat a prompt within a step
            for offset, prompt in enumerate(request.prompts):
                positions[prompt.id].append(request.first + offset)
            responses = self.config.responses_per_prompt
            stream = self.sampler.stream(request.prompts, self.config, responses=responses, seed=request.seed)
            while not self.stop.is_set():
                with phase("rollout"):
                    rollouts = next(stream, None)
                if rollouts is None:
                    break
                assert len(rollouts) == responses, "a group is complete or does not come"
                yield positions[rollouts[0].prompt.id].popleft(), rollouts

    def _rollouts_to_score(self, group: Group) -> list[Rollout]:
        needed = self.objective.needs_teacher_logprobs(group)
        return [rollout for rollout, needs_score in zip(group.rollouts, needed, strict=True) if needs_score]

    def _with_scores(self, group: Group, scores: Scores) -> Group:
        """The group with teacher scores; an empty `logp_teacher` marks a response that the teacher failed to score."""
        remaining, needed = iter(scores), self.objective.needs_teacher_logprobs(group)
        rollouts = [
            replace(rollout, logp_teacher=next(remaining) or ()) if needs_score else rollout
            for rollout, needs_score in zip(group.rollouts, needed, strict=True)
        ]
        return replace(group, rollouts=tuple(rollouts))
