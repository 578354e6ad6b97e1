"""Evaluation on a GPU: the CPU's weights to the bit, its figures up to rounding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from evaluate_models import rows_of

from ckptq.evaluate.caches.kv_cache import MODES
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.forward import reader
from ckptq.forward.decoded import DecodedWeights
from ckptq.forward.reader import Reader
from ckptq.plan.make import make_plan
from ckptq.recipes.load import built_in, load_scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = rows_of((24, 24, 13, 7))
TEXT = Text(tuple(Line(tuple(row)) for row in ROWS), "test")
SCHEMES = [name for name in built_in() if "kv-" not in name]
FAMILIES = ["llama", "llama4", "mixtral"]
LAYERS = 0.03
"""Of the relative error of hidden states after each layer: codes are multiplied where a CPU rounds
once more, and sums are in another order. KL of a random model is chaotic, and is shown alone."""
ROUTED = 0.08
"""The same where a token may be routed to another expert."""


def different(found, wanted) -> list[str]:
    assert found.keys() == wanted.keys()
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    return [
        name
        for name, tensor in found.items()
        if tensor.dtype != wanted[name].dtype or not torch.equal(tensor.cpu(), wanted[name])
    ]


def whole(weights):
    return weights.load(weights.names())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_a_scheme_are_the_cpu_s_to_the_bit(saved, family, scheme):
    source = saved(family)
    plan = make_plan(source, load_scheme(scheme))
    here, there = SchemeWeights(source, plan), SchemeWeights(source, plan, Reader("cuda"))
    assert different(whole(there), whole(here)) == []
    assert there.snr_db == pytest.approx(here.snr_db, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_decoded_to_the_same_bits(saved, family, scheme):
    source, ckpt = saved(family), saved(family, scheme)
    here, there = DecodedWeights(ckpt, source), DecodedWeights(ckpt, source, Reader("cuda"))
    assert different(whole(there), whole(here)) == []


def shares(found, wanted) -> list[float]:
    """By how much the error after each layer differs, as a share of it."""
    pairs = zip(found.outcome.layers, wanted.outcome.layers, strict=True)
    return [abs(here - there) / there if there else here for here, there in pairs]


def far_rows(found, wanted, bound: float = LAYERS) -> dict[str, object]:
    """Rows whose layers differ by more than the bound; every row is printed."""
    far = {}
    for row, other in zip(found.rows, wanted.rows, strict=True):
        name = f"{row.weights} / {row.kv_cache}"
        said = (
            f"{name}: layers {max(shares(row, other)):.2%} apart; KL {row.measures.kl:.4f}, CPU "
            f"{other.measures.kl:.4f}; {' '.join(row.notes)}"
        )
        print(said)
        if max(shares(row, other)) > bound:
            far[name] = said
    return far


@pytest.mark.parametrize("batch_size", [None, 3])
def test_scores_of_schemes_and_caches_are_the_cpu_s(saved, batch_size):
    """And the control's are not: the bounds tell one model from another."""
    source = saved("llama")
    asked = {"caches": [mode for mode in MODES if mode != "fp8-scale-1"], "batch_size": batch_size}
    asked["schemes"] = [load_scheme(scheme) for scheme in SCHEMES]
    here, there = (evaluate(source, TEXT, device=d, **asked) for d in ("cpu", "cuda"))
    assert there.zero.measures.kl == 0.0
    assert far_rows(there, here) == {}
    for row in here.rows:
        assert max(shares(there.control, row)) > 4 * LAYERS, row


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, "fp8-dynamic") for family in FAMILIES),
        *(("llama", scheme) for scheme in built_in() if scheme != "fp8-dynamic"),
    ],
)
def test_scores_of_a_checkpoint_are_the_cpu_s(saved, family, scheme):
    """And a layer that is spoiled is seen in every row: the control is that row's."""
    source, ckpt = saved(family), saved(family, scheme)
    here, there = (evaluate(ckpt, TEXT, source=source, device=d) for d in ("cpu", "cuda"))
    bound = ROUTED if family == "mixtral" else LAYERS
    assert far_rows(there, here, bound) == {}
    assert max(shares(there.control, here.rows[0])) > 4 * bound


def test_two_runs_give_the_same_numbers(saved):
    asked = {"schemes": [load_scheme("fp8-dynamic")], "caches": ["int4-per-token-head"]}
    first, second = (evaluate(saved("llama"), TEXT, device="cuda", **asked) for _ in range(2))
    assert [row.outcome for row in first.rows] == [row.outcome for row in second.rows]
    assert first.rows[0].outcome != first.rows[1].outcome


def test_every_tensor_is_read_once_for_all_rows(saved, monkeypatch):
    counts: Counter[str] = Counter()
    bring = reader._Ahead._bring

    def counted(self, group):
        counts.update(stored.name for stored in group)
        return bring(self, group)

    monkeypatch.setattr(reader._Ahead, "_bring", counted)
    source = saved("llama")
    schemes = [load_scheme(scheme) for scheme in ("fp8-static", "w4a16")]
    evaluate(source, TEXT, schemes=schemes, caches=["fp8-per-head"], device="cuda")
    layers = [name for name in source.tensors if ".layers." in name]
    assert {name: counts[name] for name in layers} == dict.fromkeys(layers, 1)
