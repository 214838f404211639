"""What the VOLD paper prints (tables 1, 3 and 6), by VLMEvalKit's names of the sets, and a run's numbers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SETS = (
    *("MMMU_Pro_V", "MMStar", "MathVision", "MathVista_MINI", "MathVerse_MINI", "DynaMath", "WeMath", "LogicVista"),
    *("MME", "HallusionBench"),
)
PUBLISHED: dict[str, dict[str, float]] = {
    model: dict(zip(_SETS, values, strict=False))
    for model, values in {
        "Qwen2.5-VL-3B": (27.1, 55.9, 21.9, 61.2, 31.2, 42.7, 22.9, 40.3, 2157, 46.3),
        "X-Reasoner-3B": (31.0, 55.2, 24.4, 61.1, 35.7, 47.2, 30.6, 41.1),
        "SFT": (25.8, 49.7, 18.6, 55.1, 27.8, 42.1, 21.4, 28.9),
        "SFT + GRPO": (29.7, 50.5, 24.0, 58.4, 34.1, 47.6, 30.4, 38.3),
        "VOLD": (32.0, 55.2, 28.0, 61.9, 37.9, 50.7, 31.8, 45.0, 2268, 49.8),
    }.items()
}
JUDGES = {"rule": "this run, by rule", "model": "this run, by a model"}


def beside_published(benchmarks: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a set each. benchmarks: judge -> set -> {"score", ...}. What a rule judged and what a language
    model judged are never in one column; the paper's answers were read by GPT-4o-mini."""
    judges = [judge for judge in JUDGES if benchmarks.get(judge)]
    rows = []
    for name in _SETS:
        ours = [benchmarks[judge].get(name) for judge in judges]
        cells = [f"{found['score']:.1f}" if isinstance(found, Mapping) else "–" for found in ours]
        rows.append([name, *cells, *(_printed(values.get(name)) for values in PUBLISHED.values())])
    return ["", *(JUDGES[judge] for judge in judges), *(f"paper: {model}" for model in PUBLISHED)], rows


def _printed(value: float | None) -> str:
    return "–" if value is None else f"{value:g}" if value > 100 else f"{value:.1f}"
