"""Schedules rollouts: a step's groups are sampled strictly after the update before, or while steps before train.

    lag 0    sample s ─ train s ─ sync ─ sample s+1 ─ train s+1 ─ sync
    lag 1    train s    ─┬─ sync ─┬─ train s+1  ─┬─
             sample s+1 ─┘        └─ sample s+2 ─┘
    lag 2    train s ─ sync ─ train s+1 ─ sync ─ train s+2 ─ sync
             sample s+1 ────┘ sample s+3 ─────────────────┘
             sample s+2 ─────────────────┘ sample s+4 ──────

With lag a thread for each step ahead runs sampler and grader; threads take no part in collectives. At lag 1 nothing is
sampled between `wait_for_rollouts` and the next call of `next`: weights are synced and evaluations run in between. From
2 on sampling goes on meanwhile, a step's batch is scored by a remote teacher while the next one is sampled, and the
order in time decides which weights a token is from. No token is older than `lag` updates: a step's sampling begins when
the step that lies `lag` before it begins to train. A resumed run samples again the groups that were under way when it
was saved, of the same prompts, so its first step has no lag (`staleness_max` 0).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from vold.data.order import PromptOrder
from vold.objectives.advantages import smoothed
from vold.run.job import Job
from vold.train.group_metrics import (
    group_metrics,
    is_mixed,
    mask_non_finite,
    pass_rate,
    speed_metrics,
    staleness_metrics,
)
from vold.train.reward_function import StepGroups
from vold.train.reward_terms import term_metrics
from vold.train.rollout_worker import PromptBatch, RankRollouts, RolloutWorker, SamplingRequest, sampling_requests
from vold.types import Group, Prompt


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run. completed: steps done before this process started, whose weights the sampler got first.
    restored: the schedule's `state` after those; without it the state is rebuilt from prompts.jsonl."""

    steps: int
    prompts_per_step: int
    seed: int
    shuffle: bool
    completed: int = 0
    restored: dict | None = None


class RolloutSchedule:
    """Graded groups step by step; a context manager. Rows are indices into `prompts`, positions are within a step."""

    def __init__(self, job: Job, prompts: Sequence[Prompt], worker: RolloutWorker, plan: StepPlan):
        self._job, self._prompts, self._worker, self._plan = job, prompts, worker, plan
        self._config = worker.config
        self._order = PromptOrder(len(prompts), plan.seed if plan.shuffle else None, self._config.curriculum)
        self._earlier: dict[int, tuple[tuple[float, ...], ...]] = {}  # rewards of each row, step by step
        self.state: dict = {}
        self._ahead: deque[tuple[list[int], Future[RankRollouts]]] = deque()  # the next steps' rows and rollouts
        self._rows_again: deque[list[int]] = deque()  # of steps that were under way when the run was saved
        self._restore(plan.restored)
        self._threads: ThreadPoolExecutor | None = None
        if lag := self._config.lag:
            self._threads = ThreadPoolExecutor(lag, "rollout", initializer=partial(_set_device, job.layout.device))
            names = ["rollout"] if lag == 1 else [f"rollout {number}" for number in range(1, lag + 1)]
            self._thread_phases = [job.log.phase.thread(name) for name in names]

    def __enter__(self) -> RolloutSchedule:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling after the groups under way, and close the worker's teacher."""
        self._worker.stop.set()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        if self._worker.teacher:
            self._worker.teacher.close()

    def next(self, step: int) -> StepGroups:
        """The groups of 0-based `step`. With lag, sampling for the steps after it starts before this returns."""
        rows, first_batch = self._first_batch(step)
        batches = [first_batch]
        groups = self._groups_by_position(batches, rows)
        while more_rows := self._rows_to_add(len(rows), self._with_gradient(groups)):
            batch = self._prompt_batch(step, len(batches), len(rows), more_rows)
            rows += more_rows
            batches.append(self._gather(self._sample(batch)))
            groups = self._groups_by_position(batches, rows)
        kept = dict(islice(self._with_gradient(groups).items(), self._plan.prompts_per_step))
        metrics = group_metrics(list(groups.values())) | _prompt_counts(rows, groups, kept)
        metrics |= staleness_metrics(list(kept.values()), step - self._plan.completed)
        metrics |= speed_metrics(batches, list(groups.values()))
        metrics |= term_metrics(list(groups.values()))
        rewarded = self._worker.reward_function.assign_rewards(step, StepGroups(list(kept.values()), metrics))
        rewarded = mask_non_finite(rewarded)
        prompt_rows = self._prompt_rows(rows, groups | dict(zip(kept, rewarded.groups, strict=True)))
        self._add_to_history(rows, prompt_rows)
        self._job.log.log_prompts(step + 1, prompt_rows)
        last = min(step + self._config.lag, self._plan.steps - 1)
        for later in range(step + 1 + len(self._ahead), last + 1):
            self._sample_ahead(later)
        self.state = self._state()
        return rewarded

    def wait_for_rollouts(self) -> None:
        """At lag 1, wait until nothing is being sampled: sampler and grader are the caller's until `next`."""
        if self._config.lag == 1:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        if self._ahead:
            with self._job.log.phase("rollout_wait"):
                self._ahead[0][1].result()

    # -- sampling --------------------------------------------------------------------------------------------------

    def _first_batch(self, step: int) -> tuple[list[int], list[RankRollouts]]:
        """Rows and rollouts of the step's first prompt batch, on every rank."""
        if not self._ahead:
            rows = self._take_rows()
            return rows, self._gather(self._sample(self._prompt_batch(step, 0, 0, rows)))
        self._wait_for_next()
        rows, rollouts = self._ahead.popleft()
        return rows, self._gather(rollouts.result())

    def _take_rows(self) -> list[int]:
        """Those of the next step whose rows are not taken yet."""
        return self._rows_again.popleft() if self._rows_again else self._order.take(self._plan.prompts_per_step)

    def _sample_ahead(self, step: int) -> None:
        rows = self._take_rows()
        requests = self._requests(self._prompt_batch(step, 0, 0, rows))
        assert self._threads is not None
        phase = self._thread_phases[step % self._config.lag]  # whose last step has been taken
        rollouts = self._threads.submit(self._worker.sample_groups, requests, phase, self._show_status)
        self._ahead.append((rows, rollouts))

    def _sample(self, batch: PromptBatch) -> RankRollouts:
        return self._worker.sample_groups(self._requests(batch), self._job.log.phase, self._show_status)

    def _prompt_batch(self, step: int, number: int, first: int, rows: Sequence[int]) -> PromptBatch:
        return PromptBatch(step, number, first, [self._prompts[row] for row in rows])

    def _requests(self, batch: PromptBatch) -> list[SamplingRequest]:
        return self._job.shard(sampling_requests(batch, self._config, self._job.world_size, seed=self._plan.seed))

    def _gather(self, rollouts: RankRollouts) -> list[RankRollouts]:
        """The rollouts of all ranks."""
        with self._job.log.phase("gather"):
            return self._job.gather([rollouts])

    def _show_status(self, status: str) -> None:
        self._job.log.show_status(f"rollout: {status}" if status else "")

    # -- which prompts ---------------------------------------------------------------------------------------------

    def _groups_by_position(self, batches: Sequence[Sequence[RankRollouts]], rows: Sequence[int]) -> dict[int, Group]:
        """All ranks' groups in the order of their prompts, with the prompts' earlier rewards."""
        groups = {position: group for ranks in batches for rank in ranks for position, group in rank.groups.items()}
        return {
            position: replace(groups[position], earlier=self._earlier.get(rows[position], ()))
            for position in sorted(groups)
        }

    def _with_gradient(self, groups: dict[int, Group]) -> dict[int, Group]:
        """The groups that the step may train on: all, unless dynamic sampling replaces some (DynamicSamplingConfig)."""
        dynamic = self._config.dynamic_sampling
        if dynamic is None:
            return groups
        keep = is_mixed if dynamic.keep == "mixed" else self._worker.objective.has_gradient
        return {i: group for i, group in groups.items() if keep(group)}

    def _rows_to_add(self, sampled: int, with_gradient: Sized) -> list[int]:
        """Rows to sample in addition: as many as yield the missing groups at this step's rate so far, within the
        budget. All ranks have the same groups and so decide alike."""
        dynamic, target = self._config.dynamic_sampling, self._plan.prompts_per_step
        if dynamic is None or len(with_gradient) >= target:
            return []
        budget = int(dynamic.max_prompts_factor * target)
        needed = math.ceil((target - len(with_gradient)) * sampled / max(len(with_gradient), 1))
        return self._order.take(min(needed, budget - sampled))

    def _prompt_rows(self, rows: Sequence[int], groups: dict[int, Group]) -> list[dict]:
        """Rows of prompts.jsonl, one for each prompt of a step. A group that was lost has no rewards."""
        return [
            {
                "prompt_id": self._prompts[row].id,
                "pass_rate": pass_rate(groups.get(position)),
                "rewards": _rewards(groups.get(position)),
            }
            for position, row in enumerate(rows)
        ]

    def _state(self) -> dict:
        """What the steps from here on depend on, in values of JSON: row numbers are the first of each pair. ahead: the
        rows of the next steps, which were taken before more was known of pass rates."""
        order = self._order.state()
        earlier = list(self._earlier.items()) if self._reads_earlier else []
        ahead = [*(rows for rows, _ in self._ahead), *self._rows_again]
        return {
            "prompts": len(self._prompts),
            "position": order["position"],
            "pass_rates": list(order["pass_rates"].items()),
            "earlier": earlier,
            **({"ahead": ahead} if ahead else {}),
        }

    @property
    def _reads_earlier(self) -> bool:
        return self._worker.objective.advantage is smoothed

    def _restore(self, state: dict | None) -> None:
        """Restore what the completed steps left. Raises ValueError where the data have changed since."""
        if state is None:
            self._restore_from_log()
            return
        if state["prompts"] != len(self._prompts):
            raise ValueError(
                f"--resume: the data held {state['prompts']} prompts and now hold {len(self._prompts)}: give the run "
                "its own data back, or start another run_dir"
            )
        self._order.restore(state)
        self._rows_again.extend(state.get("ahead", []))
        self._earlier = {row: tuple(map(tuple, steps)) for row, steps in state["earlier"]}
        self.state = state

    def _restore_from_log(self) -> None:
        """Restore pass rates and rewards of the completed steps' prompts from prompts.jsonl, for a checkpoint without a
        state. Raises ValueError where steps are missing that decide about the next."""
        logged: dict[int, list[dict]] = {}
        for prompt_row in self._job.broadcast(self._job.log.read_prompt_log()):
            logged.setdefault(prompt_row["step"], []).append(prompt_row)
        missing = [step for step in range(1, self._plan.completed + 1) if step not in logged]
        if missing and (self._config.curriculum or self._config.dynamic_sampling or self._reads_earlier):
            raise ValueError(
                f"--resume: prompts.jsonl has no rows of step {missing[0]} ({len(missing)} of {self._plan.completed} "
                "steps are missing), from which curriculum, dynamic sampling and smoothed advantages continue; restore "
                "it, or start another run_dir"
            )
        for step in range(1, self._plan.completed + 1):
            prompt_rows = logged.get(step, [{"pass_rate": None}] * self._plan.prompts_per_step)
            self._add_to_history(self._order.take(len(prompt_rows)), prompt_rows)

    def _add_to_history(self, rows: Sequence[int], prompt_rows: Sequence[dict]) -> None:
        self._order.update_pass_rates(rows, [prompt_row["pass_rate"] for prompt_row in prompt_rows])
        for row, prompt_row in zip(rows, prompt_rows, strict=True):
            if rewards := prompt_row.get("rewards"):
                self._earlier[row] = (*self._earlier.get(row, ()), tuple(rewards))


def _set_device(device: torch.device) -> None:
    """Set this thread's device: a new thread would launch kernels on GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _rewards(group: Group | None) -> list[float]:
    return [reward for reward in group.rewards if reward is not None] if group else []


def _prompt_counts(rows: Sequence[int], groups: dict[int, Group], kept: Sized) -> dict[str, float]:
    return {
        "prompts_sampled": float(len(rows)),
        "groups_lost": float(len(rows) - len(groups)),
        "groups_dropped": float(len(groups) - len(kept)),
    }
