"""Teacher log-probabilities of the student's tokens."""

from vold.teacher.score import NoTeacher, Teacher
from vold.teacher.vllm import VllmTeacher

__all__ = ["NoTeacher", "Teacher", "VllmTeacher"]
