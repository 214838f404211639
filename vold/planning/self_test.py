"""Divergence of the student from itself as a teacher: exactly zero, or trainer and teacher compute differently."""

from __future__ import annotations

from pathlib import Path

import torch

from vold.data.packing import pack
from vold.models.student import load_chunks
from vold.models.tokenizer import check_checkpoint
from vold.parallel.launch import initialise, shutdown
from vold.teacher import Teacher
from vold.trainer.pipeline import HeadOutput, head_output, run_pipeline
from vold.types import MicroBatch, Prompt, Sample
from vold_kernels import linear_kl

PROMPT_TOKENS, RESPONSE_TOKENS, SEQUENCES = 5, 12, 2


def self_divergence(checkpoint: Path, dtype_name: str, seed: int) -> tuple[int, float]:
    """(tokens, largest KL(student || teacher) of a token in nats) of a tiny batch, in this process: the checkpoint is
    loaded once as the trainer loads it and once as a teacher."""
    layout, dtype = initialise(seed=seed), getattr(torch, dtype_name)
    try:
        vocab_size = check_checkpoint(checkpoint)
        teacher = Teacher(checkpoint, layout, dtype=dtype, vocab_size=vocab_size, full_distributions=True)
        student = load_chunks(checkpoint, layout, dtype)
        batch = teacher.score(pack(_samples(vocab_size), max_tokens=SEQUENCES * (PROMPT_TOKENS + RESPONSE_TOKENS)))

        def compare(micro: MicroBatch, hidden_TD: torch.Tensor) -> HeadOutput[torch.Tensor]:
            student_rows = (hidden_TD[micro.source_N], student[-1].head_weight())
            teacher_rows = (micro.hidden_teacher_nE, micro.head_teacher_UE)
            terms = linear_kl(*student_rows, *teacher_rows, weight_N=micro.kl_weight_N, vocab_size=vocab_size)
            return head_output(hidden_TD, terms.kl_N)

        with torch.no_grad():
            kl_N = torch.cat(run_pipeline(student, batch.micro_batches, layout, compare, forward_only=True))
        return len(kl_N), float(kl_N.abs().max())
    finally:
        shutdown()


def _samples(vocab_size: int) -> list[Sample]:
    """Sequences of arbitrary token ids."""
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    ids = torch.arange(SEQUENCES * length).mul(7919).remainder(vocab_size).view(SEQUENCES, -1).numpy()
    return [
        Sample(
            Prompt(str(number), row[:PROMPT_TOKENS], ""),
            row[PROMPT_TOKENS:],
            0.0,
            pg_weight=0.0,
            kl_weight=1.0,
        )
        for number, row in enumerate(ids)
    ]
