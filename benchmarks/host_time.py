"""Host time of a layer: Python, autograd and dispatch of the GPU path, on a CPU with tensors of next to no size.

    python -m benchmarks.host_time [--before CHECKOUT]

The functions are those of a GPU (`layer_ops`), whose Triton launches do nothing here, and attention returns an empty
tensor; Megatron's data-parallel wrapper and its hooks are real. With --before another checkout is timed in turn, round
by round, and the ratio is printed: `step_roofline` scales its assumed host time by it. A launch's own time is in
neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS, TOKENS, ROUNDS, PASSES = 8, 8, 5, 30
CONFIG = {
    **dict(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS),
    **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64),
    **dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="root of another checkout")
    parser.add_argument("--once", action="store_true", help="time this process's vold once, as JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure()))
        return
    roots = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for _ in range(ROUNDS):
        for name, root in roots.items():
            found[name].append(_timed_in(root))
    for key in ("forward", "backward"):
        medians = {name: statistics.median(round_[key] for round_ in rounds) for name, rounds in found.items()}
        shown = ", ".join(f"{name} {value * 1e6:.0f} µs" for name, value in medians.items())
        ratio = f"; ratio {medians['now'] / medians['before']:.3f}" if options.before else ""
        print(f"{key} of a layer: {shown}{ratio}")


def _timed_in(root: Path) -> dict[str, float]:
    environment = dict(os.environ) | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, "--once"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> dict[str, float]:
    """Seconds of a layer, forward and backward: medians over PASSES."""
    import torch

    model, tokens = _model(), _tokens()
    from vold.models.language_model import hidden_states
    from vold.parallel import cpu

    times: dict[str, list[float]] = {"forward": [], "backward": []}
    with cpu.paused():  # which a GPU does not have
        for _ in range(PASSES):
            started = time.perf_counter()
            hidden_TD = hidden_states(model, tokens)
            middle = time.perf_counter()
            hidden_TD.backward(torch.ones_like(hidden_TD))
            times["forward"].append((middle - started) / LAYERS)
            times["backward"].append((time.perf_counter() - middle) / LAYERS)
    return {name: statistics.median(values) for name, values in times.items()}


def _model():
    """The wrapped model, on the functions that a GPU gets."""
    import torch
    from triton.runtime import jit

    from vold.models import layer_ops, layer_shapes, layers
    from vold.models.architecture import Architecture
    from vold.models.language_model import build_language_model
    from vold.parallel.launch import initialise
    from vold.trainer import trainer

    jit.KernelInterface.__getitem__ = lambda _kernel, _grid: lambda *_args, **_options: None
    torch.cuda.get_device_properties = lambda *_: argparse.Namespace(multi_processor_count=132)
    chosen = layer_ops.layer_ops("cuda", torch.float32)
    chosen = (
        layer_ops.replace(chosen, attention=layer_shapes.meta_flash_attention)
        if hasattr(layer_ops, "replace")
        else type(chosen)(chosen.rms_norm, chosen.swiglu, chosen.rope, layer_shapes.meta_flash_attention)
    )
    layers.layer_ops = lambda _device, _dtype: chosen
    layout = initialise(1, 1, seed=0)
    import transformers

    arch = Architecture.from_config(transformers.Qwen3Config(**CONFIG))
    chunk = build_language_model(arch, layout, torch.float32)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(0.01)
    [wrapped] = trainer._wrap([chunk])
    if hasattr(trainer, "add_to_main_grad"):
        trainer.add_to_main_grad(chunk)
    return wrapped


def _tokens():
    import torch

    from vold.types import PackedTokens

    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    return PackedTokens(torch.arange(TOKENS), torch.arange(TOKENS).expand(3, -1).contiguous(), bounds, bounds)


if __name__ == "__main__":
    main()
