"""Two data-parallel ranks over gloo, started by torchrun."""

from pathlib import Path

import torch
from data_parallel import GROUPS
from steps import batch_of, gradients, make_groups, make_teacher, make_trainer, weigh


def test_two_ranks_give_one_ranks_gradient(tiny_student_dir, tiny_teacher_dir, layout, torchrun, tmp_path):
    trainer, teacher = make_trainer(tiny_student_dir, layout), make_teacher(tiny_teacher_dir, layout)
    expected = gradients(trainer, teacher.score(batch_of(weigh("vold", make_groups(GROUPS)))))
    torch.save(expected, tmp_path / "expected.pt")
    worker = Path(__file__).with_name("data_parallel.py")
    run = torchrun(2, worker, tiny_student_dir, tiny_teacher_dir, tmp_path / "expected.pt")
    assert run.returncode == 0 and run.stdout.count("ok") == 2, run.stdout + run.stderr
