"""What bf16 logits cost in accuracy: both heads against fp64, with fp32 logits and with `ChunkBudget.bf16_logits`.

    python -m benchmarks.logits_dtype            N 256, D 256, V 151936, bf16 inputs, logits of standard deviation 3

A CPU rounds the logits to bf16 as a GPU does, so the errors are those of the rounding. Writes logits_dtype.csv.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from vold_kernels import PolicyTerms, linear_logprob, linear_policy_loss
from vold_kernels.chunks import default_budget

from .harness import environment, table_line, write_rows
from .problem import CLIP_EPS_HIGH, CLIP_EPS_LOW, POLICY_LOSS, Case, Problem, errors, make_problem

RESULTS = Path(__file__).parent / "results"
ERRORS = ("logp_max", "logp_rms", "ratio_max", "loss", "d_hidden", "d_weight")
COLUMNS = ("logits", "tokens", "hidden", "vocab", *ERRORS, "device", "torch", "triton", "python", "commit", "started")


def accuracy(problem: Problem, *, bf16_logits: bool) -> dict[str, float]:
    """Errors against fp64 (log-probs in nats, gradients relative), and of the ratio of an unchanged policy."""
    budget = replace(default_budget(problem.hidden_ND.device), bf16_logits=bf16_logits)
    head = problem.hidden_ND, problem.weight_VD, problem.target_N
    logp_N = linear_logprob(*head, budget=budget).detach()
    error_N = logp_N.double() - problem.truth.logp_N
    weight_N = torch.full_like(problem.advantage_N, 1 / len(problem.advantage_N))

    def loss(logp_old_N: torch.Tensor):
        terms = PolicyTerms(logp_old_N, None, problem.advantage_N, weight_N, torch.zeros_like(weight_N))
        clip = {"clip_eps_low": CLIP_EPS_LOW, "clip_eps_high": CLIP_EPS_HIGH}
        return linear_policy_loss(*head, terms, **clip, budget=budget)

    ratio_N = (loss(logp_N).logp_N - logp_N).exp()
    out = loss(problem.logp_old_N)
    out.loss.backward()
    result = errors(problem, out.loss.detach())
    problem.hidden_ND.grad = problem.weight_VD.grad = None
    rms = float(error_N.square().mean().sqrt())
    return {
        "logp_max": float(error_N.abs().max()),
        "logp_rms": rms,
        "ratio_max": float((ratio_N - 1).abs().max()),
    } | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), default=(256, 256, 151936))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokens, hidden, vocab = options.shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = make_problem(Case("one", POLICY_LOSS, tokens, hidden, vocab, "bfloat16"), device)
    for leaf in (problem.hidden_ND, problem.weight_VD):
        leaf.requires_grad_()
    facts = environment(device, torch.get_num_threads()) | {"tokens": tokens, "hidden": hidden, "vocab": vocab}
    rows = []
    for name, bf16_logits in (("fp32", False), ("bf16", True)):
        measured = accuracy(problem, bf16_logits=bf16_logits)
        rows.append({"logits": name} | facts | {key: f"{value:.1e}" for key, value in measured.items()})
    write_rows(options.out / "logits_dtype.csv", rows, COLUMNS)
    print("\n".join(table_line(line) for line in [("logits", *ERRORS), ["---"] * (len(ERRORS) + 1)]))
    print("\n".join(table_line(str(row[name]) for name in ("logits", *ERRORS)) for row in rows))


if __name__ == "__main__":
    main()
