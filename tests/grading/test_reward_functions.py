"""Reward functions of the user's own in their worker processes: what they get, return, and do wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from vold.config.schema import RewardConfig
from vold.config.schema.reward import function_spec
from vold.grading import worker_process, workers
from vold.grading.function_worker import SINGLE
from vold.grading.functions import FunctionPool, check_function_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward.py"
ROW = {
    "prompt": "What is 2 + 2?",
    "response_text": "so\n\\boxed{4}",
    "response_ids": [5, 6, 7],
    "gold": "4",
    "images": ["a.png"],
    "metadata": {"topic": "so", "tags": [1, {"a": None}]},
    "finish_reason": "stop",
}
OTHER = ROW | {"response_text": "\\boxed{5} \ud800", "finish_reason": "length"}

FUNCTIONS = """
import asyncio, os, signal, subprocess, sys, time
import neighbour

class Scalar:
    def __float__(self): return 0.25

async def never(): await asyncio.sleep(600)

def everything(prompt, response_text, response_ids, gold, images, metadata, finish_reason):
    cut = finish_reason == "length"
    return {"score": metadata["tags"][0], "ids": sum(response_ids), "pictures": len(images), "cut": cut}
def any_arguments(**row): return len(row)
def with_default(gold, scale=2): return float(gold) * scale
def scalar(gold): return Scalar()
def boolean(gold): return True
def uses_neighbour(gold): return neighbour.value()
def batch(prompts, golds): return [float(gold) for gold in golds]
async def batch_awaited(response_texts): await asyncio.sleep(0); return [len(text) for text in response_texts]
async def awaited(response_text): await asyncio.sleep(0.01); return "4" in response_text
def prints(gold): print("to nobody's pipe"); sys.stdout.flush(); os.write(1, b"{}\\n"); return 1
def raises(gold): return 1 / 0
def leaves(gold): sys.exit(3)
def nothing(gold): pass
def text(gold): return "0.5"
def not_finite(gold): return float("nan")
def infinite(gold): return {"score": 1, "extra": float("inf")}
def huge(gold): return 1e300
def no_score(gold): return {"reward": 1.0}
def text_value(gold): return {"score": 1.0, "note": "good"}
def a_list(gold): return [1.0]
def too_few(golds): return [1.0] * (len(golds) - 1)
def not_a_list(golds): return 1.0
def batch_with_a_hole(golds): return [1.0, None]
def words(gold): return {"score": 0, "feedback": " Carry the one. "}
def no_words(gold): return {"score": 1.0, "feedback": None}
def a_number_of_that_name(gold): return {"score": 0.0, "feedback": 0.5}
async def awaited_raises(gold): raise KeyError("topic")
async def one_never(response_text):
    if "5" in response_text: await never()
    return 1.0
"""
MORE = """
import os, signal, subprocess, sys, time
def computes(gold):
    while gold == "4": pass
    return 1
def waits(gold):
    if gold == "4": time.sleep(600)
    return 1
def in_a_child(gold):
    if gold == "4": subprocess.run([sys.executable, "-c", "import time; time.sleep(601)"])
    return 1
def crashes(gold):
    if gold == "4": os.kill(os.getpid(), signal.SIGSEGV)
    return 1
def eats(gold):
    return len(bytearray(1 << 40))
"""


def names(source):
    return [line.split("(")[0].split()[-1] for line in source.splitlines() if line.startswith(("def", "async def"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "neighbour.py").write_text("def value(): return 0.75\n")
    (folder / "rewards.py").write_text(FUNCTIONS)
    (folder / "hostile.py").write_text(MORE)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """name -> values or reason for ROW and for OTHER."""
    specs = [f"{folder}/rewards.py:{name}" for name in names(FUNCTIONS) if name != "never"]
    output = folder / "output.log"
    with FunctionPool(specs, workers=1, seconds=1.0, memory_gib=4.0, output=output) as pool:
        rows = pool.call([ROW, OTHER])
        assert pool.counters == {"timeouts": 0, "respawns": 0, "broken": 0}
        assert set(pool.files) == {f"{folder}/rewards.py", f"{folder}/neighbour.py"}
    assert "to nobody's pipe" in output.read_text()
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("everything", [{"score": 1.0, "ids": 18.0, "pictures": 1.0, "cut": cut} for cut in (0.0, 1.0)]),
        ("any_arguments", [{"score": float(len(SINGLE))}] * 2),
        ("with_default", [{"score": 8.0}] * 2),
        ("scalar", [{"score": 0.25}] * 2),
        ("boolean", [{"score": 1.0}] * 2),
        ("uses_neighbour", [{"score": 0.75}] * 2),
        ("batch", [{"score": 4.0}] * 2),
        ("batch_awaited", [{"score": 12.0}, {"score": 11.0}]),
        ("awaited", [{"score": 1.0}, {"score": 0.0}]),
        ("prints", [{"score": 1.0}] * 2),
        ("one_never", [{"score": 1.0}, "TimeoutError: no result within 1 s"]),
        ("batch_with_a_hole", [{"score": 1.0}, "returned None, which is no number"]),
    ],
)
def test_what_a_function_gets_and_gives(results, name, expected):
    assert results[name] == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "ZeroDivisionError: division by zero (rewards.py line 22)"),
        ("leaves", "SystemExit: 3 (rewards.py line 23)"),
        ("nothing", "returned None, which is no number"),
        ("text", "returned '0.5', which is no number"),
        ("not_finite", "returned nan; a reward is a finite number within ±1e+06"),
        ("infinite", "returned inf as 'extra'; a reward is a finite number within ±1e+06"),
        ("huge", "returned 1e+300; a reward is a finite number within ±1e+06"),
        ("no_score", "returned a dict without 'score'; it has 'reward'"),
        ("text_value", "returned 'good' as 'note', which is no number"),
        ("words", {"score": 0.0, "feedback": "Carry the one."}),
        ("no_words", {"score": 1.0}),
        ("a_number_of_that_name", {"score": 0.0, "feedback": 0.5}),
        ("a_list", "returned [1.0], which is no number"),
        ("too_few", "returned 1 values for 2 responses; return a list with one for each"),
        ("not_a_list", "returned float for 2 responses; return a list with one for each"),
        ("awaited_raises", "KeyError: 'topic' (rewards.py line 38)"),
    ],
)
def test_what_is_no_reward_has_a_reason_of_one_line(results, name, reason):
    assert results[name] == [reason] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("computes", "no result within 0.3 s (reward.seconds)"),
        ("waits", "no result within 0.3 s (reward.seconds)"),
        ("in_a_child", "no result within 0.3 s (reward.seconds)"),
        ("crashes", "it crashed its process twice"),
        ("eats", "MemoryError: (hostile.py line 16)"),
    ],
)
def test_a_function_that_hangs_or_crashes_is_ended_and_the_next_call_works(folder, name, reason):
    with FunctionPool([f"{folder}/hostile.py:{name}"], workers=1, seconds=0.3, memory_gib=2.0) as pool:
        assert pool.call([ROW]) == [{name: reason}]
        if name != "eats":
            assert pool.call([ROW | {"gold": "5"}]) == [{name: {"score": 1.0}}]
        assert not [line for line in processes() if "sleep(601)" in line]


def processes():
    return subprocess.check_output(["ps", "-eo", "args"], text=True).splitlines()


def test_a_function_that_waits_ends_with_its_trainer(folder):
    code = (
        "import os, signal, threading\n"
        "from vold.grading.functions import FunctionPool\n"
        f"pool = FunctionPool(['{folder}/hostile.py:waits'], 1, 60.0, 2.0)\n"
        "pool.start()\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        f"pool.call([{ROW!r}])"
    )
    trainer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(trainer.stdout)
    for _ in range(300):
        if not _alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its trainer")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_large_question_does_not_block_the_trainer(folder, monkeypatch):
    """More than a pipe holds, to a worker that does not read: stopped, and then killed."""
    monkeypatch.setattr(FunctionPool, "patience", 1)
    with FunctionPool([f"{folder}/rewards.py:boolean"], workers=1, seconds=0.1, memory_gib=2.0) as pool:
        row = ROW | {"response_text": "x" * 1_000_000}
        assert pool.call([row]) == [{"boolean": {"score": 1.0}}]
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)
        assert pool.call([row]) == [{"boolean": "it got no CPU time"}]
        assert pool.call([row]) == [{"boolean": {"score": 1.0}}]


BAD_FILES = {
    "a name that is not there": ("def f(gold): return 1", "the file has no function 'g'"),
    "a value": ("g = 3", "the file has no function 'g'"),
    "a syntax error": ("def g(:", r"importing the file failed: SyntaxError: invalid syntax \(mine.py, line 1\)"),
    "a missing module": ("import nobody_has_this", "importing the file failed: ModuleNotFoundError: No module named"),
    "an error on import": ("x = 1\n1 / 0", r"importing the file failed: ZeroDivisionError: .* \(mine.py line 2\)"),
    "an exit on import": ("raise SystemExit('bye')", "importing the file failed: SystemExit: bye"),
    "another's argument": ("def g(completions): pass", "it takes 'completions'; it may take prompt, response_text,"),
    "positions": ("def g(prompt, /): pass", "it takes 'prompt'; it may take"),
    "both forms": ("def g(prompt, golds): pass", "it takes 'golds' and 'prompt', of both forms"),
    "no argument": ("def g(): return 1", "it takes no argument"),
    "a training on import": (
        "from vold.grading.functions import FunctionPool\nFunctionPool(['mine.py:g'], 1, 1, 1)",
        "importing the file failed: ValueError: reward.function: its file starts a training when it is imported; put",
    ),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, mistake):
    text, reason = BAD_FILES[mistake]
    (tmp_path / "mine.py").write_text(text + "\n")
    with (
        FunctionPool([f"{tmp_path}/mine.py:g"], workers=1, seconds=1.0, memory_gib=2.0) as pool,
        pytest.raises(ValueError, match=rf"reward.function = {tmp_path}/mine.py:g: {reason}") as error,
    ):
        pool.start()
    assert "\n" not in str(error.value)


def test_a_file_that_never_finishes_importing(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(worker_process, "START_SECONDS", 1.5)
    monkeypatch.setattr(workers, "START_SECONDS", 1.5)
    with (
        FunctionPool([f"{tmp_path}/mine.py:g"], workers=1, seconds=1.0, memory_gib=2.0) as pool,
        pytest.raises(ValueError, match=r"reward.function = .*waited for 1.5 s"),
    ):
        pool.start()


def test_a_file_that_changes_under_a_running_pool_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def g(gold): return 1\n")
    with FunctionPool([f"{tmp_path}/mine.py:g"], workers=1, seconds=1.0, memory_gib=2.0) as pool:
        assert pool.call([ROW]) == [{"g": {"score": 1.0}}]
        (tmp_path / "mine.py").write_text("def g(gold): return 2\n")
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match=rf"{tmp_path}/mine.py changed while the run goes on"):
            pool.call([ROW])


def test_files_that_are_not_there_or_where_no_code_is_run(tmp_path):
    with pytest.raises(ValueError, match=r"none.py does not exist; paths are relative to the working directory"):
        check_function_file(f"{tmp_path}/none.py:g", {})
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.py").write_text("def g(gold): return 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "student" / "model.py")
    (tmp_path / "folder.py").mkdir()
    for name in ("student/model.py", "link.py", "student/../student/model.py"):
        with pytest.raises(ValueError, match=r"the file lies in student = .*, from which no code is run"):
            check_function_file(f"{tmp_path}/{name}:g", {"student": tmp_path / "student"})
    with pytest.raises(ValueError, match="is no regular file"):
        check_function_file(f"{tmp_path}/folder.py:g", {})


def test_the_example_gives_its_rewards():
    specs = [f"{EXAMPLE}:{name}" for name in ("right_steps", "shortest", "mentions_topic")]
    question = ROW | {"prompt": "<w4><w7>[6+9<+><5>*7]<w0><solve>", "metadata": {"topic": "box"}}
    responses = {
        "<think>6+9+5*7>..5+5*7>....0*7>......0</think>\\boxed{0}": (1.0, 1.0),
        "<think>6+9+5*7>..5+5*7>....1*7>......7</think>\\boxed{7}": (0.4, 1.0),
        "<think>6+9+5*7>..5+5*7>....0*7>......0</think>\\boxed{1}": (0.8, 1.0),
        "<think>5+9+5*7>..5+5*7": (0.0, 0.0),
    }
    with FunctionPool(specs, workers=2, seconds=5.0, memory_gib=4.0) as pool:
        results = pool.call([question | {"response_text": text} for text in responses])
    steps = [result["right_steps"] for result in results]
    assert [(values["score"], values["copied"]) for values in steps] == list(responses.values())
    assert [result["shortest"]["score"] for result in results] == [0.0, 0.0, 0.0, 1.0]
    assert [result["mentions_topic"]["score"] for result in results] == [1.0, 1.0, 1.0, 0.0]


# -- the config --------------------------------------------------------------------------------------------------------


def test_own_terms_replace_accuracy_unless_it_is_given():
    assert RewardConfig().weights == {"accuracy": 1.0, "format": 0.0}
    assert RewardConfig(function="a.py:f").weights == {"accuracy": 0.0, "format": 0.0, "f": 1.0}
    several = RewardConfig(function={"a.py:f": 0.3, "b.py:g": -1.0}, accuracy=0.7, format=0.1)
    assert several.weights == {"accuracy": 0.7, "format": 0.1, "f": 0.3, "g": -1.0}
    judged = RewardConfig(judge={"url": "http://localhost:1/v1", "model": "m", "weight": 2.0})
    assert judged.weights == {"accuracy": 0.0, "format": 0.0, "judge": 2.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("a.py", "must be PATH.py:NAME"),
        ("a.txt:f", "must be PATH.py:NAME"),
        ("a.py:f.g", "must be PATH.py:NAME"),
        ("a.py:1", "must be PATH.py:NAME"),
        ({"a.py:f": 1.0, "b.py:f": 1.0}, "f is the name of another term"),
        ("a.py:accuracy", "accuracy is the name of another term"),
        ({"a.py:f": 0.0}, "must be finite and not all 0"),
        ({"a.py:f": float("nan")}, "finite number"),
        ({}, "names no function"),
    ],
)
def test_specs_that_name_no_function(function, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig(function=function)


def reward_at_top_level(gold):
    return 1.0


def test_a_function_of_python_is_named_by_its_file():
    spec = f"{__file__}:reward_at_top_level"
    assert RewardConfig(function=reward_at_top_level).function == spec
    assert RewardConfig(function={reward_at_top_level: 0.5}, accuracy=1.0).function == {spec: 0.5}
    for hidden in (lambda gold: 1.0, len, test_a_function_of_python_is_named_by_its_file.__call__):
        with pytest.raises(ValueError, match=r"it must be a function at the top level of a .py file"):
            function_spec(hidden)
