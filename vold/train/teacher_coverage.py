"""Samples that the teacher did not score: their weights, and metrics of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vold.types import Prompt, Sample


def mask_unscored(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with weights of 0 where the teacher failed. Such a response stays in its group's baseline and in the
    normaliser, and has no gradient."""
    return [sample.without_weights() if sample.kl_weight and sample.teacher_failed else sample for sample in samples]


def teacher_metrics(samples: Sequence[Sample], prompt_length: Callable[[Prompt], int]) -> dict[str, float]:
    """Metrics of samples whose weights are assigned and not yet masked.

    teacher_saved   share of their tokens, prompts included, that no teacher reads because the KL weight is 0
    teacher_failed  responses that the teacher failed to score
    prompt_length: tokens of a prompt, those of its images included.
    """
    lengths = [prompt_length(sample.prompt) + len(sample.response_ids) for sample in samples]
    read = sum(tokens for tokens, sample in zip(lengths, samples, strict=True) if sample.kl_weight)
    failed = sum(sample.kl_weight != 0.0 and sample.teacher_failed for sample in samples)
    return {"teacher_saved": 1.0 - read / max(sum(lengths), 1), "teacher_failed": float(failed)}


def image_metrics(weighted: Sequence[Sample], scorable: Sequence[Sample]) -> dict[str, float]:
    """`teacher_skipped_images`: responses that lost their KL term (from `weighted` to `scorable`) because no teacher
    takes their images."""
    skipped = sum(a.kl_weight != 0.0 and b.kl_weight == 0.0 for a, b in zip(weighted, scorable, strict=True))
    return {"teacher_skipped_images": float(skipped)}
