"""Text ↔ ids, the chat template, and what survives `skip_special_tokens`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vold.miniature import tokenizer as tk

TOKENIZER = tk.make_tokenizer()
RESPONSE = "<think>7*9+5*3>..3+5*3>....8*3>......4</think>\\boxed{4}"


@settings(deadline=None)
@given(st.lists(st.sampled_from([t for t in tk.VOCABULARY if t != tk.UNKNOWN]), max_size=40))
def test_any_sequence_of_tokens_comes_back(tokens):
    ids = [tk.TOKEN_ID[token] for token in tokens]
    text = TOKENIZER.decode(ids)
    assert text == "".join(tokens)
    assert TOKENIZER(text).input_ids == ids


def test_response_is_decoded_without_spaces_and_keeps_its_marks():
    ids = TOKENIZER(RESPONSE + tk.EOS).input_ids
    assert len(ids) == 37
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode([*ids, TOKENIZER.pad_token_id], skip_special_tokens=True) == RESPONSE


def test_ids_fit_the_models_and_are_in_order():
    assert len(TOKENIZER) == len(tk.VOCABULARY) <= tk.MODEL_VOCAB_SIZE
    assert TOKENIZER.convert_tokens_to_ids(list(tk.VOCABULARY)) == list(range(len(tk.VOCABULARY)))
    assert set(TOKENIZER.all_special_tokens) == set(tk.SPECIAL)
    assert TOKENIZER("x").input_ids == [TOKENIZER.unk_token_id]


@pytest.mark.parametrize(
    "content",
    [
        "<w1>[<7><+>5]<w2><solve>",
        [{"type": "text", "text": "<w1>[<7><+>5]<w2><solve>"}],
    ],
)
def test_chat_template_of_text(content):
    text = render([{"role": "user", "content": content}])
    assert text == "<user><w1>[<7><+>5]<w2><solve><asst>"
    expected = ["<user>", "<w1>", "[", "<7>", "<+>", "5", "]", "<w2>", "<solve>", "<asst>"]
    assert TOKENIZER(text).input_ids == [tk.TOKEN_ID[token] for token in expected]


def test_chat_template_of_an_image_has_one_pad():
    items = [{"type": "text", "text": "<w1>["}, {"type": "image"}, {"type": "text", "text": "]<solve>"}]
    text = render([{"role": "user", "content": items}])
    expected = ["<user>", "<w1>", "[", tk.IMAGE, "]", "<solve>", "<asst>"]
    assert TOKENIZER(text).input_ids == [tk.TOKEN_ID[token] for token in expected]


def test_a_whole_conversation_is_prompt_plus_response():
    user, assistant = {"role": "user", "content": "[5]<solve>"}, {"role": "assistant", "content": RESPONSE}
    conversation = TOKENIZER.apply_chat_template([user, assistant], tokenize=False)
    assert conversation == render([user]) + RESPONSE + tk.EOS


def test_unknown_roles_are_refused():
    with pytest.raises(Exception, match="only user and assistant"):
        render([{"role": "system", "content": "5"}])


def test_both_checkpoints_carry_this_tokenizer(world):
    for directory in (world.teacher, world.base):
        loaded = AutoTokenizer.from_pretrained(directory)
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert loaded.chat_template == TOKENIZER.chat_template
        assert loaded(RESPONSE).input_ids == TOKENIZER(RESPONSE).input_ids
        assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == (tk.PAD, tk.EOS, "left")


def render(messages: list[dict]) -> str:
    return TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
