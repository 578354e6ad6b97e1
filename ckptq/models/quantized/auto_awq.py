"""Linears quantized by AutoAWQ or AutoRound (`quant_method: awq`, version "gemm").

`qweight` [C, R / 8] holds eight output channels a word, in an order that suits its kernels, and
`qzeros` [G, R / 8] too; `scales` are [G, R].

Shape letters: R rows (out), C columns (in), G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import SourceError
from ckptq.models.quantized.encoded_weight import Held, HeldWhole
from ckptq.models.quantized.groups import (
    check_symmetric,
    choice,
    group_scheme,
    modules_with_qweight,
    rows_of_scales,
    turned,
    want_shapes,
)
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4

CHANNELS = ((0, 2), (4, 6), (1, 3), (5, 7))
"""Which two of its eight channels each byte of a word holds, the low nibble's first."""

PER_WORD = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(HeldWhole):
    """A Linear in AutoAWQ's layout."""

    @property
    def quantum(self) -> int:
        return PER_WORD

    def cut(self, held: Held, start: int, stop: int) -> dict[str, Tensor]:
        import torch

        low, high = start // PER_WORD, stop // PER_WORD
        parts = {
            "weight_packed": _pairs(held["qweight"][:, low:high]).view(torch.int32),
            "weight_scale": rows_of_scales(held["scales"], start, stop),
        }
        if "qzeros" not in held:
            return parts
        zero_WG = _in_order(held["qzeros"][:, low:high]).t().contiguous()
        if self.scheme.symmetric:
            check_symmetric(self.tensors["qzeros"], zero_WG, BITS, stop - start)
            return parts
        return {**parts, "weight_zero_point": zero_WG}


def _pairs(word_CW: Tensor) -> Tensor:
    """[C, W] words of eight channels -> [8 * W, C / 2] bytes of two columns, the first one low.

    Two columns' bytes are one little-endian int16, whose halves have a nibble each for a channel.
    """
    import torch

    byte_WC4 = turned(word_CW).view(torch.uint8).unflatten(1, (-1, 4))
    W, C, _ = byte_WC4.shape
    made_W8B = torch.empty((W, 8, C // 2), dtype=torch.uint8, device=byte_WC4.device)
    for byte, (first, second) in enumerate(CHANNELS):
        pair_WB = byte_WC4[:, :, byte].contiguous().view(torch.int16)
        made_W8B[:, first] = pair_WB & 15 | pair_WB >> 4 & 0xF0
        made_W8B[:, second] = pair_WB >> 4 & 15 | pair_WB >> 8 & 0xF0
    return made_W8B.flatten(0, 1)


def _in_order(word_GW: Tensor) -> Tensor:
    """Words of eight channels with channel 0 in the lowest nibble, as compressed-tensors has it."""
    import torch

    made_GW = torch.zeros_like(word_GW)
    for byte, channels in enumerate(CHANNELS):
        for half, channel in enumerate(channels):
            nibble_GW = word_GW >> 4 * (2 * byte + half) & 15
            made_GW |= nibble_GW << 4 * channel
    return made_GW


def read_awq(ckpt: Checkpoint, dtype: str) -> Mapping[str, Awq]:
    """Module name -> its quantized weight. PlanError for a layout that is not read, SourceError for
    tensors that do not fit together."""
    choice(ckpt, "version", ("gemm",), "gemm")
    choice(ckpt, "bits", (BITS,), BITS)
    asymmetric = choice(ckpt, "zero_point", (True, False), True)
    found = {}
    wanted = ("qweight", "scales", "qzeros") if asymmetric else ("qweight", "scales")
    for module, tensors in modules_with_qweight(ckpt, wanted, ("qzeros",)):
        R, C, G = _sizes(tensors)
        found[module] = Awq(
            name=module,
            tensors=tensors,
            scheme=group_scheme(BITS, C, G, not asymmetric),
            spec=TensorSpec(dtype, (R, C)),
        )
    return found


def _sizes(tensors: Mapping[str, StoredTensor]) -> tuple[int, int, int]:
    """(R, C, G), from the shapes. SourceError for shapes that do not fit together."""
    code, scales = tensors["qweight"], tensors["scales"]
    C, W = code.spec.shape if len(code.spec.shape) == 2 else (0, 0)
    R, G = W * PER_WORD, scales.spec.shape[0] if len(scales.spec.shape) == 2 else 0
    if not (R and C and G) or C % G or C % PER_WORD:
        raise SourceError(
            f"{code.file}: {code.name} {code.spec} and {scales.name} {scales.spec} are not a "
            "matrix of 4-bit codes in groups of columns"
        )
    want_shapes(tensors, {"qweight": (C, W), "qzeros": (G, W), "scales": (G, R)})
    return R, C, G
