r"""A long RL run of the tiny model beside a stand-in for vLLM, with everything that a run could leak measured.

    python -m benchmarks.soak --steps 1000        writes benchmarks/results/soak.csv and docs/soak.png

`vold rl` samples ahead (lag 1) from tests/support/fake_engine over HTTP, grades sums such as `\boxed{3+4}` in worker
processes, syncs weights through files in shared memory after each step and saves in the background every 25 steps,
while a view of `vold watch` is drawn once a second. Every second: resident memory, open handles and threads of the
trainer, its child processes and the zombies among them, and the files of the run in shared memory.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import psutil

matplotlib.use("agg")
import matplotlib.pyplot as plt

from vold.commands.watch import LiveRun
from vold.miniature import models
from vold.miniature.data import DataSizes, write_data
from vold.miniature.tokenizer import BOXED, END_BOXED, EOS, TOKEN_ID
from vold.report.watch import view

from .harness import read_rows, write_rows

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "memory_mib": "resident memory, MiB",
    "handles": "open file handles",
    "threads": "threads",
    "children": "child processes",
    "zombies": "zombies",
    "shared_mib": "weights in shared memory, MiB",
}
INK, ACCENT = "#222222", "#d1495b"


def answer(rng: random.Random) -> list[int]:
    """A boxed number, or a sum that the grader's worker must compute, after some tokens."""
    digit = lambda: str(rng.randrange(10))  # noqa: E731
    boxed = [digit()] if rng.random() < 0.5 else [digit(), "+", digit()]
    return [TOKEN_ID[token] for token in (*(digit() for _ in range(rng.randrange(6))), BOXED, *boxed, END_BOXED, EOS)]


def open_engine():
    """The stand-in, which answers with numbers and sums; each of them has log-probs of -0.5."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import fake_engine

    plain, rng = fake_engine.choice, random.Random(0)
    fake_engine.choice = lambda _ids, version: plain(answer(rng), version)
    return fake_engine.FakeEngine()


def arguments(root: Path, url: str, steps: int) -> list[str]:
    for name, config in (("student", models.base_config()), ("teacher", models.teacher_config())):
        models.save_checkpoint(models.new_model(config, seed=0), root / name)
    write_data(root / "data", 0, DataSizes(train=64, traces_prompts=4, traces_other=4, val=2, test=2))
    (root / "shared").mkdir()
    return [
        *(sys.executable, "-m", "vold", "rl", str(ROOT / "vold/miniature/configs/rl.yaml")),
        *(f"student={root / 'student'}", f"teacher={root / 'teacher'}", f"data.path={root / 'data' / 'train.json'}"),
        *(f"run_dir={root / 'run'}", f"steps={steps}", "prompts_per_step=2", "rollout.responses_per_prompt=3"),
        *("rollout.max_new_tokens=16", "rollout.lag=1", "rollout.engine=vllm", f"rollout.vllm.urls=[{url}]"),
        *(f"rollout.vllm.weights_dir={root / 'shared'}", "parity_limit=1e30", "evaluation={}", "optimizer.lr=1e-6"),
        *("save_every=25", "save_async=true", "keep_checkpoints=2", "samples_per_step=1", "grader_workers=2"),
    ]


def reading(process: psutil.Process, root: Path, step: int, started: float) -> dict:
    """What the trainer holds now."""
    children = process.children(recursive=True)
    zombies = 0
    for child in children:
        try:
            zombies += child.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
    shared = 0
    for path in (root / "shared").rglob("*"):
        try:
            shared += path.stat().st_size
        except OSError:  # replaced in this moment
            continue
    return {
        "step": step,
        "seconds": round(time.monotonic() - started, 1),
        "memory_mib": round(process.memory_info().rss / 2**20, 1),
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(children),
        "zombies": zombies,
        "shared_mib": round(shared / 2**20, 2),
    }


def soak(steps: int) -> list[dict]:
    """Readings of a whole run. Raises RuntimeError where the run fails."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="soak-") as folder:
        root, engine = Path(folder), open_engine()
        command, output = arguments(root, engine.url, steps), root / "output"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        started = time.monotonic()
        with output.open("wb") as file:
            trainer = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        process, live = psutil.Process(trainer.pid), None
        while trainer.poll() is None:
            time.sleep(1.0)
            if live is None and (root / "run" / "metrics.jsonl").exists():
                live = LiveRun(root / "run")
            if live is None:
                continue
            view(live.refresh(), silent=live.silent)
            engine.calls.clear()
            try:
                rows.append(reading(process, root, int(max(live.record.metrics.get("step", [0]))), started))
            except psutil.Error:  # it has just ended
                break
        engine.stop()
        if trainer.wait():
            raise RuntimeError(output.read_text()[-2000:])
        rows[-1]["left"] = len(list((root / "shared").iterdir()))
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """A panel for each column over the steps, up to the last one's first reading: then the run exports and ends."""
    last = max(int(row["step"]) for row in rows)
    rows = rows[: 1 + next(number for number, row in enumerate(rows) if int(row["step"]) == last)]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, 3, figsize=(9.5, 4.6), sharex=True, layout="constrained")
        for axes, (name, title) in zip(panels.flat, COLUMNS.items(), strict=True):
            values = [float(row[name]) for row in rows]
            axes.plot([int(row["step"]) for row in rows], values, color=ACCENT, lw=1.2)
            axes.set_ylim(0, max(values) * 1.25 or 1)
            axes.set_title(title, loc="left", color=INK, fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "soak.png")
    parser.add_argument("--draw", action="store_true", help="only draw the figure of an earlier run")
    options = parser.parse_args()
    if not options.draw:
        rows = soak(options.steps)
        print(f"{len(rows)} readings, {rows[-1].pop('left')} folders left in shared memory")
        write_rows(options.out, rows, list(rows[0]))
    draw(read_rows(options.out), options.figure)


if __name__ == "__main__":
    main()
