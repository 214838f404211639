"""Grading: does a response's boxed answer equal the gold answer? Rule-based, in workers that can be killed.

`Grader` is what training uses. `equal` is the same policy in the calling process, without a time limit.
Importing this package imports neither torch nor sympy; the symbolic part loads inside the workers.
"""

from vold.grading.alternatives import grade_answers
from vold.grading.equality import equal
from vold.grading.extract import extract_answer
from vold.grading.gold import normal_form, validate_gold
from vold.grading.item import Item
from vold.grading.pool import Grader
from vold.grading.reward import reward

__all__ = ["Grader", "Item", "equal", "extract_answer", "grade_answers", "normal_form", "reward", "validate_gold"]
