"""The head of the page for every kind of run, and axes that a reader need not decode. Runs are made up."""

import math
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from made_up_runs import REPORT, evaluation, evaluation_samples, problem, rl_metrics, sft_metrics, write_demo, write_run

from vold.report import RunRecord, accuracies, accuracy_table, curve, read_run, read_runs, write_report
from vold.report.drawing import drawn_range, tick_texts
from vold.report.outcome import outcomes, unhealthy
from vold.report.plots import accuracy_bars, seeds_errorbars


def run_of(name="run", verb="rl", planned=None, **metrics) -> RunRecord:
    columns = {key: [float(value) for value in values] for key, values in metrics.items()}
    steps = [float(i + 1) for i in range(len(next(iter(columns.values()))))]
    config = {"verb": verb} | ({"steps": planned} if planned else {})
    return RunRecord(name, path=None, config=config, metrics={"step": steps} | columns)


def texts(svg: bytes) -> list[str]:
    return [
        "".join(element.itertext()).strip() for element in ET.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


# -- what came out -------------------------------------------------------------------------------------------------


def test_a_training_run_begins_and_ends():
    nan = math.nan
    reward = [0.1] * 10 + [0.5] * 80 + [0.9] * 10
    run = run_of(reward=reward, accuracy_text=[nan] * 49 + [0.4] + [nan] * 49 + [0.6], planned=100)
    ((name, sentence),) = outcomes([run])
    assert (name, sentence) == ("run", "100 steps: reward 0.1 → 0.9, text accuracy 40 % → 60 %.")


def test_a_run_that_stopped_says_how_far_it_came():
    ((_, sentence),) = outcomes([run_of(reward=[0.1, 0.2, 0.3, 0.4], planned=60)])
    assert sentence.startswith("4 of 60 steps: ")
    ((_, sentence),) = outcomes([run_of(reward=[0.25], planned=60)])
    assert sentence == "1 of 60 steps: reward 0.25."


def test_sft_selfplay_and_evaluations_speak_of_what_they_have():
    sft = run_of("sft", "sft", loss=[4.0] * 5 + [0.5] * 5)
    selfplay = run_of("play", "selfplay", questions_kept=[10, 20], challenger_reward=[0.1, 0.3])
    sets = {"text": {"accuracy": 0.77, "stderr": 0.021, "n": 400}}
    evaluated = RunRecord("eval", path=None, evaluation={"sets": sets})
    told = dict(outcomes([sft, selfplay, evaluated]))
    assert told["sft"] == "10 steps: loss 4 → 0.5 nats a token."
    assert "questions kept 10 → 20" in told["play"] and "challenger's reward 0.1 → 0.3" in told["play"]
    assert told["eval"] == "text 77.0 ± 2.1 % of 400 problems."
    assert "eval" not in dict(outcomes([evaluated], evaluations=False))


def test_traces_tell_what_was_kept_and_how_many_were_cut_off():
    card = {"asked": 1200, "kept": 900, "truncated": 290, "too_long": 10, "failed": 0, "kept_tokens": 33_300}
    run = replace(run_of("traces", "traces", prompts=[600, 600]), card=card)
    run = replace(run, metrics=run.metrics | {"step": [600.0, 1200.0]})
    told = dict(outcomes([run]))["traces"]
    assert told == "1200 prompts answered: 900 traces kept, 290 cut off, 10 too long, 0 failed; 37 tokens each."
    assert "24 % of the responses are cut off" in unhealthy([run])[0][1]
    assert unhealthy([replace(run, card=card | {"truncated": 9})]) == unhealthy([replace(run, card={})]) == []


# -- what is unhealthy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"truncated": [0.5] * 10}, "truncated 50 % at worst, healthy ≤ 10 %, beyond on 10 of 10 steps. Look at: "),
        ({"effective_sample_size": [0.9] * 9 + [0.3]}, "effective sample size 30 % at worst, healthy ≥ 50 %"),
        ({"skipped": [0.0] * 99 + [1.0]}, "beyond their limits on single steps: updates skipped (see Health)"),
        ({"reward": [0.0] * 10}, "every step has the same reward, 0: the policy gradient is 0"),
        ({"reward": [0.9, 0.91] * 50 + [0.1, 0.11] * 50}, "reward got worse: 0.905 → 0.105"),
        ({"grad_norm": [1.0, math.nan]}, "not finite or missing on some steps: grad_norm"),
    ],
)
def test_a_complaint_names_the_metric_its_limit_and_where_to_look(metrics, said):
    complaints = [line for _, line in unhealthy([run_of(**metrics)])]
    assert any(said in line for line in complaints), complaints


def test_what_is_worst_comes_first_and_health_is_said_too():
    run = run_of(truncated=[0.5] * 10 + [0.0] * 10, mismatch_kl=[1.0] * 20, reward=[0.1, 0.2] * 10)
    lines = [line for _, line in unhealthy([run])]
    assert lines[0].startswith("kl from sampler to trainer 1 at worst")
    assert lines[1].startswith("truncated")
    assert unhealthy([run_of(truncated=[0.0] * 10, reward=[0.1, 0.2] * 5)]) == []


def test_an_evaluation_of_cut_off_answers_is_complained_of():
    sets = {"text": {"accuracy": 0.1, "stderr": 0.01, "n": 400, "truncated": 0.8, "broken": 3}}
    lines = [line for _, line in unhealthy([RunRecord("eval", path=None, evaluation={"sets": sets})])]
    assert "80 % of the answers are cut off" in lines[0] and "failed on 3 answers" in lines[1]


@pytest.mark.parametrize("kind", ["rl", "sft", "selfplay", "eval", "traces", "demo", "nothing"])
def test_the_page_of_any_run_opens_with_it(tmp_path, kind):
    rng = random.Random(0)
    if kind == "demo":
        runs = write_demo(tmp_path / "runs", problems=8)
    elif kind == "eval":
        samples = evaluation_samples(rng, [("text", i, problem(rng)) for i in range(8)], {"text": 0.5, "image": 0.5})
        runs = write_run(tmp_path / "run", config={"verb": "eval"}, samples=samples, evaluation=evaluation(samples))
    else:
        metrics = {"rl": rl_metrics(rng, teacher=True), "sft": sft_metrics(rng)}.get(kind, [])
        metrics = [{"step": 1, "questions_kept": 5}] if kind == "selfplay" else metrics
        metrics = [{"step": 256, "prompts": 256}] if kind == "traces" else metrics
        runs = write_run(tmp_path / "run", config={"verb": kind}, metrics=metrics)
    html = write_report([runs], tmp_path / "report.html", title="t").read_text()
    main = html[html.index("<main>") :]
    first = re.search(r'<section id="(\w+)"', main)
    assert first and first[1] == "summary"
    summary = main[: main.index("</section>")]
    assert kind == "nothing" or re.search(r"\d step|\d prompts answered|\d problems", summary)
    assert "To look at" in summary or "healthy range" in summary


# -- the same bold in the terminal and on the page -----------------------------------------------------------------


def test_bold_is_the_same_in_the_terminal_and_on_the_page(tmp_path):
    """Two models that only a paired comparison separates: they answered the same problems, one a few more."""
    rows = {"a": [i < 100 for i in range(200)], "b": [i < 108 for i in range(200)]}
    for name, right in rows.items():
        verdicts = ["correct" if ok else "wrong" for ok in right]
        samples = [{"set": "text", "prompt_id": str(i), "verdict": verdict} for i, verdict in enumerate(verdicts)]
        share = sum(right) / len(right)
        stderr = math.sqrt(share * (1 - share) / len(right))
        result = {"sets": {"text": {"accuracy": share, "stderr": stderr, "n": len(right)}}}
        write_run(tmp_path / f"eval_{name}", config={"verb": "eval"}, samples=samples, evaluation=result)
    printed = accuracy_table(accuracies(read_runs([tmp_path])))
    html = write_report([tmp_path], tmp_path / "report.html", title="t").read_text()
    assert "**54.0 ± 3.5**" in printed
    assert re.findall(r'class="best">([^<]*)<', html) == ["54.0 ± 3.5"]


# -- axes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "wanted"),
    [
        ([0, 0.25, 0.5], False, ["0", "0.25", "0.50"]),
        ([0.99990, 0.99995, 1.0], False, ["0.99990", "0.99995", "1.00000"]),
        ([0, 2e-6, 4e-6], False, ["0", "2e-6", "4e-6"]),
        ([1.5e-6, 2.0e-6], False, ["1.5e-6", "2.0e-6"]),
        ([12000, 12500], False, ["12,000", "12,500"]),
        ([1e7, 2e7], False, ["1e7", "2e7"]),
        ([-1, 0, 1], False, ["−1", "0", "1"]),
        ([0.4, 0.45], True, ["40 %", "45 %"]),
        ([0.002, 0.004], True, ["0.2 %", "0.4 %"]),
        ([], False, []),
    ],
)
def test_ticks_are_whole_numbers_to_read(values, share, wanted):
    assert tick_texts(values, share=share) == wanted


@pytest.mark.parametrize(
    "values",
    [[1.0 + 1e-9 * i for i in range(30)], [123456.0 + i / 1e3 for i in range(30)], [3e-7 * i for i in range(30)]],
)
@pytest.mark.parametrize("key", ["loss", "accuracy_text", "kl_teacher", "truncated", "peak_memory_gib"])
def test_no_panel_has_an_offset_or_a_common_factor(key, values):
    values = [value % 1 for value in values] if key in ("accuracy_text", "truncated") else values
    drawn = texts(curve([run_of(**{key: values})], key))
    assert not any(text.startswith(("+", "1e")) for text in drawn)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 1), (0.5, 0.5), (0.98, 1), (0, 0.01), (0.2, 0.9), (0.5, 0.5001)])
def test_a_range_is_never_so_narrow_that_rounding_looks_like_a_curve(low, high, share):
    bottom, top = drawn_range(low, high, share=share)
    assert bottom <= low <= high <= top
    assert top - bottom >= (0.1 if share else 0.1 * high)
    if share:
        assert bottom >= -0.05 and top <= 1.05


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [0.97, 1.0], [0.01, 0.0], [0.4, 0.6]])
def test_accuracies_are_drawn_between_0_and_100_percent(values):
    """Errors of half of everything, which reach beyond: no tick does."""
    run = run_of(accuracy_text=values, stderr_text=[0.5, 0.5])
    ticks = [float(text.removesuffix(" %")) for text in texts(curve([run], "accuracy_text")) if text.endswith(" %")]
    assert len(ticks) > 1 and all(0 <= tick <= 100 for tick in ticks)


def test_bars_and_seeds_stay_inside_too():
    table = {"a": {"text": 0.99}, "b": {"text": 1.0}}
    rows = [{"arm": "a", "seed": seed, "text": value} for seed, value in enumerate((0.99, 1.0))]
    for svg in (accuracy_bars(table), accuracy_bars(REPORT), seeds_errorbars(rows)):
        ticks = [float(text) for text in texts(svg) if re.fullmatch(r"[\d.]+", text)]
        assert ticks and max(ticks) <= 100


def test_a_share_reads_as_a_percentage_everywhere(tmp_path):
    run = read_run(write_run(tmp_path / "run", config={"verb": "rl"}, metrics=[{"step": 1, "accuracy_text": 0.42}]))
    assert outcomes([run]) == [("run", "1 step: text accuracy 42 %.")]


def test_self_play_shows_its_questions_and_counts_iterations(tmp_path):
    """Its row of iteration 0 is the student as given, and `steps` of its config are those of a training inside it."""
    config = {"verb": "selfplay", "iterations": 2, "challenger": {"steps": 7}}
    metrics = [{"step": number, "questions_kept": 5} for number in range(3)]
    samples = [{"step": 1 + n // 20, "question": f"[{n}+1]", "label": "3", "pass_rate": 0.5} for n in range(40)]
    run = write_run(tmp_path / "run", config=config, metrics=metrics, samples=samples)
    html = write_report([run], tmp_path / "report.html", title="t").read_text()
    assert re.search(r'<td class="left">selfplay</td><td>2</td>', html)
    assert html.count('<td class="left wrap"><code>') == 20 and "nothing ≠ nothing" not in html
    assert html.index("[39+1]") < html.index("[1+1]")
