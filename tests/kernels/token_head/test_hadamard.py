"""The rotation: its definition, its inverse, and equal bits in kernel and torch."""

import pytest
import torch
from kernel_cases import same

from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.hadamard import rotate
from ckptq.kernels.token_head.kv_format import Rotation, rotation_block

SIZES = pytest.mark.parametrize("D", [64, 80, 96, 128])
TURNS = pytest.mark.parametrize("rotation", list(Rotation))


def heads(D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(9, 5, D, generator=torch.Generator().manual_seed(D)).to(dtype)


def matrix(D: int, rotation: Rotation) -> torch.Tensor:
    """What `rotate` multiplies rows with, float64 [D, D], from the definition."""
    if rotation is Rotation.NONE:
        return torch.eye(D, dtype=torch.float64)
    block = rotation_block(D)
    dense = torch.block_diag(*[kv.hadamard_matrix(block)] * (D // block))
    return kv.signs(D).double()[:, None] * dense if rotation is Rotation.SIGNED else dense


def test_hadamard_of_four() -> None:
    want = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(kv.hadamard_matrix(4) * 2, torch.tensor(want).double())


@SIZES
@TURNS
def test_the_reference_is_the_matrix_and_orthonormal(D: int, rotation: Rotation) -> None:
    x, R = heads(D), matrix(D, rotation)
    assert torch.allclose(R @ R.T, torch.eye(D, dtype=torch.float64), atol=1e-14)
    turned = kv.rotate(x, rotation)
    assert (turned - x.double() @ R).abs().max() < 2e-6
    assert (kv.unrotate(turned, rotation) - x).abs().max() < 2e-6


@SIZES
@TURNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_is_the_reference(
    device: torch.device, D: int, rotation: Rotation, dtype: torch.dtype
) -> None:
    x = heads(D, dtype)
    assert same(rotate(x.to(device), rotation), kv.rotate(x, rotation).to(dtype))
    back = rotate(x.to(device), rotation, torch.float32, inverse=True)
    assert same(back, kv.unrotate(x, rotation))


def test_signs_spread_values_that_are_alike() -> None:
    """Without them a constant head lands on one coordinate; with them on none in particular."""
    x = torch.ones(1, 128)
    assert kv.rotate(x, Rotation.HADAMARD).abs().amax() == pytest.approx(128**0.5)
    assert kv.rotate(x, Rotation.SIGNED).abs().amax() < 4
    assert 40 < (kv.signs(128) > 0).sum() < 88


def wide_heads() -> torch.Tensor:
    """Bf16 heads whose values differ by up to 2^30, one of zeros."""
    x = heads(128, torch.bfloat16)
    x *= 2.0 ** torch.randint(-30, 1, (9, 5, 128), generator=torch.Generator().manual_seed(1))
    x[2, 1] = 0.0
    return x


def test_sums_on_the_grid_are_exact_in_any_order() -> None:
    x, plain = wide_heads(), kv.hadamard_matrix(128) * 128**0.5
    lifted, _ = kv.lift(x)
    grid = lifted.half().float()
    turned = kv.rotate_exactly(lifted, Rotation.HADAMARD)
    assert torch.equal(turned.double(), grid.double() @ plain.round())
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    shuffled = grid[..., order] @ plain.round().float()[order]
    assert torch.equal(turned, shuffled)
    off_grid = x.float() @ plain.round().float()
    assert not torch.equal(off_grid.double(), x.double() @ plain.round())


def test_the_grid_moves_only_small_values_of_a_head() -> None:
    x = wide_heads().float()
    lifted, unit = kv.lift(x)
    assert torch.equal(lifted * unit[..., None], x)
    assert (lifted.abs() < 2.0**-8).all()
    back, amax = lifted.half().float() * unit[..., None], x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= amax * 2.0**-16).all()
    large = x.abs() >= amax * 2.0**-8
    assert torch.equal(back[large], x[large])
    assert not torch.equal(back, x)
    assert ((back - x).abs() > amax * 2.0**-20).any()
