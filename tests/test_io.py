"""vold/io.py: files that are complete or absent, text that stays on one line, the logger's two streams."""

from __future__ import annotations

import logging
import os
import stat
import threading

import pytest

from vold.io import append_jsonl, atomic_path, configure_logging, log, one_line_errors, visible, write_atomically


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path, durable):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, "né\n", durable=durable)
    assert path.read_bytes() == "né\n".encode() and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_meant(tmp_path):
    path = tmp_path / "absent" / "a.json"
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(path, "text")
    assert error.value.filename == str(path)


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    """As /dev/stdout or /dev/full: a rename would replace the device by a file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(path.read_text()))
    reader.start()
    write_atomically(path, "page")
    reader.join(10)
    assert received == ["page"] and stat.S_ISFIFO(path.stat().st_mode) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "hidden", ["\x1e", "\x85", "\u2028", "\u2029", "\x1b", "\u202e", "\r", "\n", "\t", "\ud800", "\0"]
)
def test_hidden_characters_become_visible(hidden):
    shown = visible(f"a{hidden}b")
    assert shown == f"a⟨{ord(hidden):04X}⟩b" and len(shown.splitlines()) == 1
    assert visible(f"a{hidden}b", multiline=True) == (f"a{hidden}b" if hidden in "\n\t" else shown)
    with pytest.raises(ValueError) as error, one_line_errors():
        raise ValueError(f"key {hidden!s} is unknown")
    assert str(error.value) == f"key ⟨{ord(hidden):04X}⟩ is unknown"


def test_ordinary_text_is_left_alone():
    assert visible("naïve 漢字 x² – ok") == "naïve 漢字 x² – ok"


def test_rows_are_appended_a_line_each(tmp_path):
    append_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    append_jsonl(tmp_path / "rows.jsonl", [{"b": "\n"}])
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n{"b": "\\n"}\n'


def test_information_goes_to_stdout_and_warnings_to_stderr(capsys, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])
    configure_logging()
    configure_logging()
    log.info("written")
    log.warning("%d rows are left out", 3)
    assert capsys.readouterr() == ("written\n", "vold: 3 rows are left out\n")
    own = logging.NullHandler()
    monkeypatch.setattr(log, "handlers", [own])
    configure_logging()
    assert log.handlers == [own], "an application's own handler stays alone"
