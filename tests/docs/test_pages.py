"""Links have targets, every page is in the index, and the exit codes are those of the table."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from commands import ROOT, pages

from vold import cli

PAGES = [*pages(), *(ROOT / name for name in ("CHANGELOG.md", "docs/bad-input.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_in_the_index():
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    read = re.sub(r"^```.*?^```$|<[^>]+>|\[!\[[^\n]*\n|\]\([^)]*\)", " ", text, flags=re.MULTILINE | re.DOTALL)
    assert 700 < len([word for word in read.split() if re.search(r"\w", word)]) < 950


OUTCOMES = {
    0: None,
    1: AssertionError("a bug"),
    2: ValueError("steps = 0: use a value > 0"),
    129: SystemExit(129),
    130: KeyboardInterrupt(),
    143: SystemExit(143),
}


@pytest.mark.parametrize("code", OUTCOMES)
def test_exit_codes(monkeypatch, capsys, code):
    def run(*_, **__):
        if code:
            raise OUTCOMES[code]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(watch_run=run))
    monkeypatch.setattr(cli.sys, "argv", ["vold", "watch", "runs/x"])
    if code == 1:  # the interpreter prints the traceback and ends with 1
        with pytest.raises(AssertionError):
            cli.main()
    else:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    assert capsys.readouterr().err == ("vold: steps = 0: use a value > 0\n" if code == 2 else "")


def test_the_table_of_exit_codes_has_these():
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(OUTCOMES)


def test_without_a_verb_it_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, "argv", ["vold"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and "prepare-student" in printed.out
    assert printed.err == "vold: a verb is missing; see vold --help\n"


LAUNCHERS = re.compile(r"^(?:docker|sbatch|sky) .*(?:\\\n.*)*", re.MULTILINE)
TASKS = (
    *("install", "quickstart", "recipe", "images", "your-own-data", "rewards", "plan", "one-gpu", "scale-out"),
    *("rollouts", "teachers", "methods", "selfplay", "evaluation", "report", "speed", "gpu", "troubleshooting"),
    *("results", "glossary", "api"),
)


@pytest.mark.parametrize("name", TASKS)
def test_a_page_says_what_you_need_what_you_type_and_what_you_see(name):
    text = " ".join((ROOT / "docs" / f"{name}.md").read_text().split()).lower()
    for part in ("you need", "you type", "see"):
        assert part in text
    assert text.index("you need") < text.index("you type")


def test_launch_commands_of_pages_are_those_of_the_files():
    """docker, sbatch and sky, which no test can run, stand in the head of the file that they start, word by word."""
    files = ("Dockerfile", "configs/launch/slurm.sbatch", "configs/launch/skypilot.yaml")
    heads = "\n".join((ROOT / name).read_text() for name in files)
    known = {" ".join(command.replace("\\", " ").split()) for command in LAUNCHERS.findall(heads.replace("#   ", ""))}
    known = {command.replace("# ", "") for command in known}
    shown = [
        " ".join(command.replace("\\", " ").split())
        for page in PAGES
        for command in LAUNCHERS.findall(page.read_text())
    ]
    assert len(shown) >= 5 and set(shown) <= known
