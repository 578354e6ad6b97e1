"""Inputs that are nearly right end in a result or in one message (`strange.py` does more of it)."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import strange
import strange_inputs
from strange import STRATEGIES, Outcome, run

import ckptq.inspect
from ckptq.calibrate import scales


@pytest.fixture(autouse=True)
def no_hang():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_case_ends_in_a_result_or_in_one_message(name, tmp_path, monkeypatch):
    monkeypatch.setattr(strange, "SECONDS", 60)  # the first ones import what they need
    outcome = Outcome()
    for seed in range(30):
        outcome.one(tmp_path / "case", seed, (name,))
    assert outcome.failed == []
    assert outcome.ended.total() == 30
    assert outcome.growth_mb < strange.GROWTH


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"names", "offsets", "index", "data"}))
def test_what_the_cases_are_made_of_is_sound(name, tmp_path, monkeypatch):
    """Else all of them would be refused for the same reason."""
    monkeypatch.setattr(strange, "SECONDS", 60)
    monkeypatch.setattr(strange_inputs, "mutated", lambda rng, value, times=1: value)
    monkeypatch.setattr(strange_inputs, "text_of", lambda rng, value: json.dumps(value).encode())
    monkeypatch.setattr(random.Random, "random", lambda self: 0.45)  # no chance of anything odd
    make, commands = STRATEGIES[name]
    ended = []
    for seed in range(3):
        for number, command in enumerate(commands):
            root = tmp_path / f"{seed}-{number}"
            root.mkdir()
            make(random.Random(seed), root / "ckpt")
            strange_inputs.sound(root / "sound")
            places = {"ckpt": root / "ckpt", "root": root, "sound": root / "sound"}
            ended.append(run([w.format(**places) for w in command]))
    assert 0 in [code for code, _ in ended], ended


def test_a_command_that_breaks_is_counted(tmp_path, monkeypatch):
    """The twins: what the cases look for, they see."""
    monkeypatch.setattr(scales, "_typed", lambda record: record)
    outcome = Outcome()
    for seed in range(150):
        outcome.one(tmp_path / "case", seed, ("scales",))
        if outcome.failed:
            break
    assert any("Error" in line for line in outcome.failed)


def test_a_command_that_hangs_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(strange, "SECONDS", 0.1)
    monkeypatch.setattr(ckptq.inspect, "open_checkpoint", lambda *_: time.sleep(20))
    outcome = Outcome()
    monkeypatch.setitem(STRATEGIES, "data", (STRATEGIES["data"][0], (["inspect", "{ckpt}"],)))
    outcome.one(tmp_path / "case", 0, ("data",))
    assert "TooSlow" in outcome.failed[0]


def test_a_command_that_prints_what_it_read_is_counted(tmp_path, monkeypatch):
    from ckptq.show import console

    monkeypatch.setattr(console, "printable", lambda text: text)

    def make(rng: random.Random, folder: Path) -> None:
        strange_inputs.checkpoint(rng, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "a\x1b[2J"}))

    monkeypatch.setitem(STRATEGIES, "data", (make, (["inspect", "{ckpt}"],)))
    outcome = Outcome()
    outcome.one(tmp_path / "case", 0, ("data",))
    assert r"prints {'\x1b'}" in outcome.failed[0]
