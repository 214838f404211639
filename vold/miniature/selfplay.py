"""`make selfplay`: R-Zero beside R-Diverse for five iterations, three seeds, from a student that can write questions.

The demo's SFT student cannot: it learns that from 120 problems, as a person would write them, mixed with 300 of the
teacher's traces so that it still solves problems. After that there are no data and no teacher: the teacher only writes
the "code" by which R-Diverse compares questions. The questions of both arms are then measured alike, by that code, with
problems of the world itself for scale.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch

from vold.config import load_config
from vold.config.schema import SelfplayConfig
from vold.io import log, write_atomically
from vold.miniature import world as arithmetic
from vold.miniature.demo import commit, sft_phase, traces_phase, versions
from vold.miniature.make import MiniatureWorld, make_world
from vold.miniature.measure import expression_of
from vold.miniature.pipeline import CONFIGS, Phase, run_phases
from vold.models.tokenizer import load_tokenizer
from vold.report.tables import Mean
from vold.run.run_dir import read_rows
from vold.selfplay.bank import Bank, BankedQuestion
from vold.selfplay.diversity import diversity, project_to_plane
from vold.selfplay.embedders import Embedder, open_embedder
from vold.selfplay.figures import SelfplayRecord, diversity_figure

ARMS = {"R-Zero": "selfplay.yaml", "R-Diverse": "selfplay-diverse.yaml"}
SEEDS = (0, 1, 2)
POSED, SOLVED, START_STEPS = 120, 300, 120
COLUMNS = {
    "accuracy_text": "accuracy",
    "labels_right": "labels right",
    "clusters_words": "clusters by words",
    "clusters_vectors": "by code",
    "nearest_earlier": "nearest earlier",
    "recycled": "recycled",
}  # all in %


def run(root: Path = Path("runs"), *, parallel: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """Run both arms; write report.json, table.md, diversity.png and diversity.svg below runs/selfplay.

    Finished runs are kept.
    """
    started = time.perf_counter()
    out, world = root / "selfplay", make_world(root / "miniature" / "seed0", seed=0)
    run_phases([traces_phase(out, world)], parallel=1)
    run_phases([sft_phase(out, world)], parallel=1)
    run_phases([_start_phase(out, world)], parallel=1)
    run_phases([_arm_phase(out, world, arm, seed) for seed in seeds for arm in ARMS], parallel=parallel)
    report(out, world, seeds, time.perf_counter() - started)


def _start_phase(out: Path, world: MiniatureWorld) -> Phase:
    """SFT on questions to write and problems to solve."""
    data = write_start_rows(out / "start.jsonl", out / "traces" / "traces", POSED, SOLVED)
    settings = (f"student={out / 'sft' / 'model'}", f"data.path={data}", "data.layout=prompt-response")
    settings = (*settings, "data.limit=null", f"pair_with={world.teacher}", f"steps={START_STEPS}")
    return Phase("sft", "sft.yaml", out / "start", settings, START_STEPS)


def write_start_rows(path: Path, traces: Path, questions: int, solved: int | None) -> Path:
    """Write rows from which a student learns to write questions and to solve problems: `solved` of the traces (None:
    all)."""
    rng = np.random.default_rng([0, 30])
    request = load_config(SelfplayConfig, CONFIGS / ARMS["R-Zero"]).pose.request
    posed = [arithmetic.text_question(arithmetic.sample_problem(rng), rng) for _ in range(questions)]
    rows = [{"prompt": request, "response": question} for question in posed]
    shards = sorted(traces.glob("*.parquet"))
    chosen = [row for shard in shards for row in parquet.read_table(shard).to_pylist()][:solved]
    rows += [{"prompt": row["prompt"], "response": row["response"]} for row in chosen]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _arm_phase(out: Path, world: MiniatureWorld, arm: str, seed: int) -> Phase:
    settings = (f"student={out / 'start' / 'model'}", f"seed={seed}", f"evaluation.sets.text.path={world.text('test')}")
    if arm == "R-Diverse":
        settings = (*settings, *_measure(world))
    return Phase("selfplay", ARMS[arm], out / f"seed{seed}" / arm, settings)


def _measure(world: MiniatureWorld) -> tuple[str, str]:
    """Overrides that name the models by which questions are compared."""
    return f"embedder={world.base}", f"coder.checkpoint={world.teacher}"


# -- the report ----------------------------------------------------------------------------------------------------


def report(out: Path, world: MiniatureWorld, seeds: Sequence[int], seconds: float) -> None:
    """Measure what is in the arms' banks, and write it down."""
    config = load_config(SelfplayConfig, CONFIGS / ARMS["R-Diverse"], _measure(world))
    embedder = open_embedder(config.embedder, config.coder, dtype=torch.float32, device=torch.device("cpu"))
    assert embedder is not None
    banks = {(arm, seed): Bank(out / f"seed{seed}" / arm / "bank") for arm in ARMS for seed in seeds}
    kept = [bank.count([number]) for bank in banks.values() for number in bank.iterations()]
    measured = {key: _embedded(bank, out / "measured" / f"{key[0]}-{key[1]}", embedder) for key, bank in banks.items()}
    measured["independent", 0] = _embedded(
        _own_problems(out / "world", config.iterations, round(sum(kept) / len(kept))),
        out / "measured" / "world",
        embedder,
    )
    tokenizer = load_tokenizer(world.teacher)
    rows = {key: _rows(bank, tokenizer, config.pose.cluster_distance) for key, bank in measured.items()}
    for arm, seed in banks:
        logged = {row["step"]: row["accuracy_text"] for row in read_rows(out / f"seed{seed}" / arm / "metrics.jsonl")}
        numbered = {row["step"]: row for row in rows[arm, seed]}
        rows[arm, seed] = [
            numbered.get(step, {"step": step}) | {"accuracy_text": found} for step, found in sorted(logged.items())
        ]
    _write(out, rows, _maps(measured), seconds)


def _own_problems(directory: Path, iterations: int, count: int) -> Bank:
    """Independent problems of the world as a bank of `count` questions per iteration, for scale."""
    bank, rng = Bank(directory), np.random.default_rng([0, 31])
    for number in range(1, iterations + 1):
        problems = [arithmetic.sample_problem(rng) for _ in range(count)]
        questions = [
            BankedQuestion(number, "world", 0, arithmetic.text_question(problem, rng), problem.answer, 1.0)
            for problem in problems
        ]
        if number not in bank.iterations():
            bank.append(number, questions)
    return bank


def _embedded(bank: Bank, directory: Path, embedder: Embedder) -> Bank:
    """The same bank with the code's embeddings, in another directory."""
    embedded = Bank(directory)
    for number in sorted(set(bank.iterations()) - set(embedded.iterations())):
        questions = list(bank.read([number]))
        vectors = embedder.embed([question.question for question in questions])
        embedded.append(
            number,
            [replace(q, embedding=tuple(map(float, row))) for q, row in zip(questions, vectors, strict=True)],
        )
    return embedded


def _rows(bank: Bank, tokenizer, threshold: float) -> list[dict[str, float]]:
    def words(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = []
    for number in bank.iterations():
        correct = _right_labels(bank, number)
        # two thresholds: words are alike by BLEU below the paper's .5, code by cosine below the config's
        by_words = diversity(
            bank, number, words, threshold=SelfplayConfig.model_fields["pose"].default.cluster_distance
        )
        by_code = diversity(bank, number, words, threshold=threshold)
        counts = {"step": number, "questions": len(correct), "labels_right": sum(correct) / len(correct)}
        rows.append(counts | by_code | {"clusters_words": by_words["clusters_words"]})
    return rows


def bank_facts(directory: Path) -> dict[str, float]:
    """Of a bank, over all iterations: `labels_right`, and `distinct_problems`, the share of questions whose expression
    none before them in their iteration has (other filler words do not make another problem)."""
    bank = Bank(directory)
    right = [label for number in bank.iterations() for label in _right_labels(bank, number)]
    distinct = sum(len({expression_of(q.question) for q in bank.read([number])}) for number in bank.iterations())
    return {"labels_right": sum(right) / len(right), "distinct_problems": distinct / len(right)}


def _right_labels(bank: Bank, iteration: int) -> list[bool]:
    return [_answer(question.question) == question.label for question in bank.read([iteration])]


def _answer(question: str) -> str:
    """The true answer."""
    return arithmetic.solve(expression_of(question)).answer


def _maps(measured: dict[tuple[str, int], Bank]) -> dict[tuple[str, int], list[np.ndarray]]:
    """Each bank's questions by iteration as points of one plane for all."""
    parts = [(key, np.concatenate(list(b.embeddings([n])))) for key, b in measured.items() for n in b.iterations()]
    points = project_to_plane([vectors for _, vectors in parts])
    return {key: [p for (of, _), p in zip(parts, points, strict=True) if of == key] for key in measured}


def _write(out: Path, rows: dict[tuple[str, int], list[dict]], maps: dict, seconds: float) -> None:
    arms: dict[str, list[SelfplayRecord]] = {}
    for (arm, seed), iterations in rows.items():
        arms.setdefault(arm, []).append(SelfplayRecord(iterations, maps[arm, seed]))
    for fmt in ("png", "svg"):
        (out / f"diversity.{fmt}").write_bytes(diversity_figure(arms, fmt=fmt))
    flat = [{"arm": arm, "seed": seed, **row} for (arm, seed), iterations in rows.items() for row in iterations]
    facts = {"rows": flat, "versions": versions(), "commit": commit(), "wall_seconds": seconds}
    write_atomically(out / "report.json", json.dumps(facts, indent=1) + "\n")
    table = _table(flat)
    write_atomically(out / "table.md", table + "\n")
    log.info(f"\n{table}\n\n{out / 'diversity.png'}")


def _table(rows: Sequence[dict]) -> str:
    """Per arm and iteration the mean over seeds ± its standard error."""
    cells: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["step"]), []).append(row)
    lines = ["| arm | iteration | " + " | ".join(COLUMNS.values()) + " |", "| :-- | --: |" + " --: |" * len(COLUMNS)]
    for (arm, step), seeds in cells.items():
        means = [
            str(Mean(tuple(values))) if (values := [row[key] for row in seeds if key in row]) else "" for key in COLUMNS
        ]
        lines.append(f"| {arm} | {step} | " + " | ".join(means) + " |")
    return "\n".join(lines)
