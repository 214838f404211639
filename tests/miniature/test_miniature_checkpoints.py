"""Checkpoint directories, batches and the two pretraining loops on shrunken settings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, GenerationConfig

from vold.miniature import make, models
from vold.miniature.data import DataSizes
from vold.miniature.examples import IGNORED, BaseMixture, base_example, collate, facts_example, teacher_example
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.measure import Checkpoint, boxed, load_image_items, load_text_items, measure_world
from vold.miniature.pretrain import LOG_FILE, TEACHER_PHASE, make_base, make_teacher, schedule
from vold.miniature.tokenizer import EOS, IMAGE, MODEL_VOCAB_SIZE, PAD, TOKEN_ID, make_tokenizer
from vold.miniature.world import apply, patchify, render, solve

TOKENIZER = make_tokenizer()
GUESS_LAST = BaseMixture(facts=0.0, twice=0.0, guess_last_operand=True)


def test_patchify_equals_the_saved_processor(world):
    processor = AutoImageProcessor.from_pretrained(world.base)
    grey_BHW = render(["7*9+5*3", "0-1-2-3", "9*9*9*9"], np.random.default_rng(0))
    out = processor(images=[Image.fromarray(grey).convert("RGB") for grey in grey_BHW], return_tensors="np")
    np.testing.assert_allclose(patchify(grey_BHW), out["pixel_values"], atol=1e-6)
    assert out["image_grid_thw"].tolist() == [[1, 2, 14]] * 3


def test_configs_agree_and_name_their_endings(world):
    teacher, base = AutoConfig.from_pretrained(world.teacher), AutoConfig.from_pretrained(world.base)
    assert (teacher.model_type, base.model_type) == ("qwen3", "qwen2_5_vl")
    assert teacher.vocab_size == base.text_config.vocab_size == MODEL_VOCAB_SIZE
    assert teacher.tie_word_embeddings and base.tie_word_embeddings
    assert TOKENIZER.convert_ids_to_tokens(base.image_token_id) == IMAGE
    for directory, text in ((world.teacher, teacher), (world.base, base.text_config)):
        assert (text.eos_token_id, text.pad_token_id) == (TOKEN_ID[EOS], TOKEN_ID[PAD])
        generation = GenerationConfig.from_pretrained(directory)
        assert (generation.eos_token_id, generation.pad_token_id) == (TOKEN_ID[EOS], TOKEN_ID[PAD])


@pytest.mark.parametrize("image", [False, True])
def test_a_saved_model_computes_the_same_after_loading(tmp_path, image):
    model = models.new_model(models.base_config(), seed=7).eval()
    models.save_checkpoint(model, tmp_path / "base")
    rng = np.random.default_rng(1)
    batch = collate([base_example(rng, GUESS_LAST, image=image) for _ in range(3)], TOKENIZER, rng)
    with torch.no_grad():
        expected, loaded = model(**batch).logits, Checkpoint(tmp_path / "base").model(**batch).logits
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)


def test_supervised_tokens_are_the_response():
    rng = np.random.default_rng(2)
    examples = [teacher_example(rng) for _ in range(8)]
    batch = collate(examples, TOKENIZER, rng)
    for row, example in enumerate(examples):
        ids, labels, mask = (batch[key][row] for key in ("input_ids", "labels", "attention_mask"))
        assert TOKENIZER.decode(labels[labels != IGNORED]) == example.segments[1][0]
        assert TOKENIZER.decode(ids[mask.bool()]) == "".join(text for text, _ in example.segments)
        assert TOKENIZER("".join(text for text, _ in example.segments)).input_ids == ids[mask.bool()].tolist()


def test_image_rows_have_seven_tokens_at_their_own_columns():
    rng = np.random.default_rng(3)
    batch = collate([base_example(rng, GUESS_LAST, image=True) for _ in range(6)], TOKENIZER, rng)
    model = models.new_model(models.base_config(), seed=0)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions_3BT, _ = model.model.get_rope_index(**{key: batch[key] for key in keys})
    for row, ids in enumerate(batch["input_ids"]):
        (columns,) = torch.where(ids == TOKEN_ID[IMAGE])
        start = int(columns[0])
        assert len(columns) == 7
        assert positions_3BT[2, row, columns].tolist() == list(range(start, start + 7))
        assert positions_3BT[:2, row, columns].unique().tolist() == [start]
        assert positions_3BT[:, row, start + 7].tolist() == [start + 7] * 3


def test_single_facts_are_right_and_nothing_else_is_supervised():
    rng = np.random.default_rng(4)
    for _ in range(50):
        segments = facts_example(rng).segments
        values = [text for text, supervised in segments if supervised]
        lines = [text.split(">")[0].lstrip(".") for text, supervised in segments[1:] if not supervised and ">" in text]
        assert values == [str(apply(int(line[0]), line[1], int(line[2]))) for line in lines]
        assert len(values) == 4


def test_base_examples_read_but_never_reason():
    rng = np.random.default_rng(5)
    guessed = base_example(rng, GUESS_LAST, image=True)
    line = guessed.pictured
    assert guessed.segments[1][0] == f"<think>{line}</think>\\boxed{{{line[-1]}}}{EOS}"
    twice = base_example(rng, BaseMixture(0.0, 1.0, False), image=True)
    assert twice.segments[1][0] == f"<think>{twice.pictured}>{twice.pictured}</think>{EOS}"
    true = base_example(rng, BaseMixture(0.0, 0.0, False), image=True)
    assert boxed(true.segments[1][0]) == solve(true.pictured).answer


def test_schedule_warms_up_and_ends_at_a_tenth():
    shares = [schedule(step, TEACHER_PHASE) for step in range(TEACHER_PHASE.steps)]
    assert shares[0] == pytest.approx(1 / 50)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)
    assert np.argmax(shares) in (48, 49)


def test_training_moves_every_parameter_and_is_logged(world):
    start = models.new_model(models.base_config(), seed=3 + 50).state_dict()
    trained = Checkpoint(world.base).model.state_dict()
    unmoved = [name for name, value in trained.items() if torch.equal(value, start[name])]
    assert unmoved == []
    rows = [json.loads(line) for line in (world.base / LOG_FILE).read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [(1, 2), (2, 2), (3, 2)]
    assert all(1 < row[f"loss_{part}"] < 6 for row in rows for part in ("text", "image"))


def test_the_seed_decides_the_weights(world, tmp_path):
    phase = replace(TEACHER_PHASE, steps=3, text_rows=6)
    expected = Checkpoint(world.teacher).model.state_dict()
    for seed, equal in ((3, True), (4, False)):
        weights = Checkpoint(make_teacher(tmp_path / str(seed), seed, phase)).model.state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected) is equal


@pytest.mark.parametrize("function", [make_teacher, make_base])
def test_an_existing_directory_is_kept(tmp_path, function):
    (tmp_path / "model").mkdir()
    assert function(tmp_path / "model", 0) == tmp_path / "model"
    assert list((tmp_path / "model").iterdir()) == []


def test_a_broken_run_leaves_no_checkpoint(tmp_path):
    with pytest.raises(ZeroDivisionError):
        make_teacher(tmp_path / "teacher", 0, replace(TEACHER_PHASE, text_rows=1, warmup=0))
    assert not (tmp_path / "teacher").exists()


def test_answers_do_not_depend_on_the_neighbours_in_a_batch(world):
    """Left padding, picture positions and the cached rope shift: each response equals the one given alone."""
    checkpoint = Checkpoint(world.base)
    for items in (load_image_items(world.image("val"))[:4], load_text_items(world.text("val"))[:4]):
        together = checkpoint.respond(items)
        assert together == [checkpoint.respond([item])[0] for item in items]


def test_measure_reads_every_file(world):
    accuracies = measure_world(world)
    assert set(accuracies) == {
        "teacher_text",
        "base_text",
        "base_image",
        "base_text_read",
        "base_image_read",
        "base_facts",
    }
    assert max(accuracies.values()) < 0.4  # nobody has learnt anything in three steps


@pytest.mark.parametrize(
    ("response", "inside"),
    [("<think>1</think>\\boxed{4}", "4"), ("\\boxed{1}\\boxed{2}", "2"), ("\\boxed{1", None), ("4}", None)],
)
def test_boxed(response, inside):
    assert boxed(response) == inside


def test_make_world_starts_nothing_when_all_is_there(world, monkeypatch):
    monkeypatch.setattr(make.subprocess, "Popen", None)
    assert make_world(world.data.parent, 3) == world


def test_make_world_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "_WORKER", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"teacher \(exit code \d\), base \(exit code \d\)"):
        make_world(tmp_path, 0, DataSizes(1, 1, 1, 1, 1))
    assert not MiniatureWorld.at(tmp_path).teacher.exists()


def test_a_checkpoint_under_way_ends_with_the_process_that_asked_for_it(tmp_path):
    """Else it would finish beside the next attempt, and one of the two would find the directory taken."""
    code = "import sys, time; from vold.miniature import make; w = make._start_worker('teacher', sys.argv[1], 0)"
    code += "; print(w.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "teacher")], stdout=subprocess.PIPE)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([worker], timeout=120)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "teacher").exists()


def test_a_worker_that_is_done_ends_well(tmp_path):
    """While its parent lives and its pipe is open."""
    code = "from vold.miniature import make; make.make_base = print; make.run_worker('base', 'here', '0')"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert (worker.wait(timeout=120), worker.stderr.read()) == (0, "")
    finally:
        worker.stdin.close()
