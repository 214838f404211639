"""`vold watch`: what it shows, and that it ends as it is told to, on a real terminal and off one."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from random import Random

import pytest
from made_up_runs import rl_metrics, write_run
from rich.console import Console

from vold.commands import watch
from vold.report import read_run
from vold.report.watch import is_finished, sparkline, view


def rendered(run, **more):
    out = io.StringIO()
    Console(file=out, width=90).print(view(run, **more))
    return out.getvalue()


def write(path, steps=45, planned=60):
    return write_run(
        path, config={"verb": "rl", "steps": planned}, metrics=rl_metrics(Random(0), teacher=True, steps=steps)
    )


def test_a_live_run_shows_where_it_is_and_when_it_will_end(tmp_path):
    run = read_run(write(tmp_path / "vold"))
    text = rendered(run, silent=3.0)
    assert "step 44 of 60" in text and "2.6 s a step" in text and "41.6 s left" in text and "last 3.0 s ago" in text
    for word in ("Reward", "Teacher KL", "Image accuracy", "Throughput", "rollout", "no warning in the last 20 steps"):
        assert word in text
    assert not is_finished(run)


def test_limits_and_silence_are_warned_of(tmp_path):
    path = write(tmp_path / "vold")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[-2] |= {"truncated": 0.4, "grad_norm": float("nan")}
    rows[3] |= {"broken": 7.0}  # long ago
    write_run(path, metrics=rows)
    text = " ".join(rendered(read_run(path), silent=3600.0).split())
    assert "Truncated: 40 %, healthy ≤ 10 %, on 1 of the last 20 steps. Look at: rollout.max_new_tokens" in text
    assert "Gradient norm: not finite" in text and "Broken" not in text
    assert "No step for 1 h 0 min; the slowest of the last 20 took 2.6 s" in text


def test_before_the_first_step_and_after_the_last(tmp_path):
    assert "waiting for the first step" in rendered(
        read_run(write_run(tmp_path / "new", config={"verb": "rl", "steps": 3}))
    )
    run = read_run(write(tmp_path / "old", steps=45, planned=44))
    assert is_finished(run) and "finished" in rendered(run, silent=1e6) and "No step" not in rendered(run, silent=1e6)


def test_hostile_names_are_shown_not_obeyed(tmp_path):
    row = {"step": 1, "reward": 0.5, "accuracy_[/x]\x1b[2J": 0.5, "seconds": 1.0, "seconds_[red]\x1b[2J": 1.0}
    text = rendered(read_run(write_run(tmp_path / "[b]x", config={"verb": "[/]\x1b[2J"}, metrics=[row])))
    assert (
        "\x1b" not in text
        and "[/]⟨001B⟩[2J" in text
        and "[b]x" in text
        and "left" not in text
        and "[red]⟨001B⟩" in text
    )


def test_sparklines():
    nan = float("nan")
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, nan, 3], width=3) == "▁ █" and sparkline([nan]) == "" and sparkline([2, 2]) == "▄▄"
    assert len(sparkline(range(10_000), width=30)) == 30


def test_off_a_terminal_it_prints_once(tmp_path, capsys):
    watch.watch_run(write(tmp_path / "vold"))
    assert "step 44 of 60" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no run directory \(no config\.yaml\); give"):
        watch.watch_run(tmp_path)


def _in_the_foreground():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and all they start, ignore it


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        session = {"start_new_session": True, "preexec_fn": _in_the_foreground}
        self.process = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, **ends, **session)
        self.before = termios.tcgetattr(theirs)
        self._ours, self._theirs, self.text = ours, theirs, ""

    def until(self, text, patience=180.0):
        end = time.monotonic() + patience
        while text not in self.text:
            ready, _, _ = select.select([self._ours], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} did not come: {self.text[-2000:]!r}"
            self.text += os.read(self._ours, 1 << 16).decode(errors="replace")

    def type(self, keys):
        os.write(self._ours, keys.encode())

    def end(self, patience=180.0):
        """Exit code, and whether the terminal is as it was."""
        end = time.monotonic() + patience
        while select.select([self._ours], [], [], 0.2)[0] or self.process.poll() is None:
            assert time.monotonic() < end, f"it goes on: {self.text[-2000:]!r}"
            if select.select([self._ours], [], [], 0.2)[0]:
                self.text += os.read(self._ours, 1 << 16).decode(errors="replace")
        code, same = self.process.wait(), termios.tcgetattr(self._theirs) == self.before
        os.close(self._ours), os.close(self._theirs)
        return code, same


@pytest.mark.parametrize("how", ["q", "ctrl-c", "finished"])
def test_on_a_terminal_it_follows_the_run_and_leaves_quietly(tmp_path, how):
    path = write(tmp_path / "vold", steps=3, planned=60)
    terminal = Terminal("vold", "watch", str(path))
    try:
        terminal.until("step 2 of 60")
        partial = tmp_path / "partial"
        partial.write_text((path / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
        partial.replace(path / "metrics.jsonl")  # as --resume does
        terminal.until("step 0 of 60")
        with (path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, "seconds": 1.0, "reward": 0.5}) + "\n" for step in range(1, 6))
        terminal.until("step 5 of 60")
        if how == "finished":
            with (path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 60, "seconds": 1.0, "reward": 0.5}\n')
        else:
            terminal.type({"q": "q", "ctrl-c": "\x03"}[how])
        assert terminal.end() == (0, True)
        assert "Traceback" not in terminal.text and ("finished" in terminal.text) == (how == "finished")
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
