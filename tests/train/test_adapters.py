"""LoRA in a run: what is trained and saved, that it resumes, and what peft makes of the result. Layouts against peft:
tests/benchmarks/test_parity.py; checkpoints at other layouts: tests/trainer/test_reshard.py."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support import ranks, tiny
from support.runs import same_tensors
from support.steps import assign_token_weights, batch_of, make_groups, make_trainer
from vold.commands.export import export_model
from vold.config.schema import AdapterConfig, ExportConfig, ObjectiveConfig
from vold.models.adapters import PROJECTIONS
from vold.models.student import load_chunks
from vold.objectives import Objective, build_objective
from vold.objectives.advantages import group_normalised
from vold.parallel.launch import initialise, shutdown
from vold.run.run_dir import read_rows
from vold.teacher import BaseTeacher, Teacher
from vold.train.rl import train_rl

MODULES = [name for names in PROJECTIONS.values() for name in names]
ADAPTER = "adapter={rank: 3, alpha: 6, rslora: true}"


@pytest.fixture(scope="module")
def run(load, layout, tmp_path_factory):
    config = load("rl", tmp_path_factory.mktemp("lora") / "run", ADAPTER, "optimizer.lr=0.01")
    train_rl(config)
    return config


def test_the_sampler_gets_merged_weights_and_the_base_stays(run):
    rows = read_rows(run.run_dir / "metrics.jsonl")
    assert all(row["mismatch_max"] < 1e-4 and row["parity_error"] < 1.0001 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    before, after = load_file(run.student / "model.safetensors"), load_file(run.run_dir / "model/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(f"{module}.weight" in name for module in MODULES)} - {
        name for name in before if "visual" in name
    }


def test_a_checkpoint_holds_adapters_and_their_state_alone(run):
    (file,) = (run.run_dir / "checkpoints/step-000004").glob("rank-*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        names = {name for name in tensors.keys() if not name.startswith("random/")}  # noqa: SIM118
    assert {name.split("/")[0] for name in names} == {"model", "exp_avg", "exp_avg_sq"}
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_a_resumed_run_equals_the_uninterrupted_one(run):
    whole = run.run_dir.with_name("whole")
    shutil.move(run.run_dir, whole)
    shutil.copytree(whole, run.run_dir)
    for part in ("checkpoints/step-000004", "model"):
        shutil.rmtree(run.run_dir / part)
    (run.run_dir / "checkpoints/latest").write_text("step-000002\n")
    train_rl(run, resume=True)
    assert same_tensors(run.run_dir / "model/model.safetensors", whole / "model/model.safetensors")
    with pytest.raises(ValueError, match="adapter"):
        train_rl(run.model_copy(update={"adapter": AdapterConfig(rank=4), "steps": 5}), resume=True)


def test_peft_loads_the_adapter_and_merges_it_to_the_same_model(run, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import Qwen2_5_VLForConditionalGeneration

    export_model(ExportConfig(run=run.run_dir, out=tmp_path / "merged"))
    assert same_tensors(tmp_path / "merged/model.safetensors", run.run_dir / "model/model.safetensors")
    export_model(ExportConfig(run=run.run_dir, out=tmp_path / "adapter", adapter=True))
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.student, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing or unexpected tensors
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-7)


def test_an_adapter_goes_on_where_another_run_left_it(run, layout, tmp_path):
    export_model(ExportConfig(run=run.run_dir, out=tmp_path / "adapter", adapter=True))
    config = run.adapter.model_copy(update={"path": tmp_path / "adapter"})
    (chunk,) = load_chunks(run.student, layout, torch.float32, adapter=config)
    (fresh,) = load_chunks(run.student, layout, torch.float32, adapter=run.adapter)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "language_model.layers.1.self_attn.v_proj.lora_B.weight"
    linear = chunk.decoder.layers[1].self_attention.linear_qkv
    assert torch.equal(linear.adapter.lora_B[2], stored[f"base_model.model.model.{name}"])
    assert stored[f"base_model.model.model.{name}"].any()
    assert not fresh.decoder.layers[1].self_attention.linear_qkv.adapter.lora_B[2].any()
    for change, says in (({"rank": 4}, "adapter.rank is 4"), ({"targets": ("qkv",)}, "adapter.targets is")):
        with pytest.raises(ValueError, match=says):
            load_chunks(run.student, layout, torch.float32, adapter=config.model_copy(update=change))


def test_exporting_the_adapter_of_a_run_without_one_is_refused(rl_run, tmp_path):
    with pytest.raises(ValueError, match="adapter = true, but run"):
        export_model(ExportConfig(run=rl_run.run_dir, out=tmp_path / "out", adapter=True))


def gradients(student, recompute: str, targets: tuple[str, ...], out) -> None:
    layout = initialise(recompute=recompute, seed=0)
    trainer = make_trainer(student, layout, adapter=AdapterConfig(rank=2, targets=targets))
    samples = Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))
    trainer.accumulate_gradients(batch_of(samples))
    torch.save({name: parameter.main_grad.clone() for name, parameter in trainer.parameters.items()}, out)
    shutdown()


@pytest.mark.parametrize("targets", [("qkv", "proj", "fc1", "fc2"), ("fc1", "fc2")])
def test_recomputed_layers_have_their_gradients(targets, tmp_path):
    """Without an input that requires a gradient, a recomputed layer has none, and nothing says so."""
    student = tiny.save(tiny.qwen3(), tmp_path / "student")
    found = {}
    for recompute in ("none", "selective", "full"):
        ranks.run(1, gradients, student, recompute, targets, tmp_path / recompute, logs=tmp_path / f"{recompute}-logs")
        found[recompute] = torch.load(tmp_path / recompute, weights_only=True)
    assert len(found["none"]) == 2 * 2 * sum(len(PROJECTIONS[target]) for target in targets)
    for name, gradient in found["none"].items():
        assert gradient.any() == (".lora_B." in name), "A's gradient is zero while B is"
        assert torch.equal(gradient, found["selective"][name]) and torch.equal(gradient, found["full"][name])


@pytest.mark.parametrize("full_distributions", [False, True])
def test_the_base_teaches_as_a_second_copy_of_it_would(full_distributions, layout, tmp_path):
    """And the adapter is on again afterwards, also where scoring fails."""
    student = tiny.save(tiny.qwen3(), tmp_path / "student")
    trainer = make_trainer(student, layout, adapter=AdapterConfig(rank=2), lr=0.05)
    samples = assign_token_weights("vold-unmasked", make_groups([[1.0, 0.0], [0.0, 1.0]]))
    trainer.step(batch_of([replace(sample, kl_weight=0.0) for sample in samples]))
    batch, before = batch_of(samples), trainer.logprobs(batch_of(samples))
    settings = dict(dtype=torch.float32, vocab_size=40, full_distributions=full_distributions)
    copy, base = Teacher(student, layout, **settings), BaseTeacher(trainer, student, layout, **settings)
    assert {p.data_ptr() for p in base._parameters()} == {p.data_ptr() for c in trainer.chunks for p in c.parameters()}
    field = "hidden_teacher_nE" if full_distributions else "logp_teacher_N"
    for one, other in zip(base.score(batch).micro_batches, copy.score(batch).micro_batches, strict=True):
        assert torch.equal(getattr(one, field), getattr(other, field)) and getattr(one, field).any()
    assert trainer.logprobs(batch) == before and trainer.chunks[0].training
    untrained = make_trainer(student, layout).logprobs(batch)
    assert any(abs(a - b) > 1e-3 for a, b in zip(before[0], untrained[0], strict=True)), "the adapter acts"


def test_a_self_teacher_is_an_average_of_adapters(layout, tmp_path):
    """The frozen weights are the student's own memory; A and B follow as any weight of an average does."""
    student, rate = tiny.save(tiny.qwen3(), tmp_path / "student"), 0.25
    objective = build_objective(ObjectiveConfig(preset="sdpo", average_rate=rate), 13)
    trainer = make_trainer(student, layout, adapter=AdapterConfig(rank=2), objective=objective, lr=0.05)
    pairs = list(trainer.average._pairs(trainer.chunks))
    assert {p.requires_grad for _, p in pairs} == {True, False}
    for average, current in pairs:
        assert (average.data_ptr() == current.data_ptr()) == (not current.requires_grad)
    before = {id(p): p.detach().clone() for _, p in pairs}
    plain = Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))
    trainer.step(batch_of(plain))
    for average, current in pairs:
        expected = before[id(current)].lerp(current.detach(), rate)
        torch.testing.assert_close(average.detach(), expected, rtol=1e-6, atol=1e-8)
