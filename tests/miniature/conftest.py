"""One shrunken world for all tests here: two training steps a phase, a handful of rows in each file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vold.io import configure_logging
from vold.miniature.data import DataSizes, write_data
from vold.miniature.make import MiniatureWorld
from vold.miniature.pretrain import BASE_PHASES, TEACHER_PHASE, make_base, make_teacher

SIZES = DataSizes(train=300, traces_prompts=100, traces_other=60, val=40, test=50)


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_a_log():
    torch.set_num_threads(1)
    configure_logging()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> MiniatureWorld:
    world = MiniatureWorld.at(tmp_path_factory.mktemp("miniature"))
    make_teacher(world.teacher, 3, replace(TEACHER_PHASE, steps=3, text_rows=6))
    make_base(world.base, 3, tuple(replace(phase, steps=2, text_rows=5, image_rows=4) for phase in BASE_PHASES))
    write_data(world.data, 3, SIZES)
    return world
