"""Bytes a token and seconds a thousand tokens of every road to a teacher's scores. Needs vLLM.

    PYTHONPATH=tests/vllm/shim TORCH_COMPILE_DISABLE=1 .venv-vllm/bin/python -m benchmarks.teacher_roads
        the miniature's teacher, untrained, on a CPU, in the environment of `make test-vllm`

Roads: in the trainer, vLLM inside the process, an engine of `vold serve`, vLLM's own OpenAI server; log-probs of the
sampled ids, hidden states of the whole distributions, or the most probable ids. They take turns on the same responses:
only ratios within one run are claims. Bytes are those of the answers. Writes teacher_roads-<device>.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from vold.commands.serve import server_command, server_environment
from vold.config.schema import OpenaiConfig, VllmConfig
from vold.data.packing import pack
from vold.endpoint import Endpoint
from vold.miniature import models
from vold.models.architecture import Architecture
from vold.models.tokenizer import load_tokenizer
from vold.parallel.launch import Layout, initialise
from vold.rollout.vllm import http
from vold.teacher import Teacher, TopTeacher, VllmDistributions, VllmTeacher
from vold.types import Prompt, Rollout, Sample

from .harness import environment, spread, write_rows
from .rollout import _vllm_version

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("road", "gives", "responses", "response_tokens", "runs", "bytes_per_token", "median_s_per_1000", "p20", "p80"),
    *("over_trainer", "device", "torch", "vllm", "python", "commit", "started"),
)
TOP_K = 20  # what `vllm serve` allows
PATIENCE = 600.0
SAMPLED, WHOLE = "log-probs", "hidden states"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    received = _count_bytes()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        teacher = Path(scratch) / "teacher"
        models.save_checkpoint(models.new_model(models.teacher_config(), seed=0), teacher)
        layout = initialise(1, 1, seed=0)
        engine = servers.enter_context(_engine(teacher, Path(scratch)))
        openai = servers.enter_context(_openai(teacher, Path(scratch)))
        roads = _roads(teacher, layout, _samples(options), engine, openai)
        seconds: dict[tuple[str, str], list[float]] = {road: [] for road in roads}
        moved = dict.fromkeys(roads, 0)
        for run in roads.values():
            run()  # warms up
        for _ in range(options.runs):
            for road, run in roads.items():
                received[0], started = 0, time.perf_counter()
                run()
                seconds[road].append(time.perf_counter() - started)
                moved[road] = received[0]
    tokens, facts = options.responses * options.response_tokens, environment(torch.device("cpu"), 1)
    rows = _rows(options, tokens, seconds, moved, facts)
    write_rows(options.out / "teacher_roads-cpu.csv", rows, COLUMNS)
    for line in table(rows):
        print(line)


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The table of docs/teachers.md."""
    lines = ["| road | gives | bytes a token | s a thousand tokens | beside the trainer's |", "|:--|:--|--:|--:|--:|"]
    for row in rows:
        size = float(str(row["bytes_per_token"]))
        times, seconds = float(str(row["over_trainer"])), float(str(row["median_s_per_1000"]))
        cells = (row["road"], row["gives"], f"{size:.0f}" if size else "–", f"{seconds:.3f}", f"{times:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7, help="timed turns of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _samples(options: argparse.Namespace) -> list[Sample]:
    """Ids that the miniature's tokenizer has, behind prompts of 32."""
    draw = random.Random(0)
    ids = [[draw.randrange(8, 40) for _ in range(32 + options.response_tokens)] for _ in range(options.responses)]
    return [Sample(Prompt(str(i), row[:32], ""), row[32:], 0.0, 0.0, 1.0) for i, row in enumerate(ids)]


def _roads(
    teacher: Path, layout: Layout, samples: Sequence[Sample], engine: VllmConfig, openai: OpenaiConfig
) -> dict[tuple[str, str], Callable[[], object]]:
    """(road, what it gives) -> one call for all samples."""
    rollouts = [Rollout(s.prompt, s.response_ids, [-1.0] * len(s.response_ids), "length", "") for s in samples]
    batch, size = pack(samples, max_tokens=1 << 14), len(load_tokenizer(teacher))
    head = {"dtype": torch.float32, "vocab_size": size}
    served = {**head, "student_rows": Architecture.from_pretrained(teacher).vocab}
    inside = VllmConfig(kv_cache_gib=0.25, max_model_len=256, enforce_eager=True)
    k2 = {name: VllmTeacher(teacher, at, temperature=1.0) for name, at in _by_name(inside, engine, openai).items()}
    whole = {
        name: VllmDistributions(teacher, at, layout, **served)
        for name, at in _by_name(inside, engine, openai).items()
        if name != "openai"
    }
    whole["vold serve"]._engines = k2["vold serve"]._engines  # an engine has one run: two would take it from each other
    trainer, trainer_whole = (Teacher(teacher, layout, full_distributions=full, **head) for full in (False, True))
    top = TopTeacher(teacher, openai, layout, top_k=TOP_K)
    return {
        ("trainer", SAMPLED): lambda: trainer.score(batch),
        ("trainer", WHOLE): lambda: trainer_whole.score(batch),
        **{(name, SAMPLED): lambda one=one: one.submit(rollouts).result() for name, one in k2.items()},
        **{(name, WHOLE): lambda one=one: one.score(batch) for name, one in whole.items()},
        ("openai", f"top {TOP_K}"): lambda: top.score(batch),
    }


def _by_name(inside: VllmConfig, engine: VllmConfig, openai: OpenaiConfig) -> dict[str, VllmConfig | OpenaiConfig]:
    return {"vLLM in the process": inside, "vold serve": engine, "openai": openai}


def _count_bytes() -> list[int]:
    """[bytes of answers so far], of both clients."""
    received, bounded, post = [0], http._bounded, Endpoint.post

    def counted(reply):
        content = bounded(reply)
        received[0] += len(content)
        return content

    def posted(self, path, body):
        reply = post(self, path, body)
        received[0] += len(reply.content)
        return reply

    http._bounded, Endpoint.post = counted, posted
    return received


# Servers -------------------------------------------------------------------------------------------------------------


@contextmanager
def _engine(teacher: Path, scratch: Path) -> Iterator[VllmConfig]:
    settings = VllmConfig(kv_cache_gib=0.25, max_model_len=256, enforce_eager=True)
    where = {"host": "127.0.0.1", "port": _free_port()}
    secret = scratch / "engines.secret"
    command = server_command(teacher, settings, dtype="float32", where=where, adapter=None)
    guard = server_environment(teacher, settings, secret, where, adapters=False)
    with _running(command, guard, where["port"], scratch / "engine.log"):
        yield VllmConfig(urls=(f"http://127.0.0.1:{where['port']}",), secret_file=secret)


@contextmanager
def _openai(teacher: Path, scratch: Path) -> Iterator[OpenaiConfig]:
    """`vllm serve` as anybody starts it."""
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(teacher)]
    command += ["--served-model-name", "teacher", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28)]
    with _running(command, {}, port, scratch / "openai.log"):
        yield OpenaiConfig(url=f"http://127.0.0.1:{port}/v1", model="teacher")


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> Iterator[None]:
    variables = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5.0):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rows(
    options: argparse.Namespace,
    tokens: int,
    seconds: Mapping[tuple[str, str], Sequence[float]],
    moved: Mapping[tuple[str, str], int],
    facts: Mapping[str, str],
) -> list[dict[str, object]]:
    spreads = {road: [1000 * value / tokens for value in spread(found)] for road, found in seconds.items()}
    facts = {name: facts[name] for name in ("device", "torch", "python", "commit", "started")}
    return [
        {
            "road": road,
            "gives": gives,
            "responses": options.responses,
            "response_tokens": options.response_tokens,
            "runs": options.runs,
            "bytes_per_token": moved[road, gives] / tokens,
            "median_s_per_1000": median,
            "p20": low,
            "p80": high,
            "over_trainer": median / spreads["trainer", SAMPLED][0],
            "vllm": _vllm_version(),
        }
        | facts
        for (road, gives), (median, low, high) in spreads.items()
    ]


if __name__ == "__main__":
    main()
