"""Responses as token ids: how a turn ends, the thought that a prompt has opened already, and text as it would have been
sampled."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from vold.data.templates import ChatRefused, render_chats
from vold.types import Prompt, TokenIds

THINK, END_THINK = "<think>", "</think>"
_OPENED = re.compile(r"<think>\s*\Z")
_LONGEST_OPENING = 8  # tokens of `<think>` and the line breaks behind it, also where the tag is spelled in pieces
_PROBE = "zqx"


def turn_end(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> int:
    """The id that SFT appends to a response: the one of `stop_ids` with which the chat template ends an assistant's
    turn, else the tokenizer's end token, else the first of them."""
    for token_id in _rendered_after_a_response(tokenizer):
        if token_id in stop_ids:
            return token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids else stop_ids[0]


def _rendered_after_a_response(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        (text,) = render_chats(tokenizer, [turns])
    except (ValueError, ChatRefused):  # no template, or one that knows no such chat
        return []
    return tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]


def open_thought(prompt_ids: TokenIds | Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last ids of a prompt, where they are a `<think>` that it leaves open (Qwen3-Thinking, R1's distills): they
    belong to the response. Empty for other prompts."""
    tail = [int(token_id) for token_id in prompt_ids[-_LONGEST_OPENING:]]
    if not _OPENED.search(tokenizer.decode(tail)):
        return []
    lengths = range(1, len(tail) + 1)
    return next(tail[-n:] for n in lengths if tokenizer.decode(tail[-n:]).lstrip().startswith(THINK))


def response_ids(
    text: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] = ()
) -> TokenIds:
    """A response of a text set as if it had been sampled behind the prompt: it ends once, with `turn_end`, and does not
    repeat a `<think>` that the prompt has opened. stop_ids: of the checkpoint; the tokenizer's end where empty.

    Raises ValueError for a response that goes on behind an end token, or has no thought where the prompt opens one.
    """
    stop_ids = stop_ids or (tokenizer.eos_token_id,)
    if opening := tokenizer.decode(open_thought(prompt.token_ids, tokenizer)).lstrip():
        text = _behind_open_thought(text, opening, prompt.id)
    ends = "|".join(re.escape(tokenizer.convert_ids_to_tokens(token_id)) for token_id in stop_ids)
    ids = tokenizer(re.sub(rf"(({ends})\s*)+\Z", "", text), add_special_tokens=False)["input_ids"]
    if inside := set(ids) & set(stop_ids):
        end = tokenizer.convert_ids_to_tokens(min(inside))
        raise ValueError(f"{prompt.id}: the response goes on behind the end token {end!r}; keep what is before it")
    return np.array([*ids, turn_end(tokenizer, stop_ids)], np.int32)


def _behind_open_thought(text: str, opening: str, id: str) -> str:
    if END_THINK not in text:
        raise ValueError(
            f"{id}: the response has no {END_THINK} and the chat template opens a thought; choose another template "
            "(prompt.chat_template), or responses that think"
        )
    text = text.lstrip()
    return text.removeprefix(opening if text.startswith(opening) else THINK)
