"""One call makes the miniature world: two checkpoint directories and the data files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import transformers

from vold.io import configure_logging
from vold.miniature.data import OTHER_STYLE_FILE, DataSizes, write_data
from vold.miniature.pretrain import make_base, make_teacher

_WORKER = "import sys; from vold.miniature.make import run_worker; run_worker(*sys.argv[1:])"


@dataclass(frozen=True)
class MiniatureWorld:
    """Paths of the world: two checkpoint directories and one directory of data files."""

    teacher: Path
    base: Path
    data: Path

    @classmethod
    def at(cls, root: Path) -> MiniatureWorld:
        """The layout under `root`."""
        return cls(root / "teacher", root / "base", root / "data")

    @property
    def train(self) -> Path:
        """RL prompts, orz-57k layout."""
        return self.data / "train.json"

    @property
    def traces_prompts(self) -> Path:
        """Prompts on which the teacher writes its traces, orz-57k layout."""
        return self.data / "traces_prompts.json"

    @property
    def traces_other(self) -> Path:
        """Right traces in another style, rows of `prompt` and `response`."""
        return self.data / OTHER_STYLE_FILE

    def text(self, split: str) -> Path:
        """Text problems of `val` or `test`, orz-57k layout."""
        return self.data / f"{split}_text.json"

    def image(self, split: str) -> Path:
        """Image problems of `val` or `test`, Geometry3K layout."""
        return self.data / f"{split}_image.jsonl"


def make_world(root: Path, seed: int, sizes: DataSizes = DataSizes()) -> MiniatureWorld:
    """Make what is missing under `root`: about 8 minutes on two idle cores, one process for each checkpoint.

    Existing parts are kept. Raises RuntimeError when a checkpoint could not be made; its reason is on stderr.
    """
    world = MiniatureWorld.at(Path(root))
    checkpoints = {"teacher": world.teacher, "base": world.base}
    workers = {name: _start_worker(name, path, seed) for name, path in checkpoints.items() if not path.exists()}
    try:
        write_data(world.data, seed, sizes)
        ended = {name: worker.wait() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    if failed := [
        f"{name} ({f'killed by signal {-code}' if code < 0 else f'exit code {code}'})"
        for name, code in ended.items()
        if code
    ]:
        raise RuntimeError(f"miniature: making {', '.join(failed)} under {root} failed, see the messages above")
    return world


def _start_worker(name: str, out_dir: Path, seed: int) -> subprocess.Popen:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", _WORKER, name, str(out_dir), str(seed)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)


def run_worker(name: str, out_dir: str, seed: str) -> None:
    """Body of a worker process: make the `teacher` or the `base`. It ends with the process that started it."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    configure_logging()
    transformers.utils.logging.disable_progress_bar()
    make = {"teacher": make_teacher, "base": make_base}[name]
    make(Path(out_dir), int(seed))


def _exit_with_parent() -> None:
    # Nothing is written to the pipe: it ends when its other side's process does. Not by sys.stdin, whose lock a waiting
    # thread holds: Python aborts when it cannot take it as it ends.
    os.read(0, 1)
    os._exit(1)
