"""The verbs on a tiny world: what they write, that they resume bit for bit, and that a mistake is one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vold.commands import export
from vold.config import dump_config
from vold.config.schema import ExportConfig
from vold.data.packing import encode_text
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.evaluation import evaluator as evaluate
from vold.grading import Grader
from vold.models.tokenizer import load_tokenizer
from vold.run.run_dir import RunLog, check_run_dir, read_rows
from vold.train import rl, sft
from vold.train import teacher_traces as traces
from vold.train import training_run as training
from vold.train.groups import token_texts
from vold.types import Rollout, Verdict

TIMES = (
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_memory",
    "memory_gib",
    "rollout_tail",
    "rollout_tokens_per_second",
)


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def same_tensors(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def rl_run(tmp_path_factory, world, layout):
    """One uninterrupted run of four steps that saved after two and four; two updates a step, beta steered by the KL."""
    from vold.config import load_config, schema

    run_dir = tmp_path_factory.mktemp("runs") / "rl"
    overrides = [*world.overrides("rl", run_dir), "minibatches=2", "objective.target_kl=0.01"]
    config = load_config(schema.RlConfig, Path("vold/miniature/configs/rl.yaml").resolve(), overrides)
    rl.run(config)
    return config


def test_traces_then_sft_on_them(load, tmp_path, layout):
    overrides = ["sampling.max_new_tokens=30", "prompts_per_shard=5", "max_tokens=64"]
    config = load("traces", tmp_path / "traces", *overrides)
    traces.run(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    assert card["asked"] == 12 and card["failed"] == 0
    assert card["kept"] + card["truncated"] + card["too_long"] == 12
    assert card["sampling"]["temperature"] == 0.6
    assert Version(card["versions"]["torch"]).public == Version(torch.__version__).public
    assert card["kept"] > 0, "random weights end some answers"
    rows = load_dataset("parquet", data_files=str(config.run_dir / "traces" / "*.parquet"), split="train")
    assert len(rows) == card["kept"] and card["kept_tokens"] == sum(map(len, rows["response_ids"]))
    on_traces = [f"data={{path: {config.run_dir / 'traces'}, layout: traces}}", "steps=1"]
    student = load("sft", tmp_path / "sft", *on_traces)
    sft.run(student)
    assert read_rows(student.run_dir / "metrics.jsonl")[0]["loss"] > 0
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        traces.run(config)


def test_traces_are_never_mixed_with_an_earlier_attempts(load, tmp_path, layout):
    """Answers without a finished step: nothing but the part file shows that there was a run."""
    config = load("traces", tmp_path / "traces", "sampling.max_new_tokens=6")
    part = config.run_dir / "traces" / "shard-00000.part.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text('{"prompts": "0123", "answers": []}\n')
    (config.run_dir / "config.yaml").write_text(dump_config(config, "traces"))
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        traces.run(config)
    with pytest.raises(ValueError, match=r"shard-00000.part.jsonl answers other prompts than data.path now holds"):
        traces.run(config, resume=True)
    with pytest.raises(ValueError, match=r"every prompt exceeds prompt.max_tokens = 3; raise it"):
        traces.run(load("traces", tmp_path / "short", "prompt.max_tokens=3", "data.on_error=skip"))


def test_a_prompt_that_is_asked_twice_gets_one_trace(load, tmp_path, layout, world):
    rows = json.loads((world.data / "traces_prompts.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps([*rows, *rows[:5], {"no": "row"}]))
    overrides = [f"data.path={tmp_path / 'twice.json'}", "data.on_error=skip", "sampling.max_new_tokens=6"]
    config = load("traces", tmp_path / "traces", *overrides)
    traces.run(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    unique = len({json.dumps(row) for row in rows})
    assert card["asked"] == unique and card["rows_skipped"] == 1
    assert card["duplicates_removed"] == len(rows) + 5 - unique


class LossySampler:
    """Has lost every third prompt's answer by the time it hands the others over."""

    def stream(self, prompts, config, *, responses, seed, answered):
        return ([Rollout(one, (7, 8), (0.0, 0.0), "stop", "")] for place, one in enumerate(prompts) if place % 3)


def test_answers_that_never_came_are_counted(load, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(traces, "open_sampler", lambda *_, **__: LossySampler())
    config = load("traces", tmp_path / "traces", "sampling.sequences_per_call=6", "prompts_per_shard=6")
    traces.run(config)
    card = json.loads((config.run_dir / "traces" / "card.json").read_text())
    assert (card["asked"], card["kept"], card["failed"], card["kept_tokens"]) == (12, 8, 4, 16)


def test_sft_lowers_the_loss_and_exports_a_loadable_model(load, tmp_path, layout, world):
    image = f"{{path: {world.data / 'val_image.jsonl'}, layout: geometry3k}}"
    sampling = "{max_new_tokens: 4, temperature: 0.0}"
    evaluated = [f"evaluation={{every: 6, sampling: {sampling}, sets: {{image: {image}}}}}"]
    config = load("sft", tmp_path / "sft", "steps=12", "optimizer.lr=3e-3", *evaluated)
    sft.run(config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    handed_over = [row for row in rows if "parity_error" in row]
    assert [row["step"] for row in handed_over] == [6, 12] and all(row["parity_max"] < 1e-4 for row in handed_over)
    assert all(0.0 <= row["accuracy_image"] <= 1.0 for row in handed_over)
    model = AutoModelForImageTextToText.from_pretrained(config.run_dir / "model")
    before = AutoModelForImageTextToText.from_pretrained(world.student).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any("visual" in name for name in moved), "vision is frozen, the language model is not"
    assert any("embed_tokens" in name for name in moved)


def test_what_the_gate_saves_the_teacher():
    """Whole sequences, prompts included: the second and third of three are not read."""
    from vold.train.groups import teacher_metrics
    from vold.types import Prompt, Sample

    prompt = Prompt("p", (5, 6, 7), "")
    samples = [Sample(prompt, (1,) * length, 1.0, 1.0, weight) for length, weight in [(7, 0.3), (2, 0.0), (5, 0.0)]]
    saved = pytest.approx((5 + 8) / (10 + 5 + 8))
    assert teacher_metrics(samples, encode_text.length) == {"teacher_saved": saved, "teacher_failed": 0.0}


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


def test_a_character_of_several_tokens_is_shown_once():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    assert token_texts(Bytes(), [97, *"é".encode(), 98]) == ["a", "", "é", "b"]
    assert token_texts(Bytes(), [97, "é".encode()[0]]) == ["a", "\ufffd"]
    assert token_texts(Bytes(), [0xFF, 0xFF, 0xFF, 0xFF, 97]) == ["", "", "", "\ufffd" * 4, "a"]


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
    rl.run(rl_run, resume=True)
    name = "rank-00000.safetensors"
    assert same_tensors(*(run / "checkpoints" / "step-000004" / name for run in (whole, rl_run.run_dir)))
    state = [json.loads((run / "checkpoints/step-000004/state.json").read_text()) for run in (whole, rl_run.run_dir)]
    assert state[0] == state[1]
    assert timeless(read_rows(whole / "metrics.jsonl")) == timeless(read_rows(rl_run.run_dir / "metrics.jsonl"))
    assert read_rows(whole / "samples.jsonl") == read_rows(rl_run.run_dir / "samples.jsonl")
    assert same_tensors(whole / "model" / "model.safetensors", rl_run.run_dir / "model" / "model.safetensors")


def test_sampler_and_trainer_agree_at_another_temperature(load, tmp_path, layout):
    """Rollout, student and teacher log-probs are all at the rollout's temperature; the parity probe is at 1."""
    config = load("rl", tmp_path / "hot", "rollout.temperature=0.7", "steps=2", "evaluation.every=0")
    rl.run(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["mismatch_max"] < 1e-4 and row["parity_max"] < 1e-4


def test_a_student_that_teaches_itself(load, tmp_path, layout, monkeypatch):
    """SRPO through the whole stage. An untrained student is never right, so every third verdict here says it was."""
    found = lambda rows: [Verdict("wrong" if n % 3 else "correct", None, "test") for n in range(len(rows))]  # noqa: E731
    monkeypatch.setattr(Grader, "grade", lambda self, rows: found(rows))
    settings = ["objective={preset: srpo, top_k: 5}", "teacher=null", "steps=2", "evaluation.every=0"]
    config = load("rl", tmp_path / "srpo", *settings)
    rl.run(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["kl_tokens"] > 0 and row["kl_loss"] > 0 and row["pg_loss"] != 0
    assert row["kl_tokens"] < row["gradient_tokens"] == row["response_tokens"]
    assert (config.run_dir / "model" / "model.safetensors").is_file()


def test_stale_weights_raise_the_alarm(world, layout):
    """A sampler that missed an update is found out; one that got it is not."""
    from support.steps import OPTIMIZER, assign_token_weights, batch_of, make_groups
    from vold.rollout import ParityProbe, TransformersSampler
    from vold.trainer.trainer import Trainer

    sampler = TransformersSampler(world.student, dtype=torch.float32, device=torch.device("cpu"))
    numbers = dict(steps=5, dtype=torch.float32, vocab_size=54)
    trainer = Trainer(world.student, layout, OPTIMIZER.model_copy(update={"lr": 0.05}), **numbers)
    groups = make_groups([[1.0, 0.0, 0.0]])
    rollout = groups[0].rollouts[0]
    probe = ParityProbe([(rollout.prompt, rollout.response_ids)], encode_text, 1.05)
    assert probe.check(sampler, trainer.logprobs)["parity_max"] < 1e-4
    trainer.step(batch_of(assign_token_weights("grpo", groups)))
    with pytest.raises(ValueError, match=r"disagree after a weight sync.*parity_limit = 1.05"):
        probe.check(sampler, trainer.logprobs)
    sampler.load_weights(trainer.weights())
    assert probe.check(sampler, trainer.logprobs)["parity_max"] < 1e-4


def test_export_of_a_checkpoint_equals_the_exported_model(rl_run, tmp_path):
    export.export_model(ExportConfig(run=rl_run.run_dir, out=tmp_path / "exported"))
    assert same_tensors(tmp_path / "exported/model.safetensors", rl_run.run_dir / "model/model.safetensors")
    early = ExportConfig(run=rl_run.run_dir, out=tmp_path / "early", step=2)
    export.export_model(early)
    assert not same_tensors(tmp_path / "early/model.safetensors", rl_run.run_dir / "model/model.safetensors")


@pytest.fixture
def judged(load, tmp_path, world, layout, monkeypatch):
    """judged(*accuracies, resume) -> sft for five steps, each judged so and saved; one stays, and the best."""
    text = f"{{text: {{path: {world.data / 'val_text.json'}, layout: orz}}}}"
    evaluation = f"{{every: 1, best: text, sets: {text}, sampling: {{max_new_tokens: 1, temperature: 0.0}}}}"
    settings = [f"evaluation={evaluation}", "steps=5", "save_every=1", "keep_checkpoints=1"]
    config = load("sft", tmp_path / "judged", *settings)

    def run(*accuracies: float, resume: bool = False):
        given = iter(accuracies)
        monkeypatch.setattr(evaluate.Evaluator, "run", lambda *_: {"text": [next(given)]})
        monkeypatch.setattr(training, "summarise", lambda rows: {"accuracy": rows[0], "stderr": 0.0})
        sft.run(config, resume=resume)
        return config

    run.checkpoints = config.run_dir / "checkpoints"
    return run


def steps_of(checkpoints: Path) -> dict[str, list[int]]:
    """Which are there, and which one is the best."""
    found = [int(path.name[5:]) for path in checkpoints.glob("step-*")]
    return {"saved": sorted(found), "best": [int((checkpoints / "best").read_text()[5:])]}


def test_the_best_checkpoint_stays_and_can_be_exported(judged, tmp_path):
    run = judged(0.2, 0.5, 0.5, 0.3, 0.1).run_dir
    assert steps_of(judged.checkpoints) == {"saved": [2, 5], "best": [2]}, "of equals the earlier"
    for step in ("best", 2):
        export.export_model(ExportConfig(run=run, out=tmp_path / f"{step}", step=step))
    best, second, last = (path / "model.safetensors" for path in (tmp_path / "best", tmp_path / "2", run / "model"))
    assert same_tensors(best, second) and not same_tensors(best, last)


@pytest.mark.parametrize(("rest", "then"), [((0.5, 0.1), [2]), ((0.4, 0.6), [5])])
@pytest.mark.parametrize("pointer", ["step-000003\n", "garbage", None])
def test_a_resumed_run_knows_the_best(judged, rest, then, pointer):
    """By its log, whatever the pointer says: the run may have been killed before the pointer moved."""
    with pytest.raises(StopIteration):
        judged(0.2, 0.5, 0.3)
    assert steps_of(judged.checkpoints) == {"saved": [2, 3], "best": [2]}
    (judged.checkpoints / "best").unlink()
    if pointer:
        (judged.checkpoints / "best").write_text(pointer)
    judged(*rest, resume=True)
    assert steps_of(judged.checkpoints) == {"saved": sorted({5, *then}), "best": then}


def test_no_best_checkpoint(load, rl_run, tmp_path):
    with pytest.raises(ValueError, match=r"has no best checkpoint \(set evaluation.best\)"):
        export.export_model(ExportConfig(run=rl_run.run_dir, out=tmp_path / "out", step="best"))
    with pytest.raises(ValueError, match=r"evaluation.best = 'images' is none of evaluation.sets: text, image"):
        load("rl", tmp_path / "run", "evaluation.best=images")
    with pytest.raises(ValueError, match=r"evaluation.best = 'text' compares steps; set evaluation.every > 0"):
        load("rl", tmp_path / "run", "evaluation.best=text", "evaluation.every=0")


def test_images_count_in_the_length_of_an_evaluations_prompts(load, tmp_path, layout, world):
    """All ids would fit, but an image is seven of them."""
    image = f"evaluation.sets={{image: {{path: {world.data / 'val_image.jsonl'}, layout: geometry3k}}}}"
    fits = load("eval", tmp_path / "fits", image)
    problems, tokenizer = load_problems(fits.evaluation.sets["image"]), load_tokenizer(world.student)
    longest = max(len(prompt.token_ids) for prompt in build_prompts(problems, tokenizer, fits.prompt))
    evaluate.run(load("eval", tmp_path / "fits", image, f"prompt.max_tokens={longest + 6}"))
    with pytest.raises(ValueError, match=rf"prompt of {longest + 6} tokens exceeds prompt.max_tokens = {longest + 5};"):
        evaluate.run(load("eval", tmp_path / "too long", image, f"prompt.max_tokens={longest + 5}"))


def test_eval_reads_text_and_images(load, tmp_path, layout, world, monkeypatch):
    config, shown = load("eval", tmp_path / "eval", "evaluation.sampling.sequences_per_call=4"), []
    monkeypatch.setattr(RunLog, "live", lambda self, note: shown.append(note))
    bar = []
    monkeypatch.setattr(RunLog, "expect", lambda self, total: bar.append(total))
    monkeypatch.setattr(RunLog, "advance", lambda self: bar.append(1))
    evaluate.run(config)
    assert bar == [12, *[1] * 12], "the bar counts problems"
    counts = [f"{answered}/6 answered" for answered in range(7)]
    assert shown == [*(f"{name}: {count}" for name in ("text", "image") for count in counts), ""]
    result = json.loads((config.run_dir / "evaluation.json").read_text())
    assert result["sets"].keys() == {"text", "image"} and result["sets"]["image"]["n"] == 6
    rows = read_rows(config.run_dir / "samples.jsonl")
    assert sum(bool(row["images"]) for row in rows) == 6


def test_eval_of_several_answers_to_a_problem(load, tmp_path, layout, world):
    with pytest.raises(ValueError, match=r"responses_per_problem = 3 greedy answers are all the same"):
        load("eval", tmp_path / "eval", "evaluation.responses_per_problem=3")
    several = ["evaluation.responses_per_problem=3", "evaluation.sampling.temperature=1.0"]
    config = load("eval", tmp_path / "eval", *several)
    evaluate.run(config)
    rows = read_rows(config.run_dir / "samples.jsonl")
    assert [row["prompt_id"] for row in rows[:4]] == ["val_text:1"] * 3 + ["val_text:2"]
    assert len({row["response"] for row in rows}) > 12, "siblings differ"
    found = json.loads((config.run_dir / "evaluation.json").read_text())
    text = found["sets"]["text"]
    assert (text["k"], text["n"], text["p95_length"]) == (3, 6, 8) and found["judge"] == "rule"
    assert text["truncated"] == sum(row["finish_reason"] == "length" for row in rows if row["set"] == "text") / 18
    assert 0.0 <= text["majority"] <= 1.0


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_a_run_directory_is_never_mixed(rl_run, load, tmp_path):
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        rl.run(rl_run)
    with pytest.raises(ValueError, match=r"--resume: optimizer.lr was 0.0003 and is now 1.0"):
        rl.run(rl_run.model_copy(update={"optimizer": rl_run.optimizer.model_copy(update={"lr": 1.0})}), resume=True)
    with pytest.raises(ValueError, match="holds no run; leave --resume out"):
        rl.run(load("rl", tmp_path / "nothing"), resume=True)
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
        ("student=nowhere", "nowhere has no tokenizer.json"),
        ("prompt.max_tokens=3", "exceeds prompt.max_tokens = 3; raise it"),
        ("optimizer.warmup_steps=50", "optimizer.warmup_steps = 50 exceeds steps = 4"),
    ],
)
def test_mistakes_are_one_line(load, tmp_path, layout, override, says):
    with pytest.raises(ValueError) as error:
        rl.run(load("rl", tmp_path / "run", override))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_prints_one_line_and_exits_with_2(world, torchrun, tmp_path):
    run = torchrun(
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


def test_a_stage_gives_the_same_numbers_at_every_layout(even_world, torchrun, tmp_path, layout):
    """Two processes over gloo: rollouts, rewards, losses, evaluation and the exported model are those of one; with
    rollouts drawn ahead, so that no collective may be left to the thread that draws them."""
    from vold.config import load_config, schema

    settings = [*even_world.overrides("rl", tmp_path), "steps=2", "evaluation.every=2", "rollout.sequences_per_call=6"]
    settings += ["rollout.lag=1", "evaluation.best=image"]
    settings += ["objective.preset=vold-gspo", "minibatches=2"]  # a ratio that couples tokens, at every layout
    config = Path("vold/miniature/configs/rl.yaml").resolve()
    alone = load_config(schema.RlConfig, config, [*settings, f"run_dir={tmp_path / 'alone'}"])
    rl.run(alone)
    expected = timeless(read_rows(alone.run_dir / "metrics.jsonl"))
    model = load_file(alone.run_dir / "model" / "model.safetensors")
    each = [word for name, overrides in LAYOUTS.items() for word in ("--", f"run_dir={tmp_path / name}", *overrides)]
    run = torchrun(1, Path(__file__).with_name("layouts.py"), config, *settings, *each)
    assert run.returncode == 0 and run.stdout.endswith("ok\n"), run.stdout + run.stderr
    for name in LAYOUTS:
        run_dir = tmp_path / name
        for row, wanted in zip(timeless(read_rows(run_dir / "metrics.jsonl")), expected, strict=True):
            assert row.keys() == wanted.keys()
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
        for key, tensor in load_file(run_dir / "model" / "model.safetensors").items():
            torch.testing.assert_close(tensor, model[key], rtol=0, atol=1e-4, msg=f"{name} {key}")
