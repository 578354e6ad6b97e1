"""The recipe that describes a quantized source, so that its codes can be kept as they are.

For each format there is the group that compressed-tensors and vLLM have for the same numbers;
inputs are quantized as the source's engine quantizes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, UsageError
from ckptq.models.attention import LATENT, cache_scales
from ckptq.models.modules import Layout, Linear
from ckptq.models.quantized.as_nvfp4 import as_nvfp4
from ckptq.models.quantized.encoded_weight import Encoded
from ckptq.models.quantized.modelopt import NVFP4
from ckptq.models.quantized.mxfp4_blocks import MXFP4
from ckptq.printable import listed
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.args import LOCAL, Args
from ckptq.recipes.declared import read_declared
from ckptq.recipes.names import read_names
from ckptq.recipes.scheme import REPACK, REPACK_NVFP4, Group, Recipe
from ckptq.recipes.spelled import changed
from ckptq.spec import TensorSpec

Kind = tuple[WeightScheme, bool]
"""(how weights are stored, whether inputs have a static scale)."""


def repacked(
    ckpt: Checkpoint, layout: Layout, recipe: Recipe, ignore: Sequence[str]
) -> tuple[Layout, Recipe]:
    """The layout with its weights as they are to be stored, and the recipe that describes them.

    What is to `ignore` is dequantized. UsageError for a source that is not quantized, or already in
    compressed-tensors' layout; PlanError for weights that the layout cannot hold.
    """
    _check_method(ckpt, recipe)
    layout = _as_stored(layout, recipe, ignore)
    return layout, _recipe(ckpt, layout, recipe, ignore)


def _as_stored(layout: Layout, recipe: Recipe, ignore: Sequence[str]) -> Layout:
    if recipe.conversion != REPACK_NVFP4:
        return layout
    linears, left = dict(layout.linears), read_names(ignore)
    for name, linear in layout.linears.items():
        if linear.kept is not None or left.match(name) or not _is_mxfp4(linear):
            continue
        members = [layout.linears[member] for member in layout.fused_set(name)]
        weights = tuple(m.weight for m in members if isinstance(m.weight, Encoded) and _is_mxfp4(m))
        assert isinstance(linear.weight, Encoded)
        linears[name] = replace(linear, weight=as_nvfp4(linear.weight, weights))
    if linears == layout.linears:
        raise UsageError(f"scheme {recipe.name!r}: the source has no Linears in MXFP4")
    return replace(layout, linears=linears)


def _is_mxfp4(linear: Linear) -> bool:
    return isinstance(linear.weight, Encoded) and linear.weight.scheme == MXFP4


def _recipe(ckpt: Checkpoint, layout: Layout, recipe: Recipe, ignore: Sequence[str]) -> Recipe:
    """With the groups that the weights fall into."""
    kinds = _kinds(layout, ignore)
    _check_kinds(ckpt, layout, recipe, kinds)
    plain = tuple(
        name for name, linear in layout.linears.items() if linear.kept is None and name not in kinds
    )
    return changed(
        recipe,
        groups=tuple(_groups(kinds)),
        ignore=("lm_head", *plain),
        kv_cache_scheme=FP8_CACHE if carried_scales(ckpt) else None,
    )


def _kinds(layout: Layout, ignore: Sequence[str]) -> dict[str, Kind]:
    """Of the quantized Linears that may stay so."""
    left = read_names(ignore)
    found: dict[str, Kind] = {}
    for name, linear in layout.linears.items():
        weight = linear.weight
        if isinstance(weight, Encoded) and linear.kept is None and not left.match(name):
            found[name] = weight.scheme, weight.input_scale is not None
    return found


def _check_kinds(
    ckpt: Checkpoint, layout: Layout, recipe: Recipe, kinds: Mapping[str, Kind]
) -> None:
    if not kinds:
        raise PlanError(f"{ckpt.path}: has no quantized Linear that can be repacked")
    others = sorted({str(scheme) for scheme, _ in kinds.values() if scheme != NVFP4})
    if read_declared(ckpt, lambda *_: None).method == "compressed-tensors" and others:
        raise PlanError(
            f"{ckpt.path}: has Linears in {listed(others)} beside MXFP4; scheme {recipe.name!r} "
            "casts compressed-tensors checkpoints that are MXFP4 throughout"
        )
    for name in kinds:
        weight = layout.linears[name].weight
        assert isinstance(weight, Encoded)
        if (why := weight.why_not_repacked()) is not None:
            raise PlanError(f"{weight.stored.file}: {name}: {why}")


FP8_CACHE = Args(type="float", strategy="tensor")


def carried_scales(ckpt: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """Source tensor -> the tensors that it becomes: the scales of an FP8 cache, by the names that
    engines load. Queries get the keys' scale, as vLLM does where a checkpoint has none; of latent
    attention both k and v get it, with which the row is cached that they are read from.

    Empty for a source without such a cache, or with scales for a part of it.
    """
    said = read_declared(ckpt, lambda *_: None)
    if said.method != "modelopt" or not said.keeps_fp8_cache:
        return {}
    scales = cache_scales(ckpt.tensors)
    modules = {module for module, which in scales if which in "kv"}
    if any(scales.get((m, which)) is None for m in modules for which in "kv"):
        return {}
    made: dict[str, dict[str, StoredTensor]] = {}
    for module in modules:
        for which, origin in _origins(module, ckpt, scales).items():
            tensor = scales[module, origin]
            one = replace(tensor, spec=TensorSpec(tensor.spec.dtype, (1,)))
            made.setdefault(tensor.name, {})[f"{module}.{which}_scale"] = one
    return made if all(t.spec.numel == 1 for t in scales.values()) else {}


def _origins(
    module: str, ckpt: Checkpoint, scales: Mapping[tuple[str, str], StoredTensor]
) -> dict[str, str]:
    """Which scale of an attention -> which of the maker's it is."""
    if any(f"{module}.{name}.weight" in ckpt.tensors for name in LATENT):
        return {"k": "k", "v": "k"}
    return {"k": "k", "v": "v", "q": "q" if (module, "q") in scales else "k"}


def _check_method(ckpt: Checkpoint, recipe: Recipe) -> None:
    method = (ckpt.quantization_config or {}).get("quant_method")
    if method is None:
        raise UsageError(f"scheme 'repack' needs a quantized source; {ckpt.path} is not quantized")
    if method == "compressed-tensors" and recipe.conversion == REPACK:
        raise UsageError(f"{ckpt.path}: is in compressed-tensors' layout already")
    if method == "mxfp4":
        raise PlanError(
            f"{ckpt.path}: vLLM serves gpt-oss's experts in MXFP4 as they are, and has no other "
            "layout for them; scheme 'dequantize' makes BF16 of them"
        )


def _groups(kinds: Mapping[str, Kind]) -> Iterator[Group]:
    """One for each kind. The commonest is for all Linears, the others name theirs."""
    ranked = [kind for kind, _ in Counter(kinds.values()).most_common()]
    for number, kind in enumerate(reversed(ranked)):
        names = tuple(name for name, own in kinds.items() if own == kind)
        targets = ("Linear",) if kind == ranked[0] else names
        yield _group(f"group_{number}", targets, *kind)


def _group(name: str, targets: tuple[str, ...], scheme: WeightScheme, static: bool) -> Group:
    weights = Args(
        num_bits=scheme.num_bits,
        type=scheme.type,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
        block_structure=scheme.block_structure,
        scale_dtype=scheme.scale_dtype,
        zp_dtype=None if scheme.symmetric else "int8",
    )
    inputs = _inputs(scheme, static)
    return Group(
        name=name, targets=targets, weights=weights, input_activations=inputs, format=scheme.format
    )


def _inputs(scheme: WeightScheme, static: bool) -> Args | None:
    """How vLLM quantizes the inputs of such weights, as the source's maker has it."""
    if scheme.type == "int":
        return None
    if scheme.strategy == "tensor_group":
        nvfp4 = Args(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic=LOCAL,
            scale_dtype=scheme.scale_dtype,
        )  # fmt: skip
        return nvfp4 if static else None
    if scheme.scale_dtype is not None:
        return Args(
            type="float", num_bits=scheme.num_bits, strategy="group", group_size=32, dynamic=True,
            scale_dtype=scheme.scale_dtype,
        )  # fmt: skip
    if scheme.block_structure is not None:
        columns = scheme.block_structure[1]
        return Args(type="float", strategy="group", group_size=columns, dynamic=True)
    if static:
        return Args(type="float", strategy="tensor")
    return Args(type="float", strategy="token", dynamic=True)
