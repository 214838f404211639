"""Body of test_gpu_step.py: two training steps on this process's device, with what they gave written to a file.

    python device_steps.py CHECKPOINT DTYPE OUT

A program of its own, so that one that sees no GPU (CUDA_VISIBLE_DEVICES="") can be compared with one that does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_teacher, make_trainer
from vold.parallel.launch import initialise, shutdown

REWARDS = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def main(checkpoint: Path, dtype: torch.dtype, out: Path) -> None:
    """Writes grad.NAME, the first step's gradients; loss and grad_norm of two steps [2]; weight.NAME afterwards;
    teacher, its log-probs; state_bytes [1], what CUDA holds then (0 on a CPU)."""
    layout = initialise(1, 1, seed=0)
    trainer, teacher = make_trainer(checkpoint, layout, dtype=dtype), make_teacher(checkpoint, layout, dtype)
    samples = assign_token_weights("vold", make_groups(REWARDS))
    batch = teacher.score(batch_of(samples, max_tokens=40))
    results = {f"grad.{name}": value for name, value in gradients(trainer, batch).items()}
    metrics = [trainer.step(batch).metrics for _ in range(2)]
    results |= {name: torch.tensor([step[name] for step in metrics]) for name in ("loss", "grad_norm")}
    results |= {f"weight.{name}": tensor for name, tensor in trainer.weights()}
    scored = [micro.logp_teacher_N for micro in batch.micro_batches if micro.logp_teacher_N is not None]
    results["teacher"] = torch.cat(scored)
    held = torch.cuda.memory_allocated() if layout.device.type == "cuda" else 0
    results["state_bytes"] = torch.tensor([held])
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in results.items()}, out)
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3]))
