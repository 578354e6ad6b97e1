"""What the kernels are measured against: torch eager, and compressed-tensors' own functions.

Both compute on the device what the kernels do, scales in the source's dtype and codes divided in
fp32, so that results can be compared bit for bit.

Shape letters: R rows, C columns, G x K the grid of scales.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FP8, INT8 = torch.float8_e4m3fn, torch.int8
HALF_RANGE = {FP8: 448.0, INT8: 127.5, "int4": 7.5}


def scale_of(amax: Tensor, half_range: float) -> Tensor:
    # by a tensor: CUDA divides by a number by multiplying with its rounded reciprocal
    scale = amax / torch.full_like(amax, half_range)
    return torch.where(scale == 0, torch.finfo(amax.dtype).eps, scale)


def codes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    ratio = x.float() / scale.float()
    if dtype == FP8:
        return ratio.clamp_(-448, 448).to(FP8)
    return ratio.clamp_(-128, 127).round_().to(INT8)


def rows(x_RC: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    scale_R1 = scale_of(x_RC.abs().amax(1, keepdim=True), HALF_RANGE[dtype])
    return codes(x_RC, scale_R1, dtype), scale_R1


def blocks(x_RC: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    x_GBKL = x_RC.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale_GK = scale_of(x_GBKL.abs().amax((1, 3)), HALF_RANGE[dtype])
    return codes(x_GBKL, scale_GK[:, None, :, None], dtype).view(x_RC.shape), scale_GK


def pack(code: Tensor) -> Tensor:
    """Codes -8 to 7, eight of the last dimension in an int32."""
    run = (code.to(torch.int32) + 8).unflatten(-1, (-1, 8))
    word = run[..., 0].clone()
    for i in range(1, 8):
        word |= run[..., i] << 4 * i
    return word


def int4(x: Tensor, group: int = 128, symmetric: bool = True) -> tuple[Tensor, ...]:
    """Packed codes, scales and packed zero points of the last two dimensions, rows x columns."""
    x_GL = x.unflatten(-1, (-1, group))
    if symmetric:
        scale = scale_of(x_GL.abs().amax(-1), 7.5)
        ratio = x_GL.float() / scale[..., None].float()
        return pack(ratio.clamp_(-8, 7).round_().flatten(-2)), scale
    low, high = x_GL.amin(-1).clamp(max=0), x_GL.amax(-1).clamp(min=0)
    scale = (high - low) / torch.full_like(low, 15)
    zero = (-8 - low / scale).nan_to_num(nan=0.0).clamp(-8, 7).round()
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    ratio = x_GL.float() / scale[..., None].float() + zero[..., None].float()
    packed = pack(ratio.clamp_(-8, 7).round_().flatten(-2))
    return packed, scale, pack(zero.transpose(-1, -2)).transpose(-1, -2)


def dequantized(code_RC: Tensor, scale_R1: Tensor) -> Tensor:
    return code_RC.to(scale_R1.dtype) * scale_R1


def dequantized_int4(packed_RP: Tensor, scale_RG: Tensor, columns: int) -> Tensor:
    shift_8 = 4 * torch.arange(8, device=packed_RP.device)
    code_RC = ((packed_RP[..., None] >> shift_8 & 15) - 8).flatten(1)
    code_RGL = code_RC.unflatten(1, (scale_RG.shape[1], -1)).to(scale_RG.dtype)
    return (code_RGL * scale_RG[..., None]).view(-1, columns)


def compressed_tensors(strategy: str, bits: int = 8, symmetric: bool = True) -> Callable | None:
    """compressed-tensors' way from a weight to what is stored, or None where it is missing."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import quantize
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError:
        return None
    # `type: float` at 8 bits is FP8; INT8 is asked for by the strategy's name
    kind, strategy = ("int", strategy[4:]) if strategy.startswith("int_") else ("float", strategy)
    args = QuantizationArgs(
        num_bits=bits,
        type="int" if bits == 4 else kind,
        strategy=strategy,
        symmetric=symmetric,
        group_size=128 if strategy == "group" else None,
        block_structure=[128, 128] if strategy == "block" else None,
    )
    axes = {"channel": (1,), "tensor": (0, 1), "block": (1, 3), "group": (2,)}[strategy]

    def run(x_RC: Tensor) -> tuple[Tensor, ...]:
        view = x_RC
        if strategy == "block":
            view = x_RC.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        if strategy == "group":
            view = x_RC.unflatten(1, (-1, 128))
        keep = strategy == "channel"
        low, high = view.amin(axes, keepdim=keep), view.amax(axes, keepdim=keep)
        scale, zero = calculate_qparams(low, high, args)
        dtype = FP8 if kind == "float" and bits == 8 else INT8
        # as model_free_ptq: no zero point, to which adding would turn -0.0 into 0.0
        code_RC = quantize(x_RC, scale, None if symmetric else zero, args, dtype)
        if bits == 8:
            return code_RC, scale
        packed = pack_to_int32(code_RC, 4)
        return (packed, scale) if symmetric else (packed, scale, pack_to_int32(zero, 4, 0))

    return run
