"""Observers are folds: free of how the values are cut up, and equal to their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptq.calibrate.observers import OBSERVERS, extremes, heads, make_observer
from ckptq.errors import UsageError

FOLDS = ["static_minmax", "percentile"]
"""One of each kind of statistic: extremes, and counts of magnitudes (which `mse` keeps too)."""

PART = {"percentile": 99.9}


def values(B=4, H=3, S=10, D=8, seed=0) -> torch.Tensor:
    """Heavy tails and heads of very different size, [B, H, S, D] bf16."""
    generator = torch.Generator().manual_seed(seed)
    x_BHSD = torch.randn(B, H, S, D, generator=generator) ** 3
    return (x_BHSD * torch.tensor([0.01, 1.0, 700.0])[:H].reshape(-1, 1, 1)).bfloat16()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", FOLDS)
@given(cut=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_split_in_any_order_gives_the_same(name, cut, seed):
    observer, x = make_observer(name), values(B=8, seed=seed)
    whole = observer.fold({}, x, [10] * 8)
    first, second = (
        observer.fold({}, x[:cut], [10] * cut),
        observer.fold({}, x[cut:], [10] * (8 - cut)),
    )
    assert same(observer.merge(second, first), whole)
    assert same(observer.fold(second, x[:cut], [10] * cut), whole)
    assert same(observer.merge({}, whole), whole)


@pytest.mark.parametrize("name", OBSERVERS)
@given(lengths=st.lists(st.integers(1, 10), min_size=4, max_size=4))
@settings(max_examples=8, deadline=None)
def test_padding_has_no_weight(name, lengths):
    observer, x = make_observer(name), values()
    padded = x.clone()
    for row, length in enumerate(lengths):
        padded[row, :, length:] = 1e30
    rows = [x[row : row + 1, :, :length] for row, length in enumerate(lengths)]
    packed = torch.cat(rows, dim=2)  # one row that holds just the real positions
    assert same(observer.fold({}, padded, lengths), observer.fold({}, packed, [packed.shape[2]]))


def test_static_minmax_is_the_maximum_over_448():
    observer, x = make_observer("static_minmax"), values()
    scale_H = observer.scale(observer.fold({}, x, [10] * 4), torch.bfloat16)
    assert torch.equal(scale_H, x.abs().amax((0, 2, 3)) / 448)


def test_scale_equals_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    observer = make_observer("static_minmax")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for x in (values(seed=1), values(seed=2).abs(), -values(seed=3).abs(), values() * 0):
            stats = observer.fold({}, x.to(dtype).clamp(-6e4, 6e4), [10] * 4)
            want_H, _ = calculate_qparams(stats["amin"], stats["amax"], args)
            assert torch.equal(observer.scale(stats, dtype), want_H)


def test_minmax_equals_llm_compressors_observer():
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.observers.min_max import MinMaxObserver

    args = QuantizationArgs(num_bits=8, type="float", strategy="attn_head", observer="minmax")
    theirs, ours, stats = MinMaxObserver("k", args), make_observer("minmax"), {}
    for seed in range(20):
        x = values(B=1, seed=seed)
        theirs(x)
        stats = ours.fold(stats, x, [10])
    assert torch.equal(stats["amin"], theirs.min_vals.flatten())
    assert torch.equal(stats["amax"], theirs.max_vals.flatten())


def test_minmax_cannot_be_merged():
    observer = make_observer("minmax")
    stats = observer.fold({}, values(), [10] * 4)
    with pytest.raises(UsageError, match="cannot be merged"):
        observer.merge(stats, stats)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 100.0])
def test_percentile_is_the_order_statistic(percentile):
    observer, x = make_observer("percentile", {"percentile": percentile}), values()
    scale_H = observer.scale(observer.fold({}, x, [10] * 4), torch.float32)
    sorted_HN = x.float().abs().transpose(0, 1).flatten(1).sort(1).values
    N = sorted_HN.shape[1]
    rank = -int(-N * percentile // 100)  # ceiling
    torch.testing.assert_close(scale_H, sorted_HN[:, rank - 1] / 448, rtol=1e-6, atol=0)


def test_mse_is_the_best_of_all_its_candidates():
    observer, x = make_observer("mse"), values()
    stats = observer.fold({}, x, [10] * 4)
    got_H = observer.scale(stats, torch.float32)
    x_HN = x.float().transpose(0, 1).flatten(1)

    def error(scale_H):
        code = (x_HN / scale_H[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return ((x_HN - code * scale_H[:, None]).abs().double() ** 2.4).sum(1)

    amax_H = x_HN.abs().amax(1)
    candidates = [amax_H * (1 - step / 100) / 448 for step in range(21)]
    best_H = torch.stack([error(c) for c in candidates]).amin(0)
    torch.testing.assert_close(error(got_H), best_H, rtol=1e-6, atol=0)
    assert (error(candidates[0]) > best_H).any(), "the maximum itself is the best of all: no test"


def test_percentile_clips_an_outlier_that_static_minmax_keeps():
    x = values(B=64)
    x[0, 0, 0, 0] = 1000.0
    static, clipped = make_observer("static_minmax"), make_observer("percentile", PART)
    kept_H = static.scale(static.fold({}, x, [10] * 64), torch.float32)
    less_H = clipped.scale(clipped.fold({}, x, [10] * 64), torch.float32)
    assert less_H[0] < kept_H[0] / 1000


def test_per_tensor_is_one_head():
    x = values()
    one = extremes(heads(x, "tensor"), [10] * 4)
    each = extremes(heads(x, "attn_head"), [10] * 4)
    assert torch.equal(one["amax"], each["amax"].max().reshape(1))
    assert torch.equal(one["amin"], each["amin"].min().reshape(1))


def test_nan_stays_visible():
    x = values()
    x[2, 1, 3, 3] = float("nan")
    stats = make_observer("static_minmax").fold({}, x, [10] * 4)
    assert stats["amax"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("median", {}, "unknown observer 'median'"),
        ("percentile", {"p": 1}, "has no argument 'p'; known: percentile"),
        ("percentile", {"percentile": 0}, "must lie in"),
        ("static_minmax", {"averaging_constant": 1}, "known: none"),
    ],
)
def test_wrong_observers_are_refused_by_name(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        make_observer(name, arguments)
