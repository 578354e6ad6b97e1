"""Every family is made in a moment, and the engines' table was asked about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ckptq.checkpoint.open import open_checkpoint
from ckptq.engines.table import load_table
from families.hub import add_mtp_layer, fuse_experts, renamed
from families.sources import FAMILIES, save

MB = 2**20


@pytest.mark.slow
def test_every_family_is_small_and_was_asked(tmp_path: Path) -> None:
    table = load_table()
    asked = {*table.architectures, *table.content["failed"]}
    for family in FAMILIES:
        folder = save(family, tmp_path)
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        assert architecture in asked, family
        assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 20 * MB, family
        assert open_checkpoint(folder).tensors, family


def test_fused_experts_hold_what_the_experts_held() -> None:
    experts = {
        f"m.experts.{e}.{p}_proj.weight": torch.full((2, 3), 10.0 * e + i)
        for e in range(3)
        for i, p in enumerate(("gate", "up", "down"))
    }
    fused = fuse_experts(experts | {"m.gate.weight": torch.zeros(3, 3)})
    assert list(fused) == ["m.gate.weight", "m.experts.gate_up_proj", "m.experts.down_proj"]
    assert fused["m.experts.gate_up_proj"].shape == (3, 4, 3)
    assert fused["m.experts.gate_up_proj"][2, :, 0].tolist() == [20, 20, 21, 21]
    assert fused["m.experts.down_proj"][1, 0, 0] == 12


def test_an_mtp_layer_is_one_more_layer() -> None:
    model = {
        "model.embed_tokens.weight": torch.zeros(5, 4),
        "model.norm.weight": torch.ones(4),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(2, 4),
        "lm_head.weight": torch.zeros(5, 4),
    }
    added = add_mtp_layer(model, 2).keys() - model.keys()
    assert "model.layers.2.mlp.up_proj.weight" in added
    assert "model.layers.2.eh_proj.weight" in added
    assert all(name.startswith("model.layers.2.") for name in added)


def test_names_are_replaced_once() -> None:
    tensors = {"tower.layers.0.a.weight": torch.zeros(1)}
    assert list(renamed(tensors, (("^tower", "tower.model"),))) == ["tower.model.layers.0.a.weight"]
