"""`vold eval` on a tiny world: text, images, several answers to a problem."""

from __future__ import annotations

import json

import pytest

from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.evaluation.evaluator import evaluate
from vold.models.tokenizer import load_tokenizer
from vold.run.run_dir import RunLog, read_rows


def test_images_count_in_the_length_of_an_evaluations_prompts(load, tmp_path, layout, world):
    """All ids would fit, but an image is seven of them."""
    image = f"evaluation.sets={{image: {{path: {world.data / 'val_image.jsonl'}, layout: geometry3k}}}}"
    fits = load("eval", tmp_path / "fits", image)
    problems, tokenizer = load_problems(fits.evaluation.sets["image"]), load_tokenizer(world.student)
    longest = max(len(prompt.token_ids) for prompt in build_prompts(problems, tokenizer, fits.prompt))
    evaluate(load("eval", tmp_path / "fits", image, f"prompt.max_tokens={longest + 6}"))
    with pytest.raises(ValueError, match=rf"prompt of {longest + 6} tokens exceeds prompt.max_tokens = {longest + 5};"):
        evaluate(load("eval", tmp_path / "too long", image, f"prompt.max_tokens={longest + 5}"))


def test_eval_reads_text_and_images(load, tmp_path, layout, world, monkeypatch):
    config, shown = load("eval", tmp_path / "eval", "evaluation.sampling.sequences_per_call=4"), []
    monkeypatch.setattr(RunLog, "show_status", lambda self, note: shown.append(note))
    bar = []
    monkeypatch.setattr(RunLog, "set_total", lambda self, total: bar.append(total))
    monkeypatch.setattr(RunLog, "advance", lambda self: bar.append(1))
    evaluate(config)
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
    evaluate(config)
    rows = read_rows(config.run_dir / "samples.jsonl")
    assert [row["prompt_id"] for row in rows[:4]] == ["val_text:1"] * 3 + ["val_text:2"]
    assert len({row["response"] for row in rows}) > 12, "siblings differ"
    found = json.loads((config.run_dir / "evaluation.json").read_text())
    text = found["sets"]["text"]
    assert (text["k"], text["n"], text["p95_length"]) == (3, 6, 8) and found["judge"] == "rule"
    assert text["truncated"] == sum(row["finish_reason"] == "length" for row in rows if row["set"] == "text") / 18
    assert 0.0 <= text["majority"] <= 1.0
