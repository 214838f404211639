"""The heads at the real vocabulary against their specification in fp64, on the device, by the tolerances of
kernels/README.md; two runs bit for bit; logits beyond 2^31; what makes the host wait.

A limit in bf16 is the proof's own; in fp32 that or 1.25 × what eager torch errs, whichever is larger. Rows go
into checks.csv. Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vold_kernels import ChunkBudget, PolicyTerms, linear_kl, linear_logprob, linear_policy_loss, reference

from .gemm import STUDENT, TEACHER, VOCAB
from .part import CHECK_COLUMNS, Context, Item, check, verdict

FILE = "checks.csv"
REAL_IDS = VOCAB - 267
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOGP = {"bf16": 2e-5, "fp32": 5e-6}  # × (1 + |z|max / 16), nats
GRADIENT = {"bf16": {"dH": 4e-3, "dW": 3e-3}, "fp32": {"dH": 5e-6, "dW": 5e-6}}  # relative, Frobenius


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    teacher_hidden: int
    vocab: int
    real_ids: int
    long_tokens: int
    """N of the check with N · V > 2^31."""


def items(context: Context) -> list[Item]:
    sizes = Sizes(1000, STUDENT, TEACHER, VOCAB, REAL_IDS, 16384)
    if context.dry_run:
        sizes = Sizes(24, 8, 12, 300, 293, 96)
    checks: list[tuple[str, Callable[[Context, str], Iterator[dict]]]] = [
        (f"{what} {name}", lambda c, n, f=function: f(c, sizes, n))
        for name in DTYPES
        for what, function in (("linear_logprob", _logprob), ("linear_policy_loss", _policy), ("linear_kl", _kl))
    ]
    names = [(title, title.rsplit(" ", 1)[1], function) for title, function in checks]
    names += [("logits beyond 2^31", "bf16", lambda c, n: _beyond_int32(c, sizes))]
    names += [("host waits of the heads", "bf16", lambda c, n: _host_waits(c, sizes))]
    return [Item(title, lambda c, n=n, f=f: c.write(FILE, f(c, n), CHECK_COLUMNS), 8) for title, n, f in names]


# -- problems ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_NE: Tensor
    teacher_weight_VE: Tensor
    target_N: Tensor

    def to(self, dtype: torch.dtype) -> Heads:
        """Leaves of the student require grad."""
        new = {f.name: getattr(self, f.name).detach().to(dtype) for f in fields(self) if f.name != "target_N"}
        heads = replace(self, **new)
        heads.hidden_ND.requires_grad_(), heads.weight_VD.requires_grad_()
        return heads

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden_ND.grad is not None and self.weight_VD.grad is not None
        return self.hidden_ND.grad, self.weight_VD.grad


def make_heads(device: torch.device, sizes: Sizes, dtype: torch.dtype, tokens: int | None = None) -> Heads:
    """Logits of standard deviation 3; every fourth token is confident, one has a logit of about 80."""
    generator, tokens = torch.Generator(device).manual_seed(0), tokens or sizes.tokens

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight_VD = draw(sizes.vocab, sizes.hidden) * 3 / sizes.hidden**0.5
    hidden_ND, spike_D = draw(tokens, sizes.hidden), weight_VD[7]
    hidden_ND[::4] += 20 * spike_D / spike_D.square().sum()
    hidden_ND[1] += 80 * spike_D / spike_D.square().sum()
    teacher_VE = draw(sizes.vocab, sizes.teacher_hidden) * 3 / sizes.teacher_hidden**0.5
    target_N = torch.randint(sizes.real_ids, (tokens,), generator=generator, device=device)
    target_N[::4] = 7
    tensors = (hidden_ND, weight_VD, draw(tokens, sizes.teacher_hidden), teacher_VE)
    return Heads(*(x.to(dtype) for x in tensors), target_N)


def make_terms(logp_N: Tensor) -> PolicyTerms:
    """Ratios away from both clip edges, so that rounding changes no branch; a third of the tokens has no weight."""
    count, device = len(logp_N), logp_N.device
    generator = torch.Generator(device).manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    log_ratio_N = torch.tensor((-0.5, -0.1, 0.0, 0.1, 0.5), device=device)[torch.arange(count, device=device) % 5]
    weight_N = (torch.arange(count, device=device) % 3 > 0) / count
    logp_N = logp_N.float()
    old_N, teacher_N, advantage_N = logp_N - log_ratio_N, logp_N + 0.1 * draw(), draw()
    nan_N = torch.full_like(logp_N, float("nan"))
    has_weight_N = weight_N > 0
    return PolicyTerms(  # NaN where no weight is: it must not leak
        torch.where(has_weight_N, old_N, nan_N),
        torch.where(has_weight_N, teacher_N, nan_N),
        advantage_N,
        weight_N.float(),
        0.1 * weight_N.float(),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where there is nothing to compare with."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / norm if norm else float("nan")


def bit_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- checks --------------------------------------------------------------------------------------------------------


def _logprob(context: Context, sizes: Sizes, name: str) -> Iterator[dict]:
    heads = make_heads(context.device, sizes, DTYPES[name])
    inputs, options = (heads.hidden_ND, heads.weight_VD, heads.target_N), {"vocab_size": sizes.real_ids}
    exact = (inputs[0].double(), inputs[1].double(), inputs[2])
    truth_N, entropy_N = reference.linear_logprob(*exact, return_entropy=True, **options)
    largest = float((exact[0] @ exact[1].T).abs().max())
    ours = linear_logprob(*inputs, return_entropy=True, **options)
    again = linear_logprob(*inputs, return_entropy=True, **options)
    eager_N = (inputs[0] @ inputs[1][: sizes.real_ids].T).float().log_softmax(-1).gather(1, inputs[2][:, None])[:, 0]
    theirs = float((eager_N - truth_N).abs().max())
    limit = _limit(LOGP[name] * (1 + largest / 16), theirs, name)
    note = f"|z| up to {largest:.0f}; eager torch errs {theirs:.1e}"
    yield check(f"log-prob, {name}, nats", float((ours[0] - truth_N).abs().max()), limit, note)
    yield check(f"entropy, {name}, nats", float((ours[1] - entropy_N).abs().max()), 10 * limit, note)
    yield verdict(f"log-prob ≤ 0, {name}", bool((ours[0] <= 0).all()))
    yield verdict(f"log-prob and entropy bit-equal in two runs, {name}", bit_equal(ours, again))


def _policy(context: Context, sizes: Sizes, name: str) -> Iterator[dict]:
    dtype, options = DTYPES[name], CLIP | {"vocab_size": sizes.real_ids}
    heads = make_heads(context.device, sizes, dtype).to(dtype)
    exact = heads.to(torch.float64)
    with torch.no_grad():
        terms = make_terms(reference.linear_logprob(exact.hidden_ND, exact.weight_VD, exact.target_N, **_ids(options)))
    truth = reference.linear_policy_loss(exact.hidden_ND, exact.weight_VD, exact.target_N, terms, **options)
    truth.loss.backward()
    eager = heads.to(dtype)
    _eager_loss(eager, terms, sizes).backward()

    def ours(budget: ChunkBudget | None = None) -> tuple[Tensor, Tensor, Tensor]:
        copy = heads.to(dtype)
        out = linear_policy_loss(copy.hidden_ND, copy.weight_VD, copy.target_N, terms, **options, budget=budget)
        out.loss.backward()
        return out.loss.detach(), *copy.gradients

    first = ours()
    yield check(f"policy loss, {name}, relative", relative(first[0], truth.loss), 1e-4)
    for label, actual, expected, plain in zip(("dH", "dW"), first[1:], exact.gradients, eager.gradients, strict=True):
        theirs = relative(plain, expected)
        limit = _limit(GRADIENT[name][label], theirs, name)
        yield check(f"policy {label}, {name}", relative(actual, expected), limit, f"eager torch errs {theirs:.1e}")
    silent_N = terms.pg_weight_N == 0
    yield verdict(f"rows without weight have gradient exactly 0, {name}", not bool(first[1][silent_N].any()))
    yield verdict(f"loss, dH and dW bit-equal in two runs, {name}", bit_equal(first, ours()))
    yield from _chunk_sizes(context, sizes, heads, terms, name)


def _chunk_sizes(context: Context, sizes: Sizes, heads: Heads, terms: PolicyTerms, name: str) -> Iterator[dict]:
    """dW in fp32, straight into a main gradient, for three sizes of a chunk."""
    results = []
    for parts in (1, 3, 7):
        copy, main_grad_VD = heads.to(heads.hidden_ND.dtype), torch.zeros_like(heads.weight_VD, dtype=torch.float32)
        budget = ChunkBudget(resident_bytes=max(sizes.tokens // parts, 1) * sizes.vocab * 4)
        options = CLIP | {"vocab_size": sizes.real_ids, "budget": budget, "weight_main_grad": main_grad_VD}
        linear_policy_loss(copy.hidden_ND, copy.weight_VD, copy.target_N, terms, **options).loss.backward()
        results.append(main_grad_VD)
    for parts, other in zip((3, 7), results[1:], strict=True):
        yield check(f"dW of {parts} chunks beside 1, {name}", relative(other, results[0]), 1e-5)


def _kl(context: Context, sizes: Sizes, name: str) -> Iterator[dict]:
    dtype = DTYPES[name]
    heads = make_heads(context.device, sizes, dtype, tokens=sizes.tokens // 2).to(dtype)
    exact, count = heads.to(torch.float64), len(heads.target_N)
    weight_N = ((torch.arange(count, device=context.device) % 3 > 0) / count).float()
    kinds = {"reverse_kl": {}, "forward_kl": {}, "jsd": {"alpha": 0.4}, "reverse_kl, top 32": {"top_k": 32}}
    for kind, extra in kinds.items():
        options = {"weight_N": weight_N, "divergence": kind.split(",")[0], "vocab_size": sizes.real_ids, **extra}

        def run(function, of: Heads, options=options) -> tuple[Tensor, Tensor, Tensor]:
            copy = of.to(of.hidden_ND.dtype)
            out = function(copy.hidden_ND, copy.weight_VD, copy.teacher_hidden_NE, copy.teacher_weight_VE, **options)
            out.loss.backward()
            return out.loss.detach(), *copy.gradients

        truth, ours = run(reference.linear_kl, exact), run(linear_kl, heads)
        yield check(f"{kind}, {name}, relative", relative(ours[0], truth[0]), 1e-4)
        for label, actual, expected in zip(("dH", "dW"), ours[1:], truth[1:], strict=True):
            yield check(f"{kind} {label}, {name}", relative(actual, expected), 2 * GRADIENT[name][label])
        yield verdict(f"{kind} bit-equal in two runs, {name}", bit_equal(ours, run(linear_kl, heads)))


def _beyond_int32(context: Context, sizes: Sizes) -> Iterator[dict]:
    """One resident chunk of more than 2^31 logits: the last rows, whose offsets need 64 bits, against fp64, and the
    gradients beside those of small chunks."""
    tokens, vocab = sizes.long_tokens, sizes.vocab
    heads = make_heads(context.device, sizes, torch.bfloat16, tokens)
    last = slice(tokens - 64, tokens)
    exact = (heads.hidden_ND[last].double(), heads.weight_VD.double(), heads.target_N[last])
    truth_n = reference.linear_logprob(*exact, vocab_size=sizes.real_ids)
    del exact
    ones_N = torch.ones(tokens, device=context.device) / tokens
    terms = PolicyTerms(None, None, torch.ones_like(ones_N), ones_N, torch.zeros_like(ones_N))
    results = []
    for budget in (ChunkBudget(tokens * vocab * 4, max_tokens=tokens), ChunkBudget(tokens // 8 * vocab * 4)):
        copy = heads.to(torch.bfloat16)
        options = CLIP | {"vocab_size": sizes.real_ids, "budget": budget}
        out = linear_policy_loss(copy.hidden_ND, copy.weight_VD, copy.target_N, terms, **options)
        out.loss.backward()
        results.append((out.logp_N, *copy.gradients))
    note = f"{tokens} × {vocab} = {tokens * vocab / 2**31:.2f} × 2^31 logits in one chunk"
    yield check("log-prob of the last 64 rows, nats", float((results[0][0][last] - truth_n).abs().max()), 1e-2, note)
    for label, big, small in zip(("log-prob", "dH", "dW"), *results, strict=True):
        yield check(f"{label} of one chunk beside eight", relative(big, small), 3e-3, note)


def _host_waits(context: Context, sizes: Sizes) -> Iterator[dict]:
    """Where the host waits for the device: a forward and backward of the policy loss once (n is a shape), the
    log-probs never, which sync debug mode "error" then proves."""
    heads = make_heads(context.device, sizes, torch.bfloat16).to(torch.bfloat16)
    inputs, options = (heads.hidden_ND, heads.weight_VD, heads.target_N), {"vocab_size": sizes.real_ids}
    with torch.no_grad():
        terms = make_terms(linear_logprob(*inputs, **options))
    main_grad_VD = torch.zeros_like(heads.weight_VD, dtype=torch.float32)

    def loss() -> None:
        linear_policy_loss(*inputs, terms, **CLIP, **options, weight_main_grad=main_grad_VD).loss.backward()

    def logprob() -> None:
        with torch.no_grad():
            linear_logprob(*inputs, **options)

    for name, run, limit in (("linear_policy_loss", loss, 1), ("linear_logprob", logprob, 0)):
        run()
        with host_waits(context.device) as waits:
            run()
        yield check(f"host waits of {name}", len(waits), limit, "; ".join(waits))
    yield verdict('linear_logprob under sync debug mode "error"', *_raises_nothing(logprob, context.device))


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[str]]:
    """The places (file:line) at which the host waited for the device inside the block; none on a CPU."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    called = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    waits += [f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in called]


def _raises_nothing(run: Callable[[], None], device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        run()
        return True, "on a CPU nothing waits"
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return False, str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, ""


def _limit(own: float, eager: float, name: str) -> float:
    return own if name == "bf16" else max(own, 1.25 * eager)


def _ids(options: dict) -> dict:
    return {"vocab_size": options["vocab_size"]}


def _eager_loss(heads: Heads, terms: PolicyTerms, sizes: Sizes) -> Tensor:
    """The same loss with materialised logits in the inputs' dtype."""
    z_NV = (heads.hidden_ND @ heads.weight_VD[: sizes.real_ids].T).float()
    logp_N = z_NV.log_softmax(-1).gather(1, heads.target_N[:, None])[:, 0]
    has_N = terms.pg_weight_N != 0
    ratio_n = (logp_N[has_N] - terms.logp_old_N[has_N]).exp()
    clipped_n = ratio_n.clamp(1 - CLIP["clip_eps_low"], 1 + CLIP["clip_eps_high"])
    advantage_n, gap_n = terms.advantage_N[has_N], logp_N[has_N] - terms.logp_teacher_N[has_N]
    surrogate_n = torch.minimum(ratio_n * advantage_n, clipped_n * advantage_n)
    return (terms.kl_weight_N[has_N] * gap_n.square() / 2 - terms.pg_weight_N[has_N] * surrogate_n).sum()
