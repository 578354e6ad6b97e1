"""Experts: only the tokens that a router gave them count; few Hessians at a time; none is lost."""

from __future__ import annotations

import json
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from gptq_cases import MOE, SIZES, converted, digests, save
from tiny.models import llama4
from tiny.tensors import differences, tensors_in

from ckptq.gptq import routed
from ckptq.gptq.moments import Moments
from ckptq.verify.run import verify

SCHEME = "w4a16-g32-gptq"


@pytest.fixture(scope="session")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The router's first two rows are opposite, so that one of them beats the zeros below."""
    folder = save(tmp_path_factory.mktemp("lonely"), "Qwen3Moe", **MOE | {"num_experts_per_tok": 1})
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            row = tensors[name][0].clone()
            tensors[name] = torch.stack((row, -row, torch.zeros_like(row), torch.zeros_like(row)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_expert_that_no_token_reached_is_rounded_to_nearest_and_named(
    lonely: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    out = converted(lonely, tmp_path / "out", SCHEME, note=heard.append)
    nearest = tensors_in(converted(lonely, tmp_path / "nearest", "w4a16-g32"))
    changed = differences(tensors_in(out), nearest)
    alike = {f"experts.{number}." for number in (2, 3)}
    experts = [name for name in nearest if ".experts." in name and name.endswith("packed")]
    same = [name for name in experts if name not in changed]
    assert {name for name in experts if any(part in name for part in alike)} == set(same)
    assert any("4 of 8 experts were reached, by 0 to" in line for line in heard)
    told = [line for line in heard if "no token of the calibration text reached" in line]
    assert "model.layers.0.mlp.experts.2.down_proj" in told[0]
    record = json.loads((out / "ckptq.json").read_text())["by_inputs"]
    assert len(record["nearest"]) == 2 * 2 * 3
    counts = list(record["experts"].values())
    assert all(each["2"] == each["3"] == 0 and sum(each.values()) == 48 * 12 for each in counts)
    assert verify(out, lonely).findings == ()


def test_few_at_a_time_make_the_same_bytes(
    lonely: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digests(converted(lonely, tmp_path / "whole", SCHEME))
    alive: WeakSet[Moments] = WeakSet()
    most: list[int] = []
    add = Moments.add

    def counted(self: Moments, x_TF: torch.Tensor) -> None:
        alive.add(self)
        most.append(len(alive))
        add(self, x_TF)

    monkeypatch.setattr(Moments, "add", counted)
    converted(lonely, tmp_path / "many", SCHEME)
    together, alive, most = max(most), WeakSet(), []
    monkeypatch.setattr(routed, "HESSIAN_BYTES", 1)
    assert digests(converted(lonely, tmp_path / "few", SCHEME)) == whole
    assert max(most) < together


def test_tokens_come_from_the_router_alone(
    lonely: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token for every expert makes other codes."""
    own = tensors_in(converted(lonely, tmp_path / "own", SCHEME))
    assigned = routed._assigned

    def everywhere(args, experts, lengths):
        x_NF, _ = assigned(args, experts, lengths)
        return x_NF, torch.arange(experts).expand(len(x_NF), experts)

    monkeypatch.setattr(routed, "_assigned", everywhere)
    changed = differences(own, tensors_in(converted(lonely, tmp_path / "every", SCHEME)))
    assert any("layers.0.mlp.experts.2." in name for name in changed)
    assert not any("layers.0.self_attn" in name for name in changed)


def test_experts_that_are_handed_zeroed_tokens(tmp_path: Path) -> None:
    """Llama-4 stores them fused and transposed, and zeroes what is not routed to an expert."""
    torch.manual_seed(0)
    text = SIZES | {
        "num_hidden_layers": 2, "intermediate_size": 128, "intermediate_size_mlp": 128,
        "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1],
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
    }  # fmt: skip
    source = tmp_path / "llama4"
    llama4(text, image_token_index=125, boi_token_index=126, eoi_token_index=127).to(
        torch.bfloat16
    ).save_pretrained(source)
    out = converted(source, tmp_path / "out", SCHEME)
    [counts] = json.loads((out / "ckptq.json").read_text())["by_inputs"]["experts"].values()
    assert sum(counts.values()) == 48 * 12
    assert verify(out, source).findings == ()
    nearest = tensors_in(converted(source, tmp_path / "nearest", "w4a16-g32"))
    changed = {n for n in differences(tensors_in(out), nearest) if ".experts." in n}
    reached = {number for number, count in counts.items() if count}
    assert {name.split(".experts.")[1][0] for name in changed} == reached
