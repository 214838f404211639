"""Mistakes and what `vold` says to them: the program behind docs/bad-input.md.

    cd SOME_STAND_IN && python tests/docs/bad_input.py      prints a JSON list of [exit code, standard error]

Run in the stand-in of conftest.py, one case after the other in one process. A case is words for `vold`, and what is
put in its place before (`prepare`). Nothing is trained but one step, so that there is a run to damage.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from vold.data.traces import SCHEMA

SFT, RL = "vold/miniature/configs/sft.yaml", "vold/miniature/configs/rl.yaml"
WORLD = "runs/miniature/seed0/data"
SMALL = [
    "evaluation={}",
    "steps=1",
    "prompts_per_step=2",
    "rollout.responses_per_prompt=2",
    "rollout.max_new_tokens=4",
    "optimizer.warmup_steps=0",
    "grader_workers=1",
]


@dataclass(frozen=True)
class Case:
    what: str
    words: tuple[str, ...]
    prepare: Callable[[], None] = lambda: None


def rl(*overrides: str) -> tuple[str, ...]:
    return ("rl", RL, "run_dir=runs/bad", *SMALL, *overrides)


def sft(*overrides: str) -> tuple[str, ...]:
    return (
        "sft",
        SFT,
        "run_dir=runs/bad",
        f"data={{path: {WORLD}/traces_other.jsonl, layout: prompt-response}}",
        *overrides,
    )


# -- what is put in place ------------------------------------------------------------------------------------------


def put(name: str, content: str | bytes) -> Callable[[], None]:
    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def data(what: str, layout: str, *rows: object, on_error: str = "stop", suffix: str = ".jsonl") -> Case:
    """A file of `rows`, read as `layout` by the first thing that stage 2 does."""
    name = f"mine/{_file(what)}{suffix}"
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return Case(what, rl(f"data={{path: {name}, layout: {layout}, on_error: {on_error}}}"), put(name, text))


def _file(what: str) -> str:
    return re.sub(r"\W+", "-", what)


def picture(what: str, image: str, content: bytes | None = None) -> Case:
    case = data(what, "vqa", {"question": "<image>?", "answer": "4", "image": image})

    def prepare() -> None:
        case.prepare()
        if content is not None:
            put(f"mine/{image}", content)()

    return Case(what, case.words, prepare)


def png(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and nothing behind it."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def table(name: str = "e", *rows: dict) -> Callable[[], None]:
    """mine/NAME.parquet, as `vold traces` writes it."""

    def write() -> None:
        texts = {"prompt_id": "p", "prompt": "1+1?", "gold": "2", "response": "2", "finish_reason": "stop"}
        parquet.write_table(pa.Table.from_pylist([texts | row for row in rows], SCHEMA), f"mine/{name}.parquet")

    return write


def model(what: str, change: Callable[[Path], object], key: str = "student") -> Case:
    """A copy of a checkpoint directory, changed."""
    name = Path("mine") / _file(what)

    def prepare() -> None:
        shutil.copytree(f"runs/miniature/seed0/{'teacher' if key == 'teacher' else 'base'}", name)
        change(name)

    return Case(what, rl(f"{key}={name}"), prepare)


def edit(file: str, *replaced: tuple[str, str]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        text = (directory / file).read_text()
        for old, new in replaced:
            assert old in text, f"{file} holds no {old}"
            text = text.replace(old, new)
        (directory / file).write_text(text)

    return change


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:size])


def run_copy(name: str, change: Callable[[Path], object]) -> Callable[[], None]:
    """runs/NAME: the finished run, changed."""

    def prepare() -> None:
        shutil.copytree("runs/done", f"runs/{name}")
        change(Path("runs") / name)

    return prepare


def flip(file: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = bytearray((directory / file).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / file).write_bytes(content)

    return change


def resumed(what: str, name: str, change: Callable[[Path], object]) -> Case:
    prepare = run_copy(name, lambda path: (edit("config.yaml", ("runs/done", f"runs/{name}"))(path), change(path)))
    return Case(what, ("rl", RL, f"run_dir=runs/{name}", *SMALL, "--resume"), prepare)


def export(run: str, *overrides: str) -> tuple[str, ...]:
    return ("export", "configs/qwen2.5-vl-3b/export.yaml", f"run=runs/{run}", "out=mine/exported", *overrides)


STEP = "checkpoints/step-000001"

SECTIONS: dict[str, list[Case]] = {
    "Words": [
        Case("a verb that is none", ("trian", RL)),
        Case("no config", ("rl",)),
        Case("an option that is none", ("rl", RL, "--resum")),
        Case("a stage that check does not know", ("check", "serve", RL)),
        Case("an option's value out of range", ("profile", RL, "--steps", "0")),
        Case("an override that is none", rl("steps")),
        Case("an override that is not YAML", rl("student={a: [")),
        Case("an override below a value", rl("steps.more=1")),
    ],
    "Configs": [
        Case("a file that is not there", ("rl", "mine/none.yaml")),
        Case("a folder", ("rl", "configs")),
        Case("not YAML", ("rl", "mine/not.yaml"), put("mine/not.yaml", "a: [1,")),
        Case("a list", ("rl", "mine/list.yaml"), put("mine/list.yaml", "- 1\n- 2\n")),
        Case("not text", ("rl", "mine/binary.yaml"), put("mine/binary.yaml", b"\xff\xfe\x00a: 1")),
        Case("another stage's", ("rl", SFT)),
        Case("an unknown key", rl("rollout.temprature=1")),
        Case("a key that is missing", ("rl", "mine/short.yaml"), put("mine/short.yaml", "run_dir: runs/x\n")),
        Case("a wrong type", rl("steps=many")),
        Case("a value out of range", rl("rollout.top_p=1.5")),
        Case("a choice that is none", rl("data.layout=orzz")),
        Case("a method that is none", rl("objective.preset=volt")),
        Case("a part of a method that is none", rl("objective.ratio=tokens")),
        Case("a teacher that nothing would be learned from", rl("objective.divergence=k1")),
        Case("a method without its teacher", rl("teacher=null")),
        Case("greedy rollouts", rl("rollout.temperature=0")),
        Case("rewards that do not add up", rl("reward.format=0.5")),
        Case("more updates than prompts", rl("minibatches=3")),
        Case("sequences that fit no micro-batch", rl("microbatch_tokens=60")),
        Case("the same in stage 1", sft("microbatch_tokens=60")),
        Case("half a schedule", rl("objective.beta_end=1e-3")),
        Case("a best of a set that is none", rl("evaluation.best=text")),
        Case("nothing to evaluate", ("eval", "vold/miniature/configs/eval.yaml", "run_dir=runs/bad", "evaluation={}")),
        Case("a url that is none", rl("rollout.engine=vllm", "rollout.vllm.urls=[draw:8000]")),
        Case("rollouts ahead on the trainer's GPU", rl("rollout.engine=vllm", "rollout.lag=1")),
        Case("vLLM where it is not installed", rl("rollout.engine=vllm")),
    ],
    "Data": [
        Case("a file that is not there", rl("data.path=mine/none.jsonl")),
        data("not JSON", "vqa", '{"question": "1+1?", \n'),
        data("no list", "vqa", {"question": "1+1?", "answer": "2"}, suffix=".json"),
        data("no rows", "vqa", ""),
        Case("not text", rl("data={path: mine/b.jsonl, layout: vqa}"), put("mine/b.jsonl", b'{"question": "\xff"}')),
        Case("no table", rl("data={path: mine/t.parquet, layout: vqa}"), put("mine/t.parquet", b"PAR1 no table")),
        data("a row of another layout", "orz", {"question": "1+1?", "answer": "2"}),
        data("a row that is no object", "vqa", 7),
        data("all rows bad, on_error=skip", "vqa", {"question": "1+1?"}, on_error="skip"),
        data("no question", "vqa", {"question": " ", "answer": "2"}),
        data("no answer", "vqa", {"question": "1+1?", "answer": ""}),
        data("an answer that is no text", "vqa", {"question": "1+1?", "answer": ["2"]}),
        data("an answer with unbalanced braces", "vqa", {"question": "1+1?", "answer": "\\frac{1}{2"}),
        data("an answer with a box of its own", "vqa", {"question": "1+1?", "answer": "\\boxed{1}\\boxed{2}"}),
        data("an answer that is no option", "vqa", {"question": "?", "answer": "C", "choices": ["1", "2"]}),
        data("traces where problems are wanted", "prompt-response", {"prompt": "1+1?", "response": "2"}),
        data("a prompt over the budget", "vqa", {"question": "1+1?" * 40, "answer": "2"}),
        data("all prompts over it, skipped", "vqa", {"question": "1+1?" * 40, "answer": "2"}, on_error="skip"),
        Case("problems where traces are wanted", sft(f"data={{path: {WORLD}/train.json, layout: orz}}")),
        Case("no traces yet", sft("data={path: runs/none, layout: traces}")),
        Case(
            "unfinished traces",
            sft("data={path: mine/half, layout: traces}"),
            put("mine/half/shard-00000.part.jsonl", ""),
        ),
        Case(
            "traces that are no table", sft("data={path: mine/x.parquet, layout: traces}"), put("mine/x.parquet", "x")
        ),
        Case("a table of something else", sft("data={path: data/mixture-of-thoughts.parquet, layout: traces}")),
        Case("no trace that was kept", sft("data={path: mine/e.parquet, layout: traces}"), table()),
        Case(
            "traces of another tokenizer",
            sft("data={path: mine/o.parquet, layout: traces}"),
            table("o", {"prompt_ids": [1], "response_ids": [151667]}),
        ),
        Case("traces that are too long", sft("max_tokens=2")),
    ],
    "Images": [
        picture("a file that is not there", "none.png"),
        picture("a path out of the data's folder", "../checkpoints/x.png"),
        picture("an absolute path", "/etc/passwd"),
        picture("an empty file", "empty.png", b""),
        picture("no image", "text.png", b"hello"),
        picture("a file that was cut off", "cut.png", png(8, 8)),
        picture("an enormous image", "huge.png", png(9000, 9000)),
        picture("a strip", "strip.png", png(5000, 10)),
        data("more marks than images", "vqa", {"question": "<image> <image>", "answer": "4"}),
        Case("mergers that no image would train", rl("vision.train_merger=true")),
    ],
    "Models": [
        Case("a folder that is not there", rl("student=checkpoints/none")),
        Case("a teacher that is not there", rl("teacher=checkpoints/none")),
        model("no tokenizer", lambda path: (path / "tokenizer.json").unlink()),
        model("a damaged tokenizer", cut("tokenizer.json", 500)),
        model("a damaged config.json", cut("config.json", 50)),
        model(
            "an architecture that is not supported",
            edit("config.json", ('"model_type": "qwen2_5_vl"', '"model_type": "llama"')),
        ),
        model("a teacher of another tokenizer", edit("tokenizer.json", ('"<w7>"', '"<x7>"')), key="teacher"),
        model("no weights", lambda path: [file.unlink() for file in path.glob("*.safetensors*")]),
        model("weights that are cut off", cut("model.safetensors", 5000)),
        model(
            "weights of another shape", edit("config.json", ('"intermediate_size": 256', '"intermediate_size": 512'))
        ),
    ],
    "Runs": [
        Case("a run_dir that holds a run", ("rl", RL, "run_dir=runs/done", *SMALL)),
        Case("a run_dir that is a file", rl("run_dir=answers.jsonl")),
        Case("nothing to resume", ("rl", RL, "run_dir=runs/none", *SMALL, "--resume")),
        Case("resumed with another key", ("rl", RL, "run_dir=runs/done", *SMALL, "optimizer.lr=1", "--resume")),
        resumed("a damaged config.yaml", "garbled", lambda path: (path / "config.yaml").write_text("a: [")),
        resumed(
            "a pointer to nowhere", "pointer", lambda path: (path / "checkpoints/latest").write_text("step-000009\n")
        ),
        resumed("a flipped bit", "flipped", flip(f"{STEP}/rank-00000.safetensors")),
        resumed("a file that was cut off", "short", cut(f"{STEP}/rank-00000.safetensors", 1000)),
        resumed("a file that is gone", "gone", lambda path: (path / STEP / "state.json").unlink()),
        resumed("no manifest", "foreign", lambda path: (path / STEP / "manifest.json").unlink()),
        resumed("a damaged metrics.jsonl", "metrics", lambda path: (path / "metrics.jsonl").write_bytes(b"\xff\n7\n")),
        Case("export of no run", export("none")),
        Case(
            "export of a run without a checkpoint",
            export("bare"),
            run_copy("bare", lambda path: shutil.rmtree(path / "checkpoints")),
        ),
        Case(
            "export of a damaged config.yaml",
            export("torn"),
            run_copy("torn", lambda path: (path / "config.yaml").write_text("verb: rl\nstudent: [\n")),
        ),
        Case(
            "export of a config.yaml that lacks keys",
            export("bald"),
            run_copy("bald", lambda path: (path / "config.yaml").write_text("verb: rl\n")),
        ),
        Case("export of a step that is not there", export("done", "step=7")),
        Case("export of a best that is not there", export("done", "step=best")),
        Case("export onto something", ("export", "configs/qwen2.5-vl-3b/export.yaml", "run=runs/done", "out=data")),
        Case("report of no run", ("report", "runs/none")),
        Case("report of a folder without runs", ("report", "data")),
        Case("report into a folder", ("report", "runs/done", "--out", "data")),
        Case("report onto a full disk", ("report", "runs/done", "--out", "/dev/full")),
        Case("watch of no run", ("watch", "data")),
        Case("profile beside no profile", ("profile", RL, *SMALL, "run_dir=runs/p", "--beside", "runs/done")),
        Case(
            "prepare-student onto something",
            ("prepare-student", "runs/miniature/seed0/base", "runs/miniature/seed0/teacher", "data"),
        ),
        Case("prepare-student of no checkpoint", ("prepare-student", "data", "runs/miniature/seed0/teacher", "mine/p")),
        Case("serve without vLLM", ("serve", "rl", RL)),
    ],
    "vold grade": [
        Case("a file that is not there", ("grade", "mine/none.jsonl")),
        Case("a folder", ("grade", "data")),
        Case("not JSON", ("grade", "mine/g1.jsonl"), put("mine/g1.jsonl", "{")),
        Case("no gold", ("grade", "mine/g2.jsonl"), put("mine/g2.jsonl", '{"response": "2"}\n')),
        Case(
            "a response that is no text",
            ("grade", "mine/g3.jsonl"),
            put("mine/g3.jsonl", '{"gold": 2, "response": 2}\n'),
        ),
        Case("no worker", ("grade", "answers.jsonl", "--workers", "0")),
    ],
    # Last: a check that fails leaves pretended process groups.
    "Layouts": [
        Case("tp x pp does not divide the processes", rl("parallel.tp=2")),
        Case("the same, before the launch", ("check", "rl", RL, "parallel.pp=3", "--processes", "8")),
        Case("tp does not divide the heads", ("check", "rl", RL, "parallel.tp=4", "--processes", "4")),
        Case("pp does not divide the layers", ("check", "rl", RL, "parallel.pp=2", "--processes", "2")),
        Case("vpp without pp", ("check", "rl", RL, "parallel.vpp=2", "--processes", "2")),
        Case("sp without tp", rl("parallel.sp=true")),
        Case("no process", ("check", "rl", RL, "--processes", "0")),
    ],
}


def main() -> None:
    from execute import run

    code, said, _ = run(["rl", RL, "run_dir=runs/done", *SMALL])
    assert code == 0, said
    found = []
    for case in (case for cases in SECTIONS.values() for case in cases):
        case.prepare()
        code, _, error = run(list(case.words))
        found.append([code, error.replace(f"{Path.cwd()}/", "").strip()])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
