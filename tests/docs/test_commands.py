"""Every command that the pages show is executed with tiny models and data.

Where it needs a cluster, a GPU, vLLM or a network, its launcher, options, config and values are parsed as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
import tomllib
from unittest.mock import Mock

import pytest
from commands import BLOCK, ROOT, Command, commands, pages, program, python_blocks, untagged
from torch.distributed.run import get_args_parser

from vold import cli

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
def outcome(reader_dir) -> dict[Command | str, list]:
    """Exit code, output and errors of each command that is run, in the order of the pages, then of their Python."""
    file = reader_dir / "arguments.json"
    file.write_text(json.dumps([*map(arguments, RUN), *([BLOCK, code] for code in BLOCKS.values())]))
    outcomes = json.loads(program("execute.py", reader_dir, file).splitlines()[-1])
    return dict(zip([*RUN, *BLOCKS], outcomes, strict=True))


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
        subprocess.run(["make", "-n", *command.words[1:]], check=True, capture_output=True, timeout=60)
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


def accept_pip(words: tuple[str, ...]) -> None:
    """Parse with pip's own parser, which `--help` ends; constraints, pins and extras that are named exist."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *words, "--help"]
    subprocess.run(pip, check=True, capture_output=True, timeout=60)
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
        usage = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=120).stderr
        assert len(words) == 1 and words[0] in usage.split()
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
