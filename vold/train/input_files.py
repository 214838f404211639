"""What a run was begun with: run_dir/inputs.jsonl holds size and SHA-256 of the models' files, the data files and their
pictures, so that a resumed run names one that has changed since: a flipped weight of the teacher, an edited row.

Every rank reads its share: at the start in a thread, while models are loaded and the first steps train, so that the
record is there before the first checkpoint; on resume before a model is loaded, from where it then finds the files in
memory. Not covered: pictures of streamed sets, and the token ids that data.cache_dir keeps.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch.distributed as dist

from vold.config.schema import RlConfig, SftConfig
from vold.config.schema.data import DataConfig
from vold.data.sources import find_files
from vold.io import log, to_json, write_atomically
from vold.jsonl import parse_row
from vold.models.checkpoint_dir import INDEX, USUAL_FILES, tensor_files
from vold.parallel.collectives import run_on_all_ranks
from vold.untrusted import check_regular, check_size

RECORD = "inputs.jsonl"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
RECORD_BYTES = 1 << 30
SLOW_SECONDS = 5.0

Facts = tuple[int, str]
"""Size and SHA-256 of a file."""


class InputFiles:
    """The input files of a training run. Every method is called by all ranks.

    files: a name that does not depend on where the files lie -> file, the same on all ranks.
    """

    def __init__(self, run_dir: Path, files: Mapping[str, Path]):
        self._path, self._files, self._is_recorded = run_dir / RECORD, files, False
        self._facts: dict[str, Facts] = {}
        self._error: OSError | ValueError | None = None
        self._thread = threading.Thread(target=self._read, name="inputs", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, run_dir: Path, files: Mapping[str, Path], *, resume: bool) -> InputFiles:
        """Begin to read the files, and on resume compare them with the record. Raises ValueError as `check` does."""
        inputs = cls(run_dir, files)
        if resume:
            inputs.check()
        return inputs

    def check(self) -> None:
        """Compare the files with the record of the run that is resumed, where it has one. Raises ValueError, on all
        ranks, naming a file that is another one now."""
        before = run_on_all_ranks(self._read_record)[0]
        if before is None:
            return log.info(f"{self._path} is not there: models and data are not compared with those of the start")
        run_on_all_ranks(lambda: self._compare(before))
        self._is_recorded = True

    def record(self) -> None:
        """Write the record, unless it is there. Warns where a file cannot be read: then there is none."""
        if self._is_recorded:
            return
        self._is_recorded = True
        self._thread.join()
        shares = run_on_all_ranks(lambda: (self._facts, str(self._error or "")))
        if dist.get_rank() != 0:
            return
        if errors := [error for _, error in shares if error]:
            return log.warning(
                f"{errors[0]}: {self._path} is not written, so a resumed run does not compare its inputs"
            )
        facts = {name: fact for share, _ in shares for name, fact in share.items()}
        rows = "".join(
            to_json({"name": name, "bytes": size, "sha256": digest}) + "\n"
            for name, (size, digest) in sorted(facts.items())
        )
        write_atomically(self._path, rows + to_json({"sha256": _sha256(rows.encode())}) + "\n", durable=True)

    def _read(self) -> None:
        try:
            for name in sorted(self._files)[dist.get_rank() :: dist.get_world_size()]:
                self._facts[name] = _facts_of(self._files[name])
        except (OSError, ValueError) as error:
            self._error = error

    def _read_record(self) -> dict[str, Facts] | None:
        if dist.get_rank() != 0 or not self._path.exists():
            return None
        check_size(self._path, RECORD_BYTES)
        *lines, last = self._path.read_bytes().splitlines(keepends=True) or [b""]
        rows = [parse_row(line) or {} for line in lines]
        if (parse_row(last) or {}).get("sha256") != _sha256(b"".join(lines)):
            raise ValueError(f"{self._path} is damaged; restore it, or delete it to go on without comparing")
        return {row["name"]: (row["bytes"], row["sha256"]) for row in rows}

    def _compare(self, before: dict[str, Facts]) -> None:
        self._thread.join(SLOW_SECONDS)
        if self._thread.is_alive() and dist.get_rank() == 0:
            log.info("comparing models and data with those of the start …")
        self._thread.join()
        if self._error:
            raise self._error
        changed = {name: "has changed" for name, facts in self._facts.items() if before.get(name, facts) != facts}
        changed |= {name: "is missing" for name in before.keys() - self._files.keys()}
        changed |= {name: "is new" for name in self._files.keys() - before.keys()}
        if not changed:
            return
        name = min(changed)
        more = f", and {len(changed) - 1} others are not the same" if len(changed) > 1 else ""
        raise ValueError(
            f"--resume: {self._files.get(name, name)} {changed[name]} since the run began (see {self._path}){more}; "
            "put it back as it was, or start another run_dir; if the change is meant, delete that record"
        )


def training_files(config: SftConfig | RlConfig, pictures: Iterable[Path]) -> dict[str, Path]:
    """Name -> file of everything that a training run reads: `student/config.json`, `data.path/train.jsonl`,
    `pictures/0001.png`."""
    teacher = ("teacher", config.teacher) if isinstance(config, RlConfig) else ("pair_with", config.pair_with)
    files = {f"student/{name}": config.student / name for name in _checkpoint_files(config.student)}
    if teacher[1] is not None:
        files |= {f"{teacher[0]}/{name}": teacher[1] / name for name in _checkpoint_files(teacher[1])}
    if isinstance(config, RlConfig) and config.reference is not None:
        files |= {f"reference/{name}": config.reference / name for name in _checkpoint_files(config.reference)}
    for name, several in config.teachers.items() if isinstance(config, RlConfig) else ():
        files |= {f"teachers.{name}/{file}": several.path / file for file in _checkpoint_files(several.path)}
    if config.adapter is not None and (adapter := config.adapter.path) is not None:
        files |= {f"adapter/{name}": adapter / name for name in ADAPTER_FILES}
    if (template := config.prompt.chat_template) is not None:
        names = _text_files(template) if template.is_dir() else [""]
        files |= {f"prompt.chat_template/{name}": template / name for name in names}
    sets = {"data.path": config.data}
    sets |= {f"evaluation.sets.{name}.path": data for name, data in config.evaluation.sets.items()}
    for key, data in sets.items():
        files |= {f"{key}/{name}": path for name, path in _data_files(data)}
    root = (config.data.image_root or config.data.path.parent).resolve()
    for picture in pictures:
        name = picture.relative_to(root) if picture.is_relative_to(root) else picture
        files[f"pictures/{name}"] = picture
    return files


def _checkpoint_files(directory: Path) -> list[str]:
    return [*_text_files(directory), *sorted(set(tensor_files(directory).values()))]


def _text_files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if USUAL_FILES.fullmatch(path.name) or path.name == INDEX]


def _data_files(data: DataConfig) -> Iterator[tuple[str, Path]]:
    if data.layout == "traces" and data.path.is_dir():
        yield from ((path.name, path) for path in data.path.glob("*.parquet"))
        return
    source = find_files(data)
    for path in source.files or source.folder.rglob("*.arrow"):
        yield str(path.relative_to(source.folder)) if path.is_relative_to(source.folder) else path.name, path


def _facts_of(path: Path) -> Facts:
    check_regular(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
