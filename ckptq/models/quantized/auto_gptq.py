"""Linears quantized by AutoGPTQ, GPTQModel, Optimum or AutoRound (`quant_method: gptq`).

`qweight` [C * bits / 32, R] holds a channel's codes as a dense stream of bits, `qzeros`
[G, R * bits / 32] the zero points of a group likewise, `scales` [G, R]. `g_idx` [C] is the group of
each column, in activation order if `desc_act`. The first version of the format stores zero points
less one.

Transposed, the words are compressed-tensors' own.

Shape letters: R rows (out), C columns (in), G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import read_tensor
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
    words_span,
)
from ckptq.quantize.stored import words
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)

VERSIONS = ("gptq", "gptq_v2")
"""`checkpoint_format`: zero points less one, and as they are. Others (marlin, gptq_p, bitblas) are
other layouts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq(HeldWhole):
    """A Linear in AutoGPTQ's layout."""

    less_one: bool
    """Whether zero points are stored less one, as the first version of the format does."""
    in_order: bool
    """Whether config.json says that groups are in the order of their columns."""

    @property
    def quantum(self) -> int:
        """Where a word of zero points begins."""
        return 32 // gcd(32, self.scheme.num_bits)

    def cut(self, held: Held, start: int, stop: int) -> dict[str, Tensor]:
        bits, count = self.scheme.num_bits, stop - start
        parts = {
            "weight_packed": turned(held["qweight"][:, start:stop]),
            "weight_scale": rows_of_scales(held["scales"], start, stop),
        }
        low, high = words_span(start, stop, bits)
        zero_WG = self._zero_points(held["qzeros"][:, low:high].contiguous(), count)
        if self.scheme.symmetric:
            check_symmetric(self.tensors["qzeros"], zero_WG, bits, count)
        else:
            parts["weight_zero_point"] = zero_WG
        if "g_idx" in held and self.group_order(held["g_idx"]):
            parts["weight_g_idx"] = held["g_idx"]
        return parts

    def group_order(self, index_C: Tensor) -> bool:
        """Whether groups are in another order than their columns. SourceError for an index that
        no group has, for groups of unequal size, which no tool makes, and for an order that
        config.json does not declare."""
        import torch

        C, G = self.shape[1], self.tensors["scales"].spec.shape[0]
        plain_C = torch.arange(C, device=index_C.device, dtype=index_C.dtype) // (C // G)
        if torch.equal(index_C, plain_C):
            return False
        stored = self.tensors["g_idx"]
        if self.in_order:
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r} reorders the groups, but config.json says "
                "desc_act false"
            )
        if not 0 <= int(index_C.min()) <= int(index_C.max()) < G:
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r} holds groups {int(index_C.min())} to "
                f"{int(index_C.max())}; expected 0 to {G - 1}"
            )
        count_G = torch.bincount(index_C.long(), minlength=G)
        if (odd_G := count_G != C // G).any():
            group = int(odd_G.nonzero()[0])
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r} puts {int(count_G[group])} columns into "
                f"group {group}; expected {C // G} in each of {G}"
            )
        return True

    def why_not_repacked(self) -> str | None:
        if self.in_order or "g_idx" not in self.tensors:
            return None
        if not self.group_order(read_tensor(self.tensors["g_idx"])):
            return None
        return (
            "its groups are in activation order (desc_act), which vLLM no longer serves in "
            "compressed-tensors' layout; vLLM serves the source as it is, and scheme 'w4a16' "
            "quantizes it anew"
        )

    def _zero_points(self, word_GW: Tensor, count: int) -> Tensor:
        """Packed as compressed-tensors does, [W, G]."""
        if not self.less_one:
            return word_GW.t().contiguous()
        import torch

        from ckptq.quantize.packing import pack_words, unpack_words

        bits = self.scheme.num_bits
        half = 2 ** (bits - 1)
        code_GR = unpack_words(word_GW, bits, count).to(torch.int16) + half + 1
        less_GR = ((code_GR & 2**bits - 1) - half).to(torch.int8)
        return pack_words(less_GR, bits).t().contiguous()


def read_gptq(ckpt: Checkpoint, dtype: str) -> Mapping[str, Gptq]:
    """Module name -> its quantized weight. PlanError for a layout that is not read, SourceError for
    tensors that do not fit together."""
    version = choice(ckpt, "checkpoint_format", VERSIONS, "gptq")
    symmetric = choice(ckpt, "sym", (True, False), True)
    in_order = not choice(ckpt, "desc_act", (True, False), False)
    bits = choice(ckpt, "bits", BITS, None)
    found = {}
    wanted = ("qweight", "qzeros", "scales")
    for module, tensors in modules_with_qweight(ckpt, wanted, ("g_idx",)):
        own, R, C, G = _sizes(tensors, bits)
        if not in_order and "g_idx" not in tensors and G > 1:
            raise SourceError(
                f"{tensors['qweight'].file}: found {module}.qweight but no {module}.g_idx, which "
                "says the groups of its columns where config.json says desc_act true"
            )
        found[module] = Gptq(
            name=module,
            tensors=tensors,
            scheme=group_scheme(own, C, G, bool(symmetric)),
            spec=TensorSpec(dtype, (R, C)),
            less_one=version == "gptq",
            in_order=in_order,
        )
    return found


def _sizes(tensors: Mapping[str, StoredTensor], declared: int) -> tuple[int, int, int, int]:
    """(bits, R, C, G), from the shapes; `declared` bits hold where there is no `g_idx` to count the
    columns. SourceError for shapes that do not fit together.

    A module may have other bits than config.json's: `dynamic` says so by patterns.
    """
    code, scales = tensors["qweight"], tensors["scales"]
    high, R = code.spec.shape if len(code.spec.shape) == 2 else (0, 0)
    C = tensors["g_idx"].spec.numel if "g_idx" in tensors else high * 32 // declared
    G = scales.spec.shape[0] if len(scales.spec.shape) == 2 else 0
    bits = next((b for b in (declared, *BITS) if words(C, b) == high), 0)
    if not (bits and R and G) or C % G:
        raise SourceError(
            f"{code.file}: {code.name} {code.spec} and {scales.name} {scales.spec} are not a "
            f"matrix of {declared}-bit codes in groups of columns"
        )
    zeros = (G, words(R, bits))
    want_shapes(tensors, {"qweight": (high, R), "qzeros": zeros, "scales": (G, R), "g_idx": (C,)})
    return bits, R, C, G
