"""AutoRound in our layer-by-layer forward is llm-compressor's oneshot, to the last bit, but for the
dtype of its scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptq_cases import MOE, converted, save
from safetensors.torch import load_file, save_file
from tiny.rows import token_rows
from tiny.tensors import differences, tensors_in
from tuned_cases import by_oneshot_with_stored_scales, in_steps

from ckptq.autoround import integers
from ckptq.autoround.block import Block
from ckptq.errors import PlanError
from ckptq.quantize.packing import unpack_words
from ckptq.verify.run import verify


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tuned"), num_hidden_layers=2)


def codes_of(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in tensors if name.endswith(("_proj.weight", "_proj.weight_packed"))}


def test_codes_and_scales_are_oneshots(llama: Path, tmp_path: Path) -> None:
    recipe = in_steps("w4a16-g32-tuned", 4)
    ours = tensors_in(converted(llama, tmp_path / "out", recipe))
    theirs = by_oneshot_with_stored_scales(llama, tmp_path / "oneshot", recipe.text)
    assert differences(ours, theirs) == []
    nearest = tensors_in(converted(llama, tmp_path / "nearest", "w4a16-g32"))
    assert len(codes_of(ours)) == 14
    assert codes_of(ours) <= set(differences(ours, nearest)), "nothing was tuned"


def test_of_8_bits_it_rounds_twice_and_we_once(tmp_path: Path) -> None:
    """It keeps tuned weights in BF16, and divides them by their scales again when it saves."""
    llama = save(tmp_path / "llama", num_hidden_layers=1)
    recipe = in_steps("w8a8-tuned", 3)
    ours = tensors_in(converted(llama, tmp_path / "out", recipe))
    theirs = by_oneshot_with_stored_scales(llama, tmp_path / "oneshot", recipe.text)
    assert set(differences(ours, theirs)) <= codes_of(ours)
    for name in codes_of(ours):
        apart = (ours[name].int() - theirs[name].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < 0.01


def test_experts_are_oneshots(tmp_path: Path) -> None:
    """They are fused in one tensor while layers run, and are Linears while they are tuned."""
    moe = save(tmp_path / "moe", "Qwen3Moe", num_hidden_layers=2, **MOE)
    recipe = in_steps("w4a16-g32-tuned", 4)
    ours = tensors_in(converted(moe, tmp_path / "out", recipe))
    text = recipe.text.replace("- lm_head", "- lm_head\n      - re:.*gate$")
    assert differences(ours, by_oneshot_with_stored_scales(moe, tmp_path / "one", text)) == []
    assert len([name for name in codes_of(ours) if ".experts." in name]) == 2 * 4 * 3


def test_experts_that_no_token_reached_are_rounded_and_named(tmp_path: Path) -> None:
    moe = save(tmp_path / "moe", "Qwen3Moe", num_hidden_layers=1, **{**MOE, "num_experts": 16})
    heard: list[str] = []
    recipe, rows = in_steps("w4a16-g32-tuned", 2, lr=0.03), token_rows([3] * 2)
    converted(moe, tmp_path / "out", recipe, rows, note=heard.append)
    [line] = [line for line in heard if "no token of the calibration text reached" in line]
    assert ".experts." in line


def test_options_and_texts_of_different_length_are_oneshots(llama: Path, tmp_path: Path) -> None:
    """It sorts them: the longest first."""
    rows = token_rows([48] * 4 + [31] * 3 + [7] * 2)
    recipe = in_steps("w4a16-g32-tuned", 3, batch_size=2, lr=0.03)
    ours = tensors_in(converted(llama, tmp_path / "out", recipe, rows))
    theirs = by_oneshot_with_stored_scales(llama, tmp_path / "oneshot", recipe.text, rows)
    assert differences(ours, theirs) == []


def test_small_heads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound's own scales are 1e-5 at least, of which the twin makes weights of zero."""
    llama = save(tmp_path / "llama", num_hidden_layers=1)
    tensors = load_file(llama / "model.safetensors")
    small = "model.layers.0.self_attn.k_proj.weight"
    tensors[small][:32] *= 1e-5
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})

    def codes(out: str) -> torch.Tensor:
        made = tensors_in(converted(llama, tmp_path / out, in_steps("w4a16-g32-tuned", 1)))
        return unpack_words(made[f"{small}_packed"], 4, 128)[:32]

    assert codes("out").any(1).all()
    monkeypatch.setattr(integers, "LEAST", 1e-5)
    assert not codes("lost").any()


def test_a_layer_gets_what_tuned_ones_make(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that only layer 0 is the same."""
    recipe = in_steps("w4a16-g32-tuned", 2, lr=0.03)
    whole = tensors_in(converted(llama, tmp_path / "whole", recipe))
    tune = Block.tune

    def apart(self: Block, targets: object, calls: object, quantized: object, how: object):
        return tune(self, targets, calls, None, how)

    monkeypatch.setattr(Block, "tune", apart)
    other = tensors_in(converted(llama, tmp_path / "other", recipe))
    assert {name.split(".layers.")[1][0] for name in differences(whole, other)} == {"1"}


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *((f"{scheme}-tuned", torch.bfloat16) for scheme in ("w4a16-asym", "w4a16-channel")),
        *((f"{scheme}-tuned", torch.bfloat16) for scheme in ("nvfp4a16", "nvfp4", "mxfp4a16")),
        *(("w4a16-g32-tuned", dtype) for dtype in (torch.float32, torch.float16)),
    ],
)
def test_what_is_stored_is_what_was_tuned(
    tmp_path: Path, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proved while it is made; `verify` has no fault to find, and the twin fails."""
    llama = save(tmp_path / "llama", dtype=dtype, num_hidden_layers=1)
    recipe = in_steps(scheme, 3, lr=0.03)
    report = verify(converted(llama, tmp_path / "out", recipe), llama)
    assert report.findings == ()
    assert {note.code for note in report.notes} >= {"codes-not-nearest"}
    tune = Block.tune

    def moved(self: Block, *given: object):
        tuned, streams = tune(self, *given)
        next(iter(tuned.values())).scale[3] *= 2
        return tuned, streams

    monkeypatch.setattr(Block, "tune", moved)
    with pytest.raises(PlanError, match=r"_proj: \d+ of \d+ weights that AutoRound tuned are not"):
        converted(llama, tmp_path / "moved", recipe)
