"""Calibration by the attention kernel, with its meaning in plain torch in the kernel's place."""

import pytest
import torch
from calibrate_models import FAMILIES, make, samples_of
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError
from ckptq.forward import kernel_attention
from ckptq.forward.kernel_attention import says_the_same
from ckptq.kernels.attention.mask import Mask
from ckptq.plan.attention import AttentionPlan

ROWS = token_rows([24, 24, 13, 7])
FUSED = [family for family in FAMILIES if family != "gpt-oss"]
"""GPT-OSS has attention sinks, which the kernel does not know."""


@pytest.fixture
def kernel_calls(monkeypatch) -> list[bool]:
    """Send every attention to the kernel's function; True for each that it took."""
    calls: list[bool] = []
    plain = kernel_attention.fused_attention

    def counted(*args):
        out = plain(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr("ckptq.forward.tap.on_gpu", lambda _device: True)
    monkeypatch.setattr(kernel_attention, "fused_attention", counted)
    return calls


@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
@pytest.mark.parametrize("family", FUSED)
def test_scales_are_those_of_sdpa(saved, monkeypatch, request, family, strategy):
    """Equal in the first layer; rounding inside attention may move later ones by a step or two."""
    ckpt = saved(family)
    want = calibrate(
        ckpt, samples_of(ROWS), attention=AttentionPlan(strategy=strategy), batch_size=2
    ).tensors
    calls = request.getfixturevalue("kernel_calls")
    got = calibrate(
        ckpt, samples_of(ROWS), attention=AttentionPlan(strategy=strategy), batch_size=2
    ).tensors
    assert calls
    assert all(calls)
    assert got.keys() == want.keys()
    for name, scale in want.items():
        if ".layers.0." in name:
            assert torch.equal(got[name], scale), name
        torch.testing.assert_close(got[name], scale, rtol=0.05, atol=0)


def test_what_the_kernel_does_not_know_goes_to_sdpa(saved, kernel_calls):
    """An observer that needs every value; the scales are those without a kernel."""
    ckpt = saved("llama")
    calibrate(ckpt, samples_of(ROWS), batch_size=2)
    assert kernel_calls
    kernel_calls.clear()
    calibrate(ckpt, samples_of(ROWS), attention=AttentionPlan(observer="percentile"), batch_size=2)
    assert not any(kernel_calls)


def test_nan_is_seen_in_the_kernels_maxima(tmp_path, kernel_calls):
    model = make("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.v is nan"):
        calibrate(open_checkpoint(tmp_path), samples_of(ROWS[:1]))
    assert all(kernel_calls)


def causal(S: int, window: int | None = None, chunk: int | None = None) -> torch.Tensor:
    """[1, 1, S, S], spelled out position by position."""
    rows = [
        [
            key <= query
            and (window is None or query - key < window)
            and (chunk is None or query // chunk == key // chunk)
            for key in range(S)
        ]
        for query in range(S)
    ]
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize(
    ("mask", "tensor", "lengths", "same"),
    [
        (Mask(), None, (6, 6), True),
        (Mask(), None, (6, 4), False),
        (Mask(sliding_window=6), None, (6,), True),
        (Mask(sliding_window=5), None, (6,), False),
        (Mask(chunk=6), None, (6,), True),
        (Mask(chunk=4), None, (6,), False),
        (Mask(), causal(6), (6,), True),
        (Mask(sliding_window=3), causal(6, window=3), (6,), True),
        (Mask(sliding_window=3), causal(6, window=4), (6,), False),
        (Mask(chunk=4), causal(6, chunk=4), (6,), True),
        (Mask(chunk=4), causal(6), (6,), False),
        (Mask(), torch.cat([causal(6), causal(6)]), (6, 3), True),
        (Mask(), causal(6).float(), (6,), False),
        (Mask(), torch.ones(1, 1, 6, 6, dtype=torch.bool), (6,), False),
    ],
)
def test_words_are_believed_only_when_the_tensor_says_the_same(mask, tensor, lengths, same):
    assert says_the_same(mask, tensor, tuple(lengths), 6) is same
