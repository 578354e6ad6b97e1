"""The doors to INT4: Triton for CUDA tensors, plain torch for others, with the same bits.

Arguments are documented by the functions of the same name in this folder; input is finite.
"""

from ckptq.kernels.gpu import door
from ckptq.kernels.int4 import reference

quantize_int4 = door("ckptq.kernels.int4.quantize_int4:quantize_int4")(reference.quantize_int4)
dequantize_int4 = door("ckptq.kernels.int4.quantize_int4:dequantize_int4")(
    reference.dequantize_int4
)
