"""On a GPU: the same bytes as on the cores, for every format and layout, and errors by name."""

from __future__ import annotations

import pytest
import torch
from convert_cases import FORMATS, LAYOUTS, convert, recipe_of, save, scheme_of
from convert_killed import digests
from tiny.tensors import differences

from ckptq.convert import arithmetic
from ckptq.errors import MachineError, SourceError
from ckptq.quantize.dispatch import kernel_of
from ckptq.quantize.formats import needs_statistic, quantize, statistic
from ckptq.recipes.searched import with_search

WITH_A_KERNEL = (
    *("fp8 channel", "fp8 tensor", "fp8 block", "int8 channel", "int4 group", "int4 group asym"),
    "int4 channel",
)


def on_a_gpu(test):
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(absent(test))


def test_the_usual_formats_have_a_kernel():
    found = {name for name in FORMATS if kernel_of(scheme_of(name)) is not None}
    assert found == set(WITH_A_KERNEL)


@pytest.mark.parametrize("format", WITH_A_KERNEL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_a_kernel_means_is_the_format(format, dtype):
    """Without a GPU the kernels' doors lead to their meaning in plain torch."""
    torch.manual_seed(0)
    scheme = scheme_of(format)
    w_RC = (torch.randn(43, 320) * torch.randn(43, 1).exp()).to(dtype)
    shared = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    kernel = kernel_of(scheme)
    assert kernel is not None
    assert differences(kernel(w_RC, scheme, shared), quantize(w_RC, scheme, shared)) == []


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="--device cuda: no such GPU"):
        arithmetic.arithmetic_on("cuda")
    assert type(arithmetic.arithmetic_on("cpu")) is arithmetic.OnCores


@on_a_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_writes_the_bytes_that_the_cores_write(tmp_path, layout, format):
    torch.manual_seed(0)
    source = save(tmp_path / "source", LAYOUTS[layout]())
    for device in ("cpu", "cuda"):
        convert(source, tmp_path / device, recipe_of(format), device=device, workers=3)
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@on_a_gpu
@pytest.mark.parametrize("format", [name for name in FORMATS if "tensor" not in name])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_searches_as_the_cores_do(tmp_path, layout, format):
    torch.manual_seed(0)
    source = save(tmp_path / "source", LAYOUTS[layout]())
    for device in ("cpu", "cuda"):
        recipe = with_search(recipe_of(format))
        convert(source, tmp_path / device, recipe, device=device, workers=3)
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@on_a_gpu
def test_a_value_that_is_no_number_is_named_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    made = LAYOUTS["llama"]()
    made.tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")
    source = save(tmp_path / "source", made)
    with pytest.raises(SourceError, match=r"'model.layers.1.mlp.up_proj.weight'.*NaN"):
        convert(source, tmp_path / "out", recipe_of("fp8 channel"), device="cuda")
