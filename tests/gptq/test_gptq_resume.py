"""A run that is killed anywhere goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gptq_cases import converted, digests, save

from ckptq.calibrate import journal as journal_module
from ckptq.errors import UsageError
from ckptq.forward.layerwise import LayerwiseModel
from ckptq.gptq.kept import Kept
from ckptq.gptq.units import Units

SCHEME = "w4a16-g32-refined"


class Killed(BaseException):
    """Nothing in the program catches it."""


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state after every layer, however long that takes."""
    monkeypatch.setattr(journal_module, "SHARE_OF_TIME", float("inf"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="session")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that nobody stops writes."""
    return digests(converted(llama, tmp_path_factory.mktemp("whole") / "out", SCHEME))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are run, as they are run."""
    found: list[int] = []
    run = LayerwiseModel.run_layer

    def counted(self: LayerwiseModel, index: int, *rest: object, **more: object) -> None:
        found.append(index)
        run(self, index, *rest, **more)

    monkeypatch.setattr(LayerwiseModel, "run_layer", counted)
    return found


def dies_at(where: str, count: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill at the `count`th call: of what quantizes a Linear's unit, of what keeps a layer (just
    before or behind it), of what prepares the second run."""
    owner, name, behind = {
        "within a layer": (Units, "quantized", False),
        "before a layer is kept": (Kept, "keep", False),
        "behind a kept layer": (Kept, "keep", True),
        "before the state is kept": (journal_module.Journal, "keep", False),
        "behind a kept state": (journal_module.Journal, "keep", True),
    }[where]

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), []

        def die(*args: object) -> object:
            calls.append(args)
            if len(calls) == count and not behind:
                raise Killed
            made = real(*args)
            if len(calls) == count:
                raise Killed
            return made

        monkeypatch.setattr(owner, name, die)

    return patch


@pytest.mark.parametrize(
    ("where", "count", "again"),
    [
        ("within a layer", 10, [1]),
        ("before a layer is kept", 2, [1]),
        ("behind a kept layer", 2, [1]),
        ("before the state is kept", 1, [0, 1]),
        ("behind a kept state", 1, [1]),
    ],
)
def test_killed_it_goes_on_and_ends_with_equal_bytes(
    llama: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[int],
    where: str,
    count: int,
    again: list[int],
) -> None:
    with monkeypatch.context() as patched:
        dies_at(where, count)(patched)
        with pytest.raises(Killed):
            converted(llama, tmp_path / "out", SCHEME)
    assert not (tmp_path / "out").exists()
    ran.clear()
    assert digests(converted(llama, tmp_path / "out", SCHEME)) == whole
    assert ran == again
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_layer_that_is_not_as_it_was_written_is_made_again(
    llama: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[int],
    damage: str,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ckptq.convert.pipeline.convert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            converted(llama, tmp_path / "out", SCHEME)
    file = tmp_path / "out.partial/calibration/gptq/layer-00001/made.safetensors"
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-9] + (b"" if damage == "cut" else bytes(9)))
    ran.clear()
    assert digests(converted(llama, tmp_path / "out", SCHEME)) == whole
    assert ran == [0, 1]


def test_finished_layers_are_not_run_again(
    llama: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[int],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ckptq.convert.pipeline.convert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            converted(llama, tmp_path / "out", SCHEME)
    ran.clear()
    assert digests(converted(llama, tmp_path / "out", SCHEME)) == whole
    assert ran == []


def test_another_gptq_does_not_go_on_with_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        dies_at("behind a kept state", 1)(patched)
        with pytest.raises(Killed):
            converted(llama, tmp_path / "out", SCHEME)
    with pytest.raises(UsageError, match="started by a different run: recipe was"):
        converted(llama, tmp_path / "out", "w4a16-g32-search-gptq")
