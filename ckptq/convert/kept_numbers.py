"""Codes and scales that are written as they are stored are numbers: what is none is refused.

Weights that are quantized show it by themselves (`tiles.NonFinite`); these only pass through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.errors import SourceError
from ckptq.plan.unit import Kept
from ckptq.spec import E8M0_NAN

if TYPE_CHECKING:
    from torch import Tensor


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
    least = 0.0 if numbers.dtype == torch.float8_e4m3fn else torch.finfo(x.dtype).smallest_normal
    return ~x.isfinite() | ((x.abs() if kept == "signed scale" else x) < least)
