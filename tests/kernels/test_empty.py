"""No rows and no tokens: an expert that nothing was routed to. Kernels give what references do."""

from typing import Any

import pytest
import reference_int4 as int4
import reference_linear as linear
import reference_quantize as meaning
import torch
from kernel_cases import same, weights
from torch import Tensor

from ckptq.kernels.attention.dense_attention import attention
from ckptq.kernels.int4.quantize_int4 import dequantize_int4, quantize_int4
from ckptq.kernels.linear.library import linear_fp8_block, linear_w4a16
from ckptq.kernels.linear.linear_w8a8 import linear_w8a8
from ckptq.kernels.quantize.quantize_rows import quantize_blocks, quantize_rows
from ckptq.kernels.quantize.quantize_static import dequantize, quantize_static
from ckptq.kernels.token_head.hadamard import rotate
from ckptq.kernels.token_head.kv_format import Rotation

EMPTY, W = weights((1, 256))[:0], weights((16, 256))
W8, W_SCALE = meaning.quantize_rows(W)
WB, WB_SCALE = meaning.quantize_blocks(W)
W4, W4_SCALE, W4_ZERO = int4.quantize_int4(W, 32, False)
NO_CODES, NO_SCALE = EMPTY.to(torch.float8_e4m3fn), W_SCALE[:0]
CALLS = [
    (quantize_rows, meaning.quantize_rows, (EMPTY,)),
    (quantize_blocks, meaning.quantize_blocks, (EMPTY,)),
    (quantize_static, meaning.quantize_static, (EMPTY, NO_SCALE, (1, 256))),
    (dequantize, meaning.dequantize, (NO_CODES, NO_SCALE, (1, 256))),
    (quantize_int4, int4.quantize_int4, (EMPTY, 32, False)),
    (dequantize_int4, int4.dequantize_int4, (W4[:0], W4_SCALE[:0], 256, W4_ZERO[:0])),
    (linear_w8a8, linear.linear_w8a8, (NO_CODES, NO_SCALE, W8, W_SCALE)),
    (linear_fp8_block, linear.linear_fp8_block, (NO_CODES, NO_SCALE.expand(0, 2), WB, WB_SCALE)),
    (linear_w4a16, linear.linear_w4a16, (EMPTY, W4, W4_SCALE, W4_ZERO)),
]


@pytest.mark.parametrize(
    ("kernel", "reference", "args"), CALLS, ids=lambda x: getattr(x, "__name__", "")
)
def test_no_rows(device: torch.device, kernel: Any, reference: Any, args: tuple) -> None:
    want, got = (
        (made,) if isinstance(made, Tensor) else made
        for made in (
            reference(*args),
            kernel(*(x.to(device) if isinstance(x, Tensor) else x for x in args)),
        )
    )
    assert want[0].shape[0] == 0
    assert all(same(g, w) for g, w in zip(got, want, strict=True))


def test_no_queries_no_keys_no_batch(device: torch.device) -> None:
    q, k = torch.ones(2, 4, 3, 64, device=device), torch.ones(2, 2, 5, 64, device=device)
    assert attention(q[:0], k[:0], k[:0], scaling=0.1).shape == (0, 3, 4, 64)
    assert attention(q[:, :, :0], k, k, scaling=0.1).shape == (2, 0, 4, 64)
    nothing = attention(q, k[:, :, :0], k[:, :, :0], scaling=0.1)
    assert not nothing.any()
    assert rotate(q[:0], Rotation.SIGNED).shape == (0, 4, 3, 64)
