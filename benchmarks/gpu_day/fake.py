"""The train part on fake CUDA tensors (benchmarks/fake_cuda): every line that a GPU will run, at the real sizes, here.

    python -m benchmarks.gpu_day.fake               minutes of CPU, into runs/gpu-day-fake
    python -m benchmarks.gpu_day.fake --layers 2    of each model, for a quick look

It finds what fails before a GPU is paid for: a shape, a dtype, a column without a value, memory beyond the plan. Its
seconds, losses and MFU mean nothing. Changes its process for good: use one of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks import train_step
from benchmarks.fake_cuda import step as fake_step
from benchmarks.fake_cuda.device import install
from benchmarks.fake_cuda.trace import Trace, tracing

from . import train
from .part import Context, Item
from .schedule import ROOT


def run_items(out: Path, layers: int | None, most: int | None = None) -> list[str]:
    """Run the first `most` items of the part (all: None); the names of those that ran, whose rows are in `out`.
    `install` comes first. layers: of each model; fewer than published have no plan beside them."""
    context = Context(out, dry_run=False)
    items = train.items(context)[:most]
    for item in items:
        _run(item, context, layers)
    return [item.name for item in items]


def _run(item: Item, context: Context, layers: int | None) -> None:
    trace = Trace()
    with fake_step._layout(fake_step.Case()) as layout, tracing(trace) as mode:

        def build(options, _layout, dtype):
            built = train_step.build(options, layout, dtype)
            built.batch = fake_step._fake(built.batch, mode)
            return built

        configs = {name: getattr(train_step, name) for name in ("student_config", "teacher_config")}
        shallow = {name: partial(_with_layers, config, layers) for name, config in configs.items()}
        on_host = {
            "random_samples": partial(_on_host, _sampled, train_step.random_samples),
            "pack": partial(_on_host, train_step.pack),
        }
        live = trace.live
        memory = {
            "max_memory_allocated": lambda *_: live.peak,
            "memory_allocated": lambda *_: live.now,
            "reset_peak_memory_stats": lambda *_: setattr(live, "peak", live.now),
        }
        once = lambda step, providers, device, runs: train_step.measure(step, providers, device, 1)  # noqa: E731
        part = {"initialise": lambda *_, **__: layout, "build": build, "measure": once}
        part["host_waits"] = partial(_host_waits, trace)
        if layers is not None:
            part["_start_plan"] = lambda _options: None
        with (
            patch.multiple(train_step, random_weights=lambda *_: None, **shallow, **on_host),
            patch.multiple(torch.cuda, **memory),
            patch.multiple(train, **part),
        ):
            item.run(context)


@contextmanager
def _host_waits(trace: Trace, _device: torch.device) -> Iterator[list[str]]:
    """numerics.host_waits, from the trace."""
    waits, before = [], trace.waits.copy()
    yield waits
    waits += [f"{kind}, {site}" for _phase, kind, site in (trace.waits - before).elements()]


def _on_host(function, *args, **options):
    """Called outside the modes: a batch has numbers."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return function(*args, **options)


def _sampled(random_samples, *args):
    """With a sampler's log-probs: sums that are not known are read as 1, and those over no tokens as 0."""
    return [replace(x, logp_rollout=[-1.0] * len(x.response_ids)) for x in random_samples(*args)]


def _with_layers(config, layers: int | None, scale: float):
    made = config(scale)
    made.num_hidden_layers = layers or made.num_hidden_layers
    made.layer_types = made.layer_types[: made.num_hidden_layers]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of each model; none: as published")
    parser.add_argument("--items", type=int, help="the first ones alone")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-day-fake")
    options = parser.parse_args()
    install()
    for name in run_items(options.out, options.layers, options.items):
        print(f"{name}: done")
    print(options.out)


if __name__ == "__main__":
    main()
