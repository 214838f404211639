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
from vold.rollout.vllm.engines import StoredSizes, engine_options, load_sizes


@pytest.fixture
def copy(tmp_path):
    """copy(checkpoint, **fields): another directory, with these fields of its config.json."""

    def copy(checkpoint: Path, name: str = "copy", **fields) -> Path:
        found = export_checkpoint(checkpoint, tmp_path / name, [])
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


@pytest.mark.parametrize(
    ("dtype", "width", "line"),
    [
        (
            "float32",
            32,
            "^dtype = float32: vLLM on a CPU runs qwen3_5's recurrent layers in bfloat16 alone",
        ),
        (
            "bfloat16",
            48,
            "^linear_value_head_dim 48 of qwen3_5: vLLM on a CPU takes multiples of 32; use engine ",
        ),
    ],
)
def test_a_recurrent_model_that_vllm_cannot_run_on_a_cpu_is_one_line(copy, tiny_qwen3_5_dir, dtype, width, line):
    text = json.loads((tiny_qwen3_5_dir / "config.json").read_text())["text_config"]
    text |= {"linear_key_head_dim": 32, "linear_value_head_dim": width}
    with pytest.raises(ValueError, match=line):
        engine_options(copy(tiny_qwen3_5_dir, text_config=text), VllmConfig(), dtype)


def test_a_recurrent_model_has_no_prefix_cache_and_its_own_head(copy, tiny_qwen3_5_dir, tiny_student_dir):
    """A head tied by config.json's outer field alone, which transformers writes, is tied in vLLM too."""
    text = json.loads((tiny_qwen3_5_dir / "config.json").read_text())["text_config"]
    text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    options = engine_options(copy(tiny_qwen3_5_dir, text_config=text), VllmConfig(), "bfloat16")
    assert options["enable_prefix_caching"] is False
    assert options["hf_overrides"] == {"text_config": {"tie_word_embeddings": True}}
    told = copy(tiny_qwen3_5_dir, name="told", text_config=text | {"tie_word_embeddings": True})
    assert "hf_overrides" not in engine_options(told, VllmConfig(), "bfloat16")
    asked = VllmConfig(engine_options={"enable_prefix_caching": True})
    assert engine_options(tiny_student_dir, asked, "float32")["enable_prefix_caching"] is True
    assert "enable_prefix_caching" not in engine_options(tiny_student_dir, VllmConfig(), "float32")


def test_other_options_reach_the_engine_and_the_server(tiny_teacher_dir):
    from vold.commands.serve import server_command

    settings = VllmConfig(tensor_parallel_size=2, pipeline_parallel_size=3, engine_options={"max_num_seqs": 8})
    command = " ".join(server_command(tiny_teacher_dir, settings, dtype="bfloat16", where={"port": 1}))
    for option in ("--tensor-parallel-size 2", "--pipeline-parallel-size 3", "--max-num-seqs 8"):
        assert option in command
    assert settings.gpus == 6
