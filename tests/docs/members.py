"""What was tried of each way in which real checkpoints and data differ from a miniature, as a table:

python tests/docs/members.py [--write]      runs those tests and prints it; --write: benchmarks/results/members.md
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "benchmarks" / "results" / "members.md"
TITLE = "# Members tried of each kind\n\nWritten by tests/docs/members.py.\n\n"
DATA, ENDS, RENDERING = "data/test_members.py", "models/test_endings.py", "train/test_one_rendering.py"

# kind -> (file, beginnings of the names of its tests)
KINDS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "one rendering of prompts for a pair": ((RENDERING, ("test_",)),),
    "end tokens: taught, emitted, stopped at": ((ENDS, ("test_one_set", "test_ends_that", "test_a_base_student")),),
    "ids with holes, or beyond the head": ((ENDS, ("test_ids_",)),),
    "a tied flag beside a head of its own": ((ENDS, ("test_a_tied",)),),
    "thinking tags: prefilled, special": ((ENDS, ("test_a_prefilled", "test_thinking")),),
    "encodings, compressions, formats": (
        (
            DATA,
            (
                "test_files",
                "test_dates",
                "test_text_that",
                "test_a_truncated",
                "test_save_to",
                "test_parquet",
                "test_formats",
            ),
        ),
    ),
    "splits, subsets, hub snapshots": ((DATA, ("test_splits", "test_a_split", "test_the_card", "test_a_hub")),),
    "columns": ((DATA, ("test_a_missing", "test_columns", "test_dotted")),),
    "rows as TRL, verl, ms-swift and others write them": (("docs/test_your_own_data.py", ("test_",)),),
    "options, and answers that name them": (
        (DATA, ("test_options", "test_what_is_no_list", "test_an_answer", "test_letters", "test_a_printed")),
    ),
    "roles, history, marks of turns": (
        (
            DATA,
            (
                "test_prompts_by_role",
                "test_what_is_no_target",
                "test_marks_and",
                "test_marks_that",
                "test_turns_before",
                "test_a_history",
                "test_a_prompt_that",
                "test_every_assistant",
                "test_images_stay",
                "test_a_thought",
            ),
        ),
    ),
    "gold answers": (
        (
            DATA,
            ("test_golds", "test_the_setting", "test_several", "test_any_of", "test_published", "test_prompts_with"),
        ),
    ),
    "prompts without gold answers": (("train/test_without_golds.py", ("test_",)),),
    "pictures: forms, EXIF, marks, one resize": (
        (DATA, ("test_a_picture", "test_exif", "test_numbered", "test_marks_without", "test_one_resize")),
        ("data/test_pictures.py", ("test_",)),
    ),
    "steps with nothing, or nothing finite, to learn": (("trainer/test_bad_steps.py", ("test_",)),),
    "GGUF files": (("models/test_gguf.py", ("test_",)),),
}


def kind_of(nodeid: str) -> str | None:
    """The kind that a test belongs to."""
    file, _, name = nodeid.partition(":")
    name = name.lstrip(":")
    for kind, places in KINDS.items():
        if any(file.endswith(place) and name.startswith(names) for place, names in places):
            return kind
    return None


class Counts:
    """A plugin of pytest that counts outcomes by kind."""

    def __init__(self) -> None:
        self.outcomes = {kind: Counter() for kind in KINDS}

    def pytest_runtest_logreport(self, report) -> None:
        kind = kind_of(report.nodeid)
        if kind and (report.when == "call" or (report.outcome != "passed" and report.when == "setup")):
            self.outcomes[kind][report.outcome] += 1

    def table(self) -> str:
        rows = ["| kind | members tried | pass | fail | skipped | in |", "|:--|--:|--:|--:|--:|:--|"]
        for kind, counts in self.outcomes.items():
            numbers = " | ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))
            files = ", ".join(f"`tests/{file}`" for file, _ in KINDS[kind])
            rows.append(f"| {kind} | {sum(counts.values())} | {numbers} | {files} |")
        total = sum(sum(counts.values()) for counts in self.outcomes.values())
        passed = sum(counts["passed"] for counts in self.outcomes.values())
        return "\n".join([*rows, f"| together | {total} | {passed} | | | |"]) + "\n"


def main() -> int:
    files = sorted({str(TESTS / file) for places in KINDS.values() for file, _ in places})
    counts = Counts()
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *files], plugins=[counts])
    sys.stdout.write("\n" + counts.table())
    if "--write" in sys.argv:
        PAGE.write_text(TITLE + counts.table())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
