"""`vold eval`, and the evaluations inside training: accuracy on named problem sets of text or images, by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vold.config.schema import EvalConfig, EvaluationConfig, PromptConfig
from vold.data.packing import PromptEncoder
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.evaluation.scores import summarise
from vold.grading import Grader, grade_answers
from vold.io import log, to_json, write_atomically
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import load_prompt_encoder
from vold.rollout import Sampler, open_sampler
from vold.run.job import Job, open_job
from vold.run.run_dir import RunLog
from vold.types import Prompt, Rollout, Verdict


@dataclass(frozen=True)
class Evaluator:
    """The prompts of every evaluation set, by its name."""

    prompts: dict[str, list[Prompt]]
    config: EvaluationConfig

    @classmethod
    def load(cls, config: EvaluationConfig, tokenizer, prompt: PromptConfig, encode: PromptEncoder) -> Evaluator:
        """Read all sets. `encode` counts a prompt's tokens, those of its images included, for prompt.max_tokens."""
        sets = {
            name: build_prompts(load_problems(data), tokenizer, prompt, data.on_error, encode.length)
            for name, data in config.sets.items()
        }
        return cls(sets, config)

    def run(
        self, sampler: Sampler, grader: Grader, job: Job, seed: int, on_answered: Callable[[], None] = lambda: None
    ) -> dict[str, list[dict]]:
        """Set name -> one row a response (as in samples.jsonl), of all ranks; a problem's rows are adjacent.

        The progress line shows how many of its own problems rank 0 has answered. `on_answered` is called after each of
        this rank's problems. Raises ValueError where an engine lost a problem's responses.
        """
        rows = {}
        for name, prompts in self.prompts.items():
            local_prompts = job.shard(prompts)
            show_count = _status_of(job.log, name, len(local_prompts), on_answered)
            answers = self._answers(local_prompts, sampler, seed, show_count)
            rows[name] = [row for problem_rows in job.gather(_graded_rows(answers, grader)) for row in problem_rows]
        job.log.show_status("")
        return rows

    def _answers(
        self, prompts: Sequence[Prompt], sampler: Sampler, seed: int, show_count: Callable[[int], None]
    ) -> list[list[Rollout]]:
        """The responses to each prompt, in order."""
        answers: dict[str, list[Rollout]] = {}
        show_count(0)
        responses = self.config.responses_per_problem
        stream = sampler.stream(prompts, self.config.sampling, responses=responses, seed=seed) if prompts else ()
        for rollouts in stream:
            answers[rollouts[0].prompt.id] = rollouts
            show_count(len(answers))
        if len(answers) < len(prompts):
            missing = len(prompts) - len(answers)
            raise ValueError(f"{missing} evaluation prompts got no answer, see above; evaluate again")
        return [answers[prompt.id] for prompt in prompts]


def _status_of(run_log: RunLog, name: str, total: int, on_answered: Callable[[], None]) -> Callable[[int], None]:
    """A function that shows how many problems of a set are answered."""

    def show_count(count: int) -> None:
        run_log.show_status(f"{name}: {count}/{total} answered")
        if count:
            on_answered()

    return show_count


def _graded_rows(answers: Sequence[Sequence[Rollout]], grader: Grader) -> list[list[dict]]:
    """The rows of each problem."""
    flat = [rollout for rollouts in answers for rollout in rollouts]
    verdicts = iter(grade_answers(grader.grade, flat))
    return [[response_row(rollout, next(verdicts)) for rollout in rollouts] for rollouts in answers]


def response_row(rollout: Rollout, verdict: Verdict) -> dict:
    """A row of samples.jsonl: one graded response."""
    return {
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "extracted": verdict.extracted,
        "gold": rollout.prompt.gold,
        "choices": list(rollout.prompt.choices),
        "verdict": verdict.outcome,
        "rule": verdict.rule,
        "reward": float(verdict.outcome == "correct") if verdict.outcome != "broken" else None,
        "finish_reason": rollout.finish_reason,
        "response_tokens": len(rollout.response_ids),
        "images": [str(path) for path in rollout.prompt.images],
        "category": rollout.prompt.category,
    }


def evaluate(config: EvalConfig) -> None:
    """Evaluate one checkpoint directory; writes evaluation.json and samples.jsonl. Raises ValueError for a config that
    cannot work."""
    if not config.evaluation.sets:
        raise ValueError("evaluation.sets is empty; name at least one set with its path and layout")
    job = open_job(config, "eval", total=len(config.evaluation.sets))
    tokenizer, encode = load_chat_tokenizer(config.checkpoint, config.prompt), load_prompt_encoder(config.checkpoint)
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    job.log.set_total(sum(len(job.shard(prompts)) for prompts in evaluator.prompts.values()))
    sets = ", ".join(f"{name} {len(prompts)}" for name, prompts in evaluator.prompts.items())
    job.log.say(f"{config.run_dir}: checkpoint {config.checkpoint} · {sets} problems · answers by {config.engine}")
    sampler = open_sampler(config, config.checkpoint, dtype=job.dtype, device=job.layout.device)
    with Grader(workers=config.grader_workers, echo=config.grader_echo) as grader:
        rows = evaluator.run(sampler, grader, job, config.seed, job.log.advance)
    if job.is_writer:
        write_evaluation(config.run_dir, config.checkpoint, rows)
    job.log.say(f"finished: {config.run_dir / 'evaluation.json'}; to look at it: vold report {config.run_dir}")
    job.log.close()


def write_evaluation(run_dir: Path, checkpoint: Path, rows: dict[str, list[dict]]) -> None:
    """Write samples.jsonl, then evaluation.json, whose presence shows that the run is complete; log a line a set."""
    lines = [to_json({"set": name, **row}) + "\n" for name, set_rows in rows.items() for row in set_rows]
    write_atomically(run_dir / "samples.jsonl", "".join(lines))
    sets = {name: summarise(set_rows) for name, set_rows in rows.items()}
    result = {"checkpoint": str(checkpoint), "judge": "rule", "sets": sets}
    write_atomically(run_dir / "evaluation.json", to_json(result, indent=1) + "\n")
    for name, numbers in sets.items():
        line = f"{name}: {numbers['accuracy']:.3f} ± {numbers['stderr']:.3f} of {numbers['n']}"
        log.info(line + (f", maj@{numbers['k']} {numbers['majority']:.3f}" if numbers["k"] > 1 else ""))
