"""The policy loss, forward and backward, beside materialised logits in eager torch: time and peak memory.

    python -m benchmarks.kernels [--tokens 1024] [--repeats 5]

Both are timed in one run, alternating, and compared by the ratio of their medians. Rows go to
benchmarks/results/kernels.csv with device, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from vold_kernels import reference
from vold_kernels.linear_policy_loss import PolicyTerms, linear_policy_loss

RESULTS = Path(__file__).parent / "results" / "kernels.csv"


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, weight, target, terms = inputs(options.tokens, options.hidden, options.vocab, device)

    def fused():
        linear_policy_loss(hidden, weight, target, terms, eps_low=0.2, eps_high=0.3).loss.backward()

    def eager():
        reference.linear_policy_loss(hidden, weight, target, terms, eps_low=0.2, eps_high=0.3).loss.backward()

    def reset():
        hidden.grad = weight.grad = None

    providers = {"vold_kernels": fused, "eager, materialised": eager}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    memory = {}
    for name, run in providers.items():  # warm-up, and the peak
        memory[name] = peak_bytes(run, device)
        reset()
    for _ in range(options.repeats):
        for name, run in providers.items():
            seconds[name].append(timed(run, device))
            reset()
    report(options, device, seconds, memory)


def inputs(tokens: int, hidden: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, PolicyTerms]:
    """Logits of standard deviation about 3; a third of the tokens distilled, all with an advantage."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    hidden_ND = draw(tokens, hidden).requires_grad_()
    weight_VD = (draw(vocab, hidden) * 3 / hidden**0.5).requires_grad_()
    target_N = torch.randint(vocab, (tokens,), generator=generator).to(device)
    logp_N = draw(tokens) - 12
    kl_weight_N = (torch.arange(tokens, device=device) % 3 == 0) * 0.1 / tokens
    ones_N = torch.full((tokens,), 1.0 / tokens, device=device)
    return hidden_ND, weight_VD, target_N, PolicyTerms(None, logp_N, draw(tokens), ones_N, kl_weight_N)


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Memory above what was resident before: allocator peak on a GPU, sampled resident set on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak


def report(options: argparse.Namespace, device: torch.device, seconds: dict[str, list[float]], memory: dict) -> None:
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        **{"tokens": options.tokens, "hidden": options.hidden, "vocab": options.vocab, "dtype": "float32"},
    }
    rows = [
        {
            "kernel": "linear_policy_loss, forward + backward",
            "provider": name,
            "median_s": f"{statistics.median(found):.4f}",
            "p20_s": f"{statistics.quantiles(found, n=5)[0]:.4f}",
            "p80_s": f"{statistics.quantiles(found, n=5)[3]:.4f}",
            "peak_extra_mib": f"{memory[name] / 2**20:.0f}",
            **facts,
        }
        for name, found in seconds.items()
    ]
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        spread = f"[{row['p20_s']}, {row['p80_s']}]"
        print(f"{row['provider']:<22} {row['median_s']:>9} s  {spread}  {row['peak_extra_mib']:>6} MiB")
    ours, theirs = (statistics.median(found) for found in seconds.values())
    less = memory["vold_kernels"] / memory["eager, materialised"]
    print(f"ratio of medians {ours / theirs:.2f}, of peak memory {less:.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 1024), ("hidden", 256), ("vocab", 151936), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
