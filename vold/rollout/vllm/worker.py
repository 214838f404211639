"""The extension of each vLLM worker, in-process or behind `vllm serve`: log-probs by the trainer's definition, and
weights that arrive by name. vLLM mixes `PolicyWorker` into its own worker (`worker_extension_cls`).

vLLM's log-probs are those of the raw logits: at temperature 1, and with probability for head rows that no token has.
Two torch hooks correct the logits before the log-probs are computed, so nothing has to be renormalised afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vold.rollout.vllm import hidden_states, weight_stream

GREEDY_BELOW = 1e-5
"""vLLM's own threshold: rows with a lower temperature take the most probable token."""


class PolicyWorker:
    """Methods that are called by name through `collective_rpc`; `self.model_runner` is vLLM's."""

    _prepared = False
    _tap: hidden_states.Tap | None = None

    def prepare_policy(self, real_ids: int, temperature: float = 1.0) -> dict[str, int]:
        """Install the hooks, before the first request: ids from `real_ids` on get no probability, and log-probs of
        sampled tokens are at each request's own temperature, before top-p and top-k. Returns this worker's rank in the
        engine.

        temperature: divides all the engine's logits, for a teacher: vLLM scores prompts at temperature 1, whatever
        temperature a request has. Raises ValueError for a vLLM whose modules are not where the hooks need them.
        """
        self._real_ids, self._temperature = real_ids, temperature
        if self._prepared:
            return {"rank": self.rank}
        model, sampler = self.model_runner.get_model(), self.model_runner.sampler
        if not isinstance(sampler, nn.Module):
            raise ValueError("vLLM's second model runner has no sampler module; set VLLM_USE_V2_MODEL_RUNNER=0")
        heads = [module for module in model.modules() if type(module).__name__ == "LogitsProcessor"]
        if len(heads) != 1:
            raise ValueError(f"vLLM's {type(model).__name__} has {len(heads)} LogitsProcessor modules, not one")
        heads[0].register_forward_hook(lambda _head, _inputs, logits: self._policy_logits(logits))
        sampler.register_forward_pre_hook(_apply_temperature, with_kwargs=True)
        if _is_first_of_tensor_group():
            self._tap = hidden_states.Tap(self.model_runner)
        self._prepared = True
        return {"rank": self.rank}

    def take_hidden_states(self, name: str) -> Tensor | None:
        """The hidden states [n, E] that a request asked for (vold.rollout.vllm.hidden_states), of the worker that has
        them."""
        return None if self._tap is None else self._tap.take(name)

    def send_hidden_states(self, name: str) -> list | None:
        """The same in a form that travels in JSON."""
        rows_nE = self.take_hidden_states(name)
        return None if rows_nE is None else hidden_states.to_json(rows_nE)

    def load_policy(self, named_weights: Iterable[tuple[str, Tensor]] | str) -> None:
        """Overwrite weights in place, by transformers' names, from a stream or from the safetensors files of a
        directory. Weights that are left out (a frozen vision tower) stay. The caller resets the caches."""
        if isinstance(named_weights, str):
            tied = self.model_runner.model_config.hf_text_config.tie_word_embeddings
            named_weights = _read_directory(Path(named_weights), tied)
        self.model_runner.reload_weights(weights_iterator=self._oriented(named_weights))
        if torch.device(self.device).type == "cpu":
            self._pack_experts()

    def _oriented(self, named_weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights with the matrices of a mixture's experts as vLLM expects them in one tensor of all: of
        Qwen3-VL-MoE transposed, as its published files have them."""
        modules = self.model_runner.get_model().modules()
        transposed = any(getattr(module, "is_fused_checkpoint_transposed", False) for module in modules)
        for name, tensor in named_weights:
            is_experts = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
            yield name, tensor.transpose(1, 2) if is_experts and transposed else tensor

    def receive_policy(self, address: str, port: int, rank: int, world: int) -> None:
        """Load the weights that member 0 of the group broadcasts, see vold.rollout.vllm.weight_stream. rank: the member
        number of the engine's first worker; the others follow."""
        self.load_policy(weight_stream.receive(address, port, rank + self.rank, world, torch.device(self.device)))

    def keep_newest_adapter(self) -> None:
        """Drop the adapters of earlier versions: vLLM's server takes their names away and keeps their matrices."""
        numbers = self.list_loras()
        for number in sorted(numbers)[:-1]:
            self.remove_lora(number)

    def _pack_experts(self) -> None:
        """Bring mixture-of-experts weights into the layout that vLLM computes with: on a CPU it does so once, when a
        model is loaded, and computes with the old ones after an update."""
        for module in self.model_runner.get_model().modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and hasattr(module, "w13_weight"):
                kernel.fused_experts.process_weights_after_loading(module)

    def _policy_logits(self, logits: Tensor | None) -> Tensor | None:
        """Corrected logits [rows, V]; None on tensor-parallel ranks that do not sample."""
        if logits is None:
            return None
        if self._temperature != 1.0:
            logits = logits.float() / self._temperature
        logits[..., self._real_ids :] = -torch.inf
        return logits


def _apply_temperature(_sampler: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Divide the sampler's logits [rows, V] by each row's temperature [rows], and set that temperature to 1."""
    logits, metadata = kwargs["logits"], kwargs["sampling_metadata"]
    if metadata.temperature is not None:
        greedy = metadata.temperature < GREEDY_BELOW
        logits = logits.float() / metadata.temperature.masked_fill(greedy, 1.0)[:, None]
        remaining = metadata.temperature.masked_fill(~greedy, 1.0)
        kwargs = {**kwargs, "logits": logits, "sampling_metadata": replace(metadata, temperature=remaining)}
    return args, kwargs


def _is_first_of_tensor_group() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def _read_directory(directory: Path, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Named weights of a directory; a tied head under its own name too, without which vLLM keeps the old head."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)
                if tied and name.endswith("embed_tokens.weight"):
                    yield "lm_head.weight", handle.get_tensor(name)
