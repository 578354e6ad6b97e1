"""From an observation to rows: what was seen, not what names suggest."""

from __future__ import annotations

import copy
from typing import Any

from ckptq.engines.tabulate import dump, tabulate

ENGINE = {"vllm": "9.9.9", "registry": {"TinyForCausalLM": "Tiny"}}
SEEN: dict[str, Any] = {
    "source": "tiny",
    "architecture": "TinyForCausalLM",
    "model_type": "tiny",
    "class": "Tiny",
    "packed": {"qkv": ["q", "k"]},
    "renames": {},
    "tensors": {
        **{f"layers.{i}.attn.{p}.weight": [4, 4] for i in range(2) for p in ("q", "k")},
        **{f"layers.{i}.moe.experts.{e}.up.weight": [4, 4] for i in range(2) for e in range(2)},
        "layers.0.attn.q.bias": [4],
        "layers.2.extra.weight": [4, 4],
    },
    "landed": {
        **{
            f"h.{i}.attn.qkv.weight": [f"layers.{i}.attn.q.weight", f"layers.{i}.attn.k.weight"]
            for i in range(2)
        },
        **{
            f"h.{i}.moe.inner.w13": [f"layers.{i}.moe.experts.{e}.up.weight" for e in range(2)]
            for i in range(2)
        },
        "h.0.attn.qkv.bias": ["layers.0.attn.q.bias"],
    },
    "unfilled": ["h.1.norm.weight"],
    "modules": {
        **{f"h.{i}.attn.qkv": {"fate": "quantized", "class": "QKV"} for i in range(2)},
        **{
            f"h.{i}.moe.inner": {
                "fate": "quantized",
                "class": "Experts",
                "asks_as": f"h.{i}.moe",
                "experts": ["up", "up", "down"],
            }
            for i in range(2)
        },
        "h.0.attn": {"attention": "heads", "class": "Attention"},
    },
    "written": {"weights": {}, "cache": {"names": "k_scale", "unfilled": ["h.0.attn.k_scale"]}},
}


def tiny(*sources: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tabulate([ENGINE, *sources])["architectures"]["TinyForCausalLM"]
    return found


def test_rows() -> None:
    assert tiny(SEEN)["modules"] == {
        "layers.*.attn.k": ["h.*.attn.qkv", "quantized"],
        "layers.*.attn.q": ["h.*.attn.qkv", "quantized"],
        "layers.*.extra": [None, "absent"],
        "layers.*.moe.experts.*.up": ["h.*.moe", "quantized", "w13"],
    }


def test_merged_sets_are_in_the_engines_order() -> None:
    assert tiny(SEEN)["merged"] == [["h.*.attn.qkv", "layers.*.attn.q", "layers.*.attn.k"]]
    turned = copy.deepcopy(SEEN)
    for tensors in turned["landed"].values():
        tensors.reverse()
    assert tiny(turned)["merged"] == [["h.*.attn.qkv", "layers.*.attn.k", "layers.*.attn.q"]]


def test_experts_are_asked_for_by_another_name_than_their_module() -> None:
    assert tiny(SEEN)["experts"] == {"h.*.moe": ["up", "up", "down"]}


def test_sources_that_disagree_give_no_fate() -> None:
    other = copy.deepcopy(SEEN) | {"source": "other"}
    for i in range(2):
        other["modules"][f"h.{i}.attn.qkv"]["fate"] = "plain"
    united = tiny(SEEN, other)
    assert united["sources"] == ["other (tiny)", "tiny (tiny)"]
    assert united["modules"]["layers.*.attn.q"] == ["h.*.attn.qkv", "mixed"]
    assert united["modules"]["layers.*.moe.experts.*.up"][1] == "quantized"


def test_a_layer_under_another_number_stays_a_name() -> None:
    """ "mtp.0" of "layers.2" cannot be read off the number, so it is no pattern."""
    moved = copy.deepcopy(SEEN)
    moved["landed"]["mtp.0.extra.weight"] = ["layers.2.extra.weight"]
    assert tiny(moved)["modules"]["layers.*.extra"] == ["mtp.0.extra", "plain"]


def test_what_was_not_filled_when_it_was_loaded_quantized() -> None:
    assert tiny(SEEN)["written"] == {"tiny cache": "not filled: h.*.attn.k_scale"}


def test_a_source_that_failed_is_told() -> None:
    failed = {"source": "bad", "architecture": "BadForCausalLM", "error": "KeyError: x"}
    table = tabulate([ENGINE, SEEN, failed])
    assert table["failed"] == {"BadForCausalLM": {"bad": "KeyError: x"}}
    assert list(table["architectures"]) == ["TinyForCausalLM"]


def test_one_row_a_line() -> None:
    lines = dump(tabulate([ENGINE, SEEN])).splitlines()
    assert '    "layers.*.attn.k": ["h.*.attn.qkv", "quantized"],' in lines
    assert '    ["h.*.attn.qkv", "layers.*.attn.q", "layers.*.attn.k"]' in lines
