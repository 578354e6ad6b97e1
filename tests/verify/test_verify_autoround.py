"""Checkpoints that AutoRound has made: no fault. Its integer scales have a sign of their own."""

from __future__ import annotations

import pytest
import torch
import transformers
from verify_checkpoints import Editor

from ckptq.verify.run import verify


def with_a_tokenizer(source, folder):
    """AutoRound wants to decode what it is calibrated on."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
    editor = Editor(source)
    editor.folder = folder
    folder.mkdir()
    editor.save()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(
        folder
    )
    return folder


def test_its_checkpoints_have_no_fault(sources, tmp_path):
    auto_round = pytest.importorskip("auto_round")
    source = with_a_tokenizer(sources("llama"), tmp_path / "source")
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    rounder = auto_round.AutoRound(
        str(source), scheme="W4A16", iters=1, nsamples=8, seqlen=32, batch_size=4,
        dataset=[ids[:4], ids[4:]], device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    with torch.enable_grad():  # it tunes; tests before may have left gradients off
        rounder.quantize_and_save(str(tmp_path / "out"), format="llm_compressor")
    out = next((tmp_path / "out").rglob("config.json")).parent
    report = verify(out, source)
    assert report.findings == ()
    assert report.checks["linears compared"] == report.checks["linears quantized"] == 14
    assert all(t.snr_db > t.floor_db - 1 for t in report.tensors)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_scales_of_either_sign_are_right(broken, weights):
    """Half of the groups turned, codes and all; the twin turns the scales alone."""
    editor, source = broken("llama", weights)
    name = "model.layers.0.mlp.down_proj"
    scale = editor.tensors[f"{name}.weight_scale"]
    scale[::2] *= -1
    alone = verify(editor.save(), source)
    assert {f.code for f in alone.findings} == {"scale-wrong"}
    weight = Editor(source).tensors[f"{name}.weight"].float()
    tiles = weight.unflatten(1, (scale.shape[1], -1)) / scale.float()[..., None]
    half = 128 if weights == "int8" else 8
    codes = tiles.flatten(1).round().clamp(-half, half - 1)
    if weights == "int8":
        editor.tensors[f"{name}.weight"] = codes.to(torch.int8)
    else:
        places = (codes.int() + 8).unflatten(1, (-1, 8)).unbind(2)
        words = sum(code << 4 * place for place, code in enumerate(places))
        editor.tensors[f"{name}.weight_packed"] = words.to(torch.int32)
    report = verify(editor.save(), source)
    assert report.findings == ()
    assert {f.code for f in report.notes} >= {"scale-signed"}
