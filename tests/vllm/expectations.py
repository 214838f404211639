"""Two exported checkpoints and what transformers makes of them: run in the main environment by tests/vllm/run.sh.

Usage: expectations.py DIRECTORY, which gets student/, teacher/, adapter/ (of the teacher), images and
expectations.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vold.config.schema import AdapterConfig, PromptConfig, SamplingConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.miniature import models, world
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.language_model import build_language_model
from vold.models.peft_directory import write_adapter
from vold.models.student import load_chunks
from vold.models.tokenizer import load_tokenizer
from vold.models.weight_rules import trained_rules
from vold.models.weights import export_adapters, export_weights, load_pretrained
from vold.parallel.launch import Layout, initialise, shutdown
from vold.rollout import TransformersSampler
from vold.types import Prompt, Rollout

GREEDY = SamplingConfig(max_new_tokens=24, temperature=0.0)
TEXTS, IMAGES = 3, 2
NOISE = 0.2
"""Added to every trained weight: other weights than the source's, and greedy choices that are never close (.02)."""


def main(out: Path) -> None:
    layout = initialise(seed=0)
    student_dir = _exported(models.base_config(), out / "student", layout)
    teacher_dir = _exported(models.teacher_config(), out / "teacher", layout)
    adapted_dir = _adapted(teacher_dir, out, layout)
    shutdown()
    prompts = _prompts(student_dir, out)
    rollouts = _sampler(student_dir).sample(prompts, GREEDY, responses=1, seed=0)
    scores = [_scores(rollouts, directory) for directory in (teacher_dir, adapted_dir)]
    facts = {
        "student": str(student_dir),
        "teacher": str(teacher_dir),
        "adapter": str(out / "adapter"),
        "real_ids": len(load_tokenizer(student_dir)),
        "image_id": Architecture.from_pretrained(student_dir).vision.image_token_id,
        "max_new_tokens": GREEDY.max_new_tokens,
        "cases": [_case(rollout, *scores) for rollout in rollouts],
    }
    (out / "expectations.json").write_text(json.dumps(facts, indent=1) + "\n")


def _exported(config, target: Path, layout: Layout) -> Path:
    """An untrained checkpoint, loaded, changed and exported as `vold export` does it."""
    source = target.with_name(f"{target.name}-source")
    models.save_checkpoint(models.new_model(config, seed=0), source)
    model = build_language_model(Architecture.from_pretrained(source), layout, torch.float32)
    load_pretrained(model, source)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
    return export_checkpoint(source, target, export_weights([model]))


def _adapted(base: Path, out: Path, layout: Layout) -> Path:
    """A LoRA adapter for `base` in out/adapter, and the model with it merged."""
    config = AdapterConfig(rank=8, alpha=16)
    (chunk,) = load_chunks(base, layout, torch.float32, adapter=config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter, _ in trained_rules(chunk):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    write_adapter(out / "adapter", base, config, export_adapters([chunk]))
    return export_checkpoint(base, out / "adapted", export_weights([chunk]))


def _scores(rollouts: list[Rollout], directory: Path) -> dict[str, list[float]]:
    model = _sampler(directory)
    return {rollout.prompt.id: model.score(rollout.prompt, rollout.response_ids) for rollout in rollouts[:TEXTS]}


def _prompts(student_dir: Path, out: Path) -> list[Prompt]:
    """Text prompts of different lengths, then one question about different images."""
    rng = np.random.default_rng(0)
    problems = [Problem(f"text{i}", world.text_question(world.sample_problem(rng, "test"), rng)) for i in range(TEXTS)]
    question = world.image_question(rng)
    pictures = world.render([world.sample_problem(rng, "test").expression for _ in range(IMAGES)], rng)
    for i, grey in enumerate(pictures):
        path = out / f"image{i}.png"
        Image.fromarray(grey).save(path)
        problems.append(Problem(f"image{i}", question, images=(path,)))
    tokenizer = load_tokenizer(student_dir)
    return [build_prompt(problem, tokenizer, PromptConfig(suffix="")) for problem in problems]


def _sampler(directory: Path) -> TransformersSampler:
    return TransformersSampler(directory, dtype=torch.float32, device=torch.device("cpu"))


def _case(rollout: Rollout, teacher: dict[str, list[float]], adapted: dict[str, list[float]]) -> dict:
    prompt = rollout.prompt
    return {
        "id": prompt.id,
        "prompt_ids": prompt.token_ids.tolist(),
        "images": [str(path) for path in prompt.images],
        "response_ids": rollout.response_ids.tolist(),
        "finish_reason": rollout.finish_reason,
        "logp_student": rollout.logp_rollout.tolist(),
        "logp_teacher": teacher.get(prompt.id),
        "logp_adapted": adapted.get(prompt.id),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
