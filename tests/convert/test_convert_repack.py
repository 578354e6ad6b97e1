"""A quantized source in compressed-tensors' layout, number for number; and in no layout at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from convert_cases import convert
from convert_killed import Run, digests, perform
from families.sources import save, save_variant
from safetensors.torch import load_file, save_file
from test_convert_foreign import source
from tiny.foreign import (
    E2M1,
    FP8_METHOD,
    LINEARS,
    Foreign,
    fp8,
    fp8_method,
    gptq,
    gptq_method,
    unquantized,
    write,
)
from tiny.tensors import differences, tensors_in
from torch import Tensor

from ckptq.calibrate.request import CalibrationRequest
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Recipe
from ckptq.verify.report import Report
from ckptq.verify.run import verify

REPACK, DEQUANTIZE = load_scheme("repack"), load_scheme("dequantize")
KINDS = {
    "gptq": "int4 group 32",
    "gptq asym v2": "int4 group 32 asym",
    "gptq 3-bit asym": "int3 group 32 asym",
    "gptq 8-bit": "int8 group 32",
    "awq": "int4 group 32 asym",
    "modelopt fp8": "fp8 tensor",
    "modelopt nvfp4": "nvfp4",
    "fp8 rows": "fp8 channel",
    "fbgemm": "fp8 channel",
}


def faults(report: Report) -> list[tuple[str, str | None]]:
    return [(f.code, f.tensor) for f in report.findings if f.severity == "fault"]


def by_compressed_tensors(folder: Path, linear: str) -> Tensor:
    """A weight as compressed-tensors reads the output, in float32."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    scheme: Any = QuantizationScheme.model_validate(group)
    prefix = f"{linear}."
    held = {n.removeprefix(prefix): t for n, t in tensors_in(folder).items() if prefix in n}
    held = {n: t for n, t in held.items() if not n.startswith("input")}
    compressor: Any = BaseCompressor.get_value_from_registry(group["format"])
    return compressor.decompress(held, scheme)["weight"]


@pytest.mark.parametrize("format", KINDS)
def test_the_numbers_are_the_source_s(tmp_path: Path, format: str) -> None:
    foreign = source(tmp_path / "source", format)
    out = convert(foreign.folder, tmp_path / "out", REPACK).out
    for name in LINEARS:
        made = by_compressed_tensors(out, name)
        wanted = foreign.weights[name]
        apart = (made.to(wanted.dtype) != wanted).float().mean()
        # the inverse of NVFP4's global scale is not always a float32
        assert apart <= (1e-3 if format == "modelopt nvfp4" else 0), name
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    assert [f.code for f in report.findings if f.severity != "note"] == []
    assert {one.scheme for one in report.tensors} == {KINDS[format]}
    assert all(one.snr_db == float("inf") for one in report.tensors)


def change(folder: Path, name: str, edit: Callable[[Tensor], None]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"no {name}")


def flip(tensor: Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[3] ^= 0x10


@pytest.mark.parametrize(
    ("format", "local"),
    [
        ("gptq asym v2", "weight_packed"),
        ("gptq asym v2", "weight_zero_point"),
        ("gptq asym v2", "weight_scale"),
        ("awq", "weight_packed"),
        ("modelopt fp8", "weight"),
        ("modelopt fp8", "weight_scale"),
        ("modelopt nvfp4", "weight_packed"),
        ("modelopt nvfp4", "weight_scale"),
        ("modelopt nvfp4", "weight_global_scale"),
    ],
)
def test_a_number_that_is_another_one_is_noticed(tmp_path: Path, format: str, local: str) -> None:
    foreign = source(tmp_path / "source", format)
    out = convert(foreign.folder, tmp_path / "out", REPACK).out
    name = "model.layers.1.mlp.up_proj"
    change(out, f"{name}.{local}", flip)
    found = faults(verify(out, foreign.folder))
    assert {tensor.rpartition(".")[0] for _, tensor in found if tensor} == {name}


@pytest.mark.parametrize("format", ["gptq", "gptq asym ordered", "awq", "modelopt nvfp4"])
def test_dequantized_it_is_the_unquantized_model(tmp_path: Path, format: str) -> None:
    foreign = source(tmp_path / "source", format)
    plain = unquantized(foreign, tmp_path / "plain")
    out = convert(foreign.folder, tmp_path / "out", DEQUANTIZE).out
    assert differences(tensors_in(out), tensors_in(plain)) == []
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )
    assert not (out / "recipe.yaml").exists()
    assert verify(out, foreign.folder).ok
    change(out, "model.layers.0.self_attn.o_proj.weight", flip)
    found = faults(verify(out, foreign.folder))
    assert found == [("copy-differs", "model.layers.0.self_attn.o_proj.weight")]


def test_a_source_of_several_formats_is_repacked_in_groups(tmp_path: Path) -> None:
    """DeepSeek-V4's: FP8 in blocks, and MXFP4; vLLM reads their exponents as float32 and U8."""
    foreign = source(tmp_path / "source", "deepseek")
    out = convert(foreign.folder, tmp_path / "out", REPACK).out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    formats = {group["format"] for group in config["config_groups"].values()}
    assert formats == {"float-quantized", "mxfp4-pack-quantized"}
    assert config["format"] == "mixed-precision"
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    assert {one.snr_db for one in report.tensors} == {float("inf")}
    change(out, "model.layers.0.mlp.up_proj.weight_scale", flip)
    assert {t.rpartition(".")[0] for _, t in faults(verify(out, foreign.folder)) if t} == {
        "model.layers.0.mlp.up_proj"
    }


def test_modules_of_other_bits_get_a_group_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`; and a module that it leaves alone."""
    makers = {"v_proj": gptq(bits=8), "q_proj": gptq(bits=8), "k_proj": gptq(bits=8)}
    plain = "model.layers.1.mlp.down_proj"

    def maker(w_RC: Tensor) -> Any:
        return makers.get(next(turns).rpartition(".")[2], gptq())(w_RC)

    turns = iter(LINEARS)
    foreign = write(tmp_path / "source", maker, gptq_method())
    stored = load_file(foreign.folder / "model.safetensors")
    stored = {n: t for n, t in stored.items() if not n.startswith(f"{plain}.")}
    stored[f"{plain}.weight"] = foreign.weights[plain]
    save_file(stored, foreign.folder / "model.safetensors", metadata={"format": "pt"})
    out = convert(foreign.folder, tmp_path / "out", REPACK).out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] == [8, 4]
    assert groups[1]["targets"] == ["Linear"]
    assert "model.layers.0.self_attn.qkv_proj" in groups[0]["targets"]
    assert plain in config["ignore"]
    report = verify(out, foreign.folder)
    assert report.ok, report.findings


def test_static_inputs_keep_their_scales(tmp_path: Path) -> None:
    for format, local, value in (
        ("modelopt fp8", "input_scale", 0.03),
        ("modelopt nvfp4", "input_global_scale", 1 / 0.0007),
    ):
        foreign = source(tmp_path / format, format)
        out = convert(foreign.folder, tmp_path / f"{format} out", REPACK).out
        made = tensors_in(out)
        for name in LINEARS:
            assert made[f"{name}.{local}"].dtype == torch.float32
            assert torch.allclose(made[f"{name}.{local}"], torch.tensor([value]))


def test_scales_of_an_fp8_cache_are_carried(tmp_path: Path) -> None:
    """Under the names that engines load for this layout; queries get the keys' scale."""
    attention = [f"model.layers.{i}.self_attn" for i in range(2)]
    more = {
        f"{a}.{w}_proj.{w}_scale": torch.tensor(0.5 if w == "k" else 0.25)
        for a in attention
        for w in "kv"
    }
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    method = fp8_method(kv_cache_scheme=scheme)
    foreign = write(tmp_path / "source", fp8, method, torch.bfloat16, more)
    out = convert(foreign.folder, tmp_path / "out", REPACK).out
    made = tensors_in(out)
    for a in attention:
        found = {which: made[f"{a}.{which}_scale"].tolist() for which in "qkv"}
        assert found == {"q": [0.5], "k": [0.5], "v": [0.25]}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "tensor"
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    anew = convert(foreign.folder, tmp_path / "anew", load_scheme("fp8-dynamic")).out
    assert not [name for name in tensors_in(anew) if name.endswith(("k_scale", "v_scale"))]
    half = {name: tensor for name, tensor in more.items() if "layers.0" in name}
    lacking = half | {f"{attention[1]}.k_proj.k_scale": torch.tensor(1.0)}
    foreign = write(tmp_path / "half", fp8, method, torch.bfloat16, lacking)
    out = convert(foreign.folder, tmp_path / "half out", REPACK).out
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
        is None
    )
    assert not [name for name in tensors_in(out) if name.endswith(("k_scale", "v_scale"))]


def damaged(source: Path, out: Path, name: str, value: float, at: int = 0) -> Path:
    """A copy in which one number of a tensor is another."""
    tensors = load_file(source / "model.safetensors")
    flat = tensors[name].clone().reshape(-1)
    if flat.dtype == torch.uint8:
        flat[at] = int(value)
    else:
        flat[at] = torch.tensor(value).to(flat.dtype)
    tensors[name] = flat.reshape(tensors[name].shape)
    shutil.copytree(source, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("gptq", "scales", NAN), ("gptq", "scales", INF), ("awq", "scales", 0.0),
    ("modelopt fp8", "weight_scale", NAN), ("modelopt fp8", "weight_scale", -1.0),
    ("modelopt fp8", "input_scale", 0.0), ("modelopt fp8", "weight", NAN),
    ("modelopt nvfp4", "weight_scale", NAN), ("modelopt nvfp4", "weight_scale_2", INF),
    ("fp8 rows", "weight_scale", NAN), ("fp8 rows", "weight", NAN), ("fbgemm", "weight_scale", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("format", "local", "value"), WRONG)
def test_numbers_that_are_none_are_refused(
    tmp_path: Path, format: str, local: str, value: float
) -> None:
    """By the file and the tensor; the twin is the source itself."""
    foreign = source(tmp_path / "source", format)
    name = next(n for n in sorted(tensors_in(foreign.folder)) if n.endswith(f"_proj.{local}"))
    broken = damaged(foreign.folder, tmp_path / "broken", name, value)
    with pytest.raises(SourceError) as refused:
        convert(broken, tmp_path / "out", REPACK)
    linear = name.removesuffix(local)
    assert str(refused.value).startswith(f"{broken}/model.safetensors: tensor '{linear}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "local"), [("gptq", "scales"), ("fp8 rows", "weight")])
@pytest.mark.parametrize("recipe", ["dequantize", "fp8-dynamic"])
def test_weights_that_are_none_are_refused(
    tmp_path: Path, format: str, local: str, recipe: str
) -> None:
    foreign = source(tmp_path / "source", format)
    name = next(n for n in sorted(tensors_in(foreign.folder)) if n.endswith(f"_proj.{local}"))
    broken = damaged(foreign.folder, tmp_path / "broken", name, NAN, at=-1)
    with pytest.raises(SourceError, match=r"safetensors: tensor '.*NaN|not finite"):
        convert(broken, tmp_path / "out", load_scheme(recipe))


@pytest.mark.parametrize("value", [NAN, 0.0, -0.5])
def test_scales_of_a_cache_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    attention = [f"model.layers.{i}.self_attn" for i in range(2)]
    more = {f"{a}.{w}_proj.{w}_scale": torch.tensor(0.5) for a in attention for w in "kv"}
    more[f"{attention[1]}.v_proj.v_scale"] = torch.tensor(value)
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    method = fp8_method(kv_cache_scheme=scheme)
    foreign = write(tmp_path / "source", fp8, method, torch.bfloat16, more)
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.v_proj\.v_scale.* at element 0"):
        convert(foreign.folder, tmp_path / "out", REPACK)


def test_a_weight_of_another_maker_that_stays_as_it_is_is_looked_at(tmp_path: Path) -> None:
    """New cache scales beside weights in compressed-tensors' layout; NaN would end the forward
    pass."""
    foreign = source(tmp_path / "source", "fp8 rows")
    request = QuantizeRequest(model=foreign.folder, recipe=REPACK, out=tmp_path / "made")
    made = quantize(request).out
    name = next(n for n in sorted(tensors_in(made)) if n.endswith("_proj.weight_scale"))
    broken = damaged(made, tmp_path / "broken", name, -1.0, at=3)
    data = tmp_path / "ids.jsonl"
    data.write_text('{"input_ids": [3, 1, 4, 1, 5, 9, 2, 6]}\n')
    calibration = CalibrationRequest(data=data, samples=1, seq_len=8)
    scheme = load_scheme("kv-fp8-per-head")
    for folder in (made, broken):
        request = QuantizeRequest(
            model=folder, recipe=scheme, out=tmp_path / f"{folder.name}-kv", calibration=calibration
        )
        if folder is made:
            quantize(request)
            continue
        with pytest.raises(SourceError, match=f"tensor '{re.escape(name)}': -1.0 at element 3"):
            quantize(request)


def test_the_scale_of_a_latent_cache_is_carried_as_one(tmp_path: Path) -> None:
    """Engines cache its row with k's scale, and read it with that as k and as v."""
    attention = [f"model.layers.{i}.self_attn" for i in range(4)]

    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {f"{a}.{w}_proj.{w}_scale": torch.tensor(0.5 if w == "k" else 0.25)
                for a in attention for w in "kv"}  # fmt: skip
        for name, tensor in tensors.items():
            if not name.endswith(("_proj.weight", "_with_mqa.weight")):
                made[name] = tensor
                continue
            held, _ = fp8(tensor.float())
            made |= {f"{name.removesuffix('.weight')}.{n}": part for n, part in held.items()}
        return made

    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    method = {"quantization_config": fp8_method(kv_cache_scheme=scheme)}
    source = save_variant(save("deepseek_v3", tmp_path), tmp_path / "source", change, method)
    out = convert(source, tmp_path / "out", REPACK).out
    made = tensors_in(out)
    for a in attention:
        assert {w: made[f"{a}.{w}_scale"].tolist() for w in "kv"} == {"k": [0.5], "v": [0.5]}
        assert f"{a}.q_scale" not in made
    report = verify(out, source)
    assert report.ok, report.findings


def test_groups_in_activation_order_are_refused_with_what_to_do(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "gptq asym ordered")
    with pytest.raises(PlanError, match=r"activation order .*vLLM serves the source as it is"):
        convert(foreign.folder, tmp_path / "out", REPACK)
    in_order = write(tmp_path / "in order", gptq(), gptq_method() | {"desc_act": True})
    assert verify(convert(in_order.folder, tmp_path / "made", REPACK).out, in_order.folder).ok


def test_another_rope_order_is_refused_with_what_to_do(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "fp8 rows")
    with pytest.raises(UsageError, match="run `ckptq permute` on its result"):
        make_plan(open_checkpoint(foreign.folder), REPACK, rope_order="half-split")


@pytest.mark.parametrize("format", ["fp8 rows", "modelopt fp8", "modelopt nvfp4", "awq"])
@pytest.mark.parametrize("recipe", [REPACK, DEQUANTIZE], ids=lambda recipe: str(recipe.name))
def test_every_byte_of_the_source_is_counted_once(
    tmp_path: Path, format: str, recipe: Recipe
) -> None:
    ckpt = open_checkpoint(source(tmp_path / "source", format).folder)
    scales = sum(t.nbytes for n, t in ckpt.tensors.items() if n.endswith("input_scale"))
    assert 0 <= ckpt.nbytes - make_plan(ckpt, recipe).read_bytes <= scales


def test_an_unquantized_source_is_refused(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "awq")
    plain = unquantized(foreign, tmp_path / "plain")
    with pytest.raises(UsageError, match=r"needs a quantized source; .*plain is not quantized"):
        convert(plain, tmp_path / "out", REPACK)
    with pytest.raises(UsageError, match=r"scheme 'dequantize': .*plain is not quantized"):
        convert(plain, tmp_path / "out", DEQUANTIZE)
    made = convert(foreign.folder, tmp_path / "made", REPACK).out
    with pytest.raises(UsageError, match="made: is in compressed-tensors' layout already"):
        convert(made, tmp_path / "out", REPACK)


def test_what_was_repacked_is_a_source_like_any_other(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "gptq asym v2")
    made = convert(foreign.folder, tmp_path / "made", REPACK).out
    back = convert(made, tmp_path / "back", DEQUANTIZE).out
    plain = unquantized(foreign, tmp_path / "plain")
    assert differences(tensors_in(back), tensors_in(plain)) == []


def test_killed_at_any_step_it_resumes(tmp_path: Path) -> None:
    foreign: Foreign = source(tmp_path / "source", "awq")
    run = Run(source=foreign.folder, out=tmp_path / "whole", recipe=REPACK)
    code, steps = perform(run)
    assert code == 0
    for at in range(20, steps * 9 // 10, steps // 4):
        killed = replace(run, out=tmp_path / f"killed-{at}")
        assert perform(replace(killed, die_at=at))[0] != 0
        assert perform(killed)[0] == 0
        assert digests(killed.out) == digests(run.out)


def mxfp4_maker(spread: int) -> Callable[[Tensor], Any]:
    """DeepSeek-V4's FP4 with exponents over so many binades."""

    def make(w_RC: Tensor) -> Any:
        R, C = w_RC.shape
        code = torch.randint(0, 16, (R, C), dtype=torch.uint8)
        exponent = torch.randint(-2 - spread, -1, (R, C // 32))
        exponent[0, 0] = -2
        pairs = (code[:, ::2] | code[:, 1::2] << 4).view(torch.int8)
        step = torch.exp2(exponent.float())
        w = (E2M1[code.long()].unflatten(1, (-1, 32)) * step[..., None]).flatten(1)
        return {"weight": pairs, "scale": step.to(torch.float8_e8m0fnu)}, w.bfloat16()

    return make


def test_mxfp4_is_cast_to_nvfp4_exactly_where_its_scales_reach(tmp_path: Path) -> None:
    cast = load_scheme("repack-nvfp4")
    foreign = write(tmp_path / "near", mxfp4_maker(17), FP8_METHOD, torch.bfloat16)
    out = convert(foreign.folder, tmp_path / "near out", cast).out
    for name in LINEARS:
        made = by_compressed_tensors(out, name)
        assert torch.equal(made.bfloat16(), foreign.weights[name]), name
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    assert {one.scheme for one in report.tensors} == {"nvfp4"}
    assert report.checks["codes exact"] == report.checks["codes compared"]
    change(out, "model.layers.0.mlp.up_proj.weight_scale", flip)
    assert {t.rpartition(".")[0] for _, t in faults(verify(out, foreign.folder)) if t} == {
        "model.layers.0.mlp.up_proj"
    }


def test_groups_that_nvfp4_cannot_hold_are_rounded_and_counted(tmp_path: Path) -> None:
    foreign = write(tmp_path / "far", mxfp4_maker(24), FP8_METHOD, torch.bfloat16)
    out = convert(foreign.folder, tmp_path / "far out", load_scheme("repack-nvfp4")).out
    exact = 0
    for name in LINEARS:
        made, wanted = by_compressed_tensors(out, name).float(), foreign.weights[name].float()
        scale = foreign.stored[f"{name}.scale"].float()
        reached = (scale >= scale.max() * 2.0**-17).repeat_interleave(32, 1)
        assert torch.equal(made[reached], wanted[reached])
        assert (made - wanted).abs().max() <= scale.max() * 2.0**-17 / 4
        exact += int((made == wanted).sum())
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    assert report.checks["codes exact"] == exact < report.checks["codes compared"]


def test_what_compressed_tensors_has_as_mxfp4_is_cast_too(tmp_path: Path) -> None:
    foreign = write(tmp_path / "near", mxfp4_maker(12), FP8_METHOD, torch.bfloat16)
    made = convert(foreign.folder, tmp_path / "made", REPACK).out
    name = "model.layers.1.mlp.down_proj"
    out = convert(made, tmp_path / "out", load_scheme("repack-nvfp4"), (name,)).out
    direct = convert(foreign.folder, tmp_path / "x", load_scheme("repack-nvfp4"), (name,)).out
    assert differences(tensors_in(out), tensors_in(direct)) == []
    assert torch.equal(tensors_in(out)[f"{name}.weight"], foreign.weights[name])
    assert verify(out, made).ok
    mixed = convert(source(tmp_path / "v4", "deepseek").folder, tmp_path / "mixed", REPACK).out
    with pytest.raises(PlanError, match="has Linears in fp8 block 128x128 beside MXFP4"):
        convert(mixed, tmp_path / "no", load_scheme("repack-nvfp4"))


def test_a_source_without_mxfp4_is_not_cast(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "awq")
    with pytest.raises(UsageError, match="the source has no Linears in MXFP4"):
        convert(foreign.folder, tmp_path / "out", load_scheme("repack-nvfp4"))
