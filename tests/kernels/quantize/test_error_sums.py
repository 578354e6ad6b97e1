"""What a search adds up: each weight's share as torch computes it, bit for bit, and the sums of
those."""

import pytest
import torch
from torch import Tensor

from ckptq.kernels.quantize.error_sums import error_sums
from ckptq.quantize import certain
from ckptq.quantize import search as searching
from ckptq.quantize.formats import quantize
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.tile_error import powered_errors, powers
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.load import load_scheme

DTYPES = (torch.bfloat16, torch.float16)
SCHEMES = ("fp8-dynamic", "w8a8", "w4a16", "w4a16-asym", "nvfp4a16", "mxfp4a16")


def scheme_of(name: str) -> WeightScheme:
    (group,) = load_scheme(f"{name}-search").groups
    return group.weight_scheme()


def from_torch(
    x_TL: Tensor, scale_KT: Tensor, zero_KT: Tensor | None, scheme: WeightScheme
) -> Tensor:
    """[K, T, L] float64: the powered errors."""
    found = []
    for k, scale_T in enumerate(scale_KT):
        zero_T1 = None if zero_KT is None else zero_KT[k][:, None]
        each = powered_errors(x_TL, scale_T[:, None], zero_T1, scheme, 2.4, Scratch())
        found.append(each.double())
    return torch.stack(found)


def from_kernel(
    x_TL: Tensor, scale_KT: Tensor, zero_KT: Tensor | None, scheme: WeightScheme, on: torch.device
) -> Tensor:
    zero = None if zero_KT is None else zero_KT.to(on)
    power_N = powers(x_TL.dtype, 2.4, torch.device("cpu")).to(on)
    codes = (scheme.type, scheme.num_bits)
    return error_sums(x_TL.to(on), scale_KT.to(on), zero, power_N, codes).cpu()


def every(dtype: torch.dtype, step: int) -> Tensor:
    """Numbers of both signs, in steps of their bits, from 2^-14 to 2^4: others hardly occur."""
    bits = torch.arange(1 << 15, dtype=torch.int16)[::step]
    x = bits.view(dtype)
    x = x[(x.abs() < 16) & ((x.abs() > 2.0**-14) | (x == 0))]
    return torch.cat((x, -x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_each_weight_counts_as_torch_has_it(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Tiles of one weight, so that nothing is added up; scales of many mantissas."""
    scheme, x = scheme_of(name), every(dtype, 3 if device.type == "cuda" else 53)
    scale = torch.arange(1, 2, 1 / 5).repeat(2) * torch.tensor([2.0**-6, 2.0**-2] * 5)
    scale_KT = scale.to(dtype)[:, None].expand(-1, len(x)).contiguous()
    if name == "mxfp4a16":
        scale_KT = (scale_KT / scale_KT * 2.0**-5).contiguous()
    zero_KT = None
    if not scheme.symmetric:
        zero_KT = (torch.arange(scale_KT.numel()) % 16 - 8).to(torch.int8).view(scale_KT.shape)
    given = (x[:, None], scale_KT, zero_KT, scheme)
    assert torch.equal(from_kernel(*given, device).double(), from_torch(*given)[..., 0])


@pytest.mark.parametrize(("tiles", "length"), [(3, 16), (65, 32), (5, 128), (2, 576), (1, 2500)])
@pytest.mark.parametrize("name", ["w4a16-asym", "fp8-dynamic", "nvfp4a16"])
def test_sums_are_rounded_once(name: str, tiles: int, length: int, device: torch.device) -> None:
    """Tiles that fill no block of the kernel, and rows that take several."""
    scheme, generator = scheme_of(name), torch.Generator().manual_seed(0)
    x_TL = (torch.randn(tiles, length, generator=generator) * 0.1).bfloat16()
    scale_KT = (torch.rand(2, tiles, generator=generator) * 0.02 + 0.01).bfloat16()
    zero_KT = None
    if not scheme.symmetric:
        zero_KT = torch.randint(-8, 8, scale_KT.shape, generator=generator, dtype=torch.int8)
    given = (x_TL, scale_KT, zero_KT, scheme)
    want_KT = from_torch(*given).sum(-1)
    got_KT = from_kernel(*given, device).double()
    assert ((got_KT - want_KT).abs() <= want_KT * 2.0**-24 * 1.000001).all()
    assert (want_KT > 0).all()


@pytest.mark.parametrize("name", ["w4a16-asym", "fp8-dynamic", "mxfp4a16"])
def test_a_search_by_the_kernel_ends_as_on_the_cores(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, generator = scheme_of(name), torch.Generator().manual_seed(2)
    w_RC = (torch.randn(9, 384, generator=generator) ** 3 * 0.02).bfloat16()
    monkeypatch.setattr(searching, "has_table", lambda *_: False)
    want = {local: tensor.clone() for local, tensor in quantize(w_RC, scheme).items()}
    monkeypatch.setattr(searching, "_on_cores", lambda _x: False)
    monkeypatch.setattr(certain, "on_gpu", lambda _x: True)
    got = quantize(w_RC.to(device), scheme)
    assert all(torch.equal(got[local].cpu(), want[local]) for local in want)
