"""Codes of fewer than eight bits as a dense stream of bits, the first code in the lowest bits.

This is compressed-tensors' layout of `weight_packed`: int32 words of a row (little-endian, so
that they are also bytes in order), codes across word borders where the width does not divide 32,
zero bits behind the last code. Codes here are unsigned bytes.

Shape letters: R rows, C codes in a row, B packed bytes in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(code_RC: Tensor, num_bits: int) -> Tensor:
    """[R, C] uint8 codes -> [R, B] uint8; C must be a multiple of eight.

    Example: 4-bit codes 1, 2, 3, 4, ... are the bytes 0x21, 0x43, ...
    """
    if num_bits == 8:
        return code_RC
    if num_bits == 4:
        # two codes are one little-endian int16: fold the high byte onto the low byte's upper half
        pair_RB = code_RC.view(torch.int16)
        return (pair_RB | pair_RB >> 4).to(torch.uint8)
    shift_8 = torch.arange(8, device=code_RC.device) * num_bits
    word_RW = (code_RC.unflatten(1, (-1, 8)).long() << shift_8).sum(-1, keepdim=True)
    return word_RW.view(torch.uint8)[..., :num_bits].flatten(1)


def unpack_bits(byte_RB: Tensor, num_bits: int) -> Tensor:
    """[R, B] uint8 -> [R, B * 8 / bits] uint8 codes; B must be a multiple of `num_bits`."""
    shift_8 = torch.arange(8, device=byte_RB.device)
    byte_RWb = byte_RB.unflatten(1, (-1, num_bits)).long() << (shift_8[:num_bits] * 8)
    code_RW8 = byte_RWb.sum(-1, keepdim=True) >> (shift_8 * num_bits)
    return (code_RW8 & (2**num_bits - 1)).to(torch.uint8).flatten(1)


def pack_words(code_RC: Tensor, num_bits: int) -> Tensor:
    """[R, C] int8 codes -> [R, ceil(C * bits / 32)] int32, offset to be unsigned: the least is
    0."""
    code_RC = code_RC.view(torch.uint8) + 2 ** (num_bits - 1)
    columns = code_RC.shape[1]
    byte_RB = pack_bits(pad(code_RC, (0, -columns % 32)), num_bits)
    words = -(-columns * num_bits // 32)
    return byte_RB.view(torch.int32)[:, :words].contiguous()


def unpack_words(word_RW: Tensor, num_bits: int, columns: int) -> Tensor:
    """Inverse of `pack_words`: int8 codes [R, columns]."""
    word_RW = pad(word_RW, (0, -word_RW.shape[1] % num_bits)).contiguous()
    code_RC = unpack_bits(word_RW.view(torch.uint8), num_bits)[:, :columns]
    return (code_RC - 2 ** (num_bits - 1)).view(torch.int8)
