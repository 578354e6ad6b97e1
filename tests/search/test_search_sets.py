"""Sets, what they store, and the recipe that is made of a choice."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from search_models import LAYERS
from tiny.tensors import tensors_in

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import PlanError, UsageError
from ckptq.plan.doubts import transformers_doubts
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_text
from ckptq.search.candidates import PLAIN, find_candidates
from ckptq.search.choice import Choices
from ckptq.search.mixed import mixed_recipe, patterns
from ckptq.verify.run import verify

SCHEMES = ("w4a16-g32", "nvfp4a16", "fp8-dynamic", PLAIN)


def alternating(candidates):
    """Every scheme somewhere, sets in turn."""
    return {
        each.name: list(each.nbytes)[at % len(each.nbytes)]
        for at, each in enumerate(candidates.sets)
    }


def test_sets_are_what_engines_merge(llama: Path, experts: Path) -> None:
    first = find_candidates(open_checkpoint(llama), SCHEMES).sets
    assert len(first) == 4 * LAYERS
    assert {tuple(n.rpartition(".")[2] for n in each.linears) for each in first} == {
        ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
    }  # fmt: skip
    second = find_candidates(open_checkpoint(experts), SCHEMES).sets
    assert [len(each.linears) for each in second if each.name.endswith("experts")] == [12] * LAYERS


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_bytes_are_those_of_the_files(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(model)
    candidates = find_candidates(open_checkpoint(source), SCHEMES)
    chosen = alternating(candidates)
    recipe = mixed_recipe("mixed", candidates, chosen, ())
    quantize(QuantizeRequest(model=source, recipe=recipe, out=tmp_path / "out"))
    stored = tensors_in(tmp_path / "out")
    for each in candidates.sets:
        prefixes = tuple(f"{name}." for name in each.linears)
        found = sum(t.nbytes for name, t in stored.items() if name.startswith(prefixes))
        assert found == each.nbytes[chosen[each.name]], each.name
        assert found != each.nbytes[PLAIN] or chosen[each.name] == PLAIN
    point = Choices(candidates, {e.name: dict.fromkeys(e.nbytes, 1.0) for e in candidates.sets})
    assert point.point("", chosen).nbytes == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_the_recipe_says_what_was_chosen(model: str, request: pytest.FixtureRequest) -> None:
    ckpt = open_checkpoint(request.getfixturevalue(model))
    candidates = find_candidates(ckpt, SCHEMES)
    chosen = alternating(candidates)
    text = mixed_recipe("mixed", candidates, chosen, ()).text
    plan = make_plan(ckpt, load_text("mixed", text))
    for each in candidates.sets:
        groups = {g for g, names in plan.groups.items() for n in names if n in each.linears}
        assert groups == ({chosen[each.name]} if chosen[each.name] != PLAIN else set())


@pytest.mark.parametrize(
    ("scheme", "other"),
    [
        ("fp8-dynamic", None),
        ("fp8-dynamic", "w4a16-g32"),
        ("fp8-dynamic", PLAIN),
        ("w4a16-g32", PLAIN),
    ],
)
def test_transformers_reads_experts_in_one_scheme(
    experts: Path, tmp_path: Path, scheme: str, other: str | None
) -> None:
    """A doubt where its own loader fails, and only there."""
    ckpt = open_checkpoint(experts)
    candidates = find_candidates(ckpt, ("w4a16-g32", "fp8-dynamic", PLAIN))
    all_experts = [each.name for each in candidates.sets if each.name.endswith("experts")]
    chosen = {each.name: PLAIN for each in candidates.sets}
    chosen |= dict.fromkeys(all_experts, scheme)
    chosen |= {all_experts[0]: other} if other else {}
    recipe = mixed_recipe("mixed", candidates, chosen, ())
    doubts = list(transformers_doubts(make_plan(ckpt, recipe)))
    fails = other == "w4a16-g32" or (other, scheme) == (PLAIN, "w4a16-g32")
    assert ["experts differ" in line for line in doubts] == ([True] if fails else [])
    quantize(QuantizeRequest(model=experts, recipe=recipe, out=tmp_path / "out"))
    assert verify(tmp_path / "out", engine="transformers", headers_only=True).ok != fails


def test_llmcompressor_reads_the_recipe_the_same_way(llama: Path) -> None:
    pytest.importorskip("llmcompressor")
    from compressed_tensors.utils import match_named_modules
    from llmcompressor.recipe import Recipe
    from transformers import AutoModelForCausalLM

    candidates = find_candidates(open_checkpoint(llama), SCHEMES)
    chosen = alternating(candidates)
    text = mixed_recipe("mixed", candidates, chosen, ()).text
    config = Recipe.create_instance(text).modifiers[0].resolved_config
    model = AutoModelForCausalLM.from_pretrained(llama)
    for name, scheme in config.config_groups.items():
        found = {n for n, _ in match_named_modules(model, scheme.targets, config.ignore)}
        assert found == {n for e in candidates.sets if chosen[e.name] == name for n in e.linears}


def test_patterns_match_nothing_else() -> None:
    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.1.a.b"]
    assert list(patterns(names)) == [
        r"re:model\.layers\.(1|11)\.mlp\.up_proj$", r"re:model\.layers\.1\.a\.b$",
    ]  # fmt: skip
    one, *more = patterns(["model.layers.3.mlp.experts.0.w1", "model.layers.3.mlp.experts.7.w1"])
    assert (one, more) == (r"re:model\.layers\.3\.mlp\.experts\.\d+\.w1$", [])


def test_the_solver_is_the_best_of_all_choices_for_four_layers(llama: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), ("nvfp4a16", PLAIN))
    losses = {
        each.name: {"nvfp4a16": 1.0 + (at * 7919 % 23) / 5, PLAIN: 0.0}
        for at, each in enumerate(candidates.sets)
    }
    choices = Choices(candidates, losses)
    picks = np.array(list(product((0, 1), repeat=len(candidates.sets))))
    sizes = np.array([[e.nbytes["nvfp4a16"], e.nbytes[PLAIN]] for e in candidates.sets])
    costs = np.array([[losses[e.name]["nvfp4a16"], 0.0] for e in candidates.sets])
    every = np.arange(len(candidates.sets))
    nbytes, loss = sizes[every, picks].sum(1), costs[every, picks].sum(1)
    for bits in (4.6, 5, 7.3, 11):
        limit = bits * candidates.weights / 8
        found = choices.point("", choices.within_bytes(limit))
        assert found.bits <= bits
        assert found.loss == pytest.approx(loss[nbytes <= limit].min(), rel=1e-9)


def test_what_cannot_be_mixed_is_refused(llama: Path) -> None:
    ckpt = open_checkpoint(llama)
    for scheme in ("fp8-per-head", "w4a16-g32-gptq", "dequantize"):
        with pytest.raises(UsageError, match=scheme):
            find_candidates(ckpt, (scheme, PLAIN))
    with pytest.raises(UsageError, match="beside bf16"):
        find_candidates(ckpt, (PLAIN,))
    with pytest.raises(PlanError, match="groups of 128 do not divide"):
        find_candidates(ckpt, ("w4a16", PLAIN), ignore=("re:.*down_proj",))


def test_a_scheme_that_fits_some_sets_is_a_choice_for_those(llama: Path) -> None:
    found = find_candidates(open_checkpoint(llama), ("w4a16", "fp8-dynamic"))
    assert any("groups of 128 do not divide 64 columns" in line for line in found.told)
    for each in found.sets:
        assert ("w4a16" in each.nbytes) == (each.linears[0].endswith("down_proj"))
        assert PLAIN not in each.nbytes
    ckpt = open_checkpoint(llama)
    plain = sum(each.plain_bytes for each in found.sets)
    assert found.rest_bytes == ckpt.nbytes - plain  # by a plan that leaves most sets as they are
