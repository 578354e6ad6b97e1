"""Scales with signs: the best of those tried, by the plain formula in float64; readers multiply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from llmcompressor.modifiers.gptq import gptq_quantize
from test_gptq_descent import error, read_back, scheme_of, started

from ckptq.gptq import choose as choose_module
from ckptq.gptq.choose import Choice, choose
from ckptq.gptq.signs import SHRINKS, may_be_signed, with_signs
from ckptq.quantize.formats import Grid, grid
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Gptq

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


library_args = choose_module._library_args


def chosen(choice: Choice, on: Grid) -> torch.Tensor:
    args = load_scheme("w4a16-g32").linears[0].weights
    (made,) = choose([replace(choice, on=on)], args, Gptq())
    return made.weight_RC


def test_the_kernel_that_knows_no_signs_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor's Triton kernel takes a negative scale for the least positive number. By its
    torch code, which does not, both spellings choose the same."""
    scheme, choice, _ = started("w4a16-g32")
    signed = with_signs(choice.w_RC, choice.hessian_CC.diagonal(), choice.on, scheme)
    assert (signed.divisor < 0).any()
    made = chosen(choice, signed)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "abs", torch.Tensor.clone)
        patch.setattr(choose_module, "_library_args", lambda args, _: library_args(args))
        assert torch.equal(chosen(choice, signed), made)
    assert ((made / signed.divisor.float().repeat_interleave(L, 1)) == -8).any()

    def kernel(work: torch.Tensor, hinv: object, scale: torch.Tensor, *_: object) -> None:
        assert (scale > 0).all()
        raise RuntimeError("the kernel")

    monkeypatch.setattr(gptq_quantize, "triton_req", lambda *_: True)
    monkeypatch.setattr(gptq_quantize, "fused_gptq_block_update", kernel)
    for on in (signed, choice.on):
        with pytest.raises(RuntimeError, match="the kernel"):
            chosen(choice, on)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_chooses_as_well_with_signs() -> None:
    scheme, choice, _ = started("w4a16-g32")
    signed = with_signs(choice.w_RC, choice.hessian_CC.diagonal(), choice.on, scheme)
    least = error(chosen(choice, signed), choice)
    there = Choice(choice.w_RC.cuda(), choice.hessian_CC.cuda(), choice.on)
    on = with_signs(there.w_RC, there.hessian_CC.diagonal(), grid(there.w_RC, scheme), scheme)
    assert error(chosen(there, on).cpu(), choice) == pytest.approx(least, rel=0.05)
