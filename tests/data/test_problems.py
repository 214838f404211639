"""Loaders: every layout, and every kind of bad row as one line that names file and row."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import PROBLEM_LAYOUTS, load_problems, load_text_traces
from vold.data.prompts import build_prompts
from vold.io import configure_logging
from vold.models.tokenizer import load_tokenizer

GOOD = {
    "orz": [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}],
    "orz-eval": {"prompt": [{"from": "human", "value": "1+1?"}], "final_answer": "2"},
    "gsm8k": {"question": "1+1?", "answer": "one and one\n#### 2"},
    "messages": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>"}]},
}


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def config(path, layout, **more):
    return DataConfig(path=path, layout=layout, **more)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("layout", GOOD)
def test_layouts(tmp_path, layout, suffix):
    path = write(tmp_path / f"set{suffix}", [GOOD[layout], GOOD[layout]])
    first, second = load_problems(config(path, layout))
    assert (first.question, first.id, second.id) == ("1+1?", "set:1", "set:2")
    assert first.gold == ("" if layout == "messages" else "2")


def test_gsm8k_removes_thousands_commas(tmp_path):
    path = write(tmp_path / "g.jsonl", [{"question": "q", "answer": "x #### 1,234"}])
    assert load_problems(config(path, "gsm8k"))[0].gold == "1234"


@pytest.fixture
def geometry(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")

    def build(**changes):
        row = {"problem": "see <image> now", "answer": "4", "images": ["images/a.png"], **changes}
        return config(write(tmp_path / "geo.jsonl", [row]), "geometry3k")

    return build


def test_image_rows(geometry, tmp_path):
    (problem,) = load_problems(geometry())
    assert problem.images == ((tmp_path / "images/a.png").resolve(),)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": []}, "1 <image> marks but 0 images"),
        ({"images": ["../../etc/passwd"]}, "lies outside"),
        ({"images": ["/etc/passwd"]}, "lies outside"),
        ({"images": ["images/none.png"]}, "does not exist"),
        ({"images": ["images/broken.png"]}, "cannot be decoded"),
        ({"answer": ""}, "row 1"),
        ({"problem": 7}, "row 1"),
    ],
)
def test_bad_image_rows_are_one_line(geometry, changes, says):
    with pytest.raises(ValueError) as error:
        load_problems(geometry(**changes))
    assert says in str(error.value) and "geo.jsonl row 1" in str(error.value) and "\n" not in str(error.value)


def test_an_enormous_image_is_refused(geometry, monkeypatch):
    monkeypatch.setattr("vold.data.pictures.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="30x20 pixels, over 100"):
        load_problems(geometry())


def test_bad_rows_are_skipped_and_reported_when_asked(tmp_path):
    path = write(tmp_path / "mixed.json", [GOOD["orz"], {"not": "a row"}, GOOD["orz"]])
    with pytest.raises(ValueError, match=r"mixed.json row 2: not a row of layout 'orz'.*on_error=skip"):
        load_problems(config(path, "orz"))
    lines = []
    kept = load_problems(config(path, "orz", on_error="skip"), report=lines.append)
    assert [problem.id for problem in kept] == ["mixed:1", "mixed:3"]
    assert len(lines) == 1 and "mixed.json row 2" in lines[0]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1, 2"])
def test_broken_files_are_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_problems(config(path, "orz"))
    assert "x.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_tables_is_one_set(tmp_path):
    """Mixture-of-Thoughts comes in several files."""
    for name in ("train-00001.parquet", "train-00000.parquet"):
        row = {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "<think>"}]}
        parquet.write_table(pa.Table.from_pylist([row] * 2), tmp_path / name)
    problems = load_problems(config(tmp_path, "messages", limit=3))
    assert [problem.question[6:11] for problem in problems] == ["00000", "00000", "00001"]
    assert len({problem.id for problem in problems}) == 3
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"train-00000.parquet cannot be read: ") as error:
        load_problems(config(tmp_path, "messages"))
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty does not exist or holds no .parquet"):
        load_problems(config(tmp_path / "empty", "messages"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".tsv"])
def test_bytes_that_are_no_text_are_one_line(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(b"question\tanswer\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=rf"x{suffix} (cannot be read|line 1 is not JSON): .*(decode|value)") as error:
        load_problems(config(tmp_path / f"x{suffix}", "vqa"))
    assert "\n" not in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["prompt", "value", "final_answer", "question", "answer", "messages", "images", "image", "choices"]
            )
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(row=json_values, layout=st.sampled_from(sorted(PROBLEM_LAYOUTS)))
def test_no_row_ever_raises_anything_but_a_one_line_value_error(row, layout, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("fuzz") / "rows.json", [row])
    try:
        load_problems(config(path, layout))
    except ValueError as error:
        assert "rows.json" in str(error)


def test_text_traces(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "1+1?", "response": "<think>..</think>\\boxed{2}"}])
    (trace,) = load_text_traces(config(path, "prompt-response"))
    assert trace.problem.question == "1+1?" and trace.response.endswith("\\boxed{2}")


def test_prompt_keeps_one_image_pad_per_image_in_place(geometry, tiny_student_dir):
    tokenizer = load_tokenizer(tiny_student_dir)
    problem = load_problems(geometry(problem="<w1>[<image>]<solve>"))
    (prompt,) = build_prompts(problem, tokenizer, PromptConfig(suffix=""))
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == [
        "<user>",
        "<w1>",
        "[",
        "<|image_pad|>",
        "]",
        "<solve>",
        "<asst>",
    ]


def test_too_long_prompts(geometry, tiny_student_dir):
    tokenizer, problems = load_tokenizer(tiny_student_dir), load_problems(geometry(problem="<w1>[<image>]<solve>"))
    with pytest.raises(ValueError, match=r"geo:1: prompt of 7 tokens exceeds prompt.max_tokens = 5"):
        build_prompts(problems, tokenizer, PromptConfig(suffix="", max_tokens=5))
    with pytest.raises(ValueError, match=r"every prompt exceeds prompt.max_tokens = 5; raise it"):
        build_prompts(problems, tokenizer, PromptConfig(suffix="", max_tokens=5), on_error="skip")


def test_too_long_prompts_are_left_out_by_name(tmp_path, tiny_student_dir, capsys):
    configure_logging()
    rows = [{"question": text, "answer": "2"} for text in ("1+1", "1+1" * 9, "1")]
    problems = load_problems(config(write(tmp_path / "set.jsonl", rows), "vqa"))
    kept = build_prompts(problems, load_tokenizer(tiny_student_dir), PromptConfig(suffix="", max_tokens=9), "skip")
    assert [prompt.id for prompt in kept] == ["set:1", "set:3"]
    assert capsys.readouterr().out == "skipped 1 prompts over prompt.max_tokens = 9: set:2 (29 tokens)\n"
