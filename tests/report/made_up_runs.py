"""Made-up run directories for the report's tests. Every number here is invented; nothing was trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

ACCURACY = {
    "base": {"text": 0.0825, "image": 0.095},
    "sft": {"text": 0.4325, "image": 0.43},
    "grpo": {"text": 0.5325, "image": 0.4475},
    "vold": {"text": 0.6225, "image": 0.5375},
}
REPORT = {
    "accuracy": ACCURACY,
    "stderr": {m: {s: math.sqrt(p * (1 - p) / 400) for s, p in row.items()} for m, row in ACCURACY.items()},
    "n": {"text": 400, "image": 400},
    "seconds": {"data": 3.1, "traces": 21.4, "sft": 41.0, "grpo": 96.2, "vold": 118.9, "evaluate": 33.0},
    "versions": {"torch": "2.0-made-up", "transformers": "5.0-made-up"},
    "commit": "0123abc",
}
HOSTILE = (
    "</pre><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)> {{ 7*7 }} \u202egnp.exe"
)


def write_demo(root: Path, *, seed: int = 0, problems: int = 400) -> Path:
    """runs/demo with sft, grpo, vold and four evaluations that agree with REPORT when problems = 400."""
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "report.json").write_text(json.dumps(REPORT))
    write_run(root / "sft", config={"verb": "sft", "lr": 5e-4, "steps": 40}, metrics=sft_metrics(rng))
    for arm, beta in (("grpo", 0.0), ("vold", 0.3)):
        config = {"verb": "rl", "seed": 0, "steps": 45, "objective": {"preset": arm, "beta": beta}, "lr": 6e-4}
        run = write_run(
            root / arm, config=config, metrics=rl_metrics(rng, teacher=arm == "vold"), samples=rl_samples(rng)
        )
        (run / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timeline()))
    truth = [(name, i, problem(rng)) for name in ("text", "image") for i in range(problems)]
    for name, i, (text, _) in truth:
        if name == "image" and i < 40:
            draw(text, root / "images" / f"{i}.png", rng)
    for arm in ACCURACY:
        samples = evaluation_samples(rng, truth, ACCURACY[arm])
        write_run(root / f"eval_{arm}", config={"verb": "eval"}, samples=samples, evaluation=evaluation(samples))
    return root


def write_run(path: Path, *, config=None, metrics=(), samples=(), evaluation=None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, rows in (("metrics", metrics), ("samples", samples)):
        if rows:
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation:
        (path / "evaluation.json").write_text(json.dumps(evaluation))
    return path


def sft_metrics(rng: random.Random, steps: int = 40) -> list[dict]:
    return [
        {
            "step": i,
            "seconds": 0.9,
            "loss": 0.3 + 1.4 * math.exp(-i / 9) + rng.gauss(0, 0.03),
            "grad_norm": 1 + 6 * math.exp(-i / 6) + rng.random(),
            "lr": 5e-4,
            "tokens_per_second": 5200 + rng.gauss(0, 200),
        }
        for i in range(steps)
    ]


def rl_metrics(rng: random.Random, *, teacher: bool, steps: int = 45) -> list[dict]:
    rows = []
    for i in range(steps):
        t = i / steps
        row = {
            "step": i,
            "reward": 0.42 + (0.24 if teacher else 0.13) * t + rng.gauss(0, 0.03),
            "loss": rng.gauss(0, 0.05),
            "kl_teacher": (0.5 - 0.3 * t if teacher else 0.5 + 0.2 * t) + abs(rng.gauss(0, 0.03)),
            "entropy": 0.35 - (0.12 if teacher else 0.2) * t + rng.gauss(0, 0.01),
            "clip_fraction_low": 0.01 * rng.random(),
            "clip_fraction_high": 0.02 + 0.1 * t * (not teacher) + 0.02 * rng.random(),
            "grad_norm": 0.8 + rng.random() + (9 if i == 31 and not teacher else 0),
            "lr": 6e-4 * (1 - 0.9 * t),
            "response_length": 37 + rng.gauss(0, 0.6) + 2 * t,
            "truncated": max(0.0, 0.05 - 0.04 * t),
            "broken": 0.0,
            "mismatch_mean": 2e-5 + 1e-5 * rng.random(),
            "mismatch_max": 4e-4 + 3e-4 * rng.random(),
            "tokens_per_second": 3900 + rng.gauss(0, 150),
            "peak_memory_gib": 1.21,
            "seconds_rollout": 0.9 + 0.1 * rng.random(),
            "seconds_grade": 0.05,
            "seconds_teacher": 0.35 if teacher else 0.0,
            "seconds_train": 1.1,
            "seconds_sync": 0.02,
            "seconds": 2.6 if teacher else 2.2,
        }
        if i % 9 == 0 or i == steps - 1:
            row |= {
                "accuracy_text": 0.43 + (0.19 if teacher else 0.1) * t,
                "accuracy_image": 0.42 + 0.1 * t * (1 + teacher) / 2,
            }
        rows.append(row)
    return rows


def rl_samples(rng: random.Random, n: int = 60) -> list[dict]:
    rows = []
    for i in range(n):
        text, gold = problem(rng)
        right = rng.random() < 0.5
        rows.append(
            {
                "step": i // 4,
                "prompt_id": f"train-{i}",
                "prompt": f"solve {text} please",
                **_response(rng, text, gold, right),
                "reward": float(right),
                "advantage": rng.gauss(0, 1),
                "mean_kl": None if right else rng.random(),
                "finish_reason": "stop",
                "images": [],
            }
        )
        if not right:  # scored by the teacher
            rows[-1] |= token_logps(rng, rows[-1]["response"])
    return rows


def token_logps(rng: random.Random, text: str) -> dict:
    """A character a token; the teacher would not have said the last digit but one."""
    logp = [round(-abs(rng.gauss(0, 0.04)), 3) for _ in text]
    teacher = [round(value - abs(rng.gauss(0, 0.05)), 3) for value in logp]
    teacher[-3] = -9.5
    return {"tokens": list(text), "logp": logp, "logp_teacher": teacher}


def timeline(steps: int = 3) -> list[dict]:
    """Strict steps of 2.4 s with a second thread; the last one evaluates."""
    rows = []
    for i in range(steps):
        zero, last = 100 + 3 * i, i == steps - 1
        phases = [
            ("rollout", 0, 0.9),
            ("train", 1.2, 2.3),
            ("student_backward", 1.2, 2.2),
            ("student_forward", 1.2, 1.6),
        ]
        phases += [("evaluate", 2.3, 2.9)] if last else []
        intervals = [[name, "train", zero + start, zero + end] for name, start, end in phases]
        intervals += [["grade", "ahead", zero + 0.001 * j, zero + 0.001 * j + 0.0008] for j in range(500)]
        rows.append({"step": 43 + i, "seconds": 3.0, "intervals": intervals})
    return rows


def evaluation_samples(rng: random.Random, truth, accuracy: dict[str, float]) -> list[dict]:
    """Exactly round(accuracy × n) right ones per set, which ones is chance."""
    rows = []
    for name in ("text", "image"):
        problems = [item for item in truth if item[0] == name]
        right = set(rng.sample(range(len(problems)), round(accuracy[name] * len(problems))))
        for _, i, (text, gold) in problems:
            rows.append(
                {
                    "set": name,
                    "prompt_id": f"{name}-{i}",
                    "prompt": f"so {text} now" if name == "text" else "read the image and solve",
                    **_response(rng, text, gold, i in right),
                    "finish_reason": "stop",
                    "images": [f"../images/{i}.png"] if name == "image" else [],
                }
            )
    return rows


def evaluation(samples: list[dict]) -> dict:
    sets = {}
    for name in dict.fromkeys(row["set"] for row in samples):
        rows = [row for row in samples if row["set"] == name]
        p, n = sum(row["verdict"] == "correct" for row in rows) / len(rows), len(rows)
        sets[name] = {
            "accuracy": p,
            "stderr": math.sqrt(p * (1 - p) / n),
            "n": n,
            "truncated": 0.0,
            "mean_length": 37.2,
        }
    return {"sets": sets, "checkpoint": "checkpoints/45"}


def problem(rng: random.Random) -> tuple[str, str]:
    digits = [rng.randrange(10) for _ in range(4)]
    signs = [rng.choice("+-*") for _ in range(3)]
    value = digits[0]
    for sign, digit in zip(signs, digits[1:], strict=True):
        value = (value + digit if sign == "+" else value - digit if sign == "-" else value * digit) % 10
    return "".join(f"{s}{d}" for s, d in zip(["", *signs], digits, strict=True)), str(value)


def draw(text: str, path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (196, 28), (rng.randrange(200, 256),) * 3)
    pen = ImageDraw.Draw(image)
    for i, character in enumerate(text):
        pen.text((28 * i + rng.randrange(4, 16), rng.randrange(2, 12)), character, fill=(rng.randrange(0, 90),) * 3)
    image.save(path)


def _response(rng: random.Random, text: str, gold: str, right: bool) -> dict:
    answer = gold if right else str((int(gold) + rng.randrange(1, 10)) % 10)
    return {
        "response": f"<think>{text}>..{answer}{text[-4:]}>....{answer}{text[-2:]}</think>\\boxed{{{answer}}}",
        "extracted": answer,
        "gold": gold,
        "verdict": "correct" if right else "wrong",
        "rule": "boxed-exact",
    }
