"""Every key of a config with its type, unit and default, by section. The only place with defaults; docs/config.md is
written from it (vold.config.reference).

Functions receive the section that they use, never the root.
"""

from vold.config.schema.base import Strict
from vold.config.schema.data import DataConfig, PromptConfig
from vold.config.schema.evaluation import EvalConfig, EvaluationConfig, ExportConfig, VlmevalkitConfig
from vold.config.schema.objective import ObjectiveConfig, SelfTeacherConfig, TeacherViewConfig
from vold.config.schema.reward import JudgeConfig, RewardConfig
from vold.config.schema.rollout import (
    CurriculumConfig,
    DynamicSamplingConfig,
    EngineConfig,
    RolloutConfig,
    SamplingConfig,
    VllmConfig,
)
from vold.config.schema.run import ParallelConfig, RunConfig, TrackingConfig
from vold.config.schema.selfplay import (
    AnswersConfig,
    CoderConfig,
    MemoryConfig,
    PoseConfig,
    SelfplayConfig,
    SelfplayPhaseConfig,
)
from vold.config.schema.training import (
    AdapterConfig,
    OpenaiConfig,
    OptimizerConfig,
    RlConfig,
    SftConfig,
    TeacherConfig,
    TracesConfig,
    TrainConfig,
    VisionConfig,
)

__all__ = [
    "AdapterConfig",
    "AnswersConfig",
    "CoderConfig",
    "CurriculumConfig",
    "DataConfig",
    "DynamicSamplingConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluationConfig",
    "ExportConfig",
    "JudgeConfig",
    "MemoryConfig",
    "ObjectiveConfig",
    "OpenaiConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoseConfig",
    "PromptConfig",
    "RewardConfig",
    "RlConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "SelfTeacherConfig",
    "SelfplayConfig",
    "SelfplayPhaseConfig",
    "SftConfig",
    "Strict",
    "TeacherConfig",
    "TeacherViewConfig",
    "TracesConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "VllmConfig",
    "VlmevalkitConfig",
]
