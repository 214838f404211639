"""Reward functions of the user's own, called in worker processes that can be killed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vold.grading.worker_process import Job, WorkerCommand
from vold.grading.workers import WorkerPool

IN_WORKER = "VOLD_REWARD_WORKER"  # set in workers' environment
Values = Mapping[str, float | str]
"""What a function returned: "score" and further numbers by name, and "feedback" in words if any."""


def check_function_file(spec: str, forbidden: Mapping[str, Path]) -> None:
    """Raise ValueError unless the file of PATH.py:NAME is a regular file outside the forbidden folders, by their names:
    code is never taken from a checkpoint or a run."""
    path = Path(spec.rpartition(":")[0])
    if not path.is_file():
        reason = "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"reward.function = {spec}: {path} {reason}; paths are relative to the working directory")
    for key, folder in forbidden.items():
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"reward.function = {spec}: the file lies in {key} = {folder}, from which no code is run; read it, and "
                "copy it elsewhere"
            )


class FunctionPool(WorkerPool):
    """Calls reward functions; use as a context manager. Not for several threads at once.

    specs       PATH.py:NAME of each
    workers     processes; each has imported the files of all functions
    seconds     CPU time of one call. One that waits, computing nothing, is ended after half as long again and 2 s
    memory_gib  address space of a process
    output      file that gets what functions print; nowhere when None
    files       path, as in the specs -> SHA-256 of the functions' files and of what they import beside them
    """

    own_fault = "broken"
    patience = 10
    what = "reward workers"

    def __init__(
        self, specs: Sequence[str], workers: int, seconds: float, memory_gib: float, *, output: Path | None = None
    ) -> None:
        if os.environ.get(IN_WORKER):
            raise ValueError(
                "reward.function: its file starts a training when it is imported; put that under "
                'if __name__ == "__main__":'
            )
        arguments = (str(seconds), str(int(memory_gib * 2**30)), *specs)
        module = "vold.grading.function_worker"
        super().__init__(workers, WorkerCommand(module, arguments, 1.5 * seconds + 2.0, {IN_WORKER: "1"}, output))
        self.specs, self.seconds = tuple(specs), seconds
        self.files: dict[str, str] = {}
        self._forms: list[str] = []

    def start(self) -> None:
        """Start the first worker. Raises ValueError, in one line, where a file cannot be imported or a function cannot
        be called with what it would get."""
        while not any(worker.ready for worker in self._workers):
            self._start_missing(1)
            self._collect(None)
            self._expire()

    def call(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Values | str]]:
        """For each of the responses to a prompt (see function_worker.SINGLE): name of the function -> its values, or
        the reason why there are none."""
        self.start()
        jobs = [self._jobs(number, rows) for number in range(len(self.specs))]
        self._run([job for of_function in jobs for job in of_function])
        results: list[dict[str, Values | str]] = [{} for _ in rows]
        for spec, of_function in zip(self.specs, jobs, strict=True):
            values = [value for job in of_function for value in self._results(job)]
            for result, value in zip(results, values, strict=True):
                result[spec.rpartition(":")[2]] = value
        return results

    def _jobs(self, number: int, rows: Sequence[Mapping[str, Any]]) -> list[Job]:
        parts = [[row] for row in rows] if self._forms[number] == "one" else [list(rows)]
        return [Job(number, {"function": number, "rows": part}) for part in parts]

    def _results(self, job: Job) -> list[Values | str]:
        if job.reply is not None:
            return job.reply["results"]
        reasons = {
            "timeout": f"no result within {self.seconds:g} s (reward.seconds)",
            "crashed": "it crashed its process twice",
            "worker_died": "its process was killed twice from outside; out of memory?",
            "starved": "it got no CPU time",
        }
        return [reasons[job.rule]] * len(job.message["rows"])

    # -- what WorkerPool asks --------------------------------------------------------------------------------------

    def finish_job(self, job: Job, reply: Mapping[str, Any]) -> None:
        """See WorkerPool."""
        job.reply = reply
        job.close("done", "")

    def overdue_rule(self, worker) -> str:
        """See WorkerPool; a function that waits for something is over its time, one that computes is not."""
        return "timeout" if worker.sleeps() else super().overdue_rule(worker)

    def note_ready(self, message: Mapping[str, Any]) -> None:
        """Keep the forms of the functions. Raises ValueError where a file has changed since the first worker read
        it."""
        files = {self._shown(Path(path)): digest for path, digest in message["files"].items()}
        if self.files and (changed := changed_files(self.files, files)):
            raise ValueError(f"reward.function: {changed} changed while the run goes on; put it back, then --resume")
        self.files, self._forms = self.files or files, message["forms"]

    def start_error(self, reason: str) -> str:
        """See WorkerPool."""
        return f"reward.function = {reason}"

    def _shown(self, path: Path) -> str:
        """The path below the folder of a spec, as the spec writes it: a moved project has the same paths."""
        folders = [Path(spec.rpartition(":")[0]).parent for spec in self.specs]
        folder = next(folder for folder in folders if path.is_relative_to(folder.resolve()))
        return str(folder / path.relative_to(folder.resolve()))


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names of the files whose digests differ; "" where none does."""
    return ", ".join(sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)))
