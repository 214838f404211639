"""Whole distributions from a teacher in real vLLM beside the trainer's own: the same divergence of every token, and the
same gradient, for text and images, tied and untied heads, and other widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from test_sampler import make_prompts

from support.steps import LONGEST, gradients, make_trainer, relative
from vold.config.schema import ObjectiveConfig, VllmConfig
from vold.data.packing import pack
from vold.miniature import models
from vold.models.architecture import Architecture
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.objectives import build_objective
from vold.teacher import Teacher, VllmDistributions
from vold.types import Sample

pytestmark = pytest.mark.vllm

SETTINGS = VllmConfig(kv_cache_gib=0.25, max_model_len=128, enforce_eager=True)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def wide_teacher_dir(tmp_path_factory) -> Path:
    """Half again as wide as the student, with a head of its own."""
    config = models.teacher_config()
    config.hidden_size, config.tie_word_embeddings = 3 * config.hidden_size // 2, False
    directory = tmp_path_factory.mktemp("wide")
    models.save_checkpoint(models.new_model(config, seed=3), directory)
    return directory


@pytest.fixture(scope="module")
def seeing_teacher_dir(tmp_path_factory) -> Path:
    """A vision-language model as the student is one, with other weights."""
    directory = tmp_path_factory.mktemp("seeing")
    models.save_checkpoint(models.new_model(models.base_config(), seed=5), directory)
    return directory


@pytest.fixture(scope="module")
def samples(tiny_student_dir, tmp_path_factory) -> list[Sample]:
    """Responses of one to LONGEST tokens to texts and images, two to each prompt, of which one has no KL term."""
    prompts = make_prompts(tiny_student_dir, tmp_path_factory.mktemp("images"), size=(150, 70))
    generator, ids = torch.Generator().manual_seed(0), 40

    def response(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, ids, (length,), generator=generator).tolist())

    return [
        Sample(prompt, response(length), 0.5, 0.1, weight)
        for number, prompt in enumerate(prompts)
        for length, weight in ((1 + 4 * number, 0.1), (LONGEST, 0.1), (5, 0.0))
    ]


@pytest.fixture(scope="module")
def differences(tiny_student_dir, layout, samples):
    """(teacher, objective) -> (largest difference of a response's mean divergence, largest of a gradient relative to
    its parameter's largest) between the two teachers. Their engine is opened once."""
    opened: dict[Path, list] = {}
    rows = Architecture.from_pretrained(tiny_student_dir).vocab
    settings = {"dtype": torch.float32, "vocab_size": len(load_tokenizer(tiny_student_dir)), "temperature": 0.8}

    def open_both(checkpoint: Path) -> list:
        sees = Architecture.from_pretrained(checkpoint).vision is not None
        encode = load_prompt_encoder(checkpoint) if sees else None
        inside = Teacher(checkpoint, layout, full_distributions=True, encode=encode, **settings)
        return [inside, VllmDistributions(checkpoint, SETTINGS, layout, student_rows=rows, **settings)]

    def compare(checkpoint: Path, **objective) -> tuple[float, float]:
        opened[checkpoint] = opened.get(checkpoint) or open_both(checkpoint)
        objective = build_objective(ObjectiveConfig(preset="opd", **objective), LONGEST)
        trainer, found = make_trainer(tiny_student_dir, layout, objective=objective), []
        for teacher in opened[checkpoint]:
            weighted = teacher.drop_unscorable(samples)
            scored = teacher.score(pack(weighted, max_tokens=100, encode=load_prompt_encoder(tiny_student_dir)))
            assert len(scored.micro_batches) > 1
            stats = trainer.accumulate_gradients(scored)
            means = [(part.kl_B / part.kl_tokens_B)[part.kl_tokens_B > 0] for part in stats]
            found.append((torch.cat(means), gradients(trainer, scored)))
        (kl, gradient), (other_kl, other_gradient) = found
        scorable = sum(sample.kl_weight > 0 for sample in opened[checkpoint][0].drop_unscorable(samples))
        assert len(kl) == scorable and (kl > 1e-3).all()
        assert opened[checkpoint][1].metrics == {"teacher_failed": 0.0}
        return (kl - other_kl).abs().max().item(), relative(other_gradient, gradient)

    return compare


@pytest.mark.parametrize("teacher", ["tiny_teacher_dir", "wide_teacher_dir", "seeing_teacher_dir"])
@pytest.mark.parametrize("divergence", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "top_k": 5}])
def test_the_divergence_is_that_of_a_teacher_in_the_trainer(differences, request, teacher, divergence):
    """tied and text only; untied, wider; with eyes, on pictures that are resized."""
    divergence_gap, gradient_gap = differences(request.getfixturevalue(teacher), **divergence)
    assert divergence_gap <= TOLERANCE and gradient_gap <= 1e-4


def test_forward_kl_too(differences, wide_teacher_dir):
    divergence_gap, gradient_gap = differences(wide_teacher_dir, divergence="forward_kl")
    assert divergence_gap <= TOLERANCE and gradient_gap <= 1e-4
