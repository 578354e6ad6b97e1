"""Codes and scales that are written as they are stored are numbers: what is none is refused.

Weights that are quantized show it by themselves (`tiles.NonFinite`); these only pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from ckptq.checkpoint.header import StoredTensor
from ckptq.errors import SourceError
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import E8M0_NAN, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


Kept = Literal["codes", "scale", "signed scale"]
"""What a stored tensor is that is written as it is."""


def kept_as(local: str, spec: TensorSpec, scheme: WeightScheme | None) -> Kept | None:
    """Of which numbers a stored tensor of this local name is, if any can be told to be none;
    `scheme` is that of its Linear, None for the scales of a cache."""
    if "scale" in local:
        signed = scheme is not None and scheme.type == "int" and scheme.symmetric
        return "signed scale" if signed and not local.startswith("input") else "scale"
    return "codes" if spec.dtype == "F8_E4M3" and scheme is not None else None


def looked_at(copies: Mapping[str, StoredTensor], scheme: WeightScheme | None) -> dict[str, Kept]:
    """`Unit.kept` of a Linear's copies."""
    locals_ = {name: name.rpartition(".")[2] for name in copies}
    found = {n: kept_as(local, copies[n].spec, scheme) for n, local in locals_.items()}
    return {name: kept for name, kept in found.items() if kept is not None}


def refuse_wrong(kept: Kept, numbers: Tensor, stored: StoredTensor, first: int = 0) -> None:
    """SourceError for NaN among FP8 codes, and for scales that are no positive finite numbers;
    signed ones may be negative (AutoRound), FP8 ones zero, as those of groups that vanish beside
    the others (NVFP4). `first` is the place of the numbers in the tensor."""
    wrong = _wrong(kept, numbers)
    if not bool(wrong.any()):
        return
    bad = wrong.reshape(-1).nonzero()
    index = int(bad[0])
    value = numbers.reshape(-1)[index].float().item() if numbers.is_floating_point() else "NaN"
    wanted = {"codes": "no NaN", "scale": "positive finite scales"}.get(kept, "finite scales")
    raise SourceError(
        f"{stored.file}: tensor {stored.name!r}: {value} at element {first + index}, {len(bad)} "
        f"such in {numbers.numel()}; expected {wanted}"
    )


def _wrong(kept: Kept, numbers: Tensor) -> Tensor:
    import torch

    if numbers.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return numbers.view(torch.uint8) == E8M0_NAN
    if kept == "codes":
        return (numbers.view(torch.uint8) & 0x7F) == 0x7F
    x = numbers.float()
    if kept == "signed scale":
        x = x.abs()
    return ~x.isfinite() | ((x < 0) if numbers.dtype == torch.float8_e4m3fn else (x <= 0))
