"""`vold eval CONFIG --vlmevalkit`: the paper's ten benchmarks by VLMEvalKit: its config, its command, its results.

Assumptions about the kit, from its public source: `run.py --config` takes {"model": {name: {"class", **arguments}},
"data": {name: {"class", "dataset"}}}; results are CSV files WORK_DIR/MODEL/**/MODEL_SET*_acc.csv or *_score.csv, with
the columns named below; `--judge exact_matching` grades options and yes/no by rule, and cannot grade the other sets
(LogicVista's options included: without a language model the kit ends silently and without a score).
"""

from __future__ import annotations

import csv
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vold.config import dump_config
from vold.config.schema import EvalConfig, PromptConfig, VlmevalkitConfig
from vold.io import configure_logging, log, to_json, write_atomically
from vold.report.published import compare_with_published
from vold.report.tables import markdown
from vold.untrusted import read_json

PAPERS_JUDGE = "gpt-4o-mini"  # which read the answers (VOLD section 4.1)
MODEL = "vold"  # the checkpoint's name in the kit's file names
CLASSES = {"qwen2_5_vl": "Qwen2VLChat", "qwen2_vl": "Qwen2VLChat", "qwen3_vl": "Qwen3VLChat"}
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the kit.

    loader   its class in the kit
    results  the end of its result file's name
    read     the file's rows -> {label: percent} (MME: points), "score" first
    by_rule  the kit can grade it without a language model
    """

    loader: str
    results: str
    read: Callable[[Rows], dict[str, float]]
    by_rule: bool = False


def _options(rows: Rows) -> dict[str, float]:
    """Mean over the splits, one row each; the file has shares."""
    return {"score": fmean(100 * float(row["Overall"]) for row in rows)}


def _overall(key: str) -> Callable[[Rows], dict[str, float]]:
    return lambda rows: {"score": next(float(row["acc"]) for row in rows if row[key] == "Overall")}


def _mathverse(rows: Rows) -> dict[str, float]:
    """Mean over the versions of the same problems, one row each. The public leaderboard's MathVerse is Vision Only."""
    versions = {row["split"]: float(row["Overall"]) for row in rows}
    return {"score": fmean(versions.values()), **{k: v for k, v in versions.items() if k == "Vision Only"}}


def _dynamath(rows: Rows) -> dict[str, float]:
    """Over all variants (the paper's number), and over problems that are solved in all ten; the file has shares."""
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


def run_vlmevalkit(config: EvalConfig) -> None:
    """Write run_dir/vlmevalkit/JUDGE/config.json, log the kit's command, run it where the kit is installed, and add the
    results that are there to evaluation.json, those of each judge apart. Raises ValueError where the kit fails."""
    configure_logging()
    folder = (config.run_dir / "vlmevalkit" / config.vlmevalkit.judge).resolve()
    _write_config(kit_config(config.checkpoint, config.prompt, config.vlmevalkit), folder / "config.json")
    script = find_kit()
    command = kit_command(folder, script or Path("run.py"), config.vlmevalkit, use_vllm=config.engine == "vllm")
    log.info(shlex.join(command))
    if script is None:
        log.info("vlmeval is not installed here: run this in a clone of VLMEvalKit, then the same `vold eval` again")
    elif code := subprocess.run(command, cwd=script.parent, env=_environment()).returncode:
        raise ValueError(f"VLMEvalKit ended with code {code}, see above; what it finished is in {folder}")
    benchmarks = {judge: results for judge in ("rule", "model") if (results := read_results(folder.parent / judge))}
    if not benchmarks:
        log.info(f"no results below {folder.parent} yet")
        return
    _write_results(config, benchmarks)
    log.info(markdown(*compare_with_published(benchmarks)))


def _write_config(kit: dict, path: Path) -> None:
    """Raise ValueError where the folder is another model's: the kit would continue from that one's answers."""
    if path.exists() and _object(path).get("model") != kit["model"]:
        raise ValueError(f"{path.parent} holds answers of another model, or by other settings; take another run_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(kit, indent=1) + "\n")


def _object(path: Path) -> dict:
    """The JSON object in a file; ValueError for another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} where an object belongs; restore it")
    return value


def kit_config(checkpoint: Path, prompt: PromptConfig, settings: VlmevalkitConfig) -> dict:
    """The kit's config: its own settings for Qwen2.5-VL, but responses long enough to reason, graded by their box."""
    model_config = checkpoint / "config.json"
    if not model_config.is_file():
        raise ValueError(f"checkpoint = {checkpoint} holds no config.json; give a directory as `vold export` writes")
    model_type = _object(model_config).get("model_type")
    if model_type not in CLASSES:
        raise ValueError(f"checkpoint = {checkpoint} is a {model_type!r}; the kit is set up for {', '.join(CLASSES)}")
    arguments = {
        "class": CLASSES[model_type],
        "model_path": str(checkpoint.resolve()),
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "max_new_tokens": settings.max_new_tokens,
        "use_custom_prompt": False,
        "post_process": True,
    }
    if prompt.chat_template is not None or prompt.chat_template_kwargs:
        raise ValueError(
            "prompt.chat_template: the kit renders with the checkpoint's own, which `vold export` writes; leave it out"
        )
    if prompt.system:
        arguments["system_prompt"] = prompt.system
    sets = {
        name: {"class": benchmark.loader, "dataset": name}
        for name, benchmark in BENCHMARKS.items()
        if benchmark.by_rule or settings.judge == "model"
    }
    return {"model": {MODEL: arguments}, "data": sets}


def kit_command(folder: Path, script: Path, settings: VlmevalkitConfig, *, use_vllm: bool) -> list[str]:
    """The kit's command line, with a process for each visible GPU."""
    import torch

    gpus = torch.cuda.device_count()
    launcher = ["torchrun", f"--nproc-per-node={gpus}"] if gpus > 1 else ["python"]
    command = [*launcher, str(script), "--config", str(folder / "config.json"), "--work-dir", str(folder), "--reuse"]
    command += ["--use-vllm"] if use_vllm else []
    return [*command, "--judge", "exact_matching" if settings.judge == "rule" else PAPERS_JUDGE]


def find_kit() -> Path | None:
    """Path of run.py in an installed clone; None where `vlmeval` cannot be imported."""
    package = importlib.util.find_spec("vlmeval")
    if package is None or not package.origin:
        return None
    script = Path(package.origin).parents[1] / "run.py"
    if not script.is_file():
        raise ValueError(
            f"vlmeval is installed without its run.py ({script}); install a clone of VLMEvalKit with pip -e"
        )
    return script


def _environment() -> dict[str, str]:
    """The environment with vold's own `python` and `torchrun` first in the path."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def read_results(work_dir: Path) -> dict[str, dict[str, float]]:
    """Benchmark -> its numbers, of those that the kit has finished. Raises ValueError, naming the file, for results
    of another form than assumed."""
    results = {}
    for name, benchmark in BENCHMARKS.items():
        files = sorted(
            (work_dir / MODEL).glob(f"**/{MODEL}_{name}*{benchmark.results}"), key=lambda f: f.stat().st_mtime
        )
        if files:
            results[name] = _read(files[-1], benchmark)
    return results


def _read(path: Path, benchmark: Benchmark) -> dict[str, float]:
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            return benchmark.read(list(csv.DictReader(lines)))
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} is not a result file as this VLMEvalKit reader knows it ({error!r})") from None


def _write_results(config: EvalConfig, benchmarks: dict) -> None:
    """Add the benchmarks to evaluation.json; write config.yaml where an evaluation has not."""
    path = config.run_dir / "evaluation.json"
    before = _object(path) if path.exists() else {"checkpoint": str(config.checkpoint)}
    write_atomically(path, to_json({**before, "benchmarks": benchmarks}, indent=1) + "\n")
    if not (config.run_dir / "config.yaml").exists():
        write_atomically(config.run_dir / "config.yaml", dump_config(config, "eval"))
