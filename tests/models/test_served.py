"""A teacher that vLLM runs: any architecture, but the student's tokens for texts, images and ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from vold.config.schema import VllmConfig
from vold.models.architecture import SUPPORTED_MODEL_TYPES
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.served import ServedModel
from vold.models.tokenizer import check_pair
from vold.rollout.vllm.engines import StoredSizes, load_sizes


@pytest.fixture
def copy(tmp_path):
    """copy(checkpoint, **fields): another directory, with these fields of its config.json."""

    def copy(checkpoint: Path, **fields) -> Path:
        found = export_checkpoint(checkpoint, tmp_path / "copy", [])
        config = json.loads((found / "config.json").read_text()) | fields
        (found / "config.json").write_text(json.dumps(config))
        return found

    return copy


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma3_text", "cohere"])
def test_only_a_teacher_in_vllm_may_be_of_any_architecture(copy, tiny_student_dir, tiny_teacher_dir, model_type):
    teacher = copy(tiny_teacher_dir, model_type=model_type)
    assert check_pair(tiny_student_dir, teacher, served=True) == check_pair(tiny_student_dir, tiny_teacher_dir)
    if model_type not in SUPPORTED_MODEL_TYPES:
        with pytest.raises(ValueError, match=f"model_type '{model_type}' is not supported"):
            check_pair(tiny_student_dir, teacher)


def test_a_tokenizer_that_divides_texts_otherwise_is_refused_by_name(copy, tiny_student_dir, tiny_teacher_dir):
    """The same vocabulary, but letters are made small first."""
    teacher = copy(tiny_teacher_dir)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"], tokenizer["normalizer"] = None, {"type": "Lowercase"}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=f"{teacher} divides a text into other tokens than {tiny_student_dir}"):
        check_pair(tiny_student_dir, teacher, served=True)


def test_an_image_that_is_another_token_is_refused_by_name(copy, tiny_student_dir):
    token = ServedModel.from_pretrained(tiny_student_dir).image_token_id
    teacher = copy(tiny_student_dir, image_token_id=token + 1)
    with pytest.raises(ValueError, match=f"an image is token id {token + 1} to {teacher} and {token} to"):
        check_pair(tiny_student_dir, teacher, served=True)


def test_images_go_at_their_own_size_where_the_processor_is_unknown(copy, tiny_student_dir, tiny_teacher_dir):
    assert load_sizes(tiny_teacher_dir) is None
    assert isinstance(load_sizes(copy(tiny_student_dir, model_type="qwen2_vl")), StoredSizes)


OURS_OR_UNSAFE = [
    "model",
    "trust_remote_code",
    "worker_extension_cls",
    "worker_cls",
    "tensor_parallel_size",
    "load_format",
    "allowed_local_media_path",
    "hf_overrides",
    "tokenizer",
    "middleware",
    "enable_lora",
    "api-key",
]


@pytest.mark.parametrize("name", OURS_OR_UNSAFE)
def test_options_that_are_vold_s_or_unsafe_are_refused(name):
    with pytest.raises(ValidationError, match=f"vllm.engine_options.{name} is not passed on"):
        VllmConfig(engine_options={name: "x"})


def test_other_options_reach_the_engine_and_the_server(tiny_teacher_dir):
    from vold.commands.serve import server_command

    settings = VllmConfig(tensor_parallel_size=2, pipeline_parallel_size=3, engine_options={"max_num_seqs": 8})
    command = " ".join(server_command(tiny_teacher_dir, settings, dtype="bfloat16", where={"port": 1}))
    for option in ("--tensor-parallel-size 2", "--pipeline-parallel-size 3", "--max-num-seqs 8"):
        assert option in command
    assert settings.gpus == 6
