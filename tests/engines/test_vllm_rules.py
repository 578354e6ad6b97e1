"""Rules of vLLM's that do not differ by architecture."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckptq.engines.vllm import (
    common_merged_name,
    common_set,
    fills_whole_blocks,
    kv_scheme_faults,
    means_every_linear,
    without_kernel,
)
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group

SERVED = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True}


def refused(scheme: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(name, found) for name, found, _ in kv_scheme_faults(Args.read(scheme))]


def test_a_kv_scheme_that_vllm_serves() -> None:
    assert refused(SERVED) == []
    assert refused(SERVED | {"dynamic": False}) == []


@pytest.mark.parametrize("field", SERVED)
def test_a_kv_scheme_that_leaves_a_field_out_is_refused(field: str) -> None:
    """vLLM has no defaults there, where compressed-tensors has."""
    scheme = {key: value for key, value in SERVED.items() if key != field}
    assert refused(scheme) == [(field, None)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_bits", 4), ("type", "int"), ("strategy", "channel"), ("symmetric", False)],
)
def test_a_kv_scheme_that_vllm_does_not_serve(field: str, value: object) -> None:
    assert refused(SERVED | {field: value}) == [(field, value)]


@pytest.mark.parametrize(
    ("bits", "size", "columns", "served"),
    [(4, 32, 512, True), (4, 16, 512, False), (4, 256, 512, True), (8, 256, 512, False),
     (4, 512, 512, True), (4, 512, 1024, False), (8, -1, 512, True)],
)  # fmt: skip
def test_groups_for_which_there_is_a_kernel(bits: int, size: int, columns: int, served: bool):
    weights = Args.read({"num_bits": bits, "type": "int", "group_size": size})
    group = Group(name="g", targets=("Linear",), weights=weights, format="pack-quantized")
    assert (without_kernel(group, columns) is None) == served


def test_only_the_last_of_a_merged_set_may_end_in_half_a_block() -> None:
    qkv = ("q_proj", "k_proj", "v_proj")
    assert [fills_whole_blocks(m, qkv, of_expert=False) for m in qkv] == [True, True, False]
    assert not fills_whole_blocks("o_proj", ("o_proj",), of_expert=False)


def test_both_halves_of_an_expert_fill_whole_blocks() -> None:
    halves = ("gate_proj", "up_proj")
    assert all(fills_whole_blocks(m, halves, of_expert=True) for m in halves)
    assert not fills_whole_blocks("down_proj", ("down_proj",), of_expert=True)


def test_common_sets() -> None:
    assert common_set("kv_a_proj_with_mqa") == ("q_a_proj", "kv_a_proj_with_mqa")
    assert common_set("o_proj") == ("o_proj",)
    assert common_merged_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_up_proj"
    assert common_merged_name("lm_head") is None


def test_class_names() -> None:
    assert means_every_linear("Linear")
    assert not means_every_linear("LlamaAttention")
    assert not means_every_linear("")
