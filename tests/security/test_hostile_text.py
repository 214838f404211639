"""Text of a model or a file on a terminal or a page: nothing hides, moves the cursor, or is taken for markup."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from vold import cli
from vold.commands.watch import LiveRun
from vold.io import configure_logging, log, visible
from vold.report import write_report
from vold.report.samples import thumbnail
from vold.report.watch import view

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\u200b\ufeff\x00\x7f\u2028\u0085\r"
MARKUP = "[bold][/][link=http://x.invalid]<script>alert(1)</script>{{ 7 * 7 }}&#x202e;$\\frac{"
NASTY = ESCAPES + MARKUP


def hidden(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory whose every name and value is nasty."""
    run = tmp_path_factory.mktemp("runs") / f"r{NASTY.translate({0: None, ord('/'): None})}"
    run.mkdir()
    config = {"verb": f"rl{NASTY}", "steps": 3, NASTY: NASTY, "data": {"path": NASTY, NASTY: [NASTY]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    rows = [{"step": n, "reward": 0.5, "seconds": 1.0, NASTY: 2.0, f"seconds_{NASTY}": 0.7} for n in (1, 2, 3)]
    tokens = {"tokens": [NASTY, "a"], "logp": [-1.0, -2.0], "logp_teacher": [-9.0, -2.0]}
    texts = dict.fromkeys(("prompt", "response", "gold", "extracted", "category", "set", "prompt_id", "verdict"), NASTY)
    samples = [{"step": n, **texts, **tokens, "images": [NASTY], "finish_reason": NASTY} for n in (1, 2)]
    timeline = [{"step": NASTY, "seconds": 1.0, "intervals": [[NASTY, NASTY, 0.0, 1.0], ["train", "", 0.0, 0.5]]}]
    entry = {"accuracy": 0.5, "n": 2, "kinds": {NASTY: {"accuracy": 0.5, "n": 1}}, NASTY: NASTY}
    for name, found in (("metrics", rows), ("samples", samples), ("timeline", timeline)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    evaluation = {"sets": {NASTY: entry}, "benchmarks": {NASTY: {NASTY: NASTY, "accuracy": 1.0}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def test_nothing_hides_on_a_page(run, tmp_path):
    html = write_report([run], tmp_path / "report.html", title=NASTY).read_text()
    assert not hidden(html) and "⟨001B⟩" in html and "⟨202E⟩" in html
    assert "<script>alert" not in html and "49" not in html.partition("alert(1)")[2][:60]


def test_nothing_hides_in_a_terminal(run):
    console = Console(file=(out := io.StringIO()), width=400)
    console.print(view(LiveRun(run).refresh()))
    assert not hidden(out.getvalue()) and "⟨001B⟩" in out.getvalue()


def test_nothing_hides_in_the_log(capsys, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])
    configure_logging()
    log.info(f"a {NASTY}")
    log.warning("b %s", NASTY)
    logging.getLogger("vold").error(NASTY)
    said = capsys.readouterr()
    assert not hidden(said.out + said.err) and "⟨001B⟩" in said.out and "⟨202E⟩" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("rl", f"{ESCAPES[:8]}.yaml"),
        ("export", "c.yaml", f"run={ESCAPES[:8]}"),
        ("watch", f"x{NASTY.translate({0: None})}"),
        ("report", f"x{NASTY.translate({0: None})}"),
        ("grade", f"x{NASTY.translate({0: None})}"),
        (f"x{ESCAPES}",),
        ("rl", f"--x{ESCAPES}"),
        ("watch", "a\0b"),
        ("report", "a\0b"),
        ("grade", "a\0b"),
        ("rl", "a\0b"),
        ("watch", "x" * 5000),
        ("report", "x" * 5000),
        ("grade", "x" * 5000),
        ("rl", "x" * 5000),
        ("report", ".", "--out", "x" * 5000),
        ("prepare-student", "x" * 5000, "y", "z"),
    ],
    ids=lambda arguments: visible(" ".join(arguments))[:30],
)
def test_a_mistake_with_hidden_characters_is_one_visible_line(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("out: o\n")
    monkeypatch.setattr(cli.sys, "argv", ["vold", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    said = capsys.readouterr()
    assert error.value.code == 2 and not said.out and len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("vold: ") and not hidden(said.err) and len(said.err) < 3000


def test_a_long_value_is_shortened(capsys, monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text(f"run: r\nout: [{'x' * 200_000}]\n")
    monkeypatch.setattr(cli.sys, "argv", ["vold", "export", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit):
        cli.main()
    assert 100 < len(capsys.readouterr().err) < 3000


def test_an_enormous_picture_is_not_drawn(tmp_path):
    Image.new("1", (20_000, 5_000)).save(tmp_path / "huge.png")
    assert thumbnail(tmp_path / "huge.png").note == "huge.png: over 64000000 pixels"
