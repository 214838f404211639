r"""Do a reward function of one's own and a judge teach? On the miniature's models, after `make demo`:

    python -m benchmarks.own_rewards --student runs/demo/sft/model --data runs/miniature/seed0/data

GRPO with `examples/custom_reward.py:right_steps`, then with a judge at a local server, which compares the box with the
reference answer and is asked over HTTP like any other. Prints the reward of the first and the last ten steps, with the
share of right answers among the same responses, which is no part of the first reward, and validation accuracy at half
time and at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vold import load_config, train_rl
from vold.config.schema import RlConfig
from vold.grading import equal, extract_answer
from vold.io import log
from vold.run.run_dir import read_rows

ROOT = Path(__file__).parents[1]
EDGE = 10  # steps whose mean is shown
SHOWN = ("reward", "reward_accuracy")


class Rater(BaseHTTPRequestHandler):
    """Chat completions: the user message is a JSON object, the score 10 for a right box and 0 for any other."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        gold, _, response = body["messages"][-1]["content"].partition("\n")
        answer = extract_answer(response)
        score = 10 if answer is not None and equal(answer, gold)[0] else 0
        reply = {"choices": [{"message": {"role": "assistant", "content": f"It is checked. Score: {score}"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def rater() -> Iterator[str]:
    """The address of a running judge."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rater)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def run(name: str, reward: dict, options: argparse.Namespace, folder: Path) -> None:
    config = load_config(
        ROOT / "vold/miniature/configs/rl.yaml",
        f"run_dir={folder / name}",
        f"student={options.student}",
        "teacher=null",
        f"data.path={options.data / 'train.json'}",
        "objective={preset: grpo}",
        f"steps={options.steps}",
        f"prompts_per_step={options.prompts}",
        f"optimizer.lr={options.lr}",
        f"evaluation.every={options.steps // 2}",
        f"evaluation.sets={{text: {{path: {options.data / 'val_text.json'}, layout: orz}}}}",
        f"reward={json.dumps(reward)}",
        schema=RlConfig,
    )
    train_rl(config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    edges = {key: [statistics.fmean(row[key] for row in part) for part in (rows[:EDGE], rows[-EDGE:])] for key in SHOWN}
    shown = ", ".join(f"{key} {first:.3f} → {last:.3f}" for key, (first, last) in edges.items())
    accuracy = ", ".join(f"{row['accuracy_text']:.3f}" for row in rows if "accuracy_text" in row)
    failed = sum(row[f"reward_{name}_errors"] for row in rows)
    log.info(f"{name}: {shown}; validation {accuracy}; {failed:g} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, rater() as url:
        function = {"function": f"{ROOT / 'examples/custom_reward.py'}:right_steps"}
        judge = {"judge": {"url": url, "model": "rater", "template": "{gold}\n{response}"}}
        for name, reward in (("right_steps", function), ("judge", judge)):
            run(name, reward, options, Path(folder))


if __name__ == "__main__":
    main()
