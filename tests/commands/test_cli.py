"""The `vold` command itself: help, version, and one line on standard error for every mistake."""

from __future__ import annotations

import importlib.metadata
import logging
import sys

import pytest

from vold import cli
from vold.io import log


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vold", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    printed = capsys.readouterr()
    assert printed.out == f"vold {importlib.metadata.version('vold')}\n" and printed.err == ""


@pytest.mark.parametrize(
    "verb", ["", *sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)]
)
def test_every_verb_has_help_under_both_names(monkeypatch, capsys, verb):
    texts = []
    for option in ("-h", "--help"):
        assert run(monkeypatch, *filter(None, [verb, option])) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and f"Usage: {f'vold {verb}'.strip()} " in texts[0]


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b[31m", "\x1e", "\u2028", "\u202e", "\x85"])
@pytest.mark.parametrize("arguments", [("rl", "{}.yaml"), ("{}",), ("grade", "{}.jsonl"), ("check", "{}", "a.yaml")])
def test_a_hostile_character_stays_on_the_one_line(monkeypatch, capsys, character, arguments):
    text = f"a{character}b"
    assert run(monkeypatch, *(argument.format(text) for argument in arguments)) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and printed.startswith("vold: ") and character not in printed[:-1]


def test_libraries_warnings_are_silent_and_ours_are_not(monkeypatch, capsys):
    """A CUDA build of torch warns about CUDA_HOME on a machine without a GPU."""
    run(monkeypatch, "watch", "/nowhere")
    capsys.readouterr()
    logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
    log.warning("a warning of vold")
    assert capsys.readouterr().err == "vold: a warning of vold\n"
