"""`vold eval`, and the evaluations inside training: named problem sets, text or images, rule-based accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vold.config.schema import EvalConfig, EvaluationConfig, PromptConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.grading import Grader
from vold.models.tokenizer import load_tokenizer
from vold.records import Prompt, Rollout, Verdict
from vold.rollout import Sampler, open_sampler
from vold.stages.job import Job, open_job


@dataclass(frozen=True)
class Evaluator:
    """Prompts of every set, ready to be asked."""

    prompts: dict[str, list[Prompt]]
    config: EvaluationConfig

    @classmethod
    def load(cls, config: EvaluationConfig, tokenizer, prompt: PromptConfig) -> Evaluator:
        sets = {
            name: build_prompts(load_problems(data), tokenizer, prompt, data.on_error)
            for name, data in config.sets.items()
        }
        return cls(sets, config)

    def run(self, sampler: Sampler, grader: Grader, job: Job, seed: int) -> dict[str, list[dict]]:
        """Set name -> one row a problem (as in samples.jsonl), gathered over ranks."""
        return {
            name: job.gather(_answer(job.share(prompts), sampler, grader, self.config, seed))
            for name, prompts in self.prompts.items()
        }


def _answer(
    prompts: Sequence[Prompt], sampler: Sampler, grader: Grader, config: EvaluationConfig, seed: int
) -> list[dict]:
    rollouts = sampler.sample(prompts, config.sampling, responses=1, seed=seed) if prompts else []
    verdicts = grader.grade([(r.text, r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    return [answer_row(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]


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
    }


def summarise(rows: Sequence[dict]) -> dict[str, float]:
    """accuracy and its binomial standard error over the problems the grader could judge; shares and mean length."""
    judged = [row["reward"] for row in rows if row["reward"] is not None]
    count = max(len(judged), 1)
    accuracy = sum(judged) / count
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / count),
        "n": len(judged),
        "broken": len(rows) - len(judged),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / max(len(rows), 1),
        "mean_length": sum(row["response_tokens"] for row in rows) / max(len(rows), 1),
    }


def run(config: EvalConfig) -> None:
    """Evaluate one checkpoint directory; writes evaluation.json and samples.jsonl."""
    if not config.evaluation.sets:
        raise ValueError("evaluation.sets is empty; name at least one set with its path and layout")
    job = open_job(config, "eval", total=len(config.evaluation.sets))
    evaluator = Evaluator.load(config.evaluation, load_tokenizer(config.checkpoint), config.prompt)
    sampler = open_sampler(config, config.checkpoint, dtype=job.dtype, device=job.layout.device)
    with Grader(workers=config.grader_workers) as grader:
        rows = evaluator.run(sampler, grader, job, config.seed)
    if job.is_writer:
        result = {"checkpoint": str(config.checkpoint), "sets": {name: summarise(r) for name, r in rows.items()}}
        (config.run_dir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        lines = [json.dumps({"set": name, **row}) + "\n" for name, found in rows.items() for row in found]
        (config.run_dir / "samples.jsonl").write_text("".join(lines))
        for name, numbers in result["sets"].items():
            print(f"{name}: {numbers['accuracy']:.3f} ± {numbers['stderr']:.3f} of {numbers['n']}")
    job.log.close()
