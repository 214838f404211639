"""The head of the page, for any run: what came out, and what is unhealthy, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .compare import curve_keys, difference_over_run, end_values
from .health import keys_not_finite, summarise
from .read import RunRecord, as_number
from .style import HEALTH, label, metric
from .tables import percent

OFTEN = 0.05  # share of the steps beyond a limit from which a metric is named
TRUNCATED = 0.1  # share of an evaluation's answers


def outcomes(runs: Sequence[RunRecord], *, evaluations: bool = True) -> list[tuple[str, str]]:
    """(run name, sentence) for each run that has something to tell; those of evaluations only where asked for."""
    sentences = [(run.name, _trained(run) or (_evaluated(run) if evaluations else "")) for run in runs]
    return [(name, sentence) for name, sentence in sentences if sentence]


def _trained(run: RunRecord) -> str:
    """`60 steps: reward 0.412 → 0.71, image accuracy 43 % → 58 %`; "" where no step is on file."""
    if not run.steps:
        return ""
    if run.verb == "traces":
        return _answered(run)
    done, planned = int(run.steps[-1]), run.planned_steps
    steps = f"{done} of {planned} steps" if planned and done < planned else f"{done} step{'s' * (done != 1)}"
    changes = []
    for key in curve_keys([run]):
        described = metric(key)
        if described.better and (ends := end_values(run, key)):
            changes.append(f"{described.label.lower()} {' → '.join(ends)}")
    if run.verb == "sft" and (ends := end_values(run, "loss")):
        changes.insert(0, f"loss {' → '.join(ends)} nats a token")
    return f"{steps}: {', '.join(changes)}." if changes else f"{steps}."


def _answered(run: RunRecord) -> str:
    """`1200 prompts answered: 1180 traces kept, 15 cut off, 5 too long, 0 failed; 37 tokens each.`"""
    card, said = run.card, f"{int(run.steps[-1])} prompts answered"
    if card is None or not (kept := as_number(card.get("kept"))) > 0:
        return f"{said}."
    names = {"truncated": "cut off", "too_long": "too long", "failed": "failed"}
    dropped = ", ".join(f"{as_number(card.get(key)):g} {name}" for key, name in names.items())
    return f"{said}: {kept:g} traces kept, {dropped}; {as_number(card.get('kept_tokens')) / kept:.3g} tokens each."


def _evaluated(run: RunRecord) -> str:
    sets = run.evaluation_section("sets")
    parts = [f"{name} {_score(numbers)} of {as_number(numbers.get('n')):g} problems" for name, numbers in sets.items()]
    return f"{', '.join(parts)}." if parts else ""


def _score(numbers) -> str:
    return f"{percent(as_number(numbers.get('accuracy')), as_number(numbers.get('stderr')))} %"


def unhealthy(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(run name, sentence) for all that deserves a look, the worst of each run first; [] where nothing does."""
    return [(label(run.name), line) for run in runs for line in _complaints(run)]


def has_health(runs: Sequence[RunRecord]) -> bool:
    """Return whether any run logged a metric that has a healthy range, or how many of its answers were cut off."""
    logged = any(run.finite(key) for run in runs for key in HEALTH if metric(key).has_limit)
    return logged or any(run.card or run.evaluation_section("sets") for run in runs)


def _complaints(run: RunRecord) -> Iterator[str]:
    if missing := keys_not_finite(run):
        yield f"not finite or missing on some steps: {', '.join(missing)}"
    rewards = {value for _, value in run.finite("reward")}
    if len(run.steps) > 2 and len(rewards) == 1:
        yield (
            f"every step has the same reward, {metric('reward').format(rewards.pop())}: the policy gradient is 0. "
            "Look at: samples.jsonl, extracted and gold"
        )
    for key in curve_keys([run]):
        change = difference_over_run(run, key)
        if change and change.clear and change.points * metric(key).better < 0:
            yield f"{metric(key).label.lower()} got worse: {' → '.join(end_values(run, key))}"
    yield from _beyond(run)
    card = run.card or {}
    if (share := as_number(card.get("truncated")) / max(1.0, as_number(card.get("asked")))) > TRUNCATED:
        yield f"{100 * share:.0f} % of the responses are cut off. Look at: sampling.max_new_tokens"
    for name, numbers in run.evaluation_section("sets").items():
        if (share := as_number(numbers.get("truncated"))) > TRUNCATED:
            yield f"{name}: {100 * share:.0f} % of the answers are cut off. Look at: evaluation.sampling.max_new_tokens"
        if (broken := as_number(numbers.get("broken"))) > 0:
            yield f"{name}: the grader failed on {broken:g} answers. Look at: `vold grade` on them"


def _beyond(run: RunRecord) -> Iterator[str]:
    """Metrics outside their healthy range, by how often; those that were so on a few steps in one line."""
    summaries = [(metric(key), summary) for key in HEALTH if (summary := summarise(run, key)) and summary.beyond]
    summaries.sort(key=lambda pair: -pair[1].beyond / pair[1].steps)
    seldom = []
    for described, summary in summaries:
        if summary.beyond < OFTEN * summary.steps:
            seldom.append(described.label.lower())
            continue
        yield (
            f"{described.label.lower()} {described.format(summary.worst)} at worst, healthy {described.limit}, "
            f"beyond on {summary.beyond} of {summary.steps} steps. Look at: {described.advice}"
        )
    if seldom:
        yield f"beyond their limits on single steps: {', '.join(seldom)} (see Health)"
