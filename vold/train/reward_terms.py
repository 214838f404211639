"""Reward terms of the user's own: functions in worker processes, and a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from vold.config.schema import RewardConfig, RlConfig
from vold.grading.function_worker import FEEDBACK
from vold.grading.functions import FunctionPool, Values, changed_files, check_function_file
from vold.grading.judge import PLACE, Judge, Score
from vold.io import log, one_line_errors, write_atomically
from vold.objectives import Objective
from vold.run.job import Job
from vold.types import Group, Prompt, Rollout

RECORD = "reward.json"
OUTPUT = "reward.log"
KINDS = 20  # of failures that are warned of, for each rank


class RewardTerms:
    """Values of the functions and the judge for the responses to a prompt.

    routed_by: the term that routing reads, or None. output: file that gets each failure.
    """

    def __init__(self, functions: FunctionPool | None, judge: Judge | None, routed_by: str | None, output: Path):
        self._functions, self._judge, self._routed_by, self._output = functions, judge, routed_by, output
        self._warned: set[str] = set()

    def ask_judge(self, rollouts: Sequence[Rollout]) -> list[Future[Score | str]]:
        """Scores of the responses, that may still be under way; none where there is no judge."""
        if self._judge is None:
            return []
        return [self._judge.submit(reward_row(rollout)) for rollout in rollouts]

    def function_values(self, rollouts: Sequence[Rollout]) -> list[tuple[dict[str, float | None], str | None]]:
        """Name -> value of each response, `NAME.KEY` where a function returned a dict; None where it failed, which is
        logged. And what the functions say of it in words, if anything."""
        if self._functions is None:
            return [({}, None) for _ in rollouts]
        results = self._functions.call([reward_row(rollout) for rollout in rollouts])
        said = ([v[FEEDBACK] for v in result.values() if isinstance(v, dict) and FEEDBACK in v] for result in results)
        words = ["\n".join(text for text in texts if isinstance(text, str) and text) or None for texts in said]
        values = [self._flat(rollout, result) for rollout, result in zip(rollouts, results, strict=True)]
        return list(zip(values, words, strict=True))

    def judge_values(self, rollout: Rollout, judged: Future[Score | str]) -> dict[str, float | None]:
        """`judge` -> score of one response, None where there is none. Waits for it."""
        return self._flat(rollout, {"judge": judged.result()})

    def _flat(self, rollout: Rollout, results: Mapping[str, Values | str]) -> dict[str, float | None]:
        flat: dict[str, float | None] = {}
        term, _, routed_key = (self._routed_by or "").partition(".")
        for name, values in results.items():
            if isinstance(values, dict) and name == term and routed_key and routed_key not in values:
                values = f"returned a dict without {routed_key!r}, which objective.routing_term reads"
            if isinstance(values, str):
                self._report(name, values, rollout)
                values = {"score": None}
            numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
            flat |= {name if key == "score" else f"{name}.{key}": value for key, value in numbers.items()}
        return flat

    def _report(self, name: str, reason: str, rollout: Rollout) -> None:
        """Write a failure to the output, and warn of the first of its kind."""
        with self._output.open("a", encoding="utf-8") as file:
            file.write(f"{rollout.prompt.id} {name}: {reason}\n")
        kind = name + re.sub(r"\d+", "", reason)
        if kind not in self._warned and len(self._warned) < KINDS:
            self._warned.add(kind)
            log.warning(
                f"reward {name} failed on a response to {rollout.prompt.id}: {reason}; such responses are masked and "
                f"counted (reward_{name}_errors), each in {self._output}"
            )


def reward_row(rollout: Rollout) -> dict[str, Any]:
    """What functions and judge may read of a response (function_worker.SINGLE)."""
    prompt = rollout.prompt
    return {
        "prompt": prompt.text,
        "response_text": rollout.text,
        "response_ids": rollout.response_ids.tolist(),
        "gold": prompt.gold,
        "images": [str(path) for path in prompt.images],
        "metadata": json.loads(json.dumps(prompt.metadata, default=str)),  # dates and the like as text
        "finish_reason": rollout.finish_reason,
    }


@contextmanager
def open_reward_terms(config: RlConfig, objective: Objective, ranks: int) -> Iterator[RewardTerms | None]:
    """The run's own reward terms; None where it has none."""
    if not config.reward.has_own_terms:
        yield None
        return
    with ExitStack() as stack:
        functions = judge = None
        if config.reward.functions:
            functions = stack.enter_context(_function_pool(config, config.grader_workers))
        if config.reward.judge:
            judge = stack.enter_context(Judge(config.reward.judge, config.run_dir / "judge", ranks=ranks))
        yield RewardTerms(functions, judge, objective.routed_by, config.run_dir / OUTPUT)


def _function_pool(config: RlConfig, workers: int) -> FunctionPool:
    settings, output = config.reward, config.run_dir / OUTPUT
    return FunctionPool(
        list(settings.functions),
        workers,
        settings.seconds,
        settings.memory_gib,
        output=output if config.run_dir.is_dir() else None,
    )


class ProblemOptions(TypedDict):
    """Keywords of `load_problems`."""

    keep_metadata: bool
    needs_gold: bool | None


def problem_options(config: RlConfig, objective: Objective) -> ProblemOptions:
    """How `load_problems` reads the data: with the columns that the user's own terms may want, and without a gold
    answer where nothing asks for one."""
    by_answer = config.reward.accuracy or objective.routed_by == "accuracy"
    keep = config.reward.has_own_terms or bool(config.teacher_columns)
    return {"keep_metadata": keep, "needs_gold": bool(objective.needs_reward and by_answer)}


def check_judge_template(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError where the judge's template names what a problem does not have."""
    if config.judge is None:
        return
    places = [name for name in PLACE.findall(config.judge.template) if name not in ("prompt", "response", "gold")]
    for prompt in prompts if places else ():
        if strange := [name for name in places if name not in prompt.metadata]:
            columns = ", ".join(["prompt", "response", "gold", *prompt.metadata])
            raise ValueError(f"reward.judge.template: {{{strange[0]}}} is none of {columns} of {prompt.id}")


# -- before a model is loaded ------------------------------------------------------------------------------------------


@one_line_errors()
def check_reward_terms(config: RlConfig, objective: Objective) -> dict[str, str]:
    """Import the functions in a worker, as training does, and look for the judge's key. Returns {path: SHA-256} of the
    functions' files. Raises ValueError with one line for each mistake that can be seen without a response."""
    routed_by, names = objective.routed_by, list(config.reward.weights)
    if objective.uses_self_teacher:  # the grader's verdict says which sibling is right, whatever the reward is
        names = list(dict.fromkeys(["accuracy", *names]))
    if routed_by is not None and routed_by.partition(".")[0] not in names:
        raise ValueError(
            f"objective.routing_term = {routed_by!r} is no term of the reward; choose one of {', '.join(names)}, or "
            "NAME.KEY of what a function returns"
        )
    if judge := config.reward.judge:
        Judge(judge, config.run_dir / "judge").close()
    if not config.reward.functions:
        return {}
    folders = {"run_dir": config.run_dir, "student": config.student, "teacher": config.teacher}
    folders |= {f"teachers.{name}": teacher.path for name, teacher in config.teachers.items()}
    for spec in config.reward.functions:
        check_function_file(spec, {key: folder for key, folder in folders.items() if folder is not None})
    with _function_pool(config, 1) as pool:
        pool.start()
        return pool.files


def record_reward_files(job: Job, run_dir: Path, files: Mapping[str, str], *, resume: bool) -> None:
    """Write the digests of the functions' files to run_dir/reward.json, or compare them with what a resumed run was
    begun with. Raises ValueError that names the files that differ."""
    record = run_dir / RECORD
    if files and job.is_writer and not (resume and record.is_file()):
        write_atomically(record, json.dumps({"files": files}, indent=1) + "\n", durable=True)
    if not files or not resume:
        return
    before = json.loads(record.read_text())["files"] if job.is_writer else {}
    if changed := job.broadcast(changed_files(before, files) if job.is_writer else ""):
        raise ValueError(
            f"--resume: {changed} has changed since the run began (reward.function, {record}); put it back as it was, "
            "or start another run_dir"
        )


def term_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Where the reward has terms of the user's own: the mean of each named value over the responses that have it, and
    on how many responses each of these terms failed."""
    values = [of_response for group in groups for of_response in group.values]
    names = sorted({name for of_response in values for name in of_response})
    metrics: dict[str, float] = {}
    if not set(names) - {"accuracy", "format"}:
        return metrics
    for name in names:
        numbers = [value for of_response in values if (value := of_response.get(name)) is not None]
        metrics |= {f"reward_{name}": sum(numbers) / len(numbers)} if numbers else {}
        if name not in ("accuracy", "format") and "." not in name:
            metrics[f"reward_{name}_errors"] = float(len(values) - len(numbers))
    return metrics
