"""The scales file survives the round trip, is the same for the same run, and says what is wrong."""

import pytest
import torch
from calibrate_models import samples_of
from safetensors.torch import save_file
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.calibrate.scales import load_scales, save_scales, source_fingerprint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import SourceError
from ckptq.recipes.load import load_scheme

ROWS = token_rows([16] * 4)


@pytest.fixture(scope="module")
def scales(saved):
    return calibrate(saved("llama"), samples_of(ROWS), batch_size=2)


def test_round_trip(scales, tmp_path):
    save_scales(tmp_path / "scales.safetensors", scales)
    again = load_scales(tmp_path / "scales.safetensors")
    assert again.made == scales.made
    for kind in ("tensors", "statistics"):
        want, got = getattr(scales, kind), getattr(again, kind)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)
    assert [file.name for file in tmp_path.iterdir()] == ["scales.safetensors"]


def test_equal_runs_give_equal_bytes(saved, scales, tmp_path):
    again = calibrate(saved("llama"), samples_of(ROWS), batch_size=2)
    written = set()
    for number, each in enumerate([scales, again] * 4):
        save_scales(tmp_path / str(number), each)
        written.add((tmp_path / str(number)).read_bytes())
    assert len(written) == 1


def test_statistics_explain_the_scales(scales):
    for name, scale in scales.tensors.items():
        stem = name.removesuffix("_scale")
        amin_H, amax_H = (scales.statistics[f"{stem}_{end}"] for end in ("amin", "amax"))
        assert torch.equal(torch.maximum(amin_H.abs(), amax_H.abs()) / 448, scale.flatten())


def test_fingerprint_tells_checkpoints_apart(saved):
    assert source_fingerprint(saved("llama")) != source_fingerprint(saved("llama-tied"))


def test_scales_of_another_checkpoint_are_told(saved, scales, tmp_path):
    """The same names and shapes, so that nothing else would show it."""
    file, recipe = tmp_path / "scales", load_scheme("kv-fp8-per-head")
    save_scales(file, scales)
    told: dict[str, list[str]] = {"llama": [], "qwen3": []}
    for family, notes in told.items():
        request = QuantizeRequest(
            model=saved(family).path, recipe=recipe, scales=file, out=tmp_path / family
        )
        quantize(request, note=notes.append)
    assert told["llama"] == []
    assert len(told["qwen3"]) == 1
    assert f"scales: calibrated on {saved('llama').name}, whose config" in told["qwen3"][0]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SourceError, match="none: no such scales file"):
        load_scales(tmp_path / "none")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not a scales file"),
        ({"ckptq_scales": "{"}, "damaged"),
        ({"ckptq_scales": '{"version": 99}'}, "version 99"),
        ({"ckptq_scales": '{"version": 1, "model": "m"}'}, "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, metadata, message):
    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(SourceError, match=rf"other\.safetensors: .*{message}"):
        load_scales(file)


def test_two_attention_classes_have_no_single_target(scales):
    from dataclasses import replace

    from ckptq.errors import PlanError

    mixed = replace(scales.made, attention={"a": "OneAttention", "b": "OtherAttention"})
    with pytest.raises(PlanError, match="OneAttention, OtherAttention"):
        _ = replace(scales, made=mixed).attention_class
