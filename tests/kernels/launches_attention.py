"""One launch of each variant of the attention and KV-cache kernels, for compilation."""

import torch

from ckptq.kernels.attention.dense_attention import attention
from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.token_head.hadamard import rotate
from ckptq.kernels.token_head.kv_format import FP8 as KVFP8
from ckptq.kernels.token_head.kv_format import INT2, INT4, Rotation
from ckptq.kernels.token_head.kv_format import INT8 as KV8
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

FP8 = torch.float8_e4m3fn


def launch_all(device: torch.device) -> None:
    """Whole and padded, head sizes that are powers of two and not."""
    dense(device)
    paged(device)


def dense(device: torch.device) -> None:
    q = torch.zeros(1, 256, 8, 128, dtype=torch.bfloat16, device=device).transpose(1, 2)
    k = q[:, :2]
    attention(q, k, k, scaling=1.0, maxima=Maxima.zeros(8, 2, device))
    span = torch.full((1,), 200, dtype=torch.int32, device=device)
    local = Mask(sliding_window=64, chunk=128)
    narrow_q, narrow_k = q[..., :80].half(), k[..., :80].half()
    spans = (span - 200, span)
    attention(narrow_q, narrow_k, narrow_k, scaling=1.0, mask=local, softcap=9.0, spans=spans)
    wide = torch.zeros(1, 4, 256, 256, dtype=torch.bfloat16, device=device)
    attention(wide, wide, wide, scaling=1.0)
    attention(*[wide[..., :32].float()] * 3, scaling=1.0)


def paged(device: torch.device) -> None:
    x_TKD = torch.zeros(64, 2, 128, dtype=torch.bfloat16, device=device)
    slot_T = torch.arange(64, device=device)
    q_THD = torch.zeros(3, 8, 128, dtype=torch.bfloat16, device=device)
    sequences = Sequences(
        query_starts=torch.tensor([0, 3], dtype=torch.int32, device=device),
        lengths=torch.tensor([64], dtype=torch.int32, device=device),
        block_table=torch.arange(4, dtype=torch.int32, device=device)[None],
        longest=3,
    )
    cache = torch.zeros(4, 16, 2, 128, dtype=torch.bfloat16, device=device)
    write_cache(x_TKD, x_TKD, cache, cache, slot_T)
    paged_attention(q_THD, cache, cache, sequences, scaling=1.0)
    scale = torch.ones(2, dtype=torch.bfloat16, device=device)
    codes = cache.transpose(1, 2).contiguous().to(FP8).transpose(1, 2)
    write_cache(x_TKD, x_TKD, codes, codes, slot_T, k_scale=scale, v_scale=scale)
    paged_attention(q_THD, codes, codes, sequences, scaling=1.0, descales=(scale[:1], scale, scale))
    local = {"scaling": 1.0, "mask": Mask(sliding_window=64, chunk=128), "softcap": 9.0}
    # one key/value head of the largest size for 128 query heads
    many = torch.zeros(3, 128, 256, dtype=torch.bfloat16, device=device)
    wide = torch.zeros(4, 16, 1, 256, dtype=torch.bfloat16, device=device)
    paged_attention(many, wide, wide, sequences, **local)
    held = TokenHeadCache.empty(KV8, 4, 16, 1, 256, device=device)
    token_head_attention(many, held, held, sequences, **local)
    for fmt, D in ((KVFP8, 128), (INT4, 96)):  # the others in `decode`
        held = TokenHeadCache.empty(fmt, 4, 16, 2, D, device=device)
        write_token_head(x_TKD[..., :D], held, slot_T)
        token_head_attention(q_THD[..., :D], held, held, sequences, scaling=1.0)
    held = TokenHeadCache.empty(INT4, 4, 16, 2, 32, device=device)
    token_head_attention(q_THD[..., :32].float(), held, held, sequences, scaling=1.0)
    for fmt in (INT4, INT2):
        plain = TokenHeadCache.empty(fmt, 4, 16, 2, 128, device=device, rotation=Rotation.NONE)
        write_token_head(x_TKD, plain, slot_T)
    decode(device)
    rotate(x_TKD, Rotation.SIGNED)
    rotate(x_TKD.float(), Rotation.HADAMARD, torch.bfloat16, inverse=True)


def decode(device: torch.device) -> None:
    """One query of each sequence, over keys enough for several programs."""
    ints = {"dtype": torch.int32, "device": device}
    sequences = Sequences(
        query_starts=torch.arange(3, **ints),
        lengths=torch.full((2,), 2048, **ints),
        block_table=torch.arange(256, **ints).view(2, 128),
        longest=1,
    )
    q_THD = torch.zeros(2, 8, 128, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(256, 16, 2, 128, dtype=torch.bfloat16, device=device)
    paged_attention(q_THD, cache, cache, sequences, scaling=1.0)
    codes, one = cache.to(FP8), torch.ones(1, device=device)
    paged_attention(q_THD, codes, codes, sequences, scaling=1.0, descales=(one, one, one))
    for fmt in (KV8, INT2):
        held = TokenHeadCache.empty(fmt, 256, 16, 2, 128, device=device)
        write_token_head(q_THD[:, :2], held, torch.arange(2, device=device))
        token_head_attention(q_THD, held, held, sequences, scaling=1.0)
