"""What VllmSampler makes of engines' answers: siblings whole, streamed as they finish, the same whatever the order."""

from __future__ import annotations

import pytest

from vold.config.schema import SamplingConfig
from vold.rollout.vllm.engines import EngineOutput, Request, Response
from vold.rollout.vllm.sampler import VllmSampler
from vold.types import Prompt

SAMPLED = SamplingConfig(max_new_tokens=4)
PROMPTS = [Prompt(f"p{number}", (7 + number, 8), "") for number in range(4)]


class Backwards:
    """Engines whose last request is answered first. What is drawn is the seed and the place among the siblings."""

    def __init__(self, lost: tuple[int, ...] = ()):
        self.lost = lost

    def stream(self, requests: list[Request]):
        for place in reversed(range(len(requests))):
            params = requests[place].params
            drawn = [[requests[place].token_ids[0], params.get("seed", 0) % 97 + n] for n in range(params.get("n", 1))]
            yield place, None if place in self.lost else EngineOutput([Response(ids, [-0.5] * 2) for ids in drawn], [])

    def load_weights(self, named_weights, version: int) -> None:
        list(named_weights)


@pytest.fixture
def sampler(tiny_student_dir):
    return lambda **settings: VllmSampler(tiny_student_dir, Backwards(**settings))


def test_what_is_answered_is_not_asked_and_the_others_draw_as_before(sampler):
    whole = sampler().sample(PROMPTS, SAMPLED, responses=2, seed=5)
    left = sampler().stream(PROMPTS, SAMPLED, responses=2, seed=5, answered={"p0", "p2"})
    assert [rollout for group in left for rollout in group] == [*whole[6:8], *whole[2:4]]


def test_a_stream_yields_what_sample_draws_as_it_finishes(sampler):
    whole = sampler().sample(PROMPTS, SAMPLED, responses=3, seed=5)
    groups = list(sampler().stream(PROMPTS, SAMPLED, responses=3, seed=5))
    assert [group[0].prompt.id for group in groups] == ["p3", "p2", "p1", "p0"]
    assert [rollout for group in reversed(groups) for rollout in group] == whole
    assert len({tuple(r.response_ids) for r in whole}) == 12, "no two share their random numbers"


def test_a_greedy_group_is_whole_too(sampler):
    greedy = SAMPLED.model_copy(update={"temperature": 0.0})
    assert [len(group) for group in sampler().stream(PROMPTS, greedy, responses=3, seed=0)] == [3] * 4


def test_a_lost_group_is_named_and_left_out(sampler, capfd):
    groups = list(sampler(lost=(1,)).stream(PROMPTS, SAMPLED, responses=3, seed=5))
    assert [group[0].prompt.id for group in groups] == ["p3", "p2", "p0"] and all(len(group) == 3 for group in groups)
    assert capfd.readouterr().err.splitlines() == ["vold: prompt p1 is left out: its request failed"]


def test_sample_and_score_have_an_answer_for_all_or_say_so(sampler):
    with pytest.raises(ValueError, match=r"2 prompts failed too often .*p1, p3"):
        sampler(lost=(1, 3)).sample(PROMPTS, SAMPLED, responses=3, seed=5)
    with pytest.raises(ValueError, match=r"failed to score p0"):
        sampler(lost=(0,)).score(PROMPTS[0], (5, 6))


def test_a_stream_keeps_the_version_it_was_drawn_with(sampler):
    opened = sampler()
    opened.load_weights([])
    stream = opened.stream(PROMPTS, SAMPLED, responses=1, seed=0)
    first = next(stream)
    opened.load_weights([])
    assert {rollout.version for group in [first, *stream] for rollout in group} == {1}
