"""Scales with signs: the best of those tried, by the plain formula in float64; readers multiply."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from test_gptq_descent import read_back, scheme_of

from ckptq.gptq.signs import SHRINKS, may_be_signed, with_signs
from ckptq.quantize.formats import grid

R, C, L = 6, 64, 32


def lost(w: torch.Tensor, s: torch.Tensor, squares: torch.Tensor) -> float:
    codes = (w.double() / s.double()).round().clamp(-8, 7)
    return ((w.double() - codes * s.double()) ** 2 * squares.double()).sum().item()


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-channel"])
def test_each_scale_is_the_best_of_those_tried(name: str) -> None:
    torch.manual_seed(0)
    w_RC, squares_C, scheme = torch.randn(R, C).bfloat16(), torch.rand(C), scheme_of(name)
    on = grid(w_RC, scheme)
    made = with_signs(w_RC, squares_C, on, scheme)
    width = C // on.divisor.shape[1]
    for r in range(R):
        for g, columns in enumerate(range(0, C, width)):
            w, squares = w_RC[r, columns : columns + width], squares_C[columns : columns + width]
            largest = w[w.abs().argmax()].float()
            tried = [on.divisor[r, g], *((largest * (-f / 8)).bfloat16() for f in SHRINKS)]
            least = min(lost(w, s, squares) for s in tried)
            assert lost(w, made.divisor[r, g], squares) == pytest.approx(least, rel=1e-6)
    assert (made.divisor < 0).any()
    assert (made.divisor > 0).any()


def test_weights_from_minus_eight_to_seven_are_exact_whatever_their_sign() -> None:
    """As GGUF's Q4_0 holds them; the minimum and maximum alone round them."""
    torch.manual_seed(1)
    scheme = scheme_of("w4a16-g32")
    codes_RC = torch.randint(-8, 8, (R, C)).float()
    codes_RC[:, ::L] = -8
    w_RC = (codes_RC * torch.tensor([0.5, -0.25, 2, -1, 0.125, -4])[:, None]).bfloat16()
    plain = grid(w_RC, scheme)
    made = with_signs(w_RC, torch.ones(C), plain, scheme)
    assert torch.equal(read_back(w_RC, w_RC, made, scheme), w_RC.float())
    assert not torch.equal(read_back(w_RC, w_RC, plain, scheme), w_RC.float())
    by_library = library_dequantize(
        (w_RC.float() / made.divisor.float().repeat_interleave(L, 1)).round(),
        made.stored["weight_scale"].float(),
        args=QuantizationArgs(num_bits=4, strategy="group", group_size=L),
    )
    assert torch.equal(by_library, w_RC.float())


@pytest.mark.parametrize("name", ["w4a16-asym", "w8a8", "fp8-dynamic", "nvfp4a16"])
def test_others_have_no_signs(name: str) -> None:
    assert not may_be_signed(scheme_of(name))
    assert may_be_signed(scheme_of("w4a16-g32"))
