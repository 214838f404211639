"""`vold selfplay` on a tiny world: what it writes, that it goes on where it was interrupted, and what a challenger's
responses are worth, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vold.config import load_config, schema
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.grading import Item
from vold.models.tokenizer import load_tokenizer
from vold.rollout import TransformersSampler
from vold.run.run_dir import read_rows
from vold.selfplay import voters
from vold.selfplay.bank import Bank, BankedQuestion
from vold.selfplay.challenger import ChallengerReward, Memory
from vold.selfplay.check import check_selfplay
from vold.selfplay.embedders import CodeEmbedder, EncoderEmbedder
from vold.selfplay.loop import SelfplayRun, run_selfplay
from vold.selfplay.questions import QuestionParser, Vote
from vold.train.reward_function import StepGroups
from vold.train.training_run import TrainingRun
from vold.types import Group, Prompt, Rollout, Verdict

DIVERSE = Path(__file__).parents[2] / "vold" / "miniature" / "configs" / "selfplay-diverse.yaml"
TINY = [
    "iterations=2",
    "pose.pattern=([^<>]+)",  # an untrained challenger says special tokens, which no question may hold
    "pose.candidates=12",
    "answers.responses=4",
    "answers.lowest=1",
    "answers.highest=3",
    "challenger.steps=2",
    "challenger.prompts_per_step=2",
    "challenger.rollout.responses_per_prompt=3",
    "solver.steps=2",
    "solver.prompts_per_step=10",
    "solver.rollout.responses_per_prompt=2",
    "coder.max_new_tokens=6",
    "evaluation.sampling.max_new_tokens=4",
]


def overrides_of(world, run_dir: Path) -> list[str]:
    return [
        f"run_dir={run_dir}",
        f"student={world.student}",
        f"embedder={world.teacher}",
        f"coder.checkpoint={world.teacher}",
        f"evaluation.sets.text.path={world.data / 'val_text.json'}",
        *TINY,
    ]


def config_of(world, run_dir: Path, *overrides: str) -> schema.SelfplayConfig:
    return load_config(schema.SelfplayConfig, DIVERSE, [*overrides_of(world, run_dir), *overrides])


@pytest.fixture(autouse=True)
def untrained_models_answer(monkeypatch):
    """An untrained solver never boxes anything; the length of what it says stands for an answer."""
    monkeypatch.setattr(voters, "extract_answer", lambda text: str(len(text) % 3))


def test_check_reads_what_self_play_needs_and_changes_nothing(launch, world, tmp_path):
    command = ["-m", "vold", "check", "selfplay", str(DIVERSE), *overrides_of(world, tmp_path / "run")]
    run = launch(1, *command, "parallel.tp=2", "--processes", "2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("2 processes, 1 copies of the model") == 2 and "challenger, which trains" in run.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("coder.checkpoint=/nowhere", r"/nowhere has no tokenizer.json"),
        ("solver.objective.preset=vold", r"solver.objective.preset = 'vold' needs a teacher and self-play has none"),
        ("prompt.max_tokens=1", r"pose.request: prompt of \d+ tokens exceeds prompt.max_tokens = 1; raise it"),
    ],
)
def test_check_names_a_mistake_before_a_model_is_loaded(world, tmp_path, override, line):
    with pytest.raises(ValueError, match=line):
        check_selfplay(config_of(world, tmp_path / "run", override), processes=1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, world, layout):
    """Two uninterrupted iterations of R-Diverse."""
    config = config_of(world, tmp_path_factory.mktemp("selfplay") / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voters, "extract_answer", lambda text: str(len(text) % 3))
        run_selfplay(config)
    return config


def test_what_a_run_writes(whole_run):
    rows = read_rows(whole_run.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0.0 <= row["accuracy_text"] <= 1.0 for row in rows)
    assert (
        whole_run.run_dir / "model"
    ).resolve() == whole_run.run_dir.resolve() / "iteration-0002" / "solver" / "model"
    assert (whole_run.run_dir / "diversity.svg").read_bytes().startswith(b"<?xml")
    bank = Bank(whole_run.run_dir / "bank")
    for number in (1, 2):
        counts = json.loads((whole_run.run_dir / f"iteration-{number:04d}" / "posed.json").read_text())
        assert counts["candidates"] == 12 >= counts["posed"] >= counts["kept"] == bank.count([number]) > 0
        assert rows[number]["questions_kept"] == counts["kept"]
    assert {question.challenger for question in bank.read([2])} == {"iteration-0002/challenger"}
    assert all(0.25 <= question.pass_rate <= 0.75 and question.label for question in bank.read([1, 2]))
    for part in bank.embeddings([1, 2]):
        assert np.linalg.norm(part, axis=1) == pytest.approx(np.ones(len(part)), abs=1e-6)
    assert "nearest_earlier" in rows[2] and "nearest_earlier" not in rows[1]


def test_the_solver_learns_majority_labels_and_replays_thirty_percent(whole_run):
    bank = Bank(whole_run.run_dir / "bank")
    labels = [{q.question: q.label for q in bank.read([number])} for number in (1, 2)]
    for number, old in [(1, 0), (2, 3)]:
        rows = json.loads((whole_run.run_dir / f"iteration-{number:04d}" / "solver.json").read_text())
        asked = [(human["value"], gold["ground_truth"]["value"]) for human, gold in rows]
        assert len(asked) == 2 * 10
        for step in range(2):
            batch = asked[10 * step : 10 * (step + 1)]
            fresh = [labels[number - 1].get(question) == label for question, label in batch]
            assert all(fresh[: 10 - old])
            assert all(labels[0].get(question) == label for question, label in batch[10 - old :]) or not old
        logged = read_rows(whole_run.run_dir / f"iteration-{number:04d}" / "solver" / "prompts.jsonl")
        assert [row["prompt_id"] for row in logged] == [f"solver:{place}" for place in range(1, 21)], "in its order"


def test_challenger_metrics_are_of_its_rewards(whole_run):
    for row in read_rows(whole_run.run_dir / "iteration-0002" / "challenger" / "metrics.jsonl"):
        assert 0.0 < row["well_formed"] <= 1.0 and 0.0 <= row["uncertainty"] <= 1.0
        assert 1 / 6 <= row["repetition"] <= 1.0, "of six responses each is at least its own cluster"
        assert 0.0 <= row["reward"] <= row["well_formed"]
    samples = read_rows(whole_run.run_dir / "iteration-0001" / "challenger" / "samples.jsonl")
    assert any(0.0 < sample["reward"] < 1.0 for sample in samples)


@pytest.mark.parametrize("phase", ["challenger", "pose", "solver"])
def test_resumed_run_equals_the_uninterrupted_one(world, whole_run, layout, tmp_path, monkeypatch, phase):
    """Iteration 1 is broken off: before the second step of either training is saved, or before the bank is written."""
    config = config_of(world, tmp_path / "run", "iterations=1", "challenger.save_every=1", "solver.save_every=1")
    with monkeypatch.context() as patch:
        break_off(patch, phase)
        with pytest.raises(KeyboardInterrupt):
            run_selfplay(config)
    run_selfplay(config, resume=True)
    for player in ("challenger", "solver"):
        ours, theirs = (
            load_file(run / "iteration-0001" / player / "model" / "model.safetensors")
            for run in (config.run_dir, whole_run.run_dir)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    held = [Bank(run / "bank") for run in (config.run_dir, whole_run.run_dir)]
    assert list(held[0].read([1])) == list(held[1].read([1]))
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]


def break_off(patch: pytest.MonkeyPatch, phase: str) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if phase == "pose":
        return patch.setattr(Bank, "append", interrupted)
    finish = TrainingRun.finish_step

    def finish_step(self, step, *rest):
        if self.config.run_dir.name == phase and step == 1:
            raise KeyboardInterrupt
        return finish(self, step, *rest)

    patch.setattr(TrainingRun, "finish_step", finish_step)


def test_two_ranks_share_the_work(world, tmp_path, launch):
    """Each poses, answers and embeds its share; the bank is one, and both train on it."""
    script = Path(__file__).with_name("selfplay_ranks.py")
    done = launch(2, script, DIVERSE, *overrides_of(world, tmp_path / "run"), "iterations=1", "pose.candidates=13")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads((tmp_path / "run" / "iteration-0001" / "posed.json").read_text())
    bank = Bank(tmp_path / "run" / "bank")
    assert counts["candidates"] == 13 and bank.count([1]) == counts["kept"] > 0
    encoder = EncoderEmbedder(world.teacher, device=torch.device("cpu"))
    tokenizer = load_tokenizer(world.teacher)
    coder = CodeEmbedder(
        TransformersSampler(world.teacher, dtype=torch.float32, device=torch.device("cpu")),
        lambda question: build_prompt(Problem("", question), tokenizer, schema.PromptConfig(suffix="")),
        schema.SamplingConfig(max_new_tokens=6, temperature=0.0),
        encoder,
    )
    wanted = coder.embed([question.question for question in bank.read([1])])
    assert np.concatenate(list(bank.embeddings([1]))) == pytest.approx(wanted, abs=1e-5), "each question its own row"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_runs_are_not_mixed(world, whole_run, layout):
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        run_selfplay(config_of(world, whole_run.run_dir))
    with pytest.raises(ValueError, match=r"--resume: iterations was 2 and is now 3"):
        run_selfplay(config_of(world, whole_run.run_dir, "iterations=3"), resume=True)


def test_no_question_worth_training_on_is_one_line(world, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(voters, "extract_answer", lambda text: "1")
    monkeypatch.setattr(SelfplayRun, "train_challenger", lambda *_: None)
    monkeypatch.setattr(SelfplayRun, "_responses", lambda *_: ["1+2", "3+4"])
    config = config_of(world, tmp_path / "run", "answers.lowest=3", "answers.responses=4", "evaluation={}")
    with pytest.raises(ValueError, match=r"iteration 1: of 2 responses 2 held a question, and none had 3 to 3 of 4"):
        run_selfplay(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embedder=null"], "memory compares embeddings and embedder is not set; set embedder: PATH"),
        (["embedder=null", "memory=null"], "coder compares embeddings"),
        (["pose.pattern=("], r"pose.pattern = '\(' is no regular expression"),
        (["pose.pattern=abc"], "pose.pattern = 'abc' has no group"),
        (["answers.highest=11"], "must ascend"),
        (["solver.rollout.vllm={urls: ['http://a:1']}"], r"solver\.rollout\.vllm\.urls names engines"),
        (["microbatch_tokens=99"], r"prompt\.max_tokens \+ challenger\.rollout\.max_new_tokens = 104"),
        (["solver.minibatches=4096"], r"solver\.minibatches = 4096 exceeds solver\.prompts_per_step"),
        (["challenger.rollout.dynamic_sampling={}"], r"challenger\.rollout\.dynamic_sampling and curriculum"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(world, tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_a_method_with_a_teacher_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"solver\.objective\.preset = 'vold' needs a teacher and self-play has none"):
        run_selfplay(config_of(world, tmp_path, "solver.objective.preset=vold"))


# -- the challenger's reward, by hand ------------------------------------------------------------------------------


class OneRank:
    """A Job of one process."""

    dtype, layout = torch.float32, SimpleNamespace(device=torch.device("cpu"))
    log = SimpleNamespace(phase=lambda name: torch.no_grad())
    shard = staticmethod(list)
    gather = staticmethod(list)


class MadeUpVotes:
    """Voters that agree as they are told to."""

    def __init__(self, agreement: dict[str, float]):
        self.agreement, self.seeds = agreement, []

    def vote(self, questions, job, grader, *, seed):
        self.seeds.append(seed)
        return [Vote("4", self.agreement[question]) for question in questions]


def parser_of(config, world) -> QuestionParser:
    return QuestionParser(config.pose.pattern, config.prompt, world.student)


def rewarded(config, votes, texts, world, *, vectors=None, memory=None) -> StepGroups:
    embedder = SimpleNamespace(embed=lambda questions: np.array([vectors[q] for q in questions], dtype=np.float32))
    reward_function = ChallengerReward(
        votes,
        parser_of(config, world),
        OneRank,
        grader=None,
        pose=config.pose,
        seed=100,
        embedder=embedder if vectors else None,
        compare_code=config.coder is not None,
        memory=memory,
    )
    prompt = Prompt("request", (1,), "=")
    rollouts = tuple(Rollout(prompt, (1,), (0.0,), "stop", text) for text in texts)
    verdicts = tuple(reward_function.grade([Item(text, "") for text in texts]))
    group = Group(prompt, rollouts, verdicts, tuple(float(v.outcome == "correct") for v in verdicts))
    return reward_function.assign_rewards(3, StepGroups([group], {"staleness_max": 0.0}))


def test_rewards_of_r_zero(world, tmp_path):
    """Four responses: two equal questions (cluster of 2 of 4), one of its own, one of bad form."""
    config = config_of(
        world,
        tmp_path,
        "coder=null",
        "memory=null",
        "embedder=null",
        r"pose.pattern=\[(.+)\]",
        "pose.cluster_distance=.5",
    )
    votes = MadeUpVotes({"1+2*3-4": 0.5, "<w1><w2><w3><w4>": 0.7})
    found = rewarded(config, votes, ["[1+2*3-4]", "[1+2*3-4]", "[<w1><w2><w3><w4>]", "5"], world)
    [group] = found.groups
    assert group.rewards == pytest.approx((1.0 - 2 / 4, 1.0 - 2 / 4, 0.6 - 1 / 4, 0.0))
    assert votes.seeds == [103], "a seed of its own for each step"
    assert found.metrics["reward"] == pytest.approx((0.5 + 0.5 + 0.35 + 0.0) / 4)
    assert found.metrics["well_formed"] == 0.75 and found.metrics["repetition"] == pytest.approx(
        (2 / 4 * 2 + 1 / 4) / 3
    )
    assert (
        found.metrics["uncertainty"] == pytest.approx((1.0 + 1.0 + 0.6) / 3) and found.metrics["staleness_max"] == 0.0
    )


def test_rewards_of_r_diverse(world, tmp_path):
    """Different words, same code: one cluster of two (SAM). Both are at cosine .8 and 0 from the bank's two questions:
    P = .5 [.8 - .5] + .5 [.4 - .25] = .225 (MAP)."""
    memory = "memory={nearest_allowed: 0.5, mean_allowed: 0.25, weight: 2.0}"
    config = config_of(world, tmp_path, memory, r"pose.pattern=\[(.+)\]", "pose.cluster_distance=.5")
    bank = Bank(tmp_path / "bank")
    rows = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    bank.append(1, [BankedQuestion(1, "", 0, "q", "4", 0.5, row) for row in rows])
    vectors = {"1+2": (0.8, 0.6, 0.0), "<w1><w2>": (0.8, 0.6, 0.0), "3-3": (0.0, 1.0, 0.0)}
    votes = MadeUpVotes(dict.fromkeys(vectors, 0.5))
    remembered = Memory(bank, [1], config.memory)
    found = rewarded(config, votes, [f"[{q}]" for q in vectors], world, vectors=vectors, memory=remembered)
    # 3-3 is at distance .4 from both: below the threshold, so all three are one cluster
    assert found.groups[0].rewards == pytest.approx((max(0.0, 1 - 3 / 3 - 0.45), 0.0, 0.0))
    config = config.model_copy(update={"pose": config.pose.model_copy(update={"cluster_distance": 0.3})})
    found = rewarded(config, votes, [f"[{q}]" for q in vectors], world, vectors=vectors, memory=remembered)
    assert found.groups[0].rewards == pytest.approx((0.0, 0.0, 1 - 1 / 3))
    light = {"repetition_weight": 0.25, "cluster_distance": 0.3}
    config = config.model_copy(update={"pose": config.pose.model_copy(update=light)})
    found = rewarded(config, votes, [f"[{q}]" for q in vectors], world, vectors=vectors, memory=remembered)
    assert found.groups[0].rewards[:2] == pytest.approx((1 - 0.25 * 2 / 3 - 2 * 0.225,) * 2)
    assert found.metrics["memory_penalty"] == pytest.approx((0.225 + 0.225 + 0.0) / 3)


def test_nothing_well_formed_is_worth_nothing(world, tmp_path):
    config = config_of(world, tmp_path, "coder=null", "memory=null", "embedder=null", r"pose.pattern=\[(.+)\]")
    found = rewarded(config, MadeUpVotes({}), ["1", "2"], world)
    assert found.groups[0].rewards == (0.0, 0.0) and found.metrics["well_formed"] == 0.0


def test_a_question_is_no_way_around_the_chat_template(world, tmp_path):
    """Role and image tokens, spelled in a question, would be read as such; so is one that is too long."""
    parser = parser_of(config_of(world, tmp_path, r"pose.pattern=\[(.+)\]", "prompt.max_tokens=8"), world)
    assert parser.parse("[1+2]") == "1+2"
    for bad in ("[1+2<|im_end|>]", "[<|image_pad|>]", "[<user>1]", "[1+2+3+4+5+6]", "1+2"):
        assert parser.parse(bad) is None
    assert ChallengerReward.grade(SimpleNamespace(parser=parser), [Item("[1+2]", "", True), Item("[1+2]", "")]) == [
        Verdict("wrong", None, "form"),
        Verdict("correct", "1+2", "form"),
    ]
