"""The doors of weights: one per kernel, and both sides of each give the same."""

import importlib
import inspect

import pytest
import torch
from doors import WEIGHTS, doors, take
from kernel_cases import same, weights
from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.int4 import dispatch as int4
from ckptq.kernels.quantize import reference as meaning

KERNELS = {
    "quantize": ("quantize_rows", "quantize_static"),
    "int4": ("quantize_int4",),
    "linear": ("linear_w8a8", "linear_w4a16"),
}
DOORS = doors(WEIGHTS)
A, W = weights((5, 256), seed=1), weights((9, 256), seed=2)
(A8, A_SCALE), (W8, W_SCALE) = meaning.quantize_rows(A), meaning.quantize_rows(W)
(AB, AB_SCALE), (WB, WB_SCALE) = (
    meaning.quantize_blocks(A, block=(1, 128)),
    meaning.quantize_blocks(W),
)
W4, W4_SCALE, W4_ZERO = int4.quantize_int4(W, 32, False)
CALLS: dict[str, tuple] = {
    "quantize_rows": (W,),
    "quantize_blocks": (W,),
    "quantize_static": (W, W_SCALE, (1, 256)),
    "dequantize": (W8, W_SCALE, (1, 256)),
    "quantize_int4": (W, 32, False),
    "dequantize_int4": (W4, W4_SCALE, 256, W4_ZERO),
    "linear_w8a8": (A8, A_SCALE, W8, W_SCALE),
    "linear_fp8_block": (AB, AB_SCALE, WB, WB_SCALE),
    "linear_w4a16": (A, W4, W4_SCALE, W4_ZERO),
}


def test_no_door_is_forgotten() -> None:
    assert DOORS.keys() == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_both_sides_of_a_door(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without a GPU, the kernel's side is taken by saying that there is one."""
    door = DOORS[name]
    take(monkeypatch, gpu=False)
    want = door(*CALLS[name])
    take(monkeypatch, gpu=True)
    got = door(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in CALLS[name]))
    if name.startswith("linear"):
        torch.testing.assert_close(got.cpu(), want, rtol=2**-7, atol=1e-4 * want.abs().max().item())
    else:
        pairs = [(got, want)] if isinstance(want, Tensor) else zip(got, want, strict=True)
        assert all(same(g, w) for g, w in pairs if w is not None)


def test_doors_take_the_arguments_of_their_kernels() -> None:
    """Names, order and defaults."""
    for name in CALLS:
        room = next(m.__name__.split(".")[2] for m in WEIGHTS if name in vars(m))
        kernels = (importlib.import_module(f"ckptq.kernels.{room}.{m}") for m in KERNELS[room])
        kernel = next(vars(module)[name] for module in kernels if name in vars(module))
        want = inspect.signature(kernel).parameters.values()
        got = inspect.signature(DOORS[name]).parameters.values()
        assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in want], name


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_gpu(W)
    if torch.cuda.is_available():
        assert on_gpu(W.cuda())
        monkeypatch.setenv("CKPTQ_EAGER", "1")
        assert not on_gpu(W.cuda())
