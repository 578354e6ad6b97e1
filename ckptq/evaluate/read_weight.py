"""One Linear's weight, read whole, however the checkpoint stores it.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptq.checkpoint.read import Files
from ckptq.checkpoint.view import read_rows, read_slab, window
from ckptq.models.encoded import Encoded, decode_rows
from ckptq.models.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor


def read_weight(files: Files, weight: Weight) -> Tensor:
    """[R, C] in new memory, dequantized if it is stored quantized."""
    rows = weight.spec.shape[0]
    if isinstance(weight, Encoded):
        return decode_rows(files, weight, 0, rows)
    if weight.streams:
        return read_rows(files, weight, 0, rows)
    return window(read_slab(files, weight), weight).contiguous()
