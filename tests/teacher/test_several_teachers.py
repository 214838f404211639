"""Several teachers: who scores a row, what a mixture is, and that a run of them trains on what they say."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import TeacherConfig
from vold.data.packing import pack
from vold.teacher import ChosenTeachers, SeveralTeachers, Teacher, TeacherChoice, metrics_by_teacher
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
    assert SeveralTeachers(choice, {}).scores(row) is bool(weights)


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
