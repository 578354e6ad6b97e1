"""The doors to quantized products: for CUDA tensors Triton, or a library for many tokens of some
formats, plain torch for others.

All give the same but for the order in which they sum. Arguments are documented by the functions of
the same name in this folder.
"""

from ckptq.kernels.gpu import door
from ckptq.kernels.linear import reference

linear_w8a8 = door("ckptq.kernels.linear.linear_w8a8:linear_w8a8")(reference.linear_w8a8)
linear_fp8_block = door("ckptq.kernels.linear.library:linear_fp8_block")(reference.linear_fp8_block)
linear_w4a16 = door("ckptq.kernels.linear.library:linear_w4a16")(reference.linear_w4a16)
