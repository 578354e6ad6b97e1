"""Every stored format of a projection in a few plain lines: tensors from a weight, and back.

Written apart from ckptq's own quantization and packing, so that the two cannot share a mistake;
the rounding of scales does not matter here, only which tensor is indexed by what.

Shape letters: R rows, C columns, G groups of columns, L columns in a group, B blocks, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor

from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Part, Projection, effect_on
from ckptq.rope_order import RopeOrder
from ckptq.spec import spec_of

Tensors = dict[str, Tensor]
BLOCK = 128
GROUP = 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Format:
    make: Callable[[Tensor], Tensors]
    read: Callable[[Tensors], Tensor]
    """The weight that the tensors mean, float64 [R, C]."""


def pack_rows(code_RC: Tensor, bits: int) -> Tensor:
    """Codes plus an offset, along dimension 0, as one string of bits; int32 [W, C]."""
    word_WC = torch.zeros(ceil(len(code_RC) * bits / 32), code_RC.shape[1], dtype=torch.int64)
    for row, code_C in enumerate(code_RC.long() + (1 << bits - 1)):
        word, bit = divmod(row * bits, 32)
        word_WC[word] |= code_C << bit & 0xFFFFFFFF
        if bit + bits > 32:
            word_WC[word + 1] |= code_C >> (32 - bit)
    return torch.where(word_WC >= 1 << 31, word_WC - (1 << 32), word_WC).int()


def unpack_rows(word_WC: Tensor, bits: int, rows: int) -> Tensor:
    """The opposite of `pack_rows`, int64 [R, C]."""
    word_WC = word_WC.long() & 0xFFFFFFFF
    code_RC = torch.zeros(rows, word_WC.shape[1], dtype=torch.int64)
    for row in range(rows):
        word, bit = divmod(row * bits, 32)
        code_RC[row] = word_WC[word] >> bit
        if bit + bits > 32:
            code_RC[row] |= word_WC[word + 1] << (32 - bit)
    return (code_RC & (1 << bits) - 1) - (1 << bits - 1)


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-6)


def _fp8(w: Tensor, scale: Tensor) -> Tensor:
    return (w.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)


def _int(w: Tensor, scale: Tensor, bits: int, zero: Tensor | float = 0.0) -> Tensor:
    half = 1 << bits - 1
    return (w.float() / scale.float() + zero).round().clamp(-half, half - 1).to(torch.int8)


def _asym(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=1e-6).bfloat16()
    half = 1 << bits - 1
    zero = (-half - low / scale.float()).round().clamp(-half, half - 1)
    return scale, zero.to(torch.int8)


def _plain(w_RC: Tensor) -> Tensors:
    return {"weight": w_RC.bfloat16(), "bias": w_RC[:, 0].bfloat16() * 10}


def _fp8_channel(w_RC: Tensor) -> Tensors:
    scale_R1 = (_amax(w_RC) / 448).bfloat16()
    return {"weight": _fp8(w_RC, scale_R1), "weight_scale": scale_R1}


def _fp8_tensor(w_RC: Tensor) -> Tensors:
    scale_1 = (w_RC.abs().amax().reshape(1) / 448).bfloat16()
    input_scale_1 = torch.tensor([0.25], dtype=torch.bfloat16)
    return {"weight": _fp8(w_RC, scale_1), "weight_scale": scale_1, "input_scale": input_scale_1}


def _spread(scale_BB: Tensor, shape: torch.Size) -> Tensor:
    return scale_BB.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def _fp8_block(w_RC: Tensor) -> Tensors:
    rows, cols = w_RC.shape
    padded = torch.nn.functional.pad(w_RC, (0, -cols % BLOCK, 0, -rows % BLOCK))
    block_BLBL = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale_BB = (block_BLBL.abs().amax((1, 3)).clamp(min=1e-6) / 448).bfloat16()
    return {"weight": _fp8(w_RC, _spread(scale_BB, w_RC.shape)), "weight_scale": scale_BB}


def _int8_channel(w_RC: Tensor) -> Tensors:
    scale_R1 = (_amax(w_RC) / 127.5).bfloat16()
    return {"weight": _int(w_RC, scale_R1, 8), "weight_scale": scale_R1}


def _int8_channel_asym(w_RC: Tensor) -> Tensors:
    scale_R1, zero_R1 = _asym(w_RC, 8)
    codes_RC = _int(w_RC, scale_R1, 8, zero_R1)
    return {"weight": codes_RC, "weight_scale": scale_R1, "weight_zero_point": zero_R1}


def _packed(w_RC: Tensor, bits: int, group: int | None, sym: bool) -> Tensors:
    w_RGL = w_RC.unflatten(1, (-1, group or w_RC.shape[1]))
    half = (1 << bits) / 2 - 0.5
    scale_RG1, zero_RG1 = ((_amax(w_RGL) / half).bfloat16(), None) if sym else _asym(w_RGL, bits)
    code_RC = _int(w_RGL, scale_RG1, bits, 0.0 if zero_RG1 is None else zero_RG1).flatten(1)
    made = {
        "weight_packed": pack_rows(code_RC.T, bits).T.contiguous(),
        "weight_scale": scale_RG1.squeeze(-1),
        "weight_shape": torch.tensor(w_RC.shape),
        "weight_g_idx": torch.arange(w_RC.shape[1], dtype=torch.int32) // (group or 1),
    }
    if zero_RG1 is not None:
        made["weight_zero_point"] = pack_rows(zero_RG1.squeeze(-1), bits)
    return made


def _mxfp8(w_RC: Tensor) -> Tensors:
    w_RGL = w_RC.unflatten(1, (-1, GROUP))
    exponent_RG1 = (_amax(w_RGL) / 448).log2().ceil()
    codes_RC = _fp8(w_RGL, exponent_RG1.exp2()).flatten(1)
    return {"weight": codes_RC, "weight_scale": (exponent_RG1 + 127).squeeze(-1).to(torch.uint8)}


def _fp4_pairs(x_RC: Tensor) -> Tensor:
    code_RC = (x_RC[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return code_RC[:, 0::2] | code_RC[:, 1::2] << 4


def _mxfp4(w_RC: Tensor) -> Tensors:
    w_RGL = w_RC.unflatten(1, (-1, GROUP))
    exponent_RG1 = (_amax(w_RGL) / 6).log2().ceil()
    scale_RG = (exponent_RG1 + 127).squeeze(-1).to(torch.uint8)
    packed = _fp4_pairs((w_RGL / exponent_RG1.exp2()).flatten(1))
    return {"weight_packed": packed, "weight_scale": scale_RG}


def _nvfp4(w_RC: Tensor) -> Tensors:
    w_RGL = w_RC.unflatten(1, (-1, 16))
    global_1 = 448 * 6 / w_RC.abs().amax().reshape(1).float()
    scale_RG1 = (_amax(w_RGL) / 6 * global_1).clamp(min=2**-6).to(torch.float8_e4m3fn)
    return {
        "weight_packed": _fp4_pairs((w_RGL / (scale_RG1.float() / global_1)).flatten(1)),
        "weight_scale": scale_RG1.squeeze(-1),
        "weight_global_scale": global_1,
        "input_global_scale": torch.ones(1),
    }


def _read_plain(t: Tensors) -> Tensor:
    """The bias as one more column: the input's last feature can be seen as a constant."""
    return torch.cat([t["weight"].double(), t["bias"].double()[:, None]], 1)


def _read_scaled(t: Tensors) -> Tensor:
    zero = t["weight_zero_point"].double() if "weight_zero_point" in t else 0.0
    return (t["weight"].double() - zero) * t["weight_scale"].double()


def _read_block(t: Tensors) -> Tensor:
    return t["weight"].double() * _spread(t["weight_scale"].double(), t["weight"].shape)


def _read_packed(t: Tensors, bits: int) -> Tensor:
    rows, cols = t["weight_shape"].tolist()
    scale_RG = t["weight_scale"].double()
    code_RGL = unpack_rows(t["weight_packed"].T, bits, cols).T.unflatten(1, (scale_RG.shape[1], -1))
    zero_RG = torch.zeros_like(scale_RG)
    if "weight_zero_point" in t:
        zero_RG = unpack_rows(t["weight_zero_point"], bits, rows).double()
    return ((code_RGL - zero_RG[..., None]) * scale_RG[..., None]).flatten(1)


def _read_mxfp8(t: Tensors) -> Tensor:
    scale_RG1 = (t["weight_scale"].double() - 127).exp2()[..., None]
    return (t["weight"].double().unflatten(1, (-1, GROUP)) * scale_RG1).flatten(1)


def _read_fp4(t: Tensors) -> Tensor:
    packed = t["weight_packed"].long()
    value_RC = E2M1.double()[torch.stack([packed & 15, packed >> 4], -1).flatten(1)]
    scale_RG = t["weight_scale"].double()
    scale_RG = (
        scale_RG / t["weight_global_scale"].double()
        if "weight_global_scale" in t
        else (scale_RG - 127).exp2()
    )
    return (value_RC.unflatten(1, (scale_RG.shape[1], -1)) * scale_RG[..., None]).flatten(1)


def _packed_format(bits: int, group: int | None, sym: bool) -> Format:
    return Format(
        partial(_packed, bits=bits, group=group, sym=sym), partial(_read_packed, bits=bits)
    )


FORMATS: dict[str, Format] = {
    "bf16-bias": Format(_plain, _read_plain),
    "fp8-channel": Format(_fp8_channel, _read_scaled),
    "fp8-tensor": Format(_fp8_tensor, _read_scaled),
    "fp8-block": Format(_fp8_block, _read_block),
    "int8-channel": Format(_int8_channel, _read_scaled),
    "int8-channel-asym": Format(_int8_channel_asym, _read_scaled),
    "int4-channel": _packed_format(4, None, sym=True),
    "int4-group": _packed_format(4, GROUP, sym=True),
    "int4-group-asym": _packed_format(4, GROUP, sym=False),
    "int4-channel-asym": _packed_format(4, None, sym=False),
    "int3-group-asym": _packed_format(3, GROUP, sym=False),
    "int8-group-packed": _packed_format(8, GROUP, sym=True),
    "int8-group-packed-asym": _packed_format(8, GROUP, sym=False),
    "mxfp8": Format(_mxfp8, _read_mxfp8),
    "mxfp4": Format(_mxfp4, _read_fp4),
    "nvfp4": Format(_nvfp4, _read_fp4),
}


def permute_projection(
    tensors: Tensors, projection: Projection, to: RopeOrder, only: Collection[Part] = tuple(Part)
) -> Tensors:
    """All tensors of one q_proj or k_proj, by local name ("weight", ...), whole and in memory."""
    made = {}
    for local, tensor in tensors.items():
        effect = effect_on(local, spec_of(tensor), projection)
        made[local] = permute_tensor(tensor, effect, to) if effect.part in only else tensor
    return made
