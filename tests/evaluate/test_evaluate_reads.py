"""What is read from disk, and how often: once for all that is made of it, a layer at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from evaluate_models import rows_of

from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.forward import reader
from ckptq.recipes.load import load_scheme
from ckptq.spec import TensorSpec

TEXT = Text(tuple(Line(tuple(row)) for row in rows_of((12, 9))), "test")
SCHEMES = ("fp8-static", "nvfp4a16", "w4a16")
"""Two of them have a statistic of fused sets, which takes the whole set first."""


@pytest.fixture
def read(monkeypatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    plain = reader.read_tensor

    def counted(stored):
        counts[stored.name] += 1
        return plain(stored)

    monkeypatch.setattr(reader, "read_tensor", counted)
    return counts


def run(source):
    return evaluate(
        source, TEXT, schemes=[load_scheme(s) for s in SCHEMES], caches=["fp8-per-head"]
    )


@pytest.mark.parametrize("family", ["llama", "llama4", "mixtral"])
def test_every_tensor_is_read_once_for_all_rows(saved, read, family):
    source = saved(family)
    shared = run(source)
    layers = {name for name in source.tensors if ".layers." in name and "vision" not in name}
    assert {name: read[name] for name in layers} == dict.fromkeys(layers, 1)
    # what is outside the layers may be wanted before them and after them
    assert max(read.values()) <= 2
    assert [row.outcome for row in shared.rows] == [row.outcome for row in run(source).rows]


def test_without_sharing_it_would_be_read_for_every_row(saved, read, monkeypatch):
    """The twin: the count notices, and the numbers are the same."""
    source = saved("llama")
    shared = run(source)
    assert max(read.values()) <= 2
    read.clear()
    monkeypatch.setattr(reader.Reader, "__init__", _that_keeps_nothing(reader.Reader.__init__))
    alone = run(source)
    assert min(count for name, count in read.items() if ".layers." in name) >= 1 + len(SCHEMES)
    assert [row.outcome for row in alone.rows] == [row.outcome for row in shared.rows]


def _that_keeps_nothing(init):
    def made(self, device="cpu", *, keep=False):
        init(self, device)

    return made


def test_one_layer_is_kept_at_most(saved, monkeypatch):
    source, most = saved("llama"), Counter()
    take = reader.Reader.take

    def watched(self, stored):
        tensor = take(self, stored)
        layers = {name.split(".")[2] for _, name in self._kept if ".layers." in name}
        most["layers"] = max(most["layers"], len(layers))
        return tensor

    monkeypatch.setattr(reader.Reader, "take", watched)
    run(source)
    assert most["layers"] == 1
    monkeypatch.setattr(reader.Reader, "release", lambda self: None)
    run(source)
    assert most["layers"] > 1


def test_shared_tensors_are_not_written_to(saved):
    """A scheme that wrote into what it takes would change the source, and the zero with it."""
    found = run(saved("llama4"))
    assert found.zero.measures.kl == 0.0
    assert all(row.measures.kl > 0 for row in found.rows)


def test_a_reader_gives_a_tensor_away_unless_it_keeps_it(saved):
    stored = next(iter(saved("llama").tensors.values()))
    own, shared = reader.Reader(), reader.Reader(keep=True)
    assert own.take(stored) is not own.take(stored)
    assert shared.take(stored) is shared.take(stored)
    first = shared.take(stored)
    shared.release()
    assert shared.take(stored) is not first
    assert torch.equal(shared.take(stored), first)


def test_small_tensors_are_read_together_and_large_ones_alone(saved):
    small = list(saved("llama").tensors.values())
    assert list(reader.groups(small)) == [small]
    large = [replace(each, spec=TensorSpec("BF16", (1 << 13, 1 << 12))) for each in small[:3]]
    assert list(reader.groups([*small, *large])) == [[*small, large[0]], [large[1]], [large[2]]]
    assert list(reader.groups([])) == []
