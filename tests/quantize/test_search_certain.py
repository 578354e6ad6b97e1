"""Where weights are on a GPU, a search chooses what the CPU chooses.

Without a GPU its path runs on CPU tensors, with sums that are off by as much as they may be there.
"""

from __future__ import annotations

import pytest
import torch
from test_search_table import SCHEMES, scheme_of, weights
from torch import Tensor

from ckptq.quantize import certain
from ckptq.quantize import search as searching
from ckptq.quantize.formats import needs_statistic, quantize, statistic
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.search import best_ranges
from ckptq.quantize.tiles import NonFinite, tiled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def elsewhere(monkeypatch: pytest.MonkeyPatch, off_by: float = 1.0) -> list[int]:
    """Search as on a GPU, with sums that are wrong by that many units of 2^-24, up or down; how
    many tiles the CPU is asked about is noted."""
    monkeypatch.setattr(searching, "_on_cores", lambda _x: False)
    sums, on_cores, asked = certain._sums, certain._on_cores, []
    generator = torch.Generator().manual_seed(0)

    def other_sums(*args: object) -> Tensor:
        sum_KT = sums(*args)
        sign_KT = torch.randint(0, 2, sum_KT.shape, generator=generator) * 2 - 1
        return sum_KT * (1 + sign_KT * off_by * 2.0**-24)

    def noted(x_SL: Tensor, *args: object) -> Tensor:
        asked.append(len(x_SL))
        return on_cores(x_SL, *args)

    monkeypatch.setattr(certain, "_sums", other_sums)
    monkeypatch.setattr(certain, "_on_cores", noted)
    return asked


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few weights are computed sooner than a table for them."""
    monkeypatch.setattr(searching, "has_table", lambda *_: False)


def hard(dtype: torch.dtype) -> Tensor:
    """Weights with zeros, outliers and rows of many sizes, and rows in which candidates tie: one
    weight that is not zero, all of one size, powers of two, numbers that INT4 and E2M1 can hold."""
    x_RC = weights(24, 384).float()
    x_RC[0] = 0
    x_RC[1], x_RC[1, ::32] = 0, 0.3
    x_RC[2] = 0.02
    x_RC[3] = -0.02
    x_RC[4] = 2.0 ** -(torch.arange(384) % 7)
    x_RC[5] = (torch.arange(384) % 16 - 8) / 64
    x_RC[6] = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).repeat(48) / 32
    x_RC[7] = torch.where(torch.arange(384) % 2 == 0, 0.01, -0.005)
    x_RC[8] *= 2.0**-30
    return x_RC.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SCHEMES, "w4a16"])
def test_what_is_stored_is_what_the_cores_store(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, w_RC = scheme_of(name), hard(dtype)

    def made() -> dict[str, Tensor]:
        shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
        stored = quantize(w_RC, scheme, shared)
        return stored if shared is None else stored | {"shared": shared}

    want = {name: tensor.clone() for name, tensor in made().items()}
    elsewhere(monkeypatch)
    monkeypatch.setattr(certain, "UNDECIDED_AT_ONCE", 1 << 16)
    got = made()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n].view(torch.uint8), want[n].view(torch.uint8)) for n in want)


@pytest.mark.parametrize(("name", "dtype"), [("mxfp8", torch.float32), ("w4a16", torch.bfloat16)])
def test_sums_alone_would_choose_otherwise(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: with bounds as narrow as the sums, some tiles end differently."""
    scheme, x_RC = scheme_of(name), weights(128, 512).to(dtype)
    assert scheme.search is not None
    x = tiled(x_RC, scheme)
    want = best_ranges(x, scheme, scheme.search, Scratch())
    elsewhere(monkeypatch, off_by=1000)
    monkeypatch.setattr(certain, "UNIT", 0.0)
    got = best_ranges(x, scheme, scheme.search, Scratch())
    assert not torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32", "nvfp4a16"])
def test_the_cores_are_asked_about_few(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = scheme_of(name)
    assert scheme.search is not None
    w_RC = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    x = tiled(w_RC.to(dtype), scheme)
    asked = elsewhere(monkeypatch)
    best_ranges(x, scheme, scheme.search, Scratch())
    assert sum(asked) <= 0.03 * x.shape[0] * x.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_that_overflow_are_left_to_the_cores(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = scheme_of("w8a8")
    assert scheme.search is not None
    x = tiled(torch.randn(4, 64).mul(torch.finfo(dtype).max / 16).to(dtype), scheme)
    want = best_ranges(x, scheme, scheme.search, Scratch())
    asked = elsewhere(monkeypatch)
    got = best_ranges(x, scheme, scheme.search, Scratch())
    assert asked == [4]
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w4a16-asym", "nvfp4a16"])
def test_what_is_no_number_is_refused(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, w_RC = scheme_of(name), weights(8, 128)
    w_RC[7, 127] = value
    elsewhere(monkeypatch)
    with pytest.raises(NonFinite):
        statistic(w_RC, scheme)
    assert scheme.search is not None
    with pytest.raises(NonFinite):
        best_ranges(tiled(w_RC, scheme), scheme, scheme.search, Scratch())


@pytest.mark.parametrize("length", [7, 16, 100, 576, 4096, 14336, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_adds_up_within_the_bounds(length: int, dtype: torch.dtype) -> None:
    """One large number and many that vanish beside it, one after the other: wherever the large
    one stands, most of them are to count. Their sum is a little above the middle of two numbers
    of bf16, so that it shows there as well."""
    places = torch.arange(0, length, max(length // 50, 1))
    x_TL = torch.full((len(places), length), 2.0**-25, dtype=dtype)
    x_TL[torch.arange(len(places)), places] = 1.0
    x_TL[:, -1] += 2.0**-8
    low_KT, high_KT = certain._bounds(x_TL.sum(-1, dtype=torch.float64)[None], x_TL)
    found_T = x_TL.sum(-1)
    assert (low_KT[0] <= found_T).all()
    assert (found_T <= high_KT[0]).all()
    if length >= 4096 and dtype == torch.bfloat16:
        assert torch.equal(low_KT[:, :-1], high_KT[:, :-1])


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SCHEMES, "w4a16"])
def test_a_gpu_stores_what_the_cores_store(name: str, dtype: torch.dtype) -> None:
    scheme = scheme_of(name)
    w_RC = torch.cat((hard(dtype).repeat(1, 5), weights(2048, 1920).to(dtype)))
    made = []
    for w in (w_RC, w_RC.cuda()):
        shared = statistic(w, scheme) if needs_statistic(scheme) else None
        stored = quantize(w, scheme, shared)
        made.append(stored if shared is None else stored | {"shared": shared})
    want, got = made
    assert got.keys() == want.keys()
    for local in want:
        different = got[local].cpu().view(torch.uint8) != want[local].view(torch.uint8)
        assert not different.any(), f"{local}: {different.sum()} bytes differ"


@gpu
@needs_gpu
def test_a_gpu_searches_in_bounded_memory() -> None:
    scheme = scheme_of("nvfp4a16")
    w_RC = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize(w_RC, scheme, statistic(w_RC, scheme))
    assert torch.cuda.max_memory_allocated() - before < 600e6
