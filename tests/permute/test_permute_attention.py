"""The proof: attention does not change when q/k tensors and RoPE change order together, and does
as soon as one tensor is forgotten. In float64, for every format, after dequantization.

Shape letters: T tokens, H heads, D head_dim, R rows (H x D), C columns.
"""

from __future__ import annotations

import pytest
import torch
from permute_formats import BLOCK, FORMATS, Tensors, permute_projection
from torch import Tensor

from ckptq.errors import PlanError
from ckptq.permute.effect import Move, Projection, effect_on
from ckptq.rope_order import Heads, RopeOrder
from ckptq.spec import spec_of

HALF, INTER = RopeOrder.HALF_SPLIT, RopeOrder.INTERLEAVED
COLUMNS, TOKENS = 160, 7
GEOMETRIES = {
    "gqa-128": (Heads(4, 128), Heads(2, 128)),
    "mqa-64": (Heads(6, 64), Heads(1, 64)),
    "mha-partial": (Heads(3, 128, 32), Heads(3, 128, 32)),
}


def angles_TP(rotary_dim: int) -> Tensor:
    """Rotation of each pair at each position, with a base small enough to turn every pair."""
    inverse_P = 50.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None] * inverse_P


def rope(x_THD: Tensor, rotary_dim: int, order: RopeOrder) -> Tensor:
    angle_T1P = angles_TP(rotary_dim)[:, None]
    turned, rest = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    if order is INTER:
        pair = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pair * torch.polar(torch.ones_like(angle_T1P), angle_T1P))
        return torch.cat([turned.flatten(-2), rest], -1)
    a, b = turned.chunk(2, -1)
    cos, sin = angle_T1P.cos(), angle_T1P.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(
    q: Tensors, k: Tensors, geometry: tuple[Heads, Heads], order: RopeOrder | None, name: str
) -> Tensor:
    """Causal attention of dequantized q/k on fixed inputs; `order` None is a layer without RoPE."""
    generator = torch.Generator().manual_seed(1)
    read = FORMATS[name].read
    wq_RC, wk_RC = read(q), read(k)
    x_TC = torch.randn(TOKENS, wq_RC.shape[1], generator=generator, dtype=torch.float64)
    q_heads, k_heads = geometry
    shape = (TOKENS, k_heads.count, k_heads.head_dim)
    v_THD = torch.randn(shape, generator=generator, dtype=torch.float64)
    q_THD = (x_TC @ wq_RC.T).unflatten(-1, (q_heads.count, -1))
    k_THD = (x_TC @ wk_RC.T).unflatten(-1, (k_heads.count, -1))
    if order is not None:
        q_THD = rope(q_THD, q_heads.rotary_dim, order)
        k_THD = rope(k_THD, k_heads.rotary_dim, order)
    out_HTD = torch.nn.functional.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_THD.transpose(0, 1)[None],
        v_THD.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    return out_HTD


def weight(heads: Heads, seed: int) -> Tensor:
    """Rows of very different sizes, each pushed to one side: scales and zero points must matter."""
    generator = torch.Generator().manual_seed(seed)
    size_R1 = torch.randn(heads.rows, 1, generator=generator).exp()
    side_R1 = torch.randn(heads.rows, 1, generator=generator)
    w_RC = torch.randn(heads.rows, COLUMNS, generator=generator) + side_R1
    return w_RC * size_R1 / 16


def stored(heads: Heads, name: str, seed: int) -> tuple[Projection, Tensors]:
    projection = Projection("attn.proj", heads, (BLOCK, BLOCK) if "block" in name else None)
    return projection, FORMATS[name].make(weight(heads, seed))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_attention_is_unchanged(name, geometry):
    (q_side, q), (k_side, k) = (
        stored(heads, name, seed) for seed, heads in enumerate(geometry, start=2)
    )
    want = attention(q, k, geometry, INTER, name)
    q_half = permute_projection(q, q_side, HALF)
    k_half = permute_projection(k, k_side, HALF)
    torch.testing.assert_close(
        attention(q_half, k_half, geometry, HALF, name), want, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_forgotten_tensor_is_noticed(name):
    """The check above must be able to fail: leave out any one tensor that moves, and it does."""
    geometry = GEOMETRIES["gqa-128"]
    (q_side, q), (k_side, k) = (
        stored(heads, name, seed) for seed, heads in enumerate(geometry, start=2)
    )
    want = attention(q, k, geometry, INTER, name)
    q_half, k_half = permute_projection(q, q_side, HALF), permute_projection(k, k_side, HALF)
    moving = [
        local
        for local, tensor in q.items()
        if effect_on(local, spec_of(tensor), q_side).move is not Move.KEPT
    ]
    assert moving
    forgetful = {f"q {local}": (q_half | {local: q[local]}, k_half) for local in moving}
    forgetful |= {f"k {local}": (q_half, k_half | {local: k[local]}) for local in moving}
    forgetful |= {"all of q": (q, k_half), "all of k": (q_half, k)}
    for what, (q_made, k_made) in forgetful.items():
        error = (attention(q_made, k_made, geometry, HALF, name) - want).abs().max()
        assert error > 1e-3, f"nobody would notice that {what} was forgotten"


@pytest.mark.parametrize("order", [None, INTER])
def test_layers_without_rope_may_be_in_either_order(order):
    """Without RoPE permuting q and k alike is no change; with it, RoPE must change too."""
    geometry = GEOMETRIES["gqa-128"]
    (q_side, q), (k_side, k) = (
        stored(heads, "fp8-channel", seed) for seed, heads in enumerate(geometry, start=2)
    )
    want = attention(q, k, geometry, order, "fp8-channel")
    q_half, k_half = permute_projection(q, q_side, HALF), permute_projection(k, k_side, HALF)
    error = (attention(q_half, k_half, geometry, order, "fp8-channel") - want).abs().max()
    assert bool(error < 1e-11) is (order is None)


def test_block_scales_that_cannot_follow_are_refused():
    heads = Heads(2, 256)
    projection, tensors = stored(heads, "fp8-block", seed=5)
    with pytest.raises(PlanError, match=r"attn\.proj\.weight_scale: .*between blocks of 128 rows"):
        permute_projection(tensors, projection, HALF)


def test_rope_of_this_file_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    x_THD = torch.randn(TOKENS, 2, 32)
    angle_TP = angles_TP(32).float()
    turns = torch.polar(torch.ones_like(angle_TP), angle_TP)[None]
    interleaved, _ = apply_rotary_emb(x_THD[None], x_THD[None], turns)
    torch.testing.assert_close(interleaved[0], rope(x_THD.double(), 32, INTER).float())
    cos, sin = (torch.cat([f(angle_TP)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    x_1HTD = x_THD.transpose(0, 1)[None]
    half_split, _ = apply_rotary_pos_emb(x_1HTD, x_1HTD, cos, sin)
    torch.testing.assert_close(
        half_split[0].transpose(0, 1), rope(x_THD.double(), 32, HALF).float()
    )
