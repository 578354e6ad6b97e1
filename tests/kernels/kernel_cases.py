"""Inputs and comparisons that the kernel tests share."""

import torch
from torch import Tensor


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal weights, each row of a size of its own, with a zero row and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 0.02
    x *= torch.randn(shape[:1], generator=generator).exp().view(-1, *[1] * (len(shape) - 1))
    x[len(x) // 2] = 0.0
    x.view(-1)[:: max(1, x.numel() // 3)] *= 30
    return x.to(dtype)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal to the bit, -0.0 apart from 0.0, shape and dtype included."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.dtype.itemsize]
    got = got.cpu()
    return got.dtype == want.dtype and torch.equal(
        got.contiguous().view(bits), want.contiguous().view(bits)
    )


def both_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return all(same(g, w) for g, w in zip(got, want, strict=True))
