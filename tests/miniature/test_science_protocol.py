"""Parts of vold/miniature/science: what they promise before they run, sweeps, and what becomes of results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from pydantic import ValidationError

from vold.config import load_config
from vold.config.schema import RlConfig
from vold.miniature.science import runs
from vold.miniature.science.protocol import (
    START,
    Cell,
    Part,
    Training,
    next_rates,
    part_folder,
    part_names,
    part_path,
    result_path,
)
from vold.miniature.science.report import curves, tables, write_part
from vold.miniature.science.results import (
    accuracy,
    begin_with,
    chosen_rates,
    counted,
    findings,
    pack,
    read_published,
    read_results,
    unpack,
)
from vold.objectives import build_objective
from vold.train.config_checks import check_rl_config
from vold.types import Diverged

PART = {
    "claim": "b is better than a",
    "steps": 10,
    "seeds": [0, 1, 2, 3],
    "sets": {"text": {"validation": "$val_text", "test": "$test_text", "layout": "orz"}},
    "conditions": {"here": {}, "there": {}},
    "arms": {"a": {"rates": [1e-4, 3e-4, 1e-3]}, "b": {"rates": [3e-4]}},
    "sweep": {"conditions": ["here"], "seeds": [100]},
    "comparisons": [{"new": "b", "old": "a", "measures": ["text"]}],
}


def changed(**changes) -> dict:
    return PART | changes


@pytest.mark.parametrize("name", part_names())
def test_a_part_states_a_fair_comparison(name):
    part = Part.load(part_path(name))
    assert 8 <= len(part.seeds) <= 12 or name == "real"
    assert part.family, "comparisons are stated before anything runs"
    for arm, one in part.arms.items():
        assert len(one.rates) != 2, f"{arm}: three rates to begin with, or one that another sweep found"
        assert list(one.rates) == sorted(one.rates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": [{"new": "c", "old": "a", "measures": ["text"]}]}, "arm c is not defined"),
        ({"comparisons": [{"new": "b", "old": "a", "measures": ["sound"]}]}, "measure sound is not defined"),
        ({"sweep": {"conditions": ["nowhere"], "seeds": [100]}}, "condition nowhere is not defined"),
        ({"sweep": {"conditions": ["here"], "seeds": [3]}}, r"seeds \[3\] are both swept and counted"),
        ({"arms": {"a": {"rates": []}, "b": {"rates": [1e-4]}}}, "at least 1 item"),
        ({"seed": [1]}, "Extra inputs"),
        (
            {
                "conditions": {"here": {}, "there": {"arms": ["a"]}},
                "comparisons": [{"new": "b", "old": "a", "measures": ["text"], "conditions": ["here", "there"]}],
            },
            "b - a under there: b does not run under there",
        ),
    ],
)
def test_a_part_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Part.model_validate(changed(**changes))


def test_a_mistake_in_a_file_is_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(changed(sed=[1])))
    with pytest.raises(ValueError, match=r"^[^\n]*mine.yaml: unknown key sed; did you mean seeds\?$"):
        Part.load(path)


def test_an_unknown_part_names_those_there_are():
    with pytest.raises(ValueError, match=r"PART: 'masks' is unknown; one of .*mask"):
        part_path("masks")


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({1e-4: 0.5, 3e-4: 0.6, 1e-3: 0.4}, ()),
        ({1e-4: 0.5, 3e-4: 0.6, 1e-3: 0.7}, (3e-3,)),
        ({1e-4: 0.8, 3e-4: 0.6, 1e-3: 0.7}, (3e-5,)),
        ({1e-4: 0.5, 3e-4: 0.6, 1e-3: math.nan}, ()),
        ({1e-4: 0.5, 3e-4: 0.5, 1e-3: 0.1}, (3e-5,)),
        ({3e-4: 0.5}, ()),
    ],
)
def test_a_sweep_goes_on_until_its_optimum_is_inside(scores, wanted):
    assert next_rates(scores, most=6) == wanted


def test_a_sweep_ends_after_its_most_rates():
    assert next_rates({1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.3}, most=3) == ()


def test_answers_keep_their_order():
    right = np.random.default_rng(0).random(2001) < 0.5
    assert (unpack(pack(right.tolist())) == right).all()


def test_a_condition_is_swept_for_itself_where_the_part_says_so():
    """Best rates, by condition: here 3e-4, there 1e-3; elsewhere takes those of the first that is swept."""
    named = {"conditions": {"here": {}, "there": {}, "elsewhere": {}}, "sweep": {"conditions": ["here", "there"]}}
    part = Part.model_validate(changed(**named))
    assert part.sweeps() == [("here", "a"), ("there", "a")]
    results = []
    for cell, best in zip(part.sweeps(), (3e-4, 1e-3), strict=True):
        for training in part.tried(cell, part.arms["a"].rates):
            score = 0.5 if training.rate == best else 0.4
            results.append(asdict(training) | {"validation": {"text": [[10, score]]}})
    rates = chosen_rates(results, part)
    assert [rates[Cell(name, "a")] for name in part.conditions] == [3e-4, 1e-3, 3e-4]
    assert {t.rate for t in part.counted(rates) if t.condition == "there"} == {1e-3, 3e-4}
    runs_there = [asdict(Training("there", "a", 0, rate, False)) for rate in (3e-4, 1e-3)]
    assert counted([*results, *runs_there], part) == runs_there[1:]


@pytest.fixture
def finished(tmp_path):
    """A part whose runs have ended: b is right where a is and on a further 12 % of problems; under `there` it is a."""
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(PART))
    part, rng = Part.load(path), np.random.default_rng(0)
    for training in part.tried(Cell("here", "a"), part.arms["a"].rates):
        score = {1e-4: 0.3, 3e-4: 0.5, 1e-3: 0.4}[training.rate]
        _write(tmp_path, path, training, {"validation": {"text": [[10, score]]}})
    for seed in part.seeds:
        same = rng.random(500) < 0.4
        for condition, gain in (("here", 0.2), ("there", 0.0)):
            _write(tmp_path, path, Training(condition, "a", seed, 3e-4, False), {"correct": {"text": pack(same)}})
            better = same | (rng.random(500) < gain)
            _write(tmp_path, path, Training(condition, "b", seed, 3e-4, False), {"correct": {"text": pack(better)}})
    _write(tmp_path, path, Training("here", "a", 0, 1e-4, False), {"correct": {"text": pack(np.ones(500, bool))}})
    return tmp_path, path, part


def _write(root, path, training, outcome):
    file = result_path(root, path, training)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps(asdict(training) | {"cpu_seconds": 1.0, "validation": {"text": [[5, 0.3], [10, 0.4]]}} | outcome)
    )


def test_findings_are_paired_and_adjusted(finished):
    root, _, part = finished
    every = read_results(root / "science" / "mine")
    assert chosen_rates(every, part) == dict.fromkeys(part.cells(), 3e-4)
    results = counted(every, part)
    here, there = findings(results, part)
    assert here.estimate.mean == pytest.approx(12, abs=2) and here.verdict == "better"
    assert (there.estimate.mean, there.verdict) == (0.0, "undecided")
    measured = accuracy(results, "here", "a", "text")
    assert measured and measured.mean == pytest.approx(40, abs=2), "another rate's run does not count"


def test_a_contrast_that_is_not_there_yet_makes_no_other_one_surer(finished):
    root, _, part = finished
    results = counted(read_results(root / "science" / "mine"), part)
    alone = [result for result in results if result["condition"] == "here"]
    assert findings(alone, part)[0].p == findings(results, part)[0].p


def test_a_run_that_diverged_has_nothing_right(finished):
    root, path, part = finished
    before = findings(counted(read_results(root / "science" / "mine"), part), part)[0]
    _write(root, path, Training("here", "b", 3, 3e-4, False), {"failed": "loss is nan"})
    file = result_path(root, path, Training("here", "b", 3, 3e-4, False))
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "validation"}))
    results = read_results(root / "science" / "mine")
    after = findings(counted(results, part), part)[0]
    assert "4 (1 diverged)" in tables(part, results) and after.seeds == 4
    assert before.verdict == "better" and after.verdict == "undecided" and after.estimate.mean < before.estimate.mean
    assert curves(part.model_copy(update={"curve_every": 5}), results)


def test_runs_of_other_seeds_do_not_count(finished):
    root, _, part = finished
    fewer = part.model_copy(update={"seeds": (0, 1)})
    assert {r["seed"] for r in counted(read_results(root / "science" / "mine"), fewer)} == {0, 1}


def test_a_rate_at_an_edge_is_marked(finished):
    root, _, part = finished
    results = [r for r in read_results(root / "science" / "mine") if not (r["swept"] and r["rate"] == 1e-3)]
    assert "0.0003*" in tables(part, results)


def test_another_machine_goes_on_from_published_runs(finished, tmp_path_factory):
    root, path, part = finished
    write_part(root, path, part)
    folder, elsewhere = root / "science" / "mine", tmp_path_factory.mktemp("elsewhere")
    published = read_published(folder / "results.jsonl")
    begin_with(elsewhere, path, published)
    assert read_results(part_folder(elsewhere, path)) == published == read_results(folder)
    kept = result_path(elsewhere, path, Training("here", "a", 0, 3e-4, False))
    kept.write_text("{}")
    begin_with(elsewhere, path, published)
    assert kept.read_text() == "{}", "what is there stays"


@pytest.mark.parametrize("name", part_names())
def test_every_runs_config_is_valid(name):
    """With all overrides of its condition and arm, as the run would load it."""
    from string import Template

    from vold.miniature.pipeline import CONFIGS

    part = Part.load(part_path(name))
    verb = runs.VERBS[part.command]
    for one in part.counted(chosen_rates([], part)):
        training = replace(one, swept=True)
        settings = runs.settings_of(part, training)
        names = {n for text in settings for n in Template(text).get_identifiers()}
        texts = [
            Template(text).substitute(dict.fromkeys(names, "somewhere") | {"configs": CONFIGS}) for text in settings
        ]
        config = load_config(verb.config, runs.config_path(part.config), texts)
        assert config.seed == one.seed and START not in part.arms
        if isinstance(config, RlConfig):
            check_rl_config(config, build_objective(config.objective, config.rollout.max_new_tokens))


def test_only_divergence_is_an_outcome(finished, monkeypatch):
    """What else ends a run is raised, and what it had stays for the next attempt."""
    root, path, part = finished
    training = Training("here", "b", 7, 3e-4, swept=True)
    error = ValueError("run_dir is in use by another process")

    def train(config, *, resume):
        (config.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (config.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
        raise error

    monkeypatch.setitem(runs.VERBS, "rl", replace(runs.VERBS["rl"], train=train))
    result = result_path(root, path, training)
    with pytest.raises(ValueError, match="in use"):
        runs.run_training(root, path, part, training)
    assert not result.exists() and (result.with_suffix("") / "checkpoints").exists()
    error = Diverged("loss is nan")
    runs.run_training(root, path, part, training)
    assert json.loads(result.read_text())["failed"] == "loss is nan"


@pytest.mark.parametrize("training", [Training("here", "b", 0, 3e-4, False), Training("here", START, 0, 0.0, False)])
def test_a_result_of_other_settings_is_refused(finished, training):
    root, path, part = finished
    _write(root, path, training, {})
    runs.run_training(root, path, part, training)  # a result of before, without a digest, is taken as it is
    file = result_path(root, path, training)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"design": runs.design(part, training)}))
    runs.run_training(root, path, part, training)
    changed_runs = ({"steps": 500}, {"overrides": ["objective.beta=1"]}) if training.arm != START else ()
    for changes in (*changed_runs, {"conditions": {"here": {"start": None}}}, {"temperature": 1.0}):
        other = Part.model_validate(PART | changes)
        with pytest.raises(ValueError, match="is a run of other settings than"):
            runs.run_training(root, path, other, training)
