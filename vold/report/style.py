"""What a number is called, what it means, when to worry, and which colour a run has on every plot and table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INK, SOFT, GRID = "#24221f", "#6c675e", "#e4dfd4"  # text, axis text, rules; page.css has the dark counterparts

# Distinct for deuteranopes and protanopes by lightness as well as hue. page.css names them --run-0 … in this order.
PALETTE = ("#b0aa9e", "#c48a0c", "#1d62ab", "#b83a57", "#1a8a76", "#8660b8", "#4fa5d8", "#8a5a2b")
_RESERVED = {"base": 0, "teacher": 5, "sft": 1, "grpo": 2, "vold": 3, "unmasked": 4, "opd": 6, "traces": 7}


@dataclass(frozen=True)
class Metric:
    """Above `limit`, or below `least`, the page raises a flag; `remedy`: where to look then. Limits are rules of thumb,
    and the page says so. `better`: +1 where more is better, -1 where less is, 0 where neither is."""

    label: str
    unit: str = ""
    meaning: str = ""
    limit: float | None = None
    least: float | None = None
    remedy: str = ""
    better: int = 0
    log: bool = False

    @property
    def has_limit(self) -> bool:
        return self.limit is not None or self.least is not None

    @property
    def is_share(self) -> bool:
        return self.unit.startswith("share")

    def is_over(self, value: float) -> bool:
        """Whether a value is on the wrong side of a limit; NaN is on neither."""
        return (self.limit is not None and value > self.limit) or (self.least is not None and value < self.least)


METRICS: dict[str, Metric] = {
    "reward": Metric("Reward", "mean over responses", "Share of sampled responses that the grader accepts.", better=1),
    "loss": Metric("Loss", "nats per token"),
    "nll": Metric("Negative log-likelihood", "nats per token"),
    "pg_loss": Metric("Policy loss", "nats per token"),
    "kl_loss": Metric("Distillation loss", "nats² per token"),
    "kl_teacher": Metric("Teacher KL", "½(log p − log p teacher)², nats²", "How far the student is from the teacher."),
    "entropy": Metric("Entropy", "nats per token", "How undecided the student is; near 0, nothing is left to explore."),
    "response_length": Metric("Response length", "tokens"),
    "grad_norm": Metric("Gradient norm", "before clipping", "Spikes come before collapses.", log=True),
    "lr": Metric("Learning rate", ""),
    "tokens_per_second": Metric("Throughput", "tokens per second", "All phases included."),
    "cpu_seconds": Metric(
        "CPU time", "seconds a step", "Of this process; other work on the machine is not in it, but may slow it."
    ),
    "mfu": Metric("MFU", "share of peak", "Useful work of the training phase over the device's peak."),
    "peak_memory_gib": Metric("Peak memory", "GiB", "Highest so far on one device."),
    "mismatch_mean": Metric(
        "Sampler–trainer mismatch, mean",
        "|Δ log p|, nats",
        "Sampler and trainer score the same tokens; at equal weights only rounding remains.",
        limit=0.02,
        remedy="the sampler's dtype and temperature; whether its weights are this step's",
    ),
    "mismatch_max": Metric(
        "Sampler–trainer mismatch, worst token",
        "|Δ log p|, nats",
        "The same for the worst token of the batch; large means stale weights or a wrong mask.",
        limit=1.0,
        remedy="the response it belongs to, in samples.jsonl",
    ),
    "mismatch_kl": Metric(
        "KL from sampler to trainer",
        "nats per token",
        "Its mean; NeMo-RL alarms at the same value.",
        limit=2e-3,
        remedy="rollout.lag and rollout.importance_cap where rollouts are drawn ahead, else the sampler",
    ),
    "parity_error": Metric(
        "Parity after a hand-over",
        "mean exp|Δ log p|",
        "On fixed sequences, right after the weights went to the sampler; the run stops at parity_limit.",
        limit=1.05,
        remedy="rollout.engine and dtype: sampler and trainer run different models",
    ),
    "importance_truncated": Metric(
        "Importance weights truncated",
        "share of tokens",
        "Tokens whose weight was cut at rollout.importance_cap.",
        limit=0.05,
        remedy="rollout.lag=0, or a lower optimizer.lr",
    ),
    "effective_sample_size": Metric(
        "Effective sample size",
        "share of tokens",
        "What the importance weights leave of the batch (Kish).",
        least=0.5,
        remedy="rollout.lag=0, or a lower optimizer.lr",
    ),
    "clip_fraction_low": Metric(
        "Clipped below",
        "share of tokens",
        "Tokens whose ratio fell under the clip range: no gradient.",
        limit=0.1,
        remedy="a lower optimizer.lr",
    ),
    "clip_fraction_high": Metric(
        "Clipped above",
        "share of tokens",
        "Tokens whose ratio rose over the clip range: no gradient.",
        limit=0.1,
        remedy="a lower optimizer.lr",
    ),
    "truncated": Metric(
        "Truncated",
        "share of responses",
        "Responses that hit the length limit; they score 0.",
        limit=0.1,
        remedy="rollout.max_new_tokens, and whether the model still ends its answers",
    ),
    "broken": Metric(
        "Broken",
        "responses a step",
        "Responses on which the grader failed; masked out, not wrong.",
        limit=0.0,
        remedy="`vold grade` on answers of that kind",
    ),
    "groups_solved": Metric(
        "Groups all right",
        "share of groups",
        "No policy gradient comes from them.",
        limit=0.8,
        remedy="harder problems, or rollout.dynamic_sampling",
    ),
    "groups_failed": Metric(
        "Groups all wrong",
        "share of groups",
        "No policy gradient comes from them, only the teacher's.",
        limit=0.8,
        remedy="easier problems, a longer stage 1, or rollout.dynamic_sampling",
    ),
    "groups_lost": Metric(
        "Groups lost",
        "prompts a step",
        "Prompts whose responses did not come back; dropped whole.",
        limit=0.0,
        remedy="the run's log: it names them",
    ),
    "teacher_failed": Metric(
        "Teacher silent",
        "responses a step",
        "Responses that the teacher was asked about and did not score; they teach nothing.",
        limit=0.0,
        remedy="the teacher's own log",
    ),
    "image_sensitivity": Metric(
        "Visual reliance",
        "nats per token",
        "What an image's detail adds to the student's own log-probs; at 0 it answers without looking.",
        least=0.0,
        remedy="whether the problems can be solved without their images, and visual validation",
    ),
    "visual_advantage": Metric(
        "Visual advantage", "nats per token", "What an image's detail adds to the teacher's belief in the response."
    ),
    "visual_top_share": Metric(
        "Visual advantage, concentration",
        "share of it",
        "What the tenth of tokens with most of it has; .1 is evenly spread.",
    ),
    "skipped": Metric(
        "Updates skipped",
        "a step",
        "The gradient was not finite, or nothing was left to learn from: no parameter changed.",
        limit=0.0,
        remedy="the rows of that step in samples.jsonl; a lower optimizer.lr",
    ),
    # self-play, of an iteration's questions
    "challenger_well_formed": Metric(
        "Questions well formed",
        "share of responses",
        "Responses of the challenger that hold a question; the others are worth nothing.",
        least=0.5,
        remedy="pose.request and pose.pattern; the challenger's samples.jsonl",
        better=1,
    ),
    "clusters_words": Metric(
        "Kinds of questions by words",
        "share of questions",
        "Clusters by BLEU among the questions looked at.",
        least=0.3,
        remedy="pose.repetition_weight; a lower challenger.optimizer.lr",
        better=1,
    ),
    "clusters_vectors": Metric(
        "Kinds of questions by embedding",
        "share of questions",
        "The same by cosine; far fewer than by words is the surface illusion.",
        least=0.3,
        remedy="coder, memory and pose.repetition_weight: R-Diverse",
        better=1,
    ),
    "challenger_reward": Metric(
        "Challenger's reward",
        "mean over responses",
        "1 is a question that half its answers agree on and that resembles no other.",
        better=1,
    ),
    "challenger_uncertainty": Metric(
        "Solver's uncertainty", "1 − 2|p − ½|", "1 where half the answers agree.", better=1
    ),
    "challenger_repetition": Metric(
        "Repetition", "|cluster| / B", "Share of a step that is like the question.", better=-1
    ),
    "challenger_memory_penalty": Metric(
        "Memory penalty", "P", "Likeness to questions of earlier iterations.", better=-1
    ),
    "questions_candidates": Metric("Responses drawn for questions", "an iteration"),
    "questions_posed": Metric("Questions posed", "an iteration", "Of the responses, those that are well formed."),
    "questions_kept": Metric("Questions kept", "an iteration", "Those that the solver half knows.", better=1),
    "distinct": Metric("Different questions", "share of questions", "By their very text.", better=1),
    "seen_before": Metric(
        "Seen before", "share of questions", "Whose very text is of an earlier iteration.", better=-1
    ),
    "nearest_earlier": Metric("Nearest earlier question", "cosine", "High is the local illusion.", better=-1),
    "recycled": Metric(
        "Recycled", "share of questions", "Nearly an earlier iteration's; grows with the bank.", better=-1
    ),
}

CURVES: dict[str, tuple[str, ...]] = {
    "rl": (
        *("reward", "kl_teacher", "accuracy_image", "accuracy_text", "image_sensitivity"),
        *("entropy", "response_length", "grad_norm"),
    ),
    "sft": ("loss", "accuracy_image", "accuracy_text", "grad_norm"),
    "selfplay": (
        *("accuracy_text", "accuracy_image", "questions_kept", "challenger_reward", "challenger_uncertainty"),
        *("clusters_words", "clusters_vectors", "nearest_earlier", "seen_before"),
    ),
}
HEALTH = (*(key for key, shown in METRICS.items() if shown.has_limit), "entropy", "grad_norm")
_ACRONYMS = ("sft", "grpo", "vold", "opd", "rl")
TRAIN_PARTS = ("student_forward", "student_backward", "optimizer")
# In the order of a step. page.css colours them --phase-0 … in this order.
PHASES = (
    *("rollout", "rollout_wait", "grade", "gather", "teacher", "image_sensitivity", "train", *TRAIN_PARTS),
    *("sync", "evaluate", "other"),
)


def metric(key: str) -> Metric:
    """How `key` is shown; a key nobody described shows its own name."""
    if key in METRICS:
        return METRICS[key]
    if key.startswith("accuracy_"):
        return Metric(f"{key.removeprefix('accuracy_').capitalize()} accuracy", "held-out problems", better=1)
    return Metric(key.replace("_", " ").capitalize())


def arm_of(name: str) -> str:
    """The model behind a run: eval_vold and eval/vold are vold's."""
    return name.split("/")[-1].removeprefix("eval_").removeprefix("eval-")


def label(name: str) -> str:
    """How a run is written for people: VOLD for vold; anything but a known acronym stays as it is."""
    return name.upper() if name in _ACRONYMS else name


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per run. Known arms keep theirs in every report; others take what is left, in order."""
    slots: dict[str, int] = {}
    arms = list(dict.fromkeys(arm_of(name) for name in names))
    for arm in arms:  # exact names first: `vold` keeps its colour although `vold-beta1` may come before it
        if arm in _RESERVED:
            slots[arm] = _RESERVED[arm]
    for arm in arms:
        if arm not in slots:
            slots[arm] = _free_slot(arm, taken=set(slots.values()))
    return {name: PALETTE[slots[arm_of(name)]] for name in names}


def _free_slot(arm: str, *, taken: set[int]) -> int:
    for known, slot in _RESERVED.items():
        if arm.startswith(known) and slot not in taken:
            return slot
    order = (2, 3, 4, 1, 5, 6, 7, 0)
    return next((slot for slot in order if slot not in taken), order[len(taken) % len(order)])
