"""Teachers of a distillation term: a frozen model in the trainer or in vLLM, or the student's own moving average."""

from vold.teacher.prompts import TeacherPromptEncoder
from vold.teacher.scorer import BaseTeacher, NoTeacher, Teacher, TextTeacherBeside
from vold.teacher.self_teacher import SelfTeacher
from vold.teacher.several import ChosenTeachers, SeveralTeachers, TeacherChoice, metrics_by_teacher
from vold.teacher.vision import VisualAdvantageTeacher
from vold.teacher.vllm import VllmTeacher
from vold.teacher.vllm_distributions import VllmDistributions

__all__ = [
    "BaseTeacher",
    "ChosenTeachers",
    "NoTeacher",
    "SelfTeacher",
    "SeveralTeachers",
    "Teacher",
    "TeacherChoice",
    "TeacherPromptEncoder",
    "TextTeacherBeside",
    "VisualAdvantageTeacher",
    "VllmDistributions",
    "VllmTeacher",
    "metrics_by_teacher",
]
