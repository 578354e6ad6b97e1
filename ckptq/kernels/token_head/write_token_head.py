"""Quantize keys or values by token and head as they are written into a paged cache.

Meaning: `reference.quantize`, to the bit. A row is one head of one token: find its scale, round,
store a byte a value. One read of the input, one write. Formats with a rotation or of less than 8
bits have a kernel of their own, `kv_lifted`.

Shape letters: T tokens, K key/value heads, D head dimension, R a program's rows, L columns of a
slice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.cache.paged_addresses import slot_offset
from ckptq.kernels.cache.paging import check_slots
from ckptq.kernels.rounding import has_native_e4m3
from ckptq.kernels.token_head.hadamard import load_rows
from ckptq.kernels.token_head.kv_codes import codes, step_and_inverse
from ckptq.kernels.token_head.kv_format import EPS, Rotation, rotation_block
from ckptq.kernels.token_head.kv_lifted import write_lifted
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache


@triton.jit
def _write_token_head_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    slot_ptr,
    x_strides,
    code_strides,
    scale_strides,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = (row_R // K).to(tl.int64), row_R % K
    slot_R = tl.load(slot_ptr + token_R, mask=token_R < T, other=-1).to(tl.int64)
    m_R = slot_R >= 0
    x_R1 = (token_R * x_strides[0] + head_R * x_strides[1])[:, None]
    slices = load_rows(x_ptr + x_R1 + tl.arange(0, L)[None, :], m_R, COUNT)
    step_R, inverse_R = step_and_inverse(slices, KIND, EPS)
    o_R = slot_offset(slot_R, scale_strides, BLOCK) + head_R * scale_strides[2]
    tl.store(scale_ptr + o_R, tl.maximum(step_R, EPS), mask=m_R)
    c_R1 = (slot_offset(slot_R, code_strides, BLOCK) + head_R * code_strides[2])[:, None]
    for i in tl.static_range(COUNT):
        code_RL = codes(slices[i], inverse_R, KIND, NATIVE)
        ptrs_RL = code_ptr + i * L + (c_R1 + tl.arange(0, L)[None, :])
        tl.store(ptrs_RL, code_RL, mask=m_R[:, None])


def write_token_head(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """Quantize keys or values [T, K, D] into their slots; a slot of -1 is skipped.

    There may be fewer slots than tokens: the tokens after them pad a batch and are not written.
    Raises ValueError where heads or head sizes are not the cache's, slots do not fit the tokens,
    or `kv_lifted` cannot rotate.
    """
    check_slots(slot_T, len(x_TKD), cache.code)
    x_TKD, slot_T = x_TKD[: len(slot_T)], slot_T.contiguous()
    T, K, D = x_TKD.shape
    block, heads = cache.code.shape[1:3]
    if (heads, cache.head_dim) != (K, D):
        raise ValueError(f"{K} heads of {D} into a cache of {heads} heads of {cache.head_dim}")
    if x_TKD.stride(2) != 1:
        x_TKD = x_TKD.contiguous()
    if cache.fmt.bits < 8 or cache.rotation is not Rotation.NONE:
        write_lifted(x_TKD, cache, slot_T)
        return
    rows = max(1, 2048 // triton.next_power_of_2(D))
    _write_token_head_kernel[(triton.cdiv(T * K, rows),)](
        *(x_TKD, cache.code, cache.scale, slot_T),
        *(x_TKD.stride()[:2], cache.code.stride()[:3], cache.scale.stride(), T),
        K=K,
        D=D,
        BLOCK=block,
        KIND=cache.fmt.name.partition("_")[0],
        NATIVE=has_native_e4m3(x_TKD.device),
        EPS=EPS,
        COUNT=D // rotation_block(D),
        ROWS=rows,
        num_warps=2,
        enable_fp_fusion=False,
    )
