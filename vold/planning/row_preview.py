"""A data row in the terminal as the model reads it: token ids as text, special tokens in colour, an image as its number
of tokens, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from vold.data.packing import PromptEncoder
from vold.io import visible
from vold.types import Prompt, Sample

READ, TRAINED, SPECIAL, IMAGE, NOTE = "dim", "green", "bold magenta", "bold cyan", "italic yellow"
MAX_IDS, MAX_CHARACTERS = 10, 1200


def row_preview(row: Prompt | Sample, tokenizer: PreTrainedTokenizerBase, encode: PromptEncoder) -> Group:
    """A prompt, before a response is sampled, or a trace with the response that is trained on."""
    prompt = row.prompt if isinstance(row, Sample) else row
    response = row.response_ids.tolist() if isinstance(row, Sample) else []
    prompt_ids = encode(prompt).prompt_ids.tolist()
    head = Text.assemble(
        (visible(prompt.id), "bold"),
        f"  {len(prompt_ids)} tokens read" + (f", {len(response)} trained" if response else ""),
        f", gold {visible(prompt.gold, multiline=True)!r}" if prompt.gold else "",
        *(f"\n  image {visible(str(path))}" for path in prompt.images),
    )
    body = Text.assemble(*_pieces(prompt_ids, READ, tokenizer), *_pieces(response, TRAINED, tokenizer))
    ids = Text.assemble(
        ("ids  ", "bold"), (_id_line(prompt_ids), READ), "  │  ", (_id_line(response) or "sampled", TRAINED)
    )
    mask = Text.assemble(
        ("mask ", "bold"), (f"0 × {len(prompt_ids)}", READ), "  │  ", (f"1 × {len(response)}", TRAINED)
    )
    if response:
        return Group(Text(""), head, body, ids, mask)
    return Group(Text(""), head, body.append(" ▌a response is sampled from here", NOTE), ids)


def _pieces(ids: Sequence[int], style: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """(text, style) of each run of tokens. Ordinary tokens are decoded together: several may make up one character."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for special_id, group in groupby(ids, key=lambda token: token if token in special else None):
        run = list(group)
        if special_id is None:
            yield _shortened(visible(tokenizer.decode(run), multiline=True)), style
            continue
        text = visible(tokenizer.convert_ids_to_tokens(special_id), multiline=True)
        yield (f"{text} × {len(run)}", IMAGE) if len(run) > 1 else (text, SPECIAL)  # a run is an image's tokens


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - MAX_CHARACTERS} characters…] {text[-half:]}"


def _id_line(ids: Sequence[int]) -> str:
    first = " ".join(map(str, ids[:MAX_IDS]))
    return f"{first} … {ids[-1]}" if len(ids) > MAX_IDS else first
