"""The bank on disk: what is written comes back, a killed or damaged write is seen, cosines equal the whole matrix's."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest

from vold.selfplay import bank as bank_module
from vold.selfplay.bank import Bank, BankedQuestion


def questions(iteration: int, count: int, width: int = 3) -> list[BankedQuestion]:
    rng = np.random.default_rng(iteration)
    rows = rng.standard_normal((count, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [
        BankedQuestion(
            iteration, f"iteration-{iteration:03d}/challenger", 7, f"q{n} ≤ 3?", "4", 0.5, tuple(map(float, row))
        )
        for n, row in enumerate(rows)
    ]


def read(bank: Bank, iterations: list[int]) -> list[BankedQuestion]:
    rows = (tuple(map(float, row)) for part in bank.embeddings(iterations) for row in part)
    return [replace(question, embedding=row) for question, row in zip(bank.read(iterations), rows, strict=True)]


@pytest.fixture
def bank(tmp_path) -> Bank:
    bank = Bank(tmp_path / "bank")
    assert bank.iterations() == []
    for iteration, count in [(1, 5), (2, 0), (3, 4)]:
        bank.append(iteration, questions(iteration, count))
    return bank


def test_what_was_written_comes_back(bank, tmp_path):
    again = Bank(tmp_path / "bank")
    assert again.iterations() == [1, 2, 3]
    assert read(again, [1, 2, 3]) == [*questions(1, 5), *questions(3, 4)]
    assert read(again, [3]) == questions(3, 4)
    assert again.count([1, 2, 3]) == 9 and again.count([]) == 0
    assert {question.embedding for question in again.read([1])} == {()}, "embeddings are read where they are asked for"


def test_a_bank_only_grows(bank):
    with pytest.raises(ValueError, match=r"iteration-0003\.parquet exists already"):
        bank.append(3, questions(3, 1))
    assert read(bank, [3]) == questions(3, 4)


def test_similarity_equals_the_whole_matrix(bank, monkeypatch):
    monkeypatch.setattr(bank_module, "ROWS_AT_ONCE", 2)  # as if the bank did not fit
    asked = np.array([q.embedding for q in questions(9, 6)], dtype=np.float32)
    held = np.array([q.embedding for q in [*questions(1, 5), *questions(3, 4)]], dtype=np.float32)
    nearest, mean = bank.similarity(asked, [1, 2, 3])
    assert nearest == pytest.approx((asked @ held.T).max(1)) and mean == pytest.approx((asked @ held.T).mean(1))
    nearest, mean = bank.similarity(asked[:2], [])
    assert nearest.tolist() == [-1.0, -1.0] and mean.tolist() == [0.0, 0.0]


def test_only_a_batch_is_read_at_a_time(bank, tmp_path, monkeypatch):
    """Row groups on disk are as small as what is read at once, so that no larger piece is ever decoded."""
    monkeypatch.setattr(bank_module, "ROWS_AT_ONCE", 2)
    bank.append(4, questions(4, 5))
    assert parquet.ParquetFile(tmp_path / "bank" / "iteration-0004.parquet").num_row_groups == 3


def test_a_killed_write_leaves_nothing(bank, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bank.append(4, questions(4, 2))
    monkeypatch.undo()
    assert Bank(tmp_path / "bank").iterations() == [1, 2, 3]
    bank.append(4, questions(4, 3))
    assert read(bank, [4]) == questions(4, 3)


def spoil(path, damage: str) -> None:
    held = bytearray(path.read_bytes())
    if damage == "flipped":
        held[held.index(b"q0 ")] ^= 1
    path.write_bytes({"truncated": held[:-20], "empty": b"", "garbage": b"no parquet" * 9, "flipped": held}[damage])


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
def test_a_damaged_tail_is_left_out_and_can_be_written_again(bank, tmp_path, capsys, damage):
    spoil(tmp_path / "bank" / "iteration-0003.parquet", damage)
    assert bank.iterations() == [1, 2]
    assert "iteration-0003.parquet is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"iteration-0003\.parquet is damaged"):
        list(bank.read([3]))
    bank.append(3, questions(3, 2))
    assert bank.iterations() == [1, 2, 3] and read(bank, [3]) == questions(3, 2)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_before_the_tail_is_refused(bank, tmp_path, damage):
    spoil(tmp_path / "bank" / "iteration-0001.parquet", damage)
    with pytest.raises(ValueError, match=r"iteration-0001\.parquet is damaged .* and later iterations"):
        bank.iterations()


def test_a_bank_without_embeddings(tmp_path):
    bank = Bank(tmp_path)
    bank.append(1, [replace(question, embedding=()) for question in questions(1, 3)])
    assert [part.shape for part in bank.embeddings([1])] == [(3, 0)]
