"""Worlds by their keys: folders, what is shared, and that each key's material is what it says."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vold.config import load_config
from vold.config.schema import RlConfig, SelfplayConfig
from vold.data.prompts import show_hint
from vold.miniature import check, pretrain, worlds
from vold.miniature import world as arithmetic
from vold.miniature.check import check_world, votes, world_facts
from vold.miniature.data import DataSizes
from vold.miniature.examples import hint_example, solver_example, teacher_example
from vold.miniature.facts import drawn_accuracy, right_facts, wrong_facts
from vold.miniature.measure import Item, boxed
from vold.miniature.pipeline import CONFIGS
from vold.miniature.tokenizer import EOS, make_tokenizer
from vold.miniature.worlds import WorldKeys, open_world, world_root
from vold.objectives.self_distillation import without_thinking
from vold.objectives.visual_advantage import degrade
from vold.types import Hint, Prompt

FEW = DataSizes(val=7, test=11)


def problems(count: int, split: str = "test") -> list[arithmetic.Problem]:
    rng = np.random.default_rng(17)
    return [arithmetic.sample_problem(rng, split) for _ in range(count)]


@pytest.fixture
def root(world, tmp_path, monkeypatch) -> Path:
    """A folder of runs with the shrunken world of seed 3, and shrunken trainings of what the keys add."""
    shutil.copytree(world.data.parent, tmp_path / "miniature" / "seed3", ignore=shutil.ignore_patterns("images"))
    for name in ("make_other_teacher", "make_solver", "make_vision_teacher", "make_hint_reader"):
        function = getattr(pretrain, name)
        monkeypatch.setattr(pretrain, name, partial(function, **_shortened(function)))
    monkeypatch.setattr(worlds, "PICTURES", DataSizes(train=6, val=2, test=3))
    monkeypatch.setattr(check, "START_PHASE", replace(check.START_PHASE, steps=2, text_rows=4))
    monkeypatch.setattr(check, "STYLED", 5)
    return tmp_path


def _shortened(function: Callable) -> dict:
    """The training's phases, of two steps with few rows."""
    ((name, usual),) = [(n, p.default) for n, p in inspect.signature(function).parameters.items() if "phase" in n]
    phases = usual if isinstance(usual, tuple) else (usual,)
    short = tuple(replace(p, steps=2, text_rows=min(4, p.text_rows), image_rows=min(3, p.image_rows)) for p in phases)
    return {name: short if isinstance(usual, tuple) else short[0]}


def test_the_defaults_are_the_demos_world_and_every_key_has_a_folder():
    assert world_root(Path("runs"), WorldKeys()) == Path("runs/miniature/seed0")
    every = WorldKeys(
        seed=2, teacher_accuracy=0.7, reads_hints=True, style="wordy", errors="scattered", degraded="shapes"
    )
    assert world_root(Path("runs"), every).name == "seed2-teacher70-hints-wordy-scattered-shapes"
    with pytest.raises(ValidationError):
        WorldKeys(teacher_accuracy=0.5)
    with pytest.raises(ValidationError):
        WorldKeys(teacher=0.7)


def test_wrong_facts_are_the_same_each_time_and_give_the_accuracy():
    tests = problems(1000, "train")
    for accuracy in (0.84, 0.7):
        table = wrong_facts(0, accuracy)
        assert table.wrong() == wrong_facts(0, accuracy).wrong() != wrong_facts(1, accuracy).wrong()
        share = np.mean([table.solve(p.expression).answer == p.answer for p in tests])
        assert share == pytest.approx(accuracy, abs=0.035)
        for fact, held in table.wrong().items():
            assert arithmetic.apply(int(fact[0]), fact[1], int(fact[2])) != held
    assert wrong_facts(0, 0.84).wrong().items() <= wrong_facts(0, 0.7).wrong().items()
    assert right_facts().wrong() == wrong_facts(0, 1.0).wrong() == {}


def test_traces_of_a_mistaken_teacher_follow_its_table():
    table, rng = wrong_facts(0, 0.7), np.random.default_rng(0)
    wrong = table.wrong()
    mistakes = 0
    for _ in range(200):
        (question, _), (response, _) = teacher_example(rng, table).segments
        lines = response.removeprefix("<think>").split("</think>")[0].split(">")
        for line, following in itertools.pairwise(lines):
            fact = line.lstrip(".")[:3]
            right = arithmetic.apply(int(fact[0]), fact[1], int(fact[2]))
            assert int(following.lstrip(".")[0]) == wrong.get(fact, right)
            mistakes += fact in wrong
        assert boxed(response.removesuffix(EOS)) == lines[-1].lstrip(".")
        assert arithmetic.split_of(question.split("[")[1].split("]")[0].replace("<", "").replace(">", "")) == "train"
    assert mistakes > 30


def test_a_world_shares_what_is_equal_and_keeps_what_is_there(root):
    seed_root = root / "miniature" / "seed3"
    before = {path: path.read_bytes() for path in seed_root.rglob("*") if path.is_file()}
    plain = open_world(root, WorldKeys(seed=3), held_out=FEW)
    mistaken = open_world(root, WorldKeys(seed=3, teacher_accuracy=0.84), held_out=FEW)
    assert (plain.teacher, plain.base, plain.data) == tuple(seed_root / name for name in ("teacher", "base", "data"))
    assert (mistaken.base, mistaken.data, mistaken.held_out) == (plain.base, plain.data, plain.held_out)
    assert mistaken.teacher == root / "miniature" / "seed3-teacher84" / "teacher"
    assert all(path.read_bytes() == content for path, content in before.items()), "the demo's files stay as they are"
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert open_world(root, WorldKeys(seed=3, teacher_accuracy=0.84), held_out=FEW) == mistaken
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_held_out_problems_are_more_and_differ(root):
    world = open_world(root, WorldKeys(seed=3), held_out=FEW)
    seen: dict[tuple[str, str], set[str]] = {}
    pictured = json.loads((world.held_out / "expressions.json").read_text())
    for split, count in (("val", 7), ("test", 11)):
        rows = json.loads(world.text(split).read_text())
        asked = [human["value"].split("[")[1].split("]")[0].replace("<", "").replace(">", "") for human, _ in rows]
        assert [gold["ground_truth"]["value"] for _, gold in rows] == [arithmetic.solve(e).answer for e in asked]
        shown = [json.loads(line) for line in world.image(split).read_text().splitlines()]
        assert all((world.held_out / row["images"][0]).is_file() for row in shown)
        assert [row["answer"] for row in shown] == [
            arithmetic.solve(pictured[row["images"][0]]).answer for row in shown
        ]
        seen["text", split], seen["image", split] = set(asked), {pictured[row["images"][0]] for row in shown}
        assert all(len(seen[kind, split]) == count for kind in ("text", "image")), "none twice"
        assert {arithmetic.split_of(e) for e in asked} == {split}


def test_wordy_traces_have_words_for_dots_and_the_same_answer():
    rng = np.random.default_rng(1)
    usual = drawn = 0
    for problem in problems(200, "train"):
        wordy, plain = arithmetic.trace_wordy(problem, rng), arithmetic.trace(problem)
        assert re.sub(r"<w\d>", ".", wordy) == plain and boxed(wordy) == problem.answer
        words = [int(word) for word in re.findall(r"<w(\d)>", wordy)]
        assert len(words) == 12
        expected = [(problem.running[k - 1] + place) % 8 for k in (1, 2, 3) for place in range(2 * k)]
        usual += sum(a == b for a, b in zip(words, expected, strict=True))
        drawn += len(words)
    assert usual / drawn == pytest.approx(arithmetic.STYLE + (1 - arithmetic.STYLE) / 8, abs=0.03)


def test_a_hint_has_the_self_teachers_form():
    """Token for token what vold shows a self-teacher with the settings of the miniature."""
    config = load_config(RlConfig, CONFIGS / "rl.yaml")
    tokenizer, rng = make_tokenizer(), np.random.default_rng(2)
    for _ in range(20):
        example = hint_example(rng)
        shown = example.segments[0][0].split("<asst>")[0].removeprefix("<user>")
        question, _, rest = shown.rpartition("\\boxed{")
        prompt = Prompt("0", np.array(tokenizer(f"<user>{question}<asst>").input_ids), question)
        hint = Hint(without_thinking(f"<think>7*9</think>\\boxed{{{rest}"))
        shown_ids = show_hint(prompt, hint, tokenizer, config.prompt, config.self_teacher).token_ids
        assert list(shown_ids) == tokenizer(f"<user>{shown}<asst>").input_ids
        problem = arithmetic.solve(example.segments[0][0].split("<think>")[1])
        assert rest == problem.answer + "}"
        values = [int(text) for text, supervised in example.segments if supervised]
        assert values and values[-1] == int(problem.answer)
        assert all(value in problem.running for value in values), "what is supervised is right"


@pytest.mark.parametrize("errors", ["systematic", "scattered"])
def test_solvers_differ_in_how_they_err_not_in_how_often(errors):
    table = worlds.solver_table(WorldKeys(errors=errors))
    rng, items = np.random.default_rng(3), problems(400, "train")
    answers = [[table.sample(p.expression, rng).answer for _ in range(10)] for p in items]
    found = votes(answers, [Item([], p.answer) for p in items])
    assert drawn_accuracy(table, [p.expression for p in items]) == pytest.approx(0.35, abs=0.04)
    assert found["solver_drawn"] == pytest.approx(0.35, abs=0.04)
    assert found["labels_right"] == pytest.approx({"systematic": 0.33, "scattered": 0.67}[errors], abs=0.08)
    assert found["labels_right_in_band"] == pytest.approx({"systematic": 0.19, "scattered": 0.74}[errors], abs=0.08)


def test_a_solver_learns_the_request_that_self_play_makes():
    for name in ("selfplay.yaml", "selfplay-diverse.yaml"):
        pose = load_config(SelfplayConfig, CONFIGS / name).pose
        assert pose.request == worlds.POSE_REQUEST
    rng, table = np.random.default_rng(4), right_facts()
    examples = [solver_example(rng, table, worlds.POSE_REQUEST) for _ in range(200)]
    posed = [e.segments[1][0].removesuffix(EOS) for e in examples if e.segments[0][0] == "<user>=<asst>"]
    assert 30 < len(posed) < 75 and all(re.search(pose.pattern, question) for question in posed)


def test_every_part_is_made_once_at_the_place_of_its_own_keys_and_measured(root):
    keys = WorldKeys(seed=3, teacher_accuracy=0.7, reads_hints=True, style="wordy", degraded="shapes")
    made = open_world(root, keys, held_out=FEW, extras=("solver", "pictures"))
    names = [str(path.relative_to(root / "miniature")) for path in (made.teacher, made.base, made.solver)]
    assert names == ["seed3-teacher70-wordy/teacher", "seed3-hints/base", "seed3/solver"]
    assert made.vision_teacher.relative_to(root / "miniature") == Path("seed3-wordy/vision-teacher")
    rows = [json.loads(line) for line in (made.pictures / "train_small.jsonl").read_text().splitlines()]
    for row in rows:
        sharp, copy = (np.asarray(Image.open(made.pictures / row[c][0])) for c in ("images", "degraded"))
        assert (copy == np.asarray(degrade(Image.fromarray(sharp), worlds.DEGRADED_SCALE))).all()
        assert (copy != sharp).any()
    found = check_world(made, keys, problems=4)
    assert check_world(made, keys, problems=4) == found == json.loads((made.folder / "world.json").read_text())["facts"]
    expected = {"teacher_accuracy", "start_accuracy", "hint_start_with", "kl_words_nats"}
    assert expected | {"read_small_degraded"} <= set(found)
    plain = WorldKeys(seed=3)
    assert "labels_right" in check_world(open_world(root, plain, held_out=FEW, extras=("solver",)), plain, problems=4)
    assert all(0 <= value <= 1 for name, value in found.items() if not name.endswith("nats"))
    told = world_facts(made.folder / "world.json")
    assert told.startswith("`seed3-teacher70-hints-wordy-shapes`: ") and " · hint start with " in told


@pytest.mark.parametrize("argument", ["teacher_accuracy=0.5", "teacher=0.7", "seed=x", "nothing"])
def test_a_wrong_key_is_one_line(argument, capsys):
    assert check.main([argument]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and argument.partition("=")[0] in told and "reads_hints" in told
