"""The miniature world: left-to-right arithmetic modulo 10, written as characters, as words or as pixels. Only numpy.

A problem is four digits and three operations, `7*9+5*3`. The teacher's trace rewrites the whole remaining expression
at every step, right-aligned with dots, so that the previous line always lies eight tokens back:
`<think>7*9+5*3>..3+5*3>....8*3>......4</think>\\boxed{4}`. Copying at a fixed offset is what lets a skill learnt from
text carry over to images: only the first line looks at the prompt.

Shape letters: B images, H = 28 and W = 196 pixels.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]
Task = Literal["<solve>", "<read>"]

DIGITS = 4
SYMBOLS = 2 * DIGITS - 1
"""Symbols of an expression, cells of an image and merged image tokens: the same number."""
OPERATIONS = "+-*"
MULTIPLIERS = (3, 7, 9)
"""Invertible modulo 10, so that every operand matters to the answer."""
MOST_FILLER = 12
WORDS = 8
"""Filler words, `<w0>` and on."""
STYLE = 0.6
SPELLED_SHARE = 0.5
HALVES = ("digits", "words")
"""The two ways of writing a text problem."""
IMAGE_MARK = "<image>"

PATCH, MERGE, TEMPORAL = 14, 2, 2
CELL = PATCH * MERGE
HEIGHT, WIDTH = CELL, CELL * SYMBOLS
PIXEL_MEAN, PIXEL_STD = 0.2, 0.75
"""Constants of the image processor: the background maps to 0, the brightest glyph to 1."""
NOISE = 0.1
SMALL_SCALE = (2, 1)
"""Rows and columns of a glyph that is a detail, 14 × 5 pixels; all others have 2 or 3 a side."""

_GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "01110 10001 00001 00110 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "+": "00000 00100 00100 11111 00100 00100 00000",
    "-": "00000 00000 00000 11111 00000 00000 00000",
    "*": "00000 10101 01110 11111 01110 10101 00000",
}
_FONT = {c: np.array([[int(bit) for bit in row] for row in rows.split()], np.float32) for c, rows in _GLYPHS.items()}


@dataclass(frozen=True)
class Problem:
    """`expression` such as `7*9+5*3`; `running` its value after 1, 2, … operands (the first operand included)."""

    expression: str
    running: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The gold answer, one digit."""
        return str(self.running[-1])


def apply(left: int, operation: str, right: int) -> int:
    """One step modulo 10."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return value % 10


def solve(expression: str) -> Problem:
    """The problem of a written expression, evaluated from left to right."""
    running = [int(expression[0])]
    for operation, operand in zip(expression[1::2], expression[2::2], strict=True):
        running.append(apply(running[-1], operation, int(operand)))
    return Problem(expression, tuple(running))


def mistaken(problem: Problem) -> Problem:
    """The same expression with every step's value one too high, modulo 10."""
    expression, running = problem.expression, [int(problem.expression[0])]
    for operation, operand in zip(expression[1::2], expression[2::2], strict=True):
        running.append((apply(running[-1], operation, int(operand)) + 1) % 10)
    return Problem(expression, tuple(running))


def split_of(expression: str) -> Split:
    """The split of an expression, by its crc32: a tenth each to test and val, the others to train."""
    bucket = zlib.crc32(expression.encode()) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def sample_problem(rng: np.random.Generator, split: Split = "train") -> Problem:
    """A random problem whose expression belongs to `split`."""
    while True:
        operations = [OPERATIONS[i] for i in rng.integers(0, len(OPERATIONS), DIGITS - 1)]
        expression = str(rng.integers(0, 10))
        for operation in operations:
            expression += operation + str(rng.choice(MULTIPLIERS) if operation == "*" else rng.integers(0, 10))
        if split_of(expression) == split:
            return solve(expression)


def trace(problem: Problem) -> str:
    """A trace in the teacher's style: every line is the whole remaining expression, right-aligned."""
    expression = problem.expression
    lines = ["." * (2 * k) + str(value) + expression[2 * k + 1 :] for k, value in enumerate(problem.running)]
    return f"<think>{'>'.join(lines)}</think>\\boxed{{{problem.answer}}}"


def trace_wordy(problem: Problem, rng: np.random.Generator) -> str:
    """The teacher's trace with a filler word in the place of each dot: `<think>7*9+5*3><w3><w4>3+5*3>…`.

    Which words is a matter of style: STYLE of them are the one that follows from the value before and the place, the
    others are drawn. Lines stay eight tokens apart and the answer is the same.
    """
    lines = [problem.expression]
    for k, (before, value) in enumerate(itertools.pairwise(problem.running), start=1):
        usual = [(before + place) % WORDS for place in range(2 * k)]
        words = [word if rng.random() < STYLE else int(rng.integers(0, WORDS)) for word in usual]
        lines.append("".join(f"<w{word}>" for word in words) + str(value) + problem.expression[2 * k + 1 :])
    return f"<think>{'>'.join(lines)}</think>\\boxed{{{problem.answer}}}"


def trace_other(problem: Problem) -> str:
    """A correct trace in another style, a running chain: `<think>7*9=3;3+5=8;8*3=4</think>\\boxed{4}`."""
    steps = zip(problem.running, problem.expression[1::2], problem.expression[2::2], problem.running[1:], strict=False)
    chain = ";".join(f"{left}{operation}{right}={value}" for left, operation, right, value in steps)
    return f"<think>{chain}</think>\\boxed{{{problem.answer}}}"


def _filler(rng: np.random.Generator) -> str:
    return "".join(f"<w{i}>" for i in rng.integers(0, WORDS, rng.integers(0, MOST_FILLER + 1)))


def _around(content: str, task: Task, rng: np.random.Generator) -> str:
    return f"{_filler(rng)}[{content}]{_filler(rng)}{task}"


def text_question(problem: Problem, rng: np.random.Generator, task: Task = "<solve>") -> str:
    """A user message; half of them spell the symbols as word tokens: `<w1>[<7><*><9>…]<w5><solve>`."""
    spelled = rng.random() < SPELLED_SHARE
    return _around("".join(f"<{c}>" for c in problem.expression) if spelled else problem.expression, task, rng)


def half_question(problem: Problem, rng: np.random.Generator, half: str) -> str:
    """A user message written as `half` of HALVES says."""
    while True:
        question = text_question(problem, rng)
        if half_of(question) == half:
            return question


def half_of(question: str) -> str:
    """Which of HALVES a text question belongs to."""
    return "words" if "[<" in question else "digits"


def image_question(rng: np.random.Generator, task: Task = "<solve>") -> str:
    """A user message of the same shape, `IMAGE_MARK` where the expression would be."""
    return _around(IMAGE_MARK, task, rng)


def sample_detail(problems: int, rng: np.random.Generator) -> list[int]:
    """For each problem the cell of one of its operands, at random: the digit that `render` draws small."""
    return (2 * rng.integers(0, DIGITS, problems)).tolist()


def render(expressions: list[str], rng: np.random.Generator, small: Sequence[int | None] = ()) -> np.ndarray:
    """Grey images, uint8 [B, H, W]: one glyph in each 28-pixel cell at a random place, noisy.

    Scale and contrast are drawn once an image. Before quantisation a glyph is .6 to 1, the background 0, noise .1.
    `small`: for each image the cell whose glyph has SMALL_SCALE, or None.
    """
    light_BHW = rng.standard_normal((len(expressions), HEIGHT, WIDTH), dtype=np.float32) * NOISE
    for light_HW, expression, detail in zip(light_BHW, expressions, small or [None] * len(expressions), strict=True):
        scale, contrast = rng.integers(2, 4, 2), rng.uniform(0.6, 1.0)
        for cell, symbol in enumerate(expression):
            glyph = np.kron(_FONT[symbol], np.ones(SMALL_SCALE if cell == detail else scale, np.float32))
            high, wide = glyph.shape
            top = rng.integers(0, CELL - high + 1)
            left = cell * CELL + rng.integers(1, CELL - wide)
            light_HW[top : top + high, left : left + wide] += contrast * glyph
    return (255 * np.clip(PIXEL_MEAN + PIXEL_STD * light_BHW, 0, 1)).round().astype(np.uint8)


def patchify(grey_BHW: np.ndarray) -> np.ndarray:
    """Patches as the checkpoint's image processor makes them, all images at once: float32 [B * 28, 3 * 2 * 14 * 14].

    Rows run over cells, then the 2 × 2 patches that the vision tower merges; a test compares it with the processor.
    """
    x = (grey_BHW.astype(np.float32) * np.float32(1 / 255) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    batch, high, wide = x.shape[0], HEIGHT // CELL, WIDTH // CELL
    x = x.reshape(batch, high, MERGE, PATCH, wide, MERGE, PATCH).transpose(0, 1, 4, 2, 5, 3, 6)
    x = np.broadcast_to(x[:, :, :, :, :, None, None], (*x.shape[:5], 3, TEMPORAL, PATCH, PATCH))
    return x.reshape(batch * high * wide * MERGE * MERGE, -1)
