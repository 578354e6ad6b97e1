"""What is accepted as a scheme, what is stored for a shape, and what is refused in which words."""

from __future__ import annotations

import pytest
import torch

from ckptq.errors import PlanError
from ckptq.quantize.formats import row_quantum, stored
from ckptq.recipes.args import Args
from ckptq.spec import TensorSpec

W4A16 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}


def test_every_preset_of_compressed_tensors_is_a_scheme() -> None:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

    names = {}
    presets = [name for name in PRESET_SCHEMES if not name.startswith("MXFP6")]  # refused, in 0.20
    for preset in presets:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if scheme.weights is not None:
            format = infer_module_format(torch.nn.Linear, scheme).value
            dumped = scheme.weights.model_dump()
            names[preset] = f"{format} {Args.read(dumped).weight_scheme(format)}"
            assert str(Args.read(scheme.weights.model_dump(mode="json")).weight_scheme(format))
    assert names["FP8_DYNAMIC"] == "float-quantized fp8 channel"
    assert names["FP8"] == "float-quantized fp8 tensor"
    assert names["FP8_BLOCK"] == "float-quantized fp8 block 128x128"
    assert names["W8A8"] == "int-quantized int8 channel"
    assert names["W4A16_ASYM"] == "pack-quantized int4 group 128 asym"
    assert names["MXFP8"] == "mxfp8-quantized mxfp8"
    assert names["MXFP4A16"] == "mxfp4-pack-quantized mxfp4"
    assert names["NVFP4"] == names["NVFP4A16"] == "nvfp4-pack-quantized nvfp4"
    assert len(names) == len(presets) - 1


@pytest.mark.parametrize(
    ("format", "args", "words"),
    [
        ("dense", W4A16, "format 'dense'"),
        ("pack-quantized", {**W4A16, "num_bits": 9}, "num_bits 9"),
        ("pack-quantized", {**W4A16, "num_bits": "4"}, "num_bits '4'"),
        ("pack-quantized", {**W4A16, "type": "float"}, "type 'float'"),
        ("pack-quantized", {**W4A16, "group_size": None}, "group_size None"),
        ("pack-quantized", {**W4A16, "group_size": -3}, "group_size -3"),
        ("pack-quantized", {**W4A16, "strategy": "channel"}, "group_size 128"),
        ("pack-quantized", {**W4A16, "strategy": "tensor"}, "strategy 'tensor'"),
        ("pack-quantized", {**W4A16, "dynamic": True}, "dynamic True"),
        *[
            ("pack-quantized", {**W4A16, "observer": "mse", "observer_kwargs": wrong}, words)
            for wrong, words in (
                ({"shrink": 0.5}, "observer_kwargs 'shrink'"),
                ({"norm": "2"}, "norm is '2', expected a number"),
                ({"maxshrink": 1.5}, "maxshrink is 1.5, expected 0 to 1"),
                ({"grid": 2, "maxshrink": 0.2}, "no range is tried"),
            )
        ],
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": "mse"},
            "one scale per tensor is not searched for",
        ),
        ("pack-quantized", {**W4A16, "scale_dtype": "torch.float16"}, "scale_dtype 'float16'"),
        (
            "pack-quantized",
            {**W4A16, "symmetric": False, "zp_dtype": "torch.float16"},
            "zp_dtype 'float16'",
        ),
        ("pack-quantized", {**W4A16, "symmetric": "false"}, "symmetric 'false'"),
        ("pack-quantized", {**W4A16, "groupsize": 128}, "field 'groupsize'"),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": False},
            "symmetric False",
        ),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block"},
            "block_structure None",
        ),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 0]},
            r"block_structure \[128, 0\]",
        ),
        ("nvfp4-pack-quantized", {**NVFP4, "group_size": 32}, "group_size 32"),
        ("nvfp4-pack-quantized", {**NVFP4, "scale_dtype": None}, "scale_dtype None"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    format: str, args: dict[str, object], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        Args.read(args).weight_scheme(format)


def test_weights_that_exist_may_have_been_made_in_any_way() -> None:
    args = {**W4A16, "observer": "mse", "actorder": "static"}
    scheme = Args.read(args).weight_scheme("pack-quantized", stored=True)
    assert scheme.search is not None
    odd = {**args, "observer_kwargs": {"norm": "2"}}
    scheme = Args.read(odd).weight_scheme("pack-quantized", stored=True)
    assert scheme == Args.read(W4A16).weight_scheme("pack-quantized")
    # columns in another order than the weight's are another matter
    with pytest.raises(PlanError, match="actorder 'group'"):
        Args.read({**W4A16, "actorder": "group"}).weight_scheme("pack-quantized", stored=True)


def test_weights_alone_have_the_bytes_of_weights_with_activations() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    assert Args.read(fp8).weight_scheme("naive-quantized").format == "float-quantized"
    assert Args.read({"num_bits": 4}).weight_scheme("naive-quantized").format == "int-quantized"


def test_older_spellings_are_read() -> None:
    block = {"num_bits": 8, "type": "FLOAT", "strategy": "BLOCK", "block_structure": "128x128"}
    assert Args.read(block).weight_scheme("float-quantized").block_structure == (128, 128)
    channel = {"num_bits": 8, "group_size": -1}
    assert Args.read(channel).weight_scheme("int-quantized").strategy == "channel"
    assert Args.read({}).weight_scheme("int-quantized").strategy == "tensor"


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (TensorSpec("BF16", (64, 200)), r"multiples of 128, got BF16 \[64, 200\]"),
        (TensorSpec("BF16", (64, 64)), "multiples of 128"),
        (TensorSpec("F8_E4M3", (64, 128)), "unquantized weight"),
        (TensorSpec("BF16", (2, 64, 128)), "a matrix"),
        (TensorSpec("BF16", (128,)), "a matrix"),
        (TensorSpec("BF16", (0, 128)), "a matrix"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weight: TensorSpec, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        stored(weight, Args.read(W4A16).weight_scheme("pack-quantized"))


def test_what_is_stored_is_known_from_the_shape() -> None:
    scheme = Args.read({**W4A16, "symmetric": False}).weight_scheme("pack-quantized")
    assert row_quantum(scheme) == 8
    specs = stored(TensorSpec("BF16", (4097, 4096)), scheme)
    assert {name: str(spec) for name, spec in specs.items()} == {
        "weight_packed": "I32 [4097, 512]",
        "weight_scale": "BF16 [4097, 32]",
        "weight_zero_point": "I32 [513, 32]",
        "weight_shape": "I64 [2]",
    }
