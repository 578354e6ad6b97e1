"""Experts in MXFP4 as OpenAI ships gpt-oss (`quant_method: mxfp4`): all of a layer in one tensor.

`<name>_blocks` U8 [E, O, G, 16] holds pairs of E2M1 codes, `<name>_scales` [E, O, G] the exponent
of 32 of them plus 127. Unquantized, transformers and vLLM know the tensor as `<name>` [E, C, O].

Shape letters: E experts, O outputs, C inputs, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, read_range
from ckptq.errors import SourceError
from ckptq.models.quantized.encoded_weight import Encoded, Take
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import TensorSpec, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"

MXFP4 = WeightScheme(
    format="mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
    scale_dtype="uint8",
)  # fmt: skip

CHUNK = 256
"""Outputs that are decoded at a time, so that little but the result is in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedMxfp4(Encoded):
    """All experts of a layer. As a matrix it has rows [E * C] and columns [O], and is read by whole
    experts."""

    fused: ClassVar[bool] = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, O, C)."""
        E, O, G = self.tensors["weight_scale"].spec.shape
        return E, O, 32 * G

    @property
    def written(self) -> TensorSpec:
        E, O, C = self.sizes
        return TensorSpec(self.spec.dtype, (E, C, O))

    @property
    def plain(self) -> str:
        return self.name

    @property
    def quantum(self) -> int:
        return self.sizes[2]

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        first, last = start // self.quantum, -(-stop // self.quantum)
        return {n: read_range(files, t, first, last) for n, t in self.tensors.items()}

    def whole(self, take: Take) -> dict[str, Tensor]:
        return {local: take(tensor) for local, tensor in self.tensors.items()}

    def decoded(self, parts: Mapping[str, Tensor], rows: int) -> Tensor:
        """[rows, O], of rows / C experts."""
        import torch

        code, scale = parts["weight_packed"], parts["weight_scale"]
        _, O, C = self.sizes
        dtype = torch_dtype(self.spec.dtype)
        made = torch.empty((rows // C, C, O), dtype=dtype, device=code.device)
        for expert in range(len(made)):
            for first in range(0, O, CHUNK):
                held = {
                    "weight_packed": code[expert, first : first + CHUNK].flatten(1),
                    "weight_scale": scale[expert, first : first + CHUNK],
                }
                made[expert, :, first : first + CHUNK] = _values(held, C, dtype).t()
        return made.view(rows, O)


def _values(held: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    from ckptq.quantize.dispatch import dequantize

    return dequantize(held, MXFP4, (len(held["weight_packed"]), columns), dtype)


def read_mxfp4(ckpt: Checkpoint, dtype: str) -> Mapping[str, FusedMxfp4]:
    """Name of the unquantized tensor -> its experts. SourceError for blocks and scales that do not
    fit together."""
    found = {}
    for name, blocks, scales in _pairs(ckpt):
        if len(blocks.spec.shape) != 4 or blocks.spec.dtype != "U8" or blocks.spec.shape[3] != 16:
            raise _odd(blocks, "U8 [E, O, G, 16]")
        E, O, G, _ = blocks.spec.shape
        if scales.spec != TensorSpec("U8", (E, O, G)):
            raise _odd(scales, f"U8 [{E}, {O}, {G}]")
        tensors = {"weight_packed": blocks, "weight_scale": scales}
        spec = TensorSpec(dtype, (E * G * 32, O))
        found[name] = FusedMxfp4(name=name, tensors=tensors, scheme=MXFP4, spec=spec)
    return found


def _pairs(ckpt: Checkpoint) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    for name, blocks in ckpt.tensors.items():
        base = name.removesuffix(BLOCKS)
        if base == name:
            continue
        scales = ckpt.tensors.get(base + SCALES)
        if scales is None:
            raise SourceError(f"{blocks.file}: found {name} but no {base}{SCALES}")
        yield base, blocks, scales


def _odd(tensor: StoredTensor, wanted: str) -> SourceError:
    return SourceError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}; expected {wanted}")
