"""The final hidden states of a scored response, out of vLLM: from them and the head's weights the trainer computes
whole distributions. n rows, E hidden width of the teacher.

The worker keeps the rows that a request asks for (in `extra_args`, which vLLM passes through) until they are taken.
They are what vLLM's own head reads for its prompt log-probs: after the last norm, whole on every tensor-parallel rank.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ASK = "vold_hidden_states"
"""The key in a request's `extra_args`; its value is [name of the request's rows, n]."""
KEPT_BYTES = 8 << 30
"""Rows that nobody has taken, in host memory; beyond that the oldest are dropped, those of clients that are gone."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Tap:
    """Keeps rows of the hidden states that vLLM's model runner computes, on the CPU of one worker.

    The runner calls `_get_prompt_logprobs_dict` in every step with the states of all scheduled tokens: a prompt that is
    read in parts, or read again after a preemption, passes in several calls.
    """

    def __init__(self, runner: Any):
        self._runner, self._kept = runner, dict[str, tuple[Tensor, Tensor]]()
        inner = runner._get_prompt_logprobs_dict

        def tapped(hidden_TE: Tensor, scheduled: dict[str, int]) -> Any:
            for request_id, tokens in scheduled.items():
                self._keep(request_id, tokens, hidden_TE)
            return inner(hidden_TE, scheduled)

        runner._get_prompt_logprobs_dict = tapped

    def take(self, name: str) -> Tensor | None:
        """The rows [n, E] of a finished request, whose copy here is dropped; None where there are none or not all."""
        rows_nE, filled_n = self._kept.pop(name, (None, None))
        return rows_nE if filled_n is not None and bool(filled_n.all()) else None

    def _keep(self, request_id: str, tokens: int, hidden_TE: Tensor) -> None:
        request = self._runner.requests[request_id]
        asked = (getattr(request.sampling_params, "extra_args", None) or {}).get(ASK)
        if not asked or request.prompt_token_ids is None:
            return
        name, count = asked
        first = len(request.prompt_token_ids) - 1 - count  # predicts the first of the last `count` ids
        start = request.num_computed_tokens
        low, high = max(start, first), min(start + tokens, first + count)
        if low >= high:
            return
        if name not in self._kept:
            self._make_room(count * hidden_TE[0].nbytes)
            rows_nE = hidden_TE.new_empty((count, hidden_TE.shape[1]), device="cpu")
            self._kept[name] = rows_nE, torch.zeros(count, dtype=torch.bool)
        rows_nE, filled_n = self._kept[name]
        offset = self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[request_id]].item() - start
        rows_nE[low - first : high - first] = hidden_TE[offset + low : offset + high].cpu()
        filled_n[low - first : high - first] = True

    def _make_room(self, needed: int) -> None:
        while self._kept and sum(rows.nbytes for rows, _ in self._kept.values()) + needed > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]


def to_json(rows_nE: Tensor) -> list:
    """The rows as [dtype, n, E, base64], which travels in an HTTP answer: 4/3 of their own bytes."""
    raw = rows_nE.contiguous().view(torch.uint8).numpy().tobytes()
    return [str(rows_nE.dtype).removeprefix("torch."), *rows_nE.shape, base64.b64encode(raw).decode()]


def from_json(value: Any) -> Tensor:
    """Inverse of `to_json`. Raises ValueError for anything else, or rows that are not finite."""
    if not isinstance(value, list) or len(value) != 4 or value[0] not in DTYPES:
        raise ValueError("no hidden states")
    name, rows, width, text = value
    raw = base64.b64decode(text, validate=True)
    if len(raw) != rows * width * DTYPES[name].itemsize:
        raise ValueError(f"{len(raw)} bytes for hidden states of {rows} × {width} {name}")
    return checked(torch.frombuffer(bytearray(raw), dtype=DTYPES[name]).view(rows, width))


def checked(rows_nE: Tensor) -> Tensor:
    """The rows. Raises ValueError where they hold a NaN or an infinity."""
    if not rows_nE.isfinite().all():
        raise ValueError("hidden states that are no numbers")
    return rows_nE


def asked_for(params: Mapping[str, Any]) -> tuple[str, int] | None:
    """(name, n) of the rows that a request's parameters ask for."""
    asked = (params.get("extra_args") or {}).get(ASK)
    return None if asked is None else (asked[0], asked[1])
