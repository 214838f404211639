"""The miniature RL step of `vold rl` beside TRL's GRPOTrainer: same checkpoint, prompts, rollouts, grader and threads.

    python -m benchmarks.end_to_end                       (.venv-bench, see `make bench-rl`)
    python -m benchmarks.end_to_end --student runs/demo/sft/model --data runs/miniature/seed0/data/train.json

Each trainer runs its own unmodified loop in a process of its own and waits after every step for its next turn. Steps
alternate, so that drift of the machine affects both; only the ratio within a run is a claim. A step is everything
between two updates: rollout, grading, loss, gradient, update; for vold also the weight sync to the sampler with its
parity check. GRPO without a teacher.

    equal work   every response has exactly `max_new_tokens` tokens and every token a gradient: the stop token cannot
                 end a response, and within each group the rewards alternate (after grading, which both do)
    as it comes  responses end where they end and rewards are the grader's: vold then skips, exactly, the groups that
                 have no gradient (needs a trained student: --student)

Before a row counts, both trainers' prompts and numbers of responses were compared; under equal work also the numbers
of tokens. Writes end_to_end-cpu.csv (one row a step) and END_TO_END.md into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import TextIO

import torch

from .harness import environment, read_rows, spread, table_line, write_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = ROOT / "vold" / "miniature" / "configs" / "rl.yaml"
EQUAL, NATURAL = "equal work", "as it comes"
OURS, PEER = "vold", "TRL GRPOTrainer"
COLUMNS = (
    *(
        "work",
        "trainer",
        "step",
        "seconds",
        "cpu_seconds",
        "prompts",
        "responses",
        "response_tokens",
        "gradient_tokens",
    ),
    *("package_version", "device", "torch", "triton", "python", "commit", "started"),
)


@dataclass(frozen=True)
class Job:
    """The work of both trainers."""

    student: str
    data: str
    work: str
    steps: int
    prompts_per_step: int
    responses_per_prompt: int
    max_new_tokens: int
    trl_batch: int  # responses of one of TRL's forward passes
    microbatch_tokens: int  # of one of vold's

    def overrides(self, run_dir: str) -> list[str]:
        return [
            f"run_dir={run_dir}",
            f"student={self.student}",
            f"data.path={self.data}",
            "teacher=null",
            "objective.preset=grpo",
            f"steps={self.steps}",
            "optimizer.warmup_steps=0",
            f"prompts_per_step={self.prompts_per_step}",
            f"rollout.responses_per_prompt={self.responses_per_prompt}",
            f"rollout.max_new_tokens={self.max_new_tokens}",
            f"microbatch_tokens={self.microbatch_tokens}",
            "evaluation={}",
        ]


# -- the trainers, each in its own process -------------------------------------------------------------------------


class Turn:
    """The worker's side of taking turns: times each step, writes it to `out` and waits for the next turn."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.work: dict[str, object] = {}
        self._started, self._cpu = perf_counter(), process_time()

    def record_work(self, prompts: Sequence[Sequence[int]], response_tokens: int, responses: int) -> None:
        """Records the data of this step. prompts: token ids, once per group."""
        digest = hashlib.sha256(json.dumps(sorted(map(list, prompts))).encode()).hexdigest()
        self.work = {"prompts": len(prompts), "digest": digest, "responses": responses}
        self.work |= {"response_tokens": response_tokens, "gradient_tokens": response_tokens}

    def end_step(self, **more_fields: object) -> None:
        elapsed = {"seconds": perf_counter() - self._started, "cpu_seconds": process_time() - self._cpu}
        print(json.dumps({**elapsed, **self.work, **more_fields}), file=self._out, flush=True)
        if not sys.stdin.readline():  # the parent has all steps
            raise SystemExit
        self._started, self._cpu = perf_counter(), process_time()


def alternating_reward(index_in_group: int) -> float:
    return float(index_in_group % 2)


def run_vold(job: Job, turn: Turn) -> None:
    """Runs `vold rl` itself; wrappers around its functions record the work, or make it equal."""
    from vold.config import load_config, schema
    from vold.rollout import TransformersSampler
    from vold.run.run_dir import RunLog
    from vold.train import components
    from vold.train.rl import train_rl
    from vold.train.rollout_worker import RolloutWorker

    class FixedLengthSampler(TransformersSampler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._vocabulary = replace(self._vocabulary, stop_ids=())

    sample_groups, log_step = RolloutWorker.sample_groups, RunLog.log_step

    def watched_sample_groups(*args):
        drawn = sample_groups(*args)
        rollouts = [rollout for group in drawn.groups.values() for rollout in group.rollouts]
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        turn.record_work([group.prompt.token_ids.tolist() for group in drawn.groups.values()], tokens, len(rollouts))
        return replace(drawn, groups={place: even(group) for place, group in drawn.groups.items()})

    def even(group):
        rewards = tuple(alternating_reward(index) for index in range(len(group.rollouts)))
        return replace(group, rewards=rewards) if job.work == EQUAL else group

    def watched_log_step(log, step, metrics, samples=()):
        log_step(log, step, metrics, samples)
        turn.end_step(gradient_tokens=int(metrics["gradient_tokens"]))

    RolloutWorker.sample_groups, RunLog.log_step = watched_sample_groups, watched_log_step
    if job.work == EQUAL:
        components.open_sampler = lambda _config, checkpoint, dtype, device, **_: FixedLengthSampler(
            checkpoint, dtype=dtype, device=device
        )
    with tempfile.TemporaryDirectory() as folder:
        train_rl(load_config(schema.RlConfig, CONFIG, job.overrides(f"{folder}/run")))


def run_trl(job: Job, turn: Turn) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from vold.data.order import rows_of_step
    from vold.grading import Grader

    config, tokenizer, prompts = _vold_prompts(job)
    rows = [
        {"prompt": prompts[row].text, "gold": prompts[row].gold}
        for step in range(job.steps)
        for row in rows_of_step(step, rows=len(prompts), per_step=job.prompts_per_step, seed=config.seed)
    ]

    class TakesTurns(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            turn.end_step()

    with Grader(workers=config.grader_workers) as grader, tempfile.TemporaryDirectory() as folder:

        def reward(prompts, completions, completion_ids, gold, **_):
            truncated = [len(ids) == job.max_new_tokens and ids[-1] != tokenizer.eos_token_id for ids in completion_ids]
            verdicts = grader.grade(list(zip(completions, gold, truncated, strict=True)))
            once = tokenizer(prompts[:: job.responses_per_prompt])["input_ids"]
            turn.record_work(once, sum(map(len, completion_ids)), len(completions))
            if job.work == EQUAL:
                return [alternating_reward(index % job.responses_per_prompt) for index in range(len(completions))]
            return [float(verdict.outcome == "correct") for verdict in verdicts]

        trainer = GRPOTrainer(
            model=job.student,
            reward_funcs=reward,
            args=_trl_config(GRPOConfig, job, config, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[TakesTurns()],
        )
        trainer.train()


def _vold_prompts(job: Job):
    """The prompts as vold builds them. TRL is given their text, which must tokenize to the same ids."""
    from vold.config import load_config, schema
    from vold.data.problems import load_problems
    from vold.data.prompts import build_prompts
    from vold.models.tokenizer import load_tokenizer

    config = load_config(schema.RlConfig, CONFIG, job.overrides("unused"))
    tokenizer = load_tokenizer(config.student)
    prompts = build_prompts(load_problems(config.data), tokenizer, config.prompt, config.data.on_error)
    prompts = [replace(prompt, text=tokenizer.decode(prompt.token_ids.tolist())) for prompt in prompts]
    assert all(tokenizer(prompt.text)["input_ids"] == prompt.token_ids.tolist() for prompt in prompts)
    return config, tokenizer, prompts


def _trl_config(kind: Callable, job: Job, config, folder: str):
    """TRL's configuration, without gradient checkpointing, logging and saving, which only take time."""
    from vold.objectives import build_objective

    responses = job.prompts_per_step * job.responses_per_prompt
    batch = min(job.trl_batch, responses)
    objective = build_objective(config.objective, job.max_new_tokens)
    return kind(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=responses // batch,
        num_generations=job.responses_per_prompt,
        max_completion_length=job.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        generation_kwargs={"min_new_tokens": job.max_new_tokens} if job.work == EQUAL else {},
        beta=0.0,
        epsilon=objective.clip_eps_low,
        epsilon_high=objective.clip_eps_high,
        learning_rate=config.optimizer.lr,
        max_grad_norm=config.optimizer.clip_grad,
        max_steps=job.steps,
        seed=config.seed,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=config.dtype == "bfloat16",
        model_init_kwargs={"dtype": config.dtype},
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


RUNNERS = {OURS: run_vold, PEER: run_trl}


def run_worker(trainer: str, job: Job) -> None:
    """Body of a worker process. Standard output carries rows to the parent; libraries print to standard error."""
    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr
    RUNNERS[trainer](job, turn)


# -- the parent ----------------------------------------------------------------------------------------------------


def measure(job: Job, trainers: Sequence[str]) -> list[dict[str, object]]:
    """One row per step and trainer, without the first step of each (imports, allocations)."""
    with _workers(job, trainers) as workers:
        rows = []
        for step in range(job.steps):
            step_rows = {name: _next_step(name, worker) for name, worker in workers.items()}
            _check_equal(job, step, step_rows)
            if step:
                rows += [{"work": job.work, "trainer": name, "step": step, **row} for name, row in step_rows.items()]
    for row in rows:
        del row["digest"]
    return rows


@contextmanager
def _workers(job: Job, trainers: Sequence[str]) -> Iterator[dict[str, subprocess.Popen]]:
    """Workers by trainer, started one after the other. Each waits at the end of its first step."""
    running: dict[str, subprocess.Popen] = {}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for name in trainers:
                command = [sys.executable, "-m", "benchmarks.end_to_end", "--worker", name]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                worker = subprocess.Popen([*command, "--job", json.dumps(asdict(job))], text=True, cwd=ROOT, **pipes)
                worker.first, worker.errors = worker.stdout.readline(), errors
                running[name] = worker
            yield running
        finally:
            for worker in running.values():
                worker.stdin.close()  # ends the worker and its graders
                try:
                    worker.wait(30)
                except subprocess.TimeoutExpired:
                    worker.kill()


def _next_step(name: str, worker: subprocess.Popen) -> dict[str, object]:
    line = worker.first
    if line is None:
        worker.stdin.write("go\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    worker.first = None
    if not line:
        worker.errors.seek(0)
        raise RuntimeError(f"{name} stopped: {worker.errors.read()[-3000:]}")
    return json.loads(line)


def _check_equal(job: Job, step: int, step_rows: dict[str, dict]) -> None:
    keys = ["prompts", "digest", "responses"]
    if job.work == EQUAL:
        keys += ["response_tokens", "gradient_tokens"]
        tokens = job.prompts_per_step * job.responses_per_prompt * job.max_new_tokens
        step_rows = step_rows | {
            "expected": next(iter(step_rows.values())) | {"response_tokens": tokens, "gradient_tokens": tokens}
        }
    for key in keys:
        values = {name: row[key] for name, row in step_rows.items()}
        if len(set(values.values())) > 1:
            raise RuntimeError(f"step {step}: {key} differ, this is not the same work: {values}")


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: medians over steps, and the ratio of medians."""
    first = rows[0]
    parts = ["# The miniature RL step beside TRL's GRPOTrainer", ""]
    parts += ["Generated by `python -m benchmarks.end_to_end`; every step: end_to_end-*.csv. What is compared: see"]
    parts += ["the head of that program. Steps alternate; medians with [p20, p80]; tokens are response tokens. CPU"]
    parts += ["seconds are the trainer's process alone: other work on the machine stretches seconds, hardly those.", ""]
    parts += [f"{first['device']}; torch {first['torch']}, TRL {_version_of(rows, PEER)}, Python {first['python']},"]
    parts += [f"commit `{first['commit']}`, {first['started']}.", ""]
    header = ("work", "trainer", "steps", "seconds", "CPU seconds", "tokens", "with gradient", "tokens/s", "÷ TRL")
    parts += [table_line((*header, "÷ TRL by CPU seconds"))]
    parts += ["|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for kind in dict.fromkeys(row["work"] for row in rows):
        parts += [_line(rows, kind, name) for name in (OURS, PEER)]
    return "\n".join([*parts, ""])


def _rows_of(rows: Sequence[dict], kind: str, name: str) -> list[dict]:
    return [row for row in rows if row["work"] == kind and row["trainer"] == name]


def _rate(rows: Sequence[dict], kind: str, name: str, clock: str) -> tuple[float, float, float]:
    rates = [float(row["response_tokens"]) / float(row[clock]) for row in _rows_of(rows, kind, name)]
    return spread(rates) if rates else (float("nan"),) * 3


def _line(rows: Sequence[dict], kind: str, name: str) -> str:
    trainer_rows = _rows_of(rows, kind, name)
    if not trainer_rows:
        return f"| {kind} | {name} | not measured |" + " |" * 7
    clocks = ("seconds", "cpu_seconds")
    seconds, cpu = (spread([float(row[clock]) for row in trainer_rows]) for clock in clocks)
    tokens, gradient = (
        spread([float(row[key]) for row in trainer_rows])[0] for key in ("response_tokens", "gradient_tokens")
    )
    rate, peer = _rate(rows, kind, name, "seconds"), _rate(rows, kind, PEER, "seconds")
    cpu_ratio = _rate(rows, kind, name, "cpu_seconds")[0] / _rate(rows, kind, PEER, "cpu_seconds")[0]
    return (
        f"| {kind} | {name} | {len(trainer_rows)} | {seconds[0]:.2f} [{seconds[1]:.2f}, {seconds[2]:.2f}] "
        f"| {cpu[0]:.2f} [{cpu[1]:.2f}, {cpu[2]:.2f}] | {tokens:.0f} | {gradient:.0f} "
        f"| {rate[0]:.0f} [{rate[1]:.0f}, {rate[2]:.0f}] | {rate[0] / peer[0]:.2f} | {cpu_ratio:.2f} |"
    )


def _version_of(rows: Sequence[dict], name: str) -> str:
    return next((str(row["package_version"]) for row in rows if row["trainer"] == name), "not measured")


def untrained_world(folder: Path) -> tuple[str, str]:
    """(checkpoint, problems) of the miniature's shape, untrained: enough where lengths and rewards are fixed."""
    from vold.miniature import models
    from vold.miniature.data import DataSizes, write_data

    models.save_checkpoint(models.new_model(models.base_config(), seed=0), folder / "student")
    write_data(folder / "data", 0, DataSizes(train=1024, traces_prompts=1, traces_other=1, val=1, test=1))
    return str(folder / "student"), str(folder / "data" / "train.json")


def main() -> None:
    options = _options()
    if options.worker:
        return run_worker(options.worker, Job(**json.loads(options.job)))
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        student, data = (options.student, options.data) if options.student else untrained_world(Path(folder))
        for kind in [EQUAL, NATURAL] if options.student else [EQUAL]:
            batches = (options.trl_batch, options.microbatch_tokens)
            shape = (options.prompts, options.responses, options.new_tokens, *batches)
            measured = measure(Job(student, data, kind, options.steps + 1, *shape), options.trainers)
            rows += [row | {"package_version": _package(row["trainer"])} | facts for row in measured]
    path = options.out / f"end_to_end-{'cuda' if torch.cuda.is_available() else 'cpu'}.csv"
    write_rows(path, rows, COLUMNS)
    (options.out / "END_TO_END.md").write_text(table(read_rows(path)))
    print((options.out / "END_TO_END.md").read_text())


def _package(trainer: str) -> str:
    from importlib.metadata import version

    return version({OURS: "vold", PEER: "trl"}[trainer])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="checkpoint directory; without it an untrained one is made")
    parser.add_argument("--data", help="its training problems (orz layout)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each trainer")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--trl-batch", type=int, default=240, help="TRL's per_device_train_batch_size")
    parser.add_argument(
        "--microbatch-tokens", type=int, default=4096, help="vold's; both defaults are the fastest here"
    )
    parser.add_argument("--trainers", nargs="*", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
