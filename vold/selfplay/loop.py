"""`vold selfplay`: a challenger poses questions, a solver trains on those it solves about half of the time, and the
next iteration continues from both (R-Zero). With a memory bank and comparison by code it is R-Diverse.

    challenger trained against the solver ─► questions posed, answered, kept ─► bank ─► solver trained, with replay
              ▲                                                                                   │
              └─────────────────────────────────── next iteration ────────────────────────────────┘

Both trainings are `vold rl` with other rewards and data. Below run_dir:

    iteration-0001/challenger, solver    runs of their own, with model/ when finished
    iteration-0001/posed.json            how many questions were posed, well formed and kept
    iteration-0001/solver.json           the solver's training data, in the order it is read
    bank/                                every question that was kept (vold.selfplay.bank)
    metrics.jsonl, samples.jsonl         one row an iteration (0: the student as given); questions that were kept
    diversity.svg                        accuracy and repetition over the iterations, and a map of the questions
    model                                the last solver's, a link

A finished phase is not repeated: --resume continues in the one that was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vold.config.schema import DataConfig, RlConfig, SelfplayConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.evaluation.evaluator import Evaluator, summarise
from vold.grading import Grader
from vold.io import to_json, write_atomically
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import load_prompt_encoder
from vold.parallel.collectives import run_on_all_ranks
from vold.rollout import open_sampler
from vold.run.job import Job, free_device_memory, open_job
from vold.selfplay.bank import Bank, BankedQuestion
from vold.selfplay.challenger import ChallengerReward
from vold.selfplay.components import (
    check_objectives,
    open_challenger_reward,
    open_parser,
    open_question_embedder,
    open_voters,
    request_prompt,
    training_config,
)
from vold.selfplay.diversity import diversity
from vold.selfplay.embedders import embed_on_all_ranks
from vold.selfplay.iteration import Iteration, Stream
from vold.selfplay.questions import Vote, is_informative, solver_batches
from vold.selfplay.summary import draw_diversity, iteration_metrics, log_iteration, question_rows
from vold.train.rl import train_rl


def run_selfplay(config: SelfplayConfig, *, resume: bool = False) -> None:
    """Run all iterations; ends with run_dir/model, the last solver.

    resume: continue the run in run_dir in the phase that was interrupted. Raises ValueError for a config that cannot
    work, where run_dir holds another run, and where an iteration yields no question to train on.
    """
    check_objectives({"challenger": config.challenger, "solver": config.solver})
    job = open_job(config, "selfplay", total=config.iterations, resume=resume)
    job.log.hide()  # both trainings show their own progress
    job.log.say(
        f"{config.run_dir}: iterations 1 to {config.iterations} · student {config.student} · steps of an iteration: "
        f"challenger {config.challenger.steps}, solver {config.solver.steps} · {config.dtype}"
    )
    run = SelfplayRun(config, job)
    run.write_request()
    log_iteration(job, 0, run.evaluate_student)
    for number in range(1, config.iterations + 1):
        iteration = Iteration.of(config.run_dir, config.student, number)
        run.train_challenger(iteration)
        run.pose_questions(iteration)
        run.train_solver(iteration)
        log_iteration(job, number, partial(run.summarise, iteration))
    run_on_all_ranks(run.finish)
    job.log.say(f"finished: {config.run_dir / 'model'}; to look at it: vold report {config.run_dir}")
    job.log.close()


class SelfplayRun:
    """The phases of an iteration. All ranks call each of them."""

    def __init__(self, config: SelfplayConfig, job: Job):
        self._config, self._job = config, job
        self._bank = Bank(config.run_dir / "bank")

    def write_request(self) -> None:
        """Write the one problem that every response of the challenger answers."""
        row = {"messages": [{"role": "user", "content": self._config.pose.request}]}
        self._write(self._config.run_dir / "request.jsonl", to_json(row) + "\n")

    def evaluate_student(self) -> tuple[dict[str, float], list[dict]]:
        """The accuracies of the student that both players begin with; no sample rows."""
        config, job = self._config, self._job
        if not config.evaluation.sets:
            return {}, []
        tokenizer, encode = load_chat_tokenizer(config.student, config.prompt), load_prompt_encoder(config.student)
        evaluator = Evaluator.load(config.evaluation, tokenizer, config.prompt, encode)
        sampler = open_sampler(config.solver.rollout, config.student, dtype=job.dtype, device=job.layout.device)
        with Grader(workers=config.grader_workers, echo=config.grader_echo) as grader:
            rows = evaluator.run(sampler, grader, job, config.seed)
        del sampler
        free_device_memory()
        scores = {name: summarise(set_rows) for name, set_rows in rows.items()}
        accuracies = {f"accuracy_{name}": score["accuracy"] for name, score in scores.items()}
        return accuracies | {f"stderr_{name}": score["stderr"] for name, score in scores.items()}, []

    # -- challenger ------------------------------------------------------------------------------------------------

    def train_challenger(self, iteration: Iteration) -> None:
        """Train the challenger against the solver as it is."""
        data = DataConfig(path=self._config.run_dir / "request.jsonl", layout="messages")

        def open_reward(job: Job, grader: Grader) -> ChallengerReward:
            remembered = self._earlier_iterations(iteration)
            return open_challenger_reward(self._config, iteration, self._bank, remembered, job, grader)

        self._train(training_config(self._config, iteration, "challenger", data), reward_function=open_reward)

    def pose_questions(self, iteration: Iteration) -> None:
        """Sample questions from the trained challenger, and add those with an informative vote to the bank."""
        config, job = self._config, self._job
        if iteration.number in job.broadcast(self._bank.iterations()):
            return
        parser = open_parser(config, iteration.solver_start)
        responses = self._responses(iteration)
        questions = [question for question in map(parser.parse, responses) if question]
        with Grader(workers=config.grader_workers, echo=config.grader_echo) as grader:
            voters = open_voters(config, iteration.solver_start, parser, job)
            votes = voters.vote(questions, job, grader, seed=iteration.seed(config.seed, Stream.LABEL_ANSWERS))
        del voters
        kept = [pair for pair in zip(questions, votes, strict=True) if is_informative(pair[1], config.answers)]
        if not kept:
            limits = f"{config.answers.lowest} to {config.answers.highest} of {config.answers.responses}"
            raise ValueError(
                f"iteration {iteration.number}: of {len(responses)} responses {len(questions)} held a question, and "
                f"none had {limits} answers that agree; look at {iteration.folder}/challenger/samples.jsonl, raise "
                "pose.candidates, or widen answers.lowest and answers.highest"
            )
        banked = self._banked(iteration, kept)
        counts = {"candidates": len(responses), "posed": len(questions), "kept": len(kept)}
        self._write(iteration.folder / "posed.json", to_json(counts) + "\n")
        job.log.say(f"iteration {iteration.number}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        run_on_all_ranks(lambda: self._bank.append(iteration.number, banked) if job.is_writer else None)
        free_device_memory()

    def _responses(self, iteration: Iteration) -> list[str]:
        """All ranks' responses of the trained challenger; "" for a truncated one, which holds no question."""
        config, job = self._config, self._job
        checkpoint, rollout = iteration.folder / "challenger" / "model", config.challenger.rollout
        request = Problem("request", config.pose.request)
        section = request_prompt(config.pose, config.prompt)
        prompt = build_prompt(request, load_chat_tokenizer(checkpoint, section), section)
        sampler = open_sampler(rollout, checkpoint, dtype=job.dtype, device=job.layout.device)
        rank, count = job.shard(range(job.world_size))[0], len(job.shard(range(config.pose.candidates)))
        seed = iteration.seed(config.seed, Stream.POSE) + rank
        rollouts = sampler.sample([prompt], rollout, responses=count, seed=seed) if count else []
        return job.gather([rollout.text if rollout.finish_reason == "stop" else "" for rollout in rollouts])

    def _banked(self, iteration: Iteration, kept: Sequence[tuple[str, Vote]]) -> list[BankedQuestion]:
        """Rows of the bank, with embeddings where questions are compared by them."""
        config, job = self._config, self._job
        embedder = open_question_embedder(config, job)
        questions = [question for question, _ in kept]
        vectors = embed_on_all_ranks(embedder, questions, job) if embedder else [()] * len(kept)
        challenger = str((iteration.folder / "challenger").relative_to(config.run_dir))
        seed = iteration.seed(config.seed, Stream.POSE)
        return [
            BankedQuestion(
                iteration.number, challenger, seed, question, vote.label, vote.agreement, tuple(map(float, vector))
            )
            for (question, vote), vector in zip(kept, vectors, strict=True)
        ]

    # -- solver ----------------------------------------------------------------------------------------------------

    def train_solver(self, iteration: Iteration) -> None:
        """Train the solver on the iteration's questions, with replay of earlier ones where there is a memory."""
        config, solver, path = self._config, self._config.solver, iteration.folder / "solver.json"
        earlier = self._earlier_iterations(iteration) if config.memory else []
        indices = solver_batches(
            range(self._bank.count(earlier), self._bank.count([*earlier, iteration.number])),
            range(self._bank.count(earlier)),
            steps=solver.steps,
            per_step=solver.prompts_per_step,
            replay=config.memory.replay if config.memory else 0.0,
            seed=iteration.seed(config.seed, Stream.REPLAY),
        )
        needed = set(indices)  # only as many as the batches read stay in memory, however large the bank
        numbered = enumerate(self._bank.read([*earlier, iteration.number]))
        questions = {index: question for index, question in numbered if index in needed}
        self._write(path, _orz_rows([questions[index] for index in indices]))
        data = DataConfig(path=path, layout="orz", shuffle=False)
        self._train(training_config(config, iteration, "solver", data))

    # -- both ------------------------------------------------------------------------------------------------------

    def _train(self, config: RlConfig, **options) -> None:
        """`train_rl` until its model is there; its checkpoints are not needed after that."""
        job = self._job
        if not job.broadcast((config.run_dir / "model").exists()):
            train_rl(config, resume=job.broadcast((config.run_dir / "config.yaml").exists()), **options)
            free_device_memory()
        if job.is_writer:
            shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)

    def _earlier_iterations(self, iteration: Iteration) -> list[int]:
        """The bank's iterations before this one, the same on every rank."""
        return [number for number in self._job.broadcast(self._bank.iterations()) if number < iteration.number]

    def _write(self, path: Path, text: str) -> None:
        """Write a file on rank 0; an error there is raised on every rank."""

        def write() -> None:
            if self._job.is_writer:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text)

        run_on_all_ranks(write)

    def summarise(self, iteration: Iteration) -> tuple[dict[str, float], list[dict]]:
        """Metrics of a finished iteration and rows of its questions, all from disk."""
        config = self._config
        token_ids = open_parser(config, config.student).token_ids
        repetition = diversity(self._bank, iteration.number, token_ids, threshold=config.pose.cluster_distance)
        rows = question_rows(self._bank, iteration.number, config.samples_per_step)
        return iteration_metrics(iteration) | repetition, rows

    def finish(self) -> None:
        """Draw the figure, and link run_dir/model to the last solver. Rank 0 alone writes."""
        config = self._config
        if not self._job.is_writer:
            return
        draw_diversity(config.run_dir, self._bank)
        if not (model := config.run_dir / "model").is_symlink():
            target = Path(f"iteration-{config.iterations:04d}") / "solver" / "model"
            model.symlink_to(target, target_is_directory=True)


def _orz_rows(questions: Sequence[BankedQuestion]) -> str:
    """The questions as a file of layout orz, a row a line."""
    rows = [
        [{"from": "human", "value": q.question}, {"from": "assistant", "ground_truth": {"value": q.label}}]
        for q in questions
    ]
    return "[\n" + ",\n".join(map(to_json, rows)) + "\n]\n"
