"""Questions as unit vectors, whose products are cosines: embeddings of their text, or of the code that solves them.

An encoder is a local directory that transformers loads without custom code. In a directory of sentence-transformers,
`1_Pooling/config.json` determines how hidden states become one vector; the default is their mean.

Shape letters: Q questions, B of them in a batch, T padded tokens, E embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from vold.config.schema import CoderConfig, PromptConfig, SamplingConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.tokenizer import load_tokenizer
from vold.parallel import cpu
from vold.rollout import Sampler, open_sampler
from vold.run.job import Job
from vold.types import Prompt
from vold.untrusted import read_json

Pooling = Literal["mean", "cls", "lasttoken"]
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


class Embedder(Protocol):
    """Texts in, unit vectors out."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [Q, E], rows of unit length; the same text gives the same row. No text is empty."""
        ...


class EncoderEmbedder:
    """Embeds by an encoder's pooled last hidden states. `max_tokens`: longer texts are cut."""

    def __init__(self, directory: Path, *, device: torch.device, batch_size: int = 64, max_tokens: int = 512):
        if not (directory / "config.json").is_file():
            raise ValueError(f"embedder = {directory} holds no config.json; give the directory of an encoder")
        self._pooling = read_pooling(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = AutoModel.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self._model = model.to(device).eval()
        self._device, self._batch_size, self._max_tokens = device, batch_size, max_tokens

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder. Equal texts are read once."""
        unique = dict.fromkeys(texts)
        if not unique:
            return np.zeros((0, self._width), dtype=np.float32)
        order = sorted(unique, key=len)  # similar lengths need little padding
        batches = [order[k : k + self._batch_size] for k in range(0, len(order), self._batch_size)]
        vectors = torch.cat([self._embed_batch(batch) for batch in batches])
        rows = {text: row for row, text in enumerate(order)}
        return vectors[[rows[text] for text in texts]].numpy()

    @property
    def _width(self) -> int:
        return self._model.config.get_text_config().hidden_size

    @torch.no_grad()
    def _embed_batch(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, E] on the CPU."""
        inputs = self._tokenizer(
            list(texts),
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._max_tokens,
            return_token_type_ids=False,
        ).to(self._device)
        with cpu.paused():
            hidden_BTE = self._model(**inputs).last_hidden_state
        pooled_BE = pool(hidden_BTE, inputs["attention_mask"], self._pooling)
        return torch.nn.functional.normalize(pooled_BE.float(), dim=-1).cpu()


def pool(hidden_BTE: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, [B, E]. Texts are padded on the right, and none is empty."""
    if pooling == "cls":
        return hidden_BTE[:, 0]
    if pooling == "lasttoken":
        return hidden_BTE[torch.arange(len(mask_BT), device=mask_BT.device), mask_BT.sum(1) - 1]
    mask_BT1 = mask_BT[:, :, None].to(hidden_BTE.dtype)
    return (hidden_BTE * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


def read_pooling(directory: Path) -> Pooling:
    """The pooling of a sentence-transformers directory. Raises ValueError for one that is not supported."""
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__} where an object belongs; copy it again")
    modes = [name.removeprefix("pooling_mode_") for name, on in settings.items() if name.startswith("pooling_") and on]
    modes = [settings["pooling_mode"]] if isinstance(settings.get("pooling_mode"), str) else modes
    known = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls", "lasttoken": "lasttoken"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"{path} asks for pooling {modes}; use an encoder that pools by one of {', '.join(known)}")
    return known[modes[0]]


class CodeEmbedder:
    """phi(q) (R-Diverse, SAM): the embedding of the code that a coder writes for a question, greedily. `prompt` makes
    the coder's prompt of a question."""

    def __init__(
        self, coder: Sampler, prompt: Callable[[str], Prompt], sampling: SamplingConfig, embedder: Embedder
    ) -> None:
        self._coder, self._prompt, self._sampling, self._embedder = coder, prompt, sampling, embedder

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder, of each question's code."""
        return self._embedder.embed(self.codes(texts))

    def codes(self, questions: Sequence[str]) -> list[str]:
        """Each question's code; equal questions are sampled once. Where the coder writes nothing it is the question
        itself: a challenger must not gain by questions that the coder does not answer."""
        unique = list(dict.fromkeys(questions))
        prompts = [self._prompt(question) for question in unique]
        rollouts = self._coder.sample(prompts, self._sampling, responses=1, seed=0) if prompts else []
        codes = {
            question: extract_code(rollout.text) or question for question, rollout in zip(unique, rollouts, strict=True)
        }
        return [codes[question] for question in questions]


def extract_code(response: str) -> str:
    """The last fenced block of a response; all of the response where there is none."""
    blocks = _FENCED.findall(response)
    return (blocks[-1] if blocks else response).strip()


def open_embedder(
    encoder: Path | None, coder: CoderConfig | None, *, dtype: torch.dtype, device: torch.device
) -> Embedder | None:
    """The embedder of a config: None, of the questions' text, or of their code where there is a coder (SAM)."""
    if encoder is None:
        return None
    text_embedder = EncoderEmbedder(encoder, device=device)
    if coder is None:
        return text_embedder
    tokenizer = load_tokenizer(coder.checkpoint)

    def prompt(question: str) -> Prompt:
        request = Problem("coder", coder.request.replace("{question}", question))
        return build_prompt(request, tokenizer, PromptConfig(suffix=""))

    sampling = SamplingConfig(
        max_new_tokens=coder.max_new_tokens, temperature=0.0, sequences_per_call=coder.sequences_per_call
    )
    sampler = open_sampler(coder, coder.checkpoint, dtype=dtype, device=device)
    return CodeEmbedder(sampler, prompt, sampling, text_embedder)


def embed_on_all_ranks(embedder: Embedder, questions: Sequence[str], job: Job) -> np.ndarray:
    """float32 [Q, E]. Equal questions are embedded once; ranks share the work. All ranks call with the same
    questions."""
    unique = list(dict.fromkeys(questions))
    with job.log.phase("embed"):
        local = job.shard(unique)
        vectors = job.gather(list(embedder.embed(local)) if local else [])
    rows = {question: row for row, question in enumerate(unique)}
    return np.stack([vectors[rows[question]] for question in questions]) if vectors else np.zeros((0, 1), np.float32)
