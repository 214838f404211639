"""Data as strangers bring it: each kind of fault that was found in the field, tried on several members of its kind."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Json, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from vold.config.schema import DataConfig, PromptConfig
from vold.data.golds import check_gold
from vold.data.options import named_letter, read_options
from vold.data.pictures import picture_size, read_picture
from vold.data.problems import Problem, column_use, load_problems, load_text_traces
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.grading import grade_answers
from vold.models.images import ImageProcessor
from vold.models.tokenizer import load_tokenizer
from vold.rollout.vllm.engines import Request, sized_images, vllm_prompt
from vold.types import Prompt, Rollout, Verdict

TEXT = '{"question": "1+1?", "answer": "007"}\n{"question": "Who?", "answer": "NA"}\n'
ANSWERS = ["007", "NA"]


def png(colour: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def load(path, layout: str = "vqa", **settings):
    return load_problems(DataConfig(path=path, layout=layout, **settings))


def rows(tmp_path, *rows, layout: str = "vqa", read=load_problems, **settings):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(DataConfig(path=path, layout=layout, **settings))


# -- readers -------------------------------------------------------------------------------------------------------

CSV = "question,answer\n1+1?,007\nWho?,NA\n"
FILES = {
    "a.jsonl": TEXT.encode(),
    "a.json": json.dumps([json.loads(line) for line in TEXT.splitlines()]).encode(),
    "lines.json": TEXT.encode(),
    "a.csv": CSV.encode(),
    "excel.csv": b"\xef\xbb\xbf" + CSV.replace(",", ";").replace("\n", "\r\n").encode(),
    "a.tsv": CSV.replace(",", "\t").encode(),
    "spaces.csv": CSV.replace("question,answer", "question, answer ").encode(),
    "unicode-text.tsv": CSV.replace(",", "\t").encode("utf-16"),
    "bom.jsonl": b"\xef\xbb\xbf" + TEXT.encode(),
    "bom.json": b"\xef\xbb\xbf[" + TEXT.replace("}\n{", "},{").encode() + b"]",
    "wide.jsonl": TEXT.encode("utf-16"),
    "a.jsonl.gz": gzip.compress(TEXT.encode()),
    "a.csv.gz": gzip.compress(CSV.encode()),
    "a.jsonl.bz2": bz2.compress(TEXT.encode()),
    "a.json.xz": lzma.compress(TEXT.encode()),
    "a.jsonl.zst": pa.compress(TEXT.encode(), "zstd", asbytes=True),
    "bom.csv.gz": gzip.compress(b"\xef\xbb\xbf" + CSV.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_cell_by_cell(tmp_path, name):
    """No reader guesses a type: 007 is not 7 and NA is not empty."""
    (tmp_path / name).write_bytes(FILES[name])
    assert [problem.gold for problem in load(tmp_path / name)] == ANSWERS


def test_text_that_is_not_utf_8_is_one_line_with_the_cure(tmp_path):
    for encoding, text in (("latin-1", "question,answer\ncafé?,3\n"), ("gbk", "question,answer\n三?,3\n")):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=r"a.csv cannot be read: .*; save it as UTF-8") as error:
            load(tmp_path / "a.csv")
        assert "\n" not in str(error.value)


def test_dates_and_mixed_types_stay_what_they_are(tmp_path):
    found = rows(tmp_path, *({"question": "q", "answer": a} for a in ("2024-01-01", 7, "x", 1.5, "1e3")))
    assert [problem.gold for problem in found] == ["2024-01-01", "7", "x", "1.5", "1e3"]


@pytest.mark.parametrize("cut", [5, 40])
def test_a_truncated_gz_is_one_line(tmp_path, cut):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(TEXT.encode() * 9)[:-cut])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read: .*") as error:
        load(tmp_path / "a.jsonl.gz")
    assert "\n" not in str(error.value)


def table(answers=ANSWERS) -> Dataset:
    return Dataset.from_dict({"question": ["q"] * len(answers), "answer": list(answers)})


def test_save_to_disk(tmp_path):
    table().save_to_disk(tmp_path / "one")
    assert [problem.gold for problem in load(tmp_path / "one")] == ANSWERS
    DatasetDict(train=table(), test=table(["t"])).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"two holds several splits: train, test; choose one with data.split"):
        load(tmp_path / "two")
    assert load(tmp_path / "two", split="test")[0].gold == "t"


def test_parquet_as_the_hub_keeps_it(tmp_path):
    """Pictures as {bytes, path}, JSON columns, class labels."""
    features = Features(
        {
            "question": Value("string"),
            "image": ImageFeature(),
            "meta": Json(),
            "answer": ClassLabel(names=["no", "yes"]),
            "choices": Json(),
        }
    )
    row = {"question": "q", "image": {"bytes": png(), "path": None}, "meta": {"kind": "k"}, "answer": 1}
    Dataset.from_list([row | {"choices": ["no", "yes"]}], features=features).to_parquet(tmp_path / "a.parquet")
    (problem,) = load(tmp_path / "a.parquet", columns={"category": "meta.kind"})
    assert (problem.gold, problem.category, problem.choices) == ("B", "k", ("no", "yes"))
    assert read_picture(problem.images[0]).getpixel((0, 0)) == (255, 0, 0)


def hub(tmp_path, *names: str):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"question": ["q"], "answer": [name]}), path)
    return tmp_path


SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (SHARDS, "several splits: test, train"),
        (("train.parquet", "val.parquet"), "several splits: train, validation"),
        (("gsm8k_train.parquet", "gsm8k_test.parquet"), "several splits: test, train"),
        (("train/a.parquet", "dev/a.parquet"), "several splits: validation, train"),
        (("train.parquet", "more.parquet"), "several splits: .*without a split"),
        (("main/train.parquet", "socratic/train.parquet"), "several data sets: main, socratic; .*data.subset"),
        ((), "does not exist or holds no .parquet"),
    ],
)
def test_splits_are_never_mixed(tmp_path, names, says):
    with pytest.raises(ValueError, match=says):
        load(hub(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "settings", "found"),
    [
        (SHARDS, {"split": "train"}, SHARDS[:2]),
        (SHARDS, {"split": "test"}, SHARDS[2:]),
        (("gsm8k_train.parquet", "gsm8k_test.parquet"), {"split": "test"}, ["gsm8k_test.parquet"]),
        (("train.parquet", "val.parquet"), {"split": "validation"}, ["val.parquet"]),
        (("main/train.parquet", "socratic/train.parquet"), {"subset": "main"}, ["main/train.parquet"]),
        (("a.parquet", "b.parquet"), {}, ["a.parquet", "b.parquet"]),
        (("contest-latest.parquet",), {}, ["contest-latest.parquet"]),
        (("x/testmini-00000-of-00001.parquet",), {"split": "testmini"}, ["x/testmini-00000-of-00001.parquet"]),
    ],
)
def test_a_split_or_subset_is_chosen(tmp_path, names, settings, found):
    assert [problem.gold for problem in load(hub(tmp_path, *names), **settings)] == list(found)


def test_the_card_of_a_data_set_names_its_files(tmp_path):
    hub(tmp_path, "en.parquet", "zh.parquet")
    configs = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: dev\n    path: {n}.parquet\n" for n in ("en", "zh")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ValueError, match=r"data.subset") as error:
        load(tmp_path)
    assert "zh" in str(error.value) and "\n" not in str(error.value)
    assert load(tmp_path, subset="zh")[0].gold == "zh.parquet"


def test_formats_are_not_mixed_either(tmp_path):
    hub(tmp_path, "a.parquet")
    (tmp_path / "a.jsonl").write_text(TEXT)
    with pytest.raises(ValueError, match=r"files of several formats \(.jsonl, .parquet\)"):
        load(tmp_path)


def test_a_hub_id_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data file someone/something does not exist, .*hf download") as error:
        load("someone/something")
    assert "\n" not in str(error.value)


# -- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"problem": "q", "solution": "2", "level": 1},
            "the row has problem, solution, level; it fits data.layout=vqa",
        ),
        ({"prompt": [], "reward_model": {}}, "data.columns={question: prompt, answer: reward_model.ground_truth}"),
        ({"conversations": []}, "it fits data.layout=messages"),
        ({"instruction": "a", "output": "b"}, "it fits data.layout=alpaca"),
        ({"foo": 1, "bar": 2}, "the row has foo, bar; name the column with data.columns"),
        ([{"from": "human"}, {"from": "assistant"}], "data.layout=orz"),
        (7, "the row is int, not an object with columns"),
    ],
)
def test_a_missing_column_lists_those_that_are_there(tmp_path, row, says):
    with pytest.raises(ValueError) as error:
        rows(tmp_path, row)
    assert says in str(error.value) and "no column 'question'" in str(error.value)


def test_columns_that_are_mapped_must_exist_and_mean_something(tmp_path):
    row = {"question": "q", "answer": "1"}
    with pytest.raises(ValueError, match=r"no column 'problm' \(data.columns.question\); the row has question, answer"):
        rows(tmp_path, row, columns={"question": "problm"})
    with pytest.raises(ValueError, match=r"data.columns.images = 'imgs' is in no row of .*set.jsonl"):
        rows(tmp_path, row, columns={"images": "imgs"})
    with pytest.raises(ValueError, match=r"data.columns.response: layout 'vqa' has no such field; it reads .*question"):
        rows(tmp_path, row, columns={"response": "answer"})
    with pytest.raises(ValueError, match="columns"):
        DataConfig(path="x", layout="vqa", columns={"qestion": "q"})


def test_dotted_columns_reach_into_objects_lists_and_json_text(tmp_path):
    row = {"a.b": "flat?", "extra": {"gold": ["x", "2"]}, "info": '{"kind": "k"}', "rest": {"seen": 1, "unseen": 2}}
    settings = {"question": "a.b", "answer": "extra.gold.1", "category": "info.kind"}
    (problem,) = rows(tmp_path, row, columns=settings, read=partial(load_problems, keep_metadata=True))
    assert (problem.question, problem.gold, problem.category) == ("flat?", "2", "k")
    assert problem.metadata == {"rest": {"seen": 1, "unseen": 2}}
    use = column_use(DataConfig(path=tmp_path / "set.jsonl", layout="vqa", columns=settings))
    assert use.read == ["a.b", "extra.gold.1", "info.kind"] and "rest" in use.unread


# -- options and their answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (["4", "7"], {"A": "4", "B": "7"}),
        ([4, 7.5], {"A": "4", "B": "7.5"}),
        ({"A": "4", "B": "7"}, {"A": "4", "B": "7"}),
        ({"B": "7", "A": "4"}, {"A": "4", "B": "7"}),
        ({"a": "4", "(b)": "7"}, {"A": "4", "B": "7"}),
        ({"A": "4", "B": None, "C": "9"}, {"A": "4", "C": "9"}),
        (["4", "", "9"], {"A": "4", "C": "9"}),
        (["4", None, "9"], {"A": "4", "C": "9"}),
        ({"label": ["A", "B"], "text": ["4", "7"]}, {"A": "4", "B": "7"}),
        ({"text": ["4", "7"], "label": ["1", "2"]}, {"A": "4", "B": "7"}),
        ([{"label": "B", "text": "7"}, {"label": "A", "text": "4"}], {"A": "4", "B": "7"}),
        ("['4', \"it's\"]", {"A": "4", "B": "it's"}),
        ('["4", "7"]', {"A": "4", "B": "7"}),
        (["A. 4", "B. 7"], {"A": "4", "B": "7"}),
        (["(A) 4", "(B) 7"], {"A": "4", "B": "7"}),
        (["A ) 4", "B ) 7"], {"A": "4", "B": "7"}),
        (["A. 4", "7"], {"A": "A. 4", "B": "7"}),
    ],
    ids=str,
)
def test_options(cell, found):
    assert read_options(cell) == found


@pytest.mark.parametrize(
    "cell", ["yes", 7, ["x"] * 27, {"x1": "4"}, [["4"]], {"A": "4", "a": "7"}, [{"x": 1}]], ids=str
)
def test_what_is_no_list_of_options_is_one_line(cell):
    with pytest.raises(ValueError) as error:
        read_options(cell)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("b", "B"),
        (" B ", "B"),
        ("[B]", "B"),
        ("Option B", "B"),
        ("B. seven", "B"),
        ("seven", "B"),
        ("(B) seven", "B"),
        (1, "B"),
        ("1", "B"),
        (1.0, "B"),
        ("**B**", "B"),
        ("$B$", "B"),
        (0, "A"),
    ],
)
def test_an_answer_by_letter_text_or_index(answer, letter):
    assert named_letter(answer, {"A": "four", "B": "seven", "C": "nine"}) == letter


@pytest.mark.parametrize(
    ("answer", "options", "says"),
    [
        (1, ["1", "2"], "ambiguous: the text of A, the index"),
        ("A", ["B", "A"], "ambiguous: the text of B, the letter of A"),
        ("4", ["4", "4"], "ambiguous"),
        ("D", ["4", "7"], "not one of the options A, B"),
        (2, ["four", "seven"], "not one of"),
        (-1, ["four", "seven"], "not one of"),
        ("B. four", ["four", "seven"], "not one of"),
        ("B", ["four", "", "nine"], "not one of the options A, C"),
        ("AC", ["four", "seven", "nine"], "not one of"),
    ],
)
def test_an_answer_that_names_none_or_two_is_refused(answer, options, says):
    with pytest.raises(ValueError, match=says):
        named_letter(answer, read_options(options))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "A": "x", "B": "y", "answer": "B"},
        {"question": "q", "option1": "x", "option2": "y", "answer": "1"},
        {"question": "q", "opa": "x", "opb": "y", "answer": "1"},
        {"question": "q", "Option A": "x", "Option B": "y", "answer": "A"},
    ],
    ids=str,
)
def test_options_in_columns_that_nothing_reads_are_refused(tmp_path, row):
    """The question would be asked without them, and its answer be a letter."""
    with pytest.raises(ValueError, match=r"look like options, and this layout does not read them"):
        rows(tmp_path, row)
    if "A" in row:
        (problem,) = rows(tmp_path, row, layout="vlmevalkit")
        assert problem.choices == ("x", "y") and problem.gold == "B"


def test_a_printed_array_is_no_list(tmp_path):
    """Python reads `['4' '7']` as one text, 47."""
    with pytest.raises(ValueError, match="a printed array without commas"):
        rows(tmp_path, {"question": "q", "choices": "['4' '7']", "answer": "A"})
    (problem,) = rows(tmp_path, {"question": "q", "answer": "['4' '7']"})
    assert problem.gold != "47"


def test_letters_are_kept_over_empty_cells_of_a_table(tmp_path):
    picture = base64.b64encode(png()).decode()
    lines = (("index", "question", "A", "B", "C", "D", "answer", "image"),)
    lines += (("1", "q", "", "x", "y", "z", "C", picture), ("2", "q", "One", "Two", "", "Three", "D", "1"))
    lines += (
        ("3", "q", "x", "y", "", "", "A", "4"),
        ("4", "q", "x", "y", "", "", "B", base64.b64encode(png("lime")).decode()),
    )
    (tmp_path / "a.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    first, second, third, fourth = load(tmp_path / "a.tsv", "vlmevalkit")
    assert first.choices == ("", "x", "y", "z") and first.gold == "C" and "C. y" in first.question
    assert second.choices == ("One", "Two", "", "Three") and second.gold == "D" and "D. Three" in second.question
    assert third.images == fourth.images != first.images == second.images, "an image may name a later row"


def test_several_right_answers(tmp_path):
    one, two = rows(
        tmp_path,
        {"question": "q", "answer": ["2", "two", "2"]},
        {"question": "q", "answer": ["A", "nine"], "choices": ["four", "seven", "nine"]},
    )
    assert (one.gold, one.other_golds, two.gold, two.other_golds) == ("2", ("two",), "A", ("C",))


def compare_texts(items) -> list[Verdict]:
    return [Verdict("correct" if item.response == item.gold else "wrong", item.response, "text") for item in items]


def test_any_of_several_right_answers_counts():
    prompt = Prompt("p", (1,), "q", "2", other_golds=("two",))
    rollouts = [Rollout(prompt, (1,), (0.0,), "stop", text) for text in ("two", "2", "three")]
    verdicts = grade_answers(compare_texts, rollouts)
    assert [verdict.outcome for verdict in verdicts] == ["correct", "correct", "wrong"]


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["path", "bytes", "base64", "lines", "data URL", "struct", "url struct", "list", "file"]
)
def test_a_picture_in_any_form(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    cell = {
        "path": "a.png",
        "bytes": {"bytes": png(), "path": "elsewhere.png"},
        "base64": text,
        "lines": base64.encodebytes(png()).decode(),
        "data URL": f"data:image/png;base64,{text}",
        "struct": {"bytes": None, "path": "a.png"},
        "url struct": {"image_url": {"url": f"data:image/png;base64,{text}"}},
        "list": ["a.png"],
        "file": f"file://{tmp_path}/a.png",
    }[kind]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"question": "q", "answer": "1", "image": cell}]), path)
    (problem,) = load(path)
    assert read_picture(problem.images[0]).getpixel((0, 0)) == (255, 0, 0) and problem.question == "<image>\nq"


@pytest.mark.parametrize(
    "cell", ["https://example.org/a.png", "data:image/png;base64,xx*", {"width": 3}, 7, "A" * 5000]
)
def test_a_picture_that_cannot_be_had_is_one_short_line(tmp_path, cell):
    with pytest.raises(ValueError, match="image") as error:
        rows(tmp_path, {"question": "q", "answer": "1", "image": cell})
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_as_transformers_turns_it(tmp_path, orientation, kind):
    image, exif = Image.new("RGB", (64, 32), "white"), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 16, 32))
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    image.save(path, kind, exif=exif)
    assert read_picture(path).tobytes() == load_image(str(path)).tobytes()
    assert picture_size(path) == load_image(str(path)).size


@pytest.mark.parametrize(
    ("question", "options", "found", "text"),
    [
        ("like <image 1>?", ["<image 2>", "<image 3>"], "red lime blue", "like <image>?"),
        ("which?", ["<image 3>", "<image 1>"], "blue red", "which?"),
        ("<image 2>, <image 1>", ["x", "y"], "lime red", "<image>, <image>"),
        ("<image 1> again <image 1>", ["x", "y"], "red red", "<image> again <image>"),
        ("<image_1>", ["x", "y"], "red", "<image>"),
    ],
)
def test_numbered_images_in_question_and_options(tmp_path, question, options, found, text):
    images = [{"bytes": png(colour), "path": None} for colour in ("red", "lime", "blue")]
    row = {"question": question, "choices": options, "answer": "A", "images": images}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    notes: list[str] = []
    (problem,) = load_problems(DataConfig(path=tmp_path / "a.parquet", layout="vqa"), notes.append)
    names = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}
    assert " ".join(names[read_picture(path).getpixel((0, 0))] for path in problem.images) == found
    assert problem.question.startswith(text) and problem.question.count("<image>") == len(problem.images)
    assert bool(notes) == (len(set(found.split())) < 3), "an image that is left out is said"


@pytest.mark.parametrize("question", ["<image 0>", "<image 4>", "<image> and <image 1>", "<image>"])
def test_marks_without_their_picture_are_refused(tmp_path, question):
    images = [{"bytes": png(), "path": None}] * 3
    parquet.write_table(
        pa.Table.from_pylist([{"question": question, "answer": "1", "images": images}]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="image"):
        load(tmp_path / "a.parquet")


# -- turns ---------------------------------------------------------------------------------------------------------


def turns(*pairs, **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


S, U, A = ("system", "s"), ("user", "u"), ("assistant", "a")


@pytest.mark.parametrize(
    ("row", "history", "question"),
    [
        (turns(S, U, A), (S,), "u"),
        (turns(U), (), "u"),
        (turns(U, A, ("user", "v")), (U, A), "v"),
        (turns(U, A, ("user", "v"), A), (U, A), "v"),
        (turns(("developer", "s"), U), (S,), "u"),
        (turns(U, A, system="s"), (S,), "u"),
        (turns(("user", [{"type": "text", "text": "u"}])), (), "u"),
        (turns(("system", ""), U), (("system", ""),), "u"),
        (turns(S, U, system="s"), (S,), "u"),
        (turns(("User", "u"), ("ai", "a")), (), "u"),
        ({"messages": json.dumps(turns(U)["messages"])}, (), "u"),
    ],
)
def test_prompts_by_role(tmp_path, row, history, question):
    (problem,) = rows(tmp_path, row, layout="messages")
    assert (problem.history, problem.question, problem.gold) == (history, question, "")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (turns(S, U), "ends with a turn of the user"),
        (turns(U, A, ("user", "thanks")), "ends with a turn of the user"),
        (turns(A, U), "ends with a turn of the user|first turn is the assistant"),
        (turns(A), "first turn is the assistant's"),
        (turns(U, ("tool", "4"), A), "turn 2 is of role 'tool': tools are not supported"),
        (turns(U, ("function_call", "4"), A), "tools are not supported"),
        (turns(U, ("critic", "4"), A), "turn 2 is of role 'critic'"),
        (turns(U, S, A), "turn 2 is a system turn"),
        (turns(U, ("assistant", "")), "turn 2, of the assistant, is empty"),
        (turns(U, A, A), "two assistant turns follow one another"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]},
            "weight 0",
        ),
        ({"messages": [{"text": "u"}]}, "turn 1 has no role; it has text"),
        ({"messages": []}, "no list of turns, or empty"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "part of type 'video'"),
        (
            {"messages": [*turns(U)["messages"], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "calls a tool",
        ),
    ],
)
def test_what_is_no_target_is_refused(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        rows(tmp_path, row, layout="messages", read=load_text_traces)


def marked(**mark) -> dict:
    """A turn of the user and one of the assistant, which carries a mark."""
    return {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", **mark}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (marked(weight="0"), "weight 0"),
        (marked(loss=0), "weight 0"),
        (marked(train=False), "weight 0"),
        (marked(loss_scale=0.0), "weight 0"),
        (marked(weight=0.5), "turn 2 has weight = 0.5"),
        (marked(prefix=True), "turn 2 is the beginning of an answer"),
        (marked(reasoning=["hm"]), "the thought of turn 2 is list, not text"),
        (marked(reasoning="hm", content="<think>ah</think>a"), "a thought in its text and another"),
        (marked(reasoning="hm", content=None), "turn 2, of the assistant, is empty"),
        (turns(S, U, A, system="other"), "a system turn and a column of another system text"),
        (turns(U, A, videos=["v.mp4"]), "column 'videos' holds what the model would have to see"),
        (turns(U, A, label=False), "'label' is false"),
        ({"messages": [{"role": "user", "parts": [{"text": "u"}]}]}, "turn 1 has no content; it has role, parts"),
        ({"messages": '[{"role": "user"'}, "no list of turns"),
    ],
    ids=str,
)
def test_marks_and_columns_that_change_what_is_learnt_are_refused(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        rows(tmp_path, row, layout="messages", read=load_text_traces)


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"loss": True}, {"train": "true"}, {"weight": None}, {"prefix": False}]
)
def test_marks_that_say_yes_are_read(tmp_path, mark):
    (trace,) = rows(tmp_path, marked(**mark), layout="messages", read=load_text_traces)
    assert trace.response == "a"
    thought = marked(reasoning_content="hm", content="<think>\nhm\n</think>\n\na")
    (trace,) = rows(tmp_path, thought, layout="messages", read=load_text_traces)
    assert trace.response == "<think>\nhm\n</think>\n\na", "a thought that is kept twice is shown once"


@pytest.mark.parametrize(
    ("row", "layout", "columns", "history", "question"),
    [
        ({"query": "v", "response": "b", "history": [["u", "a"]]}, "prompt-response", {"prompt": "query"}, (U, A), "v"),
        ({"instruction": "v", "output": "b", "history": [["u", "a"]]}, "alpaca", {}, (U, A), "v"),
        ({"instruction": "v", "output": "b", "history": '[["u", "a"]]'}, "alpaca", {}, (U, A), "v"),
        ({"instruction": "", "input": "v", "output": "b"}, "alpaca", {}, (), "v"),
        ({"instruction": "v", "input": "<noinput>", "output": "b"}, "alpaca", {}, (), "v"),
        ({"prompt": json.dumps([{"role": "user", "content": "v"}]), "response": "b"}, "prompt-response", {}, (), "v"),
        ({"prompt": '[{"id": 1}]', "response": "b"}, "prompt-response", {}, (), '[{"id": 1}]'),
    ],
    ids=str,
)
def test_turns_before_the_question_in_a_column_of_their_own(tmp_path, row, layout, columns, history, question):
    (trace,) = rows(tmp_path, row, layout=layout, columns=columns, read=load_text_traces)
    assert (trace.problem.history, trace.problem.question, trace.response) == (history, question, "b")
    if layout == "alpaca":
        (problem,) = rows(tmp_path, row, layout=layout)
        assert (problem.history, problem.question) == (history, question)


def test_a_history_that_is_none_and_tools_that_are_not_shown(tmp_path):
    row = {"instruction": "v", "output": "b", "history": ["u", "a"]}
    with pytest.raises(ValueError, match="the history is no list of pairs"):
        rows(tmp_path, row, layout="alpaca", read=load_text_traces)
    notes: list[str] = []
    for tools in ([{"type": "function"}], [], "[]"):
        rows(tmp_path, turns(U, A, tools=tools), layout="messages", read=partial(load_text_traces, report=notes.append))
    assert len(notes) == 1 and "1 rows with a column of tools, which the prompt does not show" in notes[0]
    with pytest.raises(ValueError, match=r"no column 'output'.*data.columns=.input: context, response: response"):
        dolly = {"instruction": "v", "context": "c", "response": "b"}
        rows(tmp_path, dolly, layout="alpaca", read=load_text_traces)


def test_every_assistant_turn_is_a_target_where_asked(tmp_path):
    row = turns(S, U, A, ("user", "v"), ("assistant", "b"), ("user", "w"), ("assistant", "c"))
    row["messages"][4]["loss"] = False
    (last,) = rows(tmp_path, row, layout="messages", read=load_text_traces)
    assert (last.problem.question, last.response, len(last.problem.history)) == ("w", "c", 5)
    first, third = rows(tmp_path, row, layout="messages", read=load_text_traces, targets="all")
    assert (first.problem.history, first.problem.question, first.response) == ((S,), "u", "a")
    assert third.problem.history == last.problem.history and third.response == "c"
    assert len({first.problem.id, third.problem.id}) == 2


def test_a_prompt_that_ends_with_the_beginning_of_an_answer_is_refused(tmp_path):
    """As verl and TRL continue it; without it the model would be asked something else."""
    row = {"prompt": [*turns(U)["messages"], {"role": "assistant", "content": "Let me"}], "answer": "3"}
    with pytest.raises(ValueError, match="ends with the beginning of an answer"):
        rows(tmp_path, row, columns={"question": "prompt"})
    with pytest.raises(ValueError, match=r"no answer to grade by; .*; the row has question, anwser"):
        rows(tmp_path, {"question": "q", "anwser": "3"})


def test_images_stay_with_their_turns(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    row = turns(("user", "<image>u"), A, ("user", "<image>v"), ("assistant", "b"), images=["a.png", "b.png"])
    first, second = rows(tmp_path, row, layout="messages", read=load_text_traces, targets="all")
    assert [path.name for path in first.problem.images] == ["a.png"]
    assert [path.name for path in second.problem.images] == ["a.png", "b.png"]
    row = turns(U, A, ("user", "v"), ("assistant", "b"), images=["a.png"])
    (trace,) = rows(tmp_path, row, layout="messages", read=load_text_traces)
    assert trace.problem.history[0] == ("user", "<image>\nu"), "without marks, in front of the first turn"
    with pytest.raises(ValueError, match="stands in a turn of the assistant"):
        rows(tmp_path, turns(U, ("assistant", "<image>"), images=["a.png"]), layout="messages", read=load_text_traces)
    with pytest.raises(ValueError, match="1 <image> marks but 0 images"):
        rows(tmp_path, turns(("user", "<image>u"), A), layout="messages", read=load_text_traces)


def test_a_thought_of_its_own_column_is_kept(tmp_path):
    row = turns(U, A)
    row["messages"][1]["reasoning_content"] = "hm"
    (trace,) = rows(tmp_path, row, layout="messages", read=load_text_traces)
    assert trace.response == "<think>\nhm\n</think>\n\na"


# -- stage 1 -------------------------------------------------------------------------------------------------------


def test_traces_in_memory_on_disk_and_streamed_are_the_same(tmp_path, tiny_student_dir, monkeypatch):
    """Also where a rank finds the table of another, and where rows are read backwards."""
    (tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1", "response": f"{n}"}) + "\n" for n in range(200))
    )
    tokenizer = load_tokenizer(tiny_student_dir)

    def samples(**settings):
        config = DataConfig(path=tmp_path / "set.jsonl", layout="prompt-response", **settings)
        return load_samples(config, tokenizer, PromptConfig(), max_tokens=90)

    plain = list(samples())
    assert len(plain) == 200 and not (tmp_path / "set.jsonl.arrow").exists()
    monkeypatch.setattr("vold.data.token_table.IN_MEMORY", 0)
    for _ in range(2):
        mapped = samples()
        assert list(mapped) == plain and len(list((tmp_path / "set.jsonl.arrow").glob("*.arrow"))) == 1
    assert list(samples(cache_dir=tmp_path / "elsewhere")) == plain and list((tmp_path / "elsewhere").glob("*.arrow"))
    streamed = samples(streaming=True, shuffle=False)
    assert [streamed[n] for n in (150, 151, 3, 199)] == [plain[n] for n in (150, 151, 3, 199)]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be kept: .*set data.cache_dir"):
        samples(cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match=r"data.shuffle=false"):
        samples(streaming=True)


def test_no_suffix_in_stages_0_and_1_unless_asked(tmp_path, tiny_student_dir):
    (tmp_path / "set.jsonl").write_text('{"prompt": "1+1", "response": "2"}\n')
    config, tokenizer = (
        DataConfig(path=tmp_path / "set.jsonl", layout="prompt-response"),
        load_tokenizer(tiny_student_dir),
    )
    (plain,) = load_samples(config, tokenizer, PromptConfig(), max_tokens=900)
    (asked,) = load_samples(config, tokenizer, PromptConfig(suffix="7"), max_tokens=900)
    text = tokenizer.decode(plain.prompt.token_ids)
    assert "boxed" not in text and tokenizer.decode(asked.prompt.token_ids) == text.replace("1+1", "1+17")
    (graded,) = build_prompts([Problem("p", "1+1", "2")], tokenizer, PromptConfig())
    assert len(graded.token_ids) > 20 + len(plain.prompt.token_ids), "graded prompts ask for a box"


# -- golds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold", ["12 cm", "x=5", "(-\\infty, 3]", "Yes", "None", "the red ball on the left", "\\text{Monday}"]
)
@pytest.mark.parametrize("wrap", ["{}", "\\boxed{{{}}}", "${}$"])
def test_golds_that_a_response_can_match(tmp_path, gold, wrap):
    (problem,) = rows(tmp_path, {"question": "q", "answer": wrap.format(gold)})
    assert gold in problem.gold and "boxed" not in problem.gold


@pytest.mark.parametrize(
    ("gold", "says"),
    [
        ("1+1 is two.\n#### 2", "data.layout=gsm8k"),
        ("so it is #### 2", "data.answer_in=hashes"),
        ("We add. Therefore $\\boxed{2}$.", "data.answer_in=boxed"),
        ("<answer> 2 </answer>", "data.answer_in=answer_tag"),
        ("see figure", "placeholder"),
        ("See the graph above.", "placeholder"),
        ("N/A", "missing value"),
        ("nan", "missing value"),
        ("Answers may vary.", "placeholder"),
        ("first\nsecond", "several lines"),
        ("No, because the line is longer than the other.", "prose of"),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", "prose of 13 words"),
        (float("nan"), "is no number"),
        (True, "must be a string"),
        ({"value": 2}, "must be a string"),
        ("", "empty"),
        ("= 42", "begins with '='"),
        ('"42"', "in quotation marks"),
        ("\u201c42\u201d", "in quotation marks"),
        ("x<sub>2</sub>", r"holds HTML \(<sub>\)"),
        ("&lt;3", "holds HTML"),
    ],
)
def test_golds_that_no_response_can_match(tmp_path, gold, says):
    with pytest.raises(ValueError, match=says):
        rows(tmp_path, {"question": "q", "answer": gold})


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("\\fbox{42}", ["42"]),
        ("\\boxed 42", ["42"]),
        ("['42']", ["42"]),
        ('["42", "forty-two"]', ["42", "forty-two"]),
        ("[1, 2]", ["[1, 2]"]),
        ("1 < x > 0", ["1 < x > 0"]),
        ("\\langle 1, 2 \\rangle", ["\\langle 1, 2 \\rangle"]),
        ("5'3\"", ["5'3\""]),
        ("R&D", ["R&D"]),
    ],
)
def test_golds_as_published_files_spell_them(tmp_path, gold, found):
    (problem,) = rows(tmp_path, {"question": "q", "answer": gold})
    assert [problem.gold, *problem.other_golds] == found
    (boxed,) = rows(tmp_path, {"question": "q", "answer": "So $\\boxed 2$."}, answer_in="boxed")
    assert boxed.gold == "2"


def test_the_setting_that_the_refusal_names_finds_the_answer(tmp_path):
    for form, gold in {
        "hashes": "x #### 1,234",
        "boxed": "So $\\boxed{1234}$.",
        "answer_tag": "<answer>1234</answer>",
    }.items():
        (problem,) = rows(tmp_path, {"question": "q", "answer": gold}, answer_in=form)
        assert problem.gold == "1234"


def test_prompts_without_an_answer(tmp_path):
    """Where nothing is graded they are kept, and an answer that no response could match is left out and counted."""
    config = DataConfig(path=tmp_path / "set.jsonl", layout="vqa")
    rows(tmp_path, {"question": "q", "answer": "1"})
    (tmp_path / "set.jsonl").write_text('{"question": "q"}\n{"question": "q", "answer": "see figure"}\n')
    notes: list[str] = []
    assert [p.gold for p in load_problems(config, notes.append, needs_gold=False)] == ["", ""] and "1 rows" in notes[0]
    for needs in (True, None):
        with pytest.raises(ValueError, match="no answer to grade by; name its column"):
            load_problems(config, needs_gold=needs)
    with pytest.raises(ValueError, match="no answer to grade by"):
        messages = DataConfig(path=tmp_path / "m.jsonl", layout="messages")
        (tmp_path / "m.jsonl").write_text(json.dumps(turns(U)))
        load_problems(messages, needs_gold=True)


def test_published_golds_are_accepted():
    """Members of the grader's own tables and of MATH: fractions, sets, matrices, intervals, words."""
    for gold in (
        "\\frac{1}{2}",
        "\\{1, 2\\}",
        "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
        "\\text{east}",
        "3\\pi",
        "-2, 1",
    ):
        check_gold(gold)


@pytest.mark.parametrize("size", [(30, 40), (101, 57), (64, 32), (300, 260), (7, 200)])
def test_one_resize_for_every_consumer(tmp_path, tiny_student_dir, size):
    """The trainer's pixels are those of transformers' processor on the file itself, and vLLM gets an image of a size
    that it has no reason to resize."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    processor = ImageProcessor(tiny_student_dir)
    (picture,) = processor.read([path])
    own = AutoImageProcessor.from_pretrained(tiny_student_dir, backend="pil", local_files_only=True)
    plain = own(images=[Image.open(path)], return_tensors="pt")
    assert torch.equal(picture.pixel_values, plain["pixel_values"])
    assert picture.grid_thw == tuple(plain["image_grid_thw"][0].tolist())
    prompt = Prompt("p", (1,), "q", images=(path,))
    (sent,) = vllm_prompt(Request([1], sized_images(prompt, processor), {}))["multi_modal_data"]["image"]
    assert sent.size == processor.size(path)
    again = own(images=[sent], do_resize=False, return_tensors="pt")
    assert torch.equal(again["pixel_values"], plain["pixel_values"])
    assert processor.token_count(path) == own.get_number_of_image_patches(size[1], size[0]) // own.merge_size**2
