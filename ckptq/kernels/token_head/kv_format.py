"""How keys and values are held in a KV cache: bits, packing, rotation.

One scale per token and head is computed when the token is written; INT4 has a zero point beside it.

A head is rotated in blocks of the largest power of two that divides its size (128 -> 128, 96 -> 32,
80 -> 16), so that no format stores more codes than the head has values. A larger, padded rotation
would spread outliers further, for up to 60 % more bytes.
"""

from dataclasses import dataclass
from enum import StrEnum


class Rotation(StrEnum):
    """What is done to a head's values before they are quantized, and undone after."""

    NONE = "none"
    HADAMARD = "hadamard"
    """An orthonormal Walsh-Hadamard transform."""
    SIGNED = "signed-hadamard"
    """Fixed pseudo-random signs first, so that values that are all alike spread too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVFormat:
    """A way to hold one head of one token."""

    name: str
    bits: int
    rotation: Rotation = Rotation.NONE
    asymmetric: bool = False

    @property
    def per_byte(self) -> int:
        """Codes in a byte; code j of a byte at its bits j * `bits` and up."""
        return 8 // self.bits

    def width(self, head_dim: int) -> int:
        """Bytes of a head. Raises ValueError where packed codes do not fill halfwords."""
        if self.per_byte > 1 and head_dim % 8:
            raise ValueError(f"{self.name} wants a head size in eights, got {head_dim}")
        return head_dim // self.per_byte


INT8 = KVFormat(name="int8_per_token_head", bits=8)
FP8 = KVFormat(name="fp8_per_token_head", bits=8)
INT4 = KVFormat(name="int4_per_token_head", bits=4, rotation=Rotation.SIGNED, asymmetric=True)
INT2 = KVFormat(name="int2_per_token_head", bits=2, rotation=Rotation.HADAMARD)
FORMATS = {f.name: f for f in (INT8, FP8, INT4, INT2)}

CENTROIDS = (0.4528, 1.510)
"""Magnitudes of the four levels of INT2 in units of sigma: Lloyd-Max for a Gaussian."""
THRESHOLD = (CENTROIDS[0] + CENTROIDS[1]) / 2
"""Where the nearer level changes, in units of sigma."""
EPS = 1.1920928955078125e-07
"""No scale is smaller: an all-zero head still divides and multiplies."""
LEAST_STEP = 2.0**-40
"""No step of a rotated head is smaller, before its power of two is undone."""
LEAST_HALF = 2.0**-15
"""The same where values are multiplied in fp16, which has no inverse of much less."""


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides the head size: 128 -> 128, 96 -> 32, 80 -> 16."""
    return head_dim & -head_dim


def slice_size(head_dim: int) -> int:
    """Neighbouring values that a thread holds at a time: 8, or 16 of heads larger than 128."""
    return min(rotation_block(head_dim), 8 if head_dim <= 128 else 16)


def chunk_size(head_dim: int) -> int:
    """Values of a head that are rotated by one matrix product: 16 to 128.

    A head is padded with zeros to whole chunks.
    """
    return max(16, min(rotation_block(head_dim), 128))


def load_size(head_dim: int) -> int:
    """Values of a head that are loaded at a time: 16 or 32. Sums of squares go over these first."""
    return min(chunk_size(head_dim), 32)
