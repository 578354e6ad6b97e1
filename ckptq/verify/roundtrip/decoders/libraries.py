"""Rows of a stored weight as compressed-tensors and transformers decode them.

Uses nothing of ckptq but the tensors' locations: safetensors reads, compressed-tensors parses
config.json's groups, and the libraries decode.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.view import View
from ckptq.models.encoded import Encoded
from ckptq.models.weight import Weight
from ckptq.verify.roundtrip.decoders.makers import DECODERS, decode_foreign, opened
from ckptq.verify.subject import CODES

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

COMPRESSED = "compressed-tensors"

NOT_WEIGHTS = ("weight_shape", "input_scale", "input_zero_point", "input_global_scale")


def ct_scheme(ckpt: Checkpoint, group: str) -> QuantizationScheme:
    """A config group as compressed-tensors reads it, with the format that it falls back to."""
    from compressed_tensors.quantization import QuantizationScheme

    config = ckpt.quantization_config
    assert config is not None
    entry = config["config_groups"][group]
    scheme: Any = QuantizationScheme.model_validate(entry)
    return scheme.model_copy(update={"format": entry.get("format") or config.get("format")})


def decode_compressed(
    tensors: Mapping[str, StoredTensor],
    scheme: QuantizationScheme,
    shape: tuple[int, int],
    start: int,
    stop: int,
) -> Tensor:
    """Rows start..stop [stop - start, C] by compressed-tensors, in float32; `start` is a multiple
    of what the scheme packs or blocks along the rows, 32 or a block's height."""
    from compressed_tensors.compressors import BaseCompressor

    format = str(getattr(scheme.format, "value", scheme.format))
    held = {
        local: _part(tensor, _share(local, scheme, format), start, stop)
        for local, tensor in tensors.items()
        if local not in NOT_WEIGHTS
    }
    if format == "pack-quantized":
        held["weight_shape"] = torch.tensor([stop - start, shape[1]])
    compressor: Any = BaseCompressor.get_value_from_registry(format)
    weight: Tensor = compressor.decompress(held, scheme)["weight"]
    return weight.float()


def _share(local: str, scheme: QuantizationScheme, format: str) -> Fraction | None:
    """Rows of a stored tensor for one of the weight's; None where it has none."""
    args = scheme.weights
    assert args is not None
    if local == "weight_global_scale" or (args.strategy == "tensor" and local not in CODES):
        return None
    if args.strategy == "block" and local not in CODES:
        return Fraction(1, (args.block_structure or [1])[0])
    if local == "weight_zero_point" and format == "pack-quantized":
        return Fraction(args.num_bits, 32)
    return Fraction(1)


def source_library(ckpt: Checkpoint | None) -> str:
    """Who decodes the weights of a source."""
    method = str(((ckpt.quantization_config if ckpt else None) or {}).get("quant_method"))
    if method in DECODERS:
        return DECODERS[method][0]
    return COMPRESSED if method == COMPRESSED else "transformers"


def decode_source(ckpt: Checkpoint, weight: Weight, start: int, stop: int) -> Tensor | None:
    """Rows start..stop of a source weight, in float32; None for one that no library decodes."""
    if isinstance(weight, View):
        return _window(weight)[start:stop].float()
    method = (ckpt.quantization_config or {}).get("quant_method")
    if method == "fp8" and _has_blocks(ckpt, weight):
        return _fp8(ckpt, weight, start, stop)
    if method != COMPRESSED:
        return decode_foreign(ckpt, weight.tensors, start, stop)
    group = _group_name(ckpt, weight)
    if group is None:
        return None
    R, C = weight.spec.shape
    return decode_compressed(weight.tensors, ct_scheme(ckpt, group), (R, C), start, stop)


def _has_blocks(ckpt: Checkpoint, weight: Encoded) -> bool:
    """Or one scale: what transformers reads of FP8."""
    block = (ckpt.quantization_config or {}).get("weight_block_size")
    one = weight.tensors["weight_scale"].spec.numel == 1
    return "weight" in weight.tensors and (bool(block) or one)


def _window(view: View) -> Tensor:
    """What a view is of its tensor, said with slices."""
    with opened(view.stored.file) as file:
        stored = file.get_slice(view.stored.name)
        matrix: Tensor = stored[:] if view.index is None else stored[view.index]
    matrix = matrix[_slice(view.rows), :][:, _slice(view.columns)]
    return matrix.t() if view.transposed else matrix


def _slice(span: range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop, span.step)


def _fp8(ckpt: Checkpoint, weight: Encoded, start: int, stop: int) -> Tensor:
    """transformers' own: codes in blocks, scales in whatever dtype the file has."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    block = (ckpt.quantization_config or {}).get("weight_block_size")
    codes = _part(weight.tensors["weight"], Fraction(1), start, stop)
    share = Fraction(1, block[0]) if block else None
    scale = _part(weight.tensors["weight_scale"], share, start, stop)
    rows, columns = codes.shape
    high, wide = block or (1, 1)
    filled = pad(codes.view(torch.uint8), (0, -columns % wide, 0, -rows % high))
    # `convert` around it names its keys otherwise in 5.24
    dequantize: Any = Fp8Dequantize(None)._dequantize_one
    whole: Tensor = dequantize(filled.view(codes.dtype), scale)
    return whole.float()[:rows, :columns]


def _group_name(ckpt: Checkpoint, weight: Encoded) -> str | None:
    """The first group whose scheme compressed-tensors finds for a Linear of this name."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_targets

    config = QuantizationConfig.model_validate(dict(ckpt.quantization_config or {}))
    linear = torch.nn.Linear(1, 1, device="meta")
    for name, group in config.config_groups.items():
        if group.weights is not None and match_targets(weight.name, linear, group.targets):
            return name
    return None


def _part(tensor: StoredTensor, share: Fraction | None, start: int, stop: int) -> Tensor:
    """What belongs to rows start..stop of the weight; all of it without a share."""
    with opened(tensor.file) as file:
        if share is None or tensor.spec.numel == 1:
            whole: Tensor = file.get_tensor(tensor.name)
            return whole
        rows: Tensor = file.get_slice(tensor.name)[int(start * share) : math.ceil(stop * share)]
        return rows
