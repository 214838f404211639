"""What a model of the miniature holds to be the value of each single step, and the traces that follow from it.

A fact is an operation with its two digits, `3*9`; there are 230 of them, and every problem uses three. A model that is
right holds arithmetic's value of each; one that errs holds others. Only numpy.

Shape letters: O operations, L left digits, R right digits, V values, B problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vold.miniature import world
from vold.miniature.world import MULTIPLIERS, OPERATIONS, Problem

LEVELS = (0.84, 0.70)
"""Accuracies of whole problems for which there are wrong facts; the wrong facts of a level include those before it."""
SOLVER_ACCURACY = 0.35
"""Of a self-play solver's drawn responses at its start."""
SURE, ERRING = 0.97, (0.65, 0.3)
"""Of a solver that errs by wrong facts: its share of the right value of a fact that it knows, and the shares of its
wrong and of the right value of one that it does not."""
FACTS = tuple(
    (operation, left, right)
    for operation in OPERATIONS
    for left in range(10)
    for right in (MULTIPLIERS if operation == "*" else range(10))
)


@dataclass(frozen=True, eq=False)
class FactTable:
    """probability_OLRV: of each value of each fact, float64 [3, 10, 10, 10]."""

    probability_OLRV: np.ndarray

    def solve(self, expression: str) -> Problem:
        """The problem with the table's likeliest value of each step."""
        return self._run(expression, lambda probability_V: int(probability_V.argmax()))

    def sample(self, expression: str, rng: np.random.Generator) -> Problem:
        """The problem with a drawn value of each step."""
        return self._run(expression, lambda probability_V: int(rng.choice(10, p=probability_V)))

    def wrong(self) -> dict[str, int]:
        """The facts whose likeliest value is not arithmetic's: `{"3*9": 4, …}`."""
        values_OLR = self.probability_OLRV.argmax(-1)
        held = {fact: int(values_OLR[_index(*fact)]) for fact in FACTS}
        return {f"{left}{o}{right}": v for (o, left, right), v in held.items() if v != world.apply(left, o, right)}

    def _run(self, expression: str, choose: Callable[[np.ndarray], int]) -> Problem:
        running = [int(expression[0])]
        for operation, operand in zip(expression[1::2], expression[2::2], strict=True):
            running.append(choose(self.probability_OLRV[_index(operation, running[-1], int(operand))]))
        return Problem(expression, tuple(running))


def right_facts() -> FactTable:
    """Arithmetic."""
    return _certain(_true_values())


def wrong_facts(seed: int, accuracy: float) -> FactTable:
    """A table that is right on `accuracy` (one of LEVELS, or 1) of whole problems: the seed decides which facts it has
    wrong and what it holds instead, the same each time."""
    values_OLR = _true_values()
    rng = np.random.default_rng([seed, 80])
    order = [FACTS[i] for i in rng.permutation(len(FACTS))]
    shifts = rng.integers(1, 10, len(FACTS))
    expressions = [world.sample_problem(rng).expression for _ in range(4000)]
    digits_B4, operations_B3 = _arrays(expressions)
    truth_B = _answers(values_OLR, digits_B4, operations_B3)
    for level in (level for level in LEVELS if level >= accuracy):
        for fact, shift in zip(order, shifts, strict=True):
            index = _index(*fact)
            before = values_OLR[index]
            values_OLR[index] = (world.apply(fact[1], fact[0], fact[2]) + shift) % 10
            if (_answers(values_OLR, digits_B4, operations_B3) == truth_B).mean() < level:
                values_OLR[index] = before
    return _certain(values_OLR)


def scattered_facts(seed: int, accuracy: float = SOLVER_ACCURACY) -> FactTable:
    """A table that is sure of nothing: the right value of each fact is the likeliest, the others have nearly equal
    shares of the rest, so that drawn values solve `accuracy` of whole problems and the votes of many draws more."""
    rng = np.random.default_rng([seed, 81])
    right_OLRV, noise_OLRV = np.eye(10)[_true_values()], 0.5 * rng.standard_normal((len(OPERATIONS), 10, 10, 10))

    def table(bonus: float) -> FactTable:
        weight_OLRV = np.exp(bonus * right_OLRV + noise_OLRV)
        return FactTable(weight_OLRV / weight_OLRV.sum(-1, keepdims=True))

    return _nearest(accuracy, rng, table, np.linspace(0, 8, 801).tolist())


def systematic_facts(seed: int, accuracy: float = SOLVER_ACCURACY) -> FactTable:
    """A table with the same accuracy of drawn values that is sure of most facts and nearly sure of a wrong value of the
    others, the same each time: votes do not help it."""
    rng = np.random.default_rng([seed, 82])
    true_OLR = _true_values()
    order = rng.permutation(len(FACTS))
    held_OLR = (true_OLR + rng.integers(1, 10, true_OLR.shape)) % 10

    def table(wrong: float) -> FactTable:
        probability_OLRV = (1 - SURE) / 9 + (SURE - (1 - SURE) / 9) * np.eye(10)[true_OLR]
        for fact in (_index(*FACTS[i]) for i in order[: int(wrong)]):
            probability_OLRV[fact] = (1 - sum(ERRING)) / 8
            probability_OLRV[fact][[held_OLR[fact], true_OLR[fact]]] = ERRING
        return FactTable(probability_OLRV)

    return _nearest(accuracy, rng, table, range(len(FACTS)))


def drawn_accuracy(table: FactTable, expressions: Sequence[str]) -> float:
    """The expected share of right answers where every step's value is drawn."""
    digits_B4, operations_B3 = _arrays(expressions)
    at_BV = np.eye(10)[digits_B4[:, 0]]
    for step in range(operations_B3.shape[1]):
        next_BVW = table.probability_OLRV[operations_B3[:, step], :, digits_B4[:, step + 1]]
        at_BV = np.einsum("bv,bvw->bw", at_BV, next_BVW)
    return float(at_BV[np.arange(len(at_BV)), _answers(_true_values(), digits_B4, operations_B3)].mean())


def _nearest(
    accuracy: float, rng: np.random.Generator, table: Callable[[float], FactTable], settings: Sequence[float]
) -> FactTable:
    """The table of a setting whose drawn accuracy is near, by bisection: it rises or falls along the settings."""
    expressions = [world.sample_problem(rng).expression for _ in range(1000)]
    low, high = 0, len(settings) - 1
    rising = drawn_accuracy(table(settings[-1]), expressions) > accuracy
    while high - low > 1:
        middle = (low + high) // 2
        above = drawn_accuracy(table(settings[middle]), expressions) > accuracy
        low, high = (low, middle) if above == rising else (middle, high)
    return table(settings[low])


def _index(operation: str, left: int, right: int) -> tuple[int, int, int]:
    return OPERATIONS.index(operation), left, right


def _true_values() -> np.ndarray:
    return np.array([[[world.apply(left, o, right) for right in range(10)] for left in range(10)] for o in OPERATIONS])


def _certain(values_OLR: np.ndarray) -> FactTable:
    return FactTable(np.eye(10)[values_OLR])


def _arrays(expressions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    digits_B4 = np.array([[int(digit) for digit in expression[::2]] for expression in expressions])
    return digits_B4, np.array([[OPERATIONS.index(o) for o in expression[1::2]] for expression in expressions])


def _answers(values_OLR: np.ndarray, digits_B4: np.ndarray, operations_B3: np.ndarray) -> np.ndarray:
    value_B = digits_B4[:, 0]
    for step in range(operations_B3.shape[1]):
        value_B = values_OLR[operations_B3[:, step], value_B, digits_B4[:, step + 1]]
    return value_B
