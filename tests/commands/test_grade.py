"""`vold grade` as a process, on a file and on a pipe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vold.commands.grade import grade_file

CASES = Path(__file__).parents[1] / "grading" / "cases"
COMMAND = [sys.executable, "-m", "vold", "grade"]


def grade(file, text=None):
    return subprocess.run([*COMMAND, str(file)], input=text, capture_output=True, text=True, timeout=300)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


RIGHT = {"gold": "7", "response": r"\boxed{7}"}


def test_the_case_table_through_the_command():
    """Every key of every row stays as it was, in order, and the verdict is the one that the table expects."""
    path = CASES / "units.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    done = grade(path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{k: row[k] for k in case} for case, row in zip(cases, rows, strict=True)] == cases
    assert all(row["seconds"] >= 0 and "extracted" in row for row in rows)


def test_a_pipe_with_numbers_truncation_blank_lines_and_a_missing_newline():
    rows = [
        {"gold": 7, "response": r"\boxed{7}"},
        {**RIGHT, "finish_reason": "length", "id": 3},
        {**RIGHT, "gold": "{"},
    ]
    done = grade("-", lines(*rows[:2]) + "\n \n" + lines(rows[2]).rstrip("\n"))
    graded = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["verdict"], row["rule"]) for row in graded] == [
        ("correct", "identical"),
        ("wrong", "truncated"),
        ("broken", "gold"),
    ]
    assert graded[1]["id"] == 3 and graded[1]["extracted"] is None and done.returncode == 0


def test_rows_of_a_pipe_are_graded_as_they_arrive():
    with subprocess.Popen([*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            process.stdin.write(lines(RIGHT))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["verdict"] == "correct"


@pytest.mark.parametrize(
    ("line", "message"),
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
def test_a_bad_row_is_one_line_with_its_number_after_the_rows_before_it(tmp_path, capsys, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((lines(RIGHT) + "\n" + line + "\n" + lines(RIGHT)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        grade_file(path, workers=1)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value) and "\n" not in str(error.value)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "rows.jsonl").write_text("nope\n")
    for file, message in (
        ("rows.jsonl", "rows.jsonl:1: not JSON"),
        ("none.jsonl", "cannot be read"),
        (".", "cannot be read"),
    ):
        done = grade(tmp_path / file)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_closed_pipe_and_an_interrupt_print_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(RIGHT) * 20_000)  # more than any pipe holds
    with subprocess.Popen([*COMMAND, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background jobs, and all they start, ignore ctrl-c; a foreground job does not.
    foreground = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*COMMAND, "-"], **pipes, **foreground, text=True) as process:
        process.stdin.write(lines({"gold": "7", "response": r"\boxed{\sqrt{49}}"}))
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "" and process.wait(60) == 130
