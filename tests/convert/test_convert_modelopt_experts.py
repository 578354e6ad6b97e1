"""Llama-4's experts as ModelOpt stores them, in one tensor of FP8 or NVFP4 codes: decoded, and left
in one tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from convert_cases import convert
from families.sources import save, save_variant
from tiny.foreign import e2m1_codes, fp8_method, nvfp4_method
from tiny.tensors import tensors_in
from torch import Tensor

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError
from ckptq.forward.decoded import weights_of
from ckptq.models.encoded import read_encoded
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

Tensors = dict[str, Tensor]
EXPERTS = "model.layers.1.feed_forward.experts"


def fp8(w_ECO: Tensor, one_each: bool = False) -> tuple[Tensors, Tensor]:
    amax = w_ECO.float().abs().amax((1, 2)) if one_each else w_ECO.float().abs().max()
    scale = amax / 448
    code = (w_ECO.float() / scale.reshape(-1, 1, 1)).to(torch.float8_e4m3fn)
    return {"": code, "_weight_scale": scale}, code.float() * scale.reshape(-1, 1, 1)


def nvfp4(w_ECO: Tensor) -> tuple[Tensors, Tensor]:
    """Codes and scales as of each expert's [O, C] by rows, then turned."""
    x = w_ECO.float().transpose(1, 2).unflatten(2, (-1, 16))
    second = x.abs().amax((1, 2, 3)) / (448 * 6)
    each = second.reshape(-1, 1, 1)
    scale = (x.abs().amax(-1) / 6 / each).to(torch.float8_e4m3fn)
    code = e2m1_codes(x / (scale.float() * each)[..., None]).flatten(2)
    pairs = code[..., ::2] | code[..., 1::2] << 4
    E, O, C = code.shape
    values = unpack_fp4_from_uint8(pairs.flatten(0, 1), E * O, C, torch.float32).view(E, O, C)
    w = (values.unflatten(2, (-1, 16)) * (scale.float() * each)[..., None]).flatten(2)
    held = {
        "": pairs.transpose(1, 2).contiguous(),
        "_weight_scale": scale.transpose(1, 2).contiguous(),
        "_weight_scale_2": second,
        "_input_scale": torch.tensor(0.01),
    }
    return held, w.transpose(1, 2)


Maker = Callable[[Tensor], tuple[Tensors, Tensor]]
MAKERS: dict[str, tuple[Maker, dict]] = {
    "fp8": (fp8, fp8_method()),
    "fp8, a scale for each expert": (lambda w: fp8(w, True), fp8_method()),
    "nvfp4": (nvfp4, nvfp4_method()),
}


def written(tmp_path: Path, maker: Maker, method: dict) -> tuple[Path, Tensors]:
    """A Llama-4 whose experts are quantized, and what they mean."""
    weights: Tensors = {}

    def change(tensors):
        made = {}
        for name, tensor in tensors.items():
            if ".experts." not in name:
                made[name] = tensor
                continue
            held, weights[name] = maker(tensor)
            made |= {name + local: part for local, part in held.items()}
        return made

    plain = save("llama4_text", tmp_path)
    source = tmp_path / "source"
    save_variant(plain, source, change, {"quantization_config": method})
    return source, {name: w.bfloat16() for name, w in weights.items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_experts_are_decoded_and_stay_one_tensor(tmp_path, kind):
    source, weights = written(tmp_path, *MAKERS[kind])
    assert set(read_encoded(open_checkpoint(source))) == set(weights)
    loaded = weights_of(open_checkpoint(source)).load(list(weights))
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    out = convert(source, tmp_path / "out", load_scheme("dequantize")).out
    made = tensors_in(out)
    assert all(torch.equal(made[name], weights[name]) for name in weights)
    assert not [name for name in made if "_scale" in name]
    assert verify(out, source).findings == ()


def test_the_rest_is_quantized_beside_them(tmp_path):
    source, weights = written(tmp_path, *MAKERS["fp8"])
    out = convert(source, tmp_path / "out", load_scheme("fp8-dynamic")).out
    made = tensors_in(out)
    assert all(torch.equal(made[name], weights[name]) for name in weights)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert any("experts" in name for name in config["ignore"])
    assert verify(out, source).findings == ()


def test_scales_that_do_not_fit_are_named(tmp_path):
    def wrong(w_ECO: Tensor) -> tuple[Tensors, Tensor]:
        held, w = fp8(w_ECO)
        return held | {"_weight_scale": torch.ones(3)}, w

    source, _ = written(tmp_path, wrong, fp8_method())
    with pytest.raises(SourceError, match=r"_weight_scale' is F32 \[3\]; expected one scale, or"):
        read_encoded(open_checkpoint(source))
