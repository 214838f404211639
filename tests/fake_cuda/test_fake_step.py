"""The GPU path at published sizes, executed on fake CUDA tensors (benchmarks/fake_cuda): build, teacher, forward,
backward, clip, AdamW, export. What it cannot see is in that package's docstring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fake_cuda.device import unsupported
from benchmarks.harness import read_rows
from benchmarks.roofline import RESULTS

FACTS = Path(__file__).with_name("facts.py")
pytestmark = pytest.mark.skipif(bool(unsupported()), reason=str(unsupported()))

BRANCHES = "rms_norm vold, add_norm vold, qkv vold, swiglu liger, attention flash, delta_rule torch"


@pytest.fixture(scope="module")
def facts(torchrun) -> dict[str, dict]:
    """Case of facts.py -> what a step of it did; all in one process."""
    done = torchrun(1, FACTS, "text", "images", "deterministic", "gpu_day")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("{")))
    return {found["case"]: found for found in lines}


@pytest.fixture(scope="module")
def text(facts) -> dict:
    return facts["text"]


@pytest.fixture(scope="module")
def images(facts) -> dict:
    return facts["images"]


def test_the_models_are_those_that_were_published(text):
    assert text["parameters"] == text["published_parameters"]


def test_weights_are_exported_under_transformers_names_and_sizes(text, images):
    for found in (text, images):
        assert found["exported"] == found["transformers"]
    assert len(text["exported"]) == 28 * 11 + 3 and len(images["exported"]) == 2 * 12 + 3


def test_the_gpu_branches_are_taken(text):
    assert text["branches"] == BRANCHES
    assert text["attention"] == {
        "teacher: flash_attn forward bfloat16 [32, 8, 128]": 36 * 2,
        "student_forward: flash_attn forward bfloat16 [16, 8, 128]": 28 * 2,
        "student_backward: flash_attn backward bfloat16 [16, 8, 128]": 28 * 2,
    }


def test_a_device_would_take_every_operation_as_it_is(text):
    """No pointer to CPU memory, no NCCL call with a view, no matrix that cuBLAS would have copied."""
    assert text["issues"] == {}


def test_matmuls_multiply_bf16_and_the_head_keeps_fp32(text):
    assert text["gemms"] == [
        "student_backward: bfloat16 -> bfloat16",
        "student_backward: bfloat16 -> float32",  # dW, into main_grad
        "student_forward: bfloat16 -> bfloat16",
        "student_forward: bfloat16 -> float32",
        "teacher: bfloat16 -> bfloat16",
        "teacher: bfloat16 -> float32",
    ]


def test_kernels_get_the_dtypes_they_were_compiled_for(text):
    """Those of benchmarks/aot.py for our kernels; Liger's keeps the layers' bf16. An unused pointer is not listed."""
    acc, bf16, i64, i32 = "float32", "bfloat16", "int64", "int32"
    assert text["launches"]["fold_kernel"] == [" ".join((acc, acc, i64, i64))]
    assert text["launches"]["dlogits_kernel"] == [" ".join((bf16, acc, i64, i64, acc, acc, acc, acc))]
    table = (acc, acc, i32, i32)
    assert text["launches"]["qkv_forward_kernel"] == [" ".join((*[bf16] * 6, *table))]
    assert text["launches"]["qkv_backward_kernel"] == [" ".join((bf16, acc, *[bf16] * 6, *table))]
    assert sorted(text["launches"]["add_norm_forward_kernel"]) == [
        " ".join((bf16, bf16, acc, bf16)),  # the first layer's norm, without a sum
        " ".join((bf16, bf16, acc, bf16, bf16, bf16)),
    ]
    assert sorted(text["launches"]["add_norm_backward_kernel"]) == [
        " ".join((bf16, acc, bf16, bf16, bf16, acc, bf16)),
        " ".join((bf16, acc, bf16, bf16, acc, bf16)),
    ]
    liger = {name: ways for name, ways in text["launches"].items() if name.startswith("_")}
    assert sorted(liger) == [
        "_swiglu_fused_gate_up_backward_kernel",
        "_swiglu_fused_gate_up_forward_kernel",
    ]
    assert all(way.split()[0] == bf16 for ways in liger.values() for way in ways)


def test_the_head_multiplies_once(text):
    """Logits, dH and dW of the student; logits of the teacher: no product is computed again."""
    flops = text["flops"]
    assert flops["head"] == flops["6NDV"] and flops["teacher_head"] == flops["2nEV"]


def test_no_work_beyond_the_useful(text):
    """A step without recomputation multiplies what `training_flops` counts, and attention's fifth product."""
    assert 1.0 <= text["flops"]["student"] / text["flops"]["useful"] < 1.01


def test_the_committed_prediction_is_of_this_step(text):
    """Regenerate: `python -m benchmarks.roofline --step --out benchmarks/results`, and the table of docs/speed.md."""
    committed = {row["phase"]: row for row in read_rows(RESULTS / "step.csv") if _is_same_case(row, text)}
    rows = {row["phase"]: row for row in text["predicted"] if row["phase"] != "teacher"}  # here it is offloaded
    assert rows and rows.keys() <= committed.keys()
    for phase, row in rows.items():
        assert float(row["tflop"]) == pytest.approx(float(committed[phase]["tflop"]), abs=0.01)
        for column in ("launches", "ms"):
            assert float(row[column]) == pytest.approx(float(committed[phase][column]), rel=0.03), (phase, column)
    assert float(rows["student step"]["tflop"]) == pytest.approx(text["flops"]["student"] / 1e12, abs=0.01)


def _is_same_case(row: dict[str, str], text: dict) -> bool:
    return all(row[key] == text["predicted"][0][key] for key in ("gpu", "micro_batch"))


def test_the_plan_is_within_a_tenth_of_the_bytes_alive(text):
    peak = max(text["peaks"][phase] for phase in ("student_forward", "student_backward"))
    assert text["planned_peak"] == pytest.approx(peak, rel=0.1)


def test_an_offloaded_teacher_is_on_the_device_for_its_score_alone(text):
    student, teacher, peaks = 1_720_574_976, 2 * 8_190_735_360, text["peaks"]
    resident = (2 + 4 + 4) * student  # weights, gradients, masters; Adam's moments come with the first update
    assert resident + teacher < peaks["teacher"] < resident + teacher + 2 * 2**30
    assert peaks["export"] == pytest.approx(resident + 8 * student, rel=0.01)


def test_adamw_reads_and_writes_once(text):
    """Two groups, decayed and not; the moments, and the steps on the device, are made in the first update."""
    update = dict(text["adamw"])
    assert {update.pop(name, 0) for name in ("zeros_like.default", "zeros.default")} <= {0, 226, 452}
    assert update == {"_foreach_add_.Scalar": 2, "_fused_adamw_.default": 2}


WAITS = {  # phase -> where the host waits for the device in a step of two micro-batches, and how often
    "teacher": {},
    "student_forward": {"nonzero, kernels/vold_kernels/linear_policy_loss.py:_one_pass": 2},
    "student_backward": {},
    "optimizer": {"tolist, vold/trainer/trainer.py:_update": 1},
    "step": {"tolist, vold/trainer/metrics.py:reduce_stats": 1},
    "export": {},
}


def test_where_the_host_waits(text):
    """Golden. At most 4 a micro-batch forward and backward, 2 an update and its report, 1 a teacher's micro-batch."""
    assert text["micro_batches"] == 2
    assert {phase: text["waits"][phase] for phase in WAITS} == WAITS


def test_one_rank_talks_to_nobody_for_each_chunk(text):
    """The heads have no collective where tp is 1; a step has its gradient, norm, flag and two sums of metrics."""
    assert sorted(text["collectives"].values()) == [1, 1, 1, 2]
    assert not [where for where in text["collectives"] if "kernels/" in where]


# -- Qwen2.5-VL-3B with two images of 40 × 40 patches, 2 text layers and 8 blocks of the tower (facts.py) --------------


def test_the_vl_student_takes_the_branches_of_the_text_student(images):
    assert images["branches"] == BRANCHES
    assert images["attention"] == {
        "student_forward: flash_attn forward bfloat16 [16, 2, 128]": 2 * images["micro_batches"],
        "student_backward: flash_attn backward bfloat16 [16, 2, 128]": 2 * images["micro_batches"],
    }
    assert images["issues"] == {}


HEADS, WIDTH, INNER, OUT = 16, 1280, 3420, 2048
PATCHES, BLOCKS = 2 * 40 * 40, 8
PRODUCTS = {  # of the tower: [rows, width] of both matrices -> calls; a window of 112 pixels is 8 × 8 patches
    f"bmm.default [{HEADS}, 64, 80] [{HEADS}, 80, 64] -> float32 cuda": 7 * 2 * 25,
    f"bmm.default [{HEADS}, 64, 64] [{HEADS}, 64, 80] -> float32 cuda": 7 * 2 * 25,
    f"bmm.default [{HEADS}, 1600, 80] [{HEADS}, 80, 1600] -> float32 cuda": 2,
    f"bmm.default [{HEADS}, 1600, 1600] [{HEADS}, 1600, 80] -> float32 cuda": 2,
    f"addmm.default [{PATCHES}, {WIDTH}] [{WIDTH}, {3 * WIDTH}] -> bfloat16 cuda": BLOCKS,
    f"addmm.default [{PATCHES}, {WIDTH}] [{WIDTH}, {WIDTH}] -> bfloat16 cuda": BLOCKS,
    f"addmm.default [{PATCHES}, {WIDTH}] [{WIDTH}, {INNER}] -> bfloat16 cuda": 2 * BLOCKS,
    f"addmm.default [{PATCHES}, {INNER}] [{INNER}, {WIDTH}] -> bfloat16 cuda": BLOCKS,
    f"addmm.default [{PATCHES // 4}, {4 * WIDTH}] [{4 * WIDTH}, {4 * WIDTH}] -> bfloat16 cuda": 1,
    f"addmm.default [{PATCHES // 4}, {4 * WIDTH}] [{4 * WIDTH}, {OUT}] -> bfloat16 cuda": 1,
}


def test_the_tower_attends_window_by_window_and_merges_to_the_text_width(images):
    """Scaled-dot-product attention of each window by itself, of each image in the 8th block. Which kernel torch takes
    for one is the device's choice: here it is written out as two products. The last two rows are the merger."""
    assert images["tower"]["products"] == PRODUCTS


def test_image_features_are_put_into_the_embeddings_as_they_come_from_the_merger(images):
    embeddings, rows, features = images["tower"]["insertion"]
    assert embeddings.startswith("bfloat16 cuda [") and embeddings.endswith(", 1, 2048]")
    assert rows == "int64 cuda [800]" and features == "bfloat16 cuda [800, 1, 2048]"


def test_the_head_multiplies_once_behind_images_too(images):
    assert images["flops"]["head"] == images["flops"]["6NDV"]


TOWER = "vold/models/vision.py:"
TOWER_WAITS = {  # of one pass, which both images share
    f"copy to the device, {TOWER}_tower": 13 * BLOCKS,  # its weights, before the first picture
    f"tolist, {TOWER}encode": 3 * BLOCKS + 3,  # each block reads the windows' lengths, for q, k and v
    f"copy to the device, {TOWER}encode": 4,
    f"repeat_interleave, {TOWER}encode": 1,
    f"unique_consecutive, {TOWER}encode": 1,
}


def test_where_the_host_waits_for_a_tower_and_for_the_text(images):
    waits, micro_batches = images["waits"]["student_forward"], images["micro_batches"]
    assert {where: count for where, count in waits.items() if TOWER in where} == TOWER_WAITS
    assert {where: count for where, count in waits.items() if TOWER not in where} == {
        "nonzero, kernels/vold_kernels/linear_policy_loss.py:_one_pass": micro_batches,
        "nonzero, vold/models/language_model.py:_local_image_features": micro_batches,
    }
    assert {phase: images["waits"][phase] for phase in WAITS if phase != "student_forward"} == {
        phase: waits for phase, waits in WAITS.items() if phase != "student_forward"
    }


def test_deterministic_reaches_flash_attn_in_both_passes(facts):
    assert facts["deterministic"]["attention"] == {
        "student_forward: flash_attn forward deterministic bfloat16 [16, 8, 128]": 1,
        "student_backward: flash_attn backward deterministic bfloat16 [16, 8, 128]": 1,
    }


def test_the_train_part_of_a_gpu_day_writes_its_rows_on_fake_tensors(facts):
    """One layer of each model, all else as on a GPU: 12,000 and 3,200 tokens, then with the teacher."""
    day = facts["gpu_day"]
    assert day["items"] == ["12000 tokens", "3200 tokens", "12000 tokens with the 8B teacher"]
    rows = day["train_step-cuda"]
    assert [row["provider"] for row in rows] == ["vold_kernels", "materialised"] * 2 + ["vold_kernels"]
    for row in rows:
        assert {key for key, value in row.items() if not value} <= {"teacher_hidden", "teacher_layers"}
    ours, materialised, *_ = (int(row["peak_extra_mib"]) for row in rows)
    assert ours < materialised / 2, "three copies of 9,600 rows of logits"
    assert [(row["value"], row["passed"]) for row in day["checks"]] == [("3", "yes")] * 3, "host waits"
