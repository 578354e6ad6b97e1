"""AutoRound, killed, goes on after the last layer that it kept, and ends with the same bytes; with
another version of it nothing goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from gptq_cases import converted, digests, save
from tuned_cases import in_steps

from ckptq.autoround.block import Block
from ckptq.calibrate import journal
from ckptq.convert import documents
from ckptq.errors import UsageError
from ckptq.gptq.kept import Kept


class Killed(BaseException):
    """Nothing in the program catches it."""


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state after every layer, however long that takes."""
    monkeypatch.setattr(journal, "SHARE_OF_TIME", float("inf"))


@pytest.mark.parametrize("where", ["before layer 1 is tuned", "before layer 1 is kept"])
def test_killed_it_goes_on_and_ends_with_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Layer 1 is given what the tuned layer 0 made of the samples, which is kept."""
    llama = save(tmp_path / "llama")
    recipe = in_steps("w4a16-g32-tuned", 2, lr=0.03)
    whole = digests(converted(llama, tmp_path / "whole", recipe))
    owner, name = (Block, "tune") if where.endswith("tuned") else (Kept, "keep")
    real, calls = getattr(owner, name), []

    def second_dies(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise Killed
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, second_dies)
        with pytest.raises(Killed):
            converted(llama, tmp_path / "out", recipe)
    with monkeypatch.context() as patched:
        installed = documents.version
        patched.setattr(documents, "version", lambda n: "0" if n == "auto-round" else installed(n))
        with pytest.raises(UsageError, match="auto-round"):
            converted(llama, tmp_path / "out", recipe)
    tune, calls = Block.tune, []
    monkeypatch.setattr(Block, "tune", lambda *given: (calls.append(given), tune(*given))[1])
    assert digests(converted(llama, tmp_path / "out", recipe)) == whole
    assert len(calls) == 1
