"""Rows of samples.jsonl: a few of a step's responses with their verdicts, rewards and log-probs."""

from __future__ import annotations

from collections.abc import Sequence

from vold.evaluation.evaluator import response_row
from vold.types import Group, Sample, StepReport


def logged_sample_ids(groups: Sequence[Group], limit: int) -> list[int]:
    """Indices of the samples to log: up to `limit`, spread evenly over the graded responses of all groups."""
    graded = sum(reward is not None for group in groups for reward in group.rewards)
    stride = max(graded // max(limit, 1), 1)
    return list(range(0, graded, stride))[:limit]


def sample_rows(
    groups: Sequence[Group], samples: Sequence[Sample], report: StepReport, sample_ids: Sequence[int], tokenizer
) -> list[dict]:
    """Rows of the samples with these indices. A sample that was trained on also has its `tokens`, with `logp` and
    `logp_teacher` of each (nats, to 3 decimals)."""
    graded = [
        (rollout, verdict, reward, group.values[index] if group.values else {})
        for group in groups
        for index, (rollout, verdict, reward) in enumerate(
            zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        )
        if reward is not None
    ]
    rows = []
    for index in sample_ids:
        rollout, verdict, reward, values = graded[index]
        row = response_row(rollout, verdict)
        row |= {"reward": reward, "advantage": samples[index].advantage, "mean_kl": report.mean_kl.get(index)}
        if values.keys() - {"accuracy", "format"}:
            row["values"] = dict(values)
        if logps := report.tokens.get(index):
            row["tokens"] = token_texts(tokenizer, rollout.response_ids.tolist())
            row |= {name: [round(logp, 3) for logp in values] for name, values in logps.items()}
        rows.append(row)
    return rows


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id, special tokens included. A character that several ids spell belongs to the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for token in map(int, ids):
        pending.append(token)
        text = tokenizer.decode(pending)
        incomplete = text.endswith("\ufffd") and len(pending) < 4 and len(texts) + 1 < len(ids)  # UTF-8: 4 bytes
        texts.append("" if incomplete else text)
        pending = pending if incomplete else []
    return texts
