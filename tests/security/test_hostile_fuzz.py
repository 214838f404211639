"""A hundred hostile files of every kind, put together from what breaks parsers: each is read, skipped and counted, or
refused in one visible line with exit code 2, within bounded time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vold import cli
from vold.config.schema import DataConfig
from vold.data.problems import load_problems
from vold.data.templates import ChatRefused, render_chats
from vold.io import visible
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import INDEX, tensor_files
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.trainer.checkpoint import Checkpoints, verify

PIECES = [
    *(b"[" * 2000, b"{", b"}", b"]", b":", b",", b'"', b"'", b"\n", b" ", b"- ", b"a", b"step", b"run_dir", b"student"),
    *(b"\x00", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", "\u202e".encode(), "\u2028".encode(), b"\r", b"\x85"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-0", b"0x" + b"f" * 5000, b"null", b"true", b"2026-99-99"),
    *(b"&a [*a]", b"*a", b"&a", b"<<: *a", b"!!python/name:os.system", b"? ", b"|\n  ", b"%YAML 9.9\n---\n"),
    *(b"../../etc/passwd", b"/dev/zero", b"~", b"file:///etc", b"x" * 5000, b"\\ud800", b"\\u0000"),
    *(b"{{ 9 ** 9 }}", b"{% for x in messages %}", b"{% endfor %}", b"{{ 'x' * 999999999 }}", b"{# ", b"{{ self }}"),
    *(
        b'"weight_map": ',
        b'"sha256": ',
        b'"state.json": ',
        b'"question": ',
        b'"answer": ',
        b'"images": ',
        b'"messages": ',
    ),
]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join) | st.binary(max_size=40)
WRAPPED = st.tuples(st.sampled_from([(b"", b""), (b"{", b"}"), (b"[", b"]"), (b'{"a": ', b"}")]), CONTENT)
FILES = [
    *("rl.yaml", "export.yaml", "run/config.yaml", "run/metrics.jsonl", "run/samples.jsonl", "run/evaluation.json"),
    *("run/timeline.jsonl", "rows.jsonl", "rows.json", "rows.tsv", "rows.csv", "rows.parquet", "grade.jsonl"),
    *("model/config.json", f"model/{INDEX}", "model/tokenizer_config.json", "model/preprocessor_config.json"),
    *("model/tokenizer.json", "model/model.safetensors", "model/generation_config.json", "model/chat_template.jinja"),
    *("run/checkpoints/latest", "run/checkpoints/step-000001/manifest.json"),
]


@pytest.fixture(scope="module")
def world(tiny_student_dir, tmp_path_factory) -> Path:
    """A directory in which one file at a time is hostile."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_student_dir, world / "model")
    (world / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    (world / "export.yaml").write_text(f"run: {world / 'run'}\nout: {world / 'out'}\n")
    (world / "run" / "config.yaml").write_text(f"verb: rl\nstudent: {world / 'none'}\ndtype: float32\n")
    return world


def read(world: Path, name: str) -> None:
    """Read the file as a command would. Raises SystemExit or ValueError."""
    path = world / name
    if name in ("rl.yaml", "grade.jsonl"):
        command(path.stem, path)
    elif name == "export.yaml":
        command("export", path, f"run={world / 'none'}")
    elif name.startswith("rows"):
        for layout in ("vqa", "messages", "geometry3k"):
            reported: list[str] = []
            try:
                load_problems(DataConfig(path=path, layout=layout, on_error="skip"), reported.append)
            finally:
                assert all(len(line.splitlines()) == 1 and visible(line) == line for line in reported)
    elif name.startswith("model/"):
        tokenizer = load_tokenizer(world / "model")
        try:
            render_chats(tokenizer, [[{"role": "user", "content": "1+1?"}]], add_generation_prompt=True)
        except ChatRefused as error:  # its callers name the row
            raise ValueError(str(error)) from None
        for reader in (Architecture.from_pretrained, tensor_files, load_prompt_encoder):
            reader(world / "model")
    elif "checkpoints" in name:
        Checkpoints(world / "run", None).latest_step()
        verify(path.parent)
    elif name == "run/config.yaml":
        command("export", world / "export.yaml")
    else:
        command("report", world / "run", "--out", world / "report.html")


def command(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.sys, "argv", ["vold", *map(str, arguments)])
        cli.main()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(FILES), content=WRAPPED)
@example(name="rl.yaml", content=((b"", b""), b"a: &a [1, 2]\nb: [*a, *a]\nsteps: 0x" + b"f" * 5000))
@example(name="model/chat_template.jinja", content=((b"", b""), b"{{ 'x' * 999999999 }}"))
@example(name=f"model/{INDEX}", content=((b'{"weight_map": ', b"}"), b'{"a": "../x"}'))
@example(name="rows.jsonl", content=((b"", b""), b"{nope\n\xff\n" + b"[" * 20_000))
@example(name="run/samples.jsonl", content=((b'{"prompt": ', b"}"), b'"\x1b[2J\xed\xa0\x80"'))
def test_a_hostile_file_is_read_or_refused_in_one_line(world, capsys, name, content):
    (before, behind), middle = content
    path = world / name
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(before + middle + behind)
    capsys.readouterr()
    started, line = time.process_time(), ""
    try:
        read(world, name)
    except SystemExit as end:
        said = capsys.readouterr()
        assert end.code in (0, None, 2), end.code
        line = said.err if end.code == 2 else ""
        assert "Traceback" not in said.err
    except (ValueError, OSError) as error:  # OSError: the command line makes a line of it
        assert not isinstance(error, OSError) or error.filename
        line = str(error) if isinstance(error, ValueError) else ""
    finally:
        path.unlink() if original is None else path.write_bytes(original)
    assert len(line.splitlines()) <= 1 and visible(line.rstrip("\n")) == line.rstrip("\n") and len(line) < 4000, line
    assert time.process_time() - started < 60.0  # a backstop: a bomb would take for ever
