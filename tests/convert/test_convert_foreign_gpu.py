"""Other makers' formats on a GPU: the same weights, and the same bytes, as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_cases import convert, recipe_of
from test_convert_foreign import FORMATS, source
from tiny.foreign import LINEARS
from tiny.tensors import differences, tensors_in

from ckptq.checkpoint.open import open_checkpoint
from ckptq.forward.decoded import weights_of
from ckptq.forward.reader import Reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_decoded_where_the_model_runs(tmp_path: Path, format: str) -> None:
    foreign = source(tmp_path / "source", format)
    given = weights_of(open_checkpoint(foreign.folder), Reader(torch.device("cuda")))
    for name, weight in given.load([f"{name}.weight" for name in LINEARS]).items():
        assert weight.is_cuda
        assert torch.equal(weight.cpu(), foreign.weights[name.removesuffix(".weight")]), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scheme", ["fp8 channel", "int4 group", "nvfp4"])
def test_a_source_is_quantized_to_the_same_bytes(tmp_path: Path, format: str, scheme: str) -> None:
    foreign, recipe = source(tmp_path / "source", format), recipe_of(scheme)
    on_cpu = convert(foreign.folder, tmp_path / "cpu", recipe, device="cpu").out
    on_gpu = convert(foreign.folder, tmp_path / "gpu", recipe, device="cuda").out
    assert differences(tensors_in(on_gpu), tensors_in(on_cpu)) == []
