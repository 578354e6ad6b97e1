"""The KV cache's format: what a layer costs against transformers' own cache, and the choice."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from search_models import LAYERS
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import parse_cache
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import text_of
from ckptq.kernels.token_head.kv_format import FORMATS
from ckptq.kernels.token_head.reference import there_and_back
from ckptq.progress import silent
from ckptq.recipes.load import load_recipe
from ckptq.search.caches import Caches, find_caches
from ckptq.search.candidates import PLAIN, find_candidates
from ckptq.search.changed import CacheChange
from ckptq.search.changed_rows import Rows
from ckptq.search.choice import Budget
from ckptq.search.request import SearchRequest, search
from ckptq.text.samples import read_samples

INT4 = "int4-per-token-head"


class OneLayerRounded(DynamicCache):
    """transformers' cache, which gives back rounded keys and values in some layers."""

    def __init__(self, *layers: int) -> None:
        super().__init__()
        self.rounded = layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more, **named):
        if layer_idx in self.rounded:
            key_states = there_and_back(key_states, FORMATS["int4_per_token_head"])
            value_states = there_and_back(value_states, FORMATS["int4_per_token_head"])
        return super().update(key_states, value_states, layer_idx, *more, **named)


@torch.no_grad()
def kl_of_cache(folder: Path, rows: Path, *layers: int) -> float:
    """Mean KL over all predicted tokens, in transformers and float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        ids = torch.tensor([json.loads(line)["input_ids"]])
        source, changed = (
            model(ids, past_key_values=OneLayerRounded(*chosen)).logits[0, :-1].log_softmax(-1)
            for chosen in ((), layers)
        )
        each = torch.nn.functional.kl_div(changed, source, log_target=True, reduction="sum")
        total, count = total + float(each), count + len(source)
    return total / count


def test_one_layers_cache_is_what_transformers_computes(llama: Path, rows: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), ("fp8-dynamic", PLAIN))
    samples = read_samples(str(rows), llama, samples=2, seq_len=16)
    changes = [CacheChange(INT4, 0), CacheChange(INT4, 2), CacheChange("fp8-per-head", 2)]
    found: dict = {}
    Rows(candidates, text_of(samples, []), "cpu").measure(changes, found.update, silent)
    wanted = [kl_of_cache(llama, rows, layer) for layer in (0, 2)]
    assert [found[each] for each in changes[:2]] == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] > 1.2 * wanted[1] or wanted[1] > 1.2 * wanted[0]  # another layer would show
    assert 0 < found[changes[2]] < wanted[1]


def test_skipped_layers_stay_as_they_are(llama: Path, rows: Path) -> None:
    ckpt = open_checkpoint(llama)
    samples = read_samples(str(rows), llama, samples=2, seq_len=16)
    names = [INT4, f"{INT4}-skip-0", f"{INT4}-skip-0-1-2-3"]
    found = evaluate(ckpt, text_of(samples, []), caches=names)
    every, some, none = found.rows
    assert [row.kv_cache for row in found.rows] == names
    assert none.outcome.layers == (0.0,) * LAYERS
    assert some.outcome.layers[0] == 0.0 < some.outcome.layers[1] < every.outcome.layers[1]
    assert (every.cache_bits, none.cache_bits) == (5.25, 16)  # 32 codes of 4 bits, 5 bytes beside
    assert some.cache_bits == pytest.approx((16 + 3 * 5.25) / 4)
    with pytest.raises(UsageError, match="has layers 0 to 3, no 4"):
        evaluate(ckpt, text_of(samples, []), caches=[f"{INT4}-skip-4"])
    with pytest.raises(UsageError, match="expected bf16"):
        parse_cache(f"{INT4}-skip-", None)


def test_the_best_format_and_layers(subtests) -> None:
    caches = Caches(values={0: 64, 1: 64, 3: 128}, bits={"int4": 4.5, "fp8": 8.0})
    losses = {"int4": {0: 5.0, 1: 1.0, 3: 3.0}, "fp8": {0: 0.5, 1: 0.4, 3: 0.25}}

    def brute(bits: float) -> float:
        best = float("inf")
        for name, keep in product(caches.bits, product((False, True), repeat=3)):
            held = dict(zip(caches.values, keep, strict=True))
            size = sum(n * (16 if held[i] else caches.bits[name]) for i, n in caches.values.items())
            if size <= bits * 256:
                best = min(best, sum(x for i, x in losses[name].items() if not held[i]))
        return best

    for bits in (4.5, 6, 7.5, 8, 9.9, 10, 12, 14):
        with subtests.test(bits=bits):
            chosen = caches.choose(losses, bits)
            assert chosen.point.loss == pytest.approx(brute(bits))
            assert chosen.point.bits <= bits
    chosen = caches.choose(losses, 7.5)
    assert (chosen.cache, chosen.skipped) == ("int4", (0,))
    assert chosen.point.name == "int4-skip-0"


def asked(llama: Path, rows: Path, folder: Path, **more) -> SearchRequest:
    return SearchRequest(
        model=llama, budget=Budget(bits=8.5), output=folder / "mixed.yaml", data=str(rows),
        schemes=("fp8-dynamic", PLAIN), device="cpu", **more,
    )  # fmt: skip


def test_a_recipe_and_what_it_cannot_say(llama: Path, rows: Path, tmp_path: Path) -> None:
    fp8 = ("fp8-per-tensor",)
    found = search(asked(llama, rows, tmp_path, kv_bits=10, kv_caches=fp8))
    cache = found.kv_cache
    assert cache is not None
    assert len(cache.skipped) == 1
    assert cache.point.bits == 10
    assert cache.flags == f"--kv-cache-dtype-skip-layers {cache.skipped[0]}"
    assert cache.point.loss < cache.uniform[0].loss
    recipe = load_recipe(found.recipe)
    assert recipe.kv_cache_scheme is not None
    assert recipe.kv_cache_scheme.strategy == "tensor"
    assert cache.flags in found.recipe.read_text()
    before = found.sensitivities.stat().st_mtime_ns
    other = search(asked(llama, rows, tmp_path, kv_bits=8, kv_caches=fp8)).kv_cache
    assert other is not None
    assert (other.skipped, other.flags) == ((), "")
    assert found.sensitivities.stat().st_mtime_ns == before
    int4 = search(asked(llama, rows, tmp_path, kv_bits=6, kv_caches=(INT4,)))
    assert int4.kv_cache is not None
    assert int4.kv_cache.flags == "--kv-cache-dtype int4_per_token_head"
    assert load_recipe(int4.recipe).kv_cache_scheme is None


def test_what_cannot_be_is_refused(llama: Path, rows: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"kv_bits": 4}, "no cache is that small"),
        ({"kv_bits": float("nan")}, "no cache is that small"),
        ({"kv_bits": 16}, "leave the option out"),
        ({"kv_bits": 8, "kv_caches": ("int2-per-token-head",)}, "choose from fp8-per-tensor"),
        ({"kv_bits": 8, "data": None}, "add --data"),
    ):
        request = asked(llama, rows, tmp_path, **{k: v for k, v in more.items() if k != "data"})
        if "data" in more:
            object.__setattr__(request, "data", None)
        with pytest.raises(UsageError, match=said):
            search(request)
    assert set(find_caches(open_checkpoint(llama), ("fp8-per-head", INT4)).values) == {0, 1, 2, 3}
