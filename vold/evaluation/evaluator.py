"""`vold eval`, and the evaluations inside training: named problem sets, text or images, rule-based accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vold.config.schema import EvalConfig, EvaluationConfig, PromptConfig
from vold.data.packing import PromptEncoder
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.evaluation.scores import summarise
from vold.grading import Grader, judged_text
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.rollout import Sampler, open_sampler
from vold.run.job import Job, open_job
from vold.run.run_dir import RunLog
from vold.types import Prompt, Rollout, Verdict


@dataclass(frozen=True)
class Evaluator:
    """Prompts of every set, ready to be asked."""

    prompts: dict[str, list[Prompt]]
    config: EvaluationConfig

    @classmethod
    def load(cls, config: EvaluationConfig, tokenizer, prompt: PromptConfig, encode: PromptEncoder) -> Evaluator:
        """`encode`: how the model reads prompts; its image tokens count in prompt.max_tokens."""
        sets = {
            name: build_prompts(load_problems(data), tokenizer, prompt, data.on_error, encode.length)
            for name, data in config.sets.items()
        }
        return cls(sets, config)

    def run(
        self, sampler: Sampler, grader: Grader, job: Job, seed: int, answered: Callable[[], None] = lambda: None
    ) -> dict[str, list[dict]]:
        """Set name -> one row a response (as in samples.jsonl), gathered over ranks; a problem's are adjacent. The
        progress line says how much of its own share the writing rank has answered; `answered` is called for each of
        this rank's problems."""
        found = {}
        for name, prompts in self.prompts.items():
            mine = job.share(prompts)
            answers = self._answers(mine, sampler, seed, _shower(job.log, name, len(mine), answered))
            found[name] = [row for rows in job.gather(_judged(answers, grader)) for row in rows]
        job.log.live("")
        return found

    def _answers(
        self, prompts: Sequence[Prompt], sampler: Sampler, seed: int, show: Callable[[int], None]
    ) -> list[list[Rollout]]:
        """The responses to each prompt, in order. Raises ValueError when an engine lost any."""
        found: dict[str, list[Rollout]] = {}
        show(0)
        each = self.config.responses_per_problem
        stream = sampler.stream(prompts, self.config.sampling, responses=each, seed=seed) if prompts else ()
        for rollouts in stream:
            found[rollouts[0].prompt.id] = rollouts
            show(len(found))
        if len(found) < len(prompts):
            raise ValueError(f"{len(prompts) - len(found)} evaluation prompts got no answer, see above; evaluate again")
        return [found[prompt.id] for prompt in prompts]


def _shower(log: RunLog, name: str, of: int, answered: Callable[[], None]) -> Callable[[int], None]:
    def show(count: int) -> None:
        log.live(f"{name}: {count}/{of} answered")
        if count:
            answered()

    return show


def _judged(answers: Sequence[Sequence[Rollout]], grader: Grader) -> list[list[dict]]:
    """The rows of each problem."""
    verdicts = iter(
        grader.grade([(judged_text(r), r.prompt.gold, r.finish_reason == "length") for found in answers for r in found])
    )
    return [[answer_row(rollout, next(verdicts)) for rollout in found] for found in answers]


def answer_row(rollout: Rollout, verdict: Verdict) -> dict:
    """What samples.jsonl shows of one graded response."""
    return {
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "extracted": verdict.extracted,
        "gold": rollout.prompt.gold,
        "verdict": verdict.outcome,
        "rule": verdict.rule,
        "reward": float(verdict.outcome == "correct") if verdict.outcome != "broken" else None,
        "finish_reason": rollout.finish_reason,
        "response_tokens": len(rollout.response_ids),
        "images": [str(path) for path in rollout.prompt.images],
        "category": rollout.prompt.category,
    }


def run(config: EvalConfig) -> None:
    """Evaluate one checkpoint directory; writes evaluation.json and samples.jsonl."""
    if not config.evaluation.sets:
        raise ValueError("evaluation.sets is empty; name at least one set with its path and layout")
    job = open_job(config, "eval", total=len(config.evaluation.sets))
    tokenizer, encode = load_tokenizer(config.checkpoint), load_prompt_encoder(config.checkpoint)
    evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
    job.log.expect(sum(len(job.share(prompts)) for prompts in evaluator.prompts.values()))
    sampler = open_sampler(config, config.checkpoint, dtype=job.dtype, device=job.layout.device)
    with Grader(workers=config.grader_workers) as grader:
        rows = evaluator.run(sampler, grader, job, config.seed, job.log.advance)
    if job.is_writer:
        write_evaluation(config, {name: summarise(found) for name, found in rows.items()}, rows)
    job.log.close()


def write_evaluation(config: EvalConfig, sets: dict[str, dict], rows: dict[str, list[dict]]) -> None:
    """samples.jsonl, then evaluation.json, whose presence says that the run is whole; one line a set is printed."""
    lines = [json.dumps({"set": name, **row}) + "\n" for name, found in rows.items() for row in found]
    (config.run_dir / "samples.jsonl").write_text("".join(lines))
    result = {"checkpoint": str(config.checkpoint), "judge": "rule", "sets": sets}
    (config.run_dir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, numbers in sets.items():
        line = f"{name}: {numbers['accuracy']:.3f} ± {numbers['stderr']:.3f} of {numbers['n']}"
        print(line + (f", maj@{numbers['k']} {numbers['majority']:.3f}" if numbers["k"] > 1 else ""))
