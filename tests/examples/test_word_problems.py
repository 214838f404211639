"""examples/word_problems.py: no computation is in two splits, solutions are right; part real, which trains on them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from string import Template

import pytest

from vold.config import load_config, schema
from vold.config.schema import DataConfig
from vold.data.problems import load_problems
from vold.miniature.science import runs
from vold.miniature.science.protocol import Part, part_path

ROOT = Path(__file__).parents[2]
SPLITS = ("cold", "train", "sums-validation", "words-validation", "sums-test", "words-test")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    runpy.run_path(str(ROOT / "examples" / "word_problems.py"))["write"](folder)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def computation(question: str) -> tuple[int, ...] | str:
    """A sum as it is asked; of a story, its numbers and what happens to them, in order."""
    if question.startswith("What is"):
        return question
    signs = "".join("-" if word in ("gives", "takes", "sold", "lost") else "" for word in re.findall(r"\w+", question))
    return (*map(int, re.findall(r"\d+", question)), len(signs), "lost" in question)


def test_no_computation_is_in_two_splits(words):
    asked = {name: [row.get("prompt", row.get("question")) for row in rows(words, name)] for name in SPLITS}
    kinds = {name: {computation(question) for question in questions} for name, questions in asked.items()}
    for number, name in enumerate(SPLITS):
        for other in SPLITS[number + 1 :]:
            assert not kinds[name] & kinds[other], f"{name}, {other}"
    assert [len(asked[name]) for name in SPLITS] == [256, 2400, 60, 60, 200, 200]


def test_solutions_are_right_and_lead_to_the_gold_answer(words):
    for row in rows(words, "train"):
        solution = row["hinted"].split("\n\n")[2]
        *steps, last = solution.replace("\\boxed{", "").replace("}", "").split(", ")
        for step in (*steps, last):
            a, sign, b, c = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c), row
        assert last.endswith(f"= {row['answer']}") and solution.endswith(f"\\boxed{{{row['answer']}}}")
        numbers = re.findall(r"\d+", row["question"])
        assert len(numbers) == len(steps) + 2 and set(numbers) >= {re.findall(r"\d+", last)[1]}


def test_the_hinted_files_ask_the_same_problems(words):
    for kind in ("sums", "words"):
        plain = load_problems(DataConfig(path=words / f"{kind}-validation.jsonl", layout="vqa"))
        hinted = load_problems(DataConfig(path=words / f"{kind}-validation-hinted.jsonl", layout="vqa"))
        for one, other in zip(plain, hinted, strict=True):
            assert other.question.startswith(one.question + "\n\n") and other.gold == one.gold
            assert f"\\boxed{{{one.gold}}}" in other.question and "boxed" not in one.question


def test_part_real_asks_in_one_way_and_its_teacher_reads_the_solutions(monkeypatch):
    monkeypatch.chdir(ROOT)
    part = Part.load(part_path("real"))
    training = next(one for one in part.counted(dict.fromkeys(part.cells(), 1e-4)) if one.arm == "hints")
    places = runs._places(ROOT, part, training)
    settings = [Template(text).substitute(places) for text in runs.settings_of(part, training)]
    config = load_config(schema.RlConfig, runs.config_path(part.config), settings)
    assert config.teacher_view.prompt_column == "hinted"
    assert config.is_base(config.teacher), "the trainer's own base, without its adapter: no second copy"
    tests = load_config(schema.EvalConfig, runs.config_path(part.eval_config))
    start = load_config(schema.SftConfig, ROOT / "configs" / "smollm2-135m" / "words-sft.yaml")
    assert tests.prompt.system == config.prompt.system == start.prompt.system, "asked as it was trained"
    assert start.run_dir / "model" == config.student == tests.checkpoint
