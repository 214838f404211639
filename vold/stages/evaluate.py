"""`vold eval`, and the evaluations inside training: named problem sets, text or images, rule-based accuracy."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from vold.config.schema import EvalConfig, EvaluationConfig, PromptConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.grading import Grader, extract_answer
from vold.models.tokenizer import load_tokenizer
from vold.records import Prompt, Rollout, Verdict
from vold.rollout import Sampler, open_sampler
from vold.stages.job import Job, open_job
from vold.stages.scores import summarise


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
        """Set name -> one row a response (as in samples.jsonl), gathered over ranks; a problem's are adjacent."""
        found = {}
        for name, prompts in self.prompts.items():
            answered = job.gather(_answer(job.share(prompts), sampler, grader, self.config, seed))
            found[name] = [row for rows in answered for row in rows]
        return found


def _answer(
    prompts: Sequence[Prompt], sampler: Sampler, grader: Grader, config: EvaluationConfig, seed: int
) -> list[list[dict]]:
    """The rows of each prompt."""
    each = config.responses_per_problem
    rollouts = sampler.sample(prompts, config.sampling, responses=each, seed=seed) if prompts else []
    verdicts = grader.grade([(judged_text(r), r.prompt.gold, r.finish_reason == "length") for r in rollouts])
    rows = [answer_row(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
    return [rows[first : first + each] for first in range(0, len(rows), each)]


def judged_text(rollout: Rollout) -> str:
    r"""What the grader reads. Where the answer is an option's letter, its text in the box counts as well, and without a
    box the letter that the response names as its answer: "Answer: B", "the answer is (B)", or no more than "B. 12"."""
    choices, text = rollout.prompt.choices, rollout.text
    letters, boxed = string.ascii_uppercase[: len(choices)], extract_answer(text)
    if not choices or (boxed is not None and boxed in letters) or text.rfind("<think>") > text.rfind("</think>"):
        return text
    if boxed is not None:
        named = [letter for letter, choice in zip(letters, choices, strict=True) if boxed == choice.strip()]
    else:
        said = text.rpartition("</think>")[2].strip()
        named = [found[1]] if (found := _ALONE.fullmatch(said)) else _NAMED.findall(said)[-1:]
    return f"\\boxed{{{named[0]}}}" if len(named) == 1 and named[0] in letters else text


_ALONE = re.compile(r"\W*([A-Z])(?:[.:)*]\s.*|\W*)")
_NAMED = re.compile(r"(?i:\banswer(?:\s+is)?\s*:?\s*(?:option\s+)?)[*(]*([A-Z])(?=\s*(?:[.,:;)*]|$))", re.MULTILINE)


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
    evaluator = Evaluator.load(config.evaluation, load_tokenizer(config.checkpoint), config.prompt)
    sampler = open_sampler(config, config.checkpoint, dtype=job.dtype, device=job.layout.device)
    with Grader(workers=config.grader_workers) as grader:
        rows = evaluator.run(sampler, grader, job, config.seed)
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
