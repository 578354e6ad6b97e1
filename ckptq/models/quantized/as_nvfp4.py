"""MXFP4 as NVFP4: the same codes under E4M3 scales, exact where these reach the exponents.

A group of 32 becomes two of 16. The largest exponent of a fused set becomes E4M3's 2^8 under a
global scale that is a power of two; exponents down to 17 below it are E4M3 numbers too. Codes of
the groups below those are rounded to the least scale, 2^-9.

Shape letters: R rows, C columns, G groups of 32 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.errors import SourceError
from ckptq.models.quantized.encoded_weight import Encoded
from ckptq.models.quantized.modelopt import NVFP4
from ckptq.models.quantized.mxfp4_blocks import MXFP4
from ckptq.spec import E8M0_NAN

if TYPE_CHECKING:
    from torch import Tensor

MOST, LEAST = 8, -9
"""Exponents of E4M3's largest and least powers of two."""

BIAS = 127


@dataclass(frozen=True, kw_only=True)
class AsNvfp4(Encoded):
    """An MXFP4 weight that is stored as NVFP4."""

    together: tuple[StoredTensor, ...] = field(hash=False)
    """The scales of its fused set, which shares a global scale."""

    @cached_property
    def shift(self) -> int:
        """Exponent of the scale by which all of E4M3's are multiplied."""
        largest = {scales: int(_exponents(read_tensor(scales)).max()) for scales in self.together}
        for scales, exponent in largest.items():
            if exponent == E8M0_NAN:
                raise SourceError(
                    f"{scales.file}: tensor {scales.name!r}: holds the E8M0 code {E8M0_NAN}, NaN; "
                    f"expected exponents up to {E8M0_NAN - 1}"
                )
        return max(largest.values()) - BIAS - MOST

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        return self._cast(self.inner.read(files, start, stop))

    @property
    def inner(self) -> Encoded:
        return Encoded(name=self.name, tensors=self.tensors, scheme=MXFP4, spec=self.spec)

    def lone(self) -> dict[str, Tensor]:
        """The global scale, a divisor."""
        import torch

        return {"weight_global_scale": torch.tensor([2.0**-self.shift])}

    def _cast(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        exponent_RG = _exponents(parts["weight_scale"]).int() - BIAS - self.shift
        low_RG = exponent_RG < LEAST
        code = parts["weight_packed"]
        if low_RG.any():
            code = _rounded(code, exponent_RG, low_RG)
        scale_RG = torch.exp2(exponent_RG.clamp(min=LEAST).float()).to(torch.float8_e4m3fn)
        return {"weight_packed": code, "weight_scale": scale_RG.repeat_interleave(2, dim=1)}


def as_nvfp4(weight: Encoded, together: tuple[Encoded, ...]) -> AsNvfp4:
    """`together` are the members of its fused set, itself included."""
    return AsNvfp4(
        name=weight.name,
        tensors=weight.tensors,
        scheme=NVFP4,
        spec=weight.spec,
        together=tuple(member.tensors["weight_scale"] for member in together),
    )


def _exponents(scale: Tensor) -> Tensor:
    import torch

    return scale.view(torch.uint8)


def _rounded(packed_RB: Tensor, exponent_RG: Tensor, low_RG: Tensor) -> Tensor:
    """The codes with those of low groups rounded to the least scale."""
    import torch

    from ckptq.quantize.codes import decode_e2m1, e2m1_codes
    from ckptq.quantize.packing import pack_nibbles, unpack_nibbles
    from ckptq.quantize.scratch import Scratch

    code_RGN = unpack_nibbles(packed_RB).unflatten(1, (-1, 32))
    step = torch.exp2((exponent_RG[low_RG] - LEAST).float())[:, None]
    values = decode_e2m1(packed_RB.unflatten(1, (-1, 16))[low_RG]) * step
    code_RGN[low_RG] = e2m1_codes(values, Scratch(values.device)).view(torch.uint8)
    return pack_nibbles(code_RGN.flatten(1))
