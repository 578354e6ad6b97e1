"""Coordinate descent after GPTQ is its formula, written out plainly in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ckptq.gptq import descent
from ckptq.gptq.choose import Choice, Chosen
from ckptq.quantize.dequantize import dequantize
from ckptq.quantize.formats import (
    Grid,
    codes_on,
    constants,
    grid,
    needs_statistic,
    statistic,
)
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Gptq
from ckptq.spec import spec_of

R, C = 6, 64
SCHEMES = ["w4a16-g32", "w4a16-asym", "w4a16-channel", "fp8-dynamic", "w8a8", "nvfp4a16"]
INT4 = [float(n) for n in range(-8, 8)]
E2M1 = [sign * n for n in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1.0, -1.0)]


def scheme_of(name: str):
    scheme = load_scheme(name).linears[0].scheme
    return replace(scheme, group_size=32) if scheme.group_size == 128 else scheme


def started(name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """A scheme, what there is to choose by, and what is nearest."""
    torch.manual_seed(seed)
    scheme, w_RC = scheme_of(name), torch.randn(R, C).to(dtype)
    x_TC = torch.randn(96, C) @ torch.randn(C, C) * torch.rand(C)
    shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    on = grid(w_RC, scheme, shared)
    nearest_RC = read_back(w_RC, w_RC, on, scheme)
    return scheme, Choice(w_RC, x_TC.T @ x_TC / 48, on), Chosen(nearest_RC, True, on)


def read_back(q_RC: torch.Tensor, w_RC: torch.Tensor, on: Grid, scheme: WeightScheme):
    """What the stored tensors of weights on a grid stand for; `w_RC` is what they come from."""
    shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    stored = {scheme.codes: codes_on(q_RC, on, scheme), **on.stored}
    stored |= constants(spec_of(w_RC), scheme, shared)
    return dequantize(stored, scheme, (R, C), torch.float32)


def error(w_RC: torch.Tensor, choice: Choice, frac: float = 0.01) -> float:
    """With the damping that GPTQ has."""
    H = choice.hessian_CC.double()
    H = H + frac * H.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    wrong = choice.w_RC.double() - w_RC.double()
    return (wrong @ H * wrong).sum().item()


@pytest.mark.parametrize("name", SCHEMES)
def test_every_pass_makes_the_error_smaller(name: str) -> None:
    scheme, choice, nearest = started(name)
    errors = [error(nearest.weight_RC, choice)]
    for passes in (1, 2, 6):
        (made,) = descent.descend([choice], [nearest], scheme, Gptq(descents=passes))
        errors.append(error(made.weight_RC, choice))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_stands_for_what_was_found(name: str, dtype: torch.dtype) -> None:
    scheme, choice, nearest = started(name, dtype=dtype)
    (made,) = descent.descend([choice], [nearest], scheme, Gptq(descents=2))
    fits = name != "w8a8" or dtype == torch.float32  # bfloat16 has no scale that is nearer
    assert torch.equal(made.on.divisor, choice.on.divisor) != fits
    assert made.on.stored.keys() == choice.on.stored.keys()
    for local, tensor in made.on.stored.items():
        assert tensor.dtype == choice.on.stored[local].dtype
    read = read_back(made.weight_RC.to(dtype), choice.w_RC, made.on, scheme)
    torch.testing.assert_close(read, made.weight_RC, rtol=2**-8, atol=1e-6)


def plainly(choice: Choice, q_RC: torch.Tensor, numbers: list[float], passes: int, store: Callable):
    """Row by row, one scale or code at a time; each code the best of all by the whole error."""
    w, H = choice.w_RC.double(), choice.hessian_CC.double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    s = choice.on.divisor.double().clone()
    G = s.shape[1]
    L = C // G
    n = (q_RC.double() / s.repeat_interleave(L, 1)).mul(2).round().div(2)

    def wrong(r: int, n_C: torch.Tensor, s_G: torch.Tensor) -> float:
        e = w[r] - n_C * s_G.repeat_interleave(L)
        return (e @ H @ e).item()

    for _ in range(passes):
        for g in range(G):
            columns = slice(g * L, (g + 1) * L)
            for r in range(R):
                rest = w[r] - n[r] * s[r].repeat_interleave(L)
                rest[columns] = w[r, columns]
                at = torch.zeros(C, dtype=torch.float64)
                at[columns] = n[r, columns]
                changed = s[r].clone()
                changed[g] = store(rest @ H @ at / (at @ H @ at))
                if wrong(r, n[r], changed) < wrong(r, n[r], s[r]):
                    s[r] = changed
                for c in range(columns.start, columns.stop):
                    tried = n[r].repeat(len(numbers), 1)
                    tried[:, c] = torch.tensor(numbers, dtype=torch.float64)
                    n[r] = min(tried, key=lambda each: wrong(r, each, s[r]))
    return n * s.repeat_interleave(L, 1), s


@pytest.mark.parametrize(("name", "numbers"), [("w4a16-g32", INT4), ("nvfp4a16", E2M1)])
def test_codes_and_scales_are_those_of_the_formula(name: str, numbers: list[float]) -> None:
    scheme, choice, nearest = started(name)
    (made,) = descent.descend([choice], [nearest], scheme, Gptq(descents=2))

    def store(s: torch.Tensor) -> torch.Tensor:
        if choice.on.global_scale is None:
            return s.bfloat16().double()
        whole = choice.on.global_scale.double()[0]
        return (s * whole).float().to(torch.float8_e4m3fn).double() / whole

    q_RC, s_RG = plainly(choice, nearest.weight_RC, numbers, 2, store)
    torch.testing.assert_close(made.weight_RC.double(), q_RC, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.on.divisor.double(), s_RG, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left_out", ["_pass_on", "refit", "recode"])
def test_a_step_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    monkeypatch.setattr(descent._Descent, left_out, lambda *_: None)
    with pytest.raises(AssertionError):
        test_codes_and_scales_are_those_of_the_formula("w4a16-g32", INT4)


def test_linears_together_are_each_alone_and_unsolved_ones_stay() -> None:
    scheme, one, nearest = started("w4a16-g32")
    _, other, others = started("w4a16-g32", seed=1)
    unsolved = replace(nearest, solved=False)
    how = Gptq(descents=3)
    choices = [one, other, one]
    made = descent.descend(choices, [nearest, others, unsolved], scheme, how)
    assert made[2] is unsolved
    for got, choice, start in zip(made[:2], (one, other), (nearest, others), strict=True):
        (alone,) = descent.descend([choice], [start], scheme, how)
        torch.testing.assert_close(got.weight_RC, alone.weight_RC)
    assert descent.descend([one], [nearest], scheme, Gptq()) == [nearest]


def test_inputs_that_are_always_zero_keep_the_nearest_codes() -> None:
    scheme, choice, nearest = started("w4a16-g32")
    dead = choice.hessian_CC.clone()
    dead[:8], dead[:, :8] = 0, 0
    choice = replace(choice, hessian_CC=dead)
    (made,) = descent.descend([choice], [nearest], scheme, Gptq(descents=2, dampening_frac=0.0))
    scale_R1 = made.on.divisor[:, :1].float()
    wanted_RL = (choice.w_RC[:, :8].float() / scale_R1).round().clamp(-8, 7)
    assert torch.equal((made.weight_RC[:, :8] / scale_R1).round(), wanted_RL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_finds_the_same_in_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, choice, _ = started(name)
    scheme, w_RC = scheme_of(name), choice.w_RC.cuda()
    on = grid(w_RC, scheme, statistic(w_RC, scheme) if needs_statistic(scheme) else None)
    there = Choice(w_RC, choice.hessian_CC.cuda(), on)

    def made() -> Chosen:
        again = replace(there, hessian_CC=there.hessian_CC.clone())
        return descent.descend([again], [Chosen(w_RC, True, on)], scheme, Gptq(descents=3))[0]

    launched = made()
    monkeypatch.setattr(descent, "Graph", lambda work: work)
    plain = made()
    assert torch.equal(launched.weight_RC, plain.weight_RC)
    assert torch.equal(launched.on.divisor, plain.on.divisor)
