"""Packed bytes worked out by hand, and the way back for every width and length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptq.quantize.packing import pack_nibbles, pack_words, unpack_nibbles, unpack_words


def test_golden_nibbles() -> None:
    code = torch.tensor([[0x0, 0x8, 0x1, 0xF, 0x2, 0x2, 0x6, 0xF]], dtype=torch.uint8)
    assert pack_nibbles(code).tolist() == [[0x80, 0xF1, 0x22, 0xF6]]


@pytest.mark.parametrize(
    ("num_bits", "codes", "words"),
    [
        (4, [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1], [0x76543210, 0x98]),
        (8, [-128, -127, 0, 127, 5], [0xFF800100 - 2**32, 0x85]),
        # 11 codes of 3 bits are 33 bits: the last one lies across the border
        (3, [3] * 11, [0xFFFFFFFF - 2**32, 0x1]),
        (2, [-2, -1, 0, 1] * 4 + [1], [0xE4E4E4E4 - 2**32, 0x3]),
    ],
)
def test_golden_words(num_bits: int, codes: list[int], words: list[int]) -> None:
    packed = pack_words(torch.tensor([codes], dtype=torch.int8), num_bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words]


@given(num_bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 70))
def test_packed_words_come_back(num_bits: int, rows: int, columns: int) -> None:
    least = -(2 ** (num_bits - 1))
    code = torch.randint(least, -least, (rows, columns)).to(torch.int8)
    packed = pack_words(code, num_bits)
    assert packed.shape == (rows, -(-columns * num_bits // 32))
    assert torch.equal(unpack_words(packed, num_bits, columns), code)


def test_packed_nibbles_come_back() -> None:
    byte = torch.arange(256).to(torch.uint8).view(16, 16)
    assert torch.equal(pack_nibbles(unpack_nibbles(byte)), byte)
