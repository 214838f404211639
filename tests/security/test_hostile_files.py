"""Files of others that lead elsewhere, that are too large or too deep, or that hold no numbers: one line that names
the file, within bounded time and memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vold.config import load_config
from vold.config.load import load_training_config
from vold.config.schema import DataConfig, ExportConfig
from vold.data.problems import load_problems
from vold.io import append_jsonl, to_json
from vold.jsonl import bounded_lines
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import INDEX, export_checkpoint, tensor_files
from vold.models.checkpoint_reader import CheckpointReader
from vold.models.student import load_chunks
from vold.models.tokenizer import load_tokenizer
from vold.report import read_run
from vold.report.read import columns
from vold.trainer.checkpoint import verify
from vold.trainer.shards import PieceReader
from vold.untrusted import HEADER_BYTES, JSON_BYTES, is_plain_name, parse_yaml

ELSEWHERE = [
    "../out",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\0b",
    "x\nY",
    "\x1b[2J",
    "x" * 300,
    7,
    None,
    ["x"],
]


def one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1, str(error.value)


@pytest.fixture
def student(tiny_student_dir, tmp_path) -> Path:
    """A copy of a checkpoint directory, with an index."""
    copy = shutil.copytree(tiny_student_dir, tmp_path / "student")
    names = tensor_files(copy)
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return copy


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_name_that_leads_elsewhere_is_refused_in_every_index(name, student, tmp_path):
    assert not is_plain_name(name)
    index = json.loads((student / INDEX).read_text())
    index["weight_map"] |= {"model.norm.weight": name}
    (student / INDEX).write_text(json.dumps(index))
    weights = (student / "model.safetensors").read_bytes()
    for read in (tensor_files, CheckpointReader, lambda path: export_checkpoint(path, tmp_path / "out", [])):
        with pytest.raises(ValueError) as error:
            read(student)
        one_line(error, student / INDEX)
    assert not (tmp_path / "out").exists() and (student / "model.safetensors").read_bytes() == weights
    if isinstance(name, str):
        (student / "manifest.json").write_text(json.dumps({"sha256": {"state.json": "0", name: "0"}}))
        with pytest.raises(ValueError, match=r"manifest\.json is missing or unreadable"):
            verify(student)


def test_links_out_of_a_checkpoint_are_not_published(student, tmp_path, caplog):
    secret, shared = tmp_path / "id_rsa", tmp_path / "shared"
    secret.write_text("secret")
    shared.mkdir()
    (student / "README.md").symlink_to(secret)
    (student / "chat_template.jinja").unlink(missing_ok=True)
    (student / "chat_template.jinja").symlink_to(secret)
    for name in ("config.json", "model.safetensors"):  # a folder of links to shared storage is common
        (student / name).rename(shared / name)
        (student / name).symlink_to(shared / name)
    (student / "notes.txt").write_text("mine")
    (student / "same.txt").symlink_to(student / "notes.txt")
    with caplog.at_level(logging.WARNING, "vold"):
        out = export_checkpoint(student, tmp_path / "out", [])
    copied = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "notes.txt", "same.txt"} <= copied
    assert not {"README.md", "chat_template.jinja"} & copied and "secret" not in "".join(
        path.read_text(errors="replace") for path in out.iterdir()
    )
    assert len([r for r in caplog.records if "not copied" in r.message]) == 2
    assert not any(path.is_symlink() for path in out.iterdir())


def test_the_links_of_a_hub_cache_are_followed(student, tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(student.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(repository / "blobs" / str(number))
    names = {path.name for path in snapshot.iterdir()}
    assert {path.name for path in export_checkpoint(snapshot, tmp_path / "out", []).iterdir()} == names


@pytest.mark.parametrize("exists", [True, False])
def test_an_export_does_not_follow_a_link(student, tmp_path, exists):
    if exists:
        (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a link: export to a new directory"):
        export_checkpoint(student, tmp_path / "out", [])


def sparse(path: Path, size: int) -> Path:
    """A file of that size, which takes no room."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", Architecture.from_pretrained),
        ("generation_config.json", load_tokenizer),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer_config.json", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
        (INDEX, tensor_files),
    ],
)
def test_giant_files_of_a_checkpoint_are_refused_unread(student, name, read):
    sparse(student / name, 1 << 40)
    with pytest.raises(ValueError, match="bytes, over") as error:
        read(student)
    one_line(error, student / name)


def test_a_giant_header_is_refused_unread(student, tmp_path):
    (student / INDEX).unlink()
    for length in (HEADER_BYTES + 1, 1 << 40, 2**64 - 1):
        sparse(student / "model.safetensors", 1 << 40)
        with (student / "model.safetensors").open("r+b") as file:
            file.write(struct.pack("<Q", length))
        for read in (tensor_files, lambda path: PieceReader([path / "model.safetensors"])):
            with pytest.raises(ValueError, match="cannot be read") as error:
                read(student)
            one_line(error, student / "model.safetensors")


@pytest.mark.parametrize("metadata", [{}, {"DCP_SHARDING_INFO": "[]"}, {"DCP_SHARDING_INFO": '{"x": 1}'}, None])
def test_a_shard_without_offsets_is_refused(tmp_path, metadata):
    path = tmp_path / "rank-00000.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="no offsets") as error:
        PieceReader([path])
    one_line(error, path)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
BOMBS = {
    "aliases": LAUGHS,
    "merge keys": MERGES,
    "an alias of itself": "run: &a [*a]\n",
    "a mapping in itself": "run: &a {x: *a}\n",
    "brackets": "run: " + "[" * 20_000,
    "braces": "run: " + "{a: " * 20_000,
    "too large": "run: " + "x" * 300_000,
    "a number of a million digits": "step: " + "9" * 200_000,
    "hexadecimal": "step: 0x" + "f" * 200_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_yaml_bombs_are_refused(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text + "out: x\n")
    started = time.process_time()
    for read in (lambda: load_config(ExportConfig, path), lambda: load_training_config(path)):
        with pytest.raises(ValueError) as error:
            read()
        one_line(error, path)
        assert len(str(error.value)) < 4000
    assert read_run(tmp_path).verb == "unknown"
    assert time.process_time() - started < 60.0  # a backstop: these would take for ever


def test_ordinary_aliases_are_read():
    assert parse_yaml("a: &a {lr: 1, eps: 2}\nb: {<<: *a, lr: 3}\nc: *a") == {
        "a": {"lr": 1, "eps": 2},
        "b": {"lr": 3, "eps": 2},
        "c": {"lr": 1, "eps": 2},
    }


def test_lines_without_an_end_are_not_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a\n" + b"x" * 1000 + b"\nb\nyyyyyyyyyy")
    with path.open("rb") as file:
        assert list(bounded_lines(file, 10)) == [b"a\n", None, b"b\n", None]
    path.write_bytes(b"x" * 9 + b"\n" + b"y" * 9)
    with path.open("rb") as file:
        assert list(bounded_lines(file, 10)) == [b"x" * 9 + b"\n", b"y" * 9]


BAD_LINES = [b"{nope", b"\xff\xfe", b"[" * 100_000, b'{"question": "?', b"7", b"null", b'"x"']
BAD_LINES += [b'{"a": %s}' % (b"9" * 9999)]
BAD_LINES += [
    json.dumps({"question": "<image>?", "answer": "4", "image": [name]}).encode() for name in ("A" * 9000, "a/" * 9000)
]


@pytest.mark.parametrize("layout", ["virl39k", "vqa", "gsm8k", "messages", "geometry3k"])
def test_bad_lines_are_skipped_and_reported_one_by_one(tmp_path, layout):
    path = tmp_path / "rows.jsonl"
    row = {
        "question": "1+1?",
        "answer": "#### 2" if layout == "gsm8k" else "2",
        "problem": "1+1?",
        "image": [],
        "images": [],
    }
    row |= {"messages": [{"role": "user", "content": "1+1?"}]}
    good = json.dumps(row).encode()
    path.write_bytes(b"\n".join([good, *BAD_LINES, good, b""]))
    reported: list[str] = []
    problems = load_problems(DataConfig(path=path, layout=layout, on_error="skip"), reported.append)
    assert len(problems) == 2 and len(reported) == len(BAD_LINES)
    assert all(str(path) in line and len(line.splitlines()) == 1 and len(line) < 4000 for line in reported)
    with pytest.raises(ValueError, match=r"rows.jsonl line 2 .* \(data.on_error=skip leaves such rows out\)"):
        load_problems(DataConfig(path=path, layout=layout))


def test_a_giant_json_list_is_refused_unread(tmp_path):
    path = sparse(tmp_path / "rows.json", 16 * JSON_BYTES)
    with pytest.raises(ValueError, match="bytes, over") as error:
        load_problems(DataConfig(path=path, layout="orz"))
    one_line(error, path)


def test_json_that_is_written_is_json(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    values = {"a": float("nan"), "b": [1.5, float("inf"), {"c": -float("inf")}], "d": (float("nan"),), "e": "\ud800"}
    assert json.loads(to_json(values), parse_constant=refuse) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": [None],
        "e": "\ud800",
    }
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}])
    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss": None}
    assert str(columns(rows)["loss"]) == "[1.0, nan]"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["norm.weight", "layers.1.self_attn.k_proj.bias", "embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named(student, layout, tensor, value):
    tensors = load_file(student / "model.safetensors")
    name = next(name for name in tensors if name.endswith(tensor) and "visual" not in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds NaN or infinite values") as error:
        load_chunks(student, layout, torch.float32)
    one_line(error, student / "model.safetensors")
    assert name in str(error.value)
