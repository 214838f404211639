"""`vold rl` at several layouts of two processes. A program of its own, so that what it forks knows no process group.

Arguments: the config file, then overrides without run_dir, then run_dir=DIR and further overrides of each layout, every
layout after a `--`.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.parity import run_world
from vold.config import load_config, schema
from vold.train.rl import train_rl


def main(config: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    common, *layouts = [list(part) for dash, part in groupby(arguments, lambda word: word == "--") if not dash]
    for layout in layouts:
        run_world(2, train_rl, load_config(schema.RlConfig, Path(config), [*common, *layout]))
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
