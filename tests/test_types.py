"""Records that hold arrays: dtype, immutability, equality, hashing and copies as other processes get them."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from vold.types import Group, Prompt, Rollout, Sample, Verdict

PROMPT = Prompt("p", [1, 2, 151_667], "text", gold="7")
ROLLOUT = Rollout(PROMPT, [4, 5], [-0.1, -2.5], "stop", "text", logp_teacher=[-0.25, -0.5])
GROUP = Group(PROMPT, (ROLLOUT, ROLLOUT), (Verdict("correct", "7", "identical"),) * 2, (1.0, 1.0))


def _is_read_only(array: np.ndarray, dtype: type) -> bool:
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    return array.dtype == dtype


def test_ids_are_int32_and_log_probs_float32_and_read_only():
    sample = Sample(PROMPT, ROLLOUT.response_ids, 1.0, 1.0, 0.0, ROLLOUT.logp_rollout, ROLLOUT.logp_teacher)
    for record in (ROLLOUT, sample, *copy.deepcopy((ROLLOUT, sample))):
        assert _is_read_only(record.prompt.token_ids, np.int32) and _is_read_only(record.response_ids, np.int32)
        assert _is_read_only(record.logp_rollout, np.float32) and _is_read_only(record.logp_teacher, np.float32)
    assert sample.response_ids is ROLLOUT.response_ids, "read-only arrays are shared, not copied"
    assert ROLLOUT.logp_rollout.tolist() == [np.float32(-0.1), -2.5]


def test_the_callers_array_is_copied():
    ids = np.array([1, 2, 3], np.int32)
    prompt = Prompt("p", ids, "")
    ids[0] = 9
    assert prompt.token_ids.tolist() == [1, 2, 3] and ids.flags.writeable


def test_records_are_equal_and_hashed_by_value():
    again = Prompt("p", (1, 2, 151_667), "text", gold="7")
    assert again == PROMPT and hash(again) == hash(PROMPT) and {again: 1}[PROMPT] == 1
    assert replace(PROMPT, token_ids=[1, 2]) != PROMPT != replace(PROMPT, gold="8") and PROMPT != "p"
    assert replace(ROLLOUT, logp_rollout=[-0.1, -2.0]) != ROLLOUT == replace(ROLLOUT, prompt=again)
    received = copy.deepcopy(GROUP)
    assert received == GROUP and hash(received) == hash(GROUP)
    assert replace(GROUP, rollouts=(ROLLOUT, replace(ROLLOUT, response_ids=[4, 6]))) != GROUP


def test_teacher_failed_tells_a_failed_request_from_none():
    states = {None: False, (): True, (-1.0, -2.0): False}
    assert {scores: replace(ROLLOUT, logp_teacher=scores).teacher_failed for scores in states} == states
    assert {s: Sample(PROMPT, [4, 5], 0, 0, 0, logp_teacher=s).teacher_failed for s in states} == states
