"""RL on text and images: who reads what, that sampler, trainer and teacher read the same, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from support.steps import VOCAB_SIZE, gradients, make_trainer, relative
from vold.commands import export
from vold.config.schema import DataConfig, ExportConfig, PromptConfig
from vold.data.packing import pack
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.miniature.tokenizer import IMAGE, TOKEN_ID
from vold.models.images import load_prompt_encoder
from vold.objectives.visual_advantage import degrade, token_advantage, weigh_siblings
from vold.run.job import Job
from vold.run.run_dir import read_rows
from vold.run.timers import PhaseTimers
from vold.teacher import Teacher, TeacherPromptEncoder, TeacherView, VisualAdvantageTeacher
from vold.train.image_sensitivity import ImageSensitivity
from vold.train.rl import train_rl
from vold.train.sft import train_sft
from vold.types import Prompt, Sample

PROMPT = PromptConfig(suffix="", max_tokens=64)


@pytest.fixture(scope="module")
def mixed(world):
    """Six problems with an image and six of text in one file."""
    text = [row[0]["value"] for row in json.loads((world.data / "val_text.json").read_text())]
    rows = [json.loads(line) for line in (world.data / "val_image.jsonl").read_text().splitlines()]
    rows += [{"problem": question, "answer": "3", "images": []} for question in text]
    path = world.data / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def configured(load, tmp_path, mixed):
    """configured(name, *overrides) -> two steps of rl on the mixed problems."""

    def build(name: str, *overrides: str):
        few = ["steps=2", "prompts_per_step=6", "evaluation.every=0", "save_every=0", "data.layout=geometry3k"]
        return load("rl", tmp_path / name, *few, f"data.path={mixed}", *overrides)

    return build


def metrics(config) -> list[dict]:
    return read_rows(config.run_dir / "metrics.jsonl")


# -- whole runs ----------------------------------------------------------------------------------------------------


def test_a_seeing_teacher_reads_the_images_too(configured, tiny_qwen3_vl_dir, layout):
    config = configured("seeing", f"teacher={tiny_qwen3_vl_dir}", "objective.preset=opd")
    train_rl(config)
    for row in metrics(config):
        assert row["mismatch_max"] < 1e-4, "sampler and trainer agree on responses to images"
        assert row["kl_tokens"] == row["response_tokens"] and row["kl_teacher"] > 1e-3
        assert row["teacher_skipped_images"] == row["teacher_saved"] == 0


@pytest.mark.parametrize("model", ["tiny_qwen3_vl_dir", "tiny_qwen3_5_dir"])
def test_a_model_is_its_own_teacher_without_any_divergence(model, configured, request, layout):
    """As student and as teacher, sampled and trained; its mergers are trained, synced and exported."""
    model = request.getfixturevalue(model)
    same = [f"student={model}", f"teacher={model}", "objective.preset=opd"]
    config = configured("self", *same, "vision.train_merger=true", "objective.beta=1.0")
    train_rl(config)
    first, second = metrics(config)
    assert first["kl_teacher"] < 1e-9 and first["kl_tokens"] > 0
    assert second["mismatch_max"] < 1e-4 and second["parity_max"] < 1e-4


def test_mergers_are_trained_handed_over_saved_and_exported(configured, world, tmp_path, layout):
    config = configured("merger", "objective.preset=grpo", "objective.beta=0.0", "vision.train_merger=true", "seed=1")
    train_rl(config)
    assert all(row["parity_max"] < 1e-4 for row in metrics(config))
    export.export_model(ExportConfig(run=config.run_dir, out=tmp_path / "exported"))
    before, after, again = (
        load_file(path / "model.safetensors")
        for path in (world.student, config.run_dir / "model", tmp_path / "exported")
    )
    assert all(torch.equal(after[name], again[name]) for name in after)
    trained = any(row["grad_norm"] for row in metrics(config))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not trained or {name for name in moved if "visual" in name} == {n for n in before if "merger" in n}


def test_a_text_teacher_has_no_say_on_images(configured, layout, capsys):
    config = configured("blind", "objective.preset=opd")
    train_rl(config)
    assert "reads text only and 6 of 12 problems have images: their responses get no KL term" in capsys.readouterr().out
    for row in metrics(config):
        assert 0 < row["kl_tokens"] < row["response_tokens"]
        assert 0 < row["teacher_skipped_images"] < 18 and row["teacher_saved"] > 0
    assert sum(row["teacher_skipped_images"] for row in metrics(config)) == 18, (
        "three responses to each image, once an epoch"
    )


def test_a_text_teacher_alone_with_images_is_a_mistake(configured, world, layout):
    config = configured("all", f"data.path={world.data / 'val_image.jsonl'}")
    with pytest.raises(
        ValueError, match=r"reads text only and 6 of 6 problems have images; choose a vision-language teacher"
    ):
        train_rl(config)


def test_mergers_that_no_image_would_teach_are_a_mistake(load, tmp_path, layout):
    for verb, train in (("rl", train_rl), ("sft", train_sft)):
        with pytest.raises(ValueError, match=r"vision\.train_merger = true, but no training prompt has an image"):
            train(load(verb, tmp_path / verb, "vision.train_merger=true"))
    with pytest.raises(ValueError, match=r"image_sensitivity_every = 5, but no training prompt has an image; set"):
        train_rl(load("rl", tmp_path / "rl", "image_sensitivity_every=5"))


def test_a_stray_image_token_is_a_mistake(world, tiny_student_dir):
    encode = load_prompt_encoder(tiny_student_dir)
    assert encode.length(Prompt("fine", (1, 2), "")) == 2
    with pytest.raises(ValueError, match="row 3: 0 images but 1 image-pad tokens in its text"):
        encode.length(Prompt("row 3", (1, TOKEN_ID[IMAGE]), ""))


def test_a_template_that_leaves_images_out_is_named(tiny_student_dir):
    encode = load_prompt_encoder(tiny_student_dir)
    with pytest.raises(ValueError, match=r"row 4: 1 images, and its prompt has room for 0: .*prompt\.chat_template"):
        encode.length(Prompt("row 4", (1, 2), "", images=(Path("a.png"),)))


def test_a_checkpoint_without_an_image_processor_is_a_mistake(tiny_student_dir, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_student_dir / name)
    with pytest.raises(ValueError, match=r"has no image processor: copy preprocessor_config\.json"):
        load_prompt_encoder(tmp_path)


def test_images_count_in_prompt_max_tokens(configured, layout):
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens exceeds prompt.max_tokens = 8"):
        train_rl(configured("long", "prompt.max_tokens=8"))


def test_a_teacher_that_looks_twice(configured, tiny_qwen3_vl_dir, layout):
    config = configured(
        "twice",
        *(f"teacher={tiny_qwen3_vl_dir}", "objective.preset=opd", "objective.visual_advantage=true"),
        "image_sensitivity_every=2",
    )
    train_rl(config)
    for row in metrics(config):
        assert row["visual_advantage"] > 0 and 0.1 < row["visual_top_share"] < 1
        assert ("image_sensitivity" in row) == (row["step"] == 2)
    with pytest.raises(
        ValueError, match=r"reads text only; objective\.visual_advantage needs a vision-language teacher"
    ):
        train_rl(configured("blindly", "objective.visual_advantage=true"))


# -- the teacher's own reading -------------------------------------------------------------------------------------


@pytest.fixture
def samples(mixed, world):
    """Two responses, of unequal length, to each of four problems."""
    problems = load_problems(DataConfig(path=mixed, layout="geometry3k"))
    chosen = [problems[place] for place in (0, 7, 1, 8)]
    prompts = build_prompts(chosen, AutoTokenizer.from_pretrained(world.student), PROMPT)
    responses = [tuple(range(10, 10 + length)) for length in (4, 1, 9, 2, 5, 6, 3, 8)]
    return chosen, [Sample(prompts[n // 2], ids, 0.0, 0.0, float(n != 2)) for n, ids in enumerate(responses)]


@pytest.mark.parametrize("offload", [False, True])
def test_scores_are_those_of_the_teachers_own_prompts(samples, world, tiny_qwen3_vl_dir, layout, offload):
    """Against transformers, prompt by prompt, with the processor's own count of image tokens."""
    problems, samples = samples
    encode = TeacherPromptEncoder(tiny_qwen3_vl_dir, TeacherView(tiny_qwen3_vl_dir, problems, PROMPT))
    numbers = dict(dtype=torch.float32, vocab_size=VOCAB_SIZE, encode=encode, patches_per_pass=24, offload=offload)
    teacher = Teacher(tiny_qwen3_vl_dir, layout, **numbers)
    batch = pack(teacher.drop_unscorable(samples), max_tokens=60, encode=load_prompt_encoder(world.student))
    assert len(batch.micro_batches) > 1 and sum(len(micro.sample_B) for micro in batch.micro_batches) == 7
    for micro in teacher.score(batch).micro_batches:
        for sequence, place in enumerate(micro.sample_B):
            found = micro.logp_teacher_N[micro.sequence_N == sequence]
            expected = by_transformers(tiny_qwen3_vl_dir, samples[place])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_kl_weights_are_those_of_visual_advantage(samples, world, tiny_qwen3_vl_dir, layout, absolute):
    """From two readings by transformers; prompts of text keep theirs. And they change what is learnt."""
    problems, samples = samples
    view = TeacherView(tiny_qwen3_vl_dir, problems, PROMPT)
    encode, degraded = (TeacherPromptEncoder(tiny_qwen3_vl_dir, view, change) for change in (None, degrade))
    numbers = dict(dtype=torch.float32, vocab_size=VOCAB_SIZE, encode=encode)
    batch = pack(samples, max_tokens=60, encode=load_prompt_encoder(world.student))
    plain = Teacher(tiny_qwen3_vl_dir, layout, **numbers).score(batch)
    numbers |= {"degraded": degraded, "absolute": absolute}
    visual = VisualAdvantageTeacher(tiny_qwen3_vl_dir, layout, **numbers).score(batch)
    expected = {place: torch.ones(len(sample.response_ids)) for place, sample in enumerate(samples)}
    for pair in ((0, 1), (4, 5)):  # siblings that answer an image
        readings = [
            [by_transformers(tiny_qwen3_vl_dir, samples[p], change) for p in pair] for change in (None, degrade)
        ]
        pairs = zip(*readings, strict=True)
        factors = weigh_siblings([token_advantage(*logps, absolute=absolute) for logps in pairs])
        expected |= {p: 2 * len(factor) * factor for p, factor in zip(pair, factors, strict=True)}
    for before, after in zip(plain.micro_batches, visual.micro_batches, strict=True):
        for sequence, place in enumerate(before.sample_B):
            mine = before.sequence_N == sequence
            torch.testing.assert_close(after.kl_weight_N[mine], expected[place], rtol=1e-4, atol=1e-5)
    trainer = make_trainer(world.student, layout)
    assert relative(gradients(trainer, visual), gradients(trainer, plain)) > 1e-2


def test_visual_reliance_is_the_difference_of_two_readings(samples, world, layout, tmp_path):
    """By transformers, over the tokens of responses to images; which of them have a gradient does not matter."""
    _, samples = samples
    student, prompts = world.student, [sample.prompt for sample in samples]
    reliance = ImageSensitivity(
        prompts, load_prompt_encoder(student), load_prompt_encoder(student, degrade), every=3, max_tokens=60
    )
    trainer, job = make_trainer(student, layout), Job(layout, torch.float32, NoLog())
    assert reliance.measure(1, samples, trainer, job) == reliance.measure(2, samples[2:4], trainer, job) == {}
    found = reliance.measure(2, samples, trainer, job)
    readings = [[by_transformers(student, samples[p], change) for p in (0, 1, 4, 5)] for change in (None, degrade)]
    difference = torch.cat(readings[0]) - torch.cat(readings[1])
    assert difference.abs().max() > 1e-3
    assert found == {"image_sensitivity": pytest.approx(float(difference.mean()), abs=1e-5)}


class NoLog:
    phase = PhaseTimers()


def by_transformers(directory, sample, change=None) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(directory), AutoImageProcessor.from_pretrained(directory)
    text, own = sample.prompt.text, "<w0>" if "qwen3_vl" in model.config.model_type else ""
    if sample.prompt.images:
        pictures = [Image.open(path).convert("RGB") for path in sample.prompt.images]
        seen = processor(images=[change(p) if change else p for p in pictures], return_tensors="pt")
        [count] = (seen["image_grid_thw"].prod(-1) // 4).tolist()
        assert count == (6 if own else 7), "the student has 7"
        text = text.replace("<image>", IMAGE * count)
    prompt = tokenizer(f"{own}<user>{text}<asst>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *sample.response_ids.tolist()]])
    images = {}
    if sample.prompt.images:
        images = {**seen, "mm_token_type_ids": (ids == TOKEN_ID[IMAGE]).int()}
    with torch.no_grad():
        logits = model(ids, **images).logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE]
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids.tolist())[:, None])[:, 0]
