"""`vold eval CONFIG --vlmevalkit`: the paper's ten benchmarks by VLMEvalKit: its config, its command, its results.

What is assumed of the kit, from its public source: `run.py --config` takes {"model": {name: {"class", **arguments}},
"data": {name: {"class", "dataset"}}}; results are CSV files WORK_DIR/MODEL/**/MODEL_SET*_acc.csv or *_score.csv, with
the columns named below; `--judge exact_matching` judges options and yes/no by rule, and cannot judge the other sets
(LogicVista's options included: without a language model the kit ends without a score and without a word).
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vold.config import dump_config
from vold.config.schema import EvalConfig
from vold.report.published import compare_with_published
from vold.report.tables import markdown

MODEL = "vold"  # what the kit calls the checkpoint, in the names of its files
CLASSES = {"qwen2_5_vl": "Qwen2VLChat", "qwen2_vl": "Qwen2VLChat", "qwen3_vl": "Qwen3VLChat"}
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Benchmark:
    """A set of the kit: its class there, the end of its result file's name, and what that file says: label -> percent
    (MME: points), "score" first. `by_rule`: whether the kit can judge it without a language model."""

    loader: str
    results: str
    read: Callable[[Rows], dict[str, float]]
    by_rule: bool = False


def _options(rows: Rows) -> dict[str, float]:
    """Shares, one row a split."""
    return {"score": fmean(100 * float(row["Overall"]) for row in rows)}


def _overall(key: str) -> Callable[[Rows], dict[str, float]]:
    return lambda rows: {"score": next(float(row["acc"]) for row in rows if row[key] == "Overall")}


def _mathverse(rows: Rows) -> dict[str, float]:
    """One row for each version of the same problems. The public leaderboard's MathVerse is the last of these."""
    versions = {row["split"]: float(row["Overall"]) for row in rows}
    return {"score": fmean(versions.values()), **{k: v for k, v in versions.items() if k == "Vision Only"}}


def _dynamath(rows: Rows) -> dict[str, float]:
    """Shares: over all variants (the paper's), and of problems that are right in all ten."""
    settings = {row["Setting"]: 100 * float(row["Overall"]) for row in rows}
    return {"score": settings["Average"], "worst case": settings["Worst Case"]}


def _wemath(rows: Rows) -> dict[str, float]:
    return {"score": float(rows[0]["Score (Strict)"].rstrip("%"))}


def _mme(rows: Rows) -> dict[str, float]:
    parts = {name: float(rows[0][name]) for name in ("perception", "reasoning")}
    return {"score": sum(parts.values()), **parts}


def _hallusion(rows: Rows) -> dict[str, float]:
    overall = next(row for row in rows if row["split"] == "Overall")
    parts = {name: float(overall[name]) for name in ("aAcc", "fAcc", "qAcc")}
    return {"score": fmean(parts.values()), **parts}


BENCHMARKS = {
    "MMMU_Pro_V": Benchmark("MMMUProDataset", "_acc.csv", _options, by_rule=True),
    "MMStar": Benchmark("ImageMCQDataset", "_acc.csv", _options, by_rule=True),
    "MathVision": Benchmark("MathVision", "_score.csv", _overall("Subject")),
    "MathVista_MINI": Benchmark("MathVista", "_score.csv", _overall("Task&Skill")),
    "MathVerse_MINI": Benchmark("MathVerse", "_score.csv", _mathverse),
    "DynaMath": Benchmark("Dynamath", "_score.csv", _dynamath),
    "WeMath": Benchmark("WeMath", "_score.csv", _wemath, by_rule=True),
    "LogicVista": Benchmark("LogicVista", "_score.csv", _overall("Task&Skill")),
    "MME": Benchmark("ImageYORNDataset", "_score.csv", _mme, by_rule=True),
    "HallusionBench": Benchmark("ImageYORNDataset", "_score.csv", _hallusion, by_rule=True),
}


def run(config: EvalConfig) -> None:
    """Writes run_dir/vlmevalkit/JUDGE/config.json, prints the command, runs it where the kit is installed, and adds the
    results that are there to evaluation.json, each judge's apart."""
    folder = (config.run_dir / "vlmevalkit" / config.vlmevalkit.judge).resolve()
    _write_config(kit_config(config), folder / "config.json")
    script = find_kit()
    words = command(config, folder, script or Path("run.py"))
    print(shlex.join(words))
    if script is None:
        print("vlmeval is not installed here: run this in a clone of VLMEvalKit, then the same `vold eval` again")
    elif code := subprocess.run(words, cwd=script.parent, env=_environment()).returncode:
        raise ValueError(f"VLMEvalKit ended with code {code}, see above; what it finished is in {folder}")
    benchmarks = {judge: found for judge in ("rule", "model") if (found := read_results(folder.parent / judge))}
    if not benchmarks:
        print(f"no results below {folder.parent} yet")
        return
    _write(config, benchmarks)
    print(markdown(*compare_with_published(benchmarks)))


def _write_config(asked: dict, path: Path) -> None:
    """Raises ValueError where the folder is another model's: the kit would go on from that one's answers."""
    if path.exists() and (before := json.loads(path.read_text())["model"]) != asked["model"]:
        raise ValueError(
            f"{path.parent} holds answers of {before[MODEL]['model_path']}, or by other settings; take another run_dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked, indent=1) + "\n")


def kit_config(config: EvalConfig) -> dict:
    """The kit's own settings for Qwen2.5-VL, but answers long enough to think, and only the box of them is judged."""
    settings = config.vlmevalkit
    described = config.checkpoint / "config.json"
    if not described.is_file():
        raise ValueError(
            f"checkpoint = {config.checkpoint} holds no config.json; give a directory as `vold export` writes"
        )
    kind = json.loads(described.read_text()).get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"checkpoint = {config.checkpoint} is a {kind!r}; the kit is set up for {', '.join(CLASSES)}")
    arguments = {
        "class": CLASSES[kind],
        "model_path": str(config.checkpoint.resolve()),
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "max_new_tokens": settings.max_new_tokens,
        "use_custom_prompt": False,
        "post_process": True,
    }
    if config.prompt.system:
        arguments["system_prompt"] = config.prompt.system
    sets = {name: {"class": BENCHMARKS[name].loader, "dataset": name} for name in _asked(config)}
    return {"model": {MODEL: arguments}, "data": sets}


def _asked(config: EvalConfig) -> list[str]:
    by_rule = config.vlmevalkit.judge == "rule"
    return [name for name, benchmark in BENCHMARKS.items() if benchmark.by_rule or not by_rule]


def command(config: EvalConfig, folder: Path, script: Path) -> list[str]:
    """For as many processes as there are GPUs to see."""
    import torch

    gpus = torch.cuda.device_count()
    launcher = ["torchrun", f"--nproc-per-node={gpus}"] if gpus > 1 else ["python"]
    words = [*launcher, str(script), "--config", str(folder / "config.json"), "--work-dir", str(folder), "--reuse"]
    words += ["--use-vllm"] if config.engine == "vllm" else []
    return words + (["--judge", "exact_matching"] if config.vlmevalkit.judge == "rule" else [])


def find_kit() -> Path | None:
    """run.py of an installed clone; None where `vlmeval` cannot be imported."""
    found = importlib.util.find_spec("vlmeval")
    if found is None or not found.origin:
        return None
    script = Path(found.origin).parents[1] / "run.py"
    if not script.is_file():
        raise ValueError(
            f"vlmeval is installed without its run.py ({script}); install a clone of VLMEvalKit with pip -e"
        )
    return script


def _environment() -> dict[str, str]:
    """The interpreter that runs vold first in the path: `python` and `torchrun` are its own."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def read_results(work_dir: Path) -> dict[str, dict[str, float]]:
    """Set -> its numbers, of those that the kit has finished. Raises ValueError naming a file that reads otherwise than
    assumed."""
    found = {}
    for name, benchmark in BENCHMARKS.items():
        files = sorted(
            (work_dir / MODEL).glob(f"**/{MODEL}_{name}*{benchmark.results}"), key=lambda f: f.stat().st_mtime
        )
        if files:
            found[name] = _read(files[-1], benchmark)
    return found


def _read(path: Path, benchmark: Benchmark) -> dict[str, float]:
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            return benchmark.read(list(csv.DictReader(lines)))
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} is not a result file as this VLMEvalKit reader knows it ({error!r})") from None


def _write(config: EvalConfig, benchmarks: dict) -> None:
    path = config.run_dir / "evaluation.json"
    before = json.loads(path.read_text()) if path.exists() else {"checkpoint": str(config.checkpoint)}
    path.write_text(json.dumps({**before, "benchmarks": benchmarks}, indent=1) + "\n")
    if not (config.run_dir / "config.yaml").exists():
        (config.run_dir / "config.yaml").write_text(dump_config(config, "eval"))
