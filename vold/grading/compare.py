"""Two shapes compared part by part; a `Leaf` compares what has no parts. Three-valued: None is undecided.

The policy that needs no parser and the algebra in the workers are two leaves of the same comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from vold.grading.structure import ORDERS, Listing, Named, Relation, Shape, Value, shape

_REGION_WORDS = (r"\cup", r"\cap", r"\setminus", r"\mathbb")
Groups = list[dict[str, Shape]]


class Leaf(Protocol):
    """Comparison of parts: (answer, gold) to True, False or None."""

    def scalar(self, answer: str, gold: str) -> bool | None:
        """Two single values."""
        ...

    def relation(self, answer: Relation, gold: Relation) -> bool | None:
        """Two equations or inequalities."""
        ...

    def region(self, answer: Shape, gold: Shape) -> bool | None:
        """Two sets of numbers, as intervals, unions or inequalities."""
        ...

    def rounds(self, exact: str, rounded: str) -> bool | None:
        """True where `rounded` is a decimal to which `exact` rounds."""
        ...


def compare(answer: Shape, gold: Shape, leaf: Leaf) -> bool | None:
    """True where the answer equals the gold answer."""
    if _is_approximation(answer):
        exact, rounded = answer.sides
        either = any3(compare(shape(side), gold, leaf) for side in (exact, rounded))
        return all3([either, leaf.rounds(exact, rounded)])
    if _is_approximation(gold):
        return any3(compare(answer, shape(side), leaf) for side in gold.sides)
    ours, theirs = _assignments(answer), _assignments(gold)
    if ours and theirs:
        return _same_members(ours, theirs, lambda a, g: _same_assignment(a, g, leaf))
    if ours or theirs:
        return compare(_unnamed(ours, by_name=True) if ours else answer, _unnamed(theirs) if theirs else gold, leaf)
    if isinstance(answer, Named) or isinstance(gold, Named):
        return _compare_named(answer, gold, leaf)
    if is_region(gold) and isinstance(answer, Listing) and answer.kind == "pair" and len(answer.items) == 2:
        answer = Listing(answer.items, "interval", answer.brackets)
    if is_region(answer) and is_region(gold) and not _same_brackets(answer, gold):
        return leaf.region(answer, gold)
    if isinstance(answer, Relation) or isinstance(gold, Relation):
        both = isinstance(answer, Relation) and isinstance(gold, Relation)
        return leaf.relation(answer, gold) if both else False
    if isinstance(answer, Listing) or isinstance(gold, Listing):
        return _compare_lists(answer, gold, leaf)
    return leaf.scalar(answer.text, gold.text)


def is_region(part: Shape) -> bool:
    """True for what is a set of numbers by itself. `(1,2)` is not: it may be a point."""
    if isinstance(part, Relation):
        return len(part.signs) > 0 and all(sign in ORDERS or sign == "!=" for sign in part.signs)
    if isinstance(part, Listing):
        if part.kind == "bare":
            return part.joiner in ("or", "and") and all(is_region(item) for item in part.items)
        return part.kind == "interval" and len(part.items) == 2
    return isinstance(part, Value) and any(word in part.text for word in _REGION_WORDS)


def _is_approximation(part: Shape) -> bool:
    return isinstance(part, Relation) and part.signs == ("~",) and all(part.sides)


def _compare_named(answer: Shape, gold: Shape, leaf: Leaf) -> bool | None:
    """A name is dropped where only one side has it; two names must be the same, unless both are one equation."""
    if isinstance(answer, Named) and isinstance(gold, Named):
        if answer.name == gold.name:
            return compare(answer.value, gold.value, leaf)
        return leaf.relation(answer.relation, gold.relation)
    named, other = (answer, gold) if isinstance(answer, Named) else (gold, answer)
    if isinstance(other, Relation) and not is_region(other):
        pair = (named.relation, other) if named is answer else (other, named.relation)
        return leaf.relation(*pair)
    return compare(answer.value, gold, leaf) if named is answer else compare(answer, gold.value, leaf)


def _same_brackets(answer: Shape, gold: Shape) -> bool:
    return isinstance(answer, Listing) and isinstance(gold, Listing) and bool(answer.brackets and gold.brackets)


def _compare_lists(answer: Shape, gold: Shape, leaf: Leaf) -> bool | None:
    if not isinstance(answer, Listing) or not isinstance(gold, Listing):
        single, several = (answer, gold) if isinstance(gold, Listing) else (gold, answer)
        is_empty = isinstance(single, Value) and single.text == r"\emptyset"
        if several.kind not in ("bare", "set") or not several.items or is_empty:
            return False
        return all3(
            compare(single, item, leaf) if several is gold else compare(item, single, leaf) for item in several.items
        )
    kinds = {answer.kind, gold.kind}
    if kinds <= {"bare", "set"}:
        return _same_members(answer.items, gold.items, lambda a, g: compare(a, g, leaf))
    if "set" in kinds or kinds == {"bare", "interval"} or len(answer.items) != len(gold.items):
        return False
    if answer.brackets and gold.brackets and answer.brackets != gold.brackets:
        return False
    return all3(compare(a, g, leaf) for a, g in zip(answer.items, gold.items, strict=True))


def _same_members(answer: Sequence, gold: Sequence, same: Callable) -> bool | None:
    """Every member of either is one of the other. A repeated solution is one solution."""
    table = [[same(a, g) for g in gold] for a in answer]
    rows = (any3(row) for row in table)
    columns = (any3(column) for column in zip(*table, strict=True))
    return all3([*rows, *columns])


def _assignments(part: Shape) -> Groups | None:
    """`x=1, y=2` is one group of values by name, `x=1, y=2 or x=3, y=4` two: a name that returns begins another."""
    if not isinstance(part, Listing) or part.kind not in ("bare", "pair", "set") or not part.items:
        return None
    groups: Groups = [{}]
    for item in part.items:
        members = item.items if isinstance(item, Listing) and item.kind in ("bare", "pair") else (item,)
        for member in members:
            if not isinstance(member, Named) or "in" in member.relation.signs:
                return None
            if member.name in groups[-1]:
                groups.append({})
            groups[-1][member.name] = member.value
    return groups


def _unnamed(groups: Groups, by_name: bool = False) -> Shape:
    """The values alone: several of one name are a list, others pairs in the order written, or of their names."""
    if all(len(group) == 1 for group in groups) and len({name for group in groups for name in group}) == 1:
        return Listing(tuple(value for group in groups for value in group.values()), "bare", joiner="or")
    pairs = []
    for group in groups:
        names = sorted(group, key=lambda name: (name.startswith("\\"), name)) if by_name else list(group)
        pairs.append(Listing(tuple(group[name] for name in names), "pair", "()"))
    return pairs[0] if len(pairs) == 1 else Listing(tuple(pairs), "bare")


def _same_assignment(answer: dict[str, Shape], gold: dict[str, Shape], leaf: Leaf) -> bool | None:
    if answer.keys() != gold.keys():
        return False
    return all3(compare(answer[name], gold[name], leaf) for name in gold)


def all3(verdicts: Iterable[bool | None]) -> bool | None:
    """False where one is, else None where one is, else True."""
    found: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        found = None if verdict is None else found
    return found


def any3(verdicts: Iterable[bool | None]) -> bool | None:
    """True where one is, else None where one is, else False."""
    found: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        found = None if verdict is None else found
    return found
