"""A tensor's dtype and shape without its bytes, in safetensors' vocabulary.

Imports no torch: headers, plans and `--help` need none. `torch_dtype` looks the name up on demand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors' name: (torch's name, bytes per element)
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of unquantized weights."""

E8M0_NAN = 255
"""The one byte of an exponent (MXFP) that is no number."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of one stored tensor. Example: `TensorSpec("BF16", (4096, 4096))`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors name: "BF16" -> torch.bfloat16."""
    import torch

    dtype = getattr(torch, DTYPES[name][0])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype: torch.bfloat16 -> "BF16"."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, (torch_name, _) in DTYPES.items() if torch_name == short)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor in memory."""
    return TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
