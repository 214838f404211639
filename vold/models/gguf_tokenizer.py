"""The tokenizer of a GGUF file, as files beside a Hugging Face checkpoint.

A GGUF names the rule by which text is cut before merges (`tokenizer.ggml.pre`) and leaves its words to the reader.
transformers falls back to GPT-2's rule where it does not know the name, and adds no normaliser: other ids for the same
text. The rules here are those of the models' own tokenizer.json; any other name is refused.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vold.models.checkpoint_dir import reading
from vold.models.gguf_model import GgufFile
from vold.models.tokenizer import load_tokenizer

# Rules that transformers knows from the name alone.
SPLIT_BY_TRANSFORMERS = ("gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen")
NORMALISED = ("qwen2", "deepseek-r1-qwen")  # Unicode NFC, in these tokenizers' own files
SMOLLM = ("smollm",)  # every digit alone, then GPT-2's rule


def gguf_tokenizer(file: GgufFile, original: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer built from the file, or that of the checkpoint directory `original`, which must have its tokens.

    Raises ValueError where the file alone does not say how text becomes its ids.
    """
    tokenizer = load_tokenizer(original) if original else _built(file)
    with reading(file.path):
        _check_tokens(file, tokenizer, original)
    return tokenizer


def _check_tokens(file: GgufFile, tokenizer: PreTrainedTokenizerBase, original: Path | None) -> None:
    """Raises ValueError naming the first id whose token is another one in the file."""
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    fix = f"{original} is of another model" if original else "add --tokenizer DIR, of the original checkpoint"
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != 5 and vocabulary.get(number, token if original and kind != 1 else None) != token:  # 5: unused
            raise ValueError(f"{file.path}: id {number} is {token!r} but {vocabulary.get(number)!r} is built: {fix}")


def _built(file: GgufFile) -> PreTrainedTokenizerBase:
    kind, rule = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or rule not in (*SPLIT_BY_TRANSFORMERS, *SMOLLM):
        raise ValueError(
            f"{file.path}: tokenizer {kind!r} with the rule {rule!r} cannot be built from the file alone: "
            "add --tokenizer DIR, of the original checkpoint"
        )
    with reading(file.path):
        tokenizer = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
        )
    backend = tokenizer.backend_tokenizer
    if rule in SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if rule in NORMALISED:
        backend.normalizer = normalizers.NFC()
    if file.metadata.get("tokenizer.ggml.add_bos_token") and (bos := tokenizer.bos_token):
        single = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.bos_token_id)])
        backend.post_processor = processors.Sequence([backend.post_processor or processors.ByteLevel(), single])
    length = file.metadata.get(f"{file.metadata['general.architecture']}.context_length")
    tokenizer.model_max_length = length or tokenizer.model_max_length
    return tokenizer
