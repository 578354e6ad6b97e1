"""One launch of each variant of the quantize and linear kernels, for compilation."""

import torch

from ckptq.kernels.int4.quantize_int4 import dequantize_int4, quantize_int4
from ckptq.kernels.linear.linear_w4a16 import linear_w4a16
from ckptq.kernels.linear.linear_w8a8 import linear_fp8_block, linear_w8a8
from ckptq.kernels.quantize.error_sums import error_sums
from ckptq.kernels.quantize.quantize_rows import quantize_blocks, quantize_rows
from ckptq.kernels.quantize.quantize_static import dequantize, quantize_static

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def launch_all(device: torch.device) -> None:
    """Sources of 16 and 32 bits, both kinds of codes, with and without zero points."""
    x = torch.zeros(256, 1024, dtype=torch.bfloat16, device=device)
    quantize_rows(x, FP8)
    quantize_rows(x.float(), INT8)
    quantize_blocks(x, FP8)
    scale = torch.ones(2, 8, device=device)
    codes = quantize_static(x, scale, (128, 128), FP8)
    dequantize(codes, scale, (128, 128))
    dequantize(codes.view(INT8), scale.bfloat16(), (128, 128))

    power = torch.zeros(1 << 15, dtype=x.dtype, device=device)
    for codes_of, length in ((("int", 8), 1024), (("float", 8), 1024), (("float", 4), 16)):
        x_TL = x.view(-1, length)
        error_sums(x_TL, x_TL[:, :1].t().contiguous(), None, power, codes_of)
    ones = torch.ones(1, 2048, device=device)
    error_sums(x.half().view(-1, 128), ones.half(), ones.to(INT8), power.half(), ("int", 4))

    packed, scales, _ = quantize_int4(x, 128)
    _, _, zero = quantize_int4(x, 128, symmetric=False)
    dequantize_int4(packed, scales, 1024, zero)

    for tokens in (16, 256):
        a = codes[:tokens]
        linear_w8a8(a, torch.ones(tokens, 1, device=device), codes, scale[:1, :1])
        integers = codes.view(INT8)
        linear_w8a8(integers[:tokens], scale[:1, :1], integers, scale[:1, :1])
        linear_fp8_block(a, torch.ones(tokens, 8, device=device), codes, scale)
        linear_w4a16(x[:tokens], packed, scales, zero)
