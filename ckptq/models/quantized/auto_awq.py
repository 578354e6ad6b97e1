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
    want_shapes,
)
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight channels a word has at nibble 0, 1, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(HeldWhole):
    """A Linear in AutoAWQ's layout."""

    @property
    def quantum(self) -> int:
        return len(ORDER)

    def cut(self, held: Held, start: int, stop: int) -> dict[str, Tensor]:
        import torch

        from ckptq.quantize.packing import pack_nibbles

        low, high = start // len(ORDER), stop // len(ORDER)
        code_RC = _channels(held["qweight"][:, low:high])
        parts = {
            "weight_packed": pack_nibbles(code_RC).view(torch.int32),
            "weight_scale": rows_of_scales(held["scales"], start, stop),
        }
        if "qzeros" not in held:
            return parts
        zero_GR = _channels(held["qzeros"][:, low:high]).t().contiguous()
        zero_WG = pack_nibbles(zero_GR).view(torch.int32).t().contiguous()
        if self.scheme.symmetric:
            check_symmetric(self.tensors["qzeros"], zero_WG, BITS, stop - start)
            return parts
        return {**parts, "weight_zero_point": zero_WG}


def _channels(word_CW: Tensor) -> Tensor:
    """[C, W] words of eight channels -> their nibbles [8 * W, C], uint8."""
    import torch

    word_WC = word_CW.t().contiguous()
    W, C = word_WC.shape
    code_W8C = torch.empty((W, len(ORDER), C), dtype=torch.uint8, device=word_WC.device)
    for nibble, channel in enumerate(ORDER):
        code_W8C[:, channel] = word_WC >> (BITS * nibble) & 15
    return code_W8C.flatten(0, 1)


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
    R, G = W * len(ORDER), scales.spec.shape[0] if len(scales.spec.shape) == 2 else 0
    if not (R and C and G) or C % G:
        raise SourceError(
            f"{code.file}: {code.name} {code.spec} and {scales.name} {scales.spec} are not a "
            "matrix of 4-bit codes in groups of columns"
        )
    want_shapes(tensors, {"qweight": (C, W), "qzeros": (G, W), "scales": (G, R)})
    return R, C, G
