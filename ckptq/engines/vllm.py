"""Rules of vLLM's that hold for every architecture; what differs by architecture is in the table.

Read in vLLM 0.32 and 0.33, under vllm/model_executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group, Scheme

COMMON_SETS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""What vLLM calls a merged Linear -> its parts, in most architectures: for those that the table
does not know (models/*.py, `packed_modules_mapping`)."""

RESHAPED: Mapping[str, tuple[str, ...]] = {
    "BloomForCausalLM": ("query_key_value",),
    "TeleChat2ForCausalLM": ("key_value",),
}
"""Its class -> Linears of which it cuts every tensor by heads while loading, whatever it is
(models/bloom.py, `_repack_qkv`; telechat2.py, `_split_key_value`): one without the weight's rows
ends it."""

LINEAR_CLASSES = ("columnparallellinear", "rowparallellinear", "replicatedlinear")
"""Its Linears, in lower case."""

KV_SCHEME: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("tensor", "attn_head"),
    "symmetric": (True,),
    "dynamic": (False,),
}
"""What a `kv_cache_scheme` may say (layers/quantization/compressed_tensors/compressed_tensors.py,
`CompressedTensorsKVCacheMethod.validate_kv_cache_scheme`). Nothing is a default there: a scheme
that leaves one out, but for `dynamic`, which nobody reads, is refused."""

PERMUTED = ("weight", "weight_packed", "weight_scale")
"""Local names of the tensors of q and k whose rows are permuted where RoPE is interleaved on disk
(models/llama4.py, `permute_qk_weight_for_rotary`); zero points and scales of blocks are not."""


def common_set(projection: str) -> tuple[str, ...]:
    """ "k_proj" -> ("q_proj", "k_proj", "v_proj"); one that is merged with nothing stands alone."""
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
    """The group that it finds for a Linear of this name: by its own name, or that of the Linear
    that it is merged into, before its class."""
    return scheme.group_of(*_names(module), of_class=means_every_linear)


def ignores(scheme: Scheme, module: str) -> bool:
    """Whether `ignore` means a Linear of this name. Class names count in targets alone."""
    return scheme.ignored.match(*_names(module))


def means_by_name(group: Group, module: str) -> bool:
    """Whether a target means this Linear by name, not by class."""
    return group.named.match(*_names(module))


def _names(module: str) -> tuple[str, ...]:
    merged = common_merged_name(module)
    return (module,) if merged is None else (module, merged)


def loads_with_plain_inputs(group: Group) -> bool:
    """Whether a group of this format may leave its inputs unquantized: integers only where they are
    packed (compressed_tensors.py, `_quantization_scheme_map_from_config`, a bare assertion)."""
    floats = group.weights is not None and group.weights.type == "float"
    return floats or group.format != "int-quantized"


def kv_scheme_faults(scheme: Args) -> Iterator[tuple[str, object, tuple[object, ...]]]:
    """Each field of a `kv_cache_scheme` that vLLM refuses: its name, its value, what it may be."""
    for field, choice in KV_SCHEME.items():
        found = scheme.dynamic if field == "dynamic" else scheme.said(field)
        if found not in choice:
            yield field, found, choice


def fills_whole_blocks(member: str, members: Sequence[str], *, of_expert: bool) -> bool:
    """Whether the rows of a member of a fused set must fill whole blocks of scales.

    Those must behind which another one begins, and both the gate and the up of an expert
    (layers/quantization/utils/fp8_utils.py, `validate_fp8_block_shape`;
    `validate_fp8_block_shape_moe` there).
    """
    return len(members) > 1 and (of_expert or member != members[-1])
