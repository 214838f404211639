"""One training step of the real job with random weights: student, teacher, fused loss, update, on any layout.

    python -m benchmarks.train_step                     what a CPU can do: two narrow layers, the real vocabulary
    python -m benchmarks.train_step --no-teacher        one H200: MFU of the real student's step, real sizes
    torchrun --nproc-per-node 8 -m benchmarks.train_step --tp 2 --sp     a GPU node: Qwen2.5-VL-3B and Qwen3-8B

Two providers take turns on the same models and batch: `vold_kernels`, whose heads never make [tokens, vocabulary]
logits, and `materialised`, the same loss and teacher score written with logits in plain torch (tp = 1 only).
Both must give the same loss and gradient norm. Peak memory is that of the step beyond what is resident before it
(weights, gradients, optimizer state). Writes train_step-<device>.csv.

D hidden width, N tokens with a loss, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from vold.config.schema import OptimizerConfig
from vold.data.packing import pack
from vold.models import student
from vold.models.flops import peak_flops
from vold.models.layer_ops import layer_ops
from vold.parallel.launch import Layout, initialise
from vold.teacher import scorer as score
from vold.trainer import trainer as engine
from vold.types import Batch, Prompt, Sample
from vold_kernels import PolicyLoss, PolicyTerms, linear_logprob, linear_policy_loss

from .harness import MIB, environment, peak_bytes, release_caches, reset_peak, seconds, spread, write_rows

COLUMNS = (
    *("provider", "scale", "layout", "dtype", "layers", "tokens", "sequences", "loss_tokens"),
    *("student_hidden", "student_layers", "teacher_hidden", "teacher_layers", "vocab"),
    *("median_s", "p20_s", "p80_s", "runs", "teacher_s", "student_forward_s", "student_backward_s", "optimizer_s"),
    *("tokens_per_second", "student_mfu", "peak_extra_mib", "resident_mib", "loss", "grad_norm"),
    *("device", "torch", "triton", "python", "commit", "started"),
)
OURS, LOGITS = "vold_kernels", "materialised"
VOCAB, REAL_IDS = 151936, 151669
RESULTS = Path(__file__).parent / "results"
ROPE = {"rope_type": "default", "rope_theta": 1e6}
COMMON = {"num_hidden_layers": 36, "vocab_size": VOCAB, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
# The text part of Qwen2.5-VL-3B (training has no images), and Qwen3-8B.
STUDENT = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
TEACHER = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
HEAD_DIM = 128


def student_config(scale: float) -> PretrainedConfig:
    return Qwen2Config(**COMMON | _scaled(STUDENT, scale), rope_parameters=ROPE, tie_word_embeddings=True)


def teacher_config(scale: float) -> PretrainedConfig:
    shape = COMMON | _scaled(TEACHER, scale)
    return Qwen3Config(**shape, head_dim=HEAD_DIM, rope_parameters=ROPE, tie_word_embeddings=False)


def _scaled(shape: dict[str, int], scale: float) -> dict[str, int]:
    """The shape with width and depth times `scale`, at least two layers; head width and vocabulary are not scaled."""
    heads = max(int(shape["num_attention_heads"] * scale), 1)
    return {
        "hidden_size": int(shape["hidden_size"] * scale),
        "intermediate_size": int(shape["intermediate_size"] * scale),
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads * shape["num_key_value_heads"] // shape["num_attention_heads"], 1),
        "num_hidden_layers": max(int(36 * scale), 2),
    }


@torch.no_grad()
def random_weights(chunk: nn.Module, _checkpoint: Path) -> None:
    """Replaces `load_pretrained`."""
    generator = torch.Generator(chunk.layout.device).manual_seed(0)
    for name, parameter in chunk.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


# -- the baseline: logits ------------------------------------------------------------------------------------------


def logits_logprob(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, vocab_size: int, temperature=1.0, **_):
    logits_NV = (hidden_ND @ weight_VD[:vocab_size].T).float() / temperature
    return logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]


def logits_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    terms: PolicyTerms,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    **options,
) -> PolicyLoss:
    """The same loss on the policy (ratio 1); statistics that only feed metrics are left out."""
    logp_N = logits_logprob(hidden_ND, weight_VD, target_N, **options)
    ratio_N = (logp_N - logp_N.detach()).exp()
    clipped_N = ratio_N.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    pg_N = -torch.minimum(ratio_N * terms.advantage_N, clipped_N * terms.advantage_N)
    pg_loss = (terms.pg_weight_N * pg_N).sum()
    kl_loss = pg_loss.new_zeros(())
    if terms.logp_teacher_N is not None:
        kl_loss = (terms.kl_weight_N * 0.5 * (logp_N - terms.logp_teacher_N).square()).sum()
    nothing = dict.fromkeys((field.name for field in fields(PolicyLoss)), torch.zeros((), device=logp_N.device))
    losses = {"loss": pg_loss + kl_loss, "pg_loss": pg_loss.detach(), "kl_loss": kl_loss.detach()}
    return PolicyLoss(**nothing | losses | {"logp_N": logp_N.detach(), "entropy_N": torch.zeros_like(logp_N)})


HEADS = {OURS: (linear_policy_loss, linear_logprob), LOGITS: (logits_policy_loss, logits_logprob)}


# -- the job -------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Models and one batch. The learning rate is so small that every run does the same work on the same weights."""

    trainer: engine.Trainer
    teacher: score.Teacher | score.NoTeacher
    batch: Batch
    metrics: dict[str, float] | None = None

    def run(self, provider: str) -> None:
        engine.linear_policy_loss, score.linear_logprob = HEADS[provider]
        phases = self.trainer.phases
        with phases("step"):
            with phases("teacher"):
                batch = self.teacher.score(self.batch)
            self.metrics = self.trainer.step(batch).metrics


def build(options: argparse.Namespace, layout: Layout, dtype: torch.dtype) -> Step:
    student.load_pretrained, student.check_sizes = random_weights, lambda _: None  # there are no files
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (("student", student_config(options.scale)), ("teacher", teacher_config(options.scale))):
            config.save_pretrained(f"{folder}/{name}")
        optimizer = OptimizerConfig(lr=1e-12, weight_decay=0.0)
        trainer = engine.Trainer(
            Path(folder, "student"), layout, optimizer, steps=10_000, dtype=dtype, vocab_size=REAL_IDS
        )
        teacher = score.NoTeacher()
        if not options.no_teacher:
            teacher = score.Teacher(Path(folder, "teacher"), layout, dtype=dtype, vocab_size=REAL_IDS)
    samples = random_samples(options, layout.dp)
    return Step(trainer, teacher, pack(samples, max_tokens=options.tokens, replicas=trainer.replicas))


def random_samples(options: argparse.Namespace, replicas: int) -> list[Sample]:
    """`--sequences` of equal length for each replica; a fifth of each is the prompt, all other tokens have a loss."""
    generator = torch.Generator().manual_seed(0)
    length = options.tokens // options.sequences
    count = options.sequences * replicas
    prompt_length = length // 5
    weight = 1.0 / (count * (length - prompt_length))
    ids = torch.randint(REAL_IDS, (count, length), generator=generator).numpy()
    return [
        Sample(
            prompt=Prompt(str(number), row[:prompt_length], ""),
            response_ids=row[prompt_length:],
            advantage=1.0 if number % 2 else -1.0,
            pg_weight=weight,
            kl_weight=0.0 if options.no_teacher else 0.1 * weight,
        )
        for number, row in enumerate(ids)
    ]


def measure(step: Step, providers: list[str], device: torch.device, runs: int) -> dict[str, dict]:
    """Steps of the providers in turns, after one untimed step of each."""
    results: dict[str, dict] = {name: {"seconds": [], "phases": [], "peak": 0} for name in providers}
    resident = 0
    for turn in range(runs + 1):
        for name, result in results.items():
            dist.barrier()
            resident = release_caches(device)
            reset_peak(device)
            step_seconds = seconds(lambda name=name: step.run(name), device)
            on_cpu = peak_bytes(device)  # on CUDA the phases have reset torch's counter, and kept the peak
            phases = step.trainer.phases.finish_step()
            if turn:
                peak = phases["memory_gib_step"] * 2**30 if device.type == "cuda" else on_cpu
                result["seconds"].append(step_seconds)
                result["phases"].append(phases)
                result["peak"] = max(result["peak"], peak - resident)
            result |= {"resident": resident, "metrics": step.metrics}
    _check_same(results)
    return results


def _check_same(results: dict[str, dict]) -> None:
    """Raises unless all providers gave the same loss and gradient norm, up to bf16 rounding."""
    first, *others = results.values()
    for other in others:
        for key in ("loss", "grad_norm"):
            a, b = first["metrics"][key], other["metrics"][key]
            if not abs(a - b) <= 2e-2 * abs(a):
                raise RuntimeError(f"the providers disagree on {key}: {a} and {b}")


def row(name: str, result: dict, step: Step, options: argparse.Namespace, layout: Layout) -> dict[str, object]:
    median, p20, p80 = spread(result["seconds"])
    student, teacher = student_config(options.scale), teacher_config(options.scale)
    parts = {key: spread([p.get(f"seconds_{key}", 0.0) for p in result["phases"]])[0] for key in PARTS}
    world, peak = dist.get_world_size(), peak_flops(layout.device)
    student_seconds = sum(parts[key] for key in PARTS if key != "teacher")
    flops = result["metrics"]["train_tflop"] * 1e12
    shape = f"tp{layout.tp}{'+sp' if layout.sp else ''} pp{layout.pp} dp{layout.dp}"
    return {
        "provider": name,
        "scale": options.scale,
        "layout": shape,
        "dtype": options.dtype,
        "layers": str(layer_ops(layout.device.type, getattr(torch, options.dtype))),
        "tokens": options.tokens * layout.dp,
        "sequences": options.sequences * layout.dp,
        "loss_tokens": int(result["metrics"]["gradient_tokens"]),
        "student_hidden": student.hidden_size,
        "student_layers": student.num_hidden_layers,
        "teacher_hidden": "" if options.no_teacher else teacher.hidden_size,
        "teacher_layers": "" if options.no_teacher else teacher.num_hidden_layers,
        "vocab": VOCAB,
        "median_s": f"{median:.4f}",
        "p20_s": f"{p20:.4f}",
        "p80_s": f"{p80:.4f}",
        "runs": len(result["seconds"]),
        **{f"{key}_s": f"{value:.4f}" for key, value in parts.items()},
        "tokens_per_second": f"{options.tokens * layout.dp / median:.1f}",
        "student_mfu": f"{flops / (student_seconds * peak * world):.4f}" if peak else "",
        "peak_extra_mib": f"{result['peak'] / MIB:.0f}",
        "resident_mib": f"{result['resident'] / MIB:.0f}",
        "loss": f"{result['metrics']['loss']:.6g}",
        "grad_norm": f"{result['metrics']['grad_norm']:.6g}",
    }


PARTS = ("teacher", "student_forward", "student_backward", "optimizer")


def main() -> None:
    options = _options()
    layout = initialise(options.tp, options.pp, seed=0, sp=options.sp, recompute=options.recompute)
    device, dtype = layout.device, getattr(torch, options.dtype)
    providers = [OURS, LOGITS] if layout.tp == 1 and not options.fused_only else [OURS]
    step = build(options, layout, dtype)
    results = measure(step, providers, device, options.runs)
    facts = environment(device, torch.get_num_threads())
    rows = [row(name, result, step, options, layout) | facts for name, result in results.items()]
    if dist.get_rank() == 0:
        path = options.out / f"train_step-{device.type}.csv"
        write_rows(path, rows, COLUMNS)
        for line in rows:
            mfu = f", student MFU {float(line['student_mfu']):.1%}" if line["student_mfu"] else ""
            print(f"{line['provider']:<14} {line['median_s']} s, {line['peak_extra_mib']} MiB beyond weights{mfu}")
        print(path)
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1 if cuda else 1 / 16, help="1: the real widths and depths")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 512, help="of one replica's pack")
    parser.add_argument("--sequences", type=int, default=4, help="in a pack")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--fused-only", action="store_true", help="where logits would not fit")
    parser.add_argument("--runs", type=int, default=10 if cuda else 3, help="timed steps of each provider")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    main()
