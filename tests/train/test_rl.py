"""`vold rl` on a tiny world: what it writes, that it resumes bit for bit, and that a mistake is one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.runs import same_tensors, timeless
from vold.grading import Grader
from vold.run.resumption import check_run_dir
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl
from vold.types import Verdict


def test_rl_writes_metrics_samples_and_evaluations(rl_run):
    rows = read_rows(rl_run.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["mismatch_max"] < 1e-4, "sampler and trainer agree on the sampled tokens"
        assert row["parity_error"] < 1.0001
        assert row["response_tokens"] > 0 and row["kl_teacher"] > 0
    betas = [row["beta"] for row in rows]
    assert betas == pytest.approx([0.3, 0.3 * 1.02, 0.3 * 1.02**2, 0.3 * 1.02**3]), "the KL is far above its target"
    assert 0.0 <= rows[-1]["accuracy_image"] <= 1.0 and "accuracy_image" not in rows[0]
    samples = read_rows(rl_run.run_dir / "samples.jsonl")
    shown = {"step", "prompt", "response", "extracted", "gold", "reward", "advantage", "mean_kl"}
    assert shown <= samples[0].keys()
    assert len(samples) == 4 * rl_run.samples_per_step


def test_samples_show_student_and_teacher_on_each_token(rl_run):
    samples = read_rows(rl_run.run_dir / "samples.jsonl")
    scored = [row for row in samples if row["mean_kl"] is not None]
    assert scored, "some response failed and was scored by the teacher"
    for row in scored:
        assert len(row["tokens"]) == len(row["logp"]) == len(row["logp_teacher"]) == row["response_tokens"]
        spelled = iter("".join(row["tokens"]))
        assert all(letter in spelled for letter in row["response"]), "the response, less its special tokens"
        gaps = [a - b for a, b in zip(row["logp"], row["logp_teacher"], strict=True)]
        assert sum(0.5 * gap**2 for gap in gaps) / len(gaps) == pytest.approx(row["mean_kl"], rel=0, abs=0.01)
    assert all("logp_teacher" not in row for row in samples if row["mean_kl"] is None), "the teacher was not asked"
    timeline = read_rows(rl_run.run_dir / "timeline.jsonl")
    assert [row["step"] for row in timeline] == [1, 2, 3, 4]
    assert {"rollout", "train", "sync"} <= {name for name, *_ in timeline[-1]["intervals"]}


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(rl_run, tmp_path):
    """The run is put back to the moment after step 2 was saved, with a row too many in its log, and resumed."""
    whole = tmp_path / "whole"
    shutil.move(rl_run.run_dir, whole)
    shutil.copytree(whole, rl_run.run_dir)
    shutil.rmtree(rl_run.run_dir / "checkpoints" / "step-000004")
    shutil.rmtree(rl_run.run_dir / "model")
    (rl_run.run_dir / "checkpoints" / "latest").write_text("step-000002\n")
    metrics = (rl_run.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (rl_run.run_dir / "metrics.jsonl").write_text("".join(metrics[:3]) + '{"step": 4, "rew')
    train_rl(rl_run, resume=True)
    name = "rank-00000.safetensors"
    assert same_tensors(*(run / "checkpoints" / "step-000004" / name for run in (whole, rl_run.run_dir)))
    state = [json.loads((run / "checkpoints/step-000004/state.json").read_text()) for run in (whole, rl_run.run_dir)]
    assert state[0] == state[1]
    assert timeless(read_rows(whole / "metrics.jsonl")) == timeless(read_rows(rl_run.run_dir / "metrics.jsonl"))
    assert read_rows(whole / "samples.jsonl") == read_rows(rl_run.run_dir / "samples.jsonl")
    assert same_tensors(whole / "model" / "model.safetensors", rl_run.run_dir / "model" / "model.safetensors")


def test_a_finished_run_is_lengthened_with_smaller_microbatches_and_says_what_it_does(rl_run, tmp_path, capfd):
    """Off a terminal: what starts, a line a step, what was written; the finished model of fewer steps is kept."""
    run_dir = tmp_path / "longer"
    shutil.copytree(rl_run.run_dir, run_dir)
    half = rl_run.microbatch_tokens // 2
    config = rl_run.model_copy(update={"run_dir": run_dir, "steps": 5, "microbatch_tokens": half})
    train_rl(config, resume=True)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert f"{run_dir}: steps 5 to 5 · student {rl_run.student} · teacher {rl_run.teacher} · rollouts by " in out
    assert any(line.startswith("rl 5/5 · reward ") and line.endswith(" left") for line in lines)
    assert any(line.startswith("evaluation after step 5: ") and " ± " in line for line in lines)
    assert lines[-1] == f"finished: {run_dir / 'model'}; to look at it: vold report {run_dir}"
    assert "vold: --resume: steps was 4 and is now 5: a schedule" in err
    assert f"microbatch_tokens was {rl_run.microbatch_tokens} and is now {half}: sums are rounded" in err
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert same_tensors(rl_run.run_dir / "model/model.safetensors", run_dir / "model-step-4/model.safetensors")
    assert not same_tensors(run_dir / "model/model.safetensors", run_dir / "model-step-4/model.safetensors")
    logged = (run_dir / "log.txt").read_text()
    assert all(line in logged for line in lines[-3:]) and "seconds of step 5: " in logged and "saved after" in logged
    with pytest.raises(ValueError, match=r"--resume: 5 steps are done; steps = 3 is fewer"):
        train_rl(config.model_copy(update={"steps": 3}), resume=True)


def test_a_run_that_lost_its_logs_in_a_crash_continues_exactly_and_elsewhere(rl_run, tmp_path, capfd):
    """metrics.jsonl, which has steered beta, has lost a step and prompts.jsonl everything; the folder was moved."""
    run_dir, name = tmp_path / "moved", "rank-00000.safetensors"
    shutil.copytree(rl_run.run_dir, run_dir)
    config, checkpoints = rl_run.model_copy(update={"run_dir": run_dir}), run_dir / "checkpoints"
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)

    def crash() -> None:
        shutil.rmtree(checkpoints / "step-000004")
        shutil.rmtree(run_dir / "model")
        (checkpoints / "latest").write_text("step-000002\n")
        (run_dir / "metrics.jsonl").write_text(metrics[0])
        (run_dir / "prompts.jsonl").unlink(missing_ok=True)

    crash()
    train_rl(config, resume=True)
    assert same_tensors(*(run / "checkpoints" / "step-000004" / name for run in (rl_run.run_dir, run_dir)))
    said = capfd.readouterr().err
    assert f"vold: {run_dir}/metrics.jsonl: step 2 is missing since the checkpoint of step 2" in said
    assert f"vold: {run_dir}/prompts.jsonl: steps 1-2 are missing since the checkpoint of step 2" in said

    crash()  # a checkpoint of an older vold has only the logs to continue from
    manifest = json.loads((checkpoints / "step-000002" / "manifest.json").read_text())
    del manifest["sha256"]["steering.json"]
    (checkpoints / "step-000002" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"metrics.jsonl ends at step 1 and the checkpoint at 2, from whose beta"):
        train_rl(config, resume=True)


def test_sampler_and_trainer_agree_at_another_temperature(load, tmp_path, layout):
    """Rollout, student and teacher log-probs are all at the rollout's temperature; the parity probe is at 1."""
    config = load("rl", tmp_path / "hot", "rollout.temperature=0.7", "steps=2", "evaluation.every=0")
    train_rl(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["mismatch_max"] < 1e-4 and row["parity_max"] < 1e-4


def test_a_student_that_teaches_itself(load, tmp_path, layout, monkeypatch):
    """SRPO through the whole stage. An untrained student is never right, so every third verdict here says it was."""
    found = lambda rows: [Verdict("wrong" if n % 3 else "correct", None, "test") for n in range(len(rows))]  # noqa: E731
    monkeypatch.setattr(Grader, "grade", lambda self, rows: found(rows))
    settings = ["objective={preset: srpo, top_k: 5}", "teacher=null", "steps=2", "evaluation.every=0"]
    config = load("rl", tmp_path / "srpo", *settings)
    train_rl(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["kl_tokens"] > 0 and row["kl_loss"] > 0 and row["pg_loss"] != 0
    assert row["kl_tokens"] < row["gradient_tokens"] == row["response_tokens"]
    assert (config.run_dir / "model" / "model.safetensors").is_file()


def test_a_run_directory_is_never_mixed(rl_run, load, tmp_path):
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        train_rl(rl_run)
    with pytest.raises(ValueError, match=r"--resume: optimizer.lr was 0.0003 and is now 1.0"):
        train_rl(rl_run.model_copy(update={"optimizer": rl_run.optimizer.model_copy(update={"lr": 1.0})}), resume=True)
    with pytest.raises(ValueError, match="holds no run; leave --resume out"):
        train_rl(load("rl", tmp_path / "nothing"), resume=True)
    free = {"parallel": rl_run.parallel.model_copy(update={"tp": 2, "pp": 2}), "save_async": True}
    free |= {"evaluation": rl_run.evaluation.model_copy(update={"best": "image"}), "image_sensitivity_every": 2}
    elsewhere = rl_run.model_copy(update=free)
    check_run_dir(elsewhere, "rl", resume=True)  # another layout is the same run
    engines = [f"{section}.urls=[http://127.0.0.1:8001]" for section in ("rollout.vllm", "teacher_vllm")]
    engines += ["minibatches=2", "objective.target_kl=0.01"]  # as in rl_run
    check_run_dir(load("rl", rl_run.run_dir, *engines), "rl", resume=True)  # so are other engines
    with pytest.raises(ValueError, match=r"--resume: rollout.top_p was 1.0 and is now 0.5"):
        check_run_dir(load("rl", rl_run.run_dir, *engines, "rollout.top_p=0.5"), "rl", resume=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is damaged; write the run's own config back"):
        check_run_dir(load("rl", tmp_path / "damaged"), "rl", resume=True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("teacher=null", "objective.preset = 'vold' needs a teacher; set teacher: PATH"),
        ("microbatch_tokens=20", "microbatch_tokens = 20 cannot hold prompt.max_tokens + rollout.max_new_tokens = 76"),
        ("objective.preset=grop", "choose one of grpo, vold"),
        ("data.path=nothing.json", "data file nothing.json does not exist"),
        ("data.layout=gsm8k", "train.json row 1: not a row of layout 'gsm8k'"),
        ("student=nowhere", "nowhere has no config.json"),
        ("prompt.max_tokens=3", "exceeds prompt.max_tokens = 3; raise it"),
        ("optimizer.warmup_steps=50", "optimizer.warmup_steps = 50 exceeds steps = 4"),
    ],
)
def test_mistakes_are_one_line(load, tmp_path, layout, override, says):
    with pytest.raises(ValueError) as error:
        train_rl(load("rl", tmp_path / "run", override))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_prints_one_line_and_exits_with_2(world, launch, tmp_path):
    run = launch(
        1,
        "-m",
        "vold",
        "rl",
        "vold/miniature/configs/rl.yaml",
        *world.overrides("rl", tmp_path / "x"),
        "rollout.temprature=1",
    )
    assert run.returncode == 2
    assert (
        run.stderr
        == "vold: vold/miniature/configs/rl.yaml: unknown key rollout.temprature; did you mean temperature?\n"
    )


def test_a_mistake_on_two_ranks_is_one_sentence(world, torchrun, tmp_path):
    """Usually one line; on a machine where rank 0 is seconds behind, rank 1 may say the same before it is ended."""
    overrides = [*world.overrides("rl", tmp_path / "x"), "data.path=nothing.json"]
    run = torchrun(2, "-m", "vold", "rl", "vold/miniature/configs/rl.yaml", *overrides)
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if line.startswith(("vold:", "vold ("))]
    assert {line.split(": ", 1)[1] for line in lines} == {"data file nothing.json does not exist"}


@pytest.fixture(scope="module")
def even_world(world, tmp_path_factory):
    """The world with students and teachers of an even number of layers."""
    from vold.miniature import models

    made = {}
    for name, config in {"student": models.base_config(), "teacher": models.teacher_config()}.items():
        config.get_text_config().num_hidden_layers = 4
        config.get_text_config().layer_types = ["full_attention"] * 4
        made[name] = tmp_path_factory.mktemp(name)
        models.save_checkpoint(models.new_model(config, seed=0), made[name])
    return replace(world, **made)


LAYOUTS = {
    "dp2": ["parallel.distributed_optimizer=true"],
    "tp2": ["parallel.tp=2", "parallel.sp=true", "parallel.recompute=selective"],
    "pp2": ["parallel.pp=2", "parallel.vpp=2", "teacher_offload=true", "parallel.recompute=full"],
}


def test_a_stage_gives_the_same_numbers_at_every_layout(even_world, launch, tmp_path, layout):
    """Two processes over gloo: rollouts, rewards, losses, evaluation and the exported model are those of one; with
    rollouts drawn ahead, so that no collective may be left to the thread that draws them."""
    from vold.config import load_config, schema

    settings = [*even_world.overrides("rl", tmp_path), "steps=2", "evaluation.every=2", "rollout.sequences_per_call=6"]
    settings += ["rollout.lag=1", "evaluation.best=image"]
    settings += ["objective.preset=vold-gspo", "minibatches=2"]  # a ratio that couples tokens, at every layout
    config = Path("vold/miniature/configs/rl.yaml").resolve()
    alone = load_config(schema.RlConfig, config, [*settings, f"run_dir={tmp_path / 'alone'}"])
    train_rl(alone)
    expected = timeless(read_rows(alone.run_dir / "metrics.jsonl"))
    model = load_file(alone.run_dir / "model" / "model.safetensors")
    each = [word for name, overrides in LAYOUTS.items() for word in ("--", f"run_dir={tmp_path / name}", *overrides)]
    run = launch(1, Path(__file__).with_name("layouts.py"), config, *settings, *each)
    assert run.returncode == 0 and run.stdout.endswith("ok\n"), run.stdout + run.stderr
    for name in LAYOUTS:
        run_dir = tmp_path / name
        for row, wanted in zip(timeless(read_rows(run_dir / "metrics.jsonl")), expected, strict=True):
            assert row.keys() == wanted.keys()
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
        for key, tensor in load_file(run_dir / "model" / "model.safetensors").items():
            torch.testing.assert_close(tensor, model[key], rtol=0, atol=1e-4, msg=f"{name} {key}")
