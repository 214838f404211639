"""A pair of real tokenizers that asks in a chat template which is not the student's own, through every stage: traces,
SFT, `vold check`, RL, evaluation, export. The weights are random and narrow; tokenizers and templates are Qwen's
(`make test-real`)."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config
from transformers import Qwen2ForCausalLM as Qwen2
from transformers import Qwen3ForCausalLM as Qwen3

from vold import load_config
from vold.commands.export import export_model
from vold.commands.prepare import prepare_student
from vold.config.schema import ExportConfig
from vold.evaluation.evaluator import evaluate
from vold.planning.check import check_config
from vold.planning.rendering_check import RenderingCheck
from vold.rollout.transformers.sampler import TransformersSampler
from vold.run.run_dir import read_rows
from vold.train.rl import train_rl
from vold.train.sft import train_sft
from vold.train.teacher_traces import generate_traces

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers are in ../shared/data"),
]
END = 151645  # <|im_end|>
SIZES = dict(
    vocab_size=151_936,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    eos_token_id=END,
    pad_token_id=151643,
    bos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=False,
)
CHATS = [
    [("user", "What is 12 + 30?")],
    [("user", "Bonjour! 7×8 = ?")],
    [("user", "7×8?"), ("assistant", "<think>\n7*8\n</think>\n\n56"), ("user", "And times two?")],
    [("system", "Be brief."), ("user", "1+1?")],
]
GOLDS = ("42", "56", "112", "2")
# prompt.chat_template, its variables, what stands behind the last turn
FOREIGN = {
    "the teacher's, without thoughts": ("teacher", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    "a file that opens a thought": (SHARED / "templates" / "qwen3-thinking.jinja", {}, "<think>\n"),
}


def save(model, name: str, seed: int, directory: Path) -> Path:
    """With an end token that one response in ten meets at each place, so that some are whole."""
    torch.manual_seed(seed)
    model = model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0  # one width that is large at every token
        model.get_output_embeddings().weight[END, 0] = 2.5
    model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / f"{name}.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(SHARED / "templates" / f"{name}.jinja").read_text(),
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pair")
    config = {name: value for name, value in SIZES.items() if name != "head_dim"}
    base = save(lambda: Qwen2(Qwen2Config(**config)), "qwen2.5-vl", 0, root / "base")
    teacher = save(lambda: Qwen3(Qwen3Config(**SIZES)), "qwen3", 1, root / "teacher")
    prepare_student(base, teacher, root / "student")
    return {"student": root / "student", "teacher": teacher}


@pytest.fixture
def asked(monkeypatch) -> dict[str, list[int]]:
    """Prompt -> ids, of all that a sampler is asked while the test runs."""
    found: dict[str, list[int]] = {}
    stream = TransformersSampler.stream

    def spy(self, prompts, *args, **more):
        found.update({prompt.text: prompt.token_ids.tolist() for prompt in prompts})
        return stream(self, prompts, *args, **more)

    monkeypatch.setattr(TransformersSampler, "stream", spy)
    return found


@pytest.fixture
def trained(monkeypatch) -> dict[str, list[int]]:
    """Prompt -> ids, of all that a trainer, and the teacher beside it, are given."""
    found: dict[str, list[int]] = {}
    from vold.train import components

    pack = components.pack

    def spy(samples, **more):
        found.update({sample.prompt.text: sample.prompt.token_ids.tolist() for sample in samples})
        return pack(samples, **more)

    monkeypatch.setattr(components, "pack", spy)
    return found


def taken(found: dict[str, list[int]]) -> dict[str, list[int]]:
    before = dict(found)
    found.clear()
    return before


def config_of(run_dir: Path, **settings) -> Path:
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"run_dir": str(run_dir), "dtype": "float32", **settings}))
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_one_rendering_through_every_stage(kind, pair, asked, trained, tmp_path, layout, caplog):
    template, values, behind = FOREIGN[kind]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in chat], "answer": gold}
        for chat, gold in zip(CHATS, GOLDS, strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "chats.jsonl"), "layout": "messages"}
    student, teacher = (str(pair[name]) for name in ("student", "teacher"))
    prompt = {
        "suffix": "\nBox it.",
        "max_tokens": 128,
        "chat_template": str(pair.get(template, template)),
        "chat_template_kwargs": values,
    }
    sampling = {"max_new_tokens": 48, "sequences_per_call": 16}
    few = {
        "steps": 1,
        "seed": 3,
        "microbatch_tokens": 512,
        "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0},
    }

    file = config_of(
        tmp_path / "traces", teacher=teacher, data=data, prompt=prompt, sampling=sampling, max_tokens=300, seed=3
    )
    generate_traces(load_config(file))
    expected = taken(asked)
    assert len(expected) == len(CHATS)
    (shard,) = (tmp_path / "traces" / "traces").glob("*.parquet")
    kept = parquet.read_table(shard).to_pylist()
    assert kept and all(row["prompt_ids"] == expected[row["prompt"]] for row in kept)

    traces = {"path": str(tmp_path / "traces" / "traces"), "layout": "traces"}
    file = config_of(
        tmp_path / "sft",
        **few,
        student=student,
        pair_with=teacher,
        data=traces,
        prompt=prompt,
        batch_size=len(kept),
        max_tokens=300,
    )
    train_sft(load_config(file))
    assert taken(trained) == {row["prompt"]: expected[row["prompt"]] for row in kept}
    assert not [text for text in caplog.messages if "another rendering" in text]

    rl = dict(
        student=str(tmp_path / "sft" / "model"),
        teacher=teacher,
        data=data,
        prompt=prompt,
        rollout={**sampling, "max_new_tokens": 8, "responses_per_prompt": 2},
        prompts_per_step=len(CHATS),
        objective={"preset": "vold-unmasked", "beta": 0.1},
        evaluation={"every": 1, "sets": {"chats": data}, "sampling": {"max_new_tokens": 4}},
        save_every=1,
        grader_workers=1,
    )
    file = config_of(tmp_path / "rl", **few, **rl)
    rendering = RenderingCheck(load_config(file))
    assert f"prompts in the chat template of {prompt['chat_template']}" in rendering.check()
    mine, theirs = (next(column.cells).plain for column in rendering.table().columns)
    assert mine.endswith("assistant\n" + behind) and theirs.endswith("<|im_start|>assistant\n")
    check_config(load_config(file), 1)
    train_rl(load_config(file))
    assert taken(asked) == taken(trained) == expected, "rollouts and evaluation, student and teacher"
    assert all(row["kl_teacher"] > 0 for row in read_rows(tmp_path / "rl" / "metrics.jsonl"))

    export_model(ExportConfig(run=tmp_path / "rl", out=tmp_path / "out"))
    alone = {"suffix": prompt["suffix"], "max_tokens": 128}  # the exported student's own template says the rest
    file = config_of(
        tmp_path / "eval",
        checkpoint=str(tmp_path / "out"),
        prompt=alone,
        evaluation={"sets": {"chats": data}, "sampling": {"max_new_tokens": 4}},
    )
    evaluate(load_config(file))
    assert taken(asked) == expected
    for directory in (tmp_path / "out", tmp_path / "rl" / "model", tmp_path / "sft" / "model"):
        own = AutoTokenizer.from_pretrained(directory)
        for chat in CHATS:
            *before, (role, text) = chat
            turns = [{"role": r, "content": t} for r, t in (*before, (role, text + prompt["suffix"]))]
            ids = own.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert ids == expected[text] and own.decode(ids).endswith("<|im_start|>assistant\n" + behind)
