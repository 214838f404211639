"""`vold eval --vlmevalkit`: the kit's config and command, a made-up kit that is run, result files as the kit's."""

from __future__ import annotations

import json
import sys

import pytest

from vold.evaluation import vlmevalkit

# Columns and scales are those of the kit's evaluation functions; the numbers are made up.
RESULTS = {
    "vold_MMMU_Pro_V_acc.csv": "split,Overall,Accounting\ntest,0.321,0.25\n",
    "vold_MMStar_acc.csv": "split,Overall,coarse perception,math\nnone,0.552,0.6,0.5\n",
    "vold_MathVision_gpt-4o-mini_score.csv": (
        "Subject,tot,prefetch,hit,prefetch_rate,acc\nOverall,3040,2900,851,95.4,27.99\nalgebra,345,300,100,90.0,28.99\n"
    ),
    "vold_MathVista_MINI_gpt-4o-mini_score.csv": (
        "Task&Skill,tot,prefetch,hit,prefetch_rate,acc\nOverall,1000,900,619,90.0,61.9\n"
    ),
    "vold_MathVerse_MINI_gpt-4o-mini_score.csv": "split,Overall,Plane\nText Lite,40.0,41\nVision Only,36.0,30\n",
    "vold_DynaMath_gpt-4o-mini_score.csv": "Setting,Overall,Level-high\nAverage,0.507,0.4\nWorst Case,0.2,0.1\n",
    "vold_WeMath_score.csv": (
        '"Model","Score (Strict)","InsufficientKnowledge (Strict)","Score (Loose)","One-step(S1)"\n'
        '"","31.81%","30.10% (158)","40.00%","60.00%"\n'
    ),
    "vold_LogicVista_gpt4o-mini_score.csv": "Task&Skill,tot,hit,acc\nOverall,447,201,44.97\ninductive,107,40,37.4\n",
    "vold_MME_score.csv": "perception,reasoning,OCR\n1530.0,738.0,140\n",
    "vold_HallusionBench_score.csv": "split,aAcc,fAcc,qAcc\nVD,60,40,40\nOverall,66.0,42.0,41.4\n",
}
EXPECTED = dict(
    MMMU_Pro_V=32.1,
    MMStar=55.2,
    MathVision=27.99,
    MathVista_MINI=61.9,
    MathVerse_MINI=38.0,
    DynaMath=50.7,
    WeMath=31.81,
) | dict(LogicVista=44.97, MME=2268.0, HallusionBench=49.8)

KIT = """
import argparse, json, pathlib
words = argparse.ArgumentParser()
for name in ("--config", "--work-dir", "--judge"):
    words.add_argument(name)
words.add_argument("--reuse", action="store_true")
asked = words.parse_args()
config = json.loads(pathlib.Path(asked.config).read_text())
(model,) = config["model"]
out = pathlib.Path(asked.work_dir) / model / "T20260101_Gabc"
out.mkdir(parents=True)
if "MMStar" not in config["data"]:
    raise SystemExit(3)
(out / f"{model}_MMStar_acc.csv").write_text("split,Overall\\nnone,0.5\\n")
"""


def test_without_the_kit_its_config_and_command_are_written(load, tmp_path, world, capsys):
    config = load("eval", tmp_path / "eval", "prompt.system=Think.", "vlmevalkit.judge=model")
    vlmevalkit.run_vlmevalkit(config)
    written = json.loads((tmp_path / "eval" / "vlmevalkit" / "model" / "config.json").read_text())
    (arguments,) = written["model"].values()
    assert arguments["class"] == "Qwen2VLChat" and arguments["model_path"] == str(world.student.resolve())
    assert arguments["max_new_tokens"] >= 8192 and arguments["max_pixels"] == 16384 * 28 * 28
    assert arguments["system_prompt"] == "Think."
    assert written["data"].keys() == EXPECTED.keys() and written["data"]["DynaMath"]["class"] == "Dynamath"
    said = capsys.readouterr().out
    assert said.startswith("python run.py --config ") and "vlmeval is not installed here" in said
    assert "--judge gpt-4o-mini" in " ".join(said.split()) and "exact_matching" not in said
    assert not (tmp_path / "eval" / "evaluation.json").exists()
    with pytest.raises(ValueError, match=r"vlmevalkit/model holds answers of .*; take another run_dir"):
        vlmevalkit.run_vlmevalkit(load("eval", tmp_path / "eval", "prompt.system=Hurry.", "vlmevalkit.judge=model"))


def test_results_of_both_judges_beside_the_papers(load, tmp_path, capsys):
    config = load("eval", tmp_path / "eval")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "evaluation.json").write_text('{"sets": {"text": {"accuracy": 1.0}}}')
    folder = tmp_path / "eval" / "vlmevalkit"
    for judge, names in {"model": RESULTS, "rule": ["vold_MMStar_acc.csv"]}.items():
        (folder / judge / "vold" / "T1_G2").mkdir(parents=True)
        for name in names:
            (folder / judge / "vold" / "T1_G2" / name).write_text(RESULTS[name])
    vlmevalkit.run_vlmevalkit(config)
    evaluation = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert evaluation["sets"] == {"text": {"accuracy": 1.0}}
    found = {name: numbers["score"] for name, numbers in evaluation["benchmarks"]["model"].items()}
    assert found == pytest.approx(EXPECTED)
    assert evaluation["benchmarks"]["rule"].keys() == {"MMStar"}
    assert evaluation["benchmarks"]["model"]["MathVerse_MINI"]["Vision Only"] == 36.0
    assert evaluation["benchmarks"]["model"]["DynaMath"]["worst case"] == pytest.approx(20.0)
    assert evaluation["benchmarks"]["model"]["MME"]["reasoning"] == 738.0
    said = capsys.readouterr().out
    assert "--judge exact_matching" in said and "HallusionBench" in said
    by_rule = json.loads((folder / "rule" / "config.json").read_text())["data"]
    assert by_rule.keys() == {"MMMU_Pro_V", "MMStar", "WeMath", "MME", "HallusionBench"}
    damaged = folder / "model" / "vold" / "T1_G2" / "vold_MME_score.csv"
    damaged.write_text("what,else\n1,2\n")
    with pytest.raises(ValueError, match=r"vold_MME_score.csv is not a result file as") as error:
        vlmevalkit.run_vlmevalkit(config)
    assert "\n" not in str(error.value)


def test_an_installed_kit_is_run(load, tmp_path, monkeypatch):
    (tmp_path / "kit" / "vlmeval").mkdir(parents=True)
    (tmp_path / "kit" / "vlmeval" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "kit")
    config = load("eval", tmp_path / "eval")
    with pytest.raises(ValueError, match=r"installed without its run.py"):
        vlmevalkit.run_vlmevalkit(config)
    (tmp_path / "kit" / "run.py").write_text(KIT)
    vlmevalkit.run_vlmevalkit(config)
    evaluation = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert evaluation["benchmarks"] == {"rule": {"MMStar": {"score": 50.0}}}
    assert "MathVista_MINI" not in (tmp_path / "eval" / "vlmevalkit" / "rule" / "config.json").read_text()
    with pytest.raises(ValueError, match="VLMEvalKit ended with code 1"):  # its folder is there already
        vlmevalkit.run_vlmevalkit(config)
    assert "vlmeval" not in sys.modules, "found, not imported"


def test_a_checkpoint_the_kit_has_no_class_for(load, tmp_path, world):
    with pytest.raises(ValueError, match="is a 'qwen3'; the kit is set up for qwen2_5_vl"):
        vlmevalkit.run_vlmevalkit(load("eval", tmp_path / "eval", f"checkpoint={world.teacher}"))
    with pytest.raises(ValueError, match=r"holds no config.json"):
        vlmevalkit.run_vlmevalkit(load("eval", tmp_path / "eval", "checkpoint=nowhere"))
    with pytest.raises(ValueError, match=r"vlmevalkit.max_new_tokens = 100"):
        load("eval", tmp_path / "eval", "vlmevalkit.max_new_tokens=100")
