"""Draws headline-light.svg and headline-dark.svg, the README's figure: python docs/figures/headline.py

Its bars are demo.json, the report.json of a whole `make demo`; its puzzle is drawn by vold.miniature.world.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from vold.miniature import world
from vold.report.style import label

HERE = Path(__file__).parent
EXPRESSION, SEED = "7*9+5*3", 6
WIDTH, HEIGHT = 900, 365
BARS_LEFT, BARS_TOP, FULL = 500, 62, 330  # x and y of the first bar; pixels of 100 %
MODELS = {
    "base": "reads both forms, cannot solve",
    "sft": "on 120 traces of a text teacher",
    "grpo": "SFT, then 150 steps on text",
    "vold-unmasked": "and the teacher's KL on every response",
    "vold": "and the teacher's KL where a response failed",
}
SANS = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue','Noto Sans',Arial,sans-serif"
MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"
THEMES = {
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#d1d9e0", "text": "#1d62ab", "image": "#d0763a"},
    "dark": {"ink": "#f0f6fc", "soft": "#9198a1", "line": "#3d444d", "text": "#6aa9ea", "image": "#eda168"},
}


def picture() -> str:
    """The puzzle as pixels, a PNG as a data URI; every pixel is eight across, so that browsers do not blur it."""
    (grey_HW,) = world.render([EXPRESSION], np.random.default_rng(SEED))
    out = io.BytesIO()
    Image.fromarray(grey_HW).resize((8 * world.WIDTH, 8 * world.HEIGHT), Image.Resampling.NEAREST).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def words(x: float, y: float, text: str, colour: str, size: float = 13, **look: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in look.items())
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}"{more}>{text}</text>'


def puzzle(theme: dict[str, str]) -> list[str]:
    """Left: one problem in both forms and its solution."""
    running = world.solve(EXPRESSION).running
    steps = " → ".join(str(value) + EXPRESSION[2 * i + 1 :] for i, value in enumerate(running))
    box = f'<rect x="{{}}" y="{{}}" width="{{}}" height="{{}}" rx="6" fill="none" stroke="{theme["line"]}"/>'
    return [
        words(0, 20, "One puzzle in two forms", theme["ink"], 16, font_weight="600"),
        words(0, 56, "As text: what it is trained on", theme["text"], font_weight="600"),
        box.format(0.5, 66, 392, 56),
        words(196, 103, EXPRESSION, theme["ink"], 27, font_family=MONO, text_anchor="middle", letter_spacing="14"),
        words(0, 156, "As pixels: what it is tested on, too", theme["image"], font_weight="600"),
        f'<image x="0" y="166" width="393" height="56" href="{picture()}"/>',
        words(0, 252, "Solved from left to right, modulo 10:", theme["soft"]),
        words(0, 275, steps, theme["soft"], 13, font_family=MONO),
    ]


def bars(report: dict, theme: dict[str, str]) -> list[str]:
    """Right: accuracy of the models in both forms, with one standard error, and chance."""
    n = report["n"]
    title = f"Solved, % of {n['text']} text and {n['image']} image problems"
    parts = [words(BARS_LEFT - 60, 20, title, theme["ink"], 16, font_weight="600")]
    for i, (model, meaning) in enumerate(MODELS.items()):
        top = BARS_TOP + 59 * i
        parts.append(words(BARS_LEFT - 60, top - 7, label(model), theme["ink"], 13.5, font_weight="600"))
        parts.append(words(BARS_LEFT + (96 if " " in label(model) else 0), top - 7, meaning, theme["soft"], 12.5))
        for row, form in enumerate(("text", "image")):
            value, error = report["accuracy"][model][form], report["stderr"][model][form]
            parts += bar(top + 16 * row, value, error, theme[form], theme)
            parts.append(words(BARS_LEFT - 60, top + 16 * row + 11, form, theme[form], 12.5))
    chance, bottom = BARS_LEFT + 0.1 * FULL, BARS_TOP + 59 * len(MODELS) - 26
    tops = [BARS_TOP + 59 * i for i in range(len(MODELS))]
    dashes = "".join(f"M{chance} {top - 3}V{top + 34}" for top in tops)
    parts.append(f'<path d="{dashes}" stroke="{theme["ink"]}" stroke-dasharray="2 2"/>')
    parts.append(words(chance, bottom + 17, "chance: 10", theme["soft"], 12.5, text_anchor="middle"))
    return parts


def bar(y: float, value: float, error: float, colour: str, theme: dict[str, str]) -> list[str]:
    end, half = BARS_LEFT + FULL * value, FULL * error
    return [
        f'<rect x="{BARS_LEFT}" y="{y}" width="{FULL * value:.1f}" height="13" rx="2" fill="{colour}"/>',
        f'<path d="M{end - half:.1f} {y + 6.5}H{end + half:.1f}" stroke="{theme["ink"]}" stroke-width="1.5"/>',
        words(round(end + half + 7, 1), y + 11, f"{100 * value:.1f}", theme["ink"], 12.5),
    ]


def headline(report: dict, theme: dict[str, str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{SANS}">',
            *puzzle(theme),
            *bars(report, theme),
            "</svg>\n",
        ]
    )


def main() -> None:
    report = json.loads((HERE / "demo.json").read_text())
    for name, theme in THEMES.items():
        (HERE / f"headline-{name}.svg").write_text(headline(report, theme))


if __name__ == "__main__":
    main()
