"""The doors to quantization: Triton for CUDA tensors, plain torch for others, with the same bits.

Arguments are documented by the functions of the same name in this folder; input is finite.
"""

from ckptq.kernels.gpu import door
from ckptq.kernels.quantize import reference

quantize_rows = door("ckptq.kernels.quantize.quantize_rows:quantize_rows")(reference.quantize_rows)
quantize_blocks = door("ckptq.kernels.quantize.quantize_rows:quantize_blocks")(
    reference.quantize_blocks
)
quantize_static = door("ckptq.kernels.quantize.quantize_static:quantize_static")(
    reference.quantize_static
)
dequantize = door("ckptq.kernels.quantize.quantize_static:dequantize")(reference.dequantize)
