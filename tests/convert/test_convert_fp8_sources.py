"""FP8 sources that are not compressed-tensors': what their scales mean is what transformers reads.

Shape letters: R rows (out), C columns (in).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from convert_cases import convert, recipe_of, scheme_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.errors import SourceError
from ckptq.forward.decoded import weights_of
from ckptq.models.modules import read_layout
from ckptq.models.weight_rows import outermost_rows, weight_rows, whole_weight
from ckptq.plan.make import make_plan
from ckptq.quantize.dequantize import dequantize
from ckptq.quantize.formats import NonFinite, quantize, statistic
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

H, I = 96, 160
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LAYER = "model.layers.0"
LINEARS = {
    f"{LAYER}.self_attn.q_proj": (H, H),
    f"{LAYER}.self_attn.k_proj": (32, H),
    f"{LAYER}.self_attn.v_proj": (32, H),
    f"{LAYER}.self_attn.o_proj": (H, H),
    f"{LAYER}.mlp.gate_proj": (I, H),
    f"{LAYER}.mlp.up_proj": (I, H),
    f"{LAYER}.mlp.down_proj": (H, I),
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
STORED_AS = {
    "F8_E8M0": lambda exponent: torch.exp2(exponent).to(E8M0),
    "U8": lambda exponent: (exponent + 127).to(torch.uint8),
    "F32": torch.exp2,
    "BF16": lambda exponent: torch.exp2(exponent).bfloat16(),
    "F16": lambda exponent: torch.exp2(exponent).half(),
    "F64": lambda exponent: torch.exp2(exponent).double(),
}


def source(
    folder: Path,
    block: tuple[int, int] | None,
    dtype: str,
    config: dict[str, Any] | None = None,
    more: dict[str, Tensor] | None = None,
) -> Path:
    """FP8 codes and scales that nobody trained; powers of two, which every dtype can hold."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(32, H, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(32, H, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(H).bfloat16(),
    }
    for name, (R, C) in LINEARS.items():
        codes = torch.randn(R, C, generator=generator).mul(100).clamp(-448, 448)
        grid = (-(-R // block[0]), -(-C // block[1])) if block else ()
        exponent = torch.randint(-13, -7, grid, generator=generator).float()
        tensors[f"{name}.weight"] = codes.to(E4M3)
        tensors[f"{name}.weight_scale_inv"] = STORED_AS[dtype](exponent)
    tensors |= more or {}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = FP8 | {"weight_block_size": list(block) if block else None} | (config or {})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": method}))
    return folder


def as_transformers_reads(folder: Path, name: str) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = load_file(folder / "model.safetensors")
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    reader = Fp8Dequantize(SimpleNamespace())
    return reader._dequantize_one(weight, scale.reshape(scale.shape or (1, 1)), torch.bfloat16)


BLOCKS = [(32, 32), (16, 32), (1, 32), None]


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_scales_mean_what_transformers_reads(
    tmp_path: Path, block: tuple[int, int] | None, dtype: str
) -> None:
    folder = source(tmp_path / "source", block, dtype, {"scale_fmt": "ue8m0"})
    ckpt = open_checkpoint(folder)
    given = weights_of(ckpt)
    for name, linear in read_layout(ckpt).linears.items():
        if name in LINEARS:
            expected = as_transformers_reads(folder, name)
            assert torch.equal(whole_weight(read_tensor, linear.weight), expected), name
            assert torch.equal(given.load([f"{name}.weight"])[f"{name}.weight"], expected)
    out = convert(folder, tmp_path / "out", recipe_of("fp8 channel")).out
    made = load_file(out / "model.safetensors")
    for name in LINEARS:
        expected = quantize(as_transformers_reads(folder, name), scheme_of("fp8 channel"))
        assert torch.equal(made[f"{name}.weight_scale"], expected["weight_scale"])
        assert torch.equal(
            made[f"{name}.weight"].view(torch.uint8), expected["weight"].view(torch.uint8)
        )
    assert verify(out, folder).ok


@pytest.mark.parametrize("block", [(32, 32), (64, 32), (1, 32)], ids=str)
@pytest.mark.parametrize("code", [0x00, 0x7E, 0xFE, 0x7F, 0xFF])
def test_the_outermost_codes_have_the_extremes_of_all(
    tmp_path: Path, block: tuple[int, int], code: int
) -> None:
    """A pass over whole weights reads only those. 0x7F and 0xFF are NaN. One block has numbers
    below zero only, another only those above."""
    name = f"{LAYER}.mlp.gate_proj"
    byte_RC = torch.randint(1, 0x60, (I, H), generator=torch.Generator().manual_seed(1))
    byte_RC[32:64] += 0x80
    byte_RC[70, 3] = code
    more = {f"{name}.weight": byte_RC.to(torch.uint8).view(E4M3)}
    ckpt = open_checkpoint(source(tmp_path / "source", block, "F32", more=more))
    weight = read_layout(ckpt).linears[name].weight
    with Files() as files:
        few, every = outermost_rows(files, weight), weight_rows(files, weight)
        assert few is not None
        for start in range(0, I, 64):
            span = start, min(start + 64, I)
            if start == 64 and code & 0x7F == 0x7F:
                with pytest.raises(NonFinite):
                    statistic(few(*span), scheme_of("nvfp4"))
                continue
            found = statistic(few(*span), scheme_of("nvfp4"))
            assert torch.equal(found, statistic(every(*span), scheme_of("nvfp4")))


def test_an_exponent_that_is_one_off_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail."""
    folder = source(tmp_path / "source", (32, 32), "U8")
    out = convert(folder, tmp_path / "out", recipe_of("fp8 channel")).out
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.mlp.up_proj.weight_scale_inv"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    faults = [f for f in verify(out, folder).findings if f.severity == "fault"]
    assert {f.tensor.rpartition(".")[0] for f in faults if f.tensor} == {f"{LAYER}.mlp.up_proj"}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, E4M3, torch.float8_e5m2, torch.bool]
)
def test_a_scale_of_no_known_meaning_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    name = f"{LAYER}.self_attn.o_proj.weight_scale_inv"
    odd = torch.ones(3, 3).to(dtype)
    folder = source(tmp_path / "source", (32, 32), "F32", more={name: odd})
    with pytest.raises(
        SourceError, match=rf"model\.safetensors: tensor '{name}' is .*expected F64"
    ):
        make_plan(open_checkpoint(folder), load_scheme("fp8-dynamic"))
    tensors = {"weight": torch.ones(96, 96).to(E4M3), "weight_scale": odd}
    with pytest.raises(TypeError, match="no number to multiply with"):
        dequantize(tensors, scheme_of("fp8 block"))


def test_exponents_under_an_unknown_format_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", (32, 32), "U8", {"scale_fmt": "e5m0"})
    with pytest.raises(SourceError, match="has scale_fmt 'e5m0'; expected 'ue8m0'"):
        make_plan(open_checkpoint(folder), load_scheme("fp8-dynamic"))
    floats = source(tmp_path / "floats", (32, 32), "F32", {"scale_fmt": "e5m0"})
    make_plan(open_checkpoint(floats), load_scheme("fp8-dynamic"))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 1), (4, 3)])
def test_a_grid_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A single scale would be spread over all blocks in silence."""
    name = f"{LAYER}.self_attn.o_proj.weight_scale_inv"
    folder = source(tmp_path / "source", (32, 32), "F32", more={name: torch.ones(shape)})
    with pytest.raises(SourceError, match=rf"'{name}' is F32 .* expected \[3, 3\]"):
        make_plan(open_checkpoint(folder), load_scheme("fp8-dynamic"))


def test_blocks_without_their_sides_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", (32, 32), "F32", {"weight_block_size": None})
    with pytest.raises(SourceError, match="json has no weight_block_size"):
        make_plan(open_checkpoint(folder), load_scheme("fp8-dynamic"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{LAYER}.mlp.experts.gate_up_proj", torch.ones(2, 8, 8).to(E4M3)),
        (f"{LAYER}.mlp.experts.down_proj", torch.ones(2, 8, 8).to(torch.int8)),
        ("lm_head.weight", torch.ones(32, H).to(E4M3)),
        (f"{LAYER}.attn.sink", torch.ones(4).to(torch.float8_e5m2)),
    ],
)
def test_codes_that_no_scheme_explains_are_refused(
    tmp_path: Path, name: str, tensor: Tensor
) -> None:
    folder = source(tmp_path / "source", (32, 32), "F32", more={name: tensor})
    ckpt = open_checkpoint(folder)
    with pytest.raises(SourceError, match=f"tensor '{name}' is .* no supported scheme for it"):
        make_plan(ckpt, load_scheme("fp8-dynamic"))
    if tensor.dtype is not torch.int8:
        with pytest.raises(SourceError, match=f"tensor '{name}'"):
            weights_of(ckpt)


def test_scales_of_activations_go_with_the_source_s_quantization(tmp_path: Path) -> None:
    more = {f"{name}.activation_scale": torch.tensor(0.5) for name in LINEARS}
    folder = source(tmp_path / "source", None, "BF16", {"activation_scheme": "static"}, more)
    out = convert(folder, tmp_path / "out", load_scheme("w8a8")).out
    assert not [n for n in load_file(out / "model.safetensors") if n.endswith("activation_scale")]
    assert verify(out, folder).ok


def test_weights_beyond_float16_are_told(tmp_path: Path) -> None:
    """bfloat16 holds what float16 does not; the codes are no NaN."""
    name = f"{LAYER}.mlp.up_proj.weight_scale_inv"
    huge = torch.full((5, 3), 1e4)
    folder = source(tmp_path / "source", (32, 32), "F32", more={name: huge})
    config = json.loads((folder / "config.json").read_text())
    convert(folder, tmp_path / "bf16", recipe_of("fp8 channel"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(SourceError, match=r"up_proj\.weight' decodes to weights beyond 65504"):
        convert(folder, tmp_path / "fp16", recipe_of("fp8 channel"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_zero_points_in_another_dtype_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """compressed-tensors keeps int8 zero points beside int8 codes; ours come back."""
    folder = source(tmp_path / "source", (32, 32), "F32")
    first = convert(folder, tmp_path / "first", recipe_of("int8 tensor asym")).out
    read_layout(open_checkpoint(first))
    tensors = load_file(first / "model.safetensors")
    name = f"{LAYER}.self_attn.v_proj.weight_zero_point"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"'{name}' is .*; expected I8 "):
        make_plan(open_checkpoint(first), load_scheme("fp8-dynamic"))
