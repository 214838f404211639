"""Problems, traces and pictures, checked by arithmetic of this file's own."""

from __future__ import annotations

import re

import numpy as np

from vold.miniature import world


def value(expression: str) -> int:
    """Left to right modulo 10, by Python's own evaluation of a bracketed expression."""
    total = expression[0]
    for operation, operand in zip(expression[1::2], expression[2::2], strict=True):
        total = f"({total}{operation}{operand})"
    return eval(total) % 10


def problems(n: int, split: str = "train", seed: int = 0) -> list[world.Problem]:
    rng = np.random.default_rng(seed)
    return [world.sample_problem(rng, split) for _ in range(n)]


def test_the_documented_traces():
    problem = world.solve("7*9+5*3")
    assert world.trace(problem) == "<think>7*9+5*3>..3+5*3>....8*3>......4</think>\\boxed{4}"
    assert world.trace_other(problem) == "<think>7*9=3;3+5=8;8*3=4</think>\\boxed{4}"


def test_every_line_of_a_trace_has_the_same_value():
    for problem in problems(60):
        body, boxed = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d)\}", world.trace(problem)).groups()
        lines = body.split(">")
        assert [len(line) for line in lines] == [world.SYMBOLS] * world.DIGITS
        assert lines[0] == problem.expression
        for k, line in enumerate(lines):
            expression = line.lstrip(".")
            assert len(expression) == world.SYMBOLS - 2 * k
            assert value(expression) == int(boxed) == int(problem.answer)
            assert expression[1:] == problem.expression[2 * k + 1 :]


def test_the_other_style_chains_right_steps():
    for problem in problems(60, seed=1):
        body, boxed = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d)\}", world.trace_other(problem)).groups()
        left, written = problem.expression[0], problem.expression[0]
        for step in body.split(";"):
            before, after = step.split("=")
            assert before[0] == left
            assert value(before) == int(after)
            left, written = after, written + before[1:]
        assert (left, written) == (boxed, problem.expression)


def test_splits_are_disjoint_and_multipliers_invertible():
    expressions = {split: {p.expression for p in problems(800, split)} for split in ("train", "val", "test")}
    assert (
        not expressions["train"] & expressions["val"]
        and not expressions["train"] & expressions["test"]
        and not expressions["val"] & expressions["test"]
    )
    everything = set().union(*expressions.values())
    assert set("".join(everything)) == set("0123456789+-*")
    assert {m for expression in everything for m in re.findall(r"\*(\d)", expression)} == {"3", "7", "9"}
    answers = np.bincount([value(expression) for expression in everything], minlength=10) / len(everything)
    assert answers.max() < 0.15  # nobody scores far above chance with one fixed guess


def test_questions_keep_one_shape_and_spell_half():
    rng = np.random.default_rng(2)
    texts = [world.text_question(world.solve("7*9+5*3"), rng) for _ in range(400)]
    shape = re.compile(r"((?:<w\d>){0,12})\[(.+)\]((?:<w\d>){0,12})<solve>")
    inside = [shape.fullmatch(text)[2] for text in texts]
    spelled = inside.count("<7><*><9><+><5><*><3>")
    assert spelled + inside.count("7*9+5*3") == 400
    assert 160 < spelled < 240
    assert {len(shape.fullmatch(text)[1]) // 4 for text in texts} == set(range(13))
    assert shape.fullmatch(world.image_question(rng))[2] == world.IMAGE_MARK


def test_each_glyph_stays_in_its_cell():
    lit = world.render(["7*9+5*3"] * 50, np.random.default_rng(3)).astype(float) / 255
    assert lit.shape == (50, 28, 196)
    light = (lit - world.PIXEL_MEAN) / world.PIXEL_STD
    cells = light.reshape(50, 28, world.SYMBOLS, 28)
    bright = (cells > 0.45).sum((1, 3))
    assert bright.min() >= 30  # the sparsest glyph here, "+" at scale 2 x 2, has 36 pixels
    assert cells[..., [0, 27]].max() < 0.55  # the outer columns of a cell hold only noise: neighbours do not touch
    assert abs(np.median(light)) < 0.05


def test_a_detail_is_one_operand_drawn_small_and_the_rest_is_as_large_as_ever(monkeypatch):
    monkeypatch.setattr(world, "NOISE", 0.0)
    expressions = ["8+8*3-8"] * 40
    small = world.sample_detail(len(expressions), np.random.default_rng(0))
    assert set(small) == {0, 2, 4, 6}
    pictures = world.render(expressions, np.random.default_rng(1), small)
    for picture, detail in zip(pictures, small, strict=True):
        lit = picture > picture.min()
        columns = [lit[:, c * world.CELL : (c + 1) * world.CELL].any(0).sum() for c in range(world.SYMBOLS)]
        assert columns[detail] == 5
        assert all(columns[cell] >= 10 for cell in range(world.SYMBOLS) if cell != detail)


def test_without_details_nothing_is_drawn_small_and_the_draws_are_the_same():
    once, again = (world.render(["7*9+5*3"], np.random.default_rng(2), small) for small in ((), (None,)))
    assert (once == again).all()
