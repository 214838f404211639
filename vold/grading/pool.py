"""The grader: verdicts on boxed answers, decided here where that is safe and in worker processes where it is not
(vold.grading.workers)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vold.grading.equality import Undecided
from vold.grading.gold import validate_gold
from vold.grading.item import Item, extracted, judge
from vold.grading.worker_process import Job, WorkerCommand
from vold.grading.workers import WorkerPool

if TYPE_CHECKING:
    from vold.types import Verdict

MAX_BYTES = 1 << 30
_PATIENCE = 10  # a worker that gets no CPU time is waited for this many times `seconds`
_ENV = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}


class Grader(WorkerPool):
    """Grades responses; use as a context manager. Threads may share it.

    workers     processes, started when an answer first needs one
    seconds     CPU time of one answer in a worker; the kernel kills one that takes longer, and it is replaced. One that
                gets little CPU is waited for; one that gets none for 10 times as long is starved
    max_chars   longer answers are wrong ("too_long") without being read
    echo        what is copied from the problem is no answer (rule "echo"), where the item has the problem's text
    counters    since construction: timeouts, respawns (replacements for any reason), broken
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, max_chars: int = 4096, echo: bool = True):
        if workers < 1 or seconds <= 0 or max_chars < 1:
            raise ValueError(
                f"Grader needs workers >= 1, seconds > 0 and max_chars >= 1, got {workers}, {seconds} and {max_chars}"
            )
        arguments = (str(seconds), str(MAX_BYTES))
        super().__init__(workers, WorkerCommand("vold.grading.worker", arguments, _PATIENCE * seconds, _ENV))
        self.seconds, self.max_chars, self.echo = seconds, max_chars, echo

    def __enter__(self) -> Grader:
        return self

    def grade(self, items: Sequence[Item | tuple[str, str, bool]]) -> list[Verdict]:
        """Verdicts for items, or for (response, gold, truncated), in order.

        Truncated, boxless and oversized answers are wrong; so are those that hang ("timeout"), raise ("unparsed") or
        crash the worker twice ("crashed"). `broken` (mask the sample) is never the answer's doing: a worker killed
        twice from outside ("worker_died"), one that got no CPU ("starved"), a gold that `validate_gold` refuses
        ("gold") or that raises by itself (the exception's name).
        """
        from vold.types import Verdict  # records import torch, which workers must not

        jobs: dict[Undecided, Job] = {}  # a question is asked once, however many responses give the answer
        graded = [self._open(Item(*item), jobs) for item in items]
        self._run(list(jobs.values()))
        verdicts = [Verdict(job.outcome, answer, job.rule, job.seconds, gold) for answer, gold, job in graded]
        self.counters["broken"] += sum(verdict.outcome == "broken" for verdict in verdicts)
        return verdicts

    def _open(self, item: Item, jobs: dict[Undecided, Job]) -> tuple[str | None, str, Job]:
        """(answer, normalised gold, job): closed already where the policy decides, else one of `jobs`."""
        job = Job(started=time.monotonic())
        if not self.echo:
            item = item._replace(problem="")
        answer = extracted(item)
        try:
            normal = validate_gold(item.gold)
        except ValueError:
            job.close("broken", "gold")
            return answer, "", job
        if answer is None:
            job.close("wrong", "truncated" if item.truncated else "no_answer")
        elif len(answer) > self.max_chars:
            job.close("wrong", "too_long")
        else:
            decision = judge(item)
            if isinstance(decision, Undecided):
                message = {"answer": decision.answer, "gold": decision.gold}
                return answer, normal, jobs.setdefault(decision, Job(decision, message))
            job.close("correct" if decision[0] else "wrong", decision[1])
        return answer, normal, job

    def finish_job(self, job: Job, reply: Mapping[str, Any]) -> None:
        """See WorkerPool."""
        if "error" in reply:
            job.close("broken", reply["error"])
        else:
            job.close("correct" if reply["equal"] else "wrong", reply["rule"])
