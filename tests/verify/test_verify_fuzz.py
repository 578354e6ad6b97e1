"""Random damage: a report or a clear error, never anything else (`fuzz.py` does more of it)."""

import random
import time

import fuzz
import pytest
import torch
from verify_checkpoints import FAMILIES, copy_of

from ckptq.verify import run
from ckptq.verify.run import verify
from ckptq.verify.values import plausible


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """One format each time of every family, in several shards with an index."""
    folder = tmp_path_factory.mktemp("split")
    formats = ("fp8-channel", "int4-asym", "mxfp4", "nvfp4", "int8")
    return [
        pair
        for family, weights in zip(FAMILIES, formats, strict=True)
        for pair in fuzz.make_all(folder, (family,), (weights,))
    ]


@pytest.mark.parametrize("chunk", range(4))
def test_damage_never_ends_in_a_traceback(split, tmp_path, chunk):
    outcome = fuzz.run_cases(split, tmp_path / "case", range(80 * chunk, 80 * (chunk + 1)))
    assert outcome.failed == []
    assert outcome.ended.total() == 80
    assert {"found", "SourceError"} <= outcome.ended.keys()
    assert outcome.growth_mb < fuzz.GROWTH


def test_a_reader_that_breaks_is_counted(split, tmp_path, monkeypatch):
    """The twin: what the fuzz looks for, it sees."""

    def careless(tensor, *rest):
        raise KeyError(tensor.name)

    monkeypatch.setattr(plausible, "check_scale", careless)
    outcome = fuzz.run_cases(split[:1], tmp_path / "case", range(40))
    assert outcome.failed
    assert all("KeyError" in line for line in outcome.failed)


def test_a_reader_that_hangs_is_counted(split, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(run, "check_structure", lambda *_: time.sleep(20))
    outcome = fuzz.run_cases(split[:1], tmp_path / "case", range(8))
    assert outcome.failed
    assert all("TooSlow" in line for line in outcome.failed)


def test_a_reader_that_swallows_memory_is_counted(split, tmp_path, monkeypatch):
    def greedy(*_):
        torch.ones((fuzz.GROWTH + 64) << 20, dtype=torch.uint8)
        return []

    monkeypatch.setattr(run, "check_structure", greedy)
    outcome = fuzz.run_cases(split[:1], tmp_path / "case", range(8))
    assert outcome.failed
    assert all("TooLarge" in line for line in outcome.failed)


def test_a_flipped_byte_of_a_weight_is_always_found(good, tmp_path):
    """Damage to data is not only survived, it is seen."""
    folder, source = good("llama", "int8")
    for seed in range(12):
        rng = random.Random(seed)
        editor = copy_of(folder, tmp_path / str(seed))
        name = rng.choice(sorted(n for n in editor.tensors if n.endswith("proj.weight")))
        codes = editor.tensors[name].flatten()
        codes[rng.randrange(codes.numel())] ^= 1 << rng.randrange(8)
        editor.tensors[name] = codes.view(editor.tensors[name].shape)
        found = verify(editor.save(), source).findings
        assert [(f.code, f.tensor) for f in found] == [("codes-corrupt", name)]
