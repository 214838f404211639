"""The trainer on a GPU: the same gradients as on a CPU, run after run the same, and weights through an NCCL group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import tiny
from vold.rollout.vllm import weight_stream

PROGRAM = Path(__file__).with_name("device_steps.py")
ROOT = PROGRAM.parents[2]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return tiny.save(tiny.FAMILIES["qwen3"](), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def steps(checkpoint, tmp_path_factory):
    """steps(device, dtype, number) -> the program's results; each (device, dtype, number) is run once."""
    results: dict[tuple, dict[str, torch.Tensor]] = {}

    def run(device: str, dtype: str, number: int = 0) -> dict[str, torch.Tensor]:
        key = (device, dtype, number)
        if key not in results:
            out = tmp_path_factory.mktemp("steps") / "out.safetensors"
            paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
            if device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            command = [sys.executable, str(PROGRAM), str(checkpoint), dtype, str(out)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            results[key] = load_file(out)
        return results[key]

    return run


def gradient_errors(found: dict, expected: dict) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of every gradient."""
    names = [name for name in expected if name.startswith("grad.")]
    assert names and set(names) == {name for name in found if name.startswith("grad.")}
    norms = {name: float(expected[name].double().norm()) for name in names}
    assert all(norms.values()), "nothing to compare with: a vacuous pass"
    return {name: float((found[name].double() - expected[name].double()).norm()) / norms[name] for name in names}


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 6e-2)])
def test_gradients_on_a_gpu_are_those_of_a_cpu(steps, dtype, tolerance):
    """Against fp32 on a CPU, which transformers' model is compared with elsewhere."""
    found, expected = steps("cuda", dtype), steps("cpu", "float32")
    errors = gradient_errors(found, expected)
    assert max(errors.values()) <= tolerance, sorted(errors.items(), key=lambda item: -item[1])[:5]
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance / 100)
    assert (found["teacher"] <= 0).all()
    torch.testing.assert_close(found["teacher"], expected["teacher"], rtol=0, atol=10 * tolerance)


@pytest.mark.gpu
@NEEDS_GPU
def test_bf16_on_a_gpu_errs_no_more_than_on_a_cpu(steps):
    """Twice what the same dtype costs on a CPU is allowed: another order of sums, no other arithmetic."""
    exact = steps("cpu", "float32")
    on_cpu, on_gpu = (gradient_errors(steps(device, "bfloat16"), exact) for device in ("cpu", "cuda"))
    assert sum(on_gpu.values()) <= 2 * sum(on_cpu.values())


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_weights(steps, dtype):
    """After two updates, bit for bit: each of these sequences is shorter than an attention kernel's block of keys, so
    that no gradient is summed in an order that varies."""
    first, second = steps("cuda", dtype), steps("cuda", dtype, 1)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.gpu
@NEEDS_GPU
def test_a_trainer_and_a_teacher_hold_their_state_and_no_more(steps, checkpoint):
    """Weights, fp32 gradients, masters and moments of the student, the teacher's weights; CUDA rounds each up."""
    weights = sum(tensor.numel() for name, tensor in steps("cuda", "bfloat16").items() if name.startswith("weight."))
    planned = weights * (2 + 4 + 12) + 2 * weights
    held = int(steps("cuda", "bfloat16")["state_bytes"])
    assert planned <= held <= 1.1 * planned + 64 * 2**20  # cuBLAS keeps a workspace


@pytest.mark.gpu
@NEEDS_GPU
def test_weights_pass_through_an_nccl_group_of_one():
    """The trainer's side of the stream, alone: one GPU cannot hold two members of an NCCL group."""
    device = torch.device("cuda", torch.cuda.current_device())
    weights = {"a": torch.randn(300, 70, device=device).bfloat16(), "b": torch.arange(7.0)}
    store = weight_stream.open_store("127.0.0.1", 1)
    weight_stream.send(store, 1, weights.items(), device)
    assert store.get("3") == b"" and store.get("1").startswith(b'["a", "bfloat16", [300, 70]]')


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("columns", [1, 2047, 4100, 9000])
def test_row_kernels_equal_plain_torch(columns, dtype):
    """The compiled kernels beside their torch twins on the same fp32 logits (bf16: rounded ones), tile by tile."""
    from vold_kernels import rows_torch, rows_triton
    from vold_kernels.softmax import SoftmaxStatistics, dlogits_storage, empty_statistics

    generator = torch.Generator("cuda").manual_seed(0)
    z_CU = (5 * torch.randn(33, columns, generator=generator, device="cuda")).to(dtype)
    target_C = torch.randint(columns, (33,), generator=generator, device="cuda")
    real_columns = torch.tensor(max(columns - 3, 1), device="cuda")
    folded = {}
    for module, logits in ((rows_triton, z_CU.clone()), (rows_torch, z_CU.float().clone())):
        folded_4C = empty_statistics(33, z_CU, torch.float32)
        for first in range(0, columns, 8192):
            module.fold_(folded_4C, logits[:, first : first + 8192], target_C, real_columns, first)
        folded[module] = folded_4C
    torch.testing.assert_close(folded[rows_triton], folded[rows_torch], rtol=2e-5, atol=2e-5)
    max_C, sum_C, gap_sum_C, target_logit_C = folded[rows_torch].unbind()
    log_sum_C = sum_C.log()
    statistics = SoftmaxStatistics(
        max_C.contiguous(), log_sum_C, target_logit_C - max_C - log_sum_C, log_sum_C - gap_sum_C / sum_C
    )
    d_logp_C, d_entropy_C = torch.randn(2, 33, generator=generator, device="cuda")
    for entropy_C in (None, d_entropy_C.contiguous()):
        expected_CU = z_CU.float().clone()
        rows_torch.dlogits_(expected_CU, expected_CU, target_C, real_columns, statistics, d_logp_C, entropy_C)
        logits_CU = z_CU.clone()
        dz_CU = dlogits_storage(logits_CU, torch.bfloat16) if columns % 2 == 0 or dtype == torch.bfloat16 else logits_CU
        rows_triton.dlogits_(dz_CU, logits_CU, target_C, real_columns, statistics, d_logp_C, entropy_C)
        tolerance = 2**-8 if dz_CU.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(dz_CU.float(), expected_CU, rtol=tolerance, atol=1e-6)
        assert not dz_CU[:, int(real_columns) :].any(), "padding has gradient exactly 0"
