"""Every Triton kernel compiles for A100 and H200 on a machine without either, and fits: shared memory, no spills."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from kernel_cases import INTERPRETED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vold_kernels import pairs_triton, rows_triton
from vold_kernels.pairs import KINDS

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

FOLD = {"FOLDED": "*{acc}", "Z": "*{acc}", "TARGET": "*i64", "REAL": "*i64", "folded_stride": "i32"} | {
    "z_stride": "i32",
    "first": "i32",
    "columns": "i32",
    "BLOCK": "constexpr",
}
DLOGITS = {"DZ": "*{dz}", "Z": "*{acc}", "TARGET": "*i64", "REAL": "*i64", "TOP": "*{acc}", "LOG_TOTAL": "*{acc}"} | {
    "D_LOGP": "*{acc}",
    "ENTROPY": "*{acc}",
    "D_ENTROPY": "*{acc}",
    "dz_stride": "i32",
    "z_stride": "i32",
    "columns": "i32",
    "HAS_ENTROPY": "constexpr",
    "BLOCK": "constexpr",
}
DIVERGENCE = {"Z": "*{acc}", "T": "*{acc}", "REAL": "*i64", "NORM": "*{acc}", "ALPHA": "*{acc}"} | {
    "z_stride": "i32",
    "t_stride": "i32",
    "norm_stride": "i32",
    "columns": "i32",
    "KIND": "constexpr",
    "BLOCK": "constexpr",
}
DIVERGENCE_SUMS = {"SUMS": "*{acc}", "sums_stride": "i32", **DIVERGENCE}
DIVERGENCE_DLOGITS = {"DZ": "*{dz}", "OWN": "*{acc}", "WEIGHT": "*{acc}", "dz_stride": "i32", **DIVERGENCE}
KERNELS = {
    "fold fp32": ("fold_kernel", FOLD, {"acc": "fp32"}, {}),
    "fold fp64": ("fold_kernel", FOLD, {"acc": "fp64"}, {}),
    "dlogits bf16": ("dlogits_kernel", DLOGITS, {"acc": "fp32", "dz": "bf16"}, {"HAS_ENTROPY": False}),
    "dlogits bf16 entropy": ("dlogits_kernel", DLOGITS, {"acc": "fp32", "dz": "bf16"}, {"HAS_ENTROPY": True}),
    "dlogits fp32 entropy": ("dlogits_kernel", DLOGITS, {"acc": "fp32", "dz": "fp32"}, {"HAS_ENTROPY": True}),
    "dlogits fp64 entropy": ("dlogits_kernel", DLOGITS, {"acc": "fp64", "dz": "fp64"}, {"HAS_ENTROPY": True}),
}
for kind in KINDS:
    for acc, dz in (("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")):
        dtypes, constants = {"acc": acc, "dz": dz}, {"KIND": kind}
        KERNELS[f"{kind} {acc}"] = ("divergence_kernel", DIVERGENCE_SUMS, dtypes, constants)
        KERNELS[f"{kind} dlogits {dz}"] = ("divergence_dlogits_kernel", DIVERGENCE_DLOGITS, dtypes, constants)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int, tmp_path: Path):
    kernel, signature, dtypes, constants = KERNELS[name]
    function = getattr(rows_triton, kernel, None) or getattr(pairs_triton, kernel)
    source = ASTSource(
        fn=function,
        signature={argument: signature[argument].format(**dtypes) for argument in function.arg_names},
        constexprs={"BLOCK": rows_triton.BLOCK, **constants},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": rows_triton.WARPS})
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    assert "bar.sync" in compiled.asm["ptx"]
    if CUOBJDUMP.exists():
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        assert registers <= 255 and local == 0 and stack == 0, usage
