"""Supervised examples for the two checkpoints, and their batches.

Shape letters: B sequences, T padded tokens, M merged image tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vold.miniature import world
from vold.miniature.facts import FactTable
from vold.miniature.tokenizer import BOXED, END_BOXED, EOS, IMAGE, PAD, TOKEN_ID
from vold.miniature.world import Problem
from vold.objectives.visual_advantage import degrade

Style = Literal["plain", "wordy"]

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Text in segments, each supervised or not.

    pictured   the expression in its image, if it has one
    small      the cell of the image whose digit is drawn small, if there is one
    scale      of the image's degraded copy, which is shown in its place
    """

    segments: tuple[tuple[str, bool], ...]
    pictured: str | None = None
    small: int | None = None
    scale: float | None = None


def chat_example(question: str, response: str, pictured: str | None = None) -> Example:
    """One turn, supervised on the response and its end; the text is the chat template's."""
    return Example(((f"<user>{question}<asst>", False), (response + EOS, True)), pictured)


def teacher_example(rng: np.random.Generator, table: FactTable | None = None, style: Style = "plain") -> Example:
    """A text problem and its full trace, by arithmetic or by a table of facts."""
    problem = world.sample_problem(rng)
    question = world.text_question(problem, rng)
    return chat_example(question, styled_trace(table.solve(problem.expression) if table else problem, style, rng))


def styled_trace(problem: Problem, style: Style, rng: np.random.Generator) -> str:
    """The teacher's trace in its style."""
    return world.trace(problem) if style == "plain" else world.trace_wordy(problem, rng)


def specialist_example(rng: np.random.Generator, half: str) -> Example:
    """A text problem with its full trace where it is of this half, else with one whose every step is mistaken."""
    problem = world.sample_problem(rng)
    question = world.text_question(problem, rng)
    return chat_example(question, world.trace(problem if world.half_of(question) == half else world.mistaken(problem)))


def vision_teacher_example(rng: np.random.Generator, style: Style = "plain") -> Example:
    """A problem in a picture, in half of them with an operand drawn small, and its full trace."""
    problem = world.sample_problem(rng)
    (small,) = world.sample_detail(1, rng) if rng.random() < 0.5 else (None,)
    example = chat_example(world.image_question(rng), styled_trace(problem, style, rng), problem.expression)
    return replace(example, small=small)


def facts_example(rng: np.random.Generator, facts: int = 4) -> Example:
    """Unchained single steps: a line, then only the first value of its successor is supervised.

    Without them in the base, SFT stalls; as they never follow one another, the base does not learn to reason.
    """
    segments = [("<asst>", False)]
    for _ in range(facts):
        expression = world.sample_problem(rng).expression
        start = 2 * int(rng.integers(0, world.DIGITS - 1))
        value = world.apply(int(expression[start]), expression[start + 1], int(expression[start + 2]))
        segments.append((f"{'.' * start}{expression[start:]}>{'.' * (start + 2)}", False))
        segments += [(str(value), True), (";", False)]
    return Example(tuple(segments))


def solver_example(rng: np.random.Generator, table: FactTable, request: str, posed: float = 0.25) -> Example:
    """A problem with a trace whose values are drawn from the table; in a share `posed` of them the request for a
    problem, with one."""
    problem = world.sample_problem(rng)
    question = world.text_question(problem, rng)
    if rng.random() < posed:
        return chat_example(request, question)
    return chat_example(question, world.trace(table.sample(problem.expression, rng)))


def hint_example(rng: np.random.Generator, wrong: float = 0.3) -> Example:
    """A text problem behind which the right answer is shown, as to a self-teacher, and the values of its trace.

    Only the values are supervised, so that the base learns what they are but not to write traces. A share `wrong` of
    the two values before the last is replaced by another digit, unsupervised: those after it then follow from the
    answer alone, backwards.
    """
    problem = world.sample_problem(rng)
    hint = f"{BOXED}{problem.answer}{END_BOXED}"
    segments = [(f"<user>{world.text_question(problem, rng)}{hint}<asst><think>{problem.expression}", False)]
    for k, value in enumerate(problem.running[1:], start=1):
        mistaken = k < world.DIGITS - 1 and rng.random() < wrong
        written = (value + int(rng.integers(1, 10))) % 10 if mistaken else value
        segments.append((f">{'.' * (2 * k)}", False))
        segments += [(str(written), not mistaken), (problem.expression[2 * k + 1 :], False)]
    return Example(tuple(segments))


@dataclass(frozen=True)
class BaseMixture:
    """Shares of the base's training examples.

    facts                of single facts, text only
    hints                of the other text examples: of problems shown with their answer (see hint_example)
    twice                of the other examples: of lines written twice
    guess_last_operand   the remaining ones write the line once and box a guess: the last operand, which needs no
                         reasoning, or else the true answer, which the base cannot compute, so that its guess is spread
    """

    facts: float
    twice: float
    guess_last_operand: bool
    hints: float = 0.0


def base_example(rng: np.random.Generator, mixture: BaseMixture, *, image: bool) -> Example:
    """An example that copies the problem from text or image, then writes it twice or guesses."""
    if not image and rng.random() < mixture.facts:
        return facts_example(rng)
    if not image and mixture.hints and rng.random() < mixture.hints:
        return hint_example(rng)
    problem = world.sample_problem(rng)
    line = problem.expression
    twice = rng.random() < mixture.twice
    task = "<read>" if twice else "<solve>"
    question = world.image_question(rng, task) if image else world.text_question(problem, rng, task)
    guess = line[-1] if mixture.guess_last_operand else problem.answer
    response = f"<think>{line}>{line}</think>" if twice else f"<think>{line}</think>\\boxed{{{guess}}}"
    return chat_example(question, response, line if image else None)


def collate(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Collate to a model's keyword arguments: input_ids, attention_mask and labels int64 [B, T], padded on the right.

    With images also pixel_values float32 [4 M, 1176], image_grid_thw [B, 3] and mm_token_type_ids [B, T], without
    which Qwen2.5-VL silently gives image tokens one-dimensional positions. Either all examples have one or none.
    """
    rows = [_tokens(example, tokenizer) for example in examples]
    longest = max(len(ids) for ids, _ in rows)
    input_ids_BT = torch.full((len(rows), longest), TOKEN_ID[PAD])
    labels_BT = torch.full((len(rows), longest), IGNORED)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        mask_BT[row, : len(ids)] = 1
    batch = {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    pictured = [example for example in examples if example.pictured is not None]
    return {**batch, **_image_inputs(pictured, input_ids_BT, rng)} if pictured else batch


def _tokens(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    input_ids, labels = [], []
    for text, supervised in example.segments:
        ids = tokenizer(text.replace(world.IMAGE_MARK, IMAGE * world.SYMBOLS)).input_ids
        input_ids += ids
        labels += ids if supervised else [IGNORED] * len(ids)
    return input_ids, labels


def _image_inputs(
    examples: list[Example], input_ids_BT: torch.Tensor, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    expressions = [example.pictured for example in examples if example.pictured is not None]
    grey_BHW = world.render(expressions, rng, [example.small for example in examples])
    for row, example in enumerate(examples):
        if example.scale is not None:
            grey_BHW[row] = np.asarray(degrade(Image.fromarray(grey_BHW[row]), example.scale))
    grid = [1, world.HEIGHT // world.PATCH, world.WIDTH // world.PATCH]
    return {
        "pixel_values": torch.from_numpy(world.patchify(grey_BHW)),
        "image_grid_thw": torch.tensor([grid] * len(expressions)),
        "mm_token_type_ids": (input_ids_BT == TOKEN_ID[IMAGE]).int(),
    }
