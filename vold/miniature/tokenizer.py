"""A word-level tokenizer for the miniature world: every symbol of its alphabet is one token, nothing is lost.

Text and ids determine each other: a token is one character, or starts with `<` or `\\` which are no tokens themselves.
Only pad, eos, roles, image and video pads and unk are *special* (dropped by `skip_special_tokens`); `<think>`,
`</think>` and `\\boxed{` are ordinary and survive it, because graders read them.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, USER, ASSISTANT = "<|endoftext|>", "<|im_end|>", "<user>", "<asst>"
IMAGE, VIDEO, UNKNOWN = "<|image_pad|>", "<|video_pad|>", "<unk>"
SPECIAL = (PAD, EOS, USER, ASSISTANT, IMAGE, VIDEO, UNKNOWN)
OPEN, CLOSE, SOLVE, READ = "[", "]", "<solve>", "<read>"
THINK, END_THINK, BOXED, END_BOXED = "<think>", "</think>", "\\boxed{", "}"
MARKS = (OPEN, CLOSE, SOLVE, READ, THINK, END_THINK, BOXED, END_BOXED)
CHARACTERS = tuple("0123456789+-*=;:>.")
FILLERS = tuple(f"<w{i}>" for i in range(8))
SPELLED = {c: f"<{c}>" for c in "0123456789+-*"}
VOCABULARY = (*SPECIAL, *MARKS, *CHARACTERS, *FILLERS, *SPELLED.values())
MODEL_VOCAB_SIZE = 64
"""Rows of both embedding tables: more than there are tokens, as in the public checkpoints, and divisible by tp."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<user>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<asst>' -}}"
    "{%- else -%}{{- raise_exception('the miniature has only user and assistant turns') -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{- '<|image_pad|>' -}}"
    "{%- elif item['type'] == 'text' -%}{{- item['text'] -}}"
    "{%- else -%}{{- raise_exception('the miniature has only text and image items') -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<asst>' -}}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that teacher and student share; `save_pretrained` writes it with its chat template."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^<>]+>|\\boxed\{|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE, VIDEO],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
"""Token text → id, for configs and for the pretraining loops' batches."""
