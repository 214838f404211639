"""The commands that the pages show: page, line and arguments.

A ```bash block holds commands and nothing else, one a line (a backslash joins lines, `#` begins a comment). A span of
inline code that begins with a program of `PROGRAMS` is a command too; with a verb and nothing behind it, a mention.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Reading order: a page may use what an earlier one makes.
ORDER = ("README", "install", "quickstart", "recipe", "your-own-data", "scale-out", "speed")
PROGRAMS = ("vold", "python", "torchrun", "make", "pip")
BLOCK = "python block"  # in place of a verb of `vold`: the next word is Python
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_SHOWN = re.compile(r"^<!-- prints: ([^\n]*) -->\n+```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")

# What the pages leave to the reader -> its value in the directory of conftest.py.
PLACEHOLDERS = {
    "FILE": "answers.jsonl",
    "FILE.jsonl": "answers.jsonl",
    "HOST:29500": "127.0.0.1:29500",
    "N": "2",
    "RUN": "runs/qwen2.5-vl-3b/vold",
    "run_dir=AHEAD": "run_dir=runs/ahead",
}
CONFIGS = {
    "traces": "configs/qwen2.5-vl-3b/traces.yaml",
    "sft": "configs/qwen2.5-vl-3b/sft.yaml",
    "eval": "configs/qwen2.5-vl-3b/eval.yaml",
    "export": "configs/qwen2.5-vl-3b/export.yaml",
    "selfplay": "vold/miniature/configs/selfplay-diverse.yaml",
}


@dataclass(frozen=True)
class Command:
    """words: program and arguments, with placeholders filled in and without leading environment variables."""

    where: str
    text: str
    words: tuple[str, ...]

    @property
    def launcher(self) -> tuple[str, ...] | None:
        """torchrun's own arguments, where it starts the command."""
        return self.words[1 : self.words.index("-m")] if self.words[0] == "torchrun" else None

    @property
    def vold(self) -> tuple[str, ...] | None:
        """Verb and arguments of a `vold` command; None of another program's."""
        if self.words[0] == "vold":
            return self.words[1:]
        if self.words[0] in ("torchrun", "python") and "vold" in self.words:
            return self.words[self.words.index("vold") + 1 :]
        return None


def pages() -> list[Path]:
    docs = sorted((ROOT / "docs").glob("*.md"), key=lambda path: (_reading_order(path.stem), path.stem))
    return [ROOT / "README.md", *docs, ROOT / "kernels" / "README.md", ROOT / "CONTRIBUTING.md"]


def _reading_order(stem: str) -> int:
    return ORDER.index(stem) if stem in ORDER else len(ORDER)


def commands() -> list[Command]:
    """Each distinct command once, in the order of the pages."""
    distinct: dict[tuple[str, ...], Command] = {}
    for page in pages():
        for line, text in _lines(page.read_text()):
            command = Command(f"{page.relative_to(ROOT)}:{line}", text, _words(text))
            distinct.setdefault(command.words, command)
    return list(distinct.values())


def python_blocks() -> dict[str, str]:
    """Where -> code of the pages' Python that uses `vold` as a user's script does: it begins with `import vold`."""
    return {
        f"{page.relative_to(ROOT)}:{page.read_text().count(chr(10), 0, block.start()) + 2}": block[2]
        for page in pages()
        for block in _FENCE.finditer(page.read_text())
        if block[1] == "python" and block[2].startswith("import vold\n")
    }


def untagged(page: Path) -> list[str]:
    """Lines of other blocks that look like commands, which no test would run."""
    blocks = [body for kind, body in _FENCE.findall(page.read_text()) if kind != "bash"]
    return [line for body in blocks for line in body.splitlines() if re.match(rf"({'|'.join(PROGRAMS)}) [a-z-]", line)]


def _lines(text: str):
    for fence in _FENCE.finditer(text):
        if fence[1] == "bash":
            yield from _block(fence[2], text.count("\n", 0, fence.start()) + 2)
    prose = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for span in _INLINE.finditer(prose):
        if re.match(rf"({'|'.join(PROGRAMS)}) (?=[a-z-])", span[1]):
            yield prose.count("\n", 0, span.start()) + 1, span[1]


def _block(body: str, first: int):
    start, joined = first, ""
    for number, line in enumerate(body.splitlines(), start=first):
        start = start if joined else number
        joined += line.removesuffix("\\").rstrip() + " "
        if not line.endswith("\\"):
            if words := shlex.split(joined, comments=True):
                yield start, shlex.join(words)
            joined = ""


def _words(text: str) -> tuple[str, ...]:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text) if word != "[--resume]"]
    words = [word for word in words if word not in ("[RUN", "...]")]
    while _ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    verb = next((word for word in words if word in CONFIGS), "rl")
    return tuple(CONFIGS.get(verb, "configs/qwen2.5-vl-3b/vold.yaml") if word == "CONFIG" else word for word in words)


def fenced(page: str, kind: str) -> str:
    """The first block of that kind on a page of docs/."""
    return next(
        body for language, body in _FENCE.findall((ROOT / "docs" / f"{page}.md").read_text()) if language == kind
    )


@dataclass(frozen=True)
class Shown:
    """Lines of output on a page, below a mark that names the command which prints them.

    python: the place of the page's Python that prints them instead, as in `python_blocks`.
    """

    where: str
    words: tuple[str, ...]
    python: str
    lines: tuple[str, ...]


def shown_output() -> list[Shown]:
    """Each ```text block below a `<!-- prints: COMMAND -->`; `python` names the page's last such block before it."""
    found = []
    for page in pages():
        text, name = page.read_text(), str(page.relative_to(ROOT))
        blocks = {int(place.rpartition(":")[2]): place for place in python_blocks() if place.startswith(f"{name}:")}
        for mark in _SHOWN.finditer(text):
            line = text.count("\n", 0, mark.start()) + 1
            before = [place for number, place in blocks.items() if number < line]
            python = before[-1] if mark[1] == "python" else ""
            found.append(Shown(f"{name}:{line}", _words(mark[1]), python, tuple(mark[2].splitlines())))
    return found


def skeleton(line: str) -> str:
    """A line without its numbers, its curves and its room: what has to be equal wherever a command is run."""
    line = re.sub(r"[━─]+", "─", re.sub(r"[▁-█]+", "▁", line))
    return " ".join(re.sub(r"[-−]?\d[\d,.:]*(e[-+]?\d+)?", "0", line).split())
