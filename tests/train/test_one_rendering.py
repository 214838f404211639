"""One rendering of prompts for a pair of student and teacher, with the real tokenizers and templates of their families:
traces, SFT, RL, evaluation and the exported student's own template give the same ids."""

from __future__ import annotations

import io
import json
import os
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vold.config import load_config
from vold.config.schema import DataConfig, PromptConfig, SftConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt, build_prompts
from vold.data.renderings import Rendering
from vold.data.traces import TraceShard, load_samples
from vold.miniature.tokenizer import make_tokenizer
from vold.models.chat_template import load_chat_tokenizer, pair_prompt, write_chat_template
from vold.models.tokenizer import extend_tokenizer
from vold.planning.rendering_check import RenderingCheck
from vold.types import Rollout

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers are in ../shared/data")

PROBLEMS = [
    Problem("set:1", "What is $\\frac{1}{2} + \\frac{1}{3}$?", "5/6"),
    Problem("set:2", "Bonjour! 7×8 = ?\n", "56"),
    Problem(
        "set:3", "And times two?", "112", history=(("user", "7×8?"), ("assistant", "<think>\n7*8\n</think>\n\n56"))
    ),
]
THOUGHT = "<think>\nEasy.\n</think>\n\n\\boxed{1}"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The student's has the teacher's thinking tokens (vold prepare-student)."""
    student, teacher = (
        PreTrainedTokenizerFast(
            tokenizer_file=str(SHARED / "tokenizers" / f"{name}.json"),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        )
        for name in ("qwen2.5-vl", "qwen3")
    )
    extend_tokenizer(student, teacher)
    return {"qwen2.5-vl": student, "qwen3": teacher, "qwen3-thinking": teacher}


@pytest.fixture(scope="module")
def pair(tokenizers, tmp_path_factory) -> dict[str, Path]:
    """Checkpoint directories, as far as tokenizers need them."""
    made = {}
    for name, tokenizer in tokenizers.items():
        directory = tmp_path_factory.mktemp(name)
        tokenizer.chat_template = (SHARED / "templates" / f"{name}.jinja").read_text()
        tokenizer.save_pretrained(directory)
        SIZES[id(tokenizer)] = (directory / "tokenizer.json").stat().st_size
        made[name] = directory
    return made


@pytest.fixture
def quick(tokenizers, monkeypatch) -> None:
    """Real tokenizers take seconds to load: those of a directory are those it was made of, with its own template."""

    def load(path: Path) -> PreTrainedTokenizerFast:
        size = (path / "tokenizer.json").stat().st_size
        tokenizer = copy(next(t for t in tokenizers.values() if SIZES[id(t)] == size))
        tokenizer.chat_template = (path / "chat_template.jinja").read_text()
        return tokenizer

    monkeypatch.setattr("vold.models.chat_template.load_tokenizer", load)


SIZES: dict[int, int] = {}  # of tokenizer.json, by the tokenizer's identity


def write_traces(
    teacher: Path, prompt: PromptConfig, directory: Path, thought: str = THOUGHT, problems=tuple(PROBLEMS)
) -> DataConfig:
    """What `vold traces` leaves: prompts as it asks the teacher, and what the teacher would answer behind each."""
    tokenizer, prompt = load_chat_tokenizer(teacher, prompt), prompt.without_grading()
    prompts = build_prompts(problems, tokenizer, prompt)
    shard = TraceShard(directory, 0, tuple(prompts), 999, Rendering.of(tokenizer, prompt))
    rollouts = []
    for built in prompts:
        opened = tokenizer.decode(built.token_ids).endswith("<think>\n")
        text = thought.removeprefix("<think>\n") if opened else thought
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rollouts.append(Rollout(built, ids, (), "stop", thought))
    shard.add(rollouts)
    shard.finish()
    return DataConfig(path=directory, layout="traces")


# prompt.chat_template (None: each model's own), its variables, the teacher, prompt.system
CHOICES = [
    (None, {}, "qwen3", None),
    (None, {}, "qwen3", "Think first."),
    (None, {}, "qwen3-thinking", None),
    ("qwen3", {"enable_thinking": False}, "qwen3", None),
    ("qwen3-thinking", {}, "qwen3", None),
]


@pytest.mark.parametrize(("template", "values", "teacher", "system"), CHOICES)
def test_the_recipe_trains_and_asks_with_the_same_ids(template, values, teacher, system, quick, pair, tmp_path, caplog):
    """SFT on traces, RL, a teacher's own reading, and evaluation of the exported student by its own template."""
    student, named = pair["qwen2.5-vl"], pair[template] if template else None
    prompt = PromptConfig(system=system, suffix="\nBox it.", chat_template=named, chat_template_kwargs=values)
    data = write_traces(pair[teacher], prompt, tmp_path / "traces")
    tokenizer = load_chat_tokenizer(student, prompt)
    samples = load_samples(data, tokenizer, prompt, max_tokens=999, stop_ids=(tokenizer.eos_token_id,))
    asked = build_prompts(PROBLEMS, tokenizer, prompt)
    exported = shutil.copytree(student, tmp_path / "exported")
    write_chat_template(exported, prompt)
    own = AutoTokenizer.from_pretrained(exported)
    scorer = load_chat_tokenizer(pair["qwen3"], pair_prompt(prompt, student))  # as TeacherPromptEncoder does
    for problem, sample, rl in zip(PROBLEMS, samples, asked, strict=True):
        ids = rl.token_ids.tolist()
        turns = [*problem.history, ("user", f"{problem.question}\nBox it.")]
        turns = [("system", system), *turns] if system else turns
        chat = [{"role": role, "content": content} for role, content in turns]
        assert sample.prompt.token_ids.tolist() == ids, "SFT and RL"
        assert own.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ids, "the exported student"
        assert build_prompt(problem, scorer, prompt).token_ids.tolist() == ids, "the teacher"
        # a thought is opened once, by the prompt or by the response, and the response ends once
        whole = tokenizer.decode([*ids, *sample.response_ids])
        turn = whole.rpartition("<|im_start|>assistant\n")[2]
        assert turn.removeprefix("<think>\n\n</think>\n\n") == THOUGHT + "<|im_end|>"
    converted = [text for text in caplog.messages if "another rendering" in text]
    assert bool(converted) == (template is None)  # also with a system turn: Qwen3 drops the thoughts of earlier turns
    if converted and system is None:  # Qwen2.5-VL's own system turn is a default
        assert DEFAULT_SYSTEM.replace("\n", "\\n") in converted[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_is_compared(streaming, quick, pair, tmp_path, caplog):
    """Behind a system turn the two templates differ only in the thoughts of earlier turns: in the last row of 131."""
    plain, last = Problem("set:1", "1+1?", "2"), PROBLEMS[2]
    problems = [*(replace(plain, id=f"set:{number}") for number in range(130)), last]
    prompt = PromptConfig(system="Think first.", suffix="")
    data = write_traces(pair["qwen3"], prompt, tmp_path, problems=problems)
    data = data.model_copy(update={"streaming": streaming, "shuffle": not streaming})
    tokenizer = load_chat_tokenizer(pair["qwen2.5-vl"], prompt)
    samples = load_samples(data, tokenizer, prompt, max_tokens=999)
    asked = build_prompts(problems, tokenizer, prompt)
    assert all(samples[row].prompt.token_ids.tolist() == asked[row].token_ids.tolist() for row in (0, 100, 130))
    assert "7*8" in tokenizer.decode(samples[130].prompt.token_ids), "Qwen3 would leave the earlier thought out"
    (line,) = (text for text in caplog.messages if "another rendering" in text)
    assert "And times two?" not in line and "7×8?" in line


def test_traces_without_a_thought_are_refused_where_the_template_opens_one(quick, pair, tmp_path):
    data = write_traces(pair["qwen3"], PromptConfig(), tmp_path, thought="It is \\boxed{1}.")
    prompt = PromptConfig(chat_template=pair["qwen3-thinking"])
    with pytest.raises(ValueError, match=r"set:1: the trace does not begin with <think>.*set prompt\.chat_template"):
        load_samples(data, load_chat_tokenizer(pair["qwen2.5-vl"], prompt), prompt, max_tokens=999)


def test_traces_that_end_where_the_student_does_not_stop_are_refused(quick, pair, tmp_path):
    data, tokenizer = (
        write_traces(pair["qwen3"], PromptConfig(), tmp_path),
        load_chat_tokenizer(pair["qwen2.5-vl"], PromptConfig()),
    )
    with pytest.raises(
        ValueError, match=r"traces end with '<\|im_end\|>' \(id 151645\), at which the student does not"
    ):
        load_samples(data, tokenizer, PromptConfig(), max_tokens=999, stop_ids=(tokenizer.pad_token_id,))


def test_folders_of_several_renderings_are_refused(quick, pair, tmp_path):
    write_traces(pair["qwen3"], PromptConfig(), tmp_path)
    (tmp_path / "shard-00000.parquet").rename(tmp_path / "shard-00001.parquet")
    data = write_traces(pair["qwen3-thinking"], PromptConfig(), tmp_path)
    with pytest.raises(ValueError, match="holds traces of several renderings"):
        load_samples(data, load_chat_tokenizer(pair["qwen2.5-vl"], PromptConfig()), PromptConfig(), max_tokens=999)


def test_older_traces_without_a_record_are_read(quick, pair, tmp_path):
    """By what they are: rendered anew where they differ."""
    tokenizer = load_chat_tokenizer(pair["qwen3"], PromptConfig())
    (prompt,) = build_prompts(PROBLEMS[:1], tokenizer, PromptConfig(suffix=""))
    shard = TraceShard(tmp_path, 0, (prompt,), 999)
    shard.add([Rollout(prompt, (17, tokenizer.eos_token_id), (), "stop", "2")])
    shard.finish()
    student = load_chat_tokenizer(pair["qwen2.5-vl"], PromptConfig())
    (sample,) = load_samples(DataConfig(path=tmp_path, layout="traces"), student, PromptConfig(), max_tokens=999)
    assert sample.prompt == replace(
        prompt, token_ids=build_prompt(PROBLEMS[0], student, PromptConfig(suffix="")).token_ids
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"chat_template": "nowhere"},
            r"prompt\.chat_template = nowhere does not exist; name a checkpoint directory or",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            r"chat_template_kwargs\.enable_thinking: the chat templ",
        ),
        ({"chat_template_kwargs": {"a b": 1}}, r"chat_template_kwargs\.a b: the chat template has no such variable"),
    ],
)
def test_mistakes_in_the_section_are_one_line(prompt, message, quick, pair):
    with pytest.raises(ValueError, match=message) as error:
        load_chat_tokenizer(pair["qwen2.5-vl"], PromptConfig(**prompt))
    assert "\n" not in str(error.value)


def test_the_recipes_page_shows_what_vold_check_prints(quick, pair, tmp_path, monkeypatch):
    """Both renderings of the paper's pair, side by side."""
    (tmp_path / "checkpoints").mkdir()
    for name, family in (("Qwen2.5-VL-3B-think", "qwen2.5-vl"), ("Qwen3-8B", "qwen3")):
        (tmp_path / "checkpoints" / name).symlink_to(pair[family])
    monkeypatch.chdir(tmp_path)
    check = RenderingCheck(load_config(SftConfig, REPOSITORY / "configs" / "qwen2.5-vl-3b" / "sft.yaml", []))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(Text(f"rendering  {check.check()}"))
    console.print(check.table())
    shown = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    page = REPOSITORY / "docs" / "recipe.md"
    if os.environ.get("WRITE"):
        before, _, after = page.read_text().partition("```text\n")
        page.write_text(before + "```text\n" + shown + "\n```\n" + after.partition("```\n")[2])
    assert f"```text\n{shown}\n```\n" in page.read_text(), "WRITE=1 writes it anew"


def test_every_place_that_a_checkpoint_keeps_its_template_is_read_and_written(tmp_path):
    """chat_template.jinja; tokenizer_config.json (older); chat_template.json (older processors); several by name."""
    own, other = ((SHARED / "templates" / f"{name}.jinja").read_text() for name in ("qwen2.5-vl", "qwen3"))
    (tmp_path / "other.jinja").write_text(other)
    named = [{"name": "default", "template": own}, {"name": "tool_use", "template": "{{ tools }}"}]
    places = {
        "jinja": lambda d: (d / "chat_template.jinja").write_text(own),
        "tokenizer_config": lambda d: edit(d / "tokenizer_config.json", chat_template=own),
        "named": lambda d: edit(d / "tokenizer_config.json", chat_template=named),
        "processor": lambda d: (d / "chat_template.json").write_text(json.dumps({"chat_template": own})),
    }
    values = {"enable_thinking": False}
    for name, write in places.items():
        make_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
        write(tmp_path / name)
        assert load_chat_tokenizer(tmp_path / name, PromptConfig()).chat_template == own
        for source in (tmp_path / "other.jinja", tmp_path / "jinja"):  # a file, and by now a checkpoint that holds it
            prompt = PromptConfig(chat_template=source, chat_template_kwargs=values)
            write_chat_template(tmp_path / name, prompt)
            written = AutoTokenizer.from_pretrained(tmp_path / name).get_chat_template()
            assert written.endswith(other) and "set enable_thinking = false" in written
            for file in (tmp_path / name).glob("*.json"):
                assert json.loads(file.read_text()).get("chat_template", written) == written


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
