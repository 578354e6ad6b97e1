"""Rotate lifted heads exactly, by tensor cores.

Meaning: `reference.rotate_exactly`, to the bit. A lifted head is rounded to fp16, of which the
reference says why every sum of the rotation is then exact: the order in which tensor cores add does
not matter, and a product with the matrix of signs costs a tenth of what the butterflies do.

Nothing passes through shared memory but the matrix. Its rows are in the order in which threads hold
the columns of a loaded head, and its columns are such that a thread gets neighbouring columns of
the result, whose codes it packs.

Shape letters: D head dimension; R rows (heads of tokens), S columns of a slice, L columns of a
chunk, which one product rotates.
"""

from functools import cache as remembered

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.hadamard import across
from ckptq.kernels.token_head.kv_format import Rotation, chunk_size, load_size, rotation_block
from ckptq.kernels.token_head.kv_halves import halves
from ckptq.kernels.words import both


@triton.jit
def load_matrices(matrix_ptr, L: tl.constexpr, CHUNKS: tl.constexpr):
    """A tuple of fp16 [L, L], one for each chunk."""
    o_LL = tl.arange(0, L)[:, None] * L + tl.arange(0, L)[None, :]
    matrices = ()
    for c in tl.static_range(CHUNKS):
        m_LL = tl.load(matrix_ptr + c * L * L + o_LL)
        matrices = matrices + (m_LL,)  # type: ignore[assignment]  # noqa: RUF005
    return matrices


@triton.jit
def _on_grid(pair):
    """fp16 [R, S]; a thread's eight neighbours in pairs, as far apart as a product wants them."""
    word_RP = halves(pair[0], pair[1])
    word_RT4 = tl.reshape(word_RP, (word_RP.shape[0], word_RP.shape[1] // 4, 4))
    even, odd = both(tl.reshape(tl.trans(word_RT4, (0, 2, 1)), word_RP.shape), tl.float16)
    return tl.reshape(tl.join(even, odd), (word_RP.shape[0], 2 * word_RP.shape[1]))


@triton.jit
def _chunk(pairs, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT slices from FIRST on side by side: fp16 [R, L]."""
    x_RS = _on_grid(pairs[FIRST])
    ROWS: tl.constexpr = x_RS.shape[0]
    S: tl.constexpr = x_RS.shape[1]
    if COUNT == 1:
        return x_RS
    else:
        y_RS = _on_grid(pairs[FIRST + 1])
        if COUNT == 2:
            return tl.reshape(tl.trans(tl.join(x_RS, y_RS), (0, 2, 1)), (ROWS, 2 * S))
        else:
            z_RS = _on_grid(pairs[FIRST + 2])
            w_RS = _on_grid(pairs[FIRST + 3])
            x_RS22 = tl.join(tl.join(x_RS, z_RS), tl.join(y_RS, w_RS))
            return tl.reshape(tl.trans(x_RS22, (0, 2, 3, 1)), (ROWS, 4 * S))


@triton.jit
def operands_of(pairs, CHUNKS: tl.constexpr, PER: tl.constexpr):
    """Chunks of PER lifted slices each on the grid: what products take, fp16 [R, L]."""
    operands = ()
    for c in tl.static_range(CHUNKS):
        operands = operands + (_chunk(pairs, c * PER, PER),)  # type: ignore[assignment]  # noqa: RUF005
    return operands


@triton.jit
def _natural(x_RL):
    """Columns in their order again, those of a thread neighbours."""
    ROWS: tl.constexpr = x_RL.shape[0]
    x_R4C2 = tl.trans(tl.reshape(x_RL, (ROWS, x_RL.shape[1] // 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(x_R4C2, x_RL.shape)


@triton.jit
def rotated(operands, matrices, STEPS_ACROSS: tl.constexpr):
    """Chunks of the rotated rows, fp32 [R, L] each, without the norm."""
    chunks = ()
    for c in tl.static_range(len(operands)):
        product_RL = tl.dot(operands[c], matrices[c])
        chunks = chunks + (_natural(product_RL),)  # type: ignore[assignment]  # noqa: RUF005
    for step in tl.static_range(STEPS_ACROSS):
        chunks = across(chunks, 1 << step)
    return chunks


@remembered
def rotation_matrix(head_dim: int, rotation: Rotation, device: torch.device) -> Tensor:
    """Signs of the rotation, fp16 [chunks, L, L], in the order of columns of the kernel.

    Position p of a chunk's input is one of a slice of S columns: of eight neighbours that a thread
    loads, `_on_grid` moves the pairs apart. Position p of its output is column
    L / 4 * (p / 2 % 4) + 2 * (p / 8) + p % 2, which `_natural` undoes.

    Raises ValueError for heads of blocks over 256, whose sums would not be exact, or under 8.
    """
    size, block = chunk_size(head_dim), rotation_block(head_dim)
    if not 8 <= block <= 256:
        raise ValueError(
            f"want a head size in eights whose power of two is at most 256: {head_dim}"
        )
    within = min(size, block)
    chunk = (kv.hadamard_matrix(within) * within**0.5).round()
    chunk = torch.block_diag(*[chunk] * (size // within))
    signs = torch.ones(-(-head_dim // size) * size, dtype=torch.float64)
    if rotation is Rotation.SIGNED:
        signs[:head_dim] = kv.signs(head_dim).double()
    p = torch.arange(size)
    lanes = load_size(head_dim) // 8
    pair, within_slice = p // 2 % lanes * 8 + p % 2, p % (8 * lanes)
    source = p // (8 * lanes) * (8 * lanes) + pair + within_slice // (2 * lanes) * 2
    target = size // 4 * (p // 2 % 4) + p // 8 * 2 + p % 2
    weighted = signs.view(-1, size, 1) * chunk
    return weighted[:, source][:, :, target].half().contiguous().to(device)
