"""Draws step-light.svg and step-dark.svg, a step in the order of vold/train/rl.py: python docs/figures/step.py"""

from __future__ import annotations

from headline import HERE, SANS, THEMES, words

BOX_WIDTH, BOX_HEIGHT, GAP = 158, 64, 27
TOP, BOTTOM = 2, 126  # y of the two rows
ROWS = (
    (
        ("Sample", "G responses to a prompt,", "transformers or vLLM", "ink"),
        ("Grade", "rules, your functions,", "a judge", "ink"),
        ("Weigh", "advantage → two weights", "for each token", "ink"),
        ("Pack", "no padding, each prompt", "stored once", "ink"),
        ("Teacher scores", "only where its weight", "is not 0: failed ones", "image"),
    ),
    (
        ("Sync weights", "a parity probe stops", "a sampler that drifts", "ink"),
        ("AdamW", "Megatron's, in any", "layout the same", "ink"),
        ("Fused head", "policy gradient + β · k2,", "never [tokens, ids] logits", "text"),
        ("Student", "packed forward pass,", "hidden states", "text"),
    ),
)


def left_of(column: int) -> int:
    return column * (BOX_WIDTH + GAP)


def box(x: int, y: int, title: str, lines: tuple[str, str], colour: str, theme: dict[str, str]) -> list[str]:
    return [
        f'<rect x="{x + 1}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="none" '
        f'stroke="{theme[colour] if colour != "ink" else theme["line"]}" stroke-width="1.3"/>',
        words(x + 11, y + 20, title, theme[colour], 13.5, font_weight="600"),
        *(words(x + 11, y + 37 + 16 * i, line, theme["soft"], 12) for i, line in enumerate(lines)),
    ]


def arrow(points: str, theme: dict[str, str]) -> str:
    return f'<path d="{points}" fill="none" stroke="{theme["soft"]}" stroke-width="1.3" marker-end="url(#head)"/>'


def drawing(theme: dict[str, str]) -> str:
    width = 5 * BOX_WIDTH + 4 * GAP + 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 194" font-family="{SANS}">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{theme["soft"]}"/></marker></defs>',
    ]
    for row, boxes in enumerate(ROWS):
        y = (TOP, BOTTOM)[row]
        for column, (title, first, second, colour) in enumerate(boxes):
            x = left_of(column)
            parts += box(x, y, title, (first, second), colour, theme)
            if row == 0 and column + 1 < len(boxes):
                parts.append(arrow(f"M{x + BOX_WIDTH + 3} {y + 32}h{GAP - 5}", theme))
            elif row == 1 and column:
                parts.append(arrow(f"M{x - 1} {y + 32}h{5 - GAP}", theme))
    last = left_of(4) + BOX_WIDTH // 2
    parts.append(arrow(f"M{last} {TOP + BOX_HEIGHT + 2}V{BOTTOM + 32}H{left_of(3) + BOX_WIDTH + 4}", theme))
    parts.append(arrow(f"M{BOX_WIDTH // 2} {BOTTOM - 2}V{TOP + BOX_HEIGHT + 4}", theme))
    parts.append(words(BOX_WIDTH // 2 + 10, 101, "the next step", theme["soft"], 12))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (HERE / f"step-{name}.svg").write_text(drawing(theme))
