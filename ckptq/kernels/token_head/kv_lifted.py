"""Quantize heads that are times a power of two first, and write them into a paged cache: all that
are rotated, and all of 4 or 2 bits.

Meaning: `reference.quantize`, to the bit. Programs take tiles in turn. The next tile is loaded
while one is rotated and quantized; no thread waits for another but at a product.

Shape letters: T tokens, K key/value heads, D head dimension; R rows of a tile (heads of tokens),
S columns (or words) of a slice, L columns of a chunk, U units of a chunk (what is stored: bytes, or
words of several codes).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.gpu import multiprocessors
from ckptq.kernels.product_rows import among_lanes, runs_of_lanes
from ckptq.kernels.rounding import INTERPRETED, has_native_e4m3
from ckptq.kernels.token_head import kv_format
from ckptq.kernels.token_head.kv_codes import codes, step_and_inverse
from ckptq.kernels.token_head.kv_format import Rotation, chunk_size, load_size, rotation_block
from ckptq.kernels.token_head.kv_halves import (
    LEAST_MEAN,
    int2_step_inverse,
    int4_step_inverse_zero,
    packed,
    take_away,
    words_of,
)
from ckptq.kernels.token_head.kv_rotated import load_matrices, operands_of, rotated, rotation_matrix
from ckptq.kernels.token_head.kv_tiles import (
    exponents,
    lifted,
    load_tile,
    loads_stay_before,
    mean_square,
    tile_rows,
    whole,
)
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

WARPS = 4
ROWS = 16 * WARPS
"""Rows of a tile, as many as one product of four warps takes."""
LEAST_SCALE, LEAST_STEP = tl.constexpr(kv_format.EPS), tl.constexpr(kv_format.LEAST_STEP)
FAR = 1 << 31
"""Elements that lie so far apart need 64 bits of address."""


@triton.jit
def _places(
    slot_ptr,
    tile,
    T,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    FAR: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Block, token in it and head of a tile's rows, and whether there are any: for every lane."""
    token, head = tile_rows(HEADS, WARPS)
    # each lane asks for itself
    token = tl.broadcast_to(token[None], (LANES, 8, WARPS, 2))
    first = tile // (K // HEADS) * (16 * WARPS // HEADS)
    slot = tl.load(slot_ptr + first + token, mask=token < T - first, other=-1).to(tl.int32)
    there = slot.to(tl.uint32)
    block = (there // BLOCK).to(tl.int64 if FAR else tl.int32)
    head = head[None] + tile % (K // HEADS) * HEADS
    return block, (there % BLOCK).to(tl.int32), head, slot >= 0


# a stride of one, or a one, would show the compiler what lies beside each other in memory, and it
# would move that between threads, for a thread to store more of it at once
@triton.jit(do_not_specialize=["scale_stride_head", "one"])
def _write_lifted_kernel(
    x_ptr,
    matrix_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    slot_ptr,
    x_strides,
    code_strides,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    T,
    tiles,
    one,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    GAIN: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE_STEPS: tl.constexpr,
    L: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    U: tl.constexpr,
    UNITS: tl.constexpr,
    P: tl.constexpr,
    AWAY: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    FAR: tl.constexpr,
    WARPS: tl.constexpr,
):
    ROTATED: tl.constexpr = matrix_ptr is not None
    WORDS: tl.constexpr = x_ptr.dtype.element_ty == tl.int32
    EXACT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    COLUMNS: tl.constexpr = S // 2 if WORDS else S
    WIDTH: tl.constexpr = D // 2 if WORDS else D
    lane = tl.arange(0, LANES)[:, None, None, None]
    first_tile, all_programs = tl.program_id(0), tl.num_programs(0)
    x = load_tile(x_ptr, first_tile, T, x_strides, K, WIDTH, HEADS, COLUMNS, SLICES, FAR, WARPS)
    if ROTATED:
        matrices = load_matrices(matrix_ptr, L, CHUNKS)
        # once, or threads would wait for each other before every product
        tl.debug_barrier()
    for tile in range(first_tile, tiles, all_programs):
        block, place, head, kept = _places(slot_ptr, tile, T, K, BLOCK, HEADS, LANES, FAR, WARPS)
        exponent_R = exponents(x, WORDS)
        factor_R = (exponent_R + (9 << 23)).to(tl.float32, bitcast=True)
        pairs = lifted(x, exponent_R, WORDS)
        if KIND == "int2":
            mean_R = mean_square(pairs, D, SLICE_STEPS, EXACT)
            step_R, inverse_R = int2_step_inverse(tl.maximum(mean_R, LEAST_MEAN), GAIN)
            zero_R = step_R
        else:
            factor_R *= 1.0 / GAIN
        if ROTATED:
            operands = operands_of(pairs, CHUNKS, L // S)
        else:
            chunks = [whole(pair) for pair in pairs]
        ahead = tl.minimum(tile + all_programs, tiles - 1)
        x = load_tile(x_ptr, ahead, T, x_strides, K, WIDTH, HEADS, COLUMNS, SLICES, FAR, WARPS)
        tile = loads_stay_before(tile)
        if ROTATED:
            chunks = rotated(operands, matrices, STEPS_ACROSS)

        if BITS == 8:
            step_R, inverse_R = step_and_inverse(chunks, KIND, LEAST_STEP)
        else:
            chunks = [words_of(chunk, P) for chunk in chunks]
            if KIND == "int4":
                step_R, inverse_R, zero_R = int4_step_inverse_zero(chunks)
        o = block * scale_stride_block + place * scale_stride_token + head * scale_stride_head
        scale_R = tl.maximum(step_R * factor_R, LEAST_SCALE)
        mask = kept & (lane == 0)
        tl.store(scale_ptr + o, among_lanes(scale_R, LANES, WARPS), mask=mask)
        if KIND == "int4":
            tl.store(zero_ptr + o, among_lanes(zero_R.to(tl.uint8), LANES, WARPS), mask=mask)
        o = block * code_strides[0] + place * code_strides[1] + head * code_strides[2]
        code_ptrs = code_ptr + (o * STRIDE + lane * one * (U // LANES))[:, :, :, :, None]
        for i in tl.static_range(CHUNKS):
            if BITS == 8:
                code_RU = codes(chunks[i], inverse_R, KIND, NATIVE)
            else:
                code_RU = packed(chunks[i], inverse_R, zero_R, KIND, BITS, AWAY)
            o_U = tl.arange(0, U // LANES)[None, None, None, None, :] + i * U
            mask = kept[:, :, :, :, None]
            if (i + 1) * U > UNITS:
                mask = mask & (o_U + lane[:, :, :, :, None] * (U // LANES) < UNITS)
            tl.store(code_ptrs + o_U, runs_of_lanes(code_RU, LANES, WARPS), mask=mask)


def _extent(x: Tensor) -> int:
    """Elements from the first to the last."""
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _programs(device: torch.device) -> int:
    """As many programs as a GPU holds at a time, of which each takes many tiles."""
    if device.type != "cuda":
        return 1
    return 3 * multiprocessors(device)


def _as_words(x_TKD: Tensor) -> Tensor:
    """Bf16 heads as words of two where they lie so, int32 [T, K, D / 2]; others as they are."""
    even = x_TKD.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x_TKD.stride()[:2])
    if x_TKD.dtype != torch.bfloat16 or INTERPRETED or not even:
        return x_TKD
    return x_TKD.view(torch.int32)


def _units(code: Tensor, bits: int, run: int) -> Tensor:
    """A cache's bytes as what is stored at once: words, where the `run` of a thread fills one."""
    if bits == 8:
        return code
    apart = (*code.stride()[:-1], code.storage_offset(), code.shape[-1])
    whole = run * bits >= 32 and all(n % 4 == 0 for n in apart)
    return code.view(torch.int32 if whole else torch.int16)


def write_lifted(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """`write_token_head` for formats with a rotation or of less than 8 bits.

    Raises ValueError for heads that `rotation_matrix` refuses.
    """
    T, K, D = x_TKD.shape
    if x_TKD.stride(0) >= 1 << 24:  # 32 bits address the tokens of a tile
        x_TKD = x_TKD.contiguous()
    bits, is_rotated = cache.fmt.bits, cache.rotation is not Rotation.NONE
    size, block = load_size(D), rotation_block(D)
    slices = triton.cdiv(D, chunk_size(D)) * (chunk_size(D) // size)
    chunk = chunk_size(D) if is_rotated else size
    chunks, heads = triton.cdiv(D, size) * size // chunk, min(K & -K, ROWS)
    x = _as_words(x_TKD)
    code = _units(cache.code, bits, chunk // 4 if is_rotated else 8)
    strides, units, unit_bits = code.stride()[:3], code.shape[-1], 8 * code.itemsize
    # in whole heads, where they are, so that the compiler knows that addresses are aligned
    stride = units if all(stride % units == 0 for stride in strides) else 1
    unit_words = unit_bits // bits // 2
    tiles = triton.cdiv(T, ROWS // heads) * (K // heads)
    _write_lifted_kernel[(min(tiles, _programs(x.device)),)](
        *(x, rotation_matrix(D, cache.rotation, x.device) if is_rotated else None, code),
        *(cache.scale, cache.zero, slot_T),
        *(x.stride()[:2], tuple(s // stride for s in strides)),
        *cache.scale.stride(),
        *(T, tiles, 1),
        K=K,
        D=D,
        BLOCK=cache.code.shape[1],
        KIND=cache.fmt.name.partition("_")[0],
        BITS=bits,
        NATIVE=has_native_e4m3(x.device),
        GAIN=block**0.5 if is_rotated else 1.0,
        HEADS=heads,
        S=size,
        SLICES=slices,
        SLICE_STEPS=size.bit_length() - 2,
        L=chunk,
        CHUNKS=chunks,
        STEPS_ACROSS=max(0, block.bit_length() - chunk.bit_length()) if is_rotated else 0,
        U=chunk * bits // unit_bits,
        UNITS=units,
        P=unit_words,
        AWAY=take_away(unit_words, bits),
        STRIDE=stride,
        LANES=min(4, chunk * bits // unit_bits),
        FAR=max(_extent(t) for t in (x, code, cache.scale)) >= FAR,
        WARPS=WARPS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
