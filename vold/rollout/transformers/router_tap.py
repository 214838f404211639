"""The experts that a transformers model's routers choose while it samples.

P prompts, R responses side by side, W prompt width (left-padded), S new tokens at most, L layers, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vold.types import Experts

ROUTER = "TopKRouter"
"""How transformers' classes of routers end, whose result ends in the chosen experts [tokens, k]."""


class RouterTap:
    """Of one model; notes choices while it is `opened`."""

    def __init__(self, model: nn.Module):
        routers = [module for module in model.modules() if type(module).__name__.endswith(ROUTER)]
        for router in routers:
            router.register_forward_hook(lambda _module, _inputs, outputs: self._note(outputs[-1]))
        self.has_routers = bool(routers)
        self._is_on, self._latest = False, list[Tensor]()
        self._prompts: list[Experts] = []
        self._new_RSLk: Tensor | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, choices are noted, in the place of those of the last time."""
        self._is_on = self.has_routers
        self._latest, self._prompts, self._new_RSLk = [], [], None
        try:
            yield
        finally:
            self._is_on = False

    def note_prompts(self, mask_PW: Tensor) -> None:
        """The pass before was of these prompts."""
        if self._is_on:
            chosen_PWLk = self._take().unflatten(0, mask_PW.shape).cpu()
            self._prompts = [
                chosen[mask].numpy() for chosen, mask in zip(chosen_PWLk, mask_PW.cpu().bool(), strict=True)
            ]

    def note_step(self, row_of_R: Tensor, step: int, responses: int, steps: int) -> None:
        """The pass before was of token `step` of these of the `responses`."""
        if self._is_on:
            chosen_RLk = self._take()
            if self._new_RSLk is None:
                self._new_RSLk = chosen_RLk.new_full((responses, steps, *chosen_RLk.shape[1:]), -1)
            self._new_RSLk[row_of_R, step] = chosen_RLk

    def experts(self, prompt: int, response: int, tokens: int) -> Experts | None:
        """[tokens of the prompt and of the response but its last, L, k] for a response of so many tokens."""
        if not self._prompts:
            return None
        of_prompt = self._prompts[prompt]
        if tokens == 1:
            return of_prompt
        assert self._new_RSLk is not None
        return np.concatenate([of_prompt, self._new_RSLk[response, : tokens - 1].cpu().numpy()])

    def _note(self, chosen_Tk: Tensor) -> None:
        if self._is_on:
            self._latest.append(chosen_Tk.to(torch.int16))

    def _take(self) -> Tensor:
        """[tokens, L, k] of the pass before."""
        latest, self._latest = self._latest, []
        return torch.stack(latest, 1)
