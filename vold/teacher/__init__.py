"""What the student's tokens are compared with: a teacher's log-probabilities or distributions, or the student's own."""

from vold.teacher.score import NoTeacher, Teacher
from vold.teacher.self_teacher import SelfTeacher

__all__ = ["NoTeacher", "SelfTeacher", "Teacher"]
