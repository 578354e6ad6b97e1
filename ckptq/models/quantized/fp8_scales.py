"""FP8 with scales beside it, as DeepSeek, Qwen, Mistral and Meta ship it; DeepSeek's FP4 experts.

`quant_method: fp8` has `weight_scale_inv`, `weight_scale` or `scale`, all multipliers: one for the
tensor, for each row, or for each block of `weight_block_size`. Experts of DeepSeek-V4 and
Kimi-K3 are pairs of E2M1 codes in I8 [R, C / 2] with an exponent for 32 columns. `fbgemm_fp8` has
a `weight_scale` for each row.

Shape letters: R rows (out), C columns (in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import SourceError
from ckptq.models.quantized.encoded_weight import Encoded
from ckptq.models.quantized.modelopt import CHANNEL
from ckptq.models.quantized.mxfp4_blocks import MXFP4
from ckptq.models.quantized.readable import check_readable
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.declared import Declared, declared
from ckptq.spec import TensorSpec

SCALES = ("weight_scale_inv", "weight_scale", "scale")
INPUT_SCALES = ("input_scale", "activation_scale")
PAIRS = ("I8", "U8")
"""Dtypes of pairs of FP4 codes."""


def read_fp8(ckpt: Checkpoint, dtype: str) -> dict[str, Encoded]:
    """Module name -> its quantized weight; `dtype` is the model's.

    SourceError for tensors that do not fit together.
    """
    said = declared(ckpt)
    found = {}
    for module, weight, scale in _pairs(ckpt):
        scheme, tensors = _scheme(said, weight, scale)
        columns = weight.spec.shape[1] * (2 if scheme is MXFP4 else 1)
        spec = TensorSpec(dtype, (weight.spec.shape[0], columns))
        check_readable(module, tensors, scheme, spec, said)
        inputs = (ckpt.tensors.get(f"{module}.{local}") for local in INPUT_SCALES)
        found[module] = Encoded(
            name=module,
            tensors=tensors,
            scheme=scheme,
            spec=spec,
            input_scale=next((scale for scale in inputs if scale is not None), None),
        )
    return found


def _pairs(ckpt: Checkpoint) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """(module, weight, scale). A `scale` is one only where the weight is no number."""
    for name, scale in ckpt.tensors.items():
        module, _, local = name.rpartition(".")
        if local not in SCALES:
            continue
        weight = ckpt.tensors.get(f"{module}.weight")
        if local == "scale" and (weight is None or weight.spec.dtype not in ("F8_E4M3", *PAIRS)):
            continue
        if weight is None:
            raise SourceError(f"{ckpt.path}: found {name} but no {module}.weight")
        if len(weight.spec.shape) != 2:
            raise SourceError(f"{weight.file}: {weight.name} is {weight.spec}, expected a matrix")
        yield module, weight, scale


def _scheme(
    said: Declared, weight: StoredTensor, scale: StoredTensor
) -> tuple[WeightScheme, dict[str, StoredTensor]]:
    """The scheme, and the tensors by compressed-tensors' names."""
    if weight.spec.dtype in PAIRS:
        codes = replace(weight, spec=TensorSpec("U8", weight.spec.shape))
        return MXFP4, {"weight_packed": codes, "weight_scale": scale}
    blocks = said.linears[0].weight_scheme(stored=True) if said.is_fp8 else CHANNEL
    if blocks.strategy != "block" and scale.spec.numel != 1:
        return CHANNEL, {"weight": weight, "weight_scale": _rows(weight, scale)}
    return blocks, {"weight": weight, "weight_scale": scale}


def _rows(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    """A scale for each row, as [R, 1]."""
    R = weight.spec.shape[0]
    if scale.spec.shape not in ((R,), (R, 1)):
        raise SourceError(
            f"{scale.file}: tensor {scale.name!r} is {scale.spec}, but config.json has no "
            f"weight_block_size; expected that field, one scale for the tensor, or [{R}, 1]"
        )
    return replace(scale, spec=TensorSpec(scale.spec.dtype, (R, 1)))
