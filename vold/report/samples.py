"""Samples for the page: one problem across models, failed image problems, and correct and wrong ones of each run."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vold.data.pictures import MAX_PIXELS, picture_size, read_picture
from vold.io import visible

from .picture_files import find_picture
from .read import RunRecord, as_number, group_by, is_correct, problem_key
from .style import arm_of
from .tokens import Tokens, tokens_of

THUMBNAIL, SMALL_THUMBNAIL = (560, 320), (160, 160)  # pixels; smaller images stay as they are
LONGEST = 4000  # characters of a prompt or response; the middle of a longer one is left out
PER_SAMPLE = 16  # pictures of one response
PER_LIST = 24  # samples of a run's list
STEPS_PER_LIST = 6  # steps that they come from
PATTERNS = 5  # of correct and wrong across models, per set

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An inlined image; `uri` is None where the file could not be read, and `note` gives the reason."""

    uri: str | None
    width: int = 0
    height: int = 0
    note: str = ""

    @property
    def scale(self) -> int:
        """Whole multiple at which a tiny image is shown, so that its pixels stay square."""
        return max(1, min(3, 240 // self.width, 160 // self.height)) if self.uri else 1


@dataclass(frozen=True)
class Sample:
    """One response as the page shows it; texts are still unescaped and go through the template's autoescape."""

    model: str
    correct: bool
    verdict: str
    rule: str
    prompt: str
    response: str
    extracted: str
    gold: str
    origin: str  # its step, or its set and category
    facts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    tokens: Tokens | None

    @property
    def gist(self) -> str:
        """One line for a list: the answer, and the gold answer where it differs."""
        answer, gold = (" ".join((text or "nothing").split())[:24] for text in (self.extracted, self.gold))
        return answer if self.correct else f"{answer} ≠ {gold}"


@dataclass(frozen=True)
class SampleList:
    """Some samples of one run, and how many of those on file are correct and wrong."""

    run: str
    samples: tuple[Sample, ...]
    n_correct: int
    n_wrong: int


@dataclass(frozen=True)
class SharedProblem:
    """One problem answered by several models; `count` problems of `total` have the same pattern of marks."""

    samples: tuple[Sample, ...]
    marks: tuple[tuple[str, bool], ...]  # model, whether it is correct
    count: int
    total: int
    set: str


def shared_problems(evaluations: Sequence[RunRecord]) -> list[SharedProblem]:
    """For each set, the first problem of each of the commonest patterns of correct and wrong across models."""
    runs = [run for run in evaluations if run.samples]
    if len(runs) < 2:
        return []
    answers = [{problem_key(row): row for row in run.samples} for run in runs]
    shared = [key for key in answers[0] if all(key in rows for rows in answers)]
    problems = []
    for name, keys in sorted(group_by(shared, lambda key: key[0]).items()):
        patterns = group_by(keys, lambda key: tuple(is_correct(rows[key]) for rows in answers))
        for pattern, same in sorted(patterns.items(), key=lambda item: -len(item[1]))[:PATTERNS]:
            samples = tuple(sample_of(run, rows[same[0]]) for run, rows in zip(runs, answers, strict=True))
            marks = tuple((arm_of(run.name), ok) for run, ok in zip(runs, pattern, strict=True))
            problems.append(SharedProblem(samples, marks, len(same), len(keys), name))
    return problems


def failed_image_problems(evaluations: Sequence[RunRecord]) -> list[SampleList]:
    """Per evaluation, some of the image problems that none of its answers solved, evenly spread, in small pictures."""
    lists = []
    for run in evaluations:
        answers = group_by([row for row in run.samples if row.get("images")], problem_key)
        failed = [rows[0] for rows in answers.values() if not any(map(is_correct, rows))]
        if failed:
            chosen = failed[:: -(-len(failed) // PER_LIST)]
            samples = tuple(sample_of(run, row, SMALL_THUMBNAIL) for row in chosen)
            lists.append(SampleList(run.name, samples, len(answers) - len(failed), len(failed)))
    return lists


def sample_lists(runs: Sequence[RunRecord]) -> list[SampleList]:
    """Per run with samples: correct and wrong ones alike from a few steps along it, or from an evaluation's sets."""
    lists = []
    for run in runs:
        if rows := [row for row in run.samples if "question" not in row]:
            correct = sum(map(is_correct, rows))
            samples = tuple(sample_of(run, row) for row in _choose(rows))
            lists.append(SampleList(run.name, samples, correct, len(rows) - correct))
    return lists


def kept_questions(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, str, str, float]]]]:
    """(run name, [(iteration, question, majority's answer, share of the answers that agree)]) of self-play, newest
    first; at most PER_LIST of a run, evenly spread."""
    lists = []
    for run in runs:
        if rows := [row for row in reversed(run.samples) if "question" in row]:
            rows = rows[:: -(-len(rows) // PER_LIST)]
            texts = [tuple(excerpt(row.get(key)) for key in ("step", "question", "label")) for row in rows]
            shares = [as_number(row.get("pass_rate")) for row in rows]
            lists.append((run.name, [(*text, share) for text, share in zip(texts, shares, strict=True)]))
    return lists


def sample_of(run: RunRecord, row: Row, box: tuple[int, int] = THUMBNAIL) -> Sample:
    """One row of samples.jsonl as text and pictures no larger than `box`."""
    if isinstance(verdict := row.get("verdict"), Mapping):
        row = {**verdict, **row, "verdict": verdict.get("outcome")}
    correct, verdict = is_correct(row), row.get("verdict")
    texts = {key: excerpt(row.get(key)) for key in ("rule", "prompt", "response", "extracted", "gold")}
    origin = [f"{row['set']} set"] if row.get("set") else [f"step {row['step']}"] if "step" in row else []
    return Sample(
        model=arm_of(run.name),
        correct=correct,
        verdict=excerpt(verdict if isinstance(verdict, str) else "right" if correct else "wrong"),
        origin=excerpt(" · ".join([*origin, *([str(row["category"])] if row.get("category") else [])])),
        facts=tuple(_facts(row)),
        pictures=tuple(_pictures(run, row.get("images"), box)),
        tokens=tokens_of(row),
        **texts,
    )


def excerpt(value: Any) -> str:
    """Text in which nothing hides, at most LONGEST characters of it; "" for None."""
    text = "" if value is None else str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n… {len(text) - LONGEST} characters left out …\n{text[-LONGEST // 2 :]}"
    return visible(text, multiline=True)


@lru_cache(maxsize=512)
def thumbnail(path: Path, box: tuple[int, int] = THUMBNAIL) -> Picture:
    """An image file as a data URI, no larger than `box`: JPEG, or PNG where the image is tiny."""
    try:
        if math.prod(picture_size(path)) > MAX_PIXELS:
            return Picture(None, note=f"{path.name}: over {MAX_PIXELS} pixels")
        picture = read_picture(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Picture(None, note=f"{path.name}: {type(error).__name__}")
    tiny = picture.width * picture.height <= 128 * 128
    picture.thumbnail(box)
    out = io.BytesIO()
    picture.save(out, **({"format": "PNG", "optimize": True} if tiny else {"format": "JPEG", "quality": 82}))
    uri = f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
    return Picture(uri, picture.width, picture.height)


def _choose(rows: Sequence[Row]) -> list[Row]:
    """The first rows of each set, or of steps spread evenly from the newest to the oldest."""
    groups = group_by(rows, lambda row: str(row.get("set", row.get("step", ""))))
    names = list(groups) if "set" in rows[0] else list(reversed(groups))
    if len(names) > STEPS_PER_LIST:
        last = len(names) - 1
        names = [names[round(i * last / (STEPS_PER_LIST - 1))] for i in range(STEPS_PER_LIST)]
    per_group = -(-PER_LIST // len(names))
    return [row for name in names for row in _alternate(groups[name])[:per_group]][:PER_LIST]


def _alternate(rows: Sequence[Row]) -> list[Row]:
    """Wrong and correct rows in turn, then the remaining ones; first those with scored tokens."""
    ordered = sorted(rows, key=lambda row: ("logp_teacher" not in row, "logp" not in row))
    wrong, correct = ([row for row in ordered if is_correct(row) == verdict] for verdict in (False, True))
    pairs = [row for pair in zip(wrong, correct, strict=False) for row in pair]
    return pairs + wrong[len(pairs) // 2 :] + correct[len(pairs) // 2 :]


def _facts(row: Row) -> list[str]:
    """The numbers under a response, those that were logged."""
    names = {"reward": "reward", "advantage": "advantage", "mean_kl": "teacher KL"}
    values = {name: as_number(row.get(key)) for key, name in names.items()}
    terms = row.get("values")
    values |= {excerpt(key): as_number(value) for key, value in terms.items()} if isinstance(terms, Mapping) else {}
    facts = [f"{name} {value:.3g}".replace("-", "−") for name, value in values.items() if value == value]
    return facts + (["cut at the length limit"] if row.get("finish_reason") == "length" else [])


def _pictures(run: RunRecord, images: Any, box: tuple[int, int]) -> list[Picture]:
    names = [name for name in images if isinstance(name, str)] if isinstance(images, list | tuple) else []
    more = [Picture(None, note=f"and {len(names) - PER_SAMPLE} more")] if len(names) > PER_SAMPLE else []
    return [*(_picture(run, name, box) for name in names[:PER_SAMPLE]), *more]


def _picture(run: RunRecord, name: str, box: tuple[int, int]) -> Picture:
    try:
        return thumbnail(find_picture(run, name), box)
    except ValueError as error:
        return Picture(None, note=excerpt(f"{name[-200:]}: {error}"))
