"""Rotate heads exactly by tensor cores, quantize them and write them into a paged cache.

Meaning: `reference.kv.quantize` of a rotated format, to the bit. A head times a power of two is
rounded to fp16, of which `reference.kv.on_grid` says why every sum of the rotation is then exact:
the order in which tensor cores add does not matter, and a product with the matrix of signs costs a
tenth of the additions of the butterflies.

Nothing passes through shared memory but the matrix. The rows of the matrix are in the order in
which threads hold the columns of a loaded head, and its columns are such that a thread gets
neighbouring columns of the result, whose codes it packs. The next tile is loaded while one is
quantized.

Shape letters: T tokens, K key/value heads, D head dimension; R rows of a tile (heads of tokens),
S columns of a loaded slice, L columns of a chunk (rotated by one product), H halfwords of a chunk.
"""

from __future__ import annotations

from functools import cache as remembered
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.codes import absmax_of
from ckptq.kernels.hadamard import across
from ckptq.kernels.kv_codes import codes, halfwords, step_inverse_zero
from ckptq.kernels.kv_format import EPS, LEAST_STEP, Rotation, chunk_size, rotation_block
from ckptq.kernels.reference import kv
from ckptq.kernels.rounding import has_native_e4m3, widen

if TYPE_CHECKING:
    from ckptq.kernels.token_head_cache import TokenHeadCache

WARPS = 4
ROWS = 16 * WARPS
"""Rows of a tile, as many as one product of four warps takes."""


@triton.jit
def _tile_rows(HEADS: tl.constexpr, WARPS: tl.constexpr):
    """Token and head of each row of a tile, [8, WARPS, 2]: so threads hold a product's rows."""
    row = tl.arange(0, 8)[:, None, None] + 16 * tl.arange(0, WARPS)[None, :, None]
    row += 8 * tl.arange(0, 2)[None, None, :]
    return row // HEADS, row % HEADS


@triton.jit
def _in_order(x_8W2, WARPS: tl.constexpr):
    """[8, WARPS, 2, ...] -> [R, ...]."""
    if len(x_8W2.shape) == 4:
        return tl.reshape(tl.trans(x_8W2, (1, 2, 0, 3)), (16 * WARPS, x_8W2.shape[3]))
    else:
        return tl.reshape(tl.trans(x_8W2, (1, 2, 0)), (16 * WARPS,))


@triton.jit
def _as_tile(x_R, WARPS: tl.constexpr):
    """[R, ...] -> [8, WARPS, 2, ...]."""
    if len(x_R.shape) == 2:
        return tl.trans(tl.reshape(x_R, (WARPS, 2, 8, x_R.shape[1])), (2, 0, 1, 3))
    else:
        return tl.trans(tl.reshape(x_R, (WARPS, 2, 8)), (2, 0, 1))


@triton.jit
def _load_tile(
    x_ptr,
    tile,
    T,
    stride_t,
    stride_h,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The heads of a tile as SLICES of [R, S], zeros where there are none."""
    token, head = _tile_rows(HEADS, WARPS)
    first = tile // (K // HEADS) * (16 * WARPS // HEADS)
    x_ptr += first.to(tl.int64) * stride_t + tile % (K // HEADS) * HEADS * stride_h
    col_S = tl.arange(0, S)[None, None, None, :]
    ptrs = x_ptr + (token * stride_t + head * stride_h)[:, :, :, None] + col_S
    there = (token < T - first)[:, :, :, None]
    slices = ()
    for s in tl.static_range(SLICES):
        mask = there if (s + 1) * S <= D else there & (col_S < D - s * S)
        x_RS = _in_order(tl.load(ptrs + s * S, mask=mask, other=0.0), WARPS)
        slices = slices + (x_RS,)  # type: ignore[assignment]  # noqa: RUF005
    return slices


@triton.jit
def _exponents(slices, SLICES: tl.constexpr):
    """int32 [R]: the exponent bits of each row's largest absolute value, within bounds."""
    bits_R = tl.max(absmax_of(slices, SLICES), 1).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(bits_R & 0x7F800000, 87 << 23), 244 << 23)


@triton.jit
def _on_grid(x_RS, lift_R1):
    """fp16 [R, S]; a thread's eight neighbours in pairs, as far apart as a product wants them."""
    ROWS: tl.constexpr = x_RS.shape[0]
    grid_RS = (widen(x_RS) * lift_R1).to(tl.float16)
    pairs_RT42 = tl.reshape(grid_RS, (ROWS, x_RS.shape[1] // 8, 4, 2))
    return tl.reshape(tl.trans(pairs_RT42, (0, 2, 1, 3)), x_RS.shape)


@triton.jit
def _chunk(slices, lift_R1, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT slices from FIRST on side by side: fp16 [R, L]."""
    ROWS: tl.constexpr = slices[0].shape[0]
    S: tl.constexpr = slices[0].shape[1]
    x_RS = _on_grid(slices[FIRST], lift_R1)
    if COUNT == 1:
        return x_RS
    else:
        y_RS = _on_grid(slices[FIRST + 1], lift_R1)
        if COUNT == 2:
            return tl.reshape(tl.trans(tl.join(x_RS, y_RS), (0, 2, 1)), (ROWS, 2 * S))
        else:
            z_RS = _on_grid(slices[FIRST + 2], lift_R1)
            w_RS = _on_grid(slices[FIRST + 3], lift_R1)
            x_RS22 = tl.join(tl.join(x_RS, z_RS), tl.join(y_RS, w_RS))
            return tl.reshape(tl.trans(x_RS22, (0, 2, 3, 1)), (ROWS, 4 * S))


@triton.jit
def _natural(x_RL):
    """Columns in their order again, those of a thread neighbours."""
    ROWS: tl.constexpr = x_RL.shape[0]
    x_R4C2 = tl.trans(tl.reshape(x_RL, (ROWS, x_RL.shape[1] // 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(x_R4C2, x_RL.shape)


@triton.jit
def _load_matrices(matrix_ptr, L: tl.constexpr, CHUNKS: tl.constexpr):
    o_LL = tl.arange(0, L)[:, None] * L + tl.arange(0, L)[None, :]
    matrices = ()
    for c in tl.static_range(CHUNKS):
        m_LL = tl.load(matrix_ptr + c * L * L + o_LL)
        matrices = matrices + (m_LL,)  # type: ignore[assignment]  # noqa: RUF005
    return matrices


@triton.jit
def _rotated(slices, matrices, lift_R1, CHUNKS: tl.constexpr, STEPS_ACROSS: tl.constexpr):
    """Chunks of the rotated rows, fp32 [R, L] each, without the norm."""
    PER: tl.constexpr = matrices[0].shape[0] // slices[0].shape[1]
    chunks = ()
    for c in tl.static_range(CHUNKS):
        product_RL = tl.dot(_chunk(slices, lift_R1, c * PER, PER), matrices[c])
        chunks = chunks + (_natural(product_RL),)  # type: ignore[assignment]  # noqa: RUF005
    for step in tl.static_range(STEPS_ACROSS):
        chunks = across(chunks, 1 << step, CHUNKS)
    return chunks


@triton.jit
def _write_rotated_kernel(
    x_ptr,
    matrix_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    slot_ptr,
    x_stride_t,
    x_stride_h,
    code_stride_block,
    code_stride_token,
    code_stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    T,
    tiles,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    SLICES: tl.constexpr,
    L: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    UNIT: tl.constexpr,
    WARPS: tl.constexpr,
):
    matrices = _load_matrices(matrix_ptr, L, CHUNKS)
    token, row_head = _tile_rows(HEADS, WARPS)
    first_tile, all_programs = tl.program_id(0), tl.num_programs(0)
    x = _load_tile(x_ptr, first_tile, T, x_stride_t, x_stride_h, K, D, HEADS, S, SLICES, WARPS)
    for tile in range(first_tile, tiles, all_programs):
        first = tile // (K // HEADS) * (16 * WARPS // HEADS)
        head = row_head + tile % (K // HEADS) * HEADS
        slot = tl.load(slot_ptr + first + token, mask=token < T - first, other=-1).to(tl.int32)
        # not int64 before here, or each address would be moved between threads
        block, place, kept = (slot // BLOCK).to(tl.int64), slot % BLOCK, slot >= 0
        exponent_R = _exponents(x, SLICES)
        lift_R1 = ((245 << 23) - exponent_R).to(tl.float32, bitcast=True)[:, None]
        factor_R = (exponent_R + (9 << 23)).to(tl.float32, bitcast=True) * NORM
        chunks = _rotated(x, matrices, lift_R1, CHUNKS, STEPS_ACROSS)
        ahead = tile + all_programs
        x = _load_tile(x_ptr, ahead, T, x_stride_t, x_stride_h, K, D, HEADS, S, SLICES, WARPS)

        step_R, inverse_R, zero_R = step_inverse_zero(chunks, KIND, LEAST, D, CHUNKS, STEPS_WITHIN)
        scale_R = tl.maximum(step_R * factor_R, EPS)
        o = block * scale_stride_block + place * scale_stride_token + head * scale_stride_head
        tl.store(scale_ptr + o, _as_tile(scale_R, WARPS), mask=kept)
        if KIND == "int4":
            tl.store(zero_ptr + o, _as_tile(zero_R.to(tl.uint8), WARPS), mask=kept)
        c = block * code_stride_block + place * code_stride_token + head * code_stride_head
        code_ptrs = code_ptr + (c * UNIT)[:, :, :, None]
        inverse_R1, zero_R1 = inverse_R[:, None], zero_R[:, None]
        H: tl.constexpr = L if BITS == 8 else L * BITS // 16
        for i in tl.static_range(CHUNKS):
            code_RH = codes(chunks[i], inverse_R1, zero_R1, KIND, NATIVE)
            if BITS < 8:
                code_RH = halfwords(code_RH, BITS)
            o_H = tl.arange(0, H)[None, None, None, :] + i * H
            mask = kept[:, :, :, None] & (o_H < D * H // L)
            tl.store(code_ptrs + o_H, _as_tile(code_RH, WARPS), mask=mask)


@remembered
def rotation_matrix(head_dim: int, rotation: Rotation, device: torch.device) -> Tensor:
    """Signs of the rotation, fp16 [chunks, L, L], in the order of columns of the kernel.

    Position p of a chunk's input is one of a slice of S columns: of eight neighbours that a thread
    loads, `_on_grid` moves the pairs apart. Position p of its output is column
    L / 4 * (p / 2 % 4) + 2 * (p / 8) + p % 2, which `_natural` undoes.
    """
    size, block = chunk_size(head_dim), rotation_block(head_dim)
    within = min(size, block)
    chunk = (kv.hadamard_matrix(within) * within**0.5).round()
    chunk = torch.block_diag(*[chunk] * (size // within))
    signs = torch.ones(-(-head_dim // size) * size, dtype=torch.float64)
    if rotation is Rotation.SIGNED:
        signs[:head_dim] = kv.signs(head_dim).double()
    p = torch.arange(size)
    lanes = min(size, 32) // 8
    pair, within_slice = p // 2 % lanes * 8 + p % 2, p % (8 * lanes)
    source = p // (8 * lanes) * (8 * lanes) + pair + within_slice // (2 * lanes) * 2
    target = size // 4 * (p // 2 % 4) + p // 8 * 2 + p % 2
    weighted = signs.view(-1, size, 1) * chunk
    return weighted[:, source][:, :, target].half().contiguous().to(device)


def _programs(device: torch.device) -> int:
    """As many programs as a GPU holds at a time, of which each takes many tiles."""
    if device.type != "cuda":
        return 1
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count


def write_rotated(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """`write_token_head` for formats with a rotation, of heads of 8 to 256 times some odd number.

    Raises ValueError where heads are larger powers of two: their sums would not be exact.
    """
    T, K, D = x_TKD.shape
    size, block, bits = chunk_size(D), rotation_block(D), cache.fmt.bits
    if not 8 <= block <= 256:
        raise ValueError(f"want a head size in eights whose power of two is at most 256, got {D}")
    # what packs several codes stores halfwords: pointers and strides count those
    code = cache.code if bits == 8 else cache.code.view(torch.int16)
    strides, width = cache.layout.strides(code), code.shape[-1]
    # in whole heads, where they are, so that the compiler knows that addresses are aligned
    unit = width if all(stride % width == 0 for stride in strides) else 1
    chunks, heads = triton.cdiv(D, size), min(K & -K, ROWS)
    tiles = triton.cdiv(T, ROWS // heads) * (K // heads)
    _write_rotated_kernel[(min(tiles, _programs(x_TKD.device)),)](
        *(x_TKD, rotation_matrix(D, cache.rotation, x_TKD.device), code),
        *(cache.scale, cache.zero, slot_T),
        *x_TKD.stride()[:2],
        *(stride // unit for stride in strides),
        *cache.layout.strides(cache.scale),
        *(T, tiles),
        K=K,
        D=D,
        BLOCK=cache.layout.sizes(cache.code)[0],
        KIND=cache.fmt.name.partition("_")[0],
        BITS=bits,
        NATIVE=has_native_e4m3(x_TKD.device),
        EPS=EPS,
        LEAST=LEAST_STEP,
        NORM=block**-0.5,
        HEADS=heads,
        S=min(size, 32),
        SLICES=chunks * (size // min(size, 32)),
        L=size,
        CHUNKS=chunks,
        STEPS_WITHIN=size.bit_length() - 1,
        STEPS_ACROSS=max(0, block.bit_length() - size.bit_length()),
        UNIT=unit,
        WARPS=WARPS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
