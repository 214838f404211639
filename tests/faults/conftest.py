"""A small run to break."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def arguments(tmp_path_factory, tiny_student_dir) -> list[str]:
    """`vold sft` on a dozen traces: two steps an epoch, a checkpoint every other step, exactly at its end."""
    from vold.miniature.data import DataSizes, write_data

    data = tmp_path_factory.mktemp("faults") / "data"
    write_data(data, 0, DataSizes(train=4, traces_prompts=4, traces_other=12, val=2, test=2))
    return [
        "sft",
        str(Path(__file__).parents[2] / "vold" / "miniature" / "configs" / "sft.yaml"),
        f"student={tiny_student_dir}",
        "pair_with=null",
        f"data.path={data / 'traces_other.jsonl'}",
        "data.layout=prompt-response",
        "batch_size=6",
        "save_every=2",
        "optimizer.warmup_steps=2",
        "evaluation.every=0",
        "timeout_seconds=10",
    ]
