"""Codes of fewer than eight bits as a dense stream of bits, the first code in the lowest bits.

That is compressed-tensors' layout of "weight_packed": bytes of two E2M1 codes, or int32 words of
a row of integers (little-endian, so bytes in order), offset so that the least is 0, in which a code
may cross the border of a word, and with zero bits behind the last code.

Shape letters: R rows, C codes in a row, B packed bytes, W packed words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ckptq.quantize.stored import words


def pack_nibbles(code_RC: Tensor) -> Tensor:
    """[R, C] codes 0..15, one a byte -> [R, C / 2] uint8. Example: 1, 2, 3, 4 -> 0x21, 0x43."""
    # two codes are one little-endian int16: fold its high byte onto the upper half of its low byte
    pair = code_RC.reshape(-1).view(torch.int16)
    return (pair | pair >> 4).to(torch.uint8).view(len(code_RC), -1)


def unpack_nibbles(byte_RB: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`, as uint8."""
    return torch.stack((byte_RB & 15, byte_RB >> 4), dim=-1).flatten(1)


def pack_words(code_RC: Tensor, num_bits: int) -> Tensor:
    """[R, C] int8 codes -> [R, ceil(C * bits / 32)] int32.

    Example: the 4-bit codes -8, -7, ..., -1 are the word 0x76543210.
    """
    columns = code_RC.shape[1]
    code_RC = pad(code_RC.view(torch.uint8) + 2 ** (num_bits - 1), (0, -columns % 32))
    if num_bits == 8:
        byte_RB = code_RC
    elif num_bits == 4:
        byte_RB = pack_nibbles(code_RC)
    else:
        # eight codes fill `num_bits` bytes
        shift_8 = torch.arange(8, device=code_RC.device) * num_bits
        long_RK = (code_RC.unflatten(1, (-1, 8)).long() << shift_8).sum(-1, keepdim=True)
        byte_RB = long_RK.view(torch.uint8)[..., :num_bits].flatten(1)
    word_RW = byte_RB.reshape(-1).view(torch.int32).view(len(code_RC), -1)
    return word_RW[:, : words(columns, num_bits)].contiguous()


def unpack_words(word_RW: Tensor, num_bits: int, columns: int) -> Tensor:
    """Inverse of `pack_words`: int8 codes [R, columns]."""
    word_RW = pad(word_RW, (0, -word_RW.shape[1] % num_bits))
    byte_RB = word_RW.reshape(-1).view(torch.uint8).view(len(word_RW), -1)
    if num_bits == 8:
        code_RC = byte_RB
    elif num_bits == 4:
        code_RC = unpack_nibbles(byte_RB)
    else:
        place_8 = torch.arange(8, device=word_RW.device)
        byte_RKb = byte_RB.unflatten(1, (-1, num_bits)).long()
        long_RK = (byte_RKb << (place_8[:num_bits] * 8)).sum(-1, keepdim=True)
        code_RC = (long_RK >> (place_8 * num_bits) & (2**num_bits - 1)).to(torch.uint8).flatten(1)
    return (code_RC[:, :columns] - 2 ** (num_bits - 1)).view(torch.int8)
