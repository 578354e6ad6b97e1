"""Matrix product of 16-bit activations with packed INT4 weights, unpacked on the way.

Meaning: `reference_linear.linear_w4a16`. A weight is (code - zero point) * scale rounded to the
scale's dtype, as `dequantize_int4` gives it; then an ordinary product, summed in fp32.

Weights are the operand that tensor cores take from registers, and are unpacked there, two an
instruction: nothing but activations passes through shared memory. Of 128 input features a thread
holds 32 neighbours of a row, which are one group or part of one. So the features of a product come
in another order; activations are put into it before (`_reordered`).

Shape letters: M tokens, K input features, N output channels, G groups along K, P = K / 8 words,
Z = N / 8 words of zero points; B, L the tile of the result; W the 16 words of 128 features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.gpu import shared_memory
from ckptq.kernels.int4.quantize_int4 import dense_zero_points
from ckptq.kernels.linear.linear_w8a8 import first_of_tile
from ckptq.kernels.product_rows import in_order, lanes_in_order, product_rows
from ckptq.kernels.rounding import INTERPRETED, narrow, widen
from ckptq.kernels.words import both, word_of

FEATURES = 128
"""Input features of a step."""
_ASM = """{{
.reg .b32 w, one, nothing;
lop3.b32 w, $1, 0x000F000F, {ones}, 0xEA;
mov.b32 one, {one};
mov.b32 nothing, 0x80008000;
fma.rn.{kind} w, w, one, $2;
fma.rn.{kind} $0, w, $3, nothing;
}}"""
BF16 = tl.constexpr(_ASM.format(kind="bf16x2", ones="0x43004300", one="0x3F803F80"))
FP16 = tl.constexpr(_ASM.format(kind="f16x2", ones="0x64006400", one="0x3C003C00"))


@triton.jit
def _weights(word, minus, scale):
    """Weights from the lowest codes of both halves of words. Values for words, in the scale's
    dtype: minus the zero point and 128 (bf16) or 1024 (fp16); the scale.

    Near those a number has its ones in its lowest bits, so that a code there is added to it.
    """
    dtype: tl.constexpr = scale.dtype
    if INTERPRETED:
        ONES: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        less, factor = widen(minus) + ONES, widen(scale)
        low = ((word & 15).to(tl.float32) + less) * factor
        high = ((word >> 16 & 15).to(tl.float32) + less) * factor
        return word_of(narrow(low, dtype), narrow(high, dtype))
    else:
        return tl.inline_asm_elementwise(
            BF16 if dtype == tl.bfloat16 else FP16,
            "=r,r,r,r",
            [
                word,
                tl.broadcast_to(word_of(minus, minus), word.shape),
                tl.broadcast_to(word_of(scale, scale), word.shape),
            ],
            tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _operand(word_L44, minus_L4, scale_L4):
    """Words of 128 features [L, thread, word] -> weights [L, 128] in the order of a product."""
    minus, scale = minus_L4[:, :, None], scale_L4[:, :, None]
    zeroth, first = _weights(word_L44, minus, scale), _weights(word_L44 >> 4, minus, scale)
    second, third = _weights(word_L44 >> 8, minus, scale), _weights(word_L44 >> 12, minus, scale)
    # [L, thread, word, 2, 2]: which of four, upper bit first
    pair = tl.join(tl.join(zeroth, second), tl.join(first, third))
    low, high = both(tl.trans(pair, (0, 2, 3, 4, 1)), scale_L4.dtype)
    return tl.reshape(tl.join(low, high), (word_L44.shape[0], 128))


@triton.jit
def _scales(
    scale_ptr,
    zero_ptr,
    first_n,
    N,
    G,
    k,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Scales of 128 features from k on, and what `_weights` adds: a thread's, [L, 4] each."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    ONES: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    n = tl.broadcast_to((first_n + product_rows(WARPS))[None], (4, 8, WARPS, 2))
    # past the end a group is any: activations are zero there
    g = tl.minimum((k + 32 * tl.arange(0, 4)) // GROUP, G - 1)[:, None, None, None]
    scale = tl.load(scale_ptr + n * G + g, mask=n < N, other=0.0)
    zero = tl.full((4, 8, WARPS, 2), 8, tl.int32)
    if ASYMMETRIC:
        zero = tl.load(zero_ptr + n // 8 * G + g, mask=n < N, other=0)
        zero = (zero >> (n % 8 * 4).to(tl.int32)) & 15
    minus = (-ONES - zero).to(tl.float32).to(dtype)
    return lanes_in_order(scale, WARPS), lanes_in_order(minus, WARPS)


# of a group a row, the compiler would load scales of neighbouring rows by neighbouring threads
@triton.jit(do_not_specialize=["G"])
def _linear_w4a16_kernel(
    a_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K,
    P,
    G,
    a_stride,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    WARPS: tl.constexpr = BLOCK_N // 16
    first_m, first_n = first_of_tile(M, N, BLOCK_M, BLOCK_N)
    m_B, n_L = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    n_8W2, word_W = first_n + product_rows(WARPS), tl.arange(0, 16)
    args = (scale_ptr, zero_ptr, first_n, N, G)
    scale_L4, minus_L4 = _scales(*args, 0, GROUP, ASYMMETRIC, WARPS)
    acc_LB = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(0, K, 128, num_stages=STAGES):
        # rows past the end give columns of the result that are not stored
        a_BK = tl.load(a_ptr + m_B[:, None] * a_stride + (k + tl.arange(0, 128))[None, :])
        o_W = k // 8 + word_W
        mask = (n_8W2 < N)[:, :, :, None] & (o_W < P)[None, None, None, :]
        word_ptrs = packed_ptr + (n_8W2 * P)[:, :, :, None] + o_W[None, None, None, :]
        word_LW = in_order(tl.load(word_ptrs, mask=mask, other=0), WARPS)
        word_L44 = tl.reshape(word_LW, (BLOCK_N, 4, 4))
        w_LK = _operand(word_L44, minus_L4, scale_L4)
        # ahead, because loads of two bytes are not done by themselves
        scale_L4, minus_L4 = _scales(*args, k + 128, GROUP, ASYMMETRIC, WARPS)
        if INTERPRETED:
            acc_LB = tl.dot(widen(w_LK), tl.trans(widen(a_BK)), acc_LB, input_precision="ieee")
        else:
            acc_LB = tl.dot(w_LK, tl.trans(a_BK), acc_LB)

    out_ptrs = out_ptr + m_B[:, None] * N + n_L[None, :]
    m_BL = (m_B < M)[:, None] & (n_L < N)[None, :]
    tl.store(out_ptrs, narrow(tl.trans(acc_LB), out_ptr.dtype.element_ty), mask=m_BL)


def _reordered(a_MK: Tensor, rows: int) -> Tensor:
    """Activations padded to whole tiles of `rows` x 128, their features in the order of a product.

    Of 16 neighbouring places, thread t of four holds 2t, 2t + 1, 2t + 8 and 2t + 9. Its features
    are those of its four words, of each in pairs that lie in the two halves of a word.
    """
    M, K = a_MK.shape
    padded = torch.nn.functional.pad(a_MK, (0, -K % FEATURES, 0, -M % rows))
    # thread, word, half, weight of half
    blocks = padded.view(len(padded), padded.shape[1] // FEATURES, 4, 4, 2, 4)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(padded.shape)


def _tile(tokens: int, shared_memory: int) -> tuple[int, int, int]:
    """Tokens and output channels of a tile, and steps that are loaded ahead: the most that fit."""
    rows = min(256, max(16, triton.next_power_of_2(tokens)))
    while True:
        columns = 64 if rows <= 32 else 128
        stages = shared_memory // (FEATURES * 2 * rows + FEATURES // 2 * columns)
        if stages >= 3 or rows == 16:
            return rows, columns, min(stages, 4 if rows <= 32 else 3)
        rows //= 2


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ w.T in a's dtype, [M, N]; scales are of a's dtype, groups of 32 times n or whole rows."""
    (M, K), (N, P), G = a_MK.shape, packed_NP.shape, scale_NG.shape[1]
    group = K // G
    if K % G or triton.cdiv(K, 8) != P or (group % 32 and G > 1):
        raise ValueError(f"{tuple(a_MK.shape)} does not fit {P} words and {G} groups a row")
    zero_ZG = dense_zero_points(zero_ZG, N, G)
    if scale_NG.dtype != a_MK.dtype or a_MK.element_size() != 2:
        found = f"{a_MK.dtype} and {scale_NG.dtype}"
        raise ValueError(f"want activations and scales in bf16 or in fp16, got {found}")
    out_MN = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    rows, columns, stages = _tile(M, shared_memory(a_MK.device))
    a = _reordered(a_MK, rows)
    _linear_w4a16_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
        *(a, packed_NP.contiguous(), scale_NG.contiguous(), zero_ZG, out_MN),
        *(M, N, K, P, G, a.stride(0)),
        GROUP=group if G > 1 else 1 << 30,
        ASYMMETRIC=zero_ZG is not None,
        BLOCK_M=rows,
        BLOCK_N=columns,
        STAGES=stages,
        num_warps=columns // 16,
        enable_fp_fusion=False,
    )
    return out_MN
