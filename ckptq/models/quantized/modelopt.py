"""Linears quantized by NVIDIA's ModelOpt (`quant_method: modelopt`): FP8 of all kinds, and NVFP4.

The config names an algorithm, for all Linears or for each; which it is shows in what is stored
beside `weight`: a `weight_scale` for the tensor, [R] rows, blocks of 128x128, [R, C / 32] exponents
(MXFP8), or [R, C / 16] E4M3 scales of FP4 pairs under one `weight_scale_2`, a multiplier.

Shape letters: R rows (out), C columns (in).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.models.quantized.encoded_weight import Encoded
from ckptq.models.quantized.modelopt_experts import read_fused
from ckptq.quantize.stored import stored
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import FLOATS, TensorSpec

ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8"),
    *("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
)

INPUT_SIDE = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""Tensors of algorithms that change a Linear's input, or add to its output."""

BLOCK = 128

FP8 = WeightScheme(format="float-quantized", num_bits=8, type="float", strategy="tensor")
CHANNEL = replace(FP8, strategy="channel")
BLOCKS = replace(FP8, strategy="block", block_structure=(BLOCK, BLOCK))
MXFP8 = WeightScheme(
    format="mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32,
    scale_dtype="uint8",
)  # fmt: skip
NVFP4 = WeightScheme(
    format="nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
    group_size=16, scale_dtype="float8_e4m3fn",
)  # fmt: skip


def read_modelopt(ckpt: Checkpoint, dtype: str) -> Mapping[str, Encoded]:
    """Module name -> its quantized weight; experts in one tensor have that tensor's name.

    PlanError for an algorithm that is not read, SourceError for tensors that do not fit together.
    """
    _check_algorithms(ckpt)
    found: dict[str, Encoded] = dict(read_fused(ckpt, dtype, FP8, NVFP4))
    for module, tensors in _modules(ckpt):
        weight = tensors["weight"]
        if weight.spec.dtype not in ("U8", "F8_E4M3") or len(weight.spec.shape) != 2:
            raise _odd(weight, "F8_E4M3 or U8 codes of a matrix")
        fp4 = weight.spec.dtype == "U8"
        R, C = weight.spec.shape[0], weight.spec.shape[1] * (2 if fp4 else 1)
        spec = TensorSpec(dtype, (R, C))
        make = _fp4 if fp4 else _fp8
        scheme, parts = make(tensors, spec)
        found[module] = Encoded(
            name=module,
            tensors=parts,
            scheme=scheme,
            spec=spec,
            input_scale=ckpt.tensors.get(f"{module}.input_scale"),
        )
    return found


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that names algorithms: of hf_quant_config.json, or the config itself."""
    inner = config.get("quantization")
    return inner if isinstance(inner, Mapping) else config


def _check_algorithms(ckpt: Checkpoint) -> None:
    said = quantization_of(ckpt.quantization_config or {})
    layers = said.get("quantized_layers")
    entries = [said, *(layers.values() if isinstance(layers, Mapping) else ())]
    for entry in entries:
        found = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        if str(found).upper() not in ALGORITHMS:
            raise PlanError(
                f"{ckpt.path / CONFIG}: quantized with ModelOpt's {found!r}, which ckptq cannot "
                f"read; supported: {', '.join(ALGORITHMS)}"
            )


def _modules(ckpt: Checkpoint) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Modules that have a weight scale, each with its tensors by local name."""
    for name in ckpt.tensors:
        module, _, local = name.rpartition(".")
        if local != "weight_scale":
            continue
        for odd in INPUT_SIDE:
            if f"{module}.{odd}" in ckpt.tensors:
                raise PlanError(
                    f"{ckpt.path}: {module}.{odd}: weights that need another input than the "
                    "model's (AWQ, SVDQuant) are not supported"
                )
        parts = {part: ckpt.tensors.get(f"{module}.{part}") for part in PARTS}
        tensors = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if "weight" not in tensors:
            raise SourceError(
                f"{tensors['weight_scale'].file}: found {name} but no {module}.weight"
            )
        yield module, tensors


PARTS = ("weight", "weight_scale", "weight_scale_2")


def _fp4(
    tensors: Mapping[str, StoredTensor], spec: TensorSpec
) -> tuple[WeightScheme, dict[str, StoredTensor]]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    second = tensors.get("weight_scale_2")
    if second is None:
        raise SourceError(
            f"{weight.file}: found {weight.name} {weight.spec} but no {weight.name}"
            "_scale_2; expected NVFP4"
        )
    if second.spec.numel != 1 or second.spec.dtype not in FLOATS:
        raise _odd(second, "F32 []")
    R, C = spec.shape
    wanted = TensorSpec("F8_E4M3", (R, C // 16))
    if C % 16 or scale.spec != wanted:
        raise _odd(scale, f"{wanted} for {weight.name} {weight.spec}")
    return NVFP4, {"weight_packed": weight, "weight_scale": scale, "weight_scale_2": second}


def _fp8(
    tensors: Mapping[str, StoredTensor], spec: TensorSpec
) -> tuple[WeightScheme, dict[str, StoredTensor]]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    R, C = spec.shape
    sizes = tuple(size for size in scale.spec.shape if size != 1)
    blocks = (ceil(R / BLOCK), ceil(C / BLOCK))
    if scale.spec.dtype == "U8" and scale.spec.shape == (R, C // 32) and C % 32 == 0:
        scheme = MXFP8
    elif scale.spec.dtype not in FLOATS:
        raise _odd(scale, f"a float, or U8 [{R}, {C // 32}]")
    elif not sizes:
        scheme = FP8
    elif sizes == (R,) and scale.spec.shape[0] == R:
        scheme = CHANNEL
    elif sizes == tuple(size for size in blocks if size != 1):
        scheme = BLOCKS
    else:
        raise _odd(scale, f"1, {R} or {blocks[0]}x{blocks[1]} scales")
    shape = stored(spec, scheme)["weight_scale"].shape
    flat = replace(scale, spec=TensorSpec(scale.spec.dtype, shape))
    return scheme, {"weight": weight, "weight_scale": flat}


def _odd(tensor: StoredTensor, wanted: str) -> SourceError:
    return SourceError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}; expected {wanted}")
