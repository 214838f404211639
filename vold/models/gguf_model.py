"""A GGUF file (llama.cpp's format) as a Hugging Face checkpoint directory.

The gguf library reads and dequantises; the values are exact in float32. Every key and tensor of the file is used or
refused by name: transformers' own reader leaves out what it does not know, a scaled RoPE for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vold.io import visible
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import INDEX, check_numbers, new_checkpoint, reading
from vold.models.families import FAMILIES
from vold.models.gguf_header import check_gguf
from vold.models.weight_rules import text_tensors

ARCHITECTURES = tuple(family.gguf for family in FAMILIES.values() if family.gguf)
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
HEAD_KEYS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all the width of a head
ROPE_KEYS = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
# Of what the file's author recommends to sample with.
SAMPLING_KEYS = {"general.sampling.temp": "temperature", "general.sampling.top_k": "top_k"}
SAMPLING_KEYS |= {"general.sampling.top_p": "top_p"}
# Llama 3.1 to 3.3, whose files hold the divisors of the frequencies as a tensor instead of these numbers.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_DIVISORS = "rope_freqs.weight"
UNREAD = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")  # long, and transformers' reader of tokenizers takes them


@dataclass(frozen=True)
class GgufFile:
    """metadata: every key but UNREAD, with its value. tensors: name -> the reader's record, its data read when used."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Dequantised, float32."""
        import gguf

        record = self.tensors[name]
        with reading(self.path):
            return torch.from_numpy(gguf.dequantize(record.data, record.tensor_type).astype("float32"))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def ids(self, *roles: str) -> list[int]:
        """Token ids that the file names for these roles ("eos", "eot"), once each."""
        found = (self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in roles)
        return list(dict.fromkeys(int(i) for i in found if i is not None))


def open_gguf(path: Path) -> GgufFile:
    """Raises ValueError for a file that is no whole language model of a supported architecture."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} needs the gguf package: pip install gguf") from None
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a .gguf file")
    with reading(path):
        check_gguf(path)
        reader = gguf.GGUFReader(path)
        _check_tensors(reader.tensors, path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if key not in UNREAD}
    file = GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if architecture not in ARCHITECTURES or kind != "model":
        what = f"a {architecture!r}" if kind == "model" else f"of type {kind!r}"
        raise ValueError(f"{path} is {what}: give a model of one of the architectures {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{path} is part of {metadata['split.count']} files: join them with llama.cpp's gguf-split")
    return file


def _check_tensors(tensors: Sequence[Any], path: Path) -> None:
    """Raises ValueError where tensors share bytes: a small file could then stand for any number of large ones."""
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise ValueError(f"{path}: the data of tensor {visible(tensor.name)} overlap another's: download it again")
        end = tensor.data_offset + tensor.n_bytes


def convert_gguf(
    file: GgufFile, target: Path, dtype: torch.dtype, save_tokenizer: Callable[[Path], object]
) -> PretrainedConfig:
    """Write `target`: config, generation config, weights in `dtype`, and the tokenizer. Returns the config.

    Raises ValueError naming a key or tensor of the file that such a checkpoint could not hold.
    """
    with reading(file.path):
        config, sampling = read_config(file, dtype), _generation_config(file)
    arch = Architecture.from_config(config, str(file.path))
    with reading(file.path):
        names = _tensor_names(file, arch)
    with new_checkpoint(target) as partial:
        config.save_pretrained(partial)
        sampling.save_pretrained(partial)
        save_tokenizer(partial)
        _write_weights(file, names, arch, dtype, partial)
    return config


# Config --------------------------------------------------------------------------------------------------------------


def read_config(file: GgufFile, dtype: torch.dtype) -> PretrainedConfig:
    """transformers' configuration of the file's model."""
    family = file.metadata["general.architecture"]
    prefix = f"{family}."
    values = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    if missing := [key for key in CONFIG_KEYS if key not in values and key != "attention.head_count_kv"]:
        raise ValueError(f"{file.path} has no {prefix}{missing[0]}: convert the original again")
    for key, value in values.items():
        if key not in (*CONFIG_KEYS, *HEAD_KEYS, *ROPE_KEYS, "vocab_size") and value:
            raise ValueError(f"{file.path}: {prefix}{key} = {value} is not supported: take the original checkpoint")
    fields = {name: _exact(values[key]) for key, name in CONFIG_KEYS.items() if key in values}
    head_dim = _head_dim(file, values, fields)
    check_numbers(file.path, fields | {"head_dim": head_dim})
    stops = file.ids("eos", "eot", "eom")
    config = AutoConfig.for_model(
        family,
        **fields,
        head_dim=head_dim,
        rope_parameters=_rope_parameters(file, values, head_dim),
        vocab_size=file.shape("token_embd.weight")[0] if "token_embd.weight" in file.tensors else 0,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=next(iter(file.ids("bos")), None),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=next(iter(file.ids("padding")), None),
    )
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = dtype
    return config


def _exact(value: Any) -> Any:
    """A float32 of the file as the shortest decimal that it stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy())) if isinstance(value, float) else value


def _head_dim(file: GgufFile, values: dict, fields: dict) -> int:
    widths = {values[key] for key in HEAD_KEYS if key in values}
    if len(widths) > 1:
        raise ValueError(f"{file.path}: {', '.join(HEAD_KEYS)} differ, {sorted(widths)}: such heads are not supported")
    return widths.pop() if widths else fields["hidden_size"] // fields["num_attention_heads"]


def _rope_parameters(file: GgufFile, values: dict, head_dim: int) -> dict:
    rope = {"rope_type": "default", "rope_theta": _exact(values.get("rope.freq_base", 10000.0))}
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: rope.scaling.type {kind!r} is not supported: take the original checkpoint")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": _exact(values.get("rope.scaling.factor", 1.0))}
        if kind == "yarn" and "rope.scaling.original_context_length" in values:
            rope["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
    if ROPE_DIVISORS in file.tensors:
        rope = _llama3_rope(file, rope, head_dim)
    return rope


def _llama3_rope(file: GgufFile, rope: dict, head_dim: int) -> dict:
    """The parameters of Llama 3.1, where they give exactly the divisors that the file stores."""
    stored = file.tensor(ROPE_DIVISORS)
    scaled = rope | LLAMA3_ROPE | {"rope_type": "llama3", "factor": stored.max().item()}
    plain = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=scaled)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](plain, device=torch.device("cpu"))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    expected = 1.0 / rope["rope_theta"] ** exponent / frequencies
    if rope["rope_type"] != "default" or not torch.allclose(stored, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {ROPE_DIVISORS} is not Llama 3.1's scaling of RoPE: take the original")
    return scaled


def _generation_config(file: GgufFile) -> GenerationConfig:
    stops = file.ids("eos", "eot", "eom")
    sampling = {name: _exact(file.metadata[key]) for key, name in SAMPLING_KEYS.items() if key in file.metadata}
    return GenerationConfig(
        bos_token_id=next(iter(file.ids("bos")), None),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=next(iter(file.ids("padding")), None),
        **({"do_sample": True, **sampling} if sampling else {}),
    )


# Weights -------------------------------------------------------------------------------------------------------------


def _tensor_names(file: GgufFile, arch: Architecture) -> dict[str, str]:
    """transformers' name -> the file's, of every tensor. Raises ValueError for one that is missing or left over."""
    import gguf

    if arch.layers > len(file.tensors):
        raise ValueError(
            f"{file.path} has {len(file.tensors)} tensors for {arch.layers} layers: the file is incomplete"
        )
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.model_type)
    name_map = gguf.get_tensor_name_map(kind, arch.layers)
    names = {}
    for short in sorted(text_tensors(arch)):
        name = short if short == "lm_head.weight" else f"model.{short}"
        if name == "lm_head.weight" and arch.tied:
            continue
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored not in file.tensors:
            raise ValueError(f"{file.path} has no tensor {stored}: the file is incomplete")
        if (shape := file.shape(stored)) != (expected := _shape_of(name, arch)):
            raise ValueError(
                f"{file.path}: tensor {stored} has shape {shape}, by its keys {expected}: download it again"
            )
        names[name] = stored
    if extra := sorted(file.tensors.keys() - names.values() - {ROPE_DIVISORS}):
        raise ValueError(f"{file.path}: tensor {extra[0]} has no place in a {arch.model_type}: take the original")
    return names


def _shape_of(name: str, arch: Architecture) -> tuple[int, ...]:
    """Of a tensor by transformers' name, as the config says."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": arch.hidden, "down_proj": arch.hidden}
    outputs |= {"gate_proj": arch.ffn, "up_proj": arch.ffn, "embed_tokens": arch.vocab, "lm_head": arch.vocab}
    inputs = {"o_proj": queries, "down_proj": arch.ffn}
    *_, module, kind = name.split(".")
    if module in ("q_norm", "k_norm"):
        return (arch.head_dim,)
    if module not in outputs:  # a norm of the hidden states
        return (arch.hidden,)
    return (outputs[module],) if kind == "bias" else (outputs[module], inputs.get(module, arch.hidden))


def _write_weights(file: GgufFile, names: dict[str, str], arch: Architecture, dtype: torch.dtype, target: Path) -> None:
    """Shards of at most 5 GB, one in memory at a time, and their index where there are several."""
    shapes = {name: torch.empty(file.shape(stored), dtype=dtype, device="meta") for name, stored in names.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size="5GB")
    for shard, members in plan.filename_to_tensors.items():
        with reading(file.path):
            tensors = {name: _as_transformers(name, file.tensor(names[name]), arch).to(dtype) for name in members}
        save_file(tensors, target / shard, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _as_transformers(name: str, tensor: Tensor, arch: Architecture) -> Tensor:
    """llama.cpp interleaves the two halves that RoPE rotates, in a Llama's queries and keys only."""
    heads = {"q_proj": arch.heads, "k_proj": arch.kv_heads}.get(name.split(".")[-2])
    if arch.model_type != "llama" or heads is None:
        return tensor.contiguous()
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
