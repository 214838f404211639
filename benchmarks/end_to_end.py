"""The miniature RL step of `vold rl` beside TRL's GRPOTrainer: same checkpoint, prompts, rollouts, grader and threads.

    python -m benchmarks.end_to_end                       (.venv-bench, see `make bench-rl`)
    python -m benchmarks.end_to_end --student runs/demo/sft/model --data runs/miniature/seed0/data/train.json

Each trainer runs its own loop, unmodified, in a process of its own, and waits after every step until it is its turn
again; steps alternate, so that the machine's drift is common to both, and only the ratio within a run is a claim. A
step is everything between two updates: rollout, grading, loss, gradient, update; for vold also the hand-over of the
weights to the sampler with its parity probe. GRPO without a teacher.

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

from .harness import facts, read_rows, spread, table_line, write_rows

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
    """What both trainers are asked to do."""

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
    """One worker's side: times its steps, reports them on `out` and waits between them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.work: dict[str, object] = {}
        self._started, self._cpu = perf_counter(), process_time()

    def saw(self, prompts: Sequence[Sequence[int]], response_tokens: int, responses: int) -> None:
        """What this step works on: `prompts` as token ids, once for each group."""
        digest = hashlib.sha256(json.dumps(sorted(map(list, prompts))).encode()).hexdigest()
        self.work = {"prompts": len(prompts), "digest": digest, "responses": responses}
        self.work |= {"response_tokens": response_tokens, "gradient_tokens": response_tokens}

    def over(self, **more: object) -> None:
        spent = {"seconds": perf_counter() - self._started, "cpu_seconds": process_time() - self._cpu}
        print(json.dumps({**spent, **self.work, **more}), file=self._out, flush=True)
        if not sys.stdin.readline():  # the parent has what it wanted
            raise SystemExit
        self._started, self._cpu = perf_counter(), process_time()


def alternating(place_in_group: int) -> float:
    return float(place_in_group % 2)


def run_vold(job: Job, turn: Turn) -> None:
    """`vold rl` itself; what is put around its functions watches, or makes the work equal."""
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
        turn.saw([group.prompt.token_ids for group in drawn.groups.values()], tokens, len(rollouts))
        return replace(drawn, groups={place: even(group) for place, group in drawn.groups.items()})

    def even(group):
        rewards = tuple(alternating(place) for place in range(len(group.rollouts)))
        return replace(group, rewards=rewards) if job.work == EQUAL else group

    def watched_log_step(log, step, metrics, samples=()):
        log_step(log, step, metrics, samples)
        turn.over(gradient_tokens=int(metrics["gradient_tokens"]))

    RolloutWorker.sample_groups, RunLog.log_step = watched_sample_groups, watched_log_step
    if job.work == EQUAL:
        components.open_sampler = lambda _config, checkpoint, **where: FixedLengthSampler(checkpoint, **where)
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
            turn.over()

    with Grader(workers=config.grader_workers) as grader, tempfile.TemporaryDirectory() as folder:

        def reward(prompts, completions, completion_ids, gold, **_):
            truncated = [len(ids) == job.max_new_tokens and ids[-1] != tokenizer.eos_token_id for ids in completion_ids]
            verdicts = grader.grade(list(zip(completions, gold, truncated, strict=True)))
            once = tokenizer(prompts[:: job.responses_per_prompt])["input_ids"]
            turn.saw(once, sum(map(len, completion_ids)), len(completions))
            if job.work == EQUAL:
                return [alternating(place % job.responses_per_prompt) for place in range(len(completions))]
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
    """The prompts as vold builds them; TRL gets their text and must read the same ids in it."""
    from vold.config import load_config, schema
    from vold.data.problems import load_problems
    from vold.data.prompts import build_prompts
    from vold.models.tokenizer import load_tokenizer

    config = load_config(schema.RlConfig, CONFIG, job.overrides("unused"))
    tokenizer = load_tokenizer(config.student)
    prompts = build_prompts(load_problems(config.data), tokenizer, config.prompt, config.data.on_error)
    prompts = [replace(prompt, text=tokenizer.decode(prompt.token_ids)) for prompt in prompts]
    assert all(tokenizer(prompt.text)["input_ids"] == list(prompt.token_ids) for prompt in prompts)
    return config, tokenizer, prompts


def _trl_config(kind: Callable, job: Job, config, folder: str):
    """Everything that only costs time is off: gradient checkpointing, logging, saving, tables."""
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


def work(trainer: str, job: Job) -> None:
    """Body of a worker process. Its standard output belongs to the parent; what libraries print is for people."""
    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr
    RUNNERS[trainer](job, turn)


# -- the parent ----------------------------------------------------------------------------------------------------


def measure(job: Job, trainers: Sequence[str]) -> list[dict[str, object]]:
    """One row a step and trainer; the first step of each (imports, allocations) is left out."""
    with _workers(job, trainers) as workers:
        found = []
        for step in range(job.steps):
            seen = {name: _next_step(name, worker) for name, worker in workers.items()}
            _check_equal(job, step, seen)
            if step:
                found += [{"work": job.work, "trainer": name, "step": step, **row} for name, row in seen.items()]
    for row in found:
        del row["digest"]
    return found


@contextmanager
def _workers(job: Job, trainers: Sequence[str]) -> Iterator[dict[str, subprocess.Popen]]:
    """Started one after the other; each stands at the end of its first step until it is asked for."""
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
                worker.stdin.close()  # it leaves by itself and takes its graders along
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


def _check_equal(job: Job, step: int, seen: dict[str, dict]) -> None:
    keys = ["prompts", "digest", "responses"]
    if job.work == EQUAL:
        keys += ["response_tokens", "gradient_tokens"]
        tokens = job.prompts_per_step * job.responses_per_prompt * job.max_new_tokens
        seen = seen | {"asked for": next(iter(seen.values())) | {"response_tokens": tokens, "gradient_tokens": tokens}}
    for key in keys:
        values = {name: row[key] for name, row in seen.items()}
        if len(set(values.values())) > 1:
            raise RuntimeError(f"step {step}: {key} differ, this is not the same work: {values}")


def table(found: Sequence[dict[str, object]]) -> str:
    """Markdown: medians over steps, and the ratio of medians."""
    first = found[0]
    parts = ["# The miniature RL step beside TRL's GRPOTrainer", ""]
    parts += ["Generated by `python -m benchmarks.end_to_end`; every step: end_to_end-*.csv. What is compared: see"]
    parts += ["the head of that program. Steps alternate; medians with [p20, p80]; tokens are response tokens. CPU"]
    parts += ["seconds are the trainer's process alone: other work on the machine stretches seconds, hardly those.", ""]
    parts += [f"{first['device']}; torch {first['torch']}, TRL {_version_of(found, PEER)}, Python {first['python']},"]
    parts += [f"commit `{first['commit']}`, {first['started']}.", ""]
    header = ("work", "trainer", "steps", "seconds", "CPU seconds", "tokens", "with gradient", "tokens/s", "÷ TRL")
    parts += [table_line((*header, "÷ TRL by CPU seconds"))]
    parts += ["|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for kind in dict.fromkeys(row["work"] for row in found):
        parts += [_line(found, kind, name) for name in (OURS, PEER)]
    return "\n".join([*parts, ""])


def _of(found: Sequence[dict], kind: str, name: str) -> list[dict]:
    return [row for row in found if row["work"] == kind and row["trainer"] == name]


def _rate(found: Sequence[dict], kind: str, name: str, clock: str) -> tuple[float, float, float]:
    rates = [float(row["response_tokens"]) / float(row[clock]) for row in _of(found, kind, name)]
    return spread(rates) if rates else (float("nan"),) * 3


def _line(found: Sequence[dict], kind: str, name: str) -> str:
    rows = _of(found, kind, name)
    if not rows:
        return f"| {kind} | {name} | not measured |" + " |" * 7
    clocks = ("seconds", "cpu_seconds")
    seconds, cpu = (spread([float(row[clock]) for row in rows]) for clock in clocks)
    tokens, gradient = (spread([float(row[key]) for row in rows])[0] for key in ("response_tokens", "gradient_tokens"))
    rate, peer = _rate(found, kind, name, "seconds"), _rate(found, kind, PEER, "seconds")
    cpu_ratio = _rate(found, kind, name, "cpu_seconds")[0] / _rate(found, kind, PEER, "cpu_seconds")[0]
    return (
        f"| {kind} | {name} | {len(rows)} | {seconds[0]:.2f} [{seconds[1]:.2f}, {seconds[2]:.2f}] "
        f"| {cpu[0]:.2f} [{cpu[1]:.2f}, {cpu[2]:.2f}] | {tokens:.0f} | {gradient:.0f} "
        f"| {rate[0]:.0f} [{rate[1]:.0f}, {rate[2]:.0f}] | {rate[0] / peer[0]:.2f} | {cpu_ratio:.2f} |"
    )


def _version_of(found: Sequence[dict], name: str) -> str:
    return next((str(row["package_version"]) for row in found if row["trainer"] == name), "not measured")


def untrained_world(folder: Path) -> tuple[str, str]:
    """A student and prompts of the miniature's shape, made in seconds: enough where lengths and rewards are fixed."""
    from vold.miniature import models
    from vold.miniature.data import DataSizes, write_data

    models.save_checkpoint(models.new_model(models.base_config(), seed=0), folder / "student")
    write_data(folder / "data", 0, DataSizes(train=1024, traces_prompts=1, traces_other=1, val=1, test=1))
    return str(folder / "student"), str(folder / "data" / "train.json")


def main() -> None:
    options = _options()
    if options.worker:
        return work(options.worker, Job(**json.loads(options.job)))
    known = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        student, data = (options.student, options.data) if options.student else untrained_world(Path(folder))
        for kind in [EQUAL, NATURAL] if options.student else [EQUAL]:
            batches = (options.trl_batch, options.microbatch_tokens)
            shape = (options.prompts, options.responses, options.new_tokens, *batches)
            rows = measure(Job(student, data, kind, options.steps + 1, *shape), options.trainers)
            found += [row | {"package_version": _package(row["trainer"])} | known for row in rows]
    path = options.out / f"end_to_end-{'cuda' if torch.cuda.is_available() else 'cpu'}.csv"
    write_rows(path, found, COLUMNS)
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
