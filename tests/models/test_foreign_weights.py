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


def every_case() -> Iterator[Any]:
    for case, held in cases("gptq").items():
        yield pytest.param(gptq_config(case), held, id=f"gptq {case}")
    for case, held in cases("awq").items():
        yield pytest.param(AWQ, held, id=f"awq {case}")


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


def test_what_headers_cannot_tell_is_refused_with_the_tensor(tmp_path: Path) -> None:
    held = cases("gptq")["4-bit v1 asym ordered"]
    held.pop("dequantized")
    odd = {
        "not in order": ({"desc_act": False}, {}, r"g_idx' reorders .* desc_act false"),
        "out of range": ({}, {"g_idx": held["g_idx"] + 1}, r"g_idx' holds .*expected 0 to 3"),
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
