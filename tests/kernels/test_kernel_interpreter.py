"""The Triton kernels without a GPU: the tests beside this file again, in a process that interprets them.

TRITON_INTERPRET has to be set before the first `import triton`, hence the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import DEVICE, INTERPRETED

from benchmarks.gpu_day.part import can_interpret

HERE = Path(__file__).parent
NAMES = [
    "test_linear_logprob",
    "test_linear_policy_loss",
    "test_linear_kl",
    "test_kernel_parallel",
    "test_layer_kernels",
]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels are being tested directly already")
@pytest.mark.skipif(not can_interpret(), reason="Triton 3.6 interprets with numpy < 2.4 alone")
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
