"""Time saved by the filtered backward on trained, confident logits, and the error of its gradient.

    python -m benchmarks.filtered                 trains for about four minutes on a CPU; writes results/filtered.csv

A head of the real vocabulary size is trained, with our own loss, to predict the next word of Python's standard library
from the four before it: every distinct word or sign is an id, spread over the whole vocabulary. Then a policy-gradient
pass is timed with each `filter_eps`, in turns, and compared with the exact gradient. The same is done before training,
where the filter has no effect.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from vold_kernels import PolicyTerms, linear_policy_loss

from .harness import environment, seconds, spread, write_rows

VOCAB, WIDTH, CONTEXT, TOKENS, BATCHES = 151936, 256, 4, 2048, 2
EPS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


class NextWord(nn.Module):
    """hidden [N, D] from the last CONTEXT words, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH // CONTEXT)
        self.mix = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.RMSNorm(WIDTH))
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH) / WIDTH**0.5)

    def forward(self, context_NK: Tensor) -> Tensor:
        return self.mix(self.embedding(context_NK).flatten(1))


def corpus() -> tuple[Tensor, Tensor]:
    """(context [n, CONTEXT], next word [n]) at the first n = TOKENS · BATCHES positions of the standard library."""
    ids: dict[str, int] = {}
    spread_out = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).tolist()
    words: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for word in re.findall(r"\w+|\S|\n", path.read_text(encoding="utf-8", errors="replace")):
            words.append(spread_out[ids.setdefault(word, len(ids))])
        if len(words) > TOKENS * BATCHES + CONTEXT:
            break
    windows = torch.tensor(words[: TOKENS * BATCHES + CONTEXT]).unfold(0, CONTEXT + 1, 1)
    return windows[:, :CONTEXT], windows[:, CONTEXT]


def loss_of(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, advantage_N: Tensor, eps: float = 0.0):
    each_N = torch.full_like(advantage_N, 1 / len(advantage_N))
    terms = PolicyTerms(None, None, advantage_N, each_N, torch.zeros_like(each_N))
    return linear_policy_loss(hidden_ND, head_VD, target_N, terms, clip_eps_low=0.2, clip_eps_high=0.2, filter_eps=eps)


def train(model: NextWord, context: Tensor, target: Tensor, epochs: int) -> None:
    """Maximum likelihood: the policy loss on policy with advantage 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for epoch in range(epochs):
        for start in range(0, len(target), TOKENS):
            batch = slice(start, start + TOKENS)
            optimizer.zero_grad()
            out = loss_of(model(context[batch]), model.head, target[batch], torch.ones(len(target[batch])))
            out.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}/{epochs}: mean p of the next word {out.logp_N.exp().mean():.3f}", flush=True)


def measure(model: NextWord, context: Tensor, target: Tensor, rounds: int, facts: dict[str, str]) -> list[dict]:
    """One row per eps, timed in turns."""
    with torch.no_grad():
        hidden_ND = model(context[:TOKENS])
    target_N = target[:TOKENS]
    advantage_N = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))

    def loss_and_gradients(eps: float):
        leaves = [x.detach().requires_grad_() for x in (hidden_ND, model.head)]
        out = loss_of(*leaves, target_N, advantage_N, eps)
        out.loss.backward()
        return out, *(leaf.grad for leaf in leaves)

    exact, *exact_gradients = loss_and_gradients(0.0)
    mass = _total_mass(hidden_ND, model.head.detach(), target_N, advantage_N)
    times: dict[float, list[float]] = {eps: [] for eps in EPS}
    for _ in range(rounds):
        for eps in EPS:
            times[eps].append(seconds(lambda eps=eps: loss_and_gradients(eps), hidden_ND.device))
    rows = []
    for eps in EPS:
        out, *gradients = loss_and_gradients(eps)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, exact_gradients, strict=True)]
        median, p20, p80 = spread(times[eps])
        rows.append(
            {
                "mean_p": f"{float(exact.logp_N.exp().mean()):.3f}",
                "filter_eps": eps,
                "columns_kept": f"{float((gradients[1] != 0).any(1).float().mean()):.4f}",
                "dropped_mass": f"{float(out.dropped_mass) / mass:.2e}",
                "d_hidden_error": f"{errors[0]:.2e}",
                "d_weight_error": f"{errors[1]:.2e}",
                "median_s": f"{median:.4g}",
                "p20_s": f"{p20:.4g}",
                "p80_s": f"{p80:.4g}",
                "over_exact": f"{median / statistics.median(times[0.0]):.3f}",
                **facts,
            }
        )
    return rows


def _total_mass(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, advantage_N: Tensor) -> float:
    """Σ |dL/dlogit|: 2 |A| (1 − p) of each token, over N."""
    with torch.no_grad():
        p_N = loss_of(hidden_ND, head_VD, target_N, advantage_N).logp_N.exp()
    return float((2 * advantage_N.abs() * (1 - p_N)).sum()) / len(p_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/filtered.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, (context, target) = NextWord(), corpus()
    facts = environment(torch.device("cpu"), torch.get_num_threads())
    rows = measure(model, context, target, options.rounds, facts)
    train(model, context, target, options.epochs)
    rows += measure(model, context, target, options.rounds, facts)
    write_rows(options.out, rows, list(rows[0]))
    print(options.out)


if __name__ == "__main__":
    main()
