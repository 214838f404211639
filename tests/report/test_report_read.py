"""Readers: what a stopped, resumed, damaged or empty run turns into."""

import json
import math
from itertools import pairwise

import pytest
from made_up_runs import write_run

from vold.report import find_runs, read_run, read_runs
from vold.report.read import MetricsTail, columns, flatten, read_jsonl


def test_half_written_last_line_is_skipped_and_counted(tmp_path):
    run = write_run(tmp_path / "vold", config={"verb": "rl"}, metrics=[{"step": 0, "reward": 0.25}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rewa')
    record = read_run(run)
    assert record.metrics == {"step": [0.0], "reward": [0.25]}
    assert record.skipped == 1 and record.verb == "rl"


def test_missing_keys_become_nan_and_columns_stay_aligned():
    table = columns([{"step": 0, "reward": 0.5}, {"step": 1, "accuracy_image": 0.4}, {"step": 2, "reward": None}])
    assert table["step"] == [0, 1, 2]
    assert table["reward"][0] == 0.5 and math.isnan(table["reward"][1]) and math.isnan(table["reward"][2])
    assert table["accuracy_image"][1] == 0.4 and math.isnan(table["accuracy_image"][0])


def test_the_best_checkpoint_is_the_first_with_the_highest_accuracy_on_the_set_that_chooses(tmp_path):
    metrics = [
        {"step": 1, "reward": 0.1},
        *(
            {"step": step, "accuracy_geo": value, "accuracy_text": step / 10}
            for step, value in ((2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4))
        ),
    ]
    for evaluation, best in (({"best": "geo"}, ("accuracy_geo", 4.0)), ({"best": None}, None), ({}, None)):
        assert read_run(write_run(tmp_path / "run", config={"evaluation": evaluation}, metrics=metrics)).best == best
    early = read_run(write_run(tmp_path / "early", config={"evaluation": {"best": "geo"}}, metrics=metrics[:1]))
    assert early.best is None, "before the first evaluation"


def test_a_repeated_step_of_a_resumed_run_keeps_the_newest_row():
    table = columns([{"step": 0, "loss": 3.0}, {"step": 1, "loss": 9.0}, {"step": 1, "loss": 2.0}])
    assert table == {"step": [0, 1], "loss": [3.0, 2.0]}


def test_values_that_are_no_numbers_do_not_stop_the_reader(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": NaN}\n[1, 2]\n\n{"step": "x", "loss": {"a": 1}}\n\xff\n'
    )
    record = read_run(tmp_path)
    assert record.skipped == 2 and len(record.steps) == 2
    assert all(math.isnan(value) for value in record.metrics["loss"])


@pytest.mark.parametrize("content", ["", "a: [1,", "- a list\n", "\x00"])
def test_a_damaged_config_reads_as_empty(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    record = read_run(tmp_path)
    assert record.config == {} and record.verb == "unknown"


def test_verb_is_guessed_when_the_config_is_gone(tmp_path):
    assert read_run(write_run(tmp_path / "a", metrics=[{"step": 0, "reward": 1}])).verb == "rl"
    assert read_run(write_run(tmp_path / "b", metrics=[{"step": 0, "loss": 1}])).verb == "sft"
    assert read_run(write_run(tmp_path / "c", evaluation={"sets": {}})).verb == "eval"


def test_a_folder_of_runs_is_its_runs_and_equal_names_are_told_apart(tmp_path):
    for seed in ("seed0", "seed1"):
        write_run(tmp_path / seed / "vold", metrics=[{"step": 0}])
    assert [path.name for path in find_runs(tmp_path / "seed0")] == ["vold"]
    records = read_runs([tmp_path / "seed0", tmp_path / "seed1", tmp_path / "seed1" / "vold"])
    assert [record.name for record in records] == ["seed0/vold", "seed1/vold"]


def test_a_folder_without_runs_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run.*metrics\.jsonl"):
        find_runs(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        find_runs(tmp_path / "nothing")


def test_of_a_long_file_only_parts_are_read(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(100, 200)))  # 14 bytes a line
    rows, bad = read_jsonl(path, 60)
    assert bad == 0 and 0 < len(rows) < 10 and rows[-1] == {"step": 199}
    rows, bad = read_jsonl(path, 140, 5)
    steps = [row["step"] for row in rows]
    assert bad == 0 and steps == sorted(set(steps)) and 10 <= len(steps) <= 15 and steps[-1] == 199
    assert max(b - a for a, b in pairwise([100, *steps])) < 25, "from all along the file"
    assert len(read_jsonl(path, 1400, 5)[0]) == 100


def test_a_growing_file_is_followed_through_a_resumption(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() is None and tail.rows == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.poll() and [row["step"] for row in tail.rows] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\nnonsense\n[3]\n')
    tail.poll()
    assert [row["step"] for row in tail.rows] == [1, 2, 3], "the line that was half there came later, whole"
    partial = tmp_path / "partial"
    partial.write_text('{"step": 1}\n')
    partial.replace(path)  # as RunLog.rewind does
    with path.open("a") as file:
        file.writelines(f'{{"step": {step}, "again": 1}}\n' for step in (2, 3, 4))
    tail.poll()
    assert [(row["step"], "again" in row) for row in tail.rows] == [(1, False), (2, True), (3, True), (4, True)]
    path.write_text('{"step": 1}\n')  # cut in place
    tail.poll()
    assert [row["step"] for row in tail.rows] == [1]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_an_older_run_is_read_under_the_present_names():
    table = columns([{"step": 1, "clip_low": 0.1, "clip_high": 0.2, "teacher_blind": 3, "visual_reliance": 0.5}])
    assert table.keys() == {
        *("step", "clip_fraction_low", "clip_fraction_high", "teacher_skipped_images", "image_sensitivity")
    }
