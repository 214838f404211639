"""Users' mistakes, and what `vold` prints for each: the program behind docs/bad-input.md.

Run by stand_in.py in the directory of conftest.py. A case is the arguments of `vold` and a function that first writes
the files it needs (`prepare`). One step is trained, so that there is a run to damage.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
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
    mistake: str
    arguments: tuple[str, ...]
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


# -- files that a case needs ------------------------------------------------------------------------------------------


def put(name: str, content: str | bytes) -> Callable[[], None]:
    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def data(mistake: str, layout: str, *rows: object, on_error: str = "stop", suffix: str = ".jsonl") -> Case:
    """A data file of `rows`, read as `layout` when stage 2 starts."""
    name = f"mine/{_file_name(mistake)}{suffix}"
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return Case(mistake, rl(f"data={{path: {name}, layout: {layout}, on_error: {on_error}}}"), put(name, text))


def _file_name(mistake: str) -> str:
    return re.sub(r"\W+", "-", mistake)


def picture(mistake: str, image: str, content: bytes | None = None) -> Case:
    case = data(mistake, "vqa", {"question": "<image>?", "answer": "4", "image": image})

    def prepare() -> None:
        case.prepare()
        if content is not None:
            put(f"mine/{image}", content)()

    return Case(mistake, case.arguments, prepare)


def png(width: int, height: int) -> bytes:
    """A PNG header of that size without pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def table(name: str = "e", *rows: dict) -> Callable[[], None]:
    """mine/NAME.parquet, as `vold traces` writes it."""

    def write() -> None:
        texts = {"prompt_id": "p", "prompt": "1+1?", "gold": "2", "response": "2", "finish_reason": "stop"}
        parquet.write_table(pa.Table.from_pylist([texts | row for row in rows], SCHEMA), f"mine/{name}.parquet")

    return write


def model(mistake: str, change: Callable[[Path], object], key: str = "student") -> Case:
    """A changed copy of a checkpoint directory."""
    name = Path("mine") / _file_name(mistake)

    def prepare() -> None:
        shutil.copytree(f"runs/miniature/seed0/{'teacher' if key == 'teacher' else 'base'}", name)
        change(name)

    return Case(mistake, rl(f"{key}={name}"), prepare)


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
    """runs/NAME: a changed copy of the finished run."""

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


def resumed(mistake: str, name: str, change: Callable[[Path], object]) -> Case:
    prepare = run_copy(name, lambda path: (edit("config.yaml", ("runs/done", f"runs/{name}"))(path), change(path)))
    return Case(mistake, ("rl", RL, f"run_dir=runs/{name}", *SMALL, "--resume"), prepare)


def export(run: str, *overrides: str) -> tuple[str, ...]:
    return ("export", "configs/qwen2.5-vl-3b/export.yaml", f"run=runs/{run}", "out=mine/exported", *overrides)


STEP = "checkpoints/step-000001"

SECTIONS: dict[str, list[Case]] = {
    "Command line": [
        Case("an unknown verb", ("trian", RL)),
        Case("no config", ("rl",)),
        Case("an unknown option", ("rl", RL, "--resum")),
        Case("a stage that check does not support", ("check", "serve", RL)),
        Case("an option's value out of range", ("profile", RL, "--steps", "0")),
        Case("an override without a value", rl("steps")),
        Case("an override that is not YAML", rl("student={a: [")),
        Case("an override of a key inside a value", rl("steps.more=1")),
    ],
    "Configs": [
        Case("a missing file", ("rl", "mine/none.yaml")),
        Case("a folder", ("rl", "configs")),
        Case("not YAML", ("rl", "mine/not.yaml"), put("mine/not.yaml", "a: [1,")),
        Case("a list instead of a mapping", ("rl", "mine/list.yaml"), put("mine/list.yaml", "- 1\n- 2\n")),
        Case("not text", ("rl", "mine/binary.yaml"), put("mine/binary.yaml", b"\xff\xfe\x00a: 1")),
        Case("the config of another stage", ("rl", SFT)),
        Case("an unknown key", rl("rollout.temprature=1")),
        Case("a missing key", ("rl", "mine/short.yaml"), put("mine/short.yaml", "run_dir: runs/x\n")),
        Case("a wrong type", rl("steps=many")),
        Case("a value out of range", rl("rollout.top_p=1.5")),
        Case("an unknown choice", rl("data.layout=orzz")),
        Case("an unknown method", rl("objective.preset=volt")),
        Case("an unknown part of a method", rl("objective.ratio=tokens")),
        Case("a divergence with an expected gradient of 0", rl("objective.divergence=k1")),
        Case("a method without its teacher", rl("teacher=null")),
        Case("greedy rollouts", rl("rollout.temperature=0")),
        Case("rewards that do not add up", rl("reward.format=0.5")),
        Case("a reward function that is not there", rl("reward.function=mine/none.py:f")),
        Case("a pattern of `train` that takes nothing", rl("train=[layers.99]")),
        Case("a part of a joined matrix to train", rl("train=[layers.0.self_attn.q_proj]")),
        Case("a learning rate for what is frozen", rl("optimizer.lr_groups={visual: 1.0e-6}")),
        Case("dropout of everything", rl("adapter={dropout: 1.0}")),
        Case("adapters for an engine that takes none", rl("adapter={sync: adapter}")),
        Case("DoRA", rl("adapter={use_dora: true}")),
        Case("frozen weights in 4 bits without bitsandbytes", rl("adapter={base_bits: 4}")),
        Case("activations offloaded and recomputed", rl("parallel={offload_activations: true, recompute: swiglu}")),
        Case(
            "a reward file that cannot be imported",
            rl("reward.function=mine/broken.py:f"),
            put("mine/broken.py", "import nobody_has_this\n"),
        ),
        Case(
            "a reward function with strange arguments",
            rl("reward.function=mine/strange.py:f"),
            put("mine/strange.py", "def f(completions): return 1\n"),
        ),
        Case("routing by an unknown term", rl("objective.routing_term=style")),
        Case(
            "a judge without its key",
            rl("reward.judge={url: 'http://localhost:9/v1', model: m, api_key_env: VOLD_NO_SUCH_KEY}"),
        ),
        Case("a judge that reads no score", rl("reward.judge={url: 'http://localhost:9/v1', model: m, pattern: good}")),
        Case("more updates than prompts", rl("minibatches=3")),
        Case("sequences that fit no micro-batch", rl("microbatch_tokens=60")),
        Case("the same in stage 1", sft("microbatch_tokens=60")),
        Case("half a schedule", rl("objective.beta_end=1e-3")),
        Case("the best checkpoint on an unknown set", rl("evaluation.best=text")),
        Case("nothing to evaluate", ("eval", "vold/miniature/configs/eval.yaml", "run_dir=runs/bad", "evaluation={}")),
        Case("an invalid url", rl("rollout.engine=vllm", "rollout.vllm.urls=[draw:8000]")),
        Case("rollouts ahead on the trainer's GPU", rl("rollout.engine=vllm", "rollout.lag=1")),
        Case("vLLM where it is not installed", rl("rollout.engine=vllm")),
    ],
    "Data": [
        Case("a missing file", rl("data.path=mine/none.jsonl")),
        data("not JSON", "vqa", '{"question": "1+1?", \n'),
        data("an object instead of a list", "vqa", {"question": "1+1?", "answer": "2"}, suffix=".json"),
        data("no rows", "vqa", ""),
        Case("not text", rl("data={path: mine/b.jsonl, layout: vqa}"), put("mine/b.jsonl", b'{"question": "\xff"}')),
        Case("not Parquet", rl("data={path: mine/t.parquet, layout: vqa}"), put("mine/t.parquet", b"PAR1 no table")),
        data("a row of another layout", "orz", {"question": "1+1?", "answer": "2"}),
        data("a row that is not an object", "vqa", 7),
        data("all rows bad, on_error=skip", "vqa", {"question": "1+1?"}, on_error="skip"),
        data("no question", "vqa", {"question": " ", "answer": "2"}),
        data("no answer", "vqa", {"question": "1+1?", "answer": ""}),
        data("an answer that is not text", "vqa", {"question": "1+1?", "answer": {"value": 2}}),
        data("an answer with unbalanced braces", "vqa", {"question": "1+1?", "answer": "\\frac{1}{2"}),
        data("an answer with a box of its own", "vqa", {"question": "1+1?", "answer": "\\boxed{1}\\boxed{2}"}),
        data("an answer outside the options", "vqa", {"question": "?", "answer": "C", "choices": ["1", "2"]}),
        data(
            "prompts without answers, where answers are graded",
            "messages",
            {"messages": [{"role": "user", "content": "1+1?"}]},
        ),
        data("a gold answer behind a solution", "vqa", {"question": "1+1?", "answer": "One and one.\n#### 2"}),
        data("a conversation with a tool", "messages", {"messages": [{"role": "tool", "content": "2"}]}),
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
            "traces that are not Parquet",
            sft("data={path: mine/x.parquet, layout: traces}"),
            put("mine/x.parquet", "x"),
        ),
        Case("a table of another kind", sft("data={path: data/mixture-of-thoughts.parquet, layout: traces}")),
        Case("no trace left", sft("data={path: mine/e.parquet, layout: traces}"), table()),
        Case(
            "traces of another tokenizer",
            sft("data={path: mine/o.parquet, layout: traces}"),
            table("o", {"prompt_ids": [1], "response_ids": [151667]}),
        ),
        Case("traces that are too long", sft("max_tokens=2")),
    ],
    "Images": [
        picture("a missing file", "none.png"),
        picture("a path out of the data's folder", "../checkpoints/x.png"),
        picture("an absolute path", "/etc/passwd"),
        picture("an empty file", "empty.png", b""),
        picture("not an image", "text.png", b"hello"),
        picture("a truncated file", "cut.png", png(8, 8)),
        picture("an enormous image", "huge.png", png(9000, 9000)),
        picture("an extreme aspect ratio", "strip.png", png(5000, 10)),
        data("more image marks than images", "vqa", {"question": "<image> <image>", "answer": "4"}),
        Case("a trained merger without images", rl("vision.train_merger=true")),
    ],
    "Models": [
        Case("a missing folder", rl("student=checkpoints/none")),
        Case("a missing teacher", rl("teacher=checkpoints/none")),
        model("no tokenizer", lambda path: (path / "tokenizer.json").unlink()),
        model("a damaged tokenizer", cut("tokenizer.json", 500)),
        model("a damaged config.json", cut("config.json", 50)),
        model(
            "an unsupported architecture",
            edit("config.json", ('"model_type": "qwen2_5_vl"', '"model_type": "cohere"')),
        ),
        model("a teacher with another tokenizer", edit("tokenizer.json", ('"<w7>"', '"<x7>"')), key="teacher"),
        model("no weights", lambda path: [file.unlink() for file in path.glob("*.safetensors*")]),
        model("truncated weights", cut("model.safetensors", 5000)),
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
            "a latest that names no checkpoint",
            "pointer",
            lambda path: (path / "checkpoints/latest").write_text("step-000009\n"),
        ),
        resumed("a flipped bit", "flipped", flip(f"{STEP}/rank-00000.safetensors")),
        resumed("a truncated file", "short", cut(f"{STEP}/rank-00000.safetensors", 1000)),
        resumed("a deleted file", "gone", lambda path: (path / STEP / "state.json").unlink()),
        resumed("no manifest", "foreign", lambda path: (path / STEP / "manifest.json").unlink()),
        resumed("a damaged metrics.jsonl", "metrics", lambda path: (path / "metrics.jsonl").write_bytes(b"\xff\n7\n")),
        Case("export of a folder without a run", export("none")),
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
        Case("export of a missing step", export("done", "step=7")),
        Case("export of a missing best checkpoint", export("done", "step=best")),
        Case(
            "export into a folder that is not empty",
            ("export", "configs/qwen2.5-vl-3b/export.yaml", "run=runs/done", "out=data"),
        ),
        Case("report of a missing folder", ("report", "runs/none")),
        Case("report of a folder without runs", ("report", "data")),
        Case("report written to a folder", ("report", "runs/done", "--out", "data")),
        Case("report written to a full disk", ("report", "runs/done", "--out", "/dev/full")),
        Case("watch of a folder without a run", ("watch", "data")),
        Case(
            "profile beside a run without a profile", ("profile", RL, *SMALL, "run_dir=runs/p", "--beside", "runs/done")
        ),
        Case(
            "prepare-student into a folder that is not empty",
            ("prepare-student", "runs/miniature/seed0/base", "runs/miniature/seed0/teacher", "data"),
        ),
        Case(
            "prepare-student of a folder without a checkpoint",
            ("prepare-student", "data", "runs/miniature/seed0/teacher", "mine/p"),
        ),
        Case("serve without vLLM", ("serve", "rl", RL)),
    ],
    "vold grade": [
        Case("a missing file", ("grade", "mine/none.jsonl")),
        Case("a folder", ("grade", "data")),
        Case("not JSON", ("grade", "mine/g1.jsonl"), put("mine/g1.jsonl", "{")),
        Case("no gold", ("grade", "mine/g2.jsonl"), put("mine/g2.jsonl", '{"response": "2"}\n')),
        Case(
            "a response that is not text",
            ("grade", "mine/g3.jsonl"),
            put("mine/g3.jsonl", '{"gold": 2, "response": 2}\n'),
        ),
        Case("no workers", ("grade", "answers.jsonl", "--workers", "0")),
    ],
    # Last: a check that fails leaves fake process groups.
    "Layouts": [
        Case("tp x pp does not divide the processes", rl("parallel.tp=2")),
        Case("the same, before the launch", ("check", "rl", RL, "parallel.pp=3", "--processes", "8")),
        Case("tp does not divide the heads", ("check", "rl", RL, "parallel.tp=4", "--processes", "4")),
        Case("pp does not divide the layers", ("check", "rl", RL, "parallel.pp=2", "--processes", "2")),
        Case("vpp without pp", ("check", "rl", RL, "parallel.vpp=2", "--processes", "2")),
        Case("sp without tp", rl("parallel.sp=true")),
        Case("no processes", ("check", "rl", RL, "--processes", "0")),
    ],
}


def finished_run() -> None:
    """Make runs/done, where it is not there yet."""
    from execute import run

    if not Path("runs/done").exists():
        code, _, error = run(["rl", RL, "run_dir=runs/done", *SMALL])
        assert code == 0, error


def outcomes() -> list[tuple[int, str]]:
    """Exit code and standard error of each case."""
    from execute import run

    finished_run()
    found = []
    for case in (case for cases in SECTIONS.values() for case in cases):
        case.prepare()
        code, _, error = run(list(case.arguments))
        found.append((code, error.replace(f"{Path.cwd()}/", "").strip()))
    return found
