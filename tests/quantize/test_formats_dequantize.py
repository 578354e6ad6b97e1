"""What stored tensors stand for is what compressed-tensors makes of them."""

from __future__ import annotations

import pytest
import torch
from format_cases import ARGS, DTYPES, SCHEMES, awkward, case_name, convert

from ckptq.quantize.formats import WeightScheme, dequantize, row_quantum
from ckptq.quantize.scratch import BLOCK_ELEMENTS
from ckptq.recipes.args import Args


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "args"), ARGS, ids=[case_name(s) for s in SCHEMES])
def test_equals_decompression(format: str, args: dict[str, object], dtype: torch.dtype) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = Args.read(args).weight_scheme(format)
    tensors = convert(awkward(dtype), scheme)
    theirs = BaseCompressor.get_value_from_registry(format).decompress(
        tensors, QuantizationScheme(targets=["Linear"], weights=dict(args), format=format)
    )["weight"]
    ours = dequantize(tensors, scheme, dtype=theirs.dtype)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
def test_comes_back_within_half_a_step(scheme: WeightScheme) -> None:
    """A normal matrix is off by what the width of the codes explains."""
    w_RC = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    error = dequantize(convert(w_RC, scheme), scheme) - w_RC
    allowed = {2: 0.6, 3: 0.25, 4: 0.14, 5: 0.06, 6: 0.03, 7: 0.015, 8: 0.01}[scheme.num_bits]
    if scheme.type == "float":
        allowed = {4: 0.12, 8: 0.03}[scheme.num_bits]
    assert error.norm() < allowed * w_RC.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
def test_rows_alone_come_back_as_in_the_whole(scheme: WeightScheme) -> None:
    w_RC = awkward(torch.bfloat16, rows=1200)
    assert w_RC.numel() > BLOCK_ELEMENTS  # what is made at a time; the parts' borders are others
    whole = convert(w_RC, scheme)
    start = row_quantum(scheme) * 2
    rows = dict(whole)
    for name, tensor in whole.items():
        if tensor.ndim == 2:
            rows[name] = tensor[start * len(tensor) // len(w_RC) :]
    back = dequantize(rows, scheme, (len(w_RC) - start, 256))
    assert torch.equal(back, dequantize(whole, scheme)[start:])
