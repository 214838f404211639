"""GGUF files as checkpoints: written with the gguf library as llama.cpp lays them out, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from support import tiny
from vold.cli import convert as command
from vold.commands.convert import convert
from vold.models.gguf_model import open_gguf
from vold.models.gguf_tokenizer import gguf_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install gguf")

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "1 2", "a b"]
TOKENS = [*SPECIAL, *BYTES, "ĠĠ", "12", "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
RENAMED = {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
RENAMED |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
RENAMED |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
RENAMED |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama_cpp(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """As convert_hf_to_gguf.py permutes a Llama's queries and keys (LlamaModel.permute)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return tensor
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write(path: Path, model=None, *, quantise=None, pre="smollm", keys=(), tensors=(), tokens=TOKENS, merges=MERGES):
    """A whole model in one file. keys: (name, value) to add or to replace; tensors: the same."""
    model = model or tiny.llama(vocab_size=len(tokens))
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    rope = config.rope_parameters["rope_theta"]
    numbers = {
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // 4,
        f"{kind}.rope.freq_base": float(rope),
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.chat_template": TEMPLATE,
        **dict(keys),
    }
    adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
    for key, value in numbers.items():
        adders[type(value)](key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            values = llama_cpp(name, tensor, config).numpy()
            for long, short in RENAMED.items():
                name = name.replace(long, short)
            if quantise is not None and values.ndim == 2:
                writer.add_tensor(name, gguf.quantize(values, quantise), raw_dtype=quantise)
            else:
                writer.add_tensor(name, values)
    for name, tensor in dict(tensors).items():
        writer.add_tensor(name, tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def converted(tmp_path: Path, **options) -> Path:
    convert(write(tmp_path / "model.gguf", **options), tmp_path / "out", dtype="float32", tokenizer=None)
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_family_comes_back_bit_equal(family, tied, tmp_path):
    model = tiny.FAMILIES[family](tied=tied, vocab_size=len(TOKENS), rms_norm_eps=1e-5)
    out = converted(tmp_path, model=model, pre="qwen2" if family != "llama" else "smollm")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    ids = tiny.text_row(12).ids[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["rms_norm_eps"]) == (family, tied, 1e-5)
    assert loaded.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_values_are_the_librarys(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    model = tiny.llama(vocab_size=len(TOKENS))
    out = converted(tmp_path, model=model, quantise=kind)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(loaded.state_dict()[name], torch.from_numpy(wanted.astype("float32")))


def test_several_shards_and_bfloat16(tmp_path, monkeypatch):
    from vold.models import gguf_model

    split = gguf_model.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        gguf_model, "split_torch_state_dict_into_shards", lambda shapes, **_: split(shapes, max_shard_size="50KB")
    )
    model = tiny.llama(vocab_size=len(TOKENS))
    convert(write(tmp_path / "model.gguf", model), tmp_path / "out", dtype="bfloat16", tokenizer=None)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(t, model.state_dict()[name].bfloat16()) for name, t in loaded.state_dict().items())


def llama3_divisors(low: float = 1.0) -> torch.Tensor:
    """As convert_hf_to_gguf.py writes rope_freqs.weight for Llama 3.1."""
    divisors = []
    for frequency in 1 / 5e5 ** (torch.arange(0, 32, 2) / 32):
        length = 2 * torch.pi / frequency
        smooth = (8192 / length - low) / (4 - low)
        divisors.append(1.0 if length < 8192 / 4 else 8.0 if length > 8192 / low else 1 / ((1 - smooth) / 8 + smooth))
    return torch.tensor(divisors)


ROPES = {
    "llama3": ({}, llama3_divisors(), {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
    "linear": ({"type": "linear", "factor": 4.0}, None, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        None,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_scaled_rope_is_kept(kind, tmp_path):
    scaling, divisors, expected = ROPES[kind]
    keys = {"llama.rope.freq_base": 5e5} | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    out = converted(tmp_path, keys=keys, tensors={} if divisors is None else {"rope_freqs.weight": divisors})
    assert expected.items() <= LlamaConfig.from_pretrained(out).rope_parameters.items()


REFUSED = {
    "experts": ({"keys": {"llama.expert_count": 8}}, "llama.expert_count = 8 is not supported"),
    "a window": ({"keys": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window = 64"),
    "a partial rope": ({"keys": {"llama.rope.dimension_count": 16}}, "rope.dimension_count differ"),
    "longrope": ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type 'longrope'"),
    "other divisors": ({"tensors": {"rope_freqs.weight": llama3_divisors(2.0)}}, "not Llama 3.1's scaling"),
    "a bias": ({"tensors": {"blk.0.attn_q.bias": torch.ones(128)}}, "blk.0.attn_q.bias has no place in a llama"),
    "a part": ({"keys": {"split.count": 3}}, "part of 3 files"),
    "an adapter": ({"keys": {"general.type": "adapter"}}, "of type 'adapter'"),
    "an unknown rule": ({"pre": "glm4"}, "the rule 'glm4' cannot be built from the file alone: add --tokenizer DIR"),
    "sentencepiece": ({"keys": {"tokenizer.ggml.model": "llama"}}, "tokenizer 'llama' with the rule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_checkpoint_could_not_hold_is_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        converted(tmp_path, **options)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    for name in ("text.gguf", "none.gguf"):
        with pytest.raises(ValueError, match=name):
            command(tmp_path / name, tmp_path / "out")
    gguf.GGUFWriter(tmp_path / "mistral.gguf", "mistral3").write_header_to_file()
    with pytest.raises(ValueError, match=r"mistral\.gguf"):
        command(tmp_path / "mistral.gguf", tmp_path / "out")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_refused(share, tmp_path):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.gguf cannot be read") as error:
        convert(path, tmp_path / "out", dtype="float32", tokenizer=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["many", 0, -1.5])
@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count"])
def test_a_number_that_is_none_is_refused(key, value, tmp_path):
    with pytest.raises(ValueError, match=r"model\.gguf") as error:
        converted(tmp_path, keys={key: value})
    assert "\n" not in str(error.value)


def test_a_directory_with_files_is_left_alone(tmp_path):
    out = converted(tmp_path)
    with pytest.raises(ValueError, match="out is not empty"):
        convert(tmp_path / "model.gguf", out, dtype="float32", tokenizer=None)


def test_a_first_token_that_the_file_asks_for(tmp_path):
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, keys=keys))
    assert tokenizer("ab").input_ids == [1, TOKENS.index("ab")]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [TOKENS.index("ab")]


def test_the_stops_and_the_sampling_that_the_file_names(tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 1, "general.sampling.temp": 0.6}
    out = converted(tmp_path, keys=keys)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"], generation["do_sample"]) == ([2, 1], 0.6, True)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 1]


def test_digits_of_smollm_stand_alone(tmp_path):
    """SmolLM2's own tokenizer.json: Digits(individual_digits), then ByteLevel. GPT-2's rule gives Ġ, Ġ, 1, 2."""
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path))
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_of_the_original(tmp_path):
    path = write(tmp_path / "model.gguf", pre="unheard-of")
    built = gguf_tokenizer(open_gguf(write(tmp_path / "known.gguf")))
    built.save_pretrained(tmp_path / "original")
    convert(path, tmp_path / "out", dtype="float32", tokenizer=tmp_path / "original")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == built.get_vocab()
    other = write(tmp_path / "other.gguf", tokens=[*TOKENS[:-1], "ac"], merges=[*MERGES[:-1], "a c"])
    with pytest.raises(ValueError, match=r"'ac' but 'ab' is built: .*original is of another model"):
        convert(other, tmp_path / "other", dtype="float32", tokenizer=tmp_path / "original")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers are in ../shared/data/tokenizers")
def test_the_real_vocabulary_of_qwen_gives_the_same_ids(tmp_path, merges=8000):
    """With its first merges: the whole of it takes half a minute to write and to read."""
    parts = json.loads((SHARED / "qwen2.5-vl.json").read_text())
    parts["model"]["merges"] = parts["model"]["merges"][:merges]
    parts["model"]["vocab"] = {token: i for token, i in parts["model"]["vocab"].items() if i < 256 + merges}
    for i, token in enumerate(parts["added_tokens"]):
        token["id"] = 256 + merges + i
    real = Tokenizer.from_str(json.dumps(parts))
    tokens = [real.id_to_token(i) for i in range(real.get_vocab_size())]
    pairs = [" ".join(merge) if isinstance(merge, list) else merge for merge in parts["model"]["merges"]]
    model = tiny.qwen2(tied=True, vocab_size=len(tokens), hidden_size=8, intermediate_size=8)
    file = open_gguf(write(tmp_path / "model.gguf", model, pre="qwen2", tokens=tokens, merges=pairs))
    built = Tokenizer.from_str(gguf_tokenizer(file).backend_tokenizer.to_str())
    for text in (
        "12 345  6",
        "e\u0301té",
        "x=\\boxed{7}<|im_end|>\n",
        "½ ²  don't\n\n 数学 <|vision_start|>",
        " a\tb ",
    ):
        assert built.encode(text).ids == real.encode(text).ids, text
