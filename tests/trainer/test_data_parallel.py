"""Two data-parallel ranks over gloo, started by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from data_parallel import GROUPS
from steps import batch_of, gradients, make_groups, make_teacher, make_trainer, weigh


def test_two_ranks_give_one_ranks_gradient(tiny_student_dir, tiny_teacher_dir, layout, tmp_path):
    trainer, teacher = make_trainer(tiny_student_dir, layout), make_teacher(tiny_teacher_dir, layout)
    expected = gradients(trainer, teacher.score(batch_of(weigh("vold", make_groups(GROUPS)))))
    torch.save(expected, tmp_path / "expected.pt")
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [
        str(here / "data_parallel.py"),
        str(tiny_student_dir),
        str(tiny_teacher_dir),
        str(tmp_path / "expected.pt"),
    ]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ranks} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.count("ok") == 2, run.stdout + run.stderr
