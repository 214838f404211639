"""Tables: exact text, and the rule for what counts as better."""

import math

import pytest
from made_up_runs import ACCURACY, REPORT

from vold.report import AccuracyTable, accuracy_table, as_table, read_run, seeds_table
from vold.report.summary_text import lead_sentences, limitations, paired_differences, stage_differences
from vold.report.tables import Difference, seed_cells

SEEDS = [
    {"seed": seed, "arm": arm, "text": text + 0.01 * seed, "image": image}
    for seed in range(3)
    for arm, text, image in (("vold", 0.6, 0.5), ("grpo", 0.5, 0.45))
]


def test_accuracy_table_text():
    assert accuracy_table(REPORT["accuracy"], REPORT["stderr"]) == (
        "| accuracy, % |           text |          image |\n"
        "| :---------- | -------------: | -------------: |\n"
        "| base        |      8.2 ± 1.4 |      9.5 ± 1.5 |\n"
        "| SFT         |     43.2 ± 2.5 |     43.0 ± 2.5 |\n"
        "| GRPO        |     53.2 ± 2.5 |     44.8 ± 2.5 |\n"
        "| VOLD        | **62.3 ± 2.4** | **53.8 ± 2.5** |"
    )


def test_seeds_table_text():
    assert seeds_table(SEEDS) == (
        "| accuracy, % | seeds |       text |      image |\n"
        "| :---------- | ----: | ---------: | ---------: |\n"
        "| GRPO        |     3 | 51.0 ± 0.6 | 45.0 ± 0.0 |\n"
        "| VOLD        |     3 | 61.0 ± 0.6 | 50.0 ± 0.0 |"
    )


def test_seeds_from_whole_reports_and_a_single_seed_has_no_error():
    cells = seed_cells([REPORT])
    assert list(cells) == ["base", "sft", "grpo", "vold"]
    assert cells["vold"]["image"].value == 0.5375 and math.isnan(cells["vold"]["image"].stderr)


def test_a_report_without_errors_has_binomial_ones_and_a_name_is_not_read_as_markup():
    text = accuracy_table({"accuracy": {"[red]x[/red]": {"text": 0.5}}, "n": {"text": 100}})
    assert "[red]x[/red]" in text and "50.0 ± 5.0" in text


@pytest.mark.parametrize(("lead", "bold"), [(0.0501, True), (0.0499, False)])
def test_best_needs_more_than_two_standard_errors_of_the_difference(lead, bold):
    error = 0.025 / math.sqrt(2)  # of the difference: .025
    accuracy = {"grpo": {"image": 0.4}, "vold": {"image": 0.4 + lead}}
    stderr = {model: {"image": error} for model in accuracy}
    assert (AccuracyTable(accuracy, stderr).best("image") == "vold") is bold
    assert ("**" in accuracy_table(accuracy, stderr)) is bold


def test_best_must_beat_every_other_model_not_only_the_runner_up():
    accuracy = {"a": {"t": 0.6}, "b": {"t": 0.5}, "c": {"t": 0.45}}
    stderr = {"a": {"t": 0.01}, "b": {"t": 0.01}, "c": {"t": 0.2}}
    table = AccuracyTable(accuracy, stderr)
    assert table.best("t") is None
    assert "not over every other model" in lead_sentences(table)[0]


def test_missing_values_are_dashes_and_without_errors_nothing_is_best():
    text = accuracy_table({"base": {"text": None}, "vold": {"text": 0.9, "image": 0.5}, "sft": {"text": 0.1}})
    assert text.splitlines()[2:] == [
        "| base        |    – |     – |",
        "| SFT         | 10.0 |     – |",
        "| VOLD        | 90.0 |  50.0 |",
    ]


def test_an_unfinished_report_still_makes_a_table():
    table = as_table({"accuracy": {"base": {"text": 0.1}, "sft": None}, "stderr": None, "n": {"text": None}})
    assert table.models == ["base"] and table.sets == ["text"]


def test_a_lead_is_called_clear_only_when_it_is():
    clear, close = (
        lead_sentences(as_table(REPORT)),
        lead_sentences(as_table({**REPORT, "n": {}, "accuracy": _closer()})),
    )
    assert clear[0] == (
        "VOLD solves 53.8 % of the image problems, GRPO 44.8 %: a clear lead of 9.0 ± 3.5 points over the next best."
    )
    assert "do not separate them" in close[0] and "clear" not in close[0]


def test_lead_sentences_do_not_favour_vold():
    worse = {**ACCURACY, "vold": {"text": 0.3, "image": 0.2}}
    assert lead_sentences(as_table({**REPORT, "accuracy": worse}))[0].startswith("GRPO solves 44.8 %")
    differences = stage_differences(as_table({**REPORT, "accuracy": worse}))
    verdicts = {models: difference["image"].verdict for models, difference in differences.items()}
    assert verdicts["vold", "grpo"] == "clear loss" and verdicts["grpo", "sft"] == "no clear difference"
    assert verdicts["vold", "sft"] == "clear loss"


def test_paired_differences_from_samples(tmp_path):
    old, new = [1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0, 1, 1]
    runs = [_evaluation(tmp_path, "eval_sft", old), _evaluation(tmp_path, "eval_vold", new)]
    table = AccuracyTable({"sft": {"text": 3 / 8}, "vold": {"text": 6 / 8}})
    gap = paired_differences(table, runs)["vold", "sft", "text"]
    deviation = math.sqrt(sum((d - 3 / 8) ** 2 for d in (0, 1, 0, 0, 1, 0, 0, 1)) / 7)
    assert gap == Difference(3 / 8, pytest.approx(deviation / math.sqrt(8)), paired=True)
    assert any("paired" in line for line in limitations(AccuracyTable(table.accuracy, pairs={("a", "b", "t"): gap})))


def test_no_pairing_when_samples_do_not_reproduce_the_accuracy(tmp_path):
    runs = [_evaluation(tmp_path, "eval_sft", [1, 0, 0]), _evaluation(tmp_path, "eval_vold", [1, 1, 0])]
    assert paired_differences(AccuracyTable({"sft": {"text": 0.4}, "vold": {"text": 0.6}}), runs) == {}


def _closer():
    return {**ACCURACY, "vold": {"text": 0.54, "image": 0.46}}


def _evaluation(root, name, right):
    from made_up_runs import write_run

    rows = [{"set": "text", "prompt_id": i, "verdict": "correct" if ok else "wrong"} for i, ok in enumerate(right)]
    return read_run(write_run(root / name, config={"verb": "eval"}, samples=rows))
