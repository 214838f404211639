"""What a teacher reads in the place of the student's prompt: its own template, another text, other images."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from vold.config.schema import DataConfig, PromptConfig, TeacherViewConfig
from vold.data.problems import load_problems
from vold.data.prompts import build_prompts
from vold.models.images import load_prompt_encoder
from vold.run.run_dir import read_rows
from vold.teacher import TeacherPromptEncoder, TeacherView
from vold.train.rl import train_rl

PROMPT = PromptConfig(suffix="", max_tokens=200)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Six sums; every second has an image, with a crop and a caption beside it; hints where the number is even."""
    folder = tmp_path_factory.mktemp("views")
    for name, size in (("a.png", (56, 56)), ("crop.png", (28, 28)), ("large.png", (84, 56))):
        Image.new("RGB", size, (len(name) * 20, 90, 10)).save(folder / name)
    table = [
        {
            "problem": ("<image>" if i % 2 else "") + f"{i} + 1",
            "answer": str(i + 1),
            "images": ["a.png"] if i % 2 else [],
            "hint_text": f"{i} + 1 = {i + 1}" if i % 2 == 0 else None,
            "crop": [["crop.png"], ["large.png"]][i % 4 == 3] if i % 2 else None,
            "caption": f"{i} + 1" if i % 2 else "",
            "wrong_number": ["crop.png", "large.png"] if i % 2 else None,
        }
        for i in range(6)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@pytest.fixture
def problems(rows):
    config = DataConfig(path=rows, layout="geometry3k")
    return config, load_problems(config, keep_metadata=True)


def view_of(checkpoint, problems, *, sees=True, **keys) -> TeacherView:
    config, loaded = problems
    return TeacherView(checkpoint, loaded, PROMPT, view=TeacherViewConfig(**keys), data=config, sees=sees)


def test_the_default_is_the_students_problem_in_the_template_it_is_given(problems, tiny_student_dir):
    prompts = build_prompts(problems[1], AutoTokenizer.from_pretrained(tiny_student_dir), PROMPT)
    view = view_of(tiny_student_dir, problems)
    for prompt in prompts:
        assert view(prompt) == prompt
    assert {path.name for path in view.check()} == {"a.png"}


def test_privileged_text_and_other_images(problems, tiny_student_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_student_dir)
    prompts = build_prompts(problems[1], tokenizer, PROMPT)
    view = view_of(tiny_student_dir, problems, prompt_column="hint_text", images_column="crop")
    for i, prompt in enumerate(prompts):
        seen = view(prompt)
        assert seen.id == prompt.id and seen.gold == prompt.gold
        text = tokenizer.decode(seen.token_ids)
        if i % 2:
            assert [path.name for path in seen.images] == (["large.png"] if i % 4 == 3 else ["crop.png"])
            assert seen.token_ids.tolist() == prompt.token_ids.tolist()
        else:
            assert str(i + 1) in text and "=" in text and len(seen.token_ids) > len(prompt.token_ids)
    assert {path.name for path in view.check()} == {"crop.png", "large.png"}
    encode = TeacherPromptEncoder(tiny_student_dir, view)
    pairs = [pair for p in prompts for pair in zip(view(p).images, encode(p).pictures, strict=True)]
    counts = {path.name: picture.grid_thw for path, picture in pairs}
    assert counts["crop.png"] != counts["large.png"], "each at its own resolution"
    assert all(encode.length(p) == len(encode(p).prompt_ids) for p in prompts)


def test_a_blind_teacher_reads_what_is_described(problems, tiny_teacher_dir):
    prompts = build_prompts(problems[1], AutoTokenizer.from_pretrained(tiny_teacher_dir), PROMPT)
    view = view_of(tiny_teacher_dir, problems, sees=False, prompt_column="caption")
    assert all(view.reads(prompt) and not view(prompt).images for prompt in prompts)
    plain = view_of(tiny_teacher_dir, problems, sees=False)
    assert [plain.reads(prompt) for prompt in prompts] == [not prompt.images for prompt in prompts]
    assert [len(e) for e in (load_prompt_encoder(tiny_teacher_dir)(view(p)).prompt_ids for p in prompts)]


@pytest.mark.parametrize(
    ("keys", "sees", "says"),
    [
        ({"prompt_column": "nothing"}, True, "teacher_view.prompt_column = 'nothing' is in no row of"),
        ({"images_column": "crop"}, False, "teacher_view.images_column: this teacher reads text only"),
        ({"images_column": "wrong_number"}, True, "has 1 <image> marks and 2 images"),
        ({"images_column": "caption"}, True, "column 'caption'"),
        ({"prompt_column": "crop"}, True, "column 'crop' must be a text"),
    ],
)
def test_a_column_that_does_not_fit_is_named(keys, sees, says, problems, tiny_student_dir):
    with pytest.raises(ValueError, match=says) as error:
        view_of(tiny_student_dir, problems, sees=sees, **keys).check()
    assert "\n" not in str(error.value)


def run(load, tmp_path, rows, *overrides):
    config = load(
        "rl",
        tmp_path / "run",
        "steps=2",
        "evaluation.every=0",
        "save_every=0",
        "objective.target_kl=null",
        f"data.path={rows}",
        "data.layout=geometry3k",
        "prompts_per_step=4",
        "optimizer.lr=0.003",
        *overrides,
    )
    train_rl(config)
    return read_rows(config.run_dir / "metrics.jsonl")


def test_self_distillation_with_a_hint(load, world, layout, rows, tmp_path):
    """The student itself, frozen, reads the solution; without the column it is the student and has nothing to teach."""
    same = ["objective.preset=opd", f"teacher={world.student}"]
    first, _ = run(load, tmp_path / "plain", rows, *same)
    assert first["kl_teacher"] < 1e-9
    first, _ = run(load, tmp_path / "hint", rows, *same, "teacher_view={prompt_column: hint_text}")
    assert first["kl_teacher"] > 1e-6


def test_another_picture_for_the_teacher(load, world, layout, rows, tmp_path):
    same = ["objective.preset=opd", f"teacher={world.student}", "objective.divergence=reverse_kl"]
    first, _ = run(load, tmp_path / "crop", rows, *same, "teacher_view={images_column: crop}")
    assert first["kl_teacher"] > 1e-9


def test_a_degraded_column_is_va_opds_second_reading(load, world, layout, rows, tmp_path):
    settings = ["objective.preset=va-opd", f"teacher={world.student}"]
    first, _ = run(load, tmp_path / "run", rows, *settings, "teacher_view={degraded_column: crop}")
    assert first["visual_advantage"] > 0
    with pytest.raises(ValueError, match="degraded_column is the second reading of"):
        run(load, tmp_path / "other", rows, "teacher_view={degraded_column: crop}")
