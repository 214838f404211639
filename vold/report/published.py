"""The VOLD paper's numbers (tables 1, 3 and 6), by VLMEvalKit's names of the sets, next to a run's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SETS = (
    *("MMMU_Pro_V", "MMStar", "MathVision", "MathVista_MINI", "MathVerse_MINI", "DynaMath", "WeMath", "LogicVista"),
    *("MME", "HallusionBench"),
)
PUBLISHED = {
    "Qwen2.5-VL-3B": (27.1, 55.9, 21.9, 61.2, 31.2, 42.7, 22.9, 40.3, 2157, 46.3),
    "X-Reasoner-3B": (31.0, 55.2, 24.4, 61.1, 35.7, 47.2, 30.6, 41.1, None, None),
    "SFT": (25.8, 49.7, 18.6, 55.1, 27.8, 42.1, 21.4, 28.9, None, None),
    "SFT + GRPO": (29.7, 50.5, 24.0, 58.4, 34.1, 47.6, 30.4, 38.3, None, None),
    "VOLD": (32.0, 55.2, 28.0, 61.9, 37.9, 50.7, 31.8, 45.0, 2268, 49.8),
}
JUDGES = {"rule": "this run, by rule", "model": "this run, by a model"}


def compare_with_published(benchmarks: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one row per set. benchmarks: judge -> set -> {"score", ...}.

    Scores judged by rule and by a language model are never in one column; the paper's were judged by GPT-4o-mini.
    """
    judges = [judge for judge in JUDGES if benchmarks.get(judge)]
    rows = []
    for name, *published in zip(_SETS, *PUBLISHED.values(), strict=True):
        results = [benchmarks[judge].get(name) for judge in judges]
        scores = [f"{result['score']:.1f}" if isinstance(result, Mapping) else "–" for result in results]
        rows.append([name, *scores, *("–" if v is None else f"{v:g}" if v > 100 else f"{v:.1f}" for v in published)])
    return ["", *(JUDGES[judge] for judge in judges), *(f"paper: {model}" for model in PUBLISHED)], rows
