"""Numbers that pages quote are those of the files they come from: CSV of benchmarks/results, JSON of docs/figures.

WRITE=1 python -m pytest tests/docs/test_numbers.py      puts the files' numbers into the pages
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from commands import ROOT

import vold
from benchmarks.gpu_day.journal import read_rows
from vold.miniature.demo import MODELS
from vold.report import accuracy_table

RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
DEMO = json.loads((FIGURES / "demo.json").read_text())
WRITE = bool(os.environ.get("WRITE"))


def kernel(provider: str, column: str, scale: float = 1.0) -> Callable[[], float]:
    """A number of the policy loss, forward and backward, on a CPU."""

    def value() -> float:
        rows = read_rows(RESULTS / "kernels-cpu.csv")
        wanted = {"mode": "full", "head": "small", "provider": provider}
        return float(next(row for row in rows if wanted.items() <= row.items())[column]) / scale

    return value


def demo(model: str, form: str) -> Callable[[], float]:
    return lambda: 100 * DEMO["accuracy"][model][form]


def most(file: str, *columns: str) -> Callable[[], float]:
    """The largest number in some columns of a CSV."""
    return lambda: max(float(row[column]) for row in read_rows(RESULTS / file) for column in columns if row[column])


def rows_of(file: str) -> Callable[[], float]:
    return lambda: float(len(read_rows(RESULTS / file)))


FIVE = r"([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)"


class Claim(NamedTuple):
    """A page, a pattern whose groups are numbers, and what each of them has to be."""

    page: str
    pattern: str
    values: tuple[Callable[[], float], ...]


OURS, EAGER, LIGER, TRL, COMPILED = "vold_kernels", "eager", "Liger GRPO", "TRL chunked", "torch.compile"
GRADIENTS = ("gradient vs one process", "gradient vs transformers")
CLAIMS = [
    Claim(
        "README.md",
        r"fused heads need ([\d.]+) GiB where materialised logits need ([\d.]+)",
        (kernel(OURS, "peak_extra_mib", 1024), kernel(EAGER, "peak_extra_mib", 1024)),
    ),
    Claim(
        "README.md",
        r"within ([\d.]+)e-6 in (\d+) comparisons",
        (lambda: 1e6 * most("parity.csv", *GRADIENTS)(), rows_of("parity.csv")),
    ),
    Claim(
        "README.md",
        rf"SFT, GRPO, VOLD without mask and VOLD: {FIVE} % of text problems, {FIVE} % of image problems",
        tuple(demo(model, form) for form in ("text", "image") for model in MODELS),
    ),
    Claim("README.md", r"failed\. (\d+) methods", (lambda: float(len(vold.PRESETS)),)),
    Claim(
        "docs/speed.md",
        r"the policy loss takes ([\d.]+) s and ([\d.]+) GiB, the three matmuls alone ([\d.]+) s",
        (kernel(OURS, "median_s"), kernel(OURS, "peak_extra_mib", 1024), kernel("matmuls alone", "median_s")),
    ),
    Claim(
        "docs/speed.md",
        r"Liger's GRPO loss ([\d.]+) s and ([\d.]+) GiB, materialised logits ([\d.]+) s and ([\d.]+) GiB, "
        r"TRL's chunked log-prob ([\d.]+) s and ([\d.]+) GiB",
        tuple(
            kernel(provider, column, scale)
            for provider in (LIGER, EAGER, TRL)
            for column, scale in (("median_s", 1), ("peak_extra_mib", 1024))
        ),
    ),
    Claim(
        "docs/speed.md",
        r"`torch\.compile` of materialised logits takes ([\d.]+) s with ([\d.]+) GiB",
        (kernel(COMPILED, "median_s"), kernel(COMPILED, "peak_extra_mib", 1024)),
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.page} {claim.pattern[:40]}")
def test_a_quoted_number_is_the_files(claim):
    path = ROOT / claim.page
    text = path.read_text()
    match = re.search(claim.pattern.replace(" ", r"\s+"), text)
    assert match, "the page no longer says this: change the claim with it"
    wanted = [_like(printed, value()) for printed, value in zip(match.groups(), claim.values, strict=True)]
    if WRITE:
        spans = [match.span(i + 1) for i in range(len(wanted))]
        for (start, end), number in sorted(zip(spans, wanted, strict=True), reverse=True):
            text = text[:start] + number + text[end:]
        path.write_text(text)
    else:
        assert list(match.groups()) == wanted


def _like(printed: str, value: float) -> str:
    """A number with as many decimals as the page prints."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


def test_the_table_of_the_demo():
    shown = accuracy_table(DEMO["accuracy"], DEMO["stderr"])
    assert shown.strip() in (ROOT / "docs" / "quickstart.md").read_text(), "what the demo prints at its end"
    path, mark = ROOT / "docs" / "results.md", "<!-- demo: written by tests/docs/test_numbers.py -->\n\n"
    before, rest = path.read_text().split(mark)
    printed, after = rest.split("\n\n", 1)
    wanted = accuracy_table(DEMO["accuracy"], DEMO["stderr"]).replace("**", "")
    if WRITE:
        path.write_text(f"{before}{mark}{wanted}\n\n{after}")
    else:
        assert printed == wanted


@pytest.mark.parametrize("program", ["headline", "step"])
def test_a_figure_is_what_its_program_draws(program, monkeypatch):
    """Byte for byte but for the packed pixels, which depend on the zlib at hand."""
    monkeypatch.setattr(sys, "path", [str(FIGURES), *sys.path])
    module = runpy.run_path(str(FIGURES / f"{program}.py"))
    for name, theme in module["THEMES"].items():
        drawn = module["headline"](DEMO, theme) if program == "headline" else module["drawing"](theme)
        on_file = (FIGURES / f"{program}-{name}.svg").read_text()
        assert _without_pixels(on_file) == _without_pixels(drawn)


def _without_pixels(svg: str) -> str:
    return re.sub(r'href="data:[^"]*"', "", svg)
