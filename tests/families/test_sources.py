"""How sources are put together: experts that are fused, layers that are added, other names."""

from __future__ import annotations

import torch

from families.hub import add_mtp_layer, fuse_experts, renamed


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
