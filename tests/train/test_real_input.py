"""The same verbs on real layouts, real Qwen tokenizers and a real vocabulary (151,936 head rows), tiny width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vold.commands import prepare
from vold.config import load_config, schema
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data (real tokenizers, MATH-500) is absent")

ROWS = 151_936
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = dict(
    vocab_size=ROWS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
    eos_token_id=151645,
    pad_token_id=151643,
    bos_token_id=None,
)


def save(model, tokenizer_file: Path, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Qwen2.5-VL with Qwen2.5's own tokenizer: no <think>. No image processor: this run has no images."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=32)
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("real") / "student"
    save(Qwen2_5_VLForConditionalGeneration(config), SHARED / "tokenizers" / "qwen2.5-vl.json", directory)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**TEXT, head_dim=16, rope_parameters=rope, tie_word_embeddings=False)
    directory = tmp_path_factory.mktemp("real") / "teacher"
    return save(Qwen3ForCausalLM(config), SHARED / "tokenizers" / "qwen3.json", directory)


@pytest.fixture(scope="module")
def prepared(student, teacher) -> Path:
    """The fix that the pair check proposes."""
    out = student.parent / "prepared"
    prepare.prepare_student(student, teacher, out)
    return out


def config_for(run_dir: Path, student: Path, teacher: Path, data: Path, layout: str, *more: str) -> schema.RlConfig:
    overrides = [
        f"run_dir={run_dir}",
        f"student={student}",
        f"teacher={teacher}",
        f"data.path={data}",
        f"data.layout={layout}",
        "evaluation={}",
        "steps=2",
        "prompts_per_step=4",
        "rollout.responses_per_prompt=4",
        "rollout.max_new_tokens=64",
        "prompt.max_tokens=1200",
        "optimizer.warmup_steps=1",
        *more,
    ]
    return load_config(schema.RlConfig, Path("vold/miniature/configs/rl.yaml").resolve(), overrides)


def orz_file(path: Path) -> Path:
    """GSM8K questions in the orz-57k layout."""
    rows = []
    for line in (SHARED / "gsm8k_test.jsonl").read_text().splitlines()[:40]:
        row = json.loads(line)
        truth = {"ground_truth": {"value": row["answer"].split("####")[1].strip()}}
        rows.append([{"from": "human", "value": row["question"]}, {"from": "assistant", **truth}])
    path.write_text(json.dumps(rows))
    return path


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, by elements."""

    elements = 0
    shape: tuple = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.shape = tensor.numel(), tuple(tensor.shape)
        return out


def test_a_student_without_think_is_stopped_with_the_fix(student, teacher, tmp_path, layout):
    with pytest.raises(ValueError) as error:
        train_rl(config_for(tmp_path / "run", student, teacher, SHARED / "math500.json", "orz-eval"))
    message = str(error.value)
    assert "'<think>' (id 151667)" in message and "151665" in message and "151668" in message
    assert f"vold prepare-student {student} {teacher}" in message and "\n" not in message


def test_two_steps_on_math500_without_a_tokens_by_vocabulary_tensor(prepared, teacher, tmp_path, layout):
    config = config_for(tmp_path / "run", prepared, teacher, SHARED / "math500.json", "orz-eval")
    with LargestTensor() as largest:
        train_rl(config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    tokens = rows[0]["response_tokens"]
    assert tokens > 700, "random weights rarely stop early"
    assert ROWS * 32 <= largest.elements < 0.5 * tokens * ROWS, f"{largest.shape} while N x V is {tokens} x {ROWS}"
    assert rows[0]["mismatch_max"] < 1e-3 and rows[0]["kl_teacher"] > 0
    assert all(row["reward"] == 0.0 for row in read_rows(config.run_dir / "samples.jsonl"))


def test_two_steps_on_an_orz_file(prepared, teacher, tmp_path, layout):
    config = config_for(tmp_path / "run", prepared, teacher, orz_file(tmp_path / "orz.json"), "orz")
    train_rl(config)
    assert [row["step"] for row in read_rows(config.run_dir / "metrics.jsonl")] == [1, 2]


def test_prompts_use_the_real_chat_markers(prepared):
    from vold.data.problems import load_problems
    from vold.data.prompts import build_prompts
    from vold.models.tokenizer import load_tokenizer

    data = schema.DataConfig(path=SHARED / "math500.json", layout="orz-eval")
    problems = load_problems(data)
    assert len(problems) == 500
    tokenizer = load_tokenizer(prepared)
    prompts = build_prompts(problems, tokenizer, schema.PromptConfig())
    assert prompts[0].token_ids[0] == 151644 and tokenizer.convert_ids_to_tokens(151667) == "<think>"
