"""Teachers of a distillation term: a frozen model in the trainer or in vLLM, or the student's own moving average."""

from vold.teacher.prompts import TeacherPromptEncoder
from vold.teacher.scorer import BaseTeacher, NoTeacher, Teacher
from vold.teacher.self_teacher import SelfTeacher
from vold.teacher.vision import VisualAdvantageTeacher
from vold.teacher.vllm import VllmTeacher
from vold.teacher.vllm_distributions import VllmDistributions

__all__ = [
    "BaseTeacher",
    "NoTeacher",
    "SelfTeacher",
    "Teacher",
    "TeacherPromptEncoder",
    "VisualAdvantageTeacher",
    "VllmDistributions",
    "VllmTeacher",
]
