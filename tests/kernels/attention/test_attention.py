"""Flash attention against a dense softmax in float64; maxima to the bit; what must be noticed."""

import pytest
import reference_attention as meaning
import torch
from torch import Tensor

from ckptq.kernels.attention.dense_attention import Tile, attention
from ckptq.kernels.attention.mask import Mask, seen
from ckptq.kernels.attention.maxima import Maxima

SMALL = Tile(32, 16, 4, 2)
LARGE = Tile(32, 64, 4, 2)
QKV = tuple[Tensor, Tensor, Tensor]


def qkv(
    S: int, D: int, dtype: torch.dtype = torch.float32, H: int = 2, K: int = 1, B: int = 1
) -> QKV:
    """Heads of different sizes, laid out as transformers' projections leave them."""
    generator = torch.Generator().manual_seed(S * D)
    made = []
    for heads in (H, K, K):
        x_BSHD = torch.randn(B, S, heads, D, generator=generator)
        x_BSHD *= torch.rand(heads, 1, generator=generator) + 0.5
        made.append(x_BSHD.to(dtype).transpose(1, 2))
    return made[0], made[1], made[2]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [x.to(device) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("S", "D"), [(1, 64), (7, 80), (33, 96), (65, 128)], ids=str)
def test_causal(device: torch.device, S: int, D: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(S, D, dtype, 4, 2)
    got = attention(*to(device, q, k, v), scaling=D**-0.5, tile=SMALL)
    want = meaning.attention(q, k, v, seen(Mask(), S, S), scaling=D**-0.5)
    assert got.dtype == dtype
    assert error(got, want) < (1e-6 if dtype == torch.float32 else 4e-3)


MASKS = [
    Mask(causal=False),
    Mask(sliding_window=1),
    Mask(sliding_window=20),
    Mask(chunk=24),
    Mask(causal=False, chunk=24),
    Mask(sliding_window=13, chunk=40),
    Mask(sliding_window=1000, chunk=1000),
]
SPANS = [((0, 0), (65, 40)), ((17, 30), (0, 35))]


@pytest.mark.parametrize("spans", SPANS, ids=["right", "left-and-empty"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_padding(
    device: torch.device, mask: Mask, spans: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    q, k, v = qkv(65, 16, H=1, B=2)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in spans)
    pair, on_device = (starts, lengths), (starts.to(device), lengths.to(device))
    got = attention(*to(device, q, k, v), scaling=0.3, mask=mask, spans=on_device, tile=SMALL)
    want = meaning.attention(q, k, v, seen(mask, 65, 65, pair), scaling=0.3)
    assert error(got, want) < 1e-6


@pytest.mark.parametrize(
    ("mask", "off"),
    [
        (Mask(sliding_window=20), Mask(sliding_window=21)),
        (Mask(chunk=24), Mask(chunk=25)),
        (Mask(), Mask(causal=False)),
    ],
    ids=["window", "chunk", "causal"],
)
def test_a_mask_that_is_off_is_noticed(device: torch.device, mask: Mask, off: Mask) -> None:
    q, k, v = qkv(65, 16, H=1)
    got = attention(*to(device, q, k, v), scaling=0.3, mask=off, tile=SMALL)
    want = meaning.attention(q, k, v, seen(mask, 65, 65), scaling=0.3)
    assert error(got, want) > 1e-2


def test_soft_cap(device: torch.device) -> None:
    q, k, v = qkv(33, 64)
    seen_1SS = seen(Mask(), 33, 33)
    want = meaning.attention(q, k, v, seen_1SS, scaling=1.0, softcap=5.0)
    got = attention(*to(device, q, k, v), scaling=1.0, softcap=5.0, tile=SMALL)
    assert error(got, want) < 1e-6
    assert error(meaning.attention(q, k, v, seen_1SS, scaling=1.0), want) > 1e-2


def test_the_last_query_stands_at_the_last_key(device: torch.device) -> None:
    """Validation reads a few queries over a longer past; v has a head size of its own."""
    q, k, v = qkv(40, 48)
    q, v = q[:, :, -5:], v[..., :20]
    got = attention(*to(device, q, k, v), scaling=0.2, tile=SMALL)
    want = meaning.attention(q, k, v, seen(Mask(), 5, 40), scaling=0.2)
    assert error(got, want) < 1e-6


CASES = [((2, 2), torch.float32), ((5, 1), torch.bfloat16)]


@pytest.mark.parametrize(("heads", "dtype"), CASES, ids=str)
def test_maxima_are_exact_and_leave_padding_out(
    device: torch.device, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    S, (H, K) = 60, heads
    q, k, v = qkv(S, 24, dtype, H, K, 2)
    real_BS = torch.ones(2, S, dtype=torch.bool)
    real_BS[0, :9], real_BS[1, 50:] = False, False
    spans = torch.tensor([[9, 0], [S - 9, 50]], dtype=torch.int32).unbind()
    for x in (q, k, v):
        x[~real_BS[:, None].expand(2, x.shape[1], S)] = 1000.0
    got, want = Maxima.zeros(H, K, device), Maxima.zeros(H, K)
    for scale in (2.0, 1.0):  # the buffers hold what was seen before
        batch = [x * scale for x in (q, k, v)]
        on_device = (spans[0].to(device), spans[1].to(device))
        run = {"scaling": 0.2, "spans": on_device, "maxima": got, "tile": LARGE}
        attention(*to(device, *batch), **run)
        meaning.fold_maxima(want, *batch, spans)
    for name, x in (("q_H", q), ("k_K", k), ("v_K", v)):
        real = x.transpose(1, 2)[real_BS]  # [tokens, heads, D]
        assert torch.equal(getattr(got, name).cpu(), 2 * real.abs().amax((0, 2)).float())
        assert torch.equal(getattr(want, name), getattr(got, name).cpu())
    careless = Maxima.zeros(H, K, device)
    attention(*to(device, q, k, v), scaling=0.2, maxima=careless, tile=LARGE)
    assert (careless.k_K == 1000).all()  # the padding would have been noticed


def test_recording_does_not_change_the_result_and_nan_stays(device: torch.device) -> None:
    q, k, v = to(device, *qkv(33, 32, H=2, K=2))
    maxima = Maxima.zeros(2, 2, device)
    plain = attention(q, k, v, scaling=0.2, tile=SMALL)
    assert torch.equal(attention(q, k, v, scaling=0.2, maxima=maxima, tile=SMALL), plain)
    k[0, 1, 20, 3] = float("nan")
    attention(q, k, v, scaling=0.2, maxima=maxima, tile=SMALL)
    k[0, 1, 20, 3] = 0.0
    attention(q, k, v, scaling=0.2, maxima=maxima, tile=SMALL)
    assert maxima.k_K.isnan().tolist() == [False, True]
    assert not maxima.q_H.isnan().any()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)),
        lambda q, k, v: (q[:, :3], k.repeat(1, 2, 1, 1), v),
        lambda q, k, v: (q, k.half(), v),
        lambda q, k, v: (q, k, v[:, :, 1:]),
    ],
)
def test_what_does_not_fit_is_refused(device: torch.device, break_it) -> None:
    with pytest.raises(ValueError, match="q, k, v"):
        attention(*break_it(*to(device, *qkv(7, 16))), scaling=1.0)
