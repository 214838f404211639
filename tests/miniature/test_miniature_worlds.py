"""Worlds by their keys: folders, what is shared, and that each key's material is what it says."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from vold.miniature import world as arithmetic
from vold.miniature import worlds
from vold.miniature.data import DataSizes
from vold.miniature.examples import teacher_example
from vold.miniature.facts import right_facts, wrong_facts
from vold.miniature.measure import boxed
from vold.miniature.pretrain import MISTAKEN_PHASE, make_mistaken_teacher
from vold.miniature.tokenizer import EOS
from vold.miniature.worlds import WorldKeys, open_world, world_root

FEW = DataSizes(val=7, test=11)


def problems(count: int, split: str = "test") -> list[arithmetic.Problem]:
    rng = np.random.default_rng(17)
    return [arithmetic.sample_problem(rng, split) for _ in range(count)]


@pytest.fixture
def root(world, tmp_path, monkeypatch) -> Path:
    """A folder of runs with the shrunken world of seed 3, and a shrunken training of what the keys add."""
    shutil.copytree(world.data.parent, tmp_path / "miniature" / "seed3", ignore=shutil.ignore_patterns("images"))
    short = replace(MISTAKEN_PHASE, steps=2, text_rows=4)
    monkeypatch.setattr(worlds, "make_mistaken_teacher", lambda *args: make_mistaken_teacher(*args, phase=short))
    return tmp_path


def test_the_defaults_are_the_demos_world_and_every_key_has_a_folder():
    assert world_root(Path("runs"), WorldKeys()) == Path("runs/miniature/seed0")
    assert world_root(Path("runs"), WorldKeys(seed=2, teacher_accuracy=0.7)) == Path("runs/miniature/seed2-teacher70")
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
