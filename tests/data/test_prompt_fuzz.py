"""The chat builder: any question becomes ids within the vocabulary, or is refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vold.config.schema import PromptConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompts
from vold.models.tokenizer import load_tokenizer

PIECES = st.sampled_from(["<image>", "<think>", "<|im_end|>", "{{ x }}", "{% raw %}", "\n", "<w1>", "\0", "</s>"])
TEXT = st.lists(PIECES | st.text(max_size=6), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_student_dir):
    return load_tokenizer(tiny_student_dir)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, suffix=TEXT, system=st.none() | TEXT, gold=st.text(max_size=5), limit=st.integers(1, 60))
def test_any_question(tokenizer, question, suffix, system, gold, limit):
    config = PromptConfig(system=system, suffix=suffix, max_tokens=limit)
    problem = Problem("set:1", question, gold)
    try:
        prompts = build_prompts([problem], tokenizer, config)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and "set:1" in str(error)
        if "exceeds prompt.max_tokens" in str(error):
            with pytest.raises(ValueError, match="every prompt exceeds"):
                build_prompts([problem], tokenizer, config, on_error="skip")
        else:
            assert system and "leave prompt.system out" in str(error)
        return
    (prompt,) = prompts
    assert 0 < len(prompt.token_ids) <= limit and (prompt.text, prompt.gold) == (question, gold)
    assert all(0 <= token < len(tokenizer) for token in prompt.token_ids)
