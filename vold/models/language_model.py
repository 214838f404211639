"""The text model on Megatron: packed tokens in, hidden states out. Logits are never made here.

T packed tokens, D hidden width, U head rows of this tensor-parallel rank, I image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from transformers import PreTrainedModel

from vold.config.schema import AdapterConfig
from vold.models.adapter_dropout import Dropout
from vold.models.adapters import add_adapters, add_visual_adapters, check_targets, train_embeddings_output
from vold.models.architecture import Architecture
from vold.models.layer_spec import block_spec
from vold.models.layers import Packing, Rotary, join_norms, recompute_swiglu
from vold.models.megatron_config import transformer_config
from vold.models.router_replay import NONE, RouterReplay
from vold.models.runs import Runs
from vold.models.vision import Features, FrozenVisionTower, Mergers, encode, for_recomputed_layers, trained_tower
from vold.parallel.context import is_own, own_count, own_tokens
from vold.parallel.launch import Layout
from vold.types import PackedTokens
from vold_kernels.qkv import SharedKeys


class LanguageModel(GPTModel):
    """GPTModel whose last stage returns the final-norm hidden states [T, 1, D] instead of logits.

    vision_levels  levels of the vision tower's features that this chunk adds (see vold.models.vision)
    visual         the patch mergers of these levels, or the whole tower, where they are trained
    adapter        LoRA's settings; the other weights of the text model are frozen then
    dropout        of what the adapters read
    replay         of the choices of a mixture's experts, in the trainer's student
    trained        names of the parameters that are trained, see vold.models.student.build_student
    """

    arch: Architecture
    layout: Layout
    vision_levels: tuple[int, ...]
    visual: Mergers | PreTrainedModel | None
    adapter: AdapterConfig | None
    dropout: Dropout | None
    replay: RouterReplay | None
    trained: frozenset[str]

    def _postprocess(self, hidden_states: Tensor, *_args, **_kwargs) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            # The loss returns a gradient that is already complete on every tp rank, so it is only split here.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return hidden_states

    def head_weight(self) -> Tensor:
        """[U, D]: this tp rank's rows of the output head (the embedding itself when tied). Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def head_main_grad(self) -> Tensor | None:
        """[U, D] fp32: the buffer of the head's gradient, made by Megatron's data-parallel wrapper; None for a frozen
        head. Last stage only."""
        return self.head_weight().main_grad if self.head_weight().requires_grad else None


def build_chunks(
    arch: Architecture,
    layout: Layout,
    dtype: torch.dtype,
    *,
    train_merger: bool = False,
    train_tower: bool = False,
    adapter: AdapterConfig | None = None,
) -> list[LanguageModel]:
    """This rank's part of the model: one chunk, or with virtual stages `layout.vpp` of them, in the order of their
    layers. Weights are uninitialised: call `load_pretrained` next."""
    stages = [None] if layout.vpp is None else range(layout.vpp)
    options = {"train_merger": train_merger, "train_tower": train_tower, "adapter": adapter}
    return [build_language_model(arch, layout, dtype, vp_stage, **options) for vp_stage in stages]


def build_language_model(
    arch: Architecture,
    layout: Layout,
    dtype: torch.dtype,
    vp_stage: int | None = None,
    *,
    train_merger: bool = False,
    train_tower: bool = False,
    adapter: AdapterConfig | None = None,
) -> LanguageModel:
    """One chunk of the model on `layout.device`, weights uninitialised. The first chunk of all holds the embedding, the
    last one the final norm and the head; with `train_merger` each also holds the mergers of its vision levels, with
    `train_tower` the first holds the whole tower, with `adapter` the text model is frozen and its layers have adapters.
    Raises ValueError where another chunk would need the tower's features."""
    pre_process = layout.is_first_stage and vp_stage in (None, 0)
    post_process = layout.is_last_stage and vp_stage in (None, (layout.vpp or 1) - 1)
    config = transformer_config(arch, layout, dtype)
    model = LanguageModel(
        config,
        block_spec(config, arch, layout, vp_stage),
        vocab_size=arch.vocab,
        max_sequence_length=arch.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="mrope",
        rotary_base=arch.rope_theta,
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb = Rotary(arch, layout.device)
    if pre_process:
        model.embedding.register_forward_hook(_with_plain_strides)
    join_norms(model.decoder)
    if layout.recompute == "swiglu":
        recompute_swiglu(model.decoder)
    model.arch, model.layout, model.vision_levels = arch, layout, _vision_levels(model, arch)
    _mark_tensor_parallel_weights(model)
    model.to(layout.device)
    model.adapter, model.dropout, model.visual, model.replay = adapter, None, None, None
    if train_tower and model.vision_levels:
        if not pre_process:
            raise ValueError(
                f"train takes the vision tower, whose features enter {arch.vision.deepstack_layers} layers, not all on "
                "the first stage; lower parallel.pp or vpp, or train visual.merger and visual.deepstack_merger_list"
            )
        model.visual = trained_tower(arch, dtype, layout)
    elif train_merger and model.vision_levels:
        model.visual = Mergers(arch, model.vision_levels, dtype, layout)
    if adapter is not None:
        _add_adapters(model, arch, layout, adapter)
    return model


def _with_plain_strides(_module: nn.Module, _inputs: object, hidden_T1D: Tensor) -> Tensor:
    """The embedding's output, whose transposed strides layers hand on, as rows. torch multiplies rows by a weight in
    one way; transposed ones it multiplies in another where the weight is frozen, with other rounding."""
    return hidden_T1D.squeeze(1).unsqueeze(1)


def _add_adapters(model: LanguageModel, arch: Architecture, layout: Layout, config: AdapterConfig) -> None:
    """Freeze the text model and give its layers adapters."""
    groups = arch.kv_heads // layout.tp
    queries, keys = arch.heads * arch.head_dim // layout.tp, arch.kv_heads * arch.head_dim // layout.tp

    def by_group(parts: list[Tensor], dim: int) -> Tensor:
        """Queries, keys and values -> for each group its queries, key, value, as in linear_qkv."""
        return torch.cat([part.unflatten(dim, (groups, -1)) for part in parts], dim).flatten(dim - 1, dim)

    check_targets(arch, config)
    model.requires_grad_(False)
    model.dropout = Dropout(config.dropout, config.seed)
    joins = {
        "qkv": lambda rows: ((queries, keys, keys), by_group),
        "proj": lambda rows: ((rows,), lambda parts, dim: parts[0]),
        "fc1": lambda rows: ((rows // 2, rows // 2), lambda parts, dim: torch.cat(parts, dim)),
        "fc2": lambda rows: ((rows,), lambda parts, dim: parts[0]),
    }
    add_adapters(model.decoder.layers, config, joins, layout, model.dropout)
    if model.visual is not None:
        add_visual_adapters(model.visual, config, layout, model.dropout)
    if model.pre_process:
        train_embeddings_output(model.embedding)


def _vision_levels(model: LanguageModel, arch: Architecture) -> tuple[int, ...]:
    """Level 0 on the chunk with the embedding, level i on the chunk with the i-th layer that DeepStack adds to."""
    if arch.vision is None:
        return ()
    layers = [
        layer.layer_number for layer in model.decoder.layers if layer.layer_number <= arch.vision.deepstack_layers
    ]
    return (*([0] if model.pre_process else []), *layers)


def open_vision_tower(
    chunks: Sequence[LanguageModel], checkpoint_dir: str | Path, dtype: torch.dtype, patches_per_pass: int | None = None
) -> FrozenVisionTower | None:
    """The frozen vision tower for these chunks, or None where none of them has a vision level, or one has the tower."""
    if not any(chunk.vision_levels for chunk in chunks) or any(has_tower(chunk) for chunk in chunks):
        return None
    return FrozenVisionTower(
        checkpoint_dir,
        chunks[0].arch,
        dtype,
        chunks[0].layout.device,
        patches_per_pass=patches_per_pass,
        merge_patches=all(chunk.visual is None for chunk in chunks),
    )


def has_tower(chunk: LanguageModel) -> bool:
    """True where the chunk itself encodes its pictures, with a tower that is trained."""
    return isinstance(chunk.visual, PreTrainedModel)


def _mark_tensor_parallel_weights(model: LanguageModel) -> None:
    """Set the attributes by which Megatron recognises a weight as divided over the tp group. Megatron does so while it
    initialises a weight, and ours come from a checkpoint; without them the gradient norm counts one rank's share only.
    """
    divided = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        if type(module) in divided and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, divided[type(module)], 1)


def hidden_states(model: nn.Module, tokens: PackedTokens, features: Features | None = None) -> Tensor:
    """Run one chunk. `model` may be wrapped (DDP); a chunk with vision levels needs `features` of the pictures in
    `tokens`.

    Returns hidden_TD [T, D] on the last stage; elsewhere what Megatron's schedule sends on, [T, 1, D]. Its gradient
    must be complete on every tp rank (the loss all-reduces it over the tp group). Under context parallelism both have
    this rank's tokens alone (vold.parallel.context).
    """
    chunk = unwrap(model)
    dropping = chunk.dropout.forward_pass(training=chunk.training) if chunk.dropout else nullcontext()
    with dropping:
        return _hidden_states(model, chunk, tokens, features)


def _hidden_states(model: nn.Module, chunk: LanguageModel, tokens: PackedTokens, features: Features | None) -> Tensor:
    length = own_count(tokens.input_ids_T.numel(), chunk.layout)
    tokens = _padded_to_divide(tokens, chunk.layout)
    own_ids_1T = tokens.input_ids_T[None, own_tokens(chunk.layout)]
    packed, embedded = packing(tokens), None
    if chunk.replay is not None:
        packed.routing = chunk.replay.forward_pass(_own_experts(tokens, chunk.layout))
    if chunk.arch.delta_net is not None:
        packed.runs = Runs.of(tokens.segments, tokens.first_keys, tokens.input_ids_T.device)
    if tokens.pictures and chunk.vision_levels:
        packed.image_rows_I, features_of_level = _local_image_features(chunk, tokens, features)
        packed.deepstack = {level: features_I1D for level, features_I1D in features_of_level.items() if level}
        if chunk.pre_process:
            embedded_T1D = chunk.embedding(input_ids=own_ids_1T, position_ids=None)
            embedded = embedded_T1D.index_copy(0, packed.image_rows_I, features_of_level[0])
    out = model(
        input_ids=own_ids_1T,
        position_ids=tokens.position_ids_3T[:, None],
        attention_mask=None,
        decoder_input=embedded,
        packed_seq_params=packed,
    )
    return out[:length, 0] if chunk.post_process else out


def _own_experts(tokens: PackedTokens, layout: Layout) -> Tensor | None:
    """[t, L, k] of the tokens whose layers this rank computes; context and sequence parallelism divide them."""
    if tokens.experts_TLk is None:
        return None
    own_tLk = tokens.experts_TLk[own_tokens(layout)]
    return own_tLk.chunk(layout.tp)[layout.tp_rank] if layout.sp else own_tLk


def unwrap(model: nn.Module) -> LanguageModel:
    """The LanguageModel inside Megatron's wrappers (DDP, Float16Module)."""
    while not isinstance(model, LanguageModel):
        model = model.module
    return model


def packing(tokens: PackedTokens) -> Packing:
    """The packing as Megatron's record."""
    longest_q, longest_k = map(max, zip(*tokens.segments, strict=True))
    index_K = tokens.kv_index_K
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=tokens.cu_seqlens,
        cu_seqlens_kv=tokens.cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_kv=longest_k,
        shared_keys=None if index_K is None else SharedKeys(index_K, tokens.input_ids_T.numel()),
    )


def _padded_to_divide(tokens: PackedTokens, layout: Layout) -> PackedTokens:
    """Append a dummy segment so that the ranks that share the tokens divide T: cp, and tp under sequence
    parallelism."""
    missing = -tokens.input_ids_T.numel() % (layout.cp * (layout.tp if layout.sp else 1))
    if not missing:
        return tokens
    ids, positions, kv_index = tokens.input_ids_T, tokens.position_ids_3T, tokens.kv_index_K
    experts_TLk = tokens.experts_TLk
    if experts_TLk is not None:
        experts_TLk = torch.cat([experts_TLk, experts_TLk.new_full((missing, *experts_TLk.shape[1:]), NONE)])
    if kv_index is not None:
        kv_index = torch.cat([kv_index, len(ids) + torch.arange(missing, device=ids.device)])
    return replace(
        tokens,
        input_ids_T=torch.cat([ids, ids.new_zeros(missing)]),
        position_ids_3T=torch.cat([positions, positions.new_zeros(3, missing)], dim=1),
        cu_seqlens=torch.cat([tokens.cu_seqlens, tokens.cu_seqlens[-1:] + missing]),
        cu_seqlens_k=torch.cat([tokens.cu_seqlens_k, tokens.cu_seqlens_k[-1:] + missing]),
        kv_index_K=kv_index,
        segments=(*tokens.segments, (missing, missing)),
        experts_TLk=experts_TLk,
        first_keys=(*tokens.first_keys, len(ids)),
    )


def _local_image_features(
    chunk: LanguageModel, tokens: PackedTokens, features: Features | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Rows of the image tokens among this rank's rows of T (which context and sequence parallelism divide), and for
    each vision level of the chunk their features [I, 1, D]."""
    rows_I = (tokens.input_ids_T == chunk.arch.vision.image_token_id).nonzero()[:, 0]
    if isinstance(chunk.visual, PreTrainedModel):
        pictures = [*{picture.key: picture for picture in tokens.pictures}.values()]
        features = encode(chunk.visual, pictures, chunk.arch.vision.merge_size)
    levels = _concatenated_features(tokens, features)
    if has_tower(chunk):
        levels = for_recomputed_layers(levels)
    if len(rows_I) != len(levels[0]):
        raise ValueError(
            f"{len(rows_I)} image-pad tokens but {len(levels[0])} image features: "
            "expand each image-pad id to its number of merged patches (positions.expand_image_tokens)"
        )
    if chunk.layout.cp > 1:
        local = is_own(rows_I, chunk.layout)
        rows_I, levels = rows_I[local] // chunk.layout.cp, [features_ID[local] for features_ID in levels]
    if chunk.config.sequence_parallel:
        share = tokens.input_ids_T.numel() // (chunk.layout.cp * chunk.layout.tp)
        rows_I = rows_I - chunk.layout.tp_rank * share
        local = (rows_I >= 0) & (rows_I < share)
        rows_I, levels = rows_I[local], [features_ID[local] for features_ID in levels]
    if isinstance(chunk.visual, Mergers):
        levels = {level: chunk.visual(level, levels[level]) for level in chunk.vision_levels}
    return rows_I, {level: levels[level][:, None] for level in chunk.vision_levels}


def _concatenated_features(tokens: PackedTokens, features: Features | None) -> list[Tensor]:
    """For each level the features of all pictures, in the order of their tokens."""
    if features is None:
        raise ValueError("the batch holds images but no vision tower was given: load one with FrozenVisionTower")
    return [torch.cat(level) for level in zip(*(features[p.key] for p in tokens.pictures), strict=True)]
