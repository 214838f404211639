"""What the student's tokens are compared with: a teacher's log-probabilities or distributions, or the student's own."""

from vold.teacher.prompts import TeacherPromptEncoder
from vold.teacher.scorer import NoTeacher, Teacher
from vold.teacher.self_teacher import SelfTeacher
from vold.teacher.vision import VisualAdvantageTeacher
from vold.teacher.vllm import VllmTeacher

__all__ = ["NoTeacher", "SelfTeacher", "Teacher", "TeacherPromptEncoder", "VisualAdvantageTeacher", "VllmTeacher"]
