"""The files behind `data.path`: one file, those of the chosen split of a folder, a `save_to_disk` folder, or a data
set of the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vold.config.schema import DataConfig

COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "card.json", "package.json"}
SPLITS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
"""Names of splits in file names that mean another, as the hub reads them."""
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_KEYWORD = re.compile(r"(?:^|[-_. ])(train|training|validation|valid|val|dev|test|testing|eval)(?:[-_. ]|$)", re.I)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A set's files in order, or its memory-mapped table where `datasets` saved it; and the folder that paths in its
    rows are below."""

    folder: Path
    files: list[Path]
    table: pa.Table | None = None


def suffix_of(file: Path) -> str:
    """The suffix that tells the format: of problems.jsonl.gz it is .jsonl."""
    return (Path(file.stem).suffix if file.suffix.lower() in COMPRESSED else file.suffix).lower()


def find_files(config: DataConfig) -> Source:
    """Where the rows of the set are. Raises ValueError where there are none, or where `data.split` or `data.subset`
    has to choose."""
    path = config.path
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        path = _download(str(path))
    if not path.exists():
        raise ValueError(f"data file {path} does not exist")
    if not path.is_dir():
        if config.split and _split_of(path) != config.split:
            raise ValueError(f"data.split = {config.split!r}, but {path} is a single file; leave it out")
        return Source(path.parent, [path])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Source(path, [], _saved(path, config))
    splits = _splits_of_card(path, config.subset)
    if splits is None:
        splits = _splits_of_folder(path, config.subset)
    if not splits:
        raise ValueError(f"data file {path} does not exist or holds no {', '.join(FORMATS)}")
    files = _choose(splits, config.split, path)
    if len({suffix_of(file) for file in files}) > 1:
        found = ", ".join(sorted({suffix_of(file) for file in files}))
        raise ValueError(f"{path} holds files of several formats ({found}); name one file, or keep one format")
    return Source(path, files)


def _choose(splits: Mapping[str, Any], split: str | None, path: Path) -> Any:
    """The split that is meant; the only one where there is no choice."""
    names = ", ".join(name or "(files without a split's name)" for name in splits)
    if split is None:
        if len(splits) > 1:
            raise ValueError(f"{path} holds several splits: {names}; choose one with data.split")
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"data.split = {split!r} is not in {path}; it holds {names}")
    return splits[split]


def _splits_of_folder(path: Path, subset: str | None) -> dict[str, list[Path]]:
    """Split -> files: those in the folder itself, else in its subfolders. A subfolder is a split where its name is one,
    and otherwise a configuration of the data set."""
    files = _data_files(path)
    folders = [folder for folder in sorted(path.iterdir()) if _is_data_folder(folder)]
    if files:
        if subset is not None:
            raise ValueError(f"data.subset = {subset!r}, but {path} holds no subsets; leave it out")
        return _by_split(files)
    if subset is not None:
        if subset not in {folder.name for folder in folders}:
            names = ", ".join(folder.name for folder in folders) or "none"
            raise ValueError(f"data.subset = {subset!r} is not in {path}; it holds {names}")
        return _splits_of_folder(path / subset, None)
    if len(folders) == 1 and not _split_named(folders[0].name):
        return _splits_of_folder(folders[0], None)
    if all(_split_named(folder.name) for folder in folders):
        return {_split_named(folder.name): _data_files(folder) for folder in folders}
    names = ", ".join(folder.name for folder in folders)
    raise ValueError(f"{path} holds several data sets: {names}; choose one with data.subset")


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    return splits


def _split_of(file: Path) -> str:
    """The split that a file's name tells: train-00000-of-00002.parquet, gsm8k_test.jsonl; "" where it tells none."""
    stem = file.name[: file.name.lower().rfind(suffix_of(file))]
    shard = _SHARD.match(stem)
    return (_split_named(shard[1]) or shard[1]) if shard else _split_named(stem)


def _split_named(name: str) -> str:
    found = _KEYWORD.findall(name)
    keyword = found[-1].lower() if found else ""
    return SPLITS.get(keyword, keyword)


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and suffix_of(file) in FORMATS and file.name not in NO_DATA and not file.name.startswith(".")
    )


def _is_data_folder(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.startswith(".") or folder.suffix in (".images", ".arrow"):
        return False
    return bool(_data_files(folder)) or any(map(_is_data_folder, folder.iterdir()))


# -- what `datasets` and the hub know ------------------------------------------------------------------------------


def _splits_of_card(path: Path, subset: str | None) -> dict[str, list[Path]] | None:
    """Split -> files as the README's `configs` say; None where it says nothing."""
    card = path / "README.md"
    if not card.is_file() or "configs:" not in card.read_text(encoding="utf-8", errors="replace"):
        return None
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as nothing_kept:
        try:
            builder = load_dataset_builder(str(path), name=subset, cache_dir=nothing_kept)
        except Exception as error:  # the library's own errors are of many kinds
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: {reason[:300]}; choose with data.subset, or name a file") from None
    files = builder.config.data_files or {}
    return {str(split): [Path(str(file)) for file in names] for split, names in files.items()}


def _saved(path: Path, config: DataConfig) -> pa.Table:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        found: Any = load_from_disk(str(path))
    except Exception as error:  # the library's own errors are of many kinds
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if isinstance(found, DatasetDict):
        found = _choose(found, config.split, path)
    assert isinstance(found, Dataset)
    if found._indices is not None:  # a selection that was saved as indices
        raise ValueError(f"{path} was saved with an index; save `dataset.flatten_indices()`")
    return found.data.table


def _download(name: str) -> Path:
    """The snapshot of a hub data set: what is cached here, or else downloaded (never its code)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    formats = [f"*{suffix}{packed}" for suffix in FORMATS for packed in ("", *sorted(COMPRESSED))]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[*formats, "README.md", "*.arrow"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise ValueError(
            f"data file {name} does not exist, and as a data set of the hub it is neither in the cache nor can it be "
            f"downloaded; run `hf download --repo-type dataset {name}` where there is a network, or check the name"
        ) from None
