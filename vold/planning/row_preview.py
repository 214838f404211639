"""A training row in the terminal as the model reads it: its ids as text, special tokens in colour, an image as its
number of tokens, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from vold.data.packing import Encoder
from vold.io import visible
from vold.types import Prompt, Sample

READ, TRAINED, SPECIAL, IMAGE, NOTE = "dim", "green", "bold magenta", "bold cyan", "italic yellow"
IDS_SHOWN, CHARACTERS_SHOWN = 10, 1200


def as_the_model_reads(row: Prompt | Sample, tokenizer: PreTrainedTokenizerBase, encode: Encoder) -> Group:
    """A prompt before a response is sampled, or a trace with the response that is learned."""
    prompt = row.prompt if isinstance(row, Sample) else row
    response = row.response_ids if isinstance(row, Sample) else ()
    read = list(encode(prompt).prompt_ids)
    head = Text.assemble(
        (prompt.id, "bold"),
        f"  {len(read)} tokens read" + (f", {len(response)} trained" if response else ""),
        f", gold {visible(prompt.gold, multiline=True)!r}" if prompt.gold else "",
        *(f"\n  image {path}" for path in prompt.images),
    )
    body = Text.assemble(*_pieces(read, READ, tokenizer), *_pieces(response, TRAINED, tokenizer))
    ids = Text.assemble(("ids  ", "bold"), (_ids(read), READ), "  │  ", (_ids(response) or "sampled", TRAINED))
    mask = Text.assemble(("mask ", "bold"), (f"0 × {len(read)}", READ), "  │  ", (f"1 × {len(response)}", TRAINED))
    if response:
        return Group(Text(""), head, body, ids, mask)
    return Group(Text(""), head, body.append(" ▌a response is sampled from here", NOTE), ids)


def _pieces(ids: Sequence[int], style: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Text and style: ordinary tokens are decoded together, as a character may be made of several."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for marked, run in groupby(ids, key=lambda token: token if token in special else None):
        run = list(run)
        if marked is None:
            yield _shortened(visible(tokenizer.decode(run), multiline=True)), style
        elif len(run) > 1:  # an image's tokens
            yield f"{visible(tokenizer.convert_ids_to_tokens(marked))} × {len(run)}", IMAGE
        else:
            yield visible(tokenizer.convert_ids_to_tokens(marked)), SPECIAL


def _shortened(text: str) -> str:
    if len(text) <= CHARACTERS_SHOWN:
        return text
    half = CHARACTERS_SHOWN // 2
    return f"{text[:half]} […{len(text) - CHARACTERS_SHOWN} characters…] {text[-half:]}"


def _ids(ids: Sequence[int]) -> str:
    shown = " ".join(map(str, ids[:IDS_SHOWN]))
    return f"{shown} … {ids[-1]}" if len(ids) > IDS_SHOWN else shown
