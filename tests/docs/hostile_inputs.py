"""Files of others that attack, and what `vold` prints for each: the program behind test_hostile_inputs.py.

Run by stand_in.py in the directory of conftest.py like bad_input.py, whose cases these are.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

from bad_input import STEP, Case, _file_name, data, export, finished_run, model, put, resumed, rl, run_copy
from safetensors.torch import load_file, save_file


def sparse(name: str, size: int = 1 << 40) -> Callable[[Path], None]:
    """A file of that size which takes no room, instead of the one in a directory."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).touch()
        os.truncate(directory / name, size)

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda directory: put(str(directory / name), content)()


def index(file: object) -> Callable[[Path], None]:
    return write("model.safetensors.index.json", json.dumps({"weight_map": {"model.norm.weight": file}}))


def template(text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "chat_template.jinja").write_text(text)

    return change


def forged(name: str, content: bytes) -> Callable[[Path], None]:
    """A file of the checkpoint, with its digest in the manifest."""

    def change(directory: Path) -> None:
        step = directory / STEP
        (step / name).write_bytes(content)
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
        (step / "manifest.json").write_text(json.dumps(manifest))

    return change


def number(key: str, value: int) -> Callable[[Path], None]:
    """Another number in the language model's part of config.json."""

    def change(directory: Path) -> None:
        fields = json.loads((directory / "config.json").read_text())
        fields["text_config"][key] = value
        (directory / "config.json").write_text(json.dumps(fields))

    return change


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def nan(found: dict) -> None:
    found[next(name for name in found if "layers.0" in name and "visual" not in name)].view(-1)[0] = float("nan")


def data_file(mistake: str, name: str, change: Callable[[Path], object]) -> Case:
    def prepare() -> None:
        Path("mine").mkdir(exist_ok=True)
        change(Path("mine"))

    return Case(mistake, rl(f"data={{path: mine/{name}, layout: vqa}}"), prepare)


def config(mistake: str, text: str) -> Case:
    return Case(mistake, ("rl", f"mine/{_file_name(mistake)}.yaml"), put(f"mine/{_file_name(mistake)}.yaml", text))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
CLIMBS = '{"sha256": {"state.json": "0", "../../x": "0"}}'
HEADER = struct.pack("<Q", 1 << 40)


MOST_BYTES = 16 << 30
CASES = [
    config("a config of aliases that multiply", LAUGHS),
    config("a config of merge keys that multiply", MERGES),
    config("a config in itself", "run_dir: &a [*a]\n"),
    config("a config of brackets", "run_dir: " + "[" * 20_000),
    config("a config of half a megabyte", "run_dir: " + "x" * 500_000),
    config("a config that makes objects", "run_dir: !!python/object/apply:os.system [id]\n"),
    config("a config with terminal escapes", 'run_dir: x\n"\\e[2J\\u202e": 1\n'),
    Case("a config with an infinite number", rl("optimizer.lr=.inf")),
    data("an image path out of its folder by links", "vqa", {"question": "?", "answer": "4", "image": "a/../../x"}),
    data(
        "a picture in the place of its path",
        "virl39k",
        {"question": "<image>?", "answer": "4", "image": ["A" * 9999]},
    ),
    data("a row of brackets", "vqa", "[" * 50_000 + "\n"),
    data("a row with a number of 5000 digits", "vqa", '{"question": "1+1?", "answer": ' + "1" * 5000 + "}\n"),
    data_file("a giant data file", "giant.json", sparse("giant.json")),
    data_file("a pipe as data", "pipe.jsonl", pipe("pipe.jsonl")),
    data_file("a device as data", "zero.jsonl", link("zero.jsonl", "/dev/zero")),
    model("an index with a path", index("../../../../etc/passwd")),
    model("an index with an absolute path", index("/etc/passwd")),
    model("an index with a number", index(7)),
    model("a giant config.json", sparse("config.json")),
    model("a giant tokenizer.json", sparse("tokenizer.json")),
    model("a giant index", sparse("model.safetensors.index.json")),
    model("a pipe for a config.json", pipe("config.json")),
    model("a header without end", write("model.safetensors", HEADER + b"{" * 100)),
    model("a config.json of brackets", write("config.json", "[" * 100_000)),
    model("a billion layers", number("num_hidden_layers", 10**9)),
    model("a vocabulary of a billion", number("vocab_size", 10**9)),
    model("a hidden width of a billion", number("hidden_size", 10**9)),
    model("a head width of zero", number("num_attention_heads", 0)),
    model("weights that are no numbers", tensors(nan)),
    model(
        "a chat template without end",
        template("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3),
    ),
    model("a chat template without bounds", template("{{ 'x' * 9999999999 }}")),
    model("a chat template that is no template", template("{% if %}")),
    model("a chat template that reads files", template("{{ ''.__class__.__mro__ }}")),
    resumed("aliases that multiply in a config.yaml", "laughs", write("config.yaml", LAUGHS)),
    resumed(
        "a manifest with a path",
        "climbs",
        write(f"{STEP}/manifest.json", CLIMBS),
    ),
    resumed("a giant manifest", "giant", sparse(f"{STEP}/manifest.json")),
    resumed("a forged state.json", "state", forged("state.json", b"[1]")),
    resumed("a state.json without a schedule", "half", forged("state.json", b'{"step": 1}')),
    resumed("a forged shard", "shard", forged("rank-00000.safetensors", HEADER + b"{}")),
    resumed("a pickle as a shard", "pickle", forged("rank-00000.safetensors", b"\x80\x04cos\nsystem\n(S'id'\ntR.")),
    resumed("a latest that is a device", "device", link("checkpoints/latest", "/dev/zero")),
    resumed("a latest of 40 digits", "digits", write("checkpoints/latest", "step-" + "9" * 40)),
    Case(
        "export of a run whose student is no folder",
        export("thief"),
        run_copy("thief", write("config.yaml", "verb: rl\nstudent: [/etc]\ndtype: bfloat16\n")),
    ),
    Case(
        "export of a run with another dtype",
        export("odd"),
        run_copy("odd", write("config.yaml", "verb: rl\nstudent: runs/miniature/seed0/base\ndtype: load\n")),
    ),
    Case(
        "export of a run whose adapter is a list",
        export("listed"),
        run_copy("listed", write("config.yaml", "verb: rl\nstudent: x\ndtype: bfloat16\nadapter: [1]\n")),
    ),
    Case(
        "export of a run whose prompt is a text",
        export("texted"),
        run_copy("texted", write("config.yaml", "verb: rl\nstudent: x\ndtype: bfloat16\nprompt: hello\n")),
    ),
    Case("grade of brackets", ("grade", "mine/g4.jsonl"), put("mine/g4.jsonl", "[" * 50_000)),
]


def outcomes() -> list[tuple[int, str, float, float]]:
    """Exit code, standard error, CPU seconds and growth of the process in MB of each case."""
    from execute import run

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # an attack that works ends this process alone
    finished_run()
    found = []
    for case in CASES:
        case.prepare()
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, _, error = run(list(case.arguments))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found.append((code, error, time.process_time() - started, grown))
    return found
