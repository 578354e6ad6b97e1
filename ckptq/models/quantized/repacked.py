"""A quantized weight's codes and scales as compressed-tensors stores them, number for number.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.models.quantized.as_nvfp4 import AsNvfp4
from ckptq.models.quantized.encoded_weight import Encoded
from ckptq.quantize.scales import mx_scale
from ckptq.quantize.stored import quantum_specs, stored
from ckptq.spec import FLOATS, TensorSpec

SCALES = ("weight_scale", "scales")

ONE = TensorSpec("F32", (1,))


def repacked_specs(weight: Encoded) -> dict[str, TensorSpec]:
    """Local names and specs of what is written for it. Scales keep their dtype; exponents become
    the float32 that they stand for, unless the format has exponents."""
    specs = stored(weight.spec, weight.scheme)
    if weight.scheme.scale_dtype is None:
        dtype = _scale(weight).spec.dtype
        specs["weight_scale"] = TensorSpec(
            dtype if dtype in FLOATS else "F32", specs["weight_scale"].shape
        )
    if weight.input_scale is not None:
        specs[_input_name(weight)] = ONE
    return specs


def verbatim(weight: Encoded) -> dict[str, StoredTensor]:
    """The tensors that are written byte for byte as they are stored, by local name."""
    if type(weight) is not Encoded:
        return {}  # its parts are not what is stored
    specs = repacked_specs(weight)
    return {local: t for local, t in weight.tensors.items() if specs.get(local) == t.spec}


def remade(weight: Encoded) -> Encoded:
    """The same without those."""
    copied = verbatim(weight)
    rest = {local: tensor for local, tensor in weight.tensors.items() if local not in copied}
    return replace(weight, tensors=rest) if copied else weight


def repacked_rows(weight: Encoded, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored for some rows, from their parts."""
    lone = repacked_lone(weight)
    made = {n: t for n, t in parts.items() if n in repacked_specs(weight) and n not in lone}
    if "weight_scale" in made:
        made["weight_scale"] = _as_stored(weight, made["weight_scale"])
    return made


def repacked_lone(weight: Encoded) -> tuple[str, ...]:
    """Local names of the tensors that are made, and belong to no row."""
    shapes, made = quantum_specs(weight.scheme, weight.shape[1]), repacked_specs(weight)
    lone = (n for n in made if n not in shapes or len(shapes[n].shape) == 1)
    return tuple(name for name in lone if name not in verbatim(weight))


def repacked_constants(weight: Encoded, files: Files) -> dict[str, Tensor]:
    """The tensors that belong to no row: one scale, global scales, the shape."""
    made: dict[str, Tensor] = {}
    for local in repacked_lone(weight):
        if local == "weight_shape":
            made[local] = torch.tensor(weight.shape)
        elif isinstance(weight, AsNvfp4):
            made |= weight.lone()
        elif local == "weight_global_scale":
            made[local] = inverse(read_tensor(weight.tensors["weight_scale_2"], files))
        elif local == "weight_scale":
            made[local] = _as_stored(weight, read_tensor(_scale(weight), files)).reshape(1)
        else:
            assert weight.input_scale is not None
            scale = read_tensor(weight.input_scale, files).float().reshape(1)
            made[local] = inverse(scale) if local == "input_global_scale" else scale
    return made


def inverse(scale: Tensor) -> Tensor:
    """[1] float32 whose own inverse is `scale`, which engines take; else the nearest.

    Above the square root of 2, times a power of two, some numbers are no float32's inverse.
    """
    wanted = scale.float().reshape(1)
    first = 1 / wanted
    nearby = torch.stack(
        (first, torch.nextafter(first, first * 2), torch.nextafter(first, first / 2))
    )
    return nearby[(1 / nearby - wanted).abs().argmin()]


def _as_stored(weight: Encoded, scale: Tensor) -> Tensor:
    if weight.scheme.scale_dtype is None and scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return mx_scale(scale.view(torch.uint8)).float()
    return scale


def _scale(weight: Encoded) -> StoredTensor:
    return next(weight.tensors[name] for name in SCALES if name in weight.tensors)


def _input_name(weight: Encoded) -> str:
    return "input_global_scale" if weight.scheme.strategy == "tensor_group" else "input_scale"
