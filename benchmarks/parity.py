"""Compares every layout with one process and with transformers: weights as loaded and exported again (bit-equal), loss,
every gradient, parameters after three updates.

    python -m benchmarks.parity                                        the table: 161 rows of a process to eight
    python -m benchmarks.parity --layouts tp2+sp pp2-vpp2 --heads tied

Real process groups over gloo, one model copy or two, fp32, the VOLD loss: unequal lengths, a clipped gradient, padded
vocabulary rows, a micro-batch without any gradient and, in the second step, a replica without any. Each difference
is the largest over tensors, relative to that tensor's largest magnitude; the loss's is relative to the loss.
Writes parity.csv and parity.md into --out, prints the table and exits with 1 when a difference is over its limit.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vold.config.schema import AdapterConfig, OptimizerConfig
from vold.data.packing import filler, pack
from vold.models.adapters import PROJECTIONS
from vold.models.weights import export_adapters, export_weights
from vold.parallel.launch import initialise
from vold.teacher import Teacher
from vold.trainer.trainer import Trainer
from vold.types import Batch, MicroBatch, Prompt, Sample

from .harness import environment, table_line, write_rows

RESULTS = Path(__file__).parent / "results"
LIMITS = {"loaded": 0.0, "loss": 1e-6, "gradient": 1e-5, "parameter": 1e-5}
# of a Qwen2, with biases; of a Llama, a Mistral, a Phi-4, a Qwen3.5; of a Qwen2 with adapters; of a mixture of experts
HEADS = ("tied", "untied", "tied-llama", "untied-mistral", "untied-phi3", "tied-qwen35", "tied-lora", "untied-qwen3moe")
HEADS += ("untied-qwen35moe",)
REFERENCES = ("one process", "transformers")
VOCAB = 120  # ids that exist; both heads are padded beyond
STEPS = 3
EMPTY_REPLICA_STEP = 1
MICROBATCH_TOKENS = (400, 60, 24)  # of each step: from few micro-batches to many
BETA = 0.3
# eps: at 1e-8 AdamW divides rounding noise by itself wherever a gradient is nothing else, and the same arithmetic in
# another order differs by a part of the learning rate: one process and transformers by 1.7e-5, tp2 by 7.1e-5.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant", clip_grad=0.5)

ADAPTER = AdapterConfig(rank=4, alpha=8)


@dataclass(frozen=True)
class Layout:
    """Sizes as vold's config has them; `world` processes."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    sp: bool = False
    ep: int = 1
    etp: int = 1
    distributed_optimizer: bool = False
    recompute: str = "none"


LAYOUTS = {
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sp=True),
    "pp2": Layout(2, pp=2),
    "pp2-vpp2": Layout(2, pp=2, vpp=2),
    "pp4-vpp2": Layout(4, pp=4, vpp=2),
    "tp2-pp2": Layout(4, tp=2, pp=2),
    "tp2-pp2+sp": Layout(4, tp=2, pp=2, sp=True),
    "tp2-dp2": Layout(4, tp=2),
    "pp2-dp2": Layout(4, pp=2),
    "tp2-pp2-dp2": Layout(8, tp=2, pp=2),
    "dp2+distopt": Layout(2, distributed_optimizer=True),
    "tp2-pp2-dp2+sp+distopt": Layout(8, tp=2, pp=2, sp=True, distributed_optimizer=True),
    "cp2": Layout(2, cp=2),
    "cp4": Layout(4, cp=4),  # two key heads: each on two ranks
    "cp2+recompute": Layout(2, cp=2, recompute="full"),
    "tp2-cp2": Layout(4, tp=2, cp=2),
    "tp2-cp2+sp": Layout(4, tp=2, cp=2, sp=True),
    "pp2-cp2": Layout(4, pp=2, cp=2),
    "pp2-vpp2-cp2": Layout(4, pp=2, vpp=2, cp=2),
    "cp2-dp2+distopt": Layout(4, cp=2, distributed_optimizer=True),
}
# Of a mixture of experts, instead of these; ep and etp divide the ranks of a stage anew. In the second one each tp rank
# has all experts: their gradients add up over tp.
EXPERT_LAYOUTS = {
    "ep2": Layout(2, ep=2),
    "cp2-ep2": Layout(2, cp=2, ep=2),
    "tp2+sp": Layout(2, tp=2, sp=True),
    "tp2-etp2+sp": Layout(2, tp=2, sp=True, etp=2),
    "tp2-ep2+sp": Layout(2, tp=2, sp=True, ep=2),
    "pp2-ep2": Layout(4, pp=2, ep=2),
    "pp2-vpp2-ep2": Layout(4, pp=2, vpp=2, ep=2),
    "dp2-ep2+distopt": Layout(4, ep=2, distributed_optimizer=True),
    "tp2-dp2-ep2-etp2+sp": Layout(4, tp=2, sp=True, ep=2, etp=2),
    "tp2-pp2-dp2-ep2+sp+distopt": Layout(8, tp=2, pp=2, sp=True, ep=2, distributed_optimizer=True),
}
# Of gated delta nets, beside these.
RECURRENT_LAYOUTS = {"tp2+sp+recompute": Layout(2, tp=2, sp=True, recompute="full")}
ALL_LAYOUTS = LAYOUTS | EXPERT_LAYOUTS | RECURRENT_LAYOUTS


def layouts_of(head: str) -> dict[str, Layout]:
    layouts = EXPERT_LAYOUTS if head.endswith("moe") else LAYOUTS
    if "qwen35" in head:  # of four layers, whose tokens are not divided
        layouts = {name: layout for name, layout in layouts.items() if layout.cp == 1 and layout.pp < 4}
        layouts |= RECURRENT_LAYOUTS
    return layouts


# The problem ---------------------------------------------------------------------------------------------------------


STUDENTS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen35": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen35moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
DELTA_NET = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA_NET |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MIXTURE |= {"num_hidden_layers": 4}


def student(head: str) -> PreTrainedModel:
    config_class, model_class = STUDENTS.get(head.split("-")[-1], (Qwen2Config, Qwen2ForCausalLM))
    settings = {"num_hidden_layers": 8, **(MIXTURE if head.endswith("moe") else {})}
    settings |= DELTA_NET if "qwen35" in head else {}
    settings |= {"shared_expert_intermediate_size": 48} if head.endswith("qwen35moe") else {}
    config = config_class(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=not head.startswith("untied"),
        pad_token_id=None,
        sliding_window=None,
        **settings,
    )
    # Rounding grows more in a recurrence than in attention: of twice the weights, gradients after an update were up to
    # 1.4e-5 from transformers'.
    return _perturbed(model_class, config, seed=0, scale=1.5 if "qwen35" in head else 2)


def save_student(head: str, models: Path) -> None:
    """The student, and for lora an adapter by peft whose update is not zero."""
    model = student(head)
    model.save_pretrained(models / "student")
    if not head.endswith("lora"):
        return
    from peft import LoraConfig, get_peft_model

    modules = [name for target in ADAPTER.targets for name in PROJECTIONS[target]]
    adapted = get_peft_model(model, LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules=modules))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))  # a tenth of the weights
    adapted.save_pretrained(models / "adapter")


def teacher() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=136,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
    )
    return _perturbed(Qwen3ForCausalLM, config, seed=1)


def _perturbed(cls: type, config, seed: int, scale: float = 2) -> PreTrainedModel:
    """float32, with norms and biases that matter and logits that are not flat."""
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("A_log"):
                parameter.sub_(4)  # a recurrent state that lasts
            else:
                parameter.mul_(scale)
    return model


def samples_of_step(step: int) -> list[Sample]:
    """Twelve responses of unequal length, three per prompt, the first without a KL term; one has no weight at all."""
    draw = random.Random(step)
    ids = lambda low, high: tuple(draw.randrange(VOCAB) for _ in range(draw.randint(low, high)))  # noqa: E731
    samples = []
    for number in range(12):
        failed = number % 3 > 0
        advantage = draw.uniform(-1.5, -0.5) if failed else draw.uniform(0.5, 1.5)
        samples.append(Sample(Prompt(str(number), ids(2, 9), ""), ids(1, 17), advantage, 1.0, BETA * failed))
    samples = [replace(sample, prompt=samples[number - number % 3].prompt) for number, sample in enumerate(samples)]
    samples[4] = samples[4].without_weights()
    tokens = sum(len(sample.response_ids) for sample in samples)
    return [replace(s, pg_weight=s.pg_weight / tokens, kl_weight=s.kl_weight / tokens) for s in samples]


def batch_of_step(step: int, trainer: Trainer) -> Batch:
    """This replica's micro-batches, and one without any weight."""
    samples, replicas = samples_of_step(step), trainer.replicas
    if step == EMPTY_REPLICA_STEP and replicas.count > 1:
        micro_batches = pack(samples, max_tokens=MICROBATCH_TOKENS[step]).micro_batches
        return Batch(
            (*(micro_batches if replicas.rank == 0 else [filler()] * len(micro_batches)), _masked(micro_batches[0]))
        )
    micro_batches = pack(samples, max_tokens=MICROBATCH_TOKENS[step], replicas=replicas).micro_batches
    return Batch((*micro_batches, _masked(micro_batches[0])))


def _masked(micro: MicroBatch) -> MicroBatch:
    return replace(micro, pg_weight_N=0 * micro.pg_weight_N, kl_weight_N=0 * micro.kl_weight_N)


# Both sides ----------------------------------------------------------------------------------------------------------


def train_vold(layout: Layout, models: Path, out: Path) -> None:
    """Trains on one rank. Rank 0 writes the tensors that `differences` compares."""
    sizes = {key: value for key, value in vars(layout).items() if key != "world"}
    rank_layout = initialise(**sizes, seed=0)
    has_adapter = (models / "adapter").exists()
    adapter = ADAPTER.model_copy(update={"path": models / "adapter"}) if has_adapter else None
    sizes = {"steps": STEPS, "dtype": torch.float32, "vocab_size": VOCAB}
    trainer = Trainer(models / "student", rank_layout, OPTIMIZER, adapter=adapter, **sizes)
    export = export_adapters if has_adapter else export_weights
    scorer = Teacher(models / "teacher", rank_layout, dtype=torch.float32, vocab_size=VOCAB)
    tensors = _named("loaded", export(trainer.chunks))
    for step in range(STEPS):
        batch = scorer.score(batch_of_step(step, trainer))
        trainer.accumulate_gradients(batch)
        if not layout.distributed_optimizer:  # whose ranks hold only their own share of the sum
            tensors |= _named(f"gradient/{step}", export(trainer.chunks, lambda p: p.main_grad))
        report = trainer.step(batch)
        reports: list = [None] * layout.world
        dist.all_gather_object(reports, report)
        assert all(other == report for other in reports), "every rank reports the same numbers"
        tensors[f"loss/{step}"] = torch.tensor(report.metrics["loss"], dtype=torch.float64)
    tensors |= _named("parameter", export(trainer.chunks))
    if not has_adapter and rank_layout.is_last_stage and trainer.chunks[-1].arch.tied:
        head_shard = trainer.chunks[-1].head_weight()
        embedding_shard = tensors["parameter/lm_head.weight"].chunk(rank_layout.tp)[rank_layout.tp_rank]
        assert torch.equal(head_shard, embedding_shard), "the tied head differs from its embedding"
    if int(os.environ["RANK"]) == 0:
        save_file(tensors, out)


def _named(kind: str, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": tensor.clone() for name, tensor in tensors}


def train_transformers(models: Path, out: Path) -> None:
    """The same three steps in plain torch: sequence by sequence, on materialised logits, with torch's AdamW."""
    learner = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)
    scorer = Qwen3ForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32)
    if (models / "adapter").exists():
        from peft import PeftModel

        learner = PeftModel.from_pretrained(learner, models / "adapter", is_trainable=True)
    trained = [p for p in learner.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    parameters = learner.named_parameters(remove_duplicate=False)
    named = {name.replace(".default", ""): p for name, p in parameters if p.requires_grad}
    tensors = _named("loaded", ((name, p.detach()) for name, p in named.items()))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(_sequence_loss(learner, scorer, sample) for sample in samples_of_step(step))
        loss.backward()
        tensors[f"loss/{step}"] = loss.detach().double()
        tensors |= _named(f"gradient/{step}", ((name, p.grad) for name, p in named.items()))
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_grad)
        optimizer.step()
    tensors |= _named("parameter", ((name, p.detach()) for name, p in named.items()))
    save_file(tensors, out)


def _sequence_loss(learner: PreTrainedModel, scorer: PreTrainedModel, sample: Sample) -> Tensor:
    """VOLD Eq. 6 at ratio 1. float64 from the logits on keeps the reference's own rounding out."""
    ids = torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()]])
    target_L = torch.tensor(sample.response_ids.tolist())
    first = len(sample.prompt.token_ids) - 1
    logp_L, logp_teacher_L = (
        model(ids).logits[0, first:-1, :VOCAB].double().log_softmax(-1).gather(1, target_L[:, None])[:, 0]
        for model in (learner, scorer)
    )
    policy = -sample.advantage * (logp_L - logp_L.detach()).exp()
    return (sample.pg_weight * policy + sample.kl_weight * 0.5 * (logp_L - logp_teacher_L.detach()) ** 2).sum()


# Comparison ----------------------------------------------------------------------------------------------------------


def differences(actual: Path, expected: Path) -> dict[str, float | None]:
    """The largest relative difference of each kind; None where `actual` has no tensor of that kind."""
    ours, theirs = load_file(actual), load_file(expected)
    worst: dict[str, float | None] = dict.fromkeys(LIMITS)
    for name, tensor in ours.items():
        kind = name.split("/")[0]
        error = float((tensor - theirs[name]).abs().max() / theirs[name].abs().max())
        worst[kind] = max(worst[kind] or 0.0, error)
    return worst


def measure(names: Sequence[str], heads: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    """A row for each head and layout, as it is finished."""
    for head in heads:
        models = folder / head
        save_student(head, models)
        teacher().save_pretrained(models / "teacher")
        run_world(1, train_transformers, models, folder / "transformers")
        run_world(1, train_vold, Layout(), models, folder / "one process")
        yield _row("one process", Layout(), head, folder, ["transformers"])
        for name, layout in layouts_of(head).items():
            if name in names:
                run_world(layout.world, train_vold, layout, models, folder / name)
                yield _row(name, layout, head, folder, REFERENCES)


def _row(name: str, layout: Layout, head: str, folder: Path, references: Sequence[str]) -> dict[str, str]:
    row, ok = {"layout": name, "processes": str(layout.world), "head": head}, True
    for reference in REFERENCES:
        errors = differences(folder / name, folder / reference) if reference in references else {}
        for kind, limit in LIMITS.items():
            error = errors.get(kind)
            row[f"{kind} vs {reference}"] = "" if error is None else f"{error:.1e}"
            ok &= error is None or error <= limit
    return row | {"verdict": "ok" if ok else "OVER"}


def run_world(world: int, body: Callable, *arguments) -> None:
    """`body` on every rank of a fresh world. Forked, because importing Megatron takes longer than all that follows."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_rank, (world, port, body, arguments), nprocs=world, start_method="fork")


def _rank(rank: int, world: int, port: int, body: Callable, arguments: tuple) -> None:
    rank_variables = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in rank_variables.items()}
    body(*arguments)


# The table -----------------------------------------------------------------------------------------------------------


def write(rows: Sequence[dict[str, str]], out: Path, facts: dict[str, str]) -> None:
    write_rows(out / "parity.csv", [row | facts for row in rows], [*rows[0], *facts])
    limits = ", ".join(f"{kind} {limit:.0e}" for kind, limit in LIMITS.items())
    text = [
        "# Layouts beside one process and beside transformers",
        "",
        "Generated by `python -m benchmarks.parity`. Largest relative differences over three AdamW steps of the VOLD",
        f"loss in fp32; limits: {limits}. Gradients under a distributed optimizer are spread over ranks: there the",
        f"parameters speak for them. {', '.join(f'{key} {value}' for key, value in facts.items() if value)}.",
        "",
        table_line(rows[0]),
        table_line(["---"] * len(rows[0])),
        *(table_line(row.values()) for row in rows),
        "",
    ]
    (out / "parity.md").write_text("\n".join(text))


def print_table(rows: Sequence[dict[str, str]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=ALL_LAYOUTS, default=list(ALL_LAYOUTS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in measure(options.layouts, options.heads, Path(folder)):
            rows.append(row)
            print(row["head"], row["layout"], row["verdict"], file=sys.stderr, flush=True)
    print_table(rows)
    facts = environment(torch.device("cpu"), threads=1)
    write(rows, options.out, {key: facts[key] for key in ("device", "torch", "commit", "started") if key in facts})
    sys.exit(any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
