"""Several teachers: who scores a row, what a mixture is, and that a run of them trains on what they say."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import ObjectiveConfig, TeacherConfig
from vold.data.packing import pack
from vold.objectives import build_objective
from vold.objectives.divergences import build_divergence
from vold.run.run_dir import read_rows
from vold.teacher import ChosenTeachers, Inside, SeveralTeachers, Teacher, TeacherChoice, metrics_by_teacher
from vold.train.rl import train_rl
from vold.types import Prompt, Rollout, Sample


class Opened:
    """Scores every token with one number; `failed`: prompts for which it has none."""

    def __init__(self, logp: float, failed: tuple[str, ...] = ()):
        self.logp, self.failed, self.asked, self.closed = logp, failed, [], False

    def submit(self, rollouts) -> Future:
        self.asked += [rollout.prompt.id for rollout in rollouts]
        found: Future = Future()
        found.set_result([None if r.prompt.id in self.failed else [self.logp] * len(r.response_ids) for r in rollouts])
        return found

    def close(self) -> None:
        self.closed = True


def prompt(id: str, column=None, images: bool = False) -> Prompt:
    metadata = {} if column is None else {"who": column}
    return Prompt(id, (1, 2), "", images=(Path("a.png"),) if images else (), metadata=metadata)


def rollout(of: Prompt, length: int = 2) -> Rollout:
    return Rollout(of, (3,) * length, (-1.0,) * length, "stop", "")


@pytest.fixture
def choice(tiny_teacher_dir, tiny_student_dir) -> TeacherChoice:
    teachers = {
        "math": TeacherConfig(path=tiny_teacher_dir, rows="text"),
        "vision": TeacherConfig(path=tiny_student_dir, rows="images", weight=3.0),
    }
    return TeacherChoice.from_config(teachers, "who")


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        (prompt("text"), {"math": 1.0}),
        (prompt("image", images=True), {"vision": 3.0}),
        (prompt("named", "vision"), {"vision": 3.0}),
        (prompt("both", ["math", "vision"]), {"math": 1.0, "vision": 3.0}),
        (prompt("mixed", {"math": 0.5, "vision": 2}), {"math": 0.5, "vision": 6.0}),
        (prompt("a struct", {"math": 0.5, "vision": None}), {"math": 0.5}),
        (prompt("blind", ["math", "vision"], images=True), {"vision": 3.0}),
        (prompt("nobody", {"math": 0}), {}),
        (prompt("blind alone", "math", images=True), {}),
        (prompt("empty", ""), {"math": 1.0}),
    ],
)
def test_column_and_rule(choice, row, weights):
    assert choice.weights(row) == weights
    (sample,) = ChosenTeachers(choice).drop_unscorable([Sample(row, (3,), 0.5, 1.0, 2.0)])
    assert sample.kl_weight == pytest.approx(2.0 * sum(weights.values())) and sample.pg_weight == 1.0
    assert SeveralTeachers(choice, {"math": Opened(0), "vision": Opened(0)}).scores(row) is bool(weights)


@pytest.mark.parametrize(
    "column", ["maths", ["math", "x"], {"math": -1}, {"math": "a"}, {"math": True}, 7, {"math": 1e9}]
)
def test_a_column_that_says_nonsense_is_named(choice, column):
    with pytest.raises(ValueError, match="prompt p9: column 'who'") as error:
        choice.check([prompt("p1"), prompt("p9", column)])
    assert "\n" not in str(error.value)


def test_a_teacher_with_nothing_to_do_is_named(choice):
    with pytest.raises(ValueError, match=r"teachers\.vision scores no row of the data"):
        choice.check([prompt("p1"), prompt("p2", "math")])


def test_a_text_teacher_for_images_is_refused(tiny_teacher_dir):
    with pytest.raises(ValueError, match=r"teachers.eyes.rows = 'images' and .* reads text only"):
        TeacherChoice.from_config({"eyes": TeacherConfig(path=tiny_teacher_dir, rows="images")}, None)


def test_each_is_asked_for_its_own_and_mixtures_are_means(choice, capfd):
    opened = {"math": Opened(-1.0, failed=("lost",)), "vision": Opened(-5.0)}
    rows = [prompt("a"), prompt("b", "vision"), prompt("c", ["math", "vision"]), prompt("lost", ["math", "vision"])]
    teachers = SeveralTeachers(choice, opened)
    answer = teachers.submit([rollout(row) for row in rows])
    assert answer.done() and answer.result() == [[-1.0] * 2, [-5.0] * 2, [-4.0] * 2, None]
    assert opened["math"].asked == ["a", "c", "lost"] and opened["vision"].asked == ["b", "c", "lost"]
    teachers.close()
    assert all(teacher.closed for teacher in opened.values())


def test_a_mixture_has_the_gradient_of_the_sum_of_its_terms(tiny_student_dir, tiny_teacher_dir, tmp_path, layout):
    """Of 2 k2(first) + 1/2 k2(second), by two batches of one teacher each."""
    from vold.miniature import models

    models.save_checkpoint(models.new_model(models.teacher_config(), seed=9), tmp_path / "second")
    samples = [replace(s, pg_weight=0.0) for s in assign_token_weights("opd", make_groups([[1.0, 0.0], [0.0, 0.0]]))]
    numbers = {"dtype": torch.float32, "vocab_size": 40}
    weights, scored = {"first": 2.0, "second": 0.5}, {}
    for name, path in (("first", tiny_teacher_dir), ("second", tmp_path / "second")):
        (micro,) = Teacher(path, layout, **numbers).score(batch_of(samples)).micro_batches
        scored[name] = {
            index: micro.logp_teacher_N[micro.sequence_N == row].tolist() for row, index in enumerate(micro.sample_B)
        }

    class Known(Opened):
        def submit(self, rollouts) -> Future:
            found: Future = Future()
            found.set_result([self.logp[int(r.prompt.id.split("/")[1])] for r in rollouts])
            return found

    teachers = {name: TeacherConfig(path=tiny_teacher_dir, weight=weight) for name, weight in weights.items()}
    choice = TeacherChoice.from_config(teachers, None)
    mixture = SeveralTeachers(choice, {name: Known(found) for name, found in scored.items()})
    asked = [Rollout(replace(s.prompt, id=f"p/{i}"), s.response_ids, (), "stop", "") for i, s in enumerate(samples)]
    means = mixture.submit(asked).result()
    mixed = [
        replace(s, logp_teacher=mean)
        for s, mean in zip(ChosenTeachers(choice).drop_unscorable(samples), means, strict=True)
    ]
    trainer = make_trainer(tiny_student_dir, layout)
    found = gradients(trainer, pack(mixed, max_tokens=1 << 20))
    expected = {}
    for name, weight in weights.items():
        one = [replace(s, kl_weight=weight * s.kl_weight, logp_teacher=scored[name][i]) for i, s in enumerate(samples)]
        for key, gradient in gradients(trainer, pack(one, max_tokens=1 << 20)).items():
            expected[key] = expected.get(key, 0.0) + gradient
    assert relative(found, expected) < 1e-4
    assert max(float(g.abs().max()) for g in expected.values()) > 0


def test_metrics_say_what_each_teacher_did(choice):
    samples = [
        Sample(row, (3,), 0.0, 1.0, weight)
        for row, weight in [(prompt("a"), 1.0), (prompt("b"), 1.0), (prompt("c", images=True), 1.0), (prompt("d"), 0.0)]
    ]
    assert metrics_by_teacher(choice, samples, {0: 0.5, 1: 0.25, 2: 4.0}) == {
        "teacher_math_responses": 2.0,
        "teacher_math_kl": 0.375,
        "teacher_vision_responses": 1.0,
        "teacher_vision_kl": 4.0,
    }


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    from vold.miniature import models

    directory = tmp_path_factory.mktemp("second")
    models.save_checkpoint(models.new_model(models.teacher_config(), seed=9), directory)
    return directory


@pytest.mark.parametrize("divergences", [("k2", "k2"), ("k2", "reverse_kl"), ("forward_kl", "jsd"), ("jsd", "k2")])
def test_each_has_its_own_divergence_in_the_trainer(divergences, tiny_student_dir, tiny_teacher_dir, second, layout):
    """Rows of one, of the other and of both: the gradient is the sum of those of one teacher each, of its weight."""
    paths, kinds = {"a": tiny_teacher_dir, "b": second}, dict(zip("ab", divergences, strict=True))
    teachers = {
        n: TeacherConfig(path=p, engine="trainer", weight=w)
        for (n, p), w in zip(paths.items(), (2.0, 0.5), strict=True)
    }
    numbers = {"dtype": torch.float32, "vocab_size": 40}
    built = {name: build_divergence(kind) for name, kind in kinds.items()}
    choice = replace(
        TeacherChoice.from_config(teachers, "who"), by_distribution=frozenset(n for n, d in built.items() if d)
    )
    base = [replace(s, pg_weight=0.0) for s in assign_token_weights("opd", make_groups([[1.0, 0.0], [0.0, 0.0]]))]
    whose = ["a", "b", ["a", "b"], {"a": 1.0, "b": 3.0}]
    samples = [
        replace(s, prompt=replace(s.prompt, id=f"p{i}", metadata={"who": w}))
        for i, (s, w) in enumerate(zip(base, whose, strict=True))
    ]
    open_one = lambda name: Teacher(paths[name], layout, full_distributions=built[name] is not None, **numbers)  # noqa: E731
    inside = {name: Inside(open_one(name), built[name]) for name in paths}
    terms = tuple(f"teacher_{n}" for n in sorted(choice.by_distribution))
    trainer = make_trainer(tiny_student_dir, layout, terms=terms)
    chosen = ChosenTeachers(choice, layout, inside)
    found = gradients(trainer, chosen.score(batch_of(chosen.drop_unscorable(samples))))
    expected: dict = {}
    for name in paths:
        mine = [replace(s, kl_weight=s.kl_weight * choice.weights(s.prompt).get(name, 0.0)) for s in samples]
        objective = build_objective(ObjectiveConfig(preset="opd", divergence=kinds[name]), 13)
        one = gradients(
            make_trainer(tiny_student_dir, layout, objective=objective), open_one(name).score(batch_of(mine))
        )
        expected = {key: expected.get(key, 0.0) + gradient for key, gradient in one.items()}
    assert relative(found, expected) < 2e-4
    report = trainer.step(chosen.score(batch_of(chosen.drop_unscorable(samples))))
    assert all(report.metrics[f"{term}_kl"] > 0 for term in terms)


def test_one_beside_the_rollouts_and_one_in_the_trainer_are_one_mixture(
    tiny_student_dir, tiny_teacher_dir, second, layout
):
    """The remote one's log-probs come with the samples; a response that it failed on has no term left."""
    teachers = {"far": TeacherConfig(path=second), "near": TeacherConfig(path=tiny_teacher_dir, engine="trainer")}
    choice = TeacherChoice.from_config(teachers, None)
    numbers = {"dtype": torch.float32, "vocab_size": 40}
    near, far = (Teacher(path, layout, **numbers) for path in (tiny_teacher_dir, second))
    samples = assign_token_weights("opd", make_groups([[1.0, 0.0]]))
    (micro,) = far.score(batch_of(samples)).micro_batches
    logps = {i: micro.logp_teacher_N[micro.sequence_N == row].tolist() for row, i in enumerate(micro.sample_B)}
    remote = SeveralTeachers(choice, {"far": Opened(-1.0)})
    assert remote.scores(samples[0].prompt) and remote.submit([rollout(samples[0].prompt)]).result() == [[-1.0, -1.0]]
    known = [replace(s, logp_teacher=logps[i]) for i, s in enumerate(samples)]
    chosen = ChosenTeachers(choice, layout, {"near": Inside(near, None)})
    (mixed,) = chosen.score(batch_of(chosen.drop_unscorable(known))).micro_batches
    (of_near,) = near.score(batch_of(samples)).micro_batches
    torch.testing.assert_close(mixed.logp_teacher_N, (of_near.logp_teacher_N + micro.logp_teacher_N) / 2)
    torch.testing.assert_close(mixed.kl_weight_N, 2 * of_near.kl_weight_N)


def test_several_engines_and_divergences_in_a_run(load, world, layout, tmp_path):
    """Text rows to one in the trainer by k2, image rows to another by forward KL; each with metrics of its own."""
    config = load(
        "rl",
        tmp_path / "run",
        "teacher=null",
        "objective.preset=mopd",
        "objective.target_kl=null",
        f"teachers={{text: {{path: {world.teacher}, engine: trainer, rows: text}}, "
        f"eyes: {{path: {world.student}, engine: trainer, divergence: forward_kl, top_k: 7}}}}",
        "steps=2",
        "save_every=0",
        "evaluation.every=0",
    )
    train_rl(config)
    for row in read_rows(config.run_dir / "metrics.jsonl"):
        assert row["teacher_text_responses"] > 0 and row["teacher_text_kl"] > 0
        assert row["teacher_eyes_responses"] >= row["teacher_text_responses"] and row["teacher_eyes_kl"] >= 0
        assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teachers={a: {path: T, divergence: k2, top_k: 4}}"], "teachers.a.top_k is of a whole distribution"),
        (["teachers={a: {path: T}}", "objective.preset=va-opd"], "visual_advantage is of one teacher"),
        (["teachers={a: {path: T}}", "teacher_view={prompt_column: x}"], "teacher_view is of one teacher"),
        (["teachers={a: {path: T, view: {prompt_column: x}}}"], "teachers.a.view.prompt_column = 'x' is in no row"),
    ],
)
def test_what_several_cannot_do_is_one_line(overrides, says, load, world, layout, tmp_path):
    given = [x.replace("path: T", f"path: {world.teacher}, engine: trainer") for x in overrides]
    with pytest.raises(ValueError, match=says) as error:
        train_rl(load("rl", tmp_path / "run", "teacher=null", "objective.target_kl=null", *given))
    assert "\n" not in str(error.value)
