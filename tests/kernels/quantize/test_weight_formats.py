"""Weights in every format by `quantize.dispatch`: kernels and torch give the same bits, and back.

On a GPU all of it runs there, formats without a kernel in torch's own operations.
"""

from __future__ import annotations

import pytest
import torch

from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.int4 import quantize_int4 as int4
from ckptq.kernels.quantize import quantize_rows as rows
from ckptq.kernels.quantize import quantize_static as static
from ckptq.quantize import dispatch, formats
from ckptq.quantize.formats import WeightScheme, needs_statistic, statistic
from ckptq.spec import spec_of

FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float"}
INT8 = {"format": "int-quantized", "num_bits": 8, "type": "int"}
PACKED = {"format": "pack-quantized", "num_bits": 4, "type": "int"}
GROUP = {"strategy": "group", "group_size": 32}
ASYMMETRIC = {"symmetric": False}
WITH_A_KERNEL = {
    "fp8 channel": FP8 | {"strategy": "channel"},
    "fp8 tensor": FP8 | {"strategy": "tensor"},
    "fp8 block": FP8 | {"strategy": "block", "block_structure": (128, 128)},
    "int8 channel": INT8 | {"strategy": "channel"},
    "int4 group": PACKED | GROUP,
    "int4 group asym": PACKED | GROUP | ASYMMETRIC,
    "int4 channel": PACKED | {"strategy": "channel"},
}
MXFP4 = {"format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "scale_dtype": "uint8"}
NVFP4 = {"format": "nvfp4-pack-quantized", "num_bits": 4, "type": "float"}
IN_TORCH = {
    "fp8 group": FP8 | GROUP,
    "int8 channel asym": INT8 | {"strategy": "channel"} | ASYMMETRIC,
    "int3 packed": PACKED | GROUP | {"num_bits": 3},
    "mxfp8": {"format": "mxfp8-quantized", "num_bits": 8, "type": "float", "scale_dtype": "uint8"}
    | GROUP,
    "mxfp4": MXFP4 | GROUP,
    "nvfp4": NVFP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
}
EVERY = WITH_A_KERNEL | IN_TORCH


def weight(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(43, 1, generator=generator).exp()
    w_RC = torch.randn(43, 320, generator=generator) * rows
    w_RC[3] = 0
    return w_RC.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def there_and_back(w_RC: torch.Tensor, scheme: WeightScheme) -> tuple[dict, torch.Tensor]:
    shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    made = dispatch.quantize(w_RC, scheme, shared)
    return made, dispatch.dequantize(made, scheme, (43, 320), w_RC.dtype)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_kernel_gives_the_bits_of_the_format(monkeypatch, device, name, dtype):
    scheme, w_RC = WeightScheme(**EVERY[name]), weight(dtype)
    shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    wanted = formats.constants(spec_of(w_RC), scheme, shared)
    wanted |= formats.quantize(w_RC, scheme, shared)
    monkeypatch.setattr(dispatch, "on_gpu", lambda _x: True)
    made, back_RC = there_and_back(w_RC.to(device), scheme)
    assert made.keys() == wanted.keys()
    assert [n for n in made if not torch.equal(bits(made[n]), bits(wanted[n]))] == []
    plain_RC = formats.dequantize(wanted, scheme, (43, 320), dtype)
    assert back_RC.dtype == dtype
    assert back_RC.device == w_RC.to(device).device
    assert torch.equal(bits(back_RC), bits(plain_RC))


@pytest.mark.parametrize("name", EVERY)
def test_which_formats_go_to_kernels(monkeypatch, name):
    """With kernels that fail, the formats that have one fail, and no others."""
    scheme = WeightScheme(**EVERY[name])

    def broken(*_: object) -> None:
        raise RuntimeError("a kernel was asked")

    for module, names in (
        (rows, ("quantize_rows", "quantize_blocks")),
        (static, ("quantize_static", "dequantize")),
        (int4, ("quantize_int4", "dequantize_int4")),
    ):
        for function in names:
            monkeypatch.setattr(module, function, broken)
    made, _ = there_and_back(weight(torch.bfloat16), scheme)  # not on a GPU
    monkeypatch.setattr(dispatch, "on_gpu", lambda _x: True)
    ways = (
        lambda: there_and_back(weight(torch.bfloat16), scheme),
        lambda: dispatch.dequantize(made, scheme, (43, 320), torch.bfloat16),
    )
    for way in ways:
        if name in WITH_A_KERNEL:
            with pytest.raises(RuntimeError, match="a kernel was asked"):
                way()
        else:
            way()


def test_a_weight_that_is_not_finite_is_refused_before_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "on_gpu", lambda _x: True)
    w_RC = weight(torch.bfloat16)
    w_RC[5, 5] = torch.inf
    with pytest.raises(formats.NonFinite):
        dispatch.quantize(w_RC, WeightScheme(**WITH_A_KERNEL["int4 group"]))


@pytest.mark.parametrize("block", [(96, 40), (128, 512)], ids=str)
def test_blocks_that_no_program_holds_are_made_in_torch(monkeypatch, device, block):
    scheme = WeightScheme(**FP8, strategy="block", block_structure=block)
    w_RC = weight(torch.bfloat16)
    wanted = formats.quantize(w_RC, scheme)
    monkeypatch.setattr(dispatch, "on_gpu", lambda _x: True)
    made, _ = there_and_back(w_RC.to(device), scheme)
    assert all(torch.equal(bits(made[name]), bits(wanted[name])) for name in wanted)


def test_where_kernels_compute(monkeypatch):
    assert not on_gpu(torch.device("cpu"))
    assert not on_gpu(weight(torch.bfloat16))
    assert on_gpu(torch.device("cuda", 1))
    monkeypatch.setenv("CKPTQ_EAGER", "1")
    assert not on_gpu(torch.device("cuda", 1))
