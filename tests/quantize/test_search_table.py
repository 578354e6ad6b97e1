"""Errors that are looked up are those that are computed, and the search wins with them alike."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ckptq.quantize import search as searching
from ckptq.quantize.certain import first_of_least
from ckptq.quantize.error_table import LEAST, OCTAVES, PER_OCTAVE, ErrorTable
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.search import best_ranges
from ckptq.quantize.tile_error import powered_errors
from ckptq.quantize.tiles import tiled
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.load import load_scheme

SCHEMES = (
    "fp8-dynamic",
    "fp8-block",
    "w8a8",
    "w8a16",
    "w4a16-g32",
    "w4a16-asym",
    "nvfp4a16",
    "mxfp4a16",
    "mxfp8",
)


def scheme_of(name: str) -> WeightScheme:
    (group,) = load_scheme(f"{name}-search").groups
    return group.weight_scheme()


def weights(rows: int = 256, columns: int = 1024) -> Tensor:
    """Rows of different sizes, with outliers, zeros and a tile of nothing else."""
    generator = torch.Generator().manual_seed(3)
    x_RC = torch.randn(rows, columns, generator=generator) * 0.02
    x_RC[:, ::50] *= 8
    x_RC *= torch.logspace(-3, 0, rows)[:, None]
    x_RC[:, ::77] = 0
    x_RC[5] = 0
    return x_RC.bfloat16()


def window() -> Tensor:
    """Every bf16 number that is looked up, of both signs."""
    bits = torch.arange(OCTAVES * PER_OCTAVE, dtype=torch.int16) + LEAST * PER_OCTAVE
    x = torch.cat((torch.zeros(1), bits[1:].view(torch.bfloat16).float())).bfloat16()
    return torch.cat((x, -x))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_number_under_every_mantissa_of_a_scale(name: str) -> None:
    scheme, scratch = scheme_of(name), Scratch()
    table, x_TL = ErrorTable(scheme, 2.4), window()[None]
    scale_S = torch.cat([torch.arange(1, 2, 1 / 16) * 2.0**e for e in (-40, -9, -4, 0)]).bfloat16()
    zero_S = None if scheme.symmetric else (torch.arange(len(scale_S)) % 16 - 8).to(torch.int8)
    column, row = table.columns(x_TL), table.rows(scale_S, zero_S, scratch)
    assert column is not None
    assert row is not None
    for s, first in enumerate(row):
        zero = None if zero_S is None else zero_S[s].view(1, 1)
        want = powered_errors(x_TL, scale_S[s].view(1, 1), zero, scheme, 2.4, scratch)
        got = table.error_SN.view(-1)[column + first]
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("name", SCHEMES)
def test_sums_come_back_in_the_order_of_the_tiles(name: str) -> None:
    scheme, scratch = scheme_of(name), Scratch()
    table, x_TL = ErrorTable(scheme, 2.4), weights().view(-1, 32)
    scale_KT = (x_TL.abs().amax(-1) / 5).clamp(min=1e-6) * torch.tensor([[1.0], [0.9]]).bfloat16()
    zero_KT = None
    if not scheme.symmetric:
        zero_KT = (torch.arange(scale_KT.numel()) % 16 - 8).to(torch.int8).view(scale_KT.shape)
    column, row = table.columns(x_TL), table.rows(scale_KT, zero_KT, scratch)
    assert column is not None
    assert row is not None
    for k, sum_T in enumerate(table.sums(column, row, scratch)):
        zero_T1 = None if zero_KT is None else zero_KT[k][:, None]
        want = powered_errors(x_TL, scale_KT[k][:, None], zero_T1, scheme, 2.4, scratch).sum(-1)
        assert torch.equal(sum_T, want)


@pytest.mark.parametrize("value", [2.0**-45, 2.0**4, -(2.0**-45), float("inf")])
def test_what_lies_outside_is_not_looked_up(value: float) -> None:
    table = ErrorTable(scheme_of("w8a8"), 2.4)
    assert table.columns(torch.tensor([[0.5, value]]).bfloat16()) is None
    assert table.columns(torch.tensor([[0.5, -0.0, 2.0**-43, 15.9]]).bfloat16()) is not None
    assert table.rows(torch.tensor([value * value]).bfloat16(), None, Scratch()) is None


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("outside", [False, True])
def test_the_search_ends_as_without_a_table(
    name: str, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, x_RC = scheme_of(name), weights()
    x_RC[7, 7] = 40.0 if outside else 0.5
    assert scheme.search is not None
    assert (ErrorTable(scheme, 2.4).columns(x_RC) is None) == outside
    looked_up = best_ranges(tiled(x_RC, scheme), scheme, scheme.search, Scratch())
    monkeypatch.setattr(searching, "has_table", lambda *_: False)
    computed = best_ranges(tiled(x_RC, scheme), scheme, scheme.search, Scratch())
    assert all(torch.equal(*pair) for pair in zip(looked_up, computed, strict=True))


def test_a_wrong_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: were the rows of two scales exchanged, the search would end differently."""
    scheme, x_RC = scheme_of("w4a16-g32"), weights()
    assert scheme.search is not None
    want = best_ranges(tiled(x_RC, scheme), scheme, scheme.search, Scratch())
    rows = ErrorTable.rows
    monkeypatch.setattr(ErrorTable, "rows", lambda *args: rows(*args).flip(0))
    got = best_ranges(tiled(x_RC, scheme), scheme, scheme.search, Scratch())
    assert not torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "name", ["w8a8", "w4a16-g32", "w4a16-asym", "fp8-dynamic", "nvfp4a16", "mxfp4a16"]
)
def test_equals_llm_compressor_that_never_stops_early(name: str) -> None:
    """With the observer and its arguments that the recipe names, `patience` apart."""
    scheme = scheme_of(name)
    (group,) = load_scheme(f"{name}-search").groups
    assert group.weights is not None
    assert scheme.search is not None
    x = tiled(weights(64, 512), scheme)
    args = QuantizationArgs(
        num_bits=scheme.num_bits,
        type=scheme.type,
        strategy=scheme.strategy,
        symmetric=scheme.symmetric,
        group_size=scheme.group_size,
        scale_dtype=getattr(torch, scheme.scale_dtype) if scheme.scale_dtype else None,
        observer=group.weights.observer,
        observer_kwargs={**(group.weights.observer_kwargs or {}), "patience": 10**6},
    )
    observers = pytest.importorskip("llmcompressor.observers.base")
    observer = observers.Observer.load_from_registry(args.observer, base_name="weight", args=args)
    observer.update_statistics_from_observed(x[None])
    low, high = best_ranges(x, scheme, scheme.search, Scratch())
    assert torch.equal(low, observer.min_vals.clamp(max=0))
    assert torch.equal(high, observer.max_vals.clamp(min=0))


def test_the_first_of_the_least_wins() -> None:
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(torch.bfloat16).max
    error_KT = torch.tensor(
        [
            [3.0, 1.0, nan, inf, largest],
            [1.0, 1.0, 2.0, inf, inf],
            [1.0, 0.5, 2.0, nan, largest],
        ]
    ).bfloat16()
    assert first_of_least(error_KT).tolist() == [1, 2, 1, 0, 0]
