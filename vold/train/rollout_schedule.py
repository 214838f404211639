"""Where a step's graded groups come from: strictly after the update before, or drawn while the step before trains.

    lag 0    draw s ─ train s ─ hand over ─ draw s+1 ─ train s+1 ─ hand over
    lag 1    train s   ─┬─ hand over ─┬─ train s+1 ─┬─
             draw s+1  ─┘             └─ draw s+2  ─┘

With lag 1 a thread drives sampler and grader, and takes no part in collectives. Between `settle` and the next call of
`next` nothing is drawn: then weights are handed over and evaluations made. A resumed run draws anew what was on its way
when it was saved: its first step is strict, and says so (`staleness_max` 0).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from vold.config.schema import RlConfig
from vold.data.order import PromptOrder
from vold.run.job import Job
from vold.train.groups import (
    PromptBatch,
    RankRollouts,
    RolloutWorker,
    SamplingRequest,
    StepGroups,
    group_metrics,
    pass_rate,
    rollout_calls,
)
from vold.types import Group, Prompt


class Rollouts:
    """Groups step by step; a context manager. `done`: updates of the weights that the sampler was given first."""

    def __init__(self, config: RlConfig, job: Job, prompts: Sequence[Prompt], worker: RolloutWorker, *, done: int = 0):
        self._config, self._job, self._prompts, self._worker, self._done = config, job, prompts, worker, done
        self._order = PromptOrder(len(prompts), config.seed if config.data.shuffle else None, config.rollout.curriculum)
        self._earlier: dict[int, tuple[tuple[float, ...], ...]] = {}  # rewards of each row, step by step
        self._replay()
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[list[int], Future[RankRollouts]] | None = (
            None  # the next step's rows, and what is drawn for them
        )
        if config.rollout.lag:
            self._thread = ThreadPoolExecutor(1, "rollout", initializer=partial(_enter, job.layout.device))
            self._lane = job.log.phase.beside("rollout")

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what is being drawn after the groups under way, and the worker's teacher."""
        self._worker.stop.set()
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        if self._worker.teacher:
            self._worker.teacher.close()

    def next(self, step: int) -> StepGroups:
        """The groups of 0-based `step`; those of the step after it are on their way from here on, where lag > 0."""
        rows, first = self._first_portion(step)
        portions = [first]
        groups = self._groups(portions, rows)
        while further := self._missing(len(rows), self._informative(groups)):
            portion = self._portion(step, len(portions), len(rows), further)
            rows += further
            portions.append(self._gather(self._draw(portion)))
            groups = self._groups(portions, rows)
        kept = dict(islice(self._informative(groups).items(), self._config.prompts_per_step))
        learnt_from = list(kept.values())
        metrics = _counts(rows, groups, kept) | self._staleness(step, learnt_from) | _speed(portions, groups)
        drawn = StepGroups(learnt_from, group_metrics(list(groups.values())) | metrics)
        judged = self._worker.judge.compare(step, drawn)
        asked = self._asked(rows, groups | dict(zip(kept, judged.groups, strict=True)))
        self._learn(rows, asked)
        self._job.log.asked(step + 1, asked)
        if self._thread and step + 1 < self._config.steps:
            self._start(step + 1)
        return judged

    def wait_for_rollouts(self) -> None:
        """Wait until nothing is being drawn: sampler and grader are the caller's until `next`."""
        if self._ahead:
            with self._job.log.phase("rollout_wait"):
                self._ahead[1].result()

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _first_portion(self, step: int) -> tuple[list[int], list[RankRollouts]]:
        if self._ahead is None:
            rows = self._order.take(self._config.prompts_per_step)
            return rows, self._gather(self._draw(self._portion(step, 0, 0, rows)))
        self.wait_for_rollouts()
        (rows, future), self._ahead = self._ahead, None
        return rows, self._gather(future.result())

    def _start(self, step: int) -> None:
        rows = self._order.take(self._config.prompts_per_step)
        calls = self._calls(self._portion(step, 0, 0, rows))
        self._ahead = rows, self._thread.submit(self._worker.draw, calls, self._lane, self._show)

    def _draw(self, portion: PromptBatch) -> RankRollouts:
        return self._worker.draw(self._calls(portion), self._job.log.phase, self._show)

    def _portion(self, step: int, number: int, first: int, rows: Sequence[int]) -> PromptBatch:
        return PromptBatch(step, number, first, [self._prompts[row] for row in rows])

    def _calls(self, portion: PromptBatch) -> list[SamplingRequest]:
        return self._job.share(rollout_calls(portion, self._config.rollout, self._job.world, seed=self._config.seed))

    def _gather(self, mine: RankRollouts) -> list[RankRollouts]:
        with self._job.log.phase("gather"):
            return self._job.gather([mine])

    def _show(self, note: str) -> None:
        self._job.log.live(f"rollout: {note}" if note else "")

    # -- which prompts ---------------------------------------------------------------------------------------------

    def _groups(self, portions: Sequence[Sequence[RankRollouts]], rows: Sequence[int]) -> dict[int, Group]:
        """By place, with what is known of their prompts."""
        groups = _in_order(portions)
        return {place: replace(group, earlier=self._earlier.get(rows[place], ())) for place, group in groups.items()}

    def _informative(self, groups: dict[int, Group]) -> dict[int, Group]:
        """Those the step may learn from: all of them, where no others would be asked in their place."""
        if self._config.rollout.dynamic_sampling is None:
            return groups
        return {place: group for place, group in groups.items() if self._worker.objective.has_gradient(group)}

    def _missing(self, asked: int, informative: Sized) -> list[int]:
        """Rows to ask still: as many as should bring the missing groups at this step's rate so far, within the budget.
        All ranks know the same groups, and so decide alike."""
        dynamic, wanted = self._config.rollout.dynamic_sampling, self._config.prompts_per_step
        if dynamic is None or len(informative) >= wanted:
            return []
        budget = int(dynamic.max_prompts_factor * wanted)
        needed = math.ceil((wanted - len(informative)) * asked / max(len(informative), 1))
        return self._order.take(min(needed, budget - asked))

    def _replay(self) -> None:
        """Bring back what was known after the `done` steps whose prompts are on record."""
        on_record: dict[int, list[dict]] = {}
        for found in self._job.from_writer(self._job.log.read_prompt_log()):
            on_record.setdefault(found["step"], []).append(found)
        for step in range(1, self._done + 1):
            asked = on_record.get(step, [{"pass_rate": None}] * self._config.prompts_per_step)
            self._learn(self._order.take(len(asked)), asked)

    def _asked(self, rows: Sequence[int], groups: dict[int, Group]) -> list[dict]:
        """What goes on record of each prompt of a step. A group that was lost has no rewards."""
        found = [groups.get(place) for place in range(len(rows))]
        rewards = [[reward for reward in group.rewards if reward is not None] if group else [] for group in found]
        return [
            {"prompt_id": self._prompts[row].id, "pass_rate": pass_rate(group), "rewards": own}
            for row, group, own in zip(rows, found, rewards, strict=True)
        ]

    def _learn(self, rows: Sequence[int], asked: Sequence[dict]) -> None:
        self._order.update_pass_rates(rows, [found["pass_rate"] for found in asked])
        for row, found in zip(rows, asked, strict=True):
            if rewards := found.get("rewards"):
                self._earlier[row] = (*self._earlier.get(row, ()), tuple(rewards))

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _staleness(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Updates that the weights had seen since those that drew the responses; from the version each came with. The
        first hand-over, version 1, was of the weights after `done` updates, and there is one after every update."""
        ages = [step - (self._done + rollout.version - 1) for group in groups for rollout in group.rollouts]
        return {"staleness_mean": statistics.fmean(ages), "staleness_max": float(max(ages))} if ages else {}


def _enter(device: torch.device) -> None:
    """A new thread launches kernels on GPU 0 until told otherwise."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _in_order(portions: Sequence[Sequence[RankRollouts]]) -> dict[int, Group]:
    """All ranks' groups by place, ascending."""
    found = {place: group for ranks in portions for drawn in ranks for place, group in drawn.groups.items()}
    return dict(sorted(found.items()))


def _counts(rows: Sequence[int], groups: dict[int, Group], kept: Sized) -> dict[str, float]:
    return {
        "prompts_sampled": float(len(rows)),
        "groups_lost": float(len(rows) - len(groups)),
        "groups_dropped": float(len(groups) - len(kept)),
    }


def _speed(portions: Sequence[Sequence[RankRollouts]], groups: dict[int, Group]) -> dict[str, float]:
    """Of the slowest rank, portions after each other. The tail is the time from the median group to the last."""
    seconds = sum(max(drawn.seconds for drawn in ranks) for ranks in portions)
    finished = [[second for drawn in ranks for second in drawn.finished] for ranks in portions]
    tail = sum(max(found) - statistics.median(found) for found in finished if found)
    tokens = sum(len(rollout.response_ids) for group in groups.values() for rollout in group.rollouts)
    return {"rollout_tail_seconds": tail, "rollout_tokens_per_second": tokens / max(seconds, 1e-9)}
