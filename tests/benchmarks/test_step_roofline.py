"""`benchmarks.roofline --step`: its arithmetic by hand, its FLOPs beside vold.models.flops, the committed tables."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import roofline, step_costs, step_roofline
from benchmarks.fake_cuda.models import config_of
from benchmarks.fake_cuda.step import Case, make_batch
from benchmarks.fake_cuda.work import Operation, Shape
from benchmarks.harness import read_rows
from vold.models import flops
from vold.models.architecture import Architecture

GPU = roofline.Gpu("H200", matmul=1e9, bandwidth=1e6, sms=4, issue=1e12, capability=90)
FAST = replace(GPU, bandwidth=1e9)
SETUP = step_roofline.Setup(2, 600, 300, {"forward": 3, "backward": 3, "teacher": 5}, useful_flops=1e9)
DOCS = Path(__file__).parents[2] / "docs"
QWEN = Architecture.from_config(config_of("qwen3-1.7b"))


def bf16(*size: int) -> Shape:
    return Shape("bfloat16", size, (), "cuda", 2)


def fp32(*size: int) -> Shape:
    return Shape("float32", size, (), "cuda", 4)


def operation(phase, name, inputs, outputs=(), *, kind="aten", site="vold/models/layers.py:forward", **more):
    return Operation(phase, kind, name, site, tuple(inputs), tuple(outputs), **more)


def mm(phase: str, rows: int, depth: int, columns: int, **more) -> Operation:
    return operation(phase, "mm.default", [bf16(rows, depth), bf16(depth, columns)], [bf16(rows, columns)], **more)


def test_a_matmul_takes_whole_waves_or_its_bytes():
    """[300, 512] is 3 × 2 blocks of 128 × 256, or 2 × 4 of 256 × 128: two waves of 4 SMs."""
    deep, shallow = mm("student_forward", 300, 20000, 512), mm("student_forward", 300, 64, 512)
    gap = step_costs.GAP
    assert step_costs.seconds(deep, FAST, False) == pytest.approx(2 * 2 * 128 * 256 * 4 * 20000 / 1e9 + gap)
    assert step_costs.seconds(shallow, GPU, False) == pytest.approx(2 * (300 * 64 + 64 * 512 + 300 * 512) / 1e6 + gap)


def test_the_heads_results_are_half_hidden_and_row_kernels_run_under_a_matmul():
    a, b, logits = bf16(256, 64), bf16(64, 512), fp32(256, 512)
    head = {"site": "kernels/vold_kernels/matmuls.py:_addmm_"}
    product = operation("student_forward", "addmm.dtype_out", [logits, a, b, logits], (), written=(logits,), **head)
    arithmetic = 2 * 128 * 256 * 4 * 64 / 1e9
    written = 4 * 256 * 512 / 2 / 1e6
    assert step_costs.seconds(product, GPU, True) == pytest.approx(arithmetic + written + step_costs.GAP)
    fold = operation("student_forward", "fold_kernel", [fp32(4, 256), logits], kind="triton", **head)
    for lanes in (False, True):
        alone = roofline._row_kernel("fold", 256 * 512, 4, lanes, 8.75, GPU).seconds
        assert step_costs.seconds(fold, GPU, lanes) == pytest.approx(alone + step_costs.GAP)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (operation("teacher", "embedding.default", [bf16(5000, 8), fp32(10)], [bf16(10, 8)]), 2 * 160 + 40),
        (operation("teacher", "zeros_like.default", [fp32(100)], [fp32(100)]), 400),
        (operation("teacher", "copy_.default", [bf16(100), fp32(100)], written=(bf16(100),)), 600),
        (operation("teacher", "add_.Tensor", [fp32(100), bf16(100)], written=(fp32(100),)), 1000),
        (operation("teacher", "qkv_forward_kernel", [bf16(9), bf16(4), bf16(3), fp32(3)], kind="triton"), 44),
        (operation("optimizer", "_foreach_mul_.Scalar", [fp32(50), fp32(50)]), 800),
        (operation("optimizer", "_foreach_lerp_.Scalar", [fp32(50)] * 2), 600),
        (operation("optimizer", "_fused_adamw_.default", [fp32(50)] * 4), 1400),
        (operation("student_backward", "embedding_dense_backward.default", [bf16(9, 2), fp32(9)], [bf16(9, 2)]), 144),
    ],
    ids=lambda value: value.name if isinstance(value, Operation) else "",
)
def test_bytes_are_those_that_pass(made, expected):
    assert step_costs.traffic(made) == expected


def test_phases_mfu_and_losses_by_hand():
    """Three operations: one of each phase that the host feeds by the layer, and AdamW's first and later work."""
    forward, scored = mm("student_forward", 128, 10**7, 256), mm("teacher", 128, 64, 256)
    site = "vold/trainer/trainer.py:_update > megatron/optimizer/optimizer.py:step_with_ready_grads"
    adamw = operation("optimizer", "_fused_adamw_.default", [fp32(10**6)] * 4, site=site)
    moments = operation("optimizer", "zeros_like.default", [fp32(10**6)], [fp32(10**6)], site=site)
    view = operation("student_forward", "view.default", [bf16(10**9)], [bf16(10**9)])
    trace = Counter({forward: 4, scored: 1, adamw: 1, moments: 2, view: 1000})
    phases = {phase.name: phase for phase in step_roofline.predict(trace, SETUP, FAST)}
    assert list(phases) == ["forward", "optimizer", "teacher"]
    one = 2 * 128 * 256 * 10**7 / 1e9  # seconds at the matmul rate; one block on four SMs takes four times as long
    assert phases["forward"].device_s == pytest.approx(4 * (4 * one + step_costs.GAP))
    assert (phases["forward"].launches, phases["forward"].flops) == (4, 4 * one * 1e9)
    assert phases["forward"].host_s == pytest.approx(2 * 3 * step_roofline.HOST_LAYER["forward"])
    assert phases["optimizer"].seconds == pytest.approx(0.028 + step_costs.GAP)
    total = phases["forward"].seconds + phases["optimizer"].seconds
    assert step_roofline.mfu(list(phases.values()), SETUP, FAST) == pytest.approx(1e9 / total / 989e12)
    lost = {loss.group: loss.seconds for loss in step_roofline.losses(trace, SETUP, FAST)}
    assert lost["GEMMs of the layers: part waves"] == pytest.approx(12 * one, rel=1e-6)
    assert lost["AdamW"] == pytest.approx(0.028 + step_costs.GAP) and len(lost) == 2
    slow_host = step_roofline.Setup(2, 600, 300, {"forward": 3, "backward": 3, "teacher": 10**6}, 1e9)
    lost = {loss.group for loss in step_roofline.losses(trace, slow_host, FAST, teacher=True)}
    assert step_roofline.HOST in lost and lost <= set(step_roofline.REMEDIES)


def model_trace(arch: Architecture, tokens, targets: int) -> Counter[Operation]:
    """The products of one micro-batch, forward and backward, as a layer and a head make them."""
    count, width = tokens.input_ids_T.numel(), arch.heads * arch.head_dim
    projections = [(arch.hidden, width + 2 * arch.kv_heads * arch.head_dim), (width, arch.hidden)]
    projections += [(arch.hidden, 2 * arch.ffn), (arch.ffn, arch.hidden)]
    trace: Counter[Operation] = Counter()
    for inputs, outputs in projections:
        trace[mm("student_forward", count, inputs, outputs)] += arch.layers
        trace[mm("student_backward", count, outputs, inputs)] += arch.layers
        trace[mm("student_backward", outputs, count, inputs)] += arch.layers
    sizes = [(targets, arch.hidden, arch.vocab), (targets, arch.vocab, arch.hidden), (arch.vocab, targets, arch.hidden)]
    for size in sizes:
        trace[mm("student_forward", *size, site="kernels/vold_kernels/matmuls.py:logits_")] += 1
    q, k = bf16(count, arch.heads, arch.head_dim), bf16(count, arch.kv_heads, arch.head_dim)
    for name, inputs in {"forward": [q, k, k], "backward": [q, q, k, k, q]}.items():
        segments = {"kind": "attention", "segments": tuple(tokens.segments)}
        trace[operation(f"student_{name}", f"flash_attn {name}", inputs, [q], **segments)] += arch.layers
    return trace


def expected_flops(arch: Architecture, micro_batches) -> float:
    """By vold.models.flops: less the head of tokens without a target, and with what its attention leaves out: the
    diagonal's second half and the backward pass's fifth product."""
    useful = sum(flops.training_flops(arch, m.tokens) for m in micro_batches)
    tokens = sum(m.tokens.input_ids_T.numel() for m in micro_batches)
    idle = 6 * (tokens - sum(m.target_N.numel() for m in micro_batches)) * arch.vocab * arch.hidden
    attention = useful - 6 * flops.matmul_parameters(arch) * tokens
    diagonal = 6 * arch.layers * arch.heads * arch.head_dim * tokens
    return useful - idle + diagonal + (attention + diagonal) / 6


@pytest.fixture(scope="module")
def batches():
    """Largest micro-batch -> micro-batches of the two cases of the committed table."""
    made = [make_batch(Case(microbatch_tokens=n), QWEN).micro_batches for n in step_roofline.MICROBATCH_TOKENS]
    return {str(max(m.tokens.input_ids_T.numel() for m in batch)): batch for batch in made}


def test_the_models_flops_are_those_of_the_trainer(batches):
    for batch in batches.values():
        trace = sum((model_trace(QWEN, m.tokens, m.target_N.numel()) for m in batch), Counter())
        setup = step_roofline.setup_of(batch, QWEN, None)
        total = sum(phase.flops for phase in step_roofline.predict(trace, setup, roofline.GPUS["h200"]))
        assert total == pytest.approx(expected_flops(QWEN, batch), rel=1e-12)
        assert setup.useful_flops == sum(flops.training_flops(QWEN, m.tokens) for m in batch)


@pytest.fixture(scope="module")
def table():
    return read_rows(roofline.RESULTS / "step.csv")


def test_the_committed_table_has_these_flops(table, batches):
    assert {row["micro_batch"] for row in table} == set(batches)
    assert {row["gpu"] for row in table} == {gpu.name for gpu in roofline.GPUS.values()}
    for row in table:
        if row["phase"] == "student step":
            expected = expected_flops(QWEN, batches[row["micro_batch"]]) / 1e12
            assert float(row["tflop"]) == pytest.approx(expected, rel=1e-3)


def test_the_page_shows_the_committed_table(table):
    """Regenerate: python -m benchmarks.roofline --step --out benchmarks/results, then copy the summary's lines."""
    page = (DOCS / "speed.md").read_text()
    assert "\n".join(step_roofline.summary(table)) in page, "\n".join(step_roofline.summary(table))
    assert "no GPU has measured" in page
