"""`vold selfplay`: a challenger poses questions, a solver learns from those it half knows, and both start over from
where they are (R-Zero); with a memory bank and comparison by code it is R-Diverse.

    challenger trained against the solver ─► questions posed, answered, kept ─► bank ─► solver trained, with replay
              ▲                                                                                   │
              └─────────────────────────────────── next iteration ────────────────────────────────┘

Both trainings are `vold rl` with other rewards and other data. Below run_dir:

    iteration-0001/challenger, solver    runs of their own, with model/ when finished
    iteration-0001/posed.json            how many questions were posed, well formed and kept
    iteration-0001/solver.json           the solver's training data, in the order it is read
    bank/                                every question that was kept (vold.selfplay.bank)
    metrics.jsonl, samples.jsonl         one row an iteration (0: the student as given); questions that were kept
    diversity.svg                        accuracy and repetition over the iterations, and a map of the questions
    model                                the last solver's, a link

A phase that is finished is not done again: --resume goes on in the one that was interrupted.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vold.config.schema import DataConfig, EvaluationConfig, PromptConfig, RlConfig, SelfplayConfig, SelfplayPhaseConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt, build_prompts
from vold.evaluation.evaluator import Evaluator, summarise
from vold.grading import Grader
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.objectives import build_objective
from vold.parallel.collectives import run_on_all_ranks
from vold.planning.check import print_rank_memory
from vold.rollout import open_sampler
from vold.run.job import Job, open_job
from vold.run.run_dir import read_rows
from vold.selfplay.bank import Bank, BankedQuestion
from vold.selfplay.challenger import Challenge, QuestionForm, SolverVoters, embed_together, open_embedder
from vold.selfplay.diversity import diversity, map_of
from vold.selfplay.figures import SelfplayRecord, diversity_figure
from vold.selfplay.questions import informative, solver_batches
from vold.train import rl


@dataclass(frozen=True)
class Iteration:
    """Where one iteration's files are, and the checkpoints it begins with."""

    number: int
    folder: Path
    challenger_start: Path
    solver_start: Path

    @classmethod
    def of(cls, config: SelfplayConfig, number: int) -> Iteration:
        folder, before = (config.run_dir / f"iteration-{n:04d}" for n in (number, number - 1))
        starts = [before / player / "model" if number > 1 else config.student for player in ("challenger", "solver")]
        return cls(number, folder, *starts)

    def seed(self, base: int, stream: int) -> int:
        """Below 2**31 with room above for steps and ranks; another for each stream of random numbers."""
        return int(np.random.SeedSequence([base, self.number, stream]).generate_state(1)[0] >> 2)


TRAIN_CHALLENGER, JUDGE, POSE, ANSWER, TRAIN_SOLVER, REPLAY = range(6)  # streams of random numbers


def run(config: SelfplayConfig, *, resume: bool = False) -> None:
    """All iterations; ends with run_dir/model, the last solver."""
    _check_objectives(config)
    job = open_job(config, "selfplay", total=config.iterations, resume=resume)
    job.log.close()  # the phases below show their own progress
    bank = Bank(config.run_dir / "bank")
    _write_request(config, job)
    _log(config, job, 0, partial(_accuracy_of_student, config, job))
    for number in range(1, config.iterations + 1):
        iteration = Iteration.of(config, number)
        _train_challenger(config, job, iteration, bank)
        _pose(config, job, iteration, bank)
        _train_solver(config, job, iteration, bank)
        _log(config, job, number, partial(_summary, config, iteration, bank))
    run_on_all_ranks(partial(_finish, config, job, bank))


def check(config: SelfplayConfig, processes: int) -> None:
    """`vold check selfplay`: what both trainings hold on each rank, the same in every iteration, and whether the models
    and the request they use can be read. Raises ValueError as `vold check rl` does."""
    _check_objectives(config)
    for checkpoint in (config.embedder, config.coder and config.coder.checkpoint):
        if checkpoint is not None:
            load_tokenizer(checkpoint)
    request = Problem("pose.request", config.pose.request)
    build_prompts([request], load_tokenizer(config.student), _request_prompt(config))
    data, first = DataConfig(path=config.run_dir / "solver.json", layout="orz"), Iteration.of(config, 1)
    for player, phase in (("challenger", config.challenger), ("solver", config.solver)):
        print(f"{player}, which trains while the other does not:")
        print_rank_memory(_rl_config(config, phase, first, player, data, TRAIN_SOLVER), processes)


def _check_objectives(config: SelfplayConfig) -> None:
    for name, phase in (("challenger", config.challenger), ("solver", config.solver)):
        if build_objective(phase.objective, phase.rollout.max_new_tokens).needs_teacher:
            raise ValueError(
                f"{name}.objective.preset = {phase.objective.preset!r} needs a teacher and self-play has none; use grpo"
            )


# -- challenger ----------------------------------------------------------------------------------------------------


def _train_challenger(config: SelfplayConfig, job: Job, iteration: Iteration, bank: Bank) -> None:
    data = DataConfig(path=config.run_dir / "request.jsonl", layout="messages")
    training = _rl_config(config, config.challenger, iteration, "challenger", data, TRAIN_CHALLENGER)
    training = training.model_copy(update={"prompt": _request_prompt(config), "evaluation": EvaluationConfig()})

    def judge(inner: Job, grader: Grader) -> Challenge:
        form = QuestionForm(config, iteration.solver_start)
        return Challenge(
            config,
            SolverVoters(config, iteration.solver_start, form, inner, grader),
            form,
            inner,
            bank=bank,
            remembered=_remembered(inner, bank, iteration),
            seed=iteration.seed(config.seed, JUDGE),
        )

    _train(job, training, open_reward=judge)


def _request_prompt(config: SelfplayConfig) -> PromptConfig:
    return PromptConfig(system=config.pose.system, suffix="", max_tokens=config.prompt.max_tokens)


def _write_request(config: SelfplayConfig, job: Job) -> None:
    """The one problem that a challenger is asked, again and again."""
    row = {"messages": [{"role": "user", "content": config.pose.request}]}
    run_on_all_ranks(partial(_write, job, config.run_dir / "request.jsonl", json.dumps(row) + "\n"))


# -- questions -----------------------------------------------------------------------------------------------------


def _pose(config: SelfplayConfig, job: Job, iteration: Iteration, bank: Bank) -> None:
    """The trained challenger's questions, those that the solver half knows, into the bank."""
    if iteration.number in job.from_writer(bank.iterations()):
        return
    form = QuestionForm(config, iteration.solver_start)
    responses = _responses(config, job, iteration)
    posed = [question for question in map(form.find, responses) if question]
    with Grader(workers=config.grader_workers) as grader:
        panel = SolverVoters(config, iteration.solver_start, form, job, grader)
        votes = panel.ask(posed, seed=iteration.seed(config.seed, ANSWER))
    del panel
    kept = [pair for pair in zip(posed, votes, strict=True) if informative(pair[1], config.answers)]
    if not kept:
        limits = f"{config.answers.lowest} to {config.answers.highest} of {config.answers.responses}"
        raise ValueError(
            f"iteration {iteration.number}: of {len(responses)} responses {len(posed)} held a question, and none had "
            f"{limits} answers that agree; look at {iteration.folder}/challenger/samples.jsonl, raise "
            "pose.candidates, or widen answers.lowest and answers.highest"
        )
    embedder = open_embedder(config, dtype=job.dtype, device=job.layout.device)
    vectors = embed_together(embedder, [question for question, _ in kept], job) if embedder else [()] * len(kept)
    challenger, seed = str((iteration.folder / "challenger").relative_to(config.run_dir)), _pose_seed(config, iteration)
    questions = [
        BankedQuestion(iteration.number, challenger, seed, question, vote.label, vote.agreement, tuple(map(float, row)))
        for (question, vote), row in zip(kept, vectors, strict=True)
    ]
    counts = {"candidates": len(responses), "posed": len(posed), "kept": len(kept)}
    run_on_all_ranks(partial(_write, job, iteration.folder / "posed.json", json.dumps(counts) + "\n"))
    run_on_all_ranks(lambda: bank.append(iteration.number, questions) if job.is_writer else None)
    del embedder
    release()


def _responses(config: SelfplayConfig, job: Job, iteration: Iteration) -> list[str]:
    """All ranks' responses of the trained challenger; a truncated one holds no question."""
    checkpoint = iteration.folder / "challenger" / "model"
    request = Problem("request", config.pose.request)
    prompt = build_prompt(request, load_tokenizer(checkpoint), _request_prompt(config))
    sampler = open_sampler(config.challenger.rollout, checkpoint, dtype=job.dtype, device=job.layout.device)
    rank = job.share(range(job.world))[0]
    mine = len(job.share(range(config.pose.candidates)))
    seed = _pose_seed(config, iteration) + rank
    rollouts = sampler.sample([prompt], config.challenger.rollout, responses=mine, seed=seed) if mine else []
    return job.gather([rollout.text if rollout.finish_reason == "stop" else "" for rollout in rollouts])


def _pose_seed(config: SelfplayConfig, iteration: Iteration) -> int:
    return iteration.seed(config.seed, POSE)


def _remembered(job: Job, bank: Bank, iteration: Iteration) -> list[int]:
    """The bank's iterations before this one, the same on every rank."""
    return [number for number in job.from_writer(bank.iterations()) if number < iteration.number]


# -- solver --------------------------------------------------------------------------------------------------------


def _train_solver(config: SelfplayConfig, job: Job, iteration: Iteration, bank: Bank) -> None:
    path, solver = iteration.folder / "solver.json", config.solver
    old = _remembered(job, bank, iteration) if config.memory else []
    places = solver_batches(
        range(bank.count(old), bank.count([*old, iteration.number])),
        range(bank.count(old)),
        steps=solver.steps,
        per_step=solver.prompts_per_step,
        replay=config.memory.replay if config.memory else 0.0,
        seed=iteration.seed(config.seed, REPLAY),
    )
    wanted = set(places)  # as many as the batches read, however large the bank
    found = {place: q for place, q in enumerate(bank.read([*old, iteration.number])) if place in wanted}
    run_on_all_ranks(partial(_write, job, path, _as_orz([found[place] for place in places])))
    data = DataConfig(path=path, layout="orz", shuffle=False)
    training = _rl_config(config, solver, iteration, "solver", data, TRAIN_SOLVER)
    at_the_end = config.evaluation.model_copy(update={"every": solver.steps})
    _train(job, training.model_copy(update={"evaluation": at_the_end}))


def _as_orz(questions: Sequence[BankedQuestion]) -> str:
    """The orz layout, a row a line."""
    rows = [
        [{"from": "human", "value": q.question}, {"from": "assistant", "ground_truth": {"value": q.label}}]
        for q in questions
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


# -- either --------------------------------------------------------------------------------------------------------


def _rl_config(
    config: SelfplayConfig, phase: SelfplayPhaseConfig, iteration: Iteration, player: str, data: DataConfig, stream: int
) -> RlConfig:
    start = iteration.challenger_start if player == "challenger" else iteration.solver_start
    shared = {name: getattr(config, name) for name in ("dtype", "parallel", "timeout_seconds", "prompt")}
    shared |= {name: getattr(config, name) for name in ("microbatch_tokens", "samples_per_step", "grader_workers")}
    own = {name: getattr(phase, name) for name in SelfplayPhaseConfig.model_fields}
    return RlConfig(
        **shared,
        **own,
        run_dir=iteration.folder / player,
        seed=iteration.seed(config.seed, stream),
        student=start,
        data=data,
        keep_checkpoints=1,
    )


def _train(job: Job, config: RlConfig, **choices) -> None:
    """`vold rl` until its model is there; its checkpoints are not needed any more then."""
    if not job.from_writer((config.run_dir / "model").exists()):
        rl.run(config, resume=job.from_writer((config.run_dir / "config.yaml").exists()), **choices)
        release()
    if job.is_writer:
        shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)


def release() -> None:
    """A finished phase's models leave the device before the next one's come: what is held in cycles too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(job: Job, path: Path, text: str) -> None:
    """By the writing rank, whole or not at all; other ranks do nothing."""
    if job.is_writer:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.partial")
        partial_path.write_text(text, encoding="utf-8")
        os.replace(partial_path, path)


# -- what an iteration came to -------------------------------------------------------------------------------------


def _log(config: SelfplayConfig, job: Job, number: int, measure) -> None:
    """One row of metrics.jsonl, once. `measure` gives metrics and samples, and may be a collective."""
    path = config.run_dir / "metrics.jsonl"
    logged = job.from_writer([row["step"] for row in read_rows(path)] if path.exists() else [])
    if number not in logged:
        job.log.write(number, *measure())


def _accuracy_of_student(config: SelfplayConfig, job: Job) -> tuple[dict[str, float], list[dict]]:
    if not config.evaluation.sets:
        return {}, []
    evaluator = Evaluator.load(
        config.evaluation, load_tokenizer(config.student), config.prompt, load_prompt_encoder(config.student)
    )
    sampler = open_sampler(config.solver.rollout, config.student, dtype=job.dtype, device=job.layout.device)
    with Grader(workers=config.grader_workers) as grader:
        answers = evaluator.run(sampler, grader, job, config.seed)
    del sampler
    release()
    return {f"accuracy_{name}": summarise(found)["accuracy"] for name, found in answers.items()}, []


def _summary(config: SelfplayConfig, iteration: Iteration, bank: Bank) -> tuple[dict[str, float], list[dict]]:
    """The last step of both trainings, what was posed and kept, how much of it repeats; all of it from disk."""
    rows = {player: read_rows(iteration.folder / player / "metrics.jsonl")[-1] for player in ("challenger", "solver")}
    counts = json.loads((iteration.folder / "posed.json").read_text())
    wanted = ("reward", "well_formed", "uncertainty", "repetition", "memory_penalty")
    metrics = {f"challenger_{key}": rows["challenger"][key] for key in wanted if key in rows["challenger"]}
    metrics |= {key: value for key, value in rows["solver"].items() if key.startswith("accuracy_")}
    metrics |= {f"questions_{name}": float(count) for name, count in counts.items()}
    form = QuestionForm(config, config.student)
    metrics |= diversity(bank, iteration.number, form.words, threshold=config.pose.cluster_distance)
    shown = [
        {"question": q.question, "label": q.label, "pass_rate": q.pass_rate}
        for q in islice(bank.read([iteration.number]), config.samples_per_step)
    ]
    return metrics, shown


def _finish(config: SelfplayConfig, job: Job, bank: Bank) -> None:
    """The picture, and the link to the last solver. On the writing rank."""
    if not job.is_writer:
        return
    vectors = [np.concatenate(list(bank.embeddings([number]))) for number in bank.iterations()]
    maps = map_of(vectors) if vectors[0].shape[1] else ()
    record = SelfplayRecord(read_rows(config.run_dir / "metrics.jsonl"), maps)
    (config.run_dir / "diversity.svg").write_bytes(diversity_figure({"": [record]}))
    if not (model := config.run_dir / "model").is_symlink():
        model.symlink_to(Path(f"iteration-{config.iterations:04d}") / "solver" / "model", target_is_directory=True)
