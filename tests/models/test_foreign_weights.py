"""Weights in other makers' formats, against what the makers' own code makes of them.

The fixtures in `makers/` were written and dequantized by gptqmodel, AutoAWQ and ModelOpt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.errors import PlanError, SourceError
from ckptq.models.encoded import Encoded, read_encoded
from ckptq.models.weight_rows import weight_rows, whole_weight

MAKERS = Path(__file__).parent / "makers"
NAME = "model.layers.0.mlp.up_proj"
OF_TORCH = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def cases(maker: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(MAKERS / f"{maker}.safetensors").items():
        case, _, local = name.rpartition(".")
        found.setdefault(case, {})[local] = tensor
    return found


def gptq_config(case: str) -> dict[str, Any]:
    words = case.split()
    return {
        "quant_method": "gptq",
        "bits": int(words[0][0]),
        "group_size": 16,
        "sym": "sym" in words,
        "desc_act": "ordered" in words,
        "checkpoint_format": "gptq_v2" if "v2" in words else "gptq",
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
FP8 = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}
PER_CHANNEL = {"quant_method": "modelopt", "quant_algo": "fp8_per_channel_per_token"}


def every_case() -> Iterator[Any]:
    for case, held in cases("gptq").items():
        yield pytest.param(gptq_config(case), held, id=f"gptq {case}")
    for case, held in cases("awq").items():
        yield pytest.param(AWQ, held, id=f"awq {case}")
    for case, held in cases("modelopt").items():
        if case.startswith("nvfp4"):
            yield pytest.param(MODELOPT, held, id=f"modelopt {case}")


def stored(
    folder: Path, config: dict[str, Any], held: dict[str, Tensor], dtype: str = "float16"
) -> Encoded:
    """The weight of a checkpoint that holds nothing else."""
    folder.mkdir(exist_ok=True)
    save_file({f"{NAME}.{n}": t for n, t in held.items()}, folder / "model.safetensors")
    whole = {"model_type": "llama", "dtype": dtype, "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return read_encoded(open_checkpoint(folder))[NAME]


@pytest.mark.parametrize(("config", "held"), every_case())
def test_a_weight_is_what_its_maker_makes_of_it(
    tmp_path: Path, config: dict[str, Any], held: dict[str, Tensor]
) -> None:
    expected = held.pop("dequantized")
    weight = stored(tmp_path, config, held, OF_TORCH[expected.dtype])
    assert torch.equal(whole_weight(read_tensor, weight), expected)
    with Files() as files:
        rows = weight_rows(files, weight)
        for start, stop in ((0, 8), (8, 32), (3, 17), (31, 32)):
            assert torch.equal(rows(start, stop), expected[start:stop])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("case", "config"), [("fp8", FP8), ("fp8 per channel", PER_CHANNEL)])
def test_fp8_of_modelopt_is_multiplied_as_engines_do(
    tmp_path: Path, case: str, config: dict[str, Any], dtype: str
) -> None:
    """ModelOpt's own dequantization rounds the scale to the weight's dtype first; vLLM's does not,
    and neither does transformers' of the same codes."""
    held = cases("modelopt")[f"{case} {dtype}"]
    maker_s = held.pop("dequantized")
    scale = held["weight_scale"].reshape(-1, 1)
    assert torch.equal(held["weight"].to(maker_s.dtype) * scale.to(maker_s.dtype), maker_s)
    weight = stored(tmp_path, config, held, dtype)
    expected = (held["weight"].float() * scale).to(maker_s.dtype)
    assert torch.equal(whole_weight(read_tensor, weight), expected)
    assert weight.scheme.strategy == ("tensor" if case == "fp8" else "channel")


def fp8_rows(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    scale = torch.randint(118, 130, shape).to(torch.uint8)
    if dtype != torch.uint8:
        scale = torch.rand(shape).to(dtype)
    return {"weight": (torch.randn(160, 192) * 50).to(torch.float8_e4m3fn), "weight_scale": scale}


@pytest.mark.parametrize(
    ("shape", "dtype", "scheme"),
    [
        ((2, 2), torch.float32, "fp8 block 128x128"),
        ((2, 1, 2, 1), torch.float32, "fp8 block 128x128"),
        ((160, 1), torch.bfloat16, "fp8 channel"),
        ((1,), torch.float32, "fp8 tensor"),
        ((160, 6), torch.uint8, "mxfp8"),
    ],
)
def test_kinds_of_fp8_are_told_apart_by_their_scales(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, scheme: str
) -> None:
    held = fp8_rows(shape, dtype)
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {NAME: {"quant_algo": "FP8_PB_WO"}},
    }
    weight = stored(tmp_path, config, held, "bfloat16")
    assert str(weight.scheme) == scheme
    scale = held["weight_scale"]
    scale = torch.exp2(scale.float() - 127) if dtype == torch.uint8 else scale.float()
    scale = scale.reshape(weight.tensors["weight_scale"].spec.shape)
    if scale.numel() > 1:
        rows = 128 if scale.shape[0] == 2 else 1
        wide = 128 if rows == 128 else 192 // scale.shape[1]
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(wide, 1)[:160, :192]
    expected = (held["weight"].float() * scale).bfloat16()
    assert torch.equal(whole_weight(read_tensor, weight), expected)
    with Files() as files:
        quantum = weight.quantum
        assert torch.equal(weight_rows(files, weight)(quantum, 160), expected[quantum:])


@pytest.mark.parametrize(
    ("held", "config", "message"),
    [
        (fp8_rows((3, 2)), FP8, "weight_scale' is F32 .*; expected 1, 160 or 2x2 scales"),
        (fp8_rows((160, 6), torch.int8), FP8, r"expected a float, or U8 \[160, 6\]"),
        (fp8_rows(()) | {"weight": torch.zeros(4, 4, dtype=torch.int8)}, FP8, "expected F8_E4M3"),
        (fp8_rows(()) | {"weight": torch.zeros(4, 8, dtype=torch.uint8)}, FP8, "but no .*_scale_2"),
        (
            cases("modelopt")["nvfp4 float16"] | {"weight_scale": torch.ones(32, 4)},
            MODELOPT,
            r"weight_scale' is F32 .*expected F8_E4M3 \[32, 4\]",
        ),
        (
            cases("modelopt")["nvfp4 float16"] | {"weight_scale_2": torch.ones(2)},
            MODELOPT,
            r"weight_scale_2' is F32 \[2\]; expected",
        ),
        ({"weight_scale": torch.ones(1)}, FP8, r"found .*weight_scale but no .*\.weight"),
    ],
)
def test_tensors_of_modelopt_that_do_not_fit_are_refused(
    tmp_path: Path, held: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        stored(tmp_path, config, held)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"quant_algo": "W4A16_AWQ"}, {}, "ModelOpt's 'W4A16_AWQ', which ckptq cannot read"),
        ({"quantization": {"quant_algo": "INT8"}}, {}, "ModelOpt's 'INT8'"),
        ({}, {}, "ModelOpt's None"),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "NVFP4_AWQ"}},
            },
            {},
            "ModelOpt's 'NVFP4_AWQ'",
        ),
        ({"quant_algo": "NVFP4"}, {"pre_quant_scale": torch.ones(64)}, "need another input"),
    ],
)
def test_algorithms_of_modelopt_that_are_not_read_are_refused(
    tmp_path: Path, config: dict[str, Any], more: dict[str, Tensor], message: str
) -> None:
    held = cases("modelopt")["nvfp4 float16"] | more
    with pytest.raises(PlanError, match=message):
        stored(tmp_path, {"quant_method": "modelopt", **config}, held)


def test_modelopt_s_own_file_counts_where_config_json_is_silent(tmp_path: Path) -> None:
    held = cases("modelopt")["nvfp4 bfloat16"]
    expected = held.pop("dequantized")
    stored(tmp_path, MODELOPT, held, "bfloat16")
    plain = {"model_type": "llama", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    own = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    ckpt = open_checkpoint(tmp_path)
    assert torch.equal(whole_weight(read_tensor, read_encoded(ckpt)[NAME]), expected)
    assert ckpt.side_files() == []


E8M0 = torch.float8_e8m0fnu
PAIRS = torch.zeros(8, 32, dtype=torch.int8)
CODES = torch.zeros(8, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"weight": PAIRS, "scale": torch.ones(8, 3).to(E8M0)}, r"F8_E8M0 .*; expected \[8, 2\]"),
        ({"weight": PAIRS, "scale": torch.ones(8, 2)}, "F32 .*expected U8 or F8_E8M0"),
        ({"weight": CODES, "scale": torch.ones(4)}, r"no weight_block_size; .*or \[8, 1\]"),
        ({"weight": CODES, "weight_scale": torch.ones(1, 8)}, r"or \[8, 1\]"),
        ({"weight": CODES[None], "scale": torch.ones(8)}, "expected a matrix"),
    ],
)
def test_scales_of_other_makers_fp8_that_do_not_fit_are_refused(
    tmp_path: Path, held: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        stored(tmp_path, {"quant_method": "fp8"}, held)


def test_a_scale_beside_numbers_is_none_of_a_quantized_weight(tmp_path: Path) -> None:
    """Some modules have a parameter of that name."""
    held = {"weight": torch.ones(8, 64).bfloat16(), "scale": torch.ones(8)}
    with pytest.raises(KeyError):
        stored(tmp_path, {"quant_method": "fp8"}, held)


@pytest.mark.parametrize("local", ["qweight", "weight_packed", "gate_up_proj_blocks"])
def test_codes_of_a_checkpoint_that_says_nothing_of_them_are_refused(
    tmp_path: Path, local: str
) -> None:
    with pytest.raises(SourceError, match=rf"{local}' holds U8 .*has no quantization_config"):
        stored(tmp_path, {}, {local: torch.zeros(4, 4, dtype=torch.uint8)})


@pytest.mark.parametrize("maker", ["gptq 4-bit v1 asym", "gptq 3-bit v2 asym", "awq gemm"])
@pytest.mark.parametrize("local", ["qweight", "qzeros", "scales"])
def test_a_changed_bit_is_noticed(tmp_path: Path, maker: str, local: str) -> None:
    """The comparison above can fail."""
    maker, _, case = maker.partition(" ")
    held = cases(maker)[case]
    expected = held.pop("dequantized")
    config = gptq_config(case) if maker == "gptq" else AWQ
    bits = held[local].view(torch.uint8).flatten()
    bits[7] ^= 1
    weight = stored(tmp_path, config, held)
    assert not torch.equal(whole_weight(read_tensor, weight), expected)


def test_zero_points_of_the_first_version_are_read_as_such(tmp_path: Path) -> None:
    """A v1 file that is called v2 is wrong by one step everywhere."""
    held = cases("gptq")["4-bit v1 asym"]
    expected = held.pop("dequantized")
    config = gptq_config("4-bit v2 asym")
    weight = stored(tmp_path, config, held)
    assert (whole_weight(read_tensor, weight) != expected).all()


def test_a_zero_point_of_zero_in_the_first_version(tmp_path: Path) -> None:
    """It is stored as -1, all bits set: 0, not 16."""
    held = cases("gptq")["4-bit v2 asym"]
    held.pop("dequantized")
    held["qzeros"] = torch.full_like(held["qzeros"], -1)
    first = stored(tmp_path / "first", gptq_config("4-bit v1 asym"), held)
    held["qzeros"] = torch.zeros_like(held["qzeros"])
    second = stored(tmp_path / "second", gptq_config("4-bit v2 asym"), held)
    assert torch.equal(whole_weight(read_tensor, first), whole_weight(read_tensor, second))


def test_modules_may_have_bits_of_their_own(tmp_path: Path) -> None:
    """`dynamic` of GPTQModel; the shapes tell."""
    held = cases("gptq")["8-bit v2 sym"]
    expected = held.pop("dequantized")
    weight = stored(tmp_path, gptq_config("4-bit v2 sym"), held)
    assert weight.scheme.num_bits == 8
    assert torch.equal(whole_weight(read_tensor, weight), expected)


def test_one_group_for_the_whole_row_is_a_channel(tmp_path: Path) -> None:
    held = cases("gptq")["4-bit v2 asym"]
    held.pop("dequantized")
    held |= {n: held[n][:1].contiguous() for n in ("qzeros", "scales")}
    held["g_idx"] = torch.zeros_like(held["g_idx"])
    weight = stored(tmp_path, gptq_config("4-bit v2 asym") | {"group_size": -1}, held)
    assert str(weight.scheme) == "int4 channel asym"
    code = whole_weight(read_tensor, weight) / held["scales"].t()
    assert torch.allclose(code, code.round(), atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; supported: 'gptq', "),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"bits": 5}, "bits is 5; supported: 2, 3, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"sym": 1}, "sym is 1"),
    ],
)
def test_a_layout_of_gptq_that_is_not_read_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    held = cases("gptq")["4-bit v1 sym"]
    with pytest.raises(PlanError, match=rf"config\.json: quantization_config\.{message}"):
        stored(tmp_path, gptq_config("4-bit v1 sym") | change, held)


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"version": "marlin"}, {"bits": 8}])
def test_a_layout_of_awq_that_is_not_read_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    (field,) = change
    with pytest.raises(PlanError, match=rf"quantization_config\.{field} is .*; supported: "):
        stored(tmp_path, AWQ | change, cases("awq")["gemm"])


@pytest.mark.parametrize("maker", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("local", "change", "message"),
    [
        ("scales", lambda t: t.t().contiguous(), "matrix of|expected"),
        ("scales", lambda t: t.to(torch.float8_e4m3fn), "expected F16 or BF16 or F32"),
        ("qzeros", lambda t: t[:, :-1].contiguous(), "expected I32"),
        ("qzeros", lambda t: t.long(), "expected I32"),
        ("qweight", lambda t: t.view(torch.uint8), "matrix of|expected I32"),
        ("qweight", lambda t: t[:-1].contiguous(), "matrix of|expected"),
        ("qzeros", None, "but no model.layers.0.mlp.up_proj.qzeros"),
        ("scales", None, "but no model.layers.0.mlp.up_proj.scales"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, maker: str, local: str, change: Any, message: str
) -> None:
    held = cases(maker)["4-bit v1 sym" if maker == "gptq" else "gemm"]
    config = gptq_config("4-bit v1 sym") if maker == "gptq" else AWQ
    held.pop("dequantized")
    if change is None:
        held.pop(local)
    else:
        held[local] = change(held[local])
    with pytest.raises(SourceError, match=message):
        stored(tmp_path, config, held)


PACKED = {
    "int4": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, torch.int32),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
         "scale_dtype": "torch.uint8"},
        torch.uint8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_packed_codes_without_their_scales_are_refused(tmp_path: Path, kind: str) -> None:
    """Copied, they would pass for a module that nobody has quantized."""
    weights, dtype = PACKED[kind]
    group = {"targets": ["Linear"], "weights": weights}
    style = "pack-quantized" if kind == "int4" else "mxfp4-pack-quantized"
    config = {"quant_method": "compressed-tensors", "format": style, "config_groups": {"g": group}}
    held = {
        "weight_packed": torch.zeros(64, 128 * 4 // (8 * dtype.itemsize), dtype=dtype),
        "weight_scale": torch.ones(64, 4, dtype=torch.float16 if kind == "int4" else dtype),
    }
    stored(tmp_path / "whole", config, held)
    del held["weight_scale"]
    with pytest.raises(SourceError, match=r"found .*weight_packed but no .*up_proj\.weight_scale"):
        stored(tmp_path / "without", config, held)


def test_an_order_of_groups_that_is_missing_is_refused(tmp_path: Path) -> None:
    held = cases("gptq")["4-bit v1 asym ordered"]
    del held["dequantized"], held["g_idx"]
    with pytest.raises(SourceError, match=r"no model\.layers\.0\.mlp\.up_proj\.g_idx.*desc_act"):
        stored(tmp_path / "ordered", gptq_config("4-bit v1 asym ordered"), held)
    stored(tmp_path / "plain", gptq_config("4-bit v1 asym"), held)


def test_what_headers_cannot_tell_is_refused_with_the_tensor(tmp_path: Path) -> None:
    held = cases("gptq")["4-bit v1 asym ordered"]
    held.pop("dequantized")
    odd = {
        "not in order": ({"desc_act": False}, {}, r"g_idx' reorders .* desc_act false"),
        "out of range": ({}, {"g_idx": held["g_idx"] + 1}, r"g_idx' holds .*expected 0 to 3"),
        "zeroed": ({}, {"g_idx": held["g_idx"] * 0}, "puts 64 columns into group 0; expected 16"),
        "not symmetric": ({"sym": True}, {}, r"qzeros' has zero points other than 8, but config"),
    }
    for name, (change, tensors, message) in odd.items():
        config = gptq_config("4-bit v1 asym ordered") | change
        weight = stored(tmp_path / name, config, held | tensors)
        with pytest.raises(SourceError, match=message):
            whole_weight(read_tensor, weight)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "exl2", None, 4, ["gptq"]])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: object) -> None:
    held = {"weight": torch.zeros(4, 4, dtype=torch.uint8)}
    with pytest.raises(PlanError, match=r"quantized with .*, which ckptq cannot read.*start from"):
        stored(tmp_path, {"quant_method": method}, held)
