"""Teacher log-probabilities of the student's tokens."""

from vold.teacher.prompts import OwnPrompts
from vold.teacher.score import NoTeacher, Teacher
from vold.teacher.visual import VisualTeacher
from vold.teacher.vllm import VllmTeacher

__all__ = ["NoTeacher", "OwnPrompts", "Teacher", "VisualTeacher", "VllmTeacher"]
