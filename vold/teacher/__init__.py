"""Teachers of a distillation term: a frozen model in the trainer or in vLLM, or the student's own moving average."""

from vold.teacher.calibrated import CalibratedTeacher
from vold.teacher.prompts import TeacherPromptEncoder, TeacherView
from vold.teacher.reference import NoReference, Reference
from vold.teacher.scorer import BaseTeacher, NoTeacher, Teacher, TextTeacherBeside
from vold.teacher.self_teacher import SelfTeacher
from vold.teacher.several import ChosenTeachers, Inside, SeveralTeachers, TeacherChoice, metrics_by_teacher
from vold.teacher.vision import VisualAdvantageTeacher
from vold.teacher.vllm import VllmTeacher
from vold.teacher.vllm_distributions import AskedTeacher, TopTeacher, VllmDistributions

__all__ = [
    "AskedTeacher",
    "BaseTeacher",
    "CalibratedTeacher",
    "ChosenTeachers",
    "Inside",
    "NoReference",
    "NoTeacher",
    "Reference",
    "SelfTeacher",
    "SeveralTeachers",
    "Teacher",
    "TeacherChoice",
    "TeacherPromptEncoder",
    "TeacherView",
    "TextTeacherBeside",
    "TopTeacher",
    "VisualAdvantageTeacher",
    "VllmDistributions",
    "VllmTeacher",
    "metrics_by_teacher",
]
