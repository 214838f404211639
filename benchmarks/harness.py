"""Times providers side by side: one process each, one run at a time, in turns.

With separate processes one provider's freed memory cannot hide another's peak, and its crash cannot end the run. With
turns, drift of the machine affects all alike: only ratios within one run are claims. A provider is timed only after its
answer agreed with fp64 (`problem.py`). Its peak is the memory beyond its inputs during the timed runs: the allocator's
on CUDA, the high-water mark of the resident set on Linux CPUs.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.metadata
import multiprocessing as mp
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from vold.parallel import cpu

from .problem import LOGPROB, Case, Problem, disagreement, errors, make_problem
from .providers import FLOOR, PROVIDERS, Step

COLUMNS = (
    *("head", "mode", "tokens", "hidden", "vocab", "dtype", "provider", "status", "reason"),
    *("median_s", "p20_s", "p80_s", "runs", "floor_s", "over_floor", "peak_extra_mib", "gradients_mib"),
    *("logp_error", "loss_error", "d_hidden_error", "d_weight_error"),
    *("device", "torch", "triton", "package", "package_version", "python", "commit", "started"),
)
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The runs of each provider."""

    rounds: int
    """Turns of each provider."""
    runs: int = 1
    """Timed runs of a turn."""
    warmup_runs: int = 0
    """Untimed runs of a turn, before the timed ones."""
    threads: int = 1
    timeout_s: float = 300
    """A provider that does not answer for this long is stopped."""


@dataclass
class ProviderResult:
    """Measurements of one provider in one case."""

    reason: str = ""
    """Why it was not measured; empty where it was."""
    seconds: list[float] | None = None
    peak_bytes: int = 0
    errors: dict[str, float] | None = None


def measure(case: Case, names: Sequence[str], device: torch.device, plan: Plan) -> dict[str, ProviderResult]:
    """Measures every provider on the same problem, in turns."""
    torch.set_num_threads(plan.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        make_problem(case, device).save(path)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        results = {name: ProviderResult(PROVIDERS[name].unavailable_reason(case, device)) for name in names}
        workers = {name: _Worker(name, case, path, device, plan) for name in _available(results)}
        try:
            _run_in_turns(workers, results, plan)
            return results
        finally:
            for worker in workers.values():
                worker.close()


def csv_rows(case: Case, results: dict[str, ProviderResult], facts: dict[str, str]) -> list[dict[str, object]]:
    """The rows of one case in the CSV."""
    floor = results.get(FLOOR)
    floor_s = statistics.median(floor.seconds) if floor and floor.seconds else None
    return [_row(case, name, result, floor_s) | facts for name, result in results.items()]


def write_rows(path: Path, rows: Sequence[dict[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table_line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def environment(device: torch.device, threads: int) -> dict[str, str]:
    """Device, versions, commit and start time: the columns that every row of a run shares."""
    cuda = device.type == "cuda"
    return {
        "device": f"{torch.cuda.get_device_name()}, driver {_driver()}" if cuda else f"{cpu.name()}, {threads} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile)."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), fifths[0], fifths[3]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one run, by CUDA events on a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _run_in_turns(workers: dict[str, _Worker], results: dict[str, ProviderResult], plan: Plan) -> None:
    for name, worker in workers.items():  # all import at once, then run one at a time
        results[name].reason = worker.receive()
    for name in _available(results):
        workers[name].send("check")
        answer = workers[name].receive()
        if isinstance(answer, str):
            results[name].reason = answer
        else:
            results[name].errors, results[name].seconds = answer, []
    for _ in range(plan.rounds):
        for name in _available(results):
            workers[name].send("run")
            answer = workers[name].receive()
            if isinstance(answer, str):
                results[name].reason, results[name].seconds = answer, None
                continue
            results[name].seconds += answer[0]
            results[name].peak_bytes = max(results[name].peak_bytes, answer[1])


def _available(results: dict[str, ProviderResult]) -> list[str]:
    return [name for name, result in results.items() if not result.reason]


class _Worker:
    """The parent's side of one provider's process. An answer that is a non-empty string is the reason of its end."""

    def __init__(self, name: str, case: Case, path: Path, device: torch.device, plan: Plan):
        context = mp.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        arguments = (child_connection, name, case, path, device, plan)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.timeout_s = plan.timeout_s
        self.process.start()
        child_connection.close()

    def send(self, command: str) -> None:
        self.connection.send(command)

    def receive(self):
        try:
            if self.connection.poll(self.timeout_s):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return f"the process ended with code {self.process.exitcode}"
        self.close()
        return f"no answer in {self.timeout_s:.0f} s"

    def close(self) -> None:
        """Closes the pipe, which ends a healthy process; kills any other."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, name: str, case: Case, path: Path, device: torch.device, plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers that outlives this process
    try:
        step = PROVIDERS[name].load(case)
        problem = Problem.load(path, device, gradients=case.mode != LOGPROB)
        connection.send("")
        assert connection.recv() == "check"
        answer_errors = _check_answer(step, problem, case, name)
        connection.send(disagreement(case, answer_errors) or answer_errors)
        baseline = release_caches(device)
        while connection.recv() == "run":
            connection.send(_turn(step, problem, case, plan, baseline))
    except (EOFError, BrokenPipeError):  # the parent is done
        pass
    except Exception as error:
        connection.send(_failure_reason(error))


def _check_answer(step: Step, problem: Problem, case: Case, name: str) -> dict[str, float]:
    answer = _run(step, problem, case)
    answer_errors = {} if name == FLOOR else errors(problem, answer.detach())
    _clear_gradients(problem)
    return answer_errors


def _turn(step: Step, problem: Problem, case: Case, plan: Plan, baseline: int) -> tuple[list[float], int]:
    """(seconds of each timed run, peak bytes beyond the inputs). Caches are released after each turn."""
    device = problem.hidden_ND.device
    for _ in range(plan.warmup_runs):
        _run(step, problem, case)
        _clear_gradients(problem)
    if not plan.warmup_runs:
        release_caches(device)
    reset_peak(device)
    run_seconds = []
    for _ in range(plan.runs):
        run_seconds.append(seconds(lambda: _run(step, problem, case), device))
        _clear_gradients(problem)
    peak = peak_bytes(device) - baseline
    release_caches(device)
    return run_seconds, peak


def _run(step: Step, problem: Problem, case: Case) -> torch.Tensor:
    if case.mode == LOGPROB:
        with torch.no_grad():
            return step(problem)
    loss = step(problem)
    if loss.requires_grad:  # the floor has no graph
        loss.backward()
    return loss


def _clear_gradients(problem: Problem) -> None:
    problem.hidden_ND.grad = problem.weight_VD.grad = None


def release_caches(device: torch.device) -> int:
    """Releases cached memory and returns the bytes that stay resident."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    """A value of /proc/self/status in bytes; 0 where there is no /proc, for every provider."""
    if platform.system() != "Linux":
        return 0
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _failure_reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def _row(case: Case, name: str, result: ProviderResult, floor_s: float | None) -> dict[str, object]:
    row: dict[str, object] = asdict(case) | {"provider": name, "status": "not available", "reason": result.reason}
    row |= {"package": PROVIDERS[name].package, "package_version": _version(PROVIDERS[name].package)}
    if not result.seconds:
        return row
    median, p20, p80 = spread(result.seconds)
    itemsize = getattr(torch, case.dtype).itemsize
    gradients = 0 if case.mode == LOGPROB else (case.tokens + case.vocab) * case.hidden * itemsize
    row |= {"status": "measured", "median_s": f"{median:.6f}", "p20_s": f"{p20:.6f}", "p80_s": f"{p80:.6f}"}
    row |= {"runs": len(result.seconds), "peak_extra_mib": f"{result.peak_bytes / MIB:.1f}"}
    row |= {"gradients_mib": f"{gradients / MIB:.1f}"}
    row |= {f"{key}_error": f"{value:.1e}" for key, value in (result.errors or {}).items()}
    if floor_s:
        row |= {"floor_s": f"{floor_s:.6f}", "over_floor": f"{median / floor_s:.3f}"}
    return row


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The GPU driver's version, of the kernel module: nvidia-smi may be absent."""
    found = re.search(r"\d+\.\d+[.\d]*", _text("/proc/driver/nvidia/version") or _text("/sys/module/nvidia/version"))
    return found[0] if found else "unknown"


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit() -> str:
    """Short hash of the commit, with -dirty where measured files differ from it; a copy without git's folder is told
    it by VOLD_COMMIT."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "../kernels", "../vold", "*.py")
    head = git("rev-parse", "--short", "HEAD")
    return head + ("-dirty" if changed else "") if head else os.environ.get("VOLD_COMMIT", "unknown")
