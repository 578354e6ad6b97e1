"""vLLM's rules for every architecture; the table holds what differs between architectures.

From vLLM 0.32 and 0.33, under vllm/model_executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckptq.recipes.args import Args
from ckptq.recipes.group_size import ROW, sizes_of
from ckptq.recipes.scheme import Group, Scheme

COMMON_SETS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Merged Linear in vLLM -> its parts, for architectures that the table does not know (models/*.py,
`packed_modules_mapping`)."""

RESHAPED: Mapping[str, tuple[str, ...]] = {
    "BloomForCausalLM": ("query_key_value",),
    "TeleChat2ForCausalLM": ("key_value",),
}
"""vLLM class -> Linears whose tensors it all splits by heads while loading (models/bloom.py,
`_repack_qkv`; telechat2.py, `_split_key_value`): a tensor without the weight's rows fails."""

LINEAR_CLASSES = ("columnparallellinear", "rowparallellinear", "replicatedlinear")
"""vLLM's Linear classes, in lower case."""

KV_SCHEME: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("tensor", "attn_head"),
    "symmetric": (True,),
    "dynamic": (False,),
}
"""Values that a `kv_cache_scheme` may have
(layers/quantization/compressed_tensors/compressed_tensors.py,
`CompressedTensorsKVCacheMethod.validate_kv_cache_scheme`). There are no defaults: a scheme that
omits a field is refused, except `dynamic`, which is not read."""

TOKEN_HEAD_CACHES = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
"""Values of `--kv-cache-dtype` with a scale for each token and head (config/cache.py,
`CacheDType`). One value holds for all layers but those of `--kv-cache-dtype-skip-layers`, which
have the model's dtype (layers/attention/attention.py)."""

LATENT_SCALES = "drops them with a warning, and caches with 1.0"
"""What it does with the cache scales of latent attention: compressed_tensors.py makes a place for
them in `Attention`, which `MLAAttention` is not (`get_quant_method`), and
`maybe_remap_kv_scale_name` leaves out what has no place (model_loader/weight_utils.py)."""

PERMUTED = ("weight", "weight_packed", "weight_scale")
"""Local names of the tensors of q and k whose rows vLLM permutes if RoPE is interleaved on disk
(models/llama4.py, `permute_qk_weight_for_rotary`); it does not permute zero points and block
scales."""


def common_set(projection: str) -> tuple[str, ...]:
    """ "k_proj" -> ("q_proj", "k_proj", "v_proj"); a projection that is not merged stands alone."""
    sets = COMMON_SETS.values()
    return next((parts for parts in sets if projection in parts), (projection,))


def common_merged_name(module: str) -> str | None:
    """ "model.layers.0.self_attn.q_proj" -> "model.layers.0.self_attn.qkv_proj"."""
    parent, _, projection = module.rpartition(".")
    found = (merged for merged, parts in COMMON_SETS.items() if projection in parts)
    return next((f"{parent}.{merged}" for merged in found), None)


def means_every_linear(target: str) -> bool:
    """Class names are compared as parts of names, without case: "Linear" (compressed_tensors/
    utils.py, `find_matched_target`)."""
    return bool(target) and any(target.lower() in name for name in LINEAR_CLASSES)


def group_of(scheme: Scheme, module: str) -> Group | None:
    """The group that vLLM finds for a Linear: by its name or its merged name first, then by
    class."""
    return scheme.group_of(*_names(module), of_class=means_every_linear)


def ignores(scheme: Scheme, module: str) -> bool:
    """Whether `ignore` matches a Linear of this name. Class names count only in targets."""
    return scheme.ignored.match(*_names(module))


def means_by_name(group: Group, module: str) -> bool:
    """Whether a target matches this Linear by name, not by class."""
    return group.named.match(*_names(module))


def _names(module: str) -> tuple[str, ...]:
    merged = common_merged_name(module)
    return (module,) if merged is None else (module, merged)


def loads_with_plain_inputs(group: Group) -> bool:
    """Whether a group of this format may have unquantized inputs: integers only if packed
    (compressed_tensors.py, `_quantization_scheme_map_from_config`, a bare assertion)."""
    floats = group.weights is not None and group.weights.type == "float"
    return floats or group.format != "int-quantized"


def without_kernel(group: Group, columns: int) -> str | None:
    """Why no kernel of vLLM multiplies with a Linear of so many columns, experts aside, which have
    kernels for all groups; None where one does.

    Marlin takes any shape, and integers in groups of a few sizes; Triton's kernel, of four bits,
    two more (kernels/linear/mixed_precision/marlin.py, triton_w4a16.py, `can_implement`).
    """
    sizes, weights = sizes_of(group), group.weights
    size = weights.group_size if weights is not None else None
    if size is None or not sizes or size in sizes:
        return None
    if weights is not None and weights.num_bits == 4 and group.inputs is None:
        sizes = (256, *sizes)
        if size in (256, columns):
            return None
    wanted = ", ".join(str(each) for each in sorted(sizes) if each != ROW)
    return f"vLLM has no kernel for groups of {size}; it has kernels for {wanted}"


def kv_scheme_faults(scheme: Args) -> Iterator[tuple[str, object, tuple[object, ...]]]:
    """Each field of a `kv_cache_scheme` that vLLM refuses: name, value, supported values."""
    for field, choice in KV_SCHEME.items():
        found = scheme.dynamic if field == "dynamic" else scheme.said(field)
        if found not in choice:
            yield field, found, choice


def fills_whole_blocks(member: str, members: Sequence[str], *, of_expert: bool) -> bool:
    """Whether the rows of a member of a fused set must fill whole blocks of scales.

    True for all members but the last, and for both gate and up of an expert
    (layers/quantization/utils/fp8_utils.py, `validate_fp8_block_shape`;
    `validate_fp8_block_shape_moe` there).
    """
    return len(members) > 1 and (of_expert or member != members[-1])
