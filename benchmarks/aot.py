"""Compiles every Triton kernel for A100 and H200 without either, and lists what its binary needs.

    python -m benchmarks.aot [--out benchmarks/results/aot.csv]
    python -m benchmarks.aot --table    that file beside aot-before.csv, the kernels of commit a08bfe4 counted alike

`VARIANTS` lists the dtypes and switches in use. Row counts are the grid and strides are arguments, so one binary serves
every shape; the block is a constant. Pointers and integers are compiled as divisible by 16, as the JIT finds those of a
real head (its rows start on 16 bytes), so that this is the binary that runs. A kernel without a variant has the status
"not listed".

Triton ships cuobjdump, which reads registers and spills from the cubin, and nvdisasm, which shows the loop over blocks
of real columns: instructions per logit, bits of one load, barriers per block. Instructions per logit decide whether
memory or the processor is the limit: an H200 reads 1.1e12 fp32 logits a second at 4.3 TB/s and issues 2.9e13
instructions, 26 per logit (13 in bf16). A layer's kernels (qkv, add_norm) are compiled for Qwen3-1.7B's heads and
width, and counted a column of a token's row: for all of the kernel, or its loop over tokens. They move 4 to 8 bytes a
column, while an H200 issues 26 to 52 instructions.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import vold_kernels
from vold_kernels import add_norm_triton, qkv_triton
from vold_kernels.divergence import KINDS
from vold_kernels.rows_triton import BLOCK, WARPS

from .harness import read_rows, table_line, write_rows

CHIPS = {80: "A100", 90: "H200"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block may use."""
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("kernel", "variant", "chip", "sm", "status", "block", "warps", "shared_bytes", "shared_limit"),
    *("registers", "spill_bytes", "stack_bytes", "instructions_per_logit", "load_bits", "barriers_per_block"),
    *("ptx_bytes", "triton"),
)
ROWS_TRITON, PAIRS_TRITON, QKV_TRITON, ADD_NORM_TRITON = "rows_triton", "pairs_triton", "qkv_triton", "add_norm_triton"
HEADS, EPS = (16, 8, 128), 1e-6
"""Query heads, key heads and their width in Qwen3-1.7B, whose hidden width is the 2048 of `rows_triton.BLOCK`."""


@dataclass(frozen=True)
class Variant:
    module: str
    kernel: str
    name: str
    types: dict[str, str]
    """Argument -> Triton type."""
    constants: dict[str, object] = field(default_factory=dict)
    loop: str = "shortest"
    """What is counted: the shortest loop that loads, the longest, or (none) the whole kernel."""
    warps: int = WARPS
    columns: int = BLOCK
    """Of a program, one time through the loop."""


@dataclass(frozen=True)
class Usage:
    shared_bytes: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    ptx_bytes: int
    instructions_per_logit: float
    """Instructions of one thread in the loop over whole blocks, over the columns of one thread."""
    load_bits: int
    """The narrowest load of that loop; of a layer's kernel, which also loads scalars, that of most bytes."""
    barriers_per_block: int


def _fold(acc: str, z: str) -> dict[str, str]:
    tensors = {"FOLDED": f"*{acc}", "Z": f"*{z}", "TARGET": "*i64", "REAL_COLUMNS": "*i64"}
    return tensors | dict.fromkeys(("folded_stride", "z_stride", "first", "columns"), "i32")


def _dlogits(acc: str, z: str, dz: str) -> dict[str, str]:
    tensors = {"DZ": f"*{dz}", "Z": f"*{z}", "TARGET": "*i64", "REAL_COLUMNS": "*i64"}
    tensors |= dict.fromkeys(("MAX", "LOG_SUM", "D_LOGP", "ENTROPY", "D_ENTROPY"), f"*{acc}")
    return tensors | dict.fromkeys(("dz_stride", "z_stride", "columns"), "i32")


def _divergence(acc: str) -> dict[str, str]:
    tensors = dict.fromkeys(("Z", "T", "NORMALISER", "ALPHA"), f"*{acc}") | {"REAL_COLUMNS": "*i64"}
    return tensors | dict.fromkeys(("z_stride", "t_stride", "normaliser_stride", "columns"), "i32")


def _divergence_sums(acc: str) -> dict[str, str]:
    return {"SUMS": f"*{acc}", "sums_stride": "i32"} | _divergence(acc)


def _divergence_dlogits(acc: str, dz: str) -> dict[str, str]:
    return {"DZ": f"*{dz}", "MEAN_LOG_RATIO": f"*{acc}", "WEIGHT": f"*{acc}", "dz_stride": "i32"} | _divergence(acc)


def _qkv(layer: str, backward: bool) -> dict[str, str]:
    tensors = dict.fromkeys(("MIXED", "Q_WEIGHT", "K_WEIGHT"), f"*{layer}") | dict.fromkeys(("COS", "SIN"), "*fp32")
    tensors |= dict.fromkeys(("FIRST", "PLACES"), "*i32") | {"mixed_stride": "i32"}
    if not backward:
        return tensors | dict.fromkeys(("Q", "K", "V"), f"*{layer}")
    return (
        tensors | dict.fromkeys(("D_MIXED", "D_Q", "D_K", "D_V"), f"*{layer}") | {"D_WEIGHTS": "*fp32", "tokens": "i32"}
    )


def _add_norm(layer: str, backward: bool) -> dict[str, str]:
    tensors = {"TOTAL": f"*{layer}", "WEIGHT": f"*{layer}", "SCALE": "*fp32"}
    if not backward:
        return tensors | dict.fromkeys(("Y", "X", "RESIDUAL"), f"*{layer}")
    return tensors | dict.fromkeys(("D_X", "D_Y", "D_TOTAL"), f"*{layer}") | {"D_WEIGHT": "*fp32", "rows": "i32"}


def _layer_variants() -> Iterator[Variant]:
    """With and without norms and shared keys; with and without a residual."""
    heads, warps = qkv_triton.tiles(*HEADS)
    size = {"warps": warps, "columns": (HEADS[0] + 2 * HEADS[1]) * HEADS[2]}
    names = {
        (EPS, True): "norms, shared keys",
        (EPS, False): "norms",
        (None, True): "shared keys",
        (None, False): "plain",
    }
    for backward, name in ((False, "qkv_forward_kernel"), (True, "qkv_backward_kernel")):
        for (eps, shared), what in names.items():
            for layer in ("bf16", "fp32") if eps and shared else ("bf16",):
                constants = heads | {"EPS": eps, "SHARED": shared} | ({"ROWS": qkv_triton.ROWS} if backward else {})
                loop = "longest" if backward else ""
                yield Variant(QKV_TRITON, name, f"{layer}, {what}", _qkv(layer, backward), constants, loop, **size)
    for residual, what in ((True, "sum"), (False, "norm alone")):
        size = {"warps": add_norm_triton.block(BLOCK)[1], "columns": BLOCK}
        constants = {"D": BLOCK, "EPS": EPS, "HAS_RESIDUAL": residual}
        types = _add_norm("bf16", False)
        yield Variant(ADD_NORM_TRITON, "add_norm_forward_kernel", f"bf16, {what}", types, constants, "", **size)
        constants = {"D": BLOCK, "HAS_D_TOTAL": residual, "ROWS": add_norm_triton.ROWS}
        types = _add_norm("bf16", True)
        yield Variant(ADD_NORM_TRITON, "add_norm_backward_kernel", f"bf16, {what}", types, constants, "longest", **size)


DTYPES = (("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp64"))  # of the logits, of their gradient
VARIANTS = [
    *(
        Variant(ROWS_TRITON, "fold_kernel", z, _fold(acc, z))
        for acc, z in (("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64"))
    ),
    *(
        Variant(
            ROWS_TRITON,
            "dlogits_kernel",
            f"{z} to {dz}{', entropy' * entropy}",
            _dlogits(acc, z, dz),
            {"HAS_ENTROPY": entropy},
        )
        for acc, z, dz in [(acc, acc, dz) for acc, dz in DTYPES] + [("fp32", "bf16", "bf16")]
        for entropy in (False, True)
    ),
    *(
        Variant(PAIRS_TRITON, "divergence_kernel", f"{kind}, {acc}", _divergence_sums(acc), {"KIND": kind})
        for kind in KINDS
        for acc in ("fp32", "fp64")
    ),
    *(
        Variant(
            PAIRS_TRITON,
            "divergence_dlogits_kernel",
            f"{kind}, {acc} to {dz}",
            _divergence_dlogits(acc, dz),
            {"KIND": kind},
        )
        for kind in KINDS
        for acc, dz in DTYPES
    ),
    *_layer_variants(),
]


def modules() -> list[str]:
    """Modules of vold_kernels that contain Triton kernels."""
    folders = [Path(folder) for folder in vold_kernels.__path__]
    return sorted(x.stem for folder in folders for x in folder.glob("*.py") if "@triton.jit" in x.read_text())


def kernels() -> Iterator[tuple[str, str]]:
    """(module, kernel) of every jitted function that is launched: its name says so."""
    from triton.runtime.jit import JITFunction

    for module in modules():
        for name, value in vars(importlib.import_module(f"vold_kernels.{module}")).items():
            if isinstance(value, JITFunction) and value.__module__.endswith(module) and name.endswith("_kernel"):
                yield module, name


def compiled(variant: Variant, sm: int):
    """Compiles a variant for compute capability `sm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vold_kernels import rows_triton

    function = getattr(importlib.import_module(f"vold_kernels.{variant.module}"), variant.kernel)
    names = ("BLOCK", "LANE", "SEGMENT")  # an earlier commit may lack some of them
    constants = {name: getattr(rows_triton, name, None) for name in names} | variant.constants
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: variant.types.get(name, "constexpr") for name in function.arg_names}
    divisible = [index for index, name in enumerate(function.arg_names) if signature[name] != "constexpr"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": variant.warps})


def usage(kernel, variant: Variant) -> Usage | None:
    """Resources of a compiled kernel; None where Triton ships no cuobjdump or nvdisasm."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not all((tools / name).exists() for name in ("cuobjdump", "nvdisasm")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources, sass = (
            subprocess.run([tools / name, option, cubin], capture_output=True, text=True, check=True).stdout
            for name, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, spill = (int(re.search(rf"{key}:(\d+)", resources)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(kernel.metadata.shared, registers, stack, spill, len(kernel.asm["ptx"]), **_main_loop(sass, variant))


def _main_loop(sass: str, variant: Variant) -> dict[str, float]:
    """What the loop over blocks of real columns costs: of the innermost loops that load, the shortest, since the others
    carry a mask. For a layer's kernel the loop over tokens, or the whole kernel."""
    loops = [loop for loop in _loops(sass) if any(name.startswith("LDG") for name in loop)]
    loop = {"shortest": min, "longest": max}[variant.loop](loops, key=len) if variant.loop else _opcodes(sass)
    widths = [_bits(name) for name in loop if name.startswith("LDG")]
    of_most_bytes = max(set(widths), key=lambda bits: bits * widths.count(bits))
    return {
        "instructions_per_logit": round(len(loop) * variant.warps * 32 / variant.columns, 2),
        "load_bits": min(widths) if variant.loop == "shortest" else of_most_bytes,
        "barriers_per_block": sum(name.startswith("BAR") for name in loop),
    }


def _bits(load: str) -> int:
    return int(width[1]) if (width := re.search(r"\.U?(16|64|128)", load)) else 32


def _opcodes(sass: str) -> list[str]:
    """All of the kernel's, without the padding behind its end."""
    opcodes = [found[1] for line in sass.splitlines() if (found := INSTRUCTION.search(line))]
    last = max(index for index, name in enumerate(opcodes) if name == "EXIT")
    return opcodes[: last + 1]


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(\S+?)(?: (.*))?;")


def _loops(sass: str) -> Iterator[list[str]]:
    """Opcodes from a label to the branch back to it, for each such branch."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.search(line):
            opcodes.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2] or "")
            if instruction[1].startswith("BRA") and target and labels.get(target[0], len(opcodes)) < len(opcodes) - 1:
                yield opcodes[labels[target[0]] :]


def rows() -> Iterator[dict[str, object]]:
    import triton

    listed = {(variant.module, variant.kernel) for variant in VARIANTS}
    for variant in VARIANTS:
        for sm, chip in CHIPS.items():
            kernel = compiled(variant, sm)
            row = {
                "kernel": variant.kernel,
                "variant": variant.name,
                "chip": chip,
                "sm": sm,
                "triton": triton.__version__,
            }
            row |= {"block": variant.columns, "warps": variant.warps, "shared_limit": SHARED_LIMIT[sm]}
            resources = usage(kernel, variant)
            fits = kernel.metadata.shared <= SHARED_LIMIT[sm] and not (
                resources and resources.spill_bytes + resources.stack_bytes
            )
            yield row | {"status": "fits" if fits else "does not fit"} | (vars(resources) if resources else {})
    for module, name in kernels():
        if (module, name) not in listed:
            yield {"kernel": name, "status": f"not listed in benchmarks/aot.py ({module}.py)"}


def write(path: Path) -> None:
    write_rows(path, list(rows()), COLUMNS)


SHOWN = ("instructions_per_logit", "load_bits", "barriers_per_block", "registers", "shared_bytes", "spill_bytes")


def table(before: list[dict[str, str]], after: list[dict[str, str]]) -> str:
    """Markdown: what each fp32 or bf16 kernel needs on each chip, `before → after` where it changed."""
    keys = ("kernel", "variant", "sm")
    earlier = {tuple(row[key] for key in keys): row for row in before}
    lines = [table_line((*keys, *SHOWN)), table_line(["---"] * (len(keys) + len(SHOWN)))]
    for row in after:
        if "fp64" in row["variant"]:
            continue
        old = earlier.get(tuple(row[key] for key in keys), row)
        cells = (row[name] if old[name] == row[name] else f"{old[name]} → {row[name]}" for name in SHOWN)
        lines.append(table_line((*(row[key] for key in keys), *cells)))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "aot.csv")
    parser.add_argument("--table", action="store_true", help="compile nothing: print aot-before.csv → aot.csv")
    options = parser.parse_args()
    if options.table:
        before = RESULTS / "aot-before.csv"
        print(table(read_rows(before) if before.exists() else [], read_rows(options.out)))
    else:
        write(options.out)
