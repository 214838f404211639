"""Shared fixtures: one CPU thread, no network, and the miniature's two untrained checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent / "models"))  # `import tiny` from any test
sys.path.insert(0, str(Path(__file__).parent / "trainer"))  # `import steps`

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def layout():
    """tp = pp = dp = 1 in this process."""
    from vold.parallel.launch import initialise, shutdown

    yield initialise(1, 1, seed=0)
    shutdown()


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory) -> Path:
    """An untrained Qwen3 with the miniature's tokenizer and chat template."""
    from vold.miniature import models

    return _saved(models, models.teacher_config(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tiny_student_dir(tmp_path_factory) -> Path:
    """An untrained Qwen2.5-VL with the miniature's tokenizer, chat template and image processor."""
    from vold.miniature import models

    return _saved(models, models.base_config(), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(processes, *arguments): a script or `-m module` in a clean launch environment, output captured."""

    def run(processes: int, *arguments: str) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in ranks} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run


def _saved(models, config, directory: Path) -> Path:
    models.save_checkpoint(models.new_model(config, seed=0), directory)
    return directory
