"""The student as its own teacher: whatever distillation would pull it towards must be itself."""

from __future__ import annotations

import torch

from vold.config.schema import RlConfig, SftConfig
from vold.data.packing import pack
from vold.models.tokenizer import load_tokenizer
from vold.models.weights import load_chunks
from vold.parallel.launch import initialise, shutdown
from vold.teacher import Teacher
from vold.trainer.pipeline import HeadOutput, head_output, run_pipeline
from vold.types import MicroBatch, Prompt, Sample
from vold_kernels import linear_kl

PROMPT, RESPONSE, SEQUENCES = 5, 12, 2  # tokens, tokens, sequences


def divergence_from_itself(config: SftConfig | RlConfig) -> tuple[int, float]:
    """(tokens, the largest KL(S‖T) of one, nats), in this process: the student is loaded twice, once as the trainer
    does and once as a teacher, and reads a tiny batch both ways."""
    layout, dtype = initialise(seed=config.seed), getattr(torch, config.dtype)
    try:
        vocab_size = len(load_tokenizer(config.student))
        teacher = Teacher(config.student, layout, dtype=dtype, vocab_size=vocab_size, full_distributions=True)
        student = load_chunks(config.student, layout, dtype)
        batch = teacher.score(pack(_samples(vocab_size), max_tokens=SEQUENCES * (PROMPT + RESPONSE)))

        def compare(micro: MicroBatch, hidden_TD: torch.Tensor) -> HeadOutput[torch.Tensor]:
            rows = (hidden_TD[micro.source_N], student[-1].head_weight())
            others = (micro.hidden_teacher_nE, micro.head_teacher_UE)
            found = linear_kl(*rows, *others, weight_N=micro.kl_weight_N, vocab_size=vocab_size)
            return head_output(hidden_TD, found.kl_N)

        with torch.no_grad():
            kl_N = torch.cat(run_pipeline(student, batch.micro_batches, layout, compare, forward_only=True))
        return len(kl_N), float(kl_N.abs().max())
    finally:
        shutdown()


def _samples(vocab_size: int) -> list[Sample]:
    """Any ids will do."""
    ids = torch.arange(SEQUENCES * (PROMPT + RESPONSE)).mul(7919).remainder(vocab_size).view(SEQUENCES, -1).tolist()
    return [
        Sample(Prompt(str(place), tuple(row[:PROMPT]), ""), tuple(row[PROMPT:]), 0.0, pg_weight=0.0, kl_weight=1.0)
        for place, row in enumerate(ids)
    ]
