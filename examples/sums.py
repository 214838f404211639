"""Sums of two numbers below 50, and the curve of a run on them: docs/smollm2.md.

python examples/sums.py data/sums                                    writes cold.jsonl, train.jsonl and test.jsonl
python examples/sums.py runs/smollm2-135m/grpo docs/smollm2.png      draws a run's reward
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

COLD, TEST, NUMBERS = 256, 100, range(1, 50)
WINDOW = 8  # steps of the moving mean


def write(folder: Path) -> None:
    """256 worked sums for SFT, 100 for the test, the other 2045 as problems for RL. No sum is in two files."""
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(0).shuffle(pairs)
    cold, test, train = pairs[:COLD], pairs[COLD : COLD + TEST], pairs[COLD + TEST :]
    worked = [{"prompt": f"What is {a} + {b}?", "response": f"{a} + {b} = \\boxed{{{a + b}}}"} for a, b in cold]
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "cold.jsonl", worked)
    for name, part in (("train", train), ("test", test)):
        problems = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in part]
        _write_rows(folder / f"{name}.jsonl", problems)


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(run: Path, picture: Path) -> None:
    """The mean reward of each step's responses, and its mean over the last steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, rewards = [row["step"] for row in rows], [row["reward"] for row in rows]
    means = [sum(rewards[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(steps, rewards, ".", color="#8aa7c7", label="one step")
    axes.plot(steps, means, color="#1f4e86", label=f"mean of the last {WINDOW}")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1), title="SmolLM2-135M-Instruct, GRPO on sums")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    if len(paths) not in (1, 2):
        sys.exit(__doc__)
    write(*paths) if len(paths) == 1 else draw(*paths)
