"""Tokens with massive activations are left out; without them GPTQ serves all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptq_cases import converted, save
from safetensors.torch import load_file, save_file

from ckptq.gptq import massive
from ckptq.gptq.choose import choose
from ckptq.gptq.moments import Moments
from ckptq.quantize.formats import grid
from ckptq.recipes.load import load_scheme

TOKENS, FEATURES, ROWS = 256, 64, 96


def inputs(times: float) -> torch.Tensor:
    """Related features, and one token of another direction that is larger by a factor."""
    generator = torch.Generator().manual_seed(1)
    mixed_FF = torch.randn(FEATURES, FEATURES, generator=generator)
    x_TF = torch.randn(TOKENS, FEATURES, generator=generator) @ mixed_FF
    x_TF[7] = torch.randn(FEATURES, generator=generator) * times * x_TF.norm(dim=1).median() / 8
    return x_TF


def losses(x_TF: torch.Tensor) -> tuple[float, float]:
    """What GPTQ and rounding lose of the outputs of ordinary tokens."""
    group = load_scheme("w4a16-g32-gptq").groups[0]
    assert group.weights is not None
    w_RC = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(2))
    on = grid(w_RC, group.weight_scheme())
    moments = Moments(FEATURES, "cpu")
    moments.add(x_TF)
    how = load_scheme("w4a16-g32-gptq").gptq
    assert how is not None
    chosen = choose(w_RC, moments.hessian(), on, group.weights, how).weight_RC
    even = choose(w_RC, torch.eye(FEATURES), on, group.weights, how).weight_RC
    others = torch.cat((x_TF[:7], x_TF[8:]))
    return tuple(((others @ (made - w_RC).t()) ** 2).sum().item() for made in (chosen, even))


def test_one_massive_token_does_not_cost_all_others_their_accuracy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gptq, nearest = losses(inputs(times=600))
    assert gptq < 0.5 * nearest
    monkeypatch.setattr(massive, "TIMES_MEDIAN", float("inf"))
    assert losses(inputs(times=600))[0] > 1.2 * gptq, "it cost nothing"


def test_large_tokens_that_are_not_massive_stay() -> None:
    x_TF = inputs(times=10)
    assert massive.ordinary(x_TF) is x_TF
    assert len(massive.ordinary(inputs(times=100))) == TOKENS - 1
    few = inputs(times=100)[: massive.FEWEST - 1]
    assert massive.ordinary(few) is few


@pytest.fixture
def blown_up(tmp_path: Path) -> Path:
    """Token 5 alone uses the first channel, which the first layer's MLP blows up."""
    folder = save(tmp_path / "blown-up", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[5] = torch.eye(embedding.shape[1])[0]
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    for which in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{which}_proj.weight"][:, 0] = 30.0
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_layer_is_named(blown_up: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    rows = [[5, *range(10, 57)], [*range(20, 67), 5]]
    out = converted(blown_up, tmp_path / "out", "w4a16-g32-gptq", rows, note=heard.append)
    record = json.loads((out / "ckptq.json").read_text())["by_inputs"]
    assert record["massive"]["model.layers.0.mlp.down_proj"] == 2
    [line] = [line for line in heard if "massive activations in" in line]
    assert "model.layers.0.mlp.down_proj" in line
    heard.clear()
    converted(blown_up, tmp_path / "none", "w4a16-g32-gptq", [row[1:-1] for row in rows],
              note=heard.append)  # fmt: skip
    assert not any("massive activations" in line for line in heard)
