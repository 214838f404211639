"""Short word problems of one and two steps, and sums, made here: docs/smollm2.md.

python examples/word_problems.py data/words      writes cold.jsonl, train.jsonl, and validation and test sets

A row has question, answer and `hinted`: the question with its worked solution, which a teacher may read in its place.
The *-hinted.jsonl files ask that longer question itself, to measure whether a model can use what it reads.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

COLD, TRAIN, VALIDATION, TEST = 128, 1200, 60, 200  # rows of each kind
HINTED = "{question}\n\nA correct solution of this problem:\n\n{solution}\n\nSolve the problem correctly."
NAMES = ("Mia", "Omar", "Lena", "Ravi", "Tess", "Ivo", "Nora", "Kofi", "Yuki", "Pablo", "Anja", "Samir")
THINGS = ("shells", "stickers", "coins", "cards", "beads", "marbles", "stamps", "pears", "books", "pens")
MORE = (
    "{name} has {a} {things} and finds {b} more.",
    "{name} buys {a} {things} on Monday and {b} on Tuesday.",
    "A box holds {a} {things}. {name} puts in {b} others.",
)
FEWER = (
    "{name} has {a} {things} and gives away {b}.",
    "There are {a} {things} on a table. {name} takes {b} of them.",
    "{name} made {a} {things} and sold {b}.",
)
THEN = {"+": "Then {c} more come in.", "-": "Then {c} are lost."}
ASKED = {"+": "How many {things} are there in all?", "-": "How many {things} are left?"}


def sums(rng: random.Random) -> Iterator[dict]:
    """Every sum of two numbers below 50, in a random order."""
    pairs = [(a, b) for a in range(1, 50) for b in range(1, 50)]
    rng.shuffle(pairs)
    for a, b in pairs:
        yield _row(f"What is {a} + {b}?", f"{a} + {b} = \\boxed{{{a + b}}}", a + b)


def word_problems(rng: random.Random) -> Iterator[dict]:
    """Problems of one and of two steps by turns, without end. No computation comes twice, in whatever words."""
    seen = set()
    while True:
        for steps in (1, 2):
            row = _word_problem(rng, steps)
            while row["solution"] in seen:
                row = _word_problem(rng, steps)
            seen.add(row["solution"])
            yield row


def _word_problem(rng: random.Random, steps: int) -> dict:
    sign, second = rng.choice("+-"), rng.choice("+-")
    a, b, c = rng.randint(5, 40), rng.randint(2, 30), rng.randint(2, 20)
    if sign == "-":
        a, b = max(a, b) + 3, min(a, b)
    half = a + b if sign == "+" else a - b
    if second == "-":
        c = min(c, half)
    total = half if steps == 1 else half + c if second == "+" else half - c
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "a": a, "b": b, "c": c}
    told = [rng.choice(MORE if sign == "+" else FEWER)] + [THEN[second]] * (steps == 2)
    question = " ".join((*told, ASKED[sign if steps == 1 else second])).format(**words)
    worked = f"{a} {sign} {b} = "
    worked += f"{half}, {half} {second} {c} = " if steps == 2 else ""
    return _row(question, f"{worked}\\boxed{{{total}}}", total)


def _row(question: str, solution: str, answer: int) -> dict:
    hinted = HINTED.format(question=question, solution=solution)
    return {"question": question, "answer": str(answer), "solution": solution, "hinted": hinted}


def write(folder: Path, seed: int = 0) -> None:
    """All files. A row is in one of cold, train, validation and test."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    cold, train = [], []
    for kind, rows in (("sums", sums(rng)), ("words", word_problems(rng))):
        cold += _take(rows, COLD)
        train += _take(rows, TRAIN)
        for split, size in (("validation", VALIDATION), ("test", TEST)):
            held_out = _take(rows, size)
            _write(folder / f"{kind}-{split}.jsonl", held_out, "question", "answer")
            if split == "validation":
                asked = [{"question": row["hinted"], "answer": row["answer"]} for row in held_out]
                _write(folder / f"{kind}-{split}-hinted.jsonl", asked, "question", "answer")
    rng.shuffle(cold)
    worked = [{"prompt": row["question"], "response": row["solution"]} for row in cold]
    _write(folder / "cold.jsonl", worked, "prompt", "response")
    _write(folder / "train.jsonl", train, "question", "answer", "hinted")


def _take(rows: Iterator[dict], count: int) -> list[dict]:
    return [next(rows) for _ in range(count)]


def _write(path: Path, rows: list[dict], *columns: str) -> None:
    path.write_text("".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
