"""`vold grade` as a person runs it: a process, a file or a pipe, and what comes out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vold.commands.grade import run

CASES = Path(__file__).parents[1] / "grading" / "cases"
COMMAND = [sys.executable, "-m", "vold", "grade"]


def grade(file, text=None):
    return subprocess.run([*COMMAND, str(file)], input=text, capture_output=True, text=True, timeout=300)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


RIGHT = {"gold": "7", "response": r"\boxed{7}"}


def test_the_case_table_through_the_command():
    """The file's rows as they are, in order, with the verdict the table expects and nothing of theirs lost."""
    path = CASES / "units.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    done = grade(path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{k: row[k] for k in case} for case, row in zip(cases, rows, strict=True)] == cases
    assert all(row["seconds"] >= 0 and "extracted" in row for row in rows)


def test_a_pipe_in_which_numbers_truncation_blank_lines_and_a_missing_newline_occur():
    rows = [
        {"gold": 7, "response": r"\boxed{7}"},
        {**RIGHT, "finish_reason": "length", "id": 3},
        {**RIGHT, "gold": "{"},
    ]
    done = grade("-", lines(*rows[:2]) + "\n \n" + lines(rows[2]).rstrip("\n"))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["verdict"], row["rule"]) for row in found] == [
        ("correct", "identical"),
        ("wrong", "truncated"),
        ("broken", "gold"),
    ]
    assert found[1]["id"] == 3 and found[1]["extracted"] is None and done.returncode == 0


def test_a_pipe_is_answered_as_it_speaks():
    with subprocess.Popen([*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            process.stdin.write(lines(RIGHT))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["verdict"] == "correct"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nope", "not JSON"),
        ("[1]", "found list"),
        ('{"gold": "7"}', '"response" is missing'),
        ('{"response": "7"}', '"gold" is missing'),
        ('{"gold": true, "response": "7"}', '"gold" is bool'),
        ('{"gold": "7", "response": null}', '"response" is NoneType'),
        ("[" * 100_000, "recursion"),
        ("9" * 5000, "limit"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number_after_the_rows_before_it(tmp_path, capsys, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((lines(RIGHT) + "\n" + line + "\n" + lines(RIGHT)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        run(path, workers=1)
    assert str(error.value).startswith(f"{path}:3: ") and says in str(error.value) and "\n" not in str(error.value)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "rows.jsonl").write_text("nope\n")
    for file, says in (
        ("rows.jsonl", "rows.jsonl:1: not JSON"),
        ("none.jsonl", "cannot be read"),
        (".", "cannot be read"),
    ):
        done = grade(tmp_path / file)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_and_a_person_who_interrupts_are_met_in_silence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(RIGHT) * 20_000)  # more than any pipe holds
    with subprocess.Popen([*COMMAND, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background jobs, and all they start, ignore ctrl-c; a person's foreground does not.
    ours = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*COMMAND, "-"], **ends, **ours, text=True) as process:
        process.stdin.write(lines({"gold": "7", "response": r"\boxed{\sqrt{49}}"}))
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "" and process.wait(60) == 130
