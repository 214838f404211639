"""One run on four ranks (tp 2 x dp 2) is killed, filled up, hung, interrupted, resumed each time: nothing is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from support import ranks, sabotage
from vold.run.run_dir import read_rows
from vold.trainer.checkpoint import verify

STEPS, WORLD = 7, 4


def timeless(run_dir: Path) -> list[dict]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]


def same_tensors(one: Path, other: Path, world: int = WORLD) -> bool:
    for rank in range(world):
        a, b = (load_file(path / f"rank-{rank:05d}.safetensors") for path in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


def test_one_run_survives_everything(arguments, tmp_path):
    launches = iter(range(99))

    def vold(run_dir: Path, faults: dict | None = None, *extra: str) -> tuple[list[int], str]:
        given = [*arguments, f"steps={STEPS}", f"run_dir={run_dir}", "parallel.tp=2", *extra]
        world = ranks.start(WORLD, sabotage.run_verb, given, faults or {}, logs=tmp_path / f"launch{next(launches)}")
        codes = world.join(
            hung=[rank for rank, (fault, *_) in (faults or {}).items() if fault == sabotage.hangs_in_step]
        )
        return codes, world.output()

    def latest(run_dir: Path) -> str:
        name = (run_dir / "checkpoints" / "latest").read_text().strip()
        verify(run_dir / "checkpoints" / name)
        return name

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    codes, output = vold(whole)
    assert codes == [0] * WORLD, output

    # killed in a step: the others end within the time-out and say who
    codes, output = vold(run_dir, {2: (sabotage.dies_in_step, 4)})
    assert codes == [1, 1, -9, 1], output
    assert output.count("rank 2 died or hangs (no answer for timeout_seconds); the job ends, --resume") == 3, output
    assert latest(run_dir) == "step-000002"

    # killed in a save, here one in the background: the step never becomes the latest
    codes, output = vold(run_dir, {1: (sabotage.dies_in_save, 1)}, "--resume", "save_async=true")
    assert codes == [1, -9, 1, 1] and output.count("rank 1 died or hangs") == 3, output
    assert latest(run_dir) == "step-000002" and not (run_dir / "checkpoints" / "step-000004").exists()

    # the disk is full on one rank: every rank says it and ends, nothing half is left behind
    codes, output = vold(run_dir, {3: (sabotage.disk_is_full_in_save, 1, 100_000)}, "--resume")
    assert codes == [2] * WORLD, output
    assert re.search(
        r"vold: step 4 could not be saved: .*rank-00003.*too large.* needs \d+ bytes .*after step 2", output
    ), output
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-000002", "latest"}

    # a rank hangs: the others end and say who; only its launcher can end the one that hangs
    codes, output = vold(run_dir, {3: (sabotage.hangs_in_step, 3)}, "--resume")
    assert codes == [1, 1, 1, -9] and output.count("rank 3 died or hangs") == 3, output
    assert latest(run_dir) == "step-000004"

    # SIGTERM on one rank: the step is finished and saved
    codes, output = vold(run_dir, {0: (sabotage.is_sent_sigterm_in_step, 1)}, "--resume", "save_async=true")
    assert codes == [143] * WORLD, output
    assert latest(run_dir) == "step-000005"

    codes, output = vold(run_dir, None, "--resume", "save_async=true")
    assert codes == [0] * WORLD, output
    assert timeless(run_dir) == timeless(whole), "every step once, with the same numbers"
    ends = [path / "checkpoints" / f"step-{STEPS:06d}" for path in (whole, run_dir)]
    assert same_tensors(*ends) and len({(path / "state.json").read_text() for path in ends}) == 1
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["verb"] == "sft"


def test_not_a_number_on_one_rank_changes_nothing_anywhere(arguments, tmp_path):
    """Data parallel, optimizer divided: rank 1 alone sees it. One step is skipped and counted; three in a row end the
    run, on both ranks, with the last good state saved."""

    def vold(run_dir: Path, count: int, *extra: str) -> tuple[list[int], str]:
        given = [*arguments, "steps=4", f"run_dir={run_dir}", "save_every=1", "keep_checkpoints=9", *extra]
        given += ["parallel.distributed_optimizer=true"]
        world = ranks.start(2, sabotage.run_verb, given, {1: (sabotage.gets_nan, 2, count)}, logs=tmp_path)
        return world.join(), world.output()

    codes, output = vold(tmp_path / "once", 1)
    assert codes == [0, 0], output
    assert [row["skipped"] for row in timeless(tmp_path / "once")] == [0.0, 1.0, 0.0, 0.0]
    steps = [tmp_path / "once" / "checkpoints" / f"step-{step:06d}" for step in (1, 2, 3)]
    assert same_tensors(*steps[:2], world=2) and not same_tensors(*steps[1:], world=2)
    updates = [json.loads((path / "state.json").read_text())["updates"] for path in steps]
    assert updates == [1, 1, 2]

    codes, output = vold(tmp_path / "thrice", 3)
    assert codes == [2, 2], output
    assert "vold: gradient norm was nan for 3 steps in a row (optimizer.max_bad_steps)" in output
    assert same_tensors(steps[0], tmp_path / "thrice" / "checkpoints" / "step-000003", world=2)

    # and a damaged file is refused by every rank, whichever of them read it
    file = tmp_path / "thrice" / "checkpoints" / "step-000003" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    codes, output = vold(tmp_path / "thrice", 0, "--resume")
    assert codes == [2, 2] and output.count(f"{file} is damaged (SHA-256 differs); resume from another checkpoint") == 2
