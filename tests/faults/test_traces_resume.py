"""`vold traces` killed while it writes and continued with other numbers of ranks: the uninterrupted run's set."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest

from support import ranks, sabotage

CONFIG = Path(__file__).parents[2] / "vold" / "miniature" / "configs" / "traces.yaml"


@pytest.fixture(scope="module")
def teacher_arguments(tmp_path_factory, tiny_teacher_dir) -> list[str]:
    """22 prompts in shards of 6, asked 2 at a time."""
    from vold.miniature.data import DataSizes, write_data

    data = tmp_path_factory.mktemp("traces") / "data"
    write_data(data, 0, DataSizes(train=4, traces_prompts=22, traces_other=4, val=2, test=2))
    return [
        "traces",
        str(CONFIG),
        f"teacher={tiny_teacher_dir}",
        f"data.path={data / 'traces_prompts.json'}",
        "sampling={max_new_tokens: 30, temperature: 1.0, sequences_per_call: 2}",
        "prompts_per_shard=6",
        "max_tokens=45",
        "timeout_seconds=8",
    ]


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "traces").iterdir()}


def test_kills_and_other_numbers_of_ranks_change_nothing(teacher_arguments, tmp_path):
    launches = count()

    def vold(world: int, run_dir: Path, faults: dict, *extra: str) -> tuple[list[int], str]:
        given = [*teacher_arguments, f"run_dir={run_dir}", *extra]
        launched = ranks.start(world, sabotage.run_verb, given, faults, logs=tmp_path / f"launch{next(launches)}")
        return launched.join(), launched.output()

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert vold(1, whole, {})[0] == [0]
    expected = files(whole)
    assert sorted(expected) == ["card.json", *(f"shard-{number:05d}.parquet" for number in range(4))]
    counts = json.loads(expected["card.json"])
    assert counts["kept"] and counts["truncated"] and counts["too_long"], "random weights: some of each"
    assert counts["asked"] == sum(counts[fate] for fate in ("kept", "truncated", "too_long", "failed"))

    codes, output = vold(3, broken, {1: (sabotage.dies_in_trace, 2)})
    assert codes == [1, -9, 1] and "rank 1 died or hangs" in output
    assert "card.json" not in files(broken) and (broken / "traces" / "shard-00001.part.jsonl").exists()
    codes, _ = vold(1, broken, {0: (sabotage.dies_in_trace, 1)}, "--resume")
    assert codes == [-9] and files(broken) != expected
    codes, output = vold(2, broken, {}, "--resume")
    assert codes == [0, 0], output
    assert files(broken) == expected
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 22 and all(row["prompts_per_second"] > 0 for row in rows)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
