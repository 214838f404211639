"""Every command that the pages show is executed with tiny models and data.

Where it needs a cluster, a GPU, vLLM or a network, its launcher, options, config and values are parsed as they are.
"""

from __future__ import annotations

import argparse
import functools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from unittest.mock import Mock

import pytest
from commands import BLOCK, ROOT, Command, commands, pages, python_blocks, shown_output, skeleton, untagged
from torch.distributed.run import get_args_parser

from vold import cli
from vold.miniature.__main__ import COMMANDS as MINIATURE
from vold.miniature.check import read_keys

COMMANDS = commands()


def only_read(command: Command) -> str:
    """The reason why a command is parsed but not run here; "" where it is run."""
    verb_arguments, text = command.vold, command.text
    if verb_arguments is None:
        return {"make": "make -n", "pip": "network"}.get(command.words[0], "a measurement")
    if "smollm2" in text.lower() or verb_arguments[0] == "convert":
        return "a real model: make test-real"
    if verb_arguments[0] == "serve" or "vllm" in text:
        return "vLLM"
    if "--nnodes" in text:
        return "several machines"
    if verb_arguments[0] == "selfplay" and len(verb_arguments) > 1:
        return "an untrained model's answers never agree: tests/selfplay/test_selfplay.py"
    return ""


def arguments(command: Command) -> list[str]:
    """Arguments of `vold`; a verb that the page only mentions is run with --help."""
    words = list(command.vold)
    return [*words, "--help"] if len(words) == 1 and not words[0].startswith("-") else words


def name(command: Command) -> str:
    return f"{command.where} {command.text}"


RUN = [command for command in COMMANDS if not only_read(command)]
BLOCKS = python_blocks()
INITS = [command.vold for command in COMMANDS if command.vold and command.vold[0] == "init"]
WRITTEN = {arguments[2] for arguments in INITS if len(arguments) > 2}


@pytest.fixture(scope="session")
def outcome(stand_in) -> dict[Command | str, list]:
    """Exit code, output and errors of each command that is run, in the order of the pages, then of their Python. What
    `vold` and `torchrun -m vold` are given alike is run once."""
    distinct = list(dict.fromkeys(tuple(arguments(command)) for command in RUN))
    outcomes = stand_in.outcomes("execute", [*distinct, *([BLOCK, code] for code in BLOCKS.values())])
    of_vold = dict(zip(distinct, outcomes, strict=False))
    of_python = dict(zip(BLOCKS, outcomes[len(distinct) :], strict=True))
    return {command: of_vold[tuple(arguments(command))] for command in RUN} | of_python


@pytest.mark.parametrize("command", RUN, ids=name)
def test_runs(outcome, command):
    code, output, error = outcome[command]
    if code:
        pytest.fail(f"exit code {code}: {output}{error}", pytrace=False)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(outcome, block):
    test_runs(outcome, block)


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_is_accepted(monkeypatch, command):
    monkeypatch.chdir(ROOT)
    if command.launcher is not None:
        launch = get_args_parser().parse_args(list(command.words[1:]))
        assert launch.module and launch.training_script == "vold"
    if command.vold is not None:
        accept_vold(monkeypatch, command)
    elif command.words[0] == "make":
        words = [f"PYTHON={sys.executable}", *command.words[1:]]
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True, timeout=60)
    elif command.words[:2] == ("pip", "install"):
        accept_pip(command.words[2:])
    else:
        accept_module(monkeypatch, command)


def accept_vold(monkeypatch, command: Command) -> None:
    """Parse the command line and the config (in place of one that `vold init` writes, the paper's); call nothing."""
    monkeypatch.setattr(cli, "_module", lambda name: Mock())
    words = ["configs/qwen2.5-vl-3b/vold.yaml" if word in WRITTEN else word for word in arguments(command)]
    monkeypatch.setattr(sys, "argv", ["vold", *(arguments(command) if command.vold[0] == "init" else words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@functools.cache
def refused_by_pip() -> str:
    """What pip's parser says of all pages' arguments of `pip install`: "" where it takes them."""
    parse = "import sys, shlex; from pip._internal.commands import create_command as make\n"
    parse += "for line in sys.stdin: make('install').parse_args(shlex.split(line))"
    lines = [shlex.join(command.words[2:]) for command in COMMANDS if command.words[:2] == ("pip", "install")]
    done = subprocess.run(
        [sys.executable, "-c", parse], input="\n".join(lines), capture_output=True, text=True, timeout=120
    )
    return done.stderr if done.returncode else ""


def accept_pip(words: tuple[str, ...]) -> None:
    """pip's own parser takes them; constraints, pins and extras that are named exist."""
    assert refused_by_pip() == ""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, word in zip(("", *words), words, strict=False):
        if option == "-c":
            assert (ROOT / word).is_file()
        elif option == "-e":
            assert {extra for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")} <= extras.keys()
        else:
            assert word.startswith("-") or word in pinned


class Accepted(Exception):
    pass


def accept_module(monkeypatch, command: Command) -> None:
    """`python -m MODULE ...` until its arguments are parsed; the miniature's verbs are those that its usage names."""
    if command.words[1].startswith(("examples/", "docs/figures/")):  # tests/examples and test_numbers run it
        assert (ROOT / command.words[1]).is_file()
        return
    program, option, module, *words = command.words
    assert (program, option) == ("python", "-m")
    if module == "vold.miniature":
        assert len(words) == 1 and words[0] in MINIATURE
        return
    if module == "vold.miniature.check":
        read_keys(words)
        return
    assert module.startswith("benchmarks."), "say here how far this module can be run"
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given, **named):
        parse(self, *given, **named)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Accepted):
        runpy.run_module(module, run_name="__main__")


SHOWN = shown_output()


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.where)
def test_what_a_page_shows_is_what_the_command_prints(outcome, shown):
    """Line by line but for numbers; "…" stands for what was left out."""
    ours = [command for command in RUN if command.words == shown.words]
    assert shown.python or ours, "the mark names no command of a page that is run"
    _, output, error = outcome[shown.python or ours[0]]
    printed = [skeleton(line) for line in f"{output}\n{error}".splitlines()]
    for line in map(skeleton, shown.lines):
        start, cut, _ = line.partition("…")
        assert any(found.startswith(start) if cut else found == line for found in printed), (line, output, error)


def test_no_command_hides_in_another_block():
    assert [line for page in pages() for line in untagged(page)] == []


def test_which_ran(capsys):
    """Shown by `pytest -rP`."""
    lines = [
        f"{'ran' if command in RUN else 'accepted (' + only_read(command) + ')':40} {name(command)}"
        for command in COMMANDS
    ]
    print("\n".join(lines))
    assert len(RUN) > 60, "commands that were run are now only read"
