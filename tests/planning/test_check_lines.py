"""`vold check`: one line for each problem, and rows shown as the model reads them."""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path

import pytest
from rich.console import Console

from vold.config import load_config, schema
from vold.data.packing import encode_text
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.planning import machine
from vold.planning.row_preview import row_preview
from vold.types import Prompt, Sample


def run_check(launch, world, run_dir: Path, stage: str, *arguments: str):
    return launch(
        1,
        "-m",
        "vold",
        "check",
        stage,
        f"vold/miniature/configs/{stage}.yaml",
        *world.overrides(stage, run_dir),
        *arguments,
    )


def test_a_valid_config_passes_every_check_and_the_self_test(launch, world, tmp_path):
    shm = [f"{engine}.weights_dir={tmp_path}" for engine in ("rollout.vllm", "teacher_vllm")]
    run = run_check(launch, world, tmp_path / "run", "rl", "--self-test", *shm)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = {line[2:].split()[0]: line for line in run.stdout.splitlines() if line[:2] in ("✓ ", "✗ ", "· ")}
    assert list(lines) == [
        *("versions", "method", "layout", "student", "teacher", "tokenizers", "rendering"),
        *("columns", "data", "evaluation", "run_dir", "leftovers", "disk", "memory", "self-test"),
    ]
    assert all(line.startswith("✓") for line in lines.values())
    assert "KL exactly 0 on each of 24 tokens" in lines["self-test"]
    assert "24 problems" in lines["data"] and "6 with images" in lines["evaluation"]
    assert "a response is sampled from here" in run.stdout and "<|image_pad|> × " in run.stdout
    assert not (tmp_path / "run").exists()


def test_every_mistake_has_its_line_and_the_exit_code_is_2(launch, world, tmp_path):
    (tmp_path / "rows.json").write_text('[[{"from": "human", "value": "1+1"}]]')
    mistakes = [f"data.path={tmp_path / 'rows.json'}", "microbatch_tokens=10", "keep_checkpoints=100000000"]
    run = run_check(launch, world, tmp_path / "run", "rl", *mistakes)
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr
    failed = [line for line in run.stdout.splitlines() if line.startswith("✗")]
    assert [line.split()[1] for line in failed] == ["method", "data", "disk"]
    assert "microbatch_tokens = 10 cannot hold" in failed[0] and "raise it" in failed[0]
    assert "rows.json row 1" in failed[1] and "data.on_error=skip" in failed[1]
    assert "GiB free at" in failed[2] and "lower keep_checkpoints" in failed[2]
    assert run.stderr.startswith("vold: 3 of 14 checks failed (method, data, disk): microbatch_tokens = 10 cannot hold")


def test_sft_traces_are_shown_with_what_is_trained(launch, world, tmp_path):
    run = run_check(launch, world, tmp_path / "run", "sft")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 traces" in run.stdout and "mask 0 × " in run.stdout and "sampled from here" not in run.stdout


def rendered(row, tokenizer, encode) -> str:
    console = Console(record=True, width=200, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(row_preview(row, tokenizer, encode))
    return console.export_text(styles=True)


def test_a_row_is_shown_with_ids_masks_and_special_tokens_in_colour(tiny_teacher_dir):
    tokenizer = load_tokenizer(tiny_teacher_dir)
    special = tokenizer.convert_tokens_to_ids("<user>")
    plain = tokenizer("1+2", add_special_tokens=False)["input_ids"]
    row = Sample(
        Prompt("set:7", (special, *plain), "1+2", gold="3"), (*plain[:1], tokenizer.eos_token_id), 0.0, 0.0, 0.0
    )
    text = rendered(row, tokenizer, encode_text)
    assert "set:7" in text and f"ids  \x1b[0m\x1b[2m{special} {plain[0]}" in text
    assert f"0 × {1 + len(plain)}" in text and "1 × 2" in text
    assert "\x1b[1;35m<user>\x1b[0m" in text and "\x1b[2m1" in text and "\x1b[32m1" in text


def test_an_image_is_shown_as_its_number_of_tokens(world, tiny_student_dir):
    config = load_config(schema.RlConfig, Path("vold/miniature/configs/rl.yaml"), world.overrides("rl", Path("unused")))
    encode, tokenizer = load_prompt_encoder(tiny_student_dir), load_tokenizer(tiny_student_dir)
    problems = load_problems(config.evaluation.sets["image"])
    prompt = build_prompts(problems, tokenizer, config.prompt)[0]
    count = encode.length(prompt) - len(prompt.token_ids) + 1
    pad = tokenizer.convert_ids_to_tokens(encode._processor.token_id)
    text = rendered(prompt, tokenizer, encode)
    assert (f"{pad} × {count}" if count > 1 else pad) in text and str(prompt.images[0]) in text


def test_versions_out_of_range_are_named_with_the_command_that_installs_others(monkeypatch, load, tmp_path):
    config, installed_version = load("rl", tmp_path / "run", "rollout.engine=vllm"), importlib.metadata.version
    faked = {"transformers": "4.40.0", "vllm": None}

    def version(name: str) -> str:
        if name in faked and faked[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return faked.get(name) or installed_version(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    with pytest.raises(ValueError) as error:
        machine.check_versions(config)
    message = str(error.value)
    assert "transformers 4.40.0 is not" in message and "pip install 'transformers" in message
    assert (
        "rollout.engine = 'vllm' and vLLM is not installed: pip install -c constraints-vllm.txt -e '.[vllm]'" in message
    )
    faked["transformers"] = None
    with pytest.raises(ValueError, match="transformers is not installed"):
        machine.check_versions(config)
