"""The grading benchmark's answers are as described: equal or not, decided by the policy or by the parser."""

from benchmarks.grading import HUNG, PARSED_SHARE, items, question
from vold.grading import Grader


def test_right_answers_are_right_and_only_the_others_need_the_parser():
    cases = [(n, parsed, right) for n in range(10) for parsed in (False, True) for right in (False, True)]
    rows = [question(*case) for case in cases]
    with Grader(workers=1, seconds=20) as grader:
        verdicts = grader.grade([(rf"\boxed{{{answer}}}", gold, False) for answer, gold in rows])
    for case, row, verdict in zip(cases, rows, verdicts, strict=True):
        _, parsed, right = case
        assert (verdict.outcome == "correct") is right, (row, verdict)
        assert (verdict.rule == "algebra") is parsed, (row, verdict)


def test_rows_differ_and_have_their_share_of_hung_ones():
    for mix in PARSED_SHARE:
        rows = items(mix, 200, HUNG[-1])
        assert len(set(rows)) == 200
        assert sum(response.endswith("!}.") for response, _, _ in rows) == 200 * HUNG[-1]
