"""Assembly of self-play: the configs of both trainings, and the models that pose, answer and compare questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vold.config.schema import (
    DataConfig,
    EvaluationConfig,
    PoseConfig,
    PromptConfig,
    RlConfig,
    SelfplayConfig,
    SelfplayPhaseConfig,
)
from vold.grading import Grader
from vold.objectives import build_objective
from vold.rollout import open_sampler
from vold.run.job import Job
from vold.selfplay.bank import Bank
from vold.selfplay.challenger import ChallengerReward, Memory
from vold.selfplay.embedders import Embedder, open_embedder
from vold.selfplay.iteration import Iteration, Stream
from vold.selfplay.questions import QuestionParser
from vold.selfplay.voters import SolverVoters

Player = Literal["challenger", "solver"]


def training_config(config: SelfplayConfig, iteration: Iteration, player: Player, data: DataConfig) -> RlConfig:
    """The config of one training: the challenger's has the request as its prompt and no evaluation; the solver is
    evaluated after its last step."""
    phase: SelfplayPhaseConfig = getattr(config, player)
    is_challenger = player == "challenger"
    keys = (
        "dtype",
        "parallel",
        "timeout_seconds",
        "microbatch_tokens",
        "samples_per_step",
        "grader_workers",
        "grader_echo",
    )
    evaluation = config.evaluation.model_copy(update={"every": phase.steps})
    return RlConfig(
        **{name: getattr(config, name) for name in keys},
        **{name: getattr(phase, name) for name in SelfplayPhaseConfig.model_fields},
        prompt=request_prompt(config.pose, config.prompt) if is_challenger else config.prompt,
        evaluation=EvaluationConfig() if is_challenger else evaluation,
        run_dir=iteration.folder / player,
        seed=iteration.seed(config.seed, Stream.TRAIN_CHALLENGER if is_challenger else Stream.TRAIN_SOLVER),
        student=iteration.challenger_start if is_challenger else iteration.solver_start,
        data=data,
        keep_checkpoints=1,
    )


def request_prompt(pose: PoseConfig, prompt: PromptConfig) -> PromptConfig:
    """The prompt section with which the request for a question is rendered."""
    return prompt.model_copy(update={"system": pose.system, "suffix": ""})


def check_objectives(players: dict[str, SelfplayPhaseConfig]) -> None:
    """Raise ValueError for an objective that needs a teacher."""
    for name, phase in players.items():
        if build_objective(phase.objective, phase.rollout.max_new_tokens).needs_teacher:
            raise ValueError(
                f"{name}.objective.preset = {phase.objective.preset!r} needs a teacher and self-play has none; use grpo"
            )


def open_parser(config: SelfplayConfig, solver: Path) -> QuestionParser:
    return QuestionParser(config.pose.pattern, config.prompt, solver)


def open_voters(config: SelfplayConfig, solver: Path, parser: QuestionParser, job: Job) -> SolverVoters:
    sampler = open_sampler(config.solver.rollout, solver, dtype=job.dtype, device=job.layout.device)
    return SolverVoters(sampler, config.solver.rollout, config.answers.responses, parser)


def open_question_embedder(config: SelfplayConfig, job: Job) -> Embedder | None:
    return open_embedder(config.embedder, config.coder, dtype=job.dtype, device=job.layout.device)


def open_challenger_reward(
    config: SelfplayConfig, iteration: Iteration, bank: Bank, remembered: Sequence[int], job: Job, grader: Grader
) -> ChallengerReward:
    """`remembered`: the bank's iterations before this one."""
    parser = open_parser(config, iteration.solver_start)
    return ChallengerReward(
        voters=open_voters(config, iteration.solver_start, parser, job),
        parser=parser,
        job=job,
        grader=grader,
        pose=config.pose,
        seed=iteration.seed(config.seed, Stream.REWARD_ANSWERS),
        embedder=open_question_embedder(config, job),
        compare_code=config.coder is not None,
        memory=Memory(bank, remembered, config.memory) if config.memory else None,
    )
