"""`verify` of codes that GPTQ chose: no fault, no advice; what is wrong is still found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptq_cases import converted, save
from safetensors.torch import load_file, save_file

from ckptq.recipes.load import load_text
from ckptq.verify.run import verify

SCHEMES = ["w4a16-g32-gptq", "w4a16-asym-gptq", "w8a8-gptq", "nvfp4a16-gptq", "fp8-dynamic-gptq"]
WEIGHED = [
    *("w4a16-g32-imatrix", "nvfp4a16-imatrix", "w4a16-g32-imatrix-gptq", "w8a8-imatrix-gptq"),
    *("w4a16-g32-refined", "w4a16-asym-refined", "nvfp4a16-refined", "fp8-dynamic-refined"),
]
KNOWN = {"codes-not-nearest", "scale-differs", "scale-signed"}
UNORDERED = """
quant_stage:
  quant_modifiers:
    GPTQModifier: {targets: [Linear], scheme: W4A16, ignore: [lm_head], actorder: null}
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its channels differ so much that GPTQ gives some of them up."""
    return save(tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_that_gptq_chose_are_no_fault(llama: Path, tmp_path: Path, scheme: str) -> None:
    report = verify(converted(llama, tmp_path / "out", scheme), llama)
    assert report.findings == ()
    [note] = {note.code: note for note in report.notes}.values()
    assert note.code == "codes-not-nearest"
    assert "codes chosen by GPTQ" in str(note)


@pytest.mark.parametrize("scheme", WEIGHED)
def test_ranges_that_inputs_weigh_are_no_fault(llama: Path, tmp_path: Path, scheme: str) -> None:
    out = converted(llama, tmp_path / "out", scheme)
    report = verify(out, llama)
    assert report.findings == ()
    assert {note.code for note in report.notes} <= KNOWN

    def double(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{LAYER}.gate_proj.weight_scale"]
        scale.copy_(scale.float() * 4)

    edit(out, double)
    assert not verify(out, llama).ok


def test_the_recipe_says_so_where_config_json_does_not(llama: Path, tmp_path: Path) -> None:
    out = converted(llama, tmp_path / "out", load_text("own", UNORDERED))
    assert "actorder" not in (out / "config.json").read_text()
    assert _wanted(out, llama) == {"codes chosen by GPTQ"}
    (out / "recipe.yaml").unlink()
    assert "codes chosen by GPTQ" not in _wanted(out, llama)


def test_the_recipe_says_that_scales_were_fitted(llama: Path, tmp_path: Path) -> None:
    """config.json cannot, where ranges were not weighed before."""
    text = UNORDERED.replace("actorder: null", "actorder: null, descents: 2")
    text = text.replace("W4A16", "FP8_DYNAMIC")  # signs of scales would say it
    out = converted(llama, tmp_path / "out", load_text("own", text))
    assert verify(out, llama).findings == ()
    (out / "recipe.yaml").unlink()
    assert not verify(out, llama).ok


def _wanted(out: Path, source: Path) -> set[str]:
    report = verify(out, source)
    about = (*report.findings, *report.notes)
    return {str(one.wanted) for one in about if one.code == "codes-not-nearest"}


def edit(out: Path, change) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


LAYER = "model.layers.1.mlp"


@pytest.mark.parametrize("damage", ["random codes", "another Linear's codes", "a few scales"])
def test_what_is_wrong_with_them_is_found(llama: Path, tmp_path: Path, damage: str) -> None:
    out = converted(llama, tmp_path / "out", "w4a16-g32-gptq")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes, others = (f"{LAYER}.{name}_proj.weight_packed" for name in ("gate", "up"))
        if damage == "random codes":
            shape = tensors[codes].shape
            tensors[codes] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()
        elif damage == "another Linear's codes":
            tensors[codes] = tensors[others].clone()
        else:
            tensors[f"{LAYER}.gate_proj.weight_scale"][0, :2] *= 2

    edit(out, change)
    report = verify(out, llama)
    assert not report.ok
    assert all(f"{LAYER}.gate_proj" in str(finding) for finding in report.findings)


@pytest.mark.parametrize("damage", ["the other sign", "another row"])
def test_a_lost_row_is_found_where_scales_were_fitted_too(
    llama: Path, tmp_path: Path, damage: str
) -> None:
    out = converted(llama, tmp_path / "out", "w4a16-g32-refined")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes, scale = (
            tensors[f"{LAYER}.up_proj.{local}"] for local in ("weight_packed", "weight_scale")
        )
        if damage == "the other sign":
            scale[7] *= -1
        else:
            codes[7], scale[7] = codes[8], scale[8]

    edit(out, change)
    [found] = verify(out, llama).findings
    assert (found.code, found.tensor) == ("codes-corrupt", f"{LAYER}.up_proj.weight_packed")
    assert "1 of" in str(found.found)


def test_a_folder_says_in_its_record_what_gptq_did(llama: Path, tmp_path: Path) -> None:
    out = converted(llama, tmp_path / "out", "w4a16-g32-gptq")
    record = json.loads((out / "ckptq.json").read_text())
    assert record["by_inputs"] == {"nearest": [], "unsolved": [], "massive": {}, "experts": {}}
    assert record["calibration"]["samples"] == 12
