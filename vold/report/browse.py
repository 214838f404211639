"""Samples a person should see: one problem across models, and right and wrong ones from all along each run."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vold.data.pictures import read_picture

from .read import RunRecord, as_number
from .style import arm_of
from .tokens import Tokens, tokens_of
from .words import is_right

THUMBNAIL = (560, 320)  # pixels; larger images are shrunk, small ones stay as they are
LONGEST = 4000  # characters of a prompt or response; the middle of a longer one is left out
PER_SHELF = 24  # samples of a run
STEPS_OF_A_SHELF = 6  # that they are from
PATTERNS = 5
SMALL = (160, 160)  # pixels of a picture in the gallery of failures
FAILURES = 24


@dataclass(frozen=True)
class Picture:
    """An inlined image; `uri` is None where the file could not be read, and `note` says why."""

    uri: str | None
    width: int = 0
    height: int = 0
    note: str = ""

    @property
    def scale(self) -> int:
        """Miniature images are tiny: show them in whole multiples, so that pixels stay square."""
        return max(1, min(3, 240 // self.width, 160 // self.height)) if self.uri else 1


@dataclass(frozen=True)
class Card:
    """One response, ready to show; every text is still unescaped and goes through the template's autoescape."""

    model: str
    right: bool
    verdict: str
    rule: str
    prompt: str
    response: str
    extracted: str
    gold: str
    where: str
    facts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    tokens: Tokens | None
    gist: str


@dataclass(frozen=True)
class Problem:
    """The same problem answered by several models; `count` problems of `of` show the same marks."""

    cards: tuple[Card, ...]
    marks: tuple[tuple[str, bool], ...]  # model, whether it is right
    count: int
    of: int
    set: str


@dataclass(frozen=True)
class Shelf:
    """Responses of one run, newest first; how many of those on file are right and how many are not."""

    run: str
    cards: tuple[Card, ...]
    n_right: int
    n_wrong: int


@dataclass(frozen=True)
class Failure:
    """An image problem without the right answer, small."""

    picture: Picture
    where: str
    prompt: str
    said: str
    gold: str


@dataclass(frozen=True)
class Gallery:
    """Some of a run's `count` failed image problems, spread over them."""

    run: str
    failures: tuple[Failure, ...]
    count: int


def galleries(evaluations: Sequence[RunRecord]) -> list[Gallery]:
    """Per evaluation with image problems that none of its answers solved."""
    found = []
    for run in evaluations:
        answers: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in run.samples:
            if row.get("images"):
                answers.setdefault((str(row.get("set")), str(row.get("prompt_id"))), []).append(row)
        failed = [rows[0] for rows in answers.values() if not any(map(is_right, rows))]
        if failed:
            shown = failed[:: -(-len(failed) // FAILURES)]
            found.append(Gallery(run.name, tuple(_failure(run, row) for row in shown), len(failed)))
    return found


def _failure(run: RunRecord, row: Mapping[str, Any]) -> Failure:
    said = "cut at the length limit" if row.get("finish_reason") == "length" else row.get("extracted") or "no answer"
    return Failure(
        picture=next(iter(_pictures(run.path, row["images"], SMALL)), Picture(None, note="no picture")),
        where=visible(" · ".join(str(row[key]) for key in ("set", "category") if row.get(key))),
        prompt=visible(row.get("prompt")),
        said=visible(said),
        gold=visible(row.get("gold")),
    )


def shelves(runs: Sequence[RunRecord]) -> list[Shelf]:
    """Per run with samples: right and wrong ones alike from a few steps all along it, or of an evaluation's sets."""
    return [_shelf(run) for run in runs if run.samples]


def problems(evaluations: Sequence[RunRecord]) -> list[Problem]:
    """For each set, the first problem of each of the commonest patterns of right and wrong across models."""
    runs = [run for run in evaluations if run.samples]
    answers = [{(str(row.get("set", "")), str(row.get("prompt_id"))): row for row in run.samples} for run in runs]
    if len(runs) < 2:
        return []
    shared = [key for key in answers[0] if all(key in other for other in answers[1:])]
    found: list[Problem] = []
    for name in sorted({key[0] for key in shared}):  # image before text, as it happens and as we like
        keys = [key for key in shared if key[0] == name]
        groups: dict[tuple[bool, ...], list[tuple[str, str]]] = {}
        for key in keys:
            groups.setdefault(tuple(is_right(answer[key]) for answer in answers), []).append(key)
        commonest = sorted(groups.items(), key=lambda item: -len(item[1]))[:PATTERNS]
        for pattern, members in commonest:
            cards = tuple(card(run, answer[members[0]]) for run, answer in zip(runs, answers, strict=True))
            marks = tuple((arm_of(run.name), ok) for run, ok in zip(runs, pattern, strict=True))
            found.append(Problem(cards, marks, len(members), len(keys), name))
    return found


def card(run: RunRecord, row: Mapping[str, Any]) -> Card:
    """One row of samples.jsonl as text and pictures."""
    verdict = row.get("verdict")
    if isinstance(verdict, Mapping):
        row = {**verdict, **row, "verdict": verdict.get("outcome")}
    right = is_right(row)
    return Card(
        model=arm_of(run.name),
        right=right,
        verdict=visible(row.get("verdict") if isinstance(row.get("verdict"), str) else "right" if right else "wrong"),
        rule=visible(row.get("rule")),
        prompt=visible(row.get("prompt")),
        response=visible(row.get("response")),
        extracted=visible(row.get("extracted")),
        gold=visible(row.get("gold")),
        where=visible(f"{row['set']} set" if row.get("set") else f"step {row['step']}" if "step" in row else ""),
        facts=tuple(_facts(row)),
        pictures=tuple(_pictures(run.path, row.get("images"))),
        tokens=tokens_of(row),
        gist=_gist(row, right),
    )


def visible(value: Any) -> str:
    """Text in which nothing hides: control and direction-changing characters become visible code points."""
    if value is None:
        return ""
    text = str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n… {len(text) - LONGEST} characters left out …\n{text[-LONGEST // 2 :]}"
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"⟨{ord(c):04X}⟩" for c in text)


@lru_cache(maxsize=512)
def thumbnail(path: Path, box: tuple[int, int] = THUMBNAIL) -> Picture:
    """An image file as a data URI, no larger than `box`: JPEG, or PNG for what is tiny in the first place."""
    try:
        picture = read_picture(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Picture(None, note=f"{path.name}: {type(error).__name__}")
    tiny = picture.width * picture.height <= 128 * 128
    picture.thumbnail(box)
    out = io.BytesIO()
    picture.save(out, **({"format": "PNG", "optimize": True} if tiny else {"format": "JPEG", "quality": 82}))
    uri = f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
    return Picture(uri, picture.width, picture.height)


def _shelf(run: RunRecord) -> Shelf:
    right = sum(map(is_right, run.samples))
    cards = tuple(card(run, row) for row in _chosen(run.samples))
    return Shelf(run=run.name, cards=cards, n_right=right, n_wrong=len(run.samples) - right)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first right and wrong ones in turn of each set, or of steps spread evenly from the newest to the oldest."""
    bins: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        bins.setdefault(str(row.get("set", row.get("step", ""))), []).append(row)
    names = list(reversed(bins)) if "set" not in rows[0] else list(bins)
    if len(names) > STEPS_OF_A_SHELF:
        last = len(names) - 1
        names = [names[round(i * last / (STEPS_OF_A_SHELF - 1))] for i in range(STEPS_OF_A_SHELF)]
    each = -(-PER_SHELF // len(names))
    return [row for name in names for row in _in_turn(bins[name])[:each]][:PER_SHELF]


def _in_turn(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Wrong, right, wrong, …, and then what is left of either. First those whose tokens are known one by one."""
    known = sorted(rows, key=lambda row: ("logp_teacher" not in row, "logp" not in row))
    wrong, right = ([row for row in known if is_right(row) == verdict] for verdict in (False, True))
    pairs = [row for pair in zip(wrong, right, strict=False) for row in pair]
    both = len(pairs) // 2
    return pairs + wrong[both:] + right[both:]


def _gist(row: Mapping[str, Any], right: bool) -> str:
    """A line of a list: the answer, and the right one where it is another."""
    answer, gold = (" ".join(str(row.get(key) or "nothing").split())[:24] for key in ("extracted", "gold"))
    return visible(answer if right else f"{answer} ≠ {gold}")


def _facts(row: Mapping[str, Any]) -> Iterable[str]:
    """The small numbers under a response, those that are there."""
    for key, word in (("reward", "reward"), ("advantage", "advantage"), ("mean_kl", "teacher KL")):
        if (value := as_number(row.get(key))) == value:
            yield f"{word} {value:.3g}".replace("-", "−")
    if row.get("finish_reason") == "length":
        yield "cut at the length limit"


def _pictures(run: Path, images: Any, box: tuple[int, int] = THUMBNAIL) -> Iterable[Picture]:
    for name in images if isinstance(images, list | tuple) else ():
        if isinstance(name, str):
            found = _locate(run, name)
            yield thumbnail(found, box) if found else Picture(None, note=f"{name}: no such file")


def _locate(run: Path, name: str) -> Path | None:
    """`name` itself if absolute, else from the run directory, its parent, or where the run was started."""
    for base in (run, run.parent, Path()):
        try:
            if (base / name).is_file():
                return base / name
        except (OSError, ValueError):
            return None
    return None
