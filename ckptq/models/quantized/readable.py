"""Checks that the stored tensors of a quantized weight can be read. Headers only.

A scale in an unexpected dtype may be an exponent or a code: multiplying by it would give wrong
weights without a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptq.errors import PlanError, SourceError
from ckptq.quantize.stored import stored
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import FLOATS, TensorSpec

if TYPE_CHECKING:
    from ckptq.checkpoint.header import StoredTensor
    from ckptq.recipes.declared import Declared

SCALE_FORMATS = (None, "float", "ue8m0")
"""What transformers knows as `scale_fmt`; scales in U8 and F8_E8M0 are exponents under each."""


def check_readable(
    module: str,
    tensors: Mapping[str, StoredTensor],
    scheme: WeightScheme,
    spec: TensorSpec,
    fp8: Declared | None = None,
) -> None:
    """SourceError for a stored tensor with an unexpected dtype or shape.

    `tensors` are those of one module by local name, `spec` is the weight that they stand for.
    `fp8` is what the config of an FP8 source declares that is not compressed-tensors'.
    """
    try:
        wanted = stored(spec, scheme)
    except PlanError as error:
        code = next(iter(tensors.values()))
        raise SourceError(f"{code.file}: the tensors of {module} do not match: {error}") from error
    for local, tensor in tensors.items():
        if local not in wanted:
            raise _odd(tensor, scheme, "no such tensor")
        dtypes = _dtypes(local, wanted[local], scheme, foreign=fp8 is not None)
        if tensor.spec.dtype not in dtypes:
            raise _odd(tensor, scheme, f"{' or '.join(dtypes)} {_shape(wanted[local])}")
        if not _fits(tensor.spec, wanted[local]):
            raise _odd(tensor, scheme, _shape(wanted[local]))
        if local == "weight_scale" and tensor.spec.dtype not in FLOATS and fp8 is not None:
            _check_format(tensor, fp8.scale_format)
    missing = [local for local in wanted if local not in tensors and local != "weight_shape"]
    if missing:
        held = next(iter(tensors.values()))
        raise SourceError(f"{held.file}: {module}.{missing[0]} is missing; {scheme} needs it")


def refuse_bare_codes(tensors: Iterable[StoredTensor]) -> None:
    """SourceError for a tensor in FP8 among those that hold no quantized matrix with its scales.

    FP8 tensors are codes; cast to the model's dtype they would pass for weights (fused 3-D experts,
    an output head without a scale).
    """
    for tensor in tensors:
        if tensor.spec.dtype.startswith("F8_"):
            raise unread(tensor)


def unread(tensor: StoredTensor) -> SourceError:
    """For codes that no scheme in config.json describes."""
    return SourceError(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}, and config.json has no supported "
        f"scheme for it; expected one of {', '.join(FLOATS)}, or a matrix of codes with scales"
    )


def _dtypes(
    local: str, wanted: TensorSpec, scheme: WeightScheme, *, foreign: bool
) -> Sequence[str]:
    """From which dtypes a tensor can be read. F8_E8M0 says of itself that it is an exponent; a U8
    is one in MX formats, and in FP8 sources, where transformers reads it so."""
    if local == "weight_scale":
        if scheme.scale_dtype == "uint8":
            return ("U8", "F8_E8M0")
        if scheme.scale_dtype is None:
            return (*FLOATS, "F8_E8M0", "U8") if foreign else (*FLOATS, "F8_E8M0")
    if local == "weight_global_scale":
        return FLOATS
    if local == "weight_shape":
        return ("I64", "I32")
    return (wanted.dtype,)


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    return found.shape == wanted.shape or found.numel == wanted.numel == 1


def _check_format(tensor: StoredTensor, scale_format: object) -> None:
    if scale_format not in SCALE_FORMATS:
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}, but config.json has "
            f"scale_fmt {scale_format!r}; expected 'ue8m0', or scales in {', '.join(FLOATS)}"
        )


def _odd(tensor: StoredTensor, scheme: WeightScheme, wanted: str) -> SourceError:
    return SourceError(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}; expected {wanted} for {scheme}"
    )


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"
