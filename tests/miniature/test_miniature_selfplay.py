"""The report of `make selfplay` on made-up runs: what it measures of two banks, and the table over seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vold.miniature import selfplay
from vold.miniature import world as arithmetic
from vold.miniature.make import MiniatureWorld
from vold.selfplay.bank import Bank, BankedQuestion


@pytest.fixture
def out(tmp_path):
    """R-Zero asks one expression again and again among other words, R-Diverse asks the world's; half the labels of
    R-Zero are wrong."""
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        for arm in selfplay.ARMS:
            folder = tmp_path / "out" / f"seed{seed}" / arm
            bank = Bank(folder / "bank")
            for number in (1, 2):
                problems = [arithmetic.sample_problem(rng) for _ in range(8)]
                problems = [arithmetic.solve("7-7-7-7")] * 8 if arm == "R-Zero" else problems
                labels = [p.answer if arm == "R-Diverse" or n % 2 else "x" for n, p in enumerate(problems)]
                bank.append(
                    number,
                    [
                        BankedQuestion(number, "", seed, arithmetic.text_question(p, rng), label, 0.5)
                        for p, label in zip(problems, labels, strict=True)
                    ],
                )
            rows = [{"step": step, "accuracy_text": 0.5 + 0.1 * seed + 0.01 * step} for step in range(3)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "out"


class ByExpression:
    """What a perfect coder would come to: a direction of its own for each expression, whatever stands around it."""

    def embed(self, texts) -> np.ndarray:
        inside = [text[text.index("[") : text.index("]")].replace("<", "").replace(">", "") for text in texts]
        rows = [np.random.default_rng(list(expression.encode())).standard_normal(64) for expression in inside]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


def test_both_illusions_are_seen(out, tiny_teacher_dir, tiny_student_dir, capsys, monkeypatch):
    monkeypatch.setattr(selfplay, "open_embedder", lambda *_, **__: ByExpression())
    world = MiniatureWorld(tiny_teacher_dir, tiny_student_dir, out)
    selfplay.report(out, world, (0, 1), 1.0)
    rows = {(r["arm"], r["seed"], r["step"]): r for r in json.loads((out / "report.json").read_text())["rows"]}
    zero, diverse = rows["R-Zero", 0, 2], rows["R-Diverse", 0, 2]
    assert zero["labels_right"] == 0.5 and diverse["labels_right"] == 1.0
    assert zero["accuracy_text"] == pytest.approx(0.52) and "labels_right" not in rows["R-Zero", 0, 0]
    assert zero["clusters_words"] >= 0.5 and zero["clusters_vectors"] == 1 / 8, "many words, one computation"
    assert zero["recycled"] == 1.0 and diverse["clusters_vectors"] == 1.0 and diverse["recycled"] == 0.0
    assert rows["independent", 0, 1]["labels_right"] == 1.0 and rows["independent", 0, 1]["questions"] == 8
    facts = {arm: selfplay.bank_facts(out / "seed0" / arm / "bank") for arm in ("R-Zero", "R-Diverse")}
    assert facts["R-Diverse"] == {"labels_right": 1.0, "distinct_problems": 1.0}
    assert facts["R-Zero"] == {"labels_right": 0.5, "distinct_problems": 1 / 8}, "other words are no other problem"
    table = (out / "table.md").read_text()
    assert "| R-Zero | 2 | 57.0 ± 5.0 | 50.0 ± 0.0 |" in table and table in capsys.readouterr().out
    assert (out / "diversity.png").read_bytes().startswith(b"\x89PNG")
    again = (out / "report.json").read_text()
    selfplay.report(out, world, (0, 1), 1.0)
    assert json.loads((out / "report.json").read_text())["rows"] == json.loads(again)["rows"], (
        "what is measured is kept"
    )


def test_the_true_answer_is_read_off_both_spellings():
    assert selfplay._answer("<w1>[7*9+5*3]<w5><solve>") == arithmetic.solve("7*9+5*3").answer
    assert selfplay._answer("[<7><*><9><+><5><*><3>]<solve>") == arithmetic.solve("7*9+5*3").answer
