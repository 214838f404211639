"""`vold convert` on files that lie: one line that names the file, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import tiny
from vold.commands.convert import convert
from vold.models.gguf_header import MOST_ELEMENTS, check_gguf

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TEXT, ARRAY = 8, 9
FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(*parts: bytes, tensors: int = 0, keys: int = 1, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text(b"k") + struct.pack("<IIQ", ARRAY, kind, count) + content


BIG = 2**62
LIES = {
    "empty": b"",
    "short": b"GGUF",
    "no magic": header(magic=b"PK\x03\x04"),
    "version": header(version=99),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "keys": header(keys=BIG),
    "tensors": header(keys=0, tensors=BIG),
    "tensors that are not there": header(keys=0, tensors=100_000),
    "a long name": header(text(b"k", BIG)),
    "a name of 2**64 - 1 bytes": header(text(b"k", 2**64 - 1)),
    "a long text": header(text(b"k"), struct.pack("<I", TEXT), text(b"v", BIG)),
    "an array of bytes": header(array(0, BIG)),
    "an array of texts": header(array(TEXT, BIG)),
    "texts that are not there": header(array(TEXT, MOST_ELEMENTS)),
    "many empty texts": header(*[array(TEXT, 40_000, bytes(8 * 40_000)) for _ in range(120)], keys=120),
    "arrays in arrays": header(text(b"k"), struct.pack("<I", ARRAY), struct.pack("<IQ", ARRAY, 1) * 100_000),
    "an unknown type": header(text(b"k"), struct.pack("<I", 77)),
    "dimensions": header(text(b"t") + struct.pack("<I", 2**31), keys=0, tensors=1),
    "data beyond the end": header(text(b"t") + struct.pack("<IQIQ", 1, 8, 0, BIG), keys=0, tensors=1),
    "an enormous shape": header(text(b"t") + struct.pack("<IQQIQ", 2, BIG, BIG, 0, 0), keys=0, tensors=1),
    "no text": header(text(b"\xff\xfe") + struct.pack("<II", 4, 1)),
    "a key twice": header(*[text(b"k") + struct.pack("<II", 4, 1)] * 2, keys=2),
    "no model": header(text(b"general.architecture") + struct.pack("<I", TEXT) + text(b"\x1b[2J\xe2\x80\xae")),
    "alignment": header(text(b"general.alignment") + struct.pack("<II", 4, 0)),
}


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        convert(path, path.parent / "out", dtype="float32", tokenizer=None)
    message = str(error.value)
    assert str(path) in message and len(message.splitlines()) == 1, message
    assert not (path.parent / "out").exists()
    return message


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[lie])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KiB"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    from models.test_gguf import TOKENS, write

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write(path, tiny.llama(vocab_size=len(TOKENS))).read_bytes()


def with_number(content: bytes, key: bytes, value: int) -> bytes:
    """The value of a 32-bit key replaced."""
    at = content.index(key) + len(key) + 4
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


@pytest.mark.parametrize("value", [0, 1, 10**4, 2**31, 2**32 - 1])
@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "attention.key_length"])
def test_numbers_that_are_not_the_models(whole, key, value, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(with_number(whole, f"llama.{key}".encode(), value))
    refused(path)


def test_tensors_that_share_their_bytes_are_refused(whole, tmp_path):
    path = tmp_path / "model.gguf"
    name = b"blk.0.attn_output.weight"
    at = whole.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", whole, at)
    at += 4 + 8 * dimensions + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 0) + whole[at + 8 :])
    assert "overlap" in refused(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "link to a device", "dead link", "nothing"])
def test_what_is_no_file(kind, tmp_path):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "model.gguf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif "link" in kind:
        path.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "gone")
    with pytest.raises(ValueError, match="is no file"):
        convert(path, tmp_path / "out", dtype="float32", tokenizer=None)


@FUZZ
@given(data=st.data())
def test_any_damage_is_one_line(whole, data, tmp_path):
    content, size = bytearray(whole), len(whole)
    end = min(size, 20_000)  # the header, where lies are
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 9))
        change = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
        content[at : at + len(change)] = change
    path = tmp_path / "model.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, size) | st.just(size))])
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        check_gguf(path)
        convert(path, tmp_path / "out", dtype="float32", tokenizer=None)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
