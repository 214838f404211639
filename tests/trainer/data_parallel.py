"""A torchrun worker: two ranks share a batch of unequal lengths; their reduced gradient equals one rank's own."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from steps import batch_of, gradients, make_groups, make_teacher, make_trainer, relative, weigh

from vold.parallel.launch import initialise, shutdown

GROUPS = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def main(student: Path, teacher: Path, expected: Path) -> None:
    layout = initialise(1, 1, seed=0)
    assert layout.dp == 2
    trainer, scorer = make_trainer(student, layout), make_teacher(teacher, layout)
    groups, wanted = make_groups(GROUPS), torch.load(expected, weights_only=True)

    def total(value: float) -> float:
        both = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(both, group=layout.dp_group)
        return float(both)

    def most(count: int) -> int:
        both = torch.tensor(count)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=layout.dp_group)
        return int(both)

    shares = {
        "every other group": groups[layout.dp_rank :: 2],
        "a rank whose group is all solved": groups[:3] if layout.dp_rank == 0 else groups[3:],
    }
    for name, share in shares.items():
        samples = weigh("vold", share, sum_over_ranks=total)
        batch = scorer.score(batch_of(samples, max_tokens=40, max_over_ranks=most))
        error = relative(gradients(trainer, batch), wanted)
        assert error < 1e-5, f"{name}: {error}"
    metrics = trainer.step(batch).metrics
    everybody = [None, None]
    dist.all_gather_object(everybody, metrics, group=layout.dp_group)
    assert everybody[0] == everybody[1], "every rank reports the same numbers"
    sys.stdout.write("ok\n")  # one write, so that two ranks' lines do not run together
    shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
