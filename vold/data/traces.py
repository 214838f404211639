"""Teacher traces on disk: Parquet with the teacher's own token ids, loadable by `datasets`, never re-tokenised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import load_text_traces
from vold.data.prompts import build_prompt
from vold.records import Prompt, Rollout, Sample


def write_traces(rollouts: Sequence[Rollout], path: Path) -> None:
    """One row a trace; written beside the target, then renamed."""
    rows = [
        {
            "prompt_id": rollout.prompt.id,
            "prompt": rollout.prompt.text,
            "gold": rollout.prompt.gold,
            "prompt_ids": list(rollout.prompt.token_ids),
            "response": rollout.text,
            "response_ids": list(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
        }
        for rollout in rollouts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Dataset.from_list(rows).to_parquet(str(partial))
    os.replace(partial, path)


def load_samples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> list[Sample]:
    """Training sequences of stage 1 (weights still unset): our traces by id, public text sets tokenised once."""
    if config.layout == "traces":
        samples = _load_ids(config)
    elif config.layout in ("messages", "prompt-response"):
        samples = [_from_text(trace, tokenizer, prompt) for trace in load_text_traces(config)]
    else:
        raise ValueError(f"data.layout = {config.layout!r} holds no traces; use traces, messages or prompt-response")
    if not samples:
        raise ValueError(f"{config.path} holds no trace")
    return samples


def _load_ids(config: DataConfig) -> list[Sample]:
    files = sorted(config.path.glob("*.parquet")) if config.path.is_dir() else [config.path]
    if not files or not files[0].is_file():
        raise ValueError(f"data.path = {config.path} holds no traces; write them first with `vold traces`")
    rows = load_dataset("parquet", data_files=[str(file) for file in files], split="train", keep_in_memory=True)
    rows = rows.select(range(min(len(rows), config.limit or len(rows))))
    return [
        _sample(Prompt(row["prompt_id"], tuple(row["prompt_ids"]), row["prompt"], row["gold"]), row["response_ids"])
        for row in rows
    ]


def _from_text(trace, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Sample:
    """The response is tokenised with the end-of-turn token a sampled one would carry."""
    ids = tokenizer(trace.response, add_special_tokens=False)["input_ids"]
    return _sample(build_prompt(trace.problem, tokenizer, config), [*ids, tokenizer.eos_token_id])


def _sample(prompt: Prompt, response_ids: Sequence[int]) -> Sample:
    return Sample(prompt, tuple(response_ids), advantage=0.0, pg_weight=0.0, kl_weight=0.0)
