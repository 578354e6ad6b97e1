"""Sources in other makers' formats are quantized anew, as the weights that they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import convert, recipe_of
from convert_killed import Run, digests, perform
from safetensors.torch import load_file, save_file
from tiny.foreign import (
    AWQ_METHOD,
    FP8_METHOD,
    LINEARS,
    Foreign,
    Maker,
    awq,
    deepseek,
    fp8,
    fp8_method,
    fp8_rows,
    gptq,
    gptq_method,
    nvfp4,
    nvfp4_method,
    unquantized,
    write,
)
from tiny.tensors import differences, tensors_in

from ckptq.checkpoint.open import open_checkpoint
from ckptq.forward.decoded import weights_of
from ckptq.verify.run import verify

GPTQ: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq asym v2": {"sym": False, "version": 2},
    "gptq asym ordered": {"sym": False, "ordered": True},
    "gptq 3-bit asym": {"bits": 3, "sym": False},
    "gptq 8-bit": {"bits": 8},
}
OTHERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "modelopt fp8": (fp8, fp8_method()),
    "modelopt nvfp4": (nvfp4, nvfp4_method()),
    "fp8 rows": (fp8_rows(), FP8_METHOD),
    "fbgemm": (fp8_rows(flat=True), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "deepseek": (deepseek, FP8_METHOD | {"weight_block_size": [128, 128]}),
}
FORMATS = (*GPTQ, "awq", *OTHERS)


def source(folder: Path, format: str) -> Foreign:
    if format in GPTQ:
        given = GPTQ[format]
        return write(folder, gptq(**given), gptq_method(**given))
    if format == "awq":
        return write(folder, awq, AWQ_METHOD)
    return write(folder, *OTHERS[format], torch.bfloat16)


@pytest.mark.parametrize("scheme", ["fp8 channel", "int4 group asym", "nvfp4"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_weights_that_it_stands_for_are_quantized(
    tmp_path: Path, format: str, scheme: str
) -> None:
    """Byte for byte as from the same model stored unquantized."""
    foreign = source(tmp_path / "source", format)
    plain = unquantized(foreign, tmp_path / "plain")
    out = convert(foreign.folder, tmp_path / "out", recipe_of(scheme)).out
    expected = convert(plain, tmp_path / "expected", recipe_of(scheme)).out
    assert differences(tensors_in(out), tensors_in(expected)) == []
    report = verify(out, foreign.folder)
    assert report.ok, report.findings
    assert not [finding for finding in report.findings if finding.code == "decoder-disagrees"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_forward_pass_is_given_the_same_weights(tmp_path: Path, format: str) -> None:
    foreign = source(tmp_path / "source", format)
    given = weights_of(open_checkpoint(foreign.folder))
    names = [f"{name}.weight" for name in LINEARS]
    loaded = given.load(names)
    for name in LINEARS:
        assert torch.equal(loaded[f"{name}.weight"], foreign.weights[name]), name
    assert set(names) < set(given.names())


@pytest.mark.parametrize(
    ("format", "local"),
    [
        ("gptq", "qweight"),
        ("gptq asym v2", "qzeros"),
        ("awq", "scales"),
        ("modelopt nvfp4", "weight_scale"),
    ],
)
def test_a_source_that_is_another_one_is_noticed(tmp_path: Path, format: str, local: str) -> None:
    foreign = source(tmp_path / "source", format)
    out = convert(foreign.folder, tmp_path / "out", recipe_of("int4 group asym")).out
    name = f"model.layers.1.mlp.up_proj.{local}"
    tensors = load_file(foreign.folder / "model.safetensors")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensors[name].itemsize]
    tensors[name] = tensors[name].view(bits).flip(1).view(tensors[name].dtype)
    save_file(tensors, foreign.folder / "model.safetensors", metadata={"format": "pt"})
    faults = {
        f.tensor.rpartition(".")[0]
        for f in verify(out, foreign.folder).findings
        if f.severity == "fault"
    }
    assert faults == {"model.layers.1.mlp.up_proj"}


def test_killed_at_any_step_it_resumes(tmp_path: Path) -> None:
    foreign = source(tmp_path / "source", "gptq asym v2")
    run = Run(source=foreign.folder, out=tmp_path / "whole", recipe=recipe_of("int4 group asym"))
    code, steps = perform(run)
    assert code == 0
    for at in range(20, steps * 9 // 10, steps // 6):
        killed = replace(run, out=tmp_path / f"killed-{at}")
        assert perform(replace(killed, die_at=at))[0] != 0
        assert perform(killed)[0] == 0
        assert digests(killed.out) == digests(run.out)
