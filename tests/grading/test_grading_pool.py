"""The pool under hostile answers: killed, replaced, counted, and never at the cost of the next answer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from vold.grading import Grader, pool, worker_process, workers

SECONDS = 2.0
HARD = [(rf"\sqrt{{{12 * n * n}}}", rf"{2 * n}\sqrt{{3}}") for n in range(2, 8)]  # equal, but need a worker
HANGING = {
    "factorial": "100000000!",
    "braces": "{" * 10_000 + "7" + "}" * 10_000,
    "digits": "9" * 1_000_000,
    "braces below the cap": "{" * 2000 + "7" + "}" * 2000,
    "digits below the cap": "9" * 4000 + "+x",
    "powers below the cap": "9^{" * 500 + "9" + "}" * 500,
}


def boxed(answer):
    return rf"so \boxed{{{answer}}}"


@pytest.fixture(scope="module", autouse=True)
def patience():
    """On a busy machine a hostile answer waits for its CPU time, instead of being `starved`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_PATIENCE", 200)
        yield


@pytest.fixture
def grader():
    with Grader(workers=2, seconds=SECONDS) as grader:
        yield grader


@pytest.fixture(scope="module")
def shared():
    """One pool for the tests that only grade: starting workers is most of this file's time."""
    with Grader(workers=2, seconds=SECONDS) as grader:
        yield grader


def warm(grader):
    """Both workers up, so that a measured time is the answer's own."""
    verdicts = grader.grade([(boxed(answer), gold, False) for answer, gold in HARD])
    assert [v.outcome for v in verdicts] == ["correct"] * len(HARD)
    while not all(worker.ready for worker in grader._workers):
        grader._collect(None)


@pytest.mark.timeout(300)  # unlimited, each of these hangs for ever; no test asserts a time on a shared machine
@pytest.mark.parametrize("name", HANGING)
def test_a_hanging_answer_is_wrong_and_the_next_one_right(shared, name):
    warm(shared)
    (verdict,) = shared.grade([(boxed(HANGING[name]), "7", False)])
    assert verdict.outcome == "wrong"
    assert shared.grade([(boxed(HARD[0][0]), HARD[0][1], False)])[0].outcome == "correct"


def test_two_bad_answers_do_not_poison_two_workers(grader):
    bad = [(boxed("100000000!"), "7", False), (boxed("9^{9^{9^9}}"), "8", False)]
    good = [(boxed(answer), gold, False) for answer, gold in HARD]
    verdicts = grader.grade(bad + good + bad + good)
    assert [v.outcome for v in verdicts] == (["wrong"] * 2 + ["correct"] * len(HARD)) * 2
    assert {v.rule for v in verdicts if v.outcome == "wrong"} == {"timeout"}
    assert grader.counters == {"timeouts": 2, "respawns": 2, "broken": 0}  # the repeated pair is graded once


def test_a_killed_idle_worker_is_replaced(grader):
    warm(grader)
    for worker in grader._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.2)
    warm(grader)
    assert grader.counters["respawns"] >= 1
    assert grader.counters["broken"] == 0


def test_a_worker_that_dies_on_an_answer_twice_breaks_it_and_only_it(grader, monkeypatch):
    send = workers.Worker.send

    def send_and_shoot(self, job):
        send(self, job)
        if job.question.answer == r"\sqrt{98}":
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(workers.Worker, "send", send_and_shoot)
    good = [(boxed(answer), gold, False) for answer, gold in HARD]
    verdicts = grader.grade([good[0], (boxed(r"\sqrt{98}"), r"7\sqrt{2}", False), *good[1:]])
    outcomes = [v.outcome for v in verdicts]
    assert outcomes == ["correct", "broken"] + ["correct"] * (len(HARD) - 1)
    assert verdicts[1].rule == "worker_died"
    assert grader.counters == {"timeouts": 0, "respawns": 2, "broken": 1}


def test_an_answer_that_crashes_its_worker_twice_is_wrong_not_masked(monkeypatch):
    send = workers.Worker.send

    def send_and_crash(self, job):
        send(self, job)
        os.kill(self.process.pid, signal.SIGSEGV)

    monkeypatch.setattr(workers.Worker, "send", send_and_crash)
    with Grader(workers=1, seconds=SECONDS) as grader:
        (verdict,) = grader.grade([(boxed(HARD[0][0]), HARD[0][1], False)])
        assert (verdict.outcome, verdict.rule) == ("wrong", "crashed")
        assert grader.counters == {"timeouts": 0, "respawns": 2, "broken": 0}


def test_an_answer_on_which_the_parser_raises_is_wrong(shared):
    (verdict,) = shared.grade([(boxed(r"7 \mod 10"), "7", False)])  # TypeError in math-verify 0.9
    assert (verdict.outcome, verdict.rule) == ("wrong", "unparsed")


def test_a_gold_on_which_the_parser_raises_by_itself_is_broken():
    from vold.grading.worker import _answer

    def compare(answer, gold):
        raise KeyError("a huge expression")

    assert _answer(compare, b'{"answer": "7", "gold": "x"}') == {"error": "KeyError"}


def test_a_worker_that_dies_once_costs_nothing(grader, monkeypatch):
    send, shots = workers.Worker.send, []

    def shoot_once(self, job):
        send(self, job)
        if not shots:
            shots.append(os.kill(self.process.pid, signal.SIGKILL))

    monkeypatch.setattr(workers.Worker, "send", shoot_once)
    warm(grader)
    assert grader.counters["respawns"] == 1


def test_a_worker_without_cpu_is_waited_for_and_then_broken_not_wrong(monkeypatch):
    send = workers.Worker.send

    def send_and_stop(self, job):
        send(self, job)
        os.kill(self.process.pid, signal.SIGSTOP)

    monkeypatch.setattr(workers.Worker, "send", send_and_stop)
    monkeypatch.setattr(pool, "_PATIENCE", 4)
    with Grader(workers=1, seconds=0.5) as grader:
        (verdict,) = grader.grade([(boxed(HARD[0][0]), HARD[0][1], False)])
        assert (verdict.outcome, verdict.rule) == ("broken", "starved")
        assert verdict.seconds >= 4 * 0.5
        assert grader.counters == {"timeouts": 0, "respawns": 1, "broken": 1}


def test_a_hanging_answer_that_gets_little_cpu_is_a_timeout_not_broken(monkeypatch):
    """As on a loaded machine: its worker runs a little at a time, through several windows of patience."""
    monkeypatch.setattr(pool, "_PATIENCE", 7)
    finished = threading.Event()

    def hold_back(pid):
        """Let it compute 0.05 s at a time, with pauses of a third of the window."""
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            process = psutil.Process(pid)
            while not finished.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.7)
                os.kill(pid, signal.SIGCONT)
                used = sum(process.cpu_times()[:2])
                while sum(process.cpu_times()[:2]) < used + 0.05 and not finished.wait(0.01):
                    pass

    windows = []
    monkeypatch.setattr(
        workers.Worker, "end_window", lambda self, now, end=workers.Worker.end_window: windows.append(end(self, now))
    )
    with Grader(workers=1, seconds=0.3) as grader:
        warm(grader)
        thread = threading.Thread(target=hold_back, args=(grader._workers[0].process.pid,))
        thread.start()
        (verdict,) = grader.grade([(boxed("100000000!"), "7", False)])
        finished.set()
        thread.join()
        assert (verdict.outcome, verdict.rule) == ("wrong", "timeout")
        assert len(windows) > 1, "it would have been given up after the first"
        assert grader.counters == {"timeouts": 1, "respawns": 1, "broken": 0}


def test_time_in_which_the_trainer_itself_was_stopped_is_no_starvation(shared):
    warm(shared)
    worker = shared._workers[0]
    worker.end_window(worker.deadline + 2 * worker_process.LATE)
    assert worker.idle_windows == 0
    worker.end_window(worker.deadline)
    worker.end_window(worker.deadline)
    assert worker.idle_windows == 2, "it has nothing to do and gets no CPU time"


@pytest.fixture
def kill_at_start(monkeypatch):
    """kill_at_start(n): the next n workers are killed before they are ready, as by a system without memory."""
    monkeypatch.setattr(workers, "START_DELAYS", (0.0, 0.05, 0.1, 0.2))
    start, left = workers.Worker.__init__, [0]

    def start_and_shoot(self, command):
        start(self, command)
        if left[0] > 0:
            left[0] -= 1
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(workers.Worker, "__init__", start_and_shoot)
    return lambda n: left.__setitem__(0, n)


def test_workers_killed_while_starting_are_started_again(grader, kill_at_start):
    kill_at_start(3)
    warm(grader)
    assert grader.counters == {"timeouts": 0, "respawns": 3, "broken": 0}


def test_workers_that_never_start_end_the_run_in_one_line(grader, kill_at_start):
    kill_at_start(99)
    with pytest.raises(
        ValueError, match=r"died 4 times in a row while starting \(killed by SIGKILL\); free some memory"
    ):
        warm(grader)
    kill_at_start(0)
    warm(grader)


def test_one_worker_is_enough_where_no_second_starts(grader, kill_at_start):
    grader.grade([(boxed(HARD[0][0]), HARD[0][1], False)])
    kill_at_start(99)
    verdicts = grader.grade([(boxed(answer), gold, False) for answer, gold in HARD])
    assert [v.outcome for v in verdicts] == ["correct"] * len(HARD)


def test_a_signal_to_the_whole_job_leaves_the_workers_to_their_trainer(shared):
    """Schedulers send SIGTERM to every process: the step under way still has answers to grade."""
    warm(shared)
    respawns = shared.counters["respawns"]
    for worker in shared._workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(worker.process.pid, number)
    warm(shared)
    assert shared.counters["respawns"] == respawns


def test_a_worker_close_to_its_memory_limit_is_retired(monkeypatch):
    monkeypatch.setattr(pool, "MAX_BYTES", 120 << 20)  # sympy needs about 70 MiB: above half, below the limit
    with Grader(workers=1, seconds=SECONDS) as grader:
        verdicts = grader.grade([(boxed(answer), gold, False) for answer, gold in HARD[:2]])
        assert [v.outcome for v in verdicts] == ["correct", "correct"]
        assert grader.counters["respawns"] == 2


def test_order_truncation_and_missing_boxes(grader):
    items = [
        (boxed("7"), "7", False),
        (boxed(HARD[0][0]), HARD[0][1], False),
        (boxed("7"), "7", True),
        ("7", "7", False),
        (boxed("8"), "7", False),
        (boxed(r"\sqrt{2}"), "7", False),
        (boxed("7"), "", False),
        (boxed("9" * 5000), "7", False),
    ]
    verdicts = grader.grade(items)
    assert [(v.outcome, v.rule) for v in verdicts] == [
        ("correct", "identical"),
        ("correct", "algebra"),
        ("wrong", "truncated"),
        ("wrong", "no_answer"),
        ("wrong", "number"),
        ("wrong", "algebra"),
        ("broken", "gold"),
        ("wrong", "too_long"),
    ]
    assert verdicts[1].extracted == HARD[0][0] and verdicts[2].extracted is None
    assert grader.counters["broken"] == 1


def test_plain_numbers_start_no_worker(grader):
    import vold.types  # noqa: F401  torch's import is not the grader's time

    before = time.process_time()
    verdicts = grader.grade([(boxed(n % 10), "7", False) for n in range(240)])
    assert time.process_time() - before < 0.2
    assert sum(v.outcome == "correct" for v in verdicts) == 24
    assert not grader._workers


def test_lone_surrogates_reach_the_worker(shared):
    verdict, _ = shared.grade([(boxed("\\sqrt{2}\ud800"), "7", False), (boxed(HARD[0][0]), HARD[0][1], False)])
    assert verdict.outcome == "wrong"


def test_bad_arguments_name_the_field():
    with pytest.raises(ValueError, match="workers"):
        Grader(workers=0)


def test_the_package_imports_neither_torch_nor_sympy():
    code = "import sys, vold.grading; print([m for m in ('torch', 'sympy', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_worker_imports_neither_torch_nor_gmpy2():
    code = (
        "import sys, io; sys.argv = ['worker', '2', '1073741824']; sys.stdin.close()\n"
        "from vold.grading import worker\n"
        "worker.lines = lambda parent: []\n"
        "worker.main()\n"
        "sys.stderr.write(str([m for m in ('torch', 'transformers', 'megatron', 'gmpy2') if sys.modules.get(m)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(run.stdout) == {"ready": True}
    assert run.stderr.endswith("[]")


def test_workers_die_with_a_parent_that_is_killed():
    """Even in the middle of an answer: SIGKILL leaves the parent no chance to tidy up."""
    code = (
        "import threading, os, signal\n"
        "from vold.grading import Grader\n"
        "grader = Grader(workers=1, seconds=1)\n"
        f"grader.grade([({boxed(HARD[0][0])!r}, {HARD[0][1]!r}, False)])\n"
        "print(grader._workers[0].process.pid, flush=True)\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        "grader.grade([(r'\\boxed{100000000!}', '7', False)])"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    worker = int(parent.stdout.split()[0])
    for _ in range(200):
        if not _alive(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
