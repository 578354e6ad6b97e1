"""What moves and what stays, tensor by tensor; there and back is the same to the last byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from permute_formats import BLOCK, FORMATS, pack_rows, permute_projection, unpack_rows
from torch import Tensor

from ckptq.errors import PlanError
from ckptq.permute.apply import (
    permute_packed_rows,
    permute_rows,
    permute_tensor,
    row_permutation,
)
from ckptq.permute.effect import Move, Part, Projection, effect_on, effect_on_attention
from ckptq.rope_order import Heads, RopeOrder, keeps_blocks
from ckptq.spec import DTYPES, TensorSpec, spec_of, torch_dtype

HALF, INTER = RopeOrder.HALF_SPLIT, RopeOrder.INTERLEAVED
Q = Projection("layers.0.self_attn.q_proj", Heads(4, 128))
SIDES = {
    "q": Projection("layers.0.self_attn", Heads(4, 128)),
    "k": Projection("layers.0.self_attn", Heads(2, 128)),
}


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def moves(local: str, dtype: str, *shape: int, projection: Projection = Q) -> Move:
    return effect_on(local, TensorSpec(dtype, shape), projection).move


@pytest.mark.parametrize(
    ("local", "dtype", "shape"),
    [
        ("weight", "BF16", (512, 64)),
        ("weight", "F8_E4M3", (512, 64)),
        ("weight", "I8", (512, 64)),
        ("weight_packed", "I32", (512, 8)),
        ("weight_packed", "U8", (512, 32)),
        ("bias", "BF16", (512,)),
        ("weight_scale", "BF16", (512, 1)),
        ("weight_scale", "BF16", (512,)),
        ("weight_scale", "BF16", (512, 4)),
        ("weight_scale", "U8", (512, 2)),
        ("weight_scale", "F8_E4M3", (512, 4)),
        ("weight_zero_point", "I8", (512, 1)),
        ("weight_zero_point", "I8", (512, 4)),
        ("output_scale", "BF16", (512, 1)),
    ],
)
def test_moved_with_the_rows(local, dtype, shape):
    assert moves(local, dtype, *shape) is Move.ROWS


@pytest.mark.parametrize(
    ("local", "dtype", "shape"),
    [
        ("weight_scale", "BF16", (1,)),
        ("weight_scale", "F32", ()),
        ("weight_scale", "BF16", (1, 1)),
        ("weight_scale", "BF16", (4, 1)),
        ("weight_scale_inv", "F32", (4, 2)),
        ("weight_zero_point", "I8", (1,)),
        ("weight_global_scale", "F32", (1,)),
        ("weight_shape", "I64", (2,)),
        ("weight_g_idx", "I32", (512,)),
        ("input_scale", "BF16", (1,)),
        ("input_global_scale", "F32", (1,)),
        ("input_zero_point", "I8", (1,)),
        ("q_scale", "BF16", (1,)),
        ("output_scale", "BF16", (4, 1, 1)),
    ],
)
def test_kept(local, dtype, shape):
    blocks = Projection(Q.name, Q.heads, block=(128, 128))
    assert moves(local, dtype, *shape, projection=blocks) is Move.KEPT


@pytest.mark.parametrize(("words", "bits"), [(48, 3), (64, 4), (128, 8)])
def test_packed_zero_points_tell_their_width(words, bits):
    effect = effect_on("weight_zero_point", TensorSpec("I32", (words, 4)), Q)
    assert (effect.move, effect.bits) == (Move.PACKED_ROWS, bits)


@pytest.mark.parametrize(
    ("local", "dtype", "shape", "reason"),
    [
        ("qweight", "I32", (8, 512), "no tensor of a q/k projection"),
        ("lora_A.weight", "BF16", (8, 512), "no tensor of a q/k projection"),
        (
            "weight",
            "BF16",
            (64, 512),
            r"BF16 \[64, 512\], expected 2 dimensions with 512 rows",
        ),
        ("weight", "BF16", (512,), "expected 2 dimensions"),
        ("bias", "BF16", (511,), "expected 1 dimensions with 512 rows"),
        ("weight_packed", "I32", (64, 512), "512 rows"),
        ("weight_scale", "BF16", (1, 512), "block_structure"),
        ("weight_scale", "BF16", (4, 1), "block_structure"),
        ("weight_zero_point", "I32", (100, 4), "does not hold 512 packed codes"),
        ("k_scale", "BF16", (3, 1, 1), "not clearly one value"),
    ],
)
def test_refused_by_name(local, dtype, shape, reason):
    with pytest.raises(PlanError, match=rf"{Q.name}\.{local}: .*{reason}"):
        effect_on(local, TensorSpec(dtype, shape), Q)


def test_block_grids_must_fit():
    blocks = Projection(Q.name, Q.heads, block=(128, 128))
    with pytest.raises(PlanError, match="expected 4 rows of blocks"):
        effect_on("weight_scale", TensorSpec("BF16", (5, 2)), blocks)


def test_packed_width_of_few_rows_must_be_said():
    few = Projection("q_proj", Heads(1, 8))
    spec = TensorSpec("I32", (1, 4))
    with pytest.raises(PlanError, match=r"of \[1, 2, 3, 4\] bits"):
        effect_on("weight_zero_point", spec, few)
    said = Projection("q_proj", Heads(1, 8), bits=4)
    assert effect_on("weight_zero_point", spec, said).bits == 4
    with pytest.raises(PlanError, match="of 8 bits"):
        effect_on("weight_zero_point", spec, Projection("q_proj", Heads(1, 8), bits=8))


@pytest.mark.parametrize(
    ("local", "shape", "move"),
    [
        ("q_scale", (1,), Move.KEPT),
        ("q_scale", (4,), Move.KEPT),
        ("q_scale", (4, 1, 1), Move.KEPT),
        ("q_scale", (512,), Move.ROWS),
        ("q_scale", (4, 1, 128), Move.ROWS),
        ("q_scale", (4, 128), Move.ROWS),
        ("k_scale", (2, 1, 1), Move.KEPT),
        ("k_scale", (256,), Move.ROWS),
        ("k_scale", (1, 1, 128), Move.ROWS),
        ("k_zero_point", (2, 1, 1), Move.KEPT),
        ("v_scale", (2, 1, 128), Move.KEPT),
        ("v_zero_point", (2, 1, 1), Move.KEPT),
        ("sinks", (4,), Move.KEPT),
        ("rotary_emb.inv_freq", (64,), Move.KEPT),
        ("q_norm.weight", (128,), Move.ROWS),
        ("k_norm.weight", (256,), Move.ROWS),
    ],
)
def test_attention_tensors(local, shape, move):
    assert effect_on_attention(local, TensorSpec("BF16", shape), SIDES).move is move


@pytest.mark.parametrize("name", ["k_cache", "q_norm.bias", "x"])
def test_unknown_attention_tensors_are_refused(name):
    with pytest.raises(PlanError, match=rf"self_attn\.{name}: "):
        effect_on_attention(name, TensorSpec("BF16", (4,)), SIDES)


def test_heads_and_channels_of_one_number_are_told_apart_or_refused():
    square = {side: Projection("attn", Heads(64, 64)) for side in "qk"}
    assert effect_on_attention("k_scale", TensorSpec("BF16", (64, 1, 1)), square).move is Move.KEPT
    assert effect_on_attention("k_scale", TensorSpec("BF16", (1, 1, 64)), square).move is Move.ROWS
    with pytest.raises(PlanError, match="not clearly"):
        effect_on_attention("k_scale", TensorSpec("BF16", (64,)), square)


def moved_of_attention(local: str, tensor: Tensor) -> Tensor:
    return permute_tensor(tensor, effect_on_attention(local, spec_of(tensor), SIDES), HALF)


def test_channels_move_alike_in_every_layout():
    x_R = torch.arange(256.0)
    want_R = x_R[row_permutation(Heads(2, 128), HALF)]
    for shape in [(256,), (256, 1), (2, 128), (2, 1, 128), (1, 2, 1, 128)]:
        moved = moved_of_attention("k_scale", x_R.reshape(shape))
        assert moved.shape == shape
        assert torch.equal(moved.flatten(), want_R)
    norm_D = moved_of_attention("q_norm.weight", x_R[:128])
    assert torch.equal(norm_D, want_R[:128])


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - {"C64"}))
def test_rows_of_every_dtype_move_bit_for_bit(dtype):
    """Random bytes, so NaNs with payloads among the floats."""
    heads, width = Heads(2, 6, 4), 3
    size = DTYPES[dtype][1]
    raw_RB = torch.randint(0, 2 if dtype == "BOOL" else 256, (heads.rows, width * size))
    raw_RB = raw_RB.to(torch.uint8)
    moved = permute_rows(raw_RB.view(torch_dtype(dtype)), heads, HALF)
    assert moved.dtype == torch_dtype(dtype)
    assert torch.equal(moved.view(torch.uint8), raw_RB[row_permutation(heads, HALF)])


@given(bits=st.integers(1, 8), heads=st.integers(1, 3), pairs=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_packed_rows_are_unpacked_permuted_and_packed(bits, heads, pairs):
    geometry = Heads(heads, 2 * pairs)
    code_RG = torch.randint(-(1 << bits - 1), 1 << bits - 1, (geometry.rows, 3))
    moved_WG = permute_packed_rows(pack_rows(code_RG, bits), geometry, bits, HALF)
    assert torch.equal(moved_WG, pack_rows(code_RG[row_permutation(geometry, HALF)], bits))
    assert torch.equal(
        unpack_rows(moved_WG, bits, geometry.rows), code_RG[row_permutation(geometry, HALF)]
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packing_is_that_of_compressed_tensors(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    heads = Heads(3, 20)
    code_RG = torch.randint(-(1 << bits - 1), 1 << bits - 1, (heads.rows, 5)).to(torch.int8)
    packed_WG = pack_to_int32(code_RG, bits, packed_dim=0)
    want_WG = pack_to_int32(code_RG[row_permutation(heads, HALF)], bits, packed_dim=0)
    assert torch.equal(permute_packed_rows(packed_WG, heads, bits, HALF), want_WG)
    assert not torch.equal(packed_WG, want_WG)


def test_bits_behind_the_last_row_are_kept():
    """Words that are padded with something else than zeros come back as they were."""
    words_WG = torch.full((2, 1), -1, dtype=torch.int32)
    assert torch.equal(permute_packed_rows(words_WG, Heads(1, 10), 4, HALF), words_WG)


@given(
    name=st.sampled_from(sorted(FORMATS)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    part_rotated=st.booleans(),
    first=st.sampled_from(RopeOrder),
)
@settings(max_examples=60, deadline=None)
def test_there_and_back_is_byte_identical(name, heads, head_dim, part_rotated, first):
    geometry = Heads(heads, head_dim, head_dim // 2 if part_rotated else head_dim)
    assume(name != "fp8-block" or keeps_blocks(geometry, BLOCK))
    projection = Projection("q_proj", geometry, (BLOCK, BLOCK))
    tensors = FORMATS[name].make(torch.randn(geometry.rows, 64))
    there = permute_projection(tensors, projection, first)
    back = permute_projection(there, projection, first.other)
    assert {n: t.dtype for n, t in there.items()} == {n: t.dtype for n, t in tensors.items()}
    assert {n: t.shape for n, t in there.items()} == {n: t.shape for n, t in tensors.items()}
    assert {n: bytes_of(t) for n, t in back.items()} == {n: bytes_of(t) for n, t in tensors.items()}
    weight = "weight_packed" if "weight_packed" in tensors else "weight"
    assert bytes_of(there[weight]) != bytes_of(tensors[weight])


@pytest.mark.parametrize(
    ("part", "moved"),
    [
        (Part.WEIGHTS, {"weight_packed"}),
        (Part.SCALES, {"weight_scale"}),
        (Part.ZERO_POINTS, {"weight_zero_point"}),
    ],
)
def test_only_one_part(part, moved):
    tensors = FORMATS["int4-group-asym"].make(torch.randn(512, 64) + torch.randn(512, 1))
    made = permute_projection(tensors, Q, HALF, only={part})
    assert {local for local in tensors if not torch.equal(made[local], tensors[local])} == moved


def test_parts_one_after_another_are_the_whole():
    tensors = FORMATS["int4-group-asym"].make(torch.randn(Q.heads.rows, 64))
    made = tensors
    for part in Part:
        made = permute_projection(made, Q, HALF, only={part})
    whole = permute_projection(tensors, Q, HALF)
    assert all(torch.equal(made[local], whole[local]) for local in tensors)


def test_an_unknown_tensor_is_refused_even_if_its_part_is_not_asked_for():
    with pytest.raises(PlanError, match="mystery"):
        permute_projection({"mystery": torch.ones(512)}, Q, HALF, only={Part.SCALES})
