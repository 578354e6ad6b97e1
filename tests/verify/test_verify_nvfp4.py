"""NVFP4 with calibrated inputs: the global scale of every Linear is there, alike in fused sets."""

from collections.abc import Callable

import pytest
import torch
from tiny.rows import write_rows
from verify_checkpoints import Editor, copy_of

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

FAMILIES = ["llama", "mixtral", "llama4"]
MLP = {
    "llama": "model.layers.0.mlp.down_proj.input_global_scale",
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w2.input_global_scale",
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, sources):
    """Family -> its checkpoint in NVFP4, calibrated on a few tokens, and its source."""
    root, made = tmp_path_factory.mktemp("nvfp4"), {}
    rows = torch.randint(3, 110, (4, 24), generator=torch.Generator().manual_seed(3)).tolist()
    data = root / "rows.jsonl"
    write_rows(data, rows)
    wanted = CalibrationRequest(data=str(data), samples=4, seq_len=24)

    def checkpoint(family: str):
        if family not in made:
            made[family] = root / family
            quantize(
                QuantizeRequest(
                    model=sources(family),
                    recipe=load_scheme("nvfp4"),
                    out=made[family],
                    calibration=wanted,
                )
            )
        return made[family], sources(family)

    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_source", [True, False])
def test_what_is_converted_is_right(calibrated, family, with_source):
    folder, source = calibrated(family)
    report = verify(folder, source if with_source else None)
    assert (*report.findings, *report.notes) == ()


def codes_after(damage: Callable[[Editor, str], None], calibrated, family, tmp_path) -> set[str]:
    folder, source = calibrated(family)
    editor = copy_of(folder, tmp_path / family)
    damage(editor, MLP[family])
    report = verify(editor.save(), source)
    return {f.code for f in (*report.findings, *report.notes)}


def _set(value: torch.Tensor) -> Callable[[Editor, str], None]:
    def damage(editor: Editor, name: str) -> None:
        editor.tensors[name] = value

    return damage


def _drop(editor: Editor, name: str) -> None:
    del editor.tensors[name]


def _rename(editor: Editor, name: str) -> None:
    editor.tensors[name.replace("input_global_scale", "input_scale")] = editor.tensors.pop(name)


DAMAGES = {
    "dropped": (_drop, {"input-scale-missing"}),
    "named as FP8's": (
        _rename,
        {"input-scale-missing", "input-scale-extra", "input-scale-implausible"},
    ),
    "negative": (_set(torch.tensor([-5.0])), {"scale-not-positive"}),
    "zero": (_set(torch.tensor([0.0])), {"scale-not-positive"}),
    "not a number": (_set(torch.tensor([float("nan")])), {"scale-not-finite"}),
    "of two numbers": (_set(torch.tensor([5.0, 5.0])), {"scale-shape"}),
    "of bytes": (_set(torch.tensor([5], dtype=torch.uint8)), {"scale-dtype"}),
}


@pytest.mark.parametrize("family", MLP)
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_global_scale_is_named(calibrated, tmp_path, family, what):
    damage, wanted = DAMAGES[what]
    assert codes_after(damage, calibrated, family, tmp_path) == wanted


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.input_global_scale"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.input_global_scale"),
    ],
)
def test_a_fused_set_calibrated_apart_is_named(calibrated, tmp_path, family, name):
    """vLLM takes the largest for the set, which clips the inputs of the others."""

    def damage(editor: Editor, _: str) -> None:
        editor.tensors[name] *= 1.5

    assert codes_after(damage, calibrated, family, tmp_path) == {"fused-scales-differ"}


def test_a_global_scale_that_the_config_does_not_declare_is_named(calibrated, tmp_path):
    def damage(editor: Editor, _: str) -> None:
        editor.group["input_activations"] = None

    assert codes_after(damage, calibrated, "llama", tmp_path) == {
        "input-scale-extra",
        "recipe-differs",
    }
