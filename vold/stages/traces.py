"""`vold traces`: stage 0, the teacher answers prompts; its token ids are kept, its answers are not checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vold.config.schema import TracesConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import write_traces
from vold.models.tokenizer import load_tokenizer
from vold.records import Prompt, Rollout
from vold.rollout import open_sampler
from vold.stages.job import open_job


def run(config: TracesConfig, *, resume: bool = False) -> None:
    """Writes run_dir/traces/shard-*.parquet and a data card; finished shards are kept on --resume."""
    job = open_job(config, "traces", total=0, resume=resume)
    tokenizer = load_tokenizer(config.teacher)
    asked = build_prompts(load_problems(config.data), tokenizer, config.prompt, config.data.on_error)
    prompts = _unique(asked)
    size = config.prompts_per_shard
    shards = [(number, prompts[first : first + size]) for number, first in enumerate(range(0, len(prompts), size))]
    job.log.rewind(0)
    paths = {number: config.run_dir / "traces" / f"shard-{number:05d}.parquet" for number, _ in shards}
    missing = [(number, shard) for number, shard in job.share(shards) if not paths[number].exists()]
    counts = []
    if any(job.gather([bool(missing)])):  # an engine is opened by all ranks, or by none
        sampler = open_sampler(config, config.teacher, dtype=job.dtype, device=job.layout.device)
    for number, shard in missing:
        with job.log.phase("rollout"):
            rollouts = sampler.sample(shard, config.sampling, responses=1, seed=config.seed * 1_000_003 + number)
        kept = [rollout for rollout in rollouts if _keeps(rollout, config.max_tokens)]
        write_traces(kept, paths[number])
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        counts.append({"kept": len(kept), "sampled": len(shard)})
        job.log.write(number + 1, {"kept": len(kept), "sampled": len(shard), "response_tokens": tokens})
    counted = job.gather(counts)
    if job.is_writer:
        _write_card(config, len(prompts), len(asked) - len(prompts), counted)
    job.log.close()


def _unique(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of those that read the same."""
    first: dict[tuple, Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.token_ids, prompt.images), prompt)
    return list(first.values())


def _keeps(rollout: Rollout, max_tokens: int) -> bool:
    """Complete and short enough (the paper keeps traces under 8192 tokens)."""
    length = len(rollout.prompt.token_ids) + len(rollout.response_ids)
    return rollout.finish_reason == "stop" and length <= max_tokens


def _write_card(config: TracesConfig, prompts: int, duplicates: int, counts: list[dict]) -> None:
    card = {
        "teacher": str(config.teacher),
        "prompts": str(config.data.path),
        "prompt_count": prompts,
        "duplicates_removed": duplicates,
        "sampled_now": sum(count["sampled"] for count in counts),
        "kept_now": sum(count["kept"] for count in counts),
        "engine": config.engine,
        "sampling": config.sampling.model_dump(),
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "answers_checked": False,
    }
    path: Path = config.run_dir / "traces" / "card.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card, indent=1) + "\n")
