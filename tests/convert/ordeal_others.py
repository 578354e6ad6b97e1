"""What others do to a run: damage behind its journal's back, and a user about their own business.

`Garden` is the folder of a trial; it knows what in it is the user's, and how that was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ckptq.checkpoint.partial import outlived

TICK = 0.02
"""Seconds in which the clock that stamps files moves on."""

Undo = Callable[[], None]
"""How a user mends what they did, by hand."""


class Garden:
    """A folder with a source, an output in the making, and much that is the user's."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        shutil.copytree(source, self.source)
        self.out = folder / "out"
        self.partial = folder / "out.partial"
        self._mine: dict[Path, str] = {}
        self.plant(folder / "notes.txt")
        self.plant(folder / "thesis" / "chapter.txt")
        for file in self.source.iterdir():
            self.take(file)
        self._given = {file: state(file) for file in self.source.iterdir()}

    def plant(self, path: Path, text: str = "mine") -> None:
        """Something of the user's, which is to stay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.take(path)

    def take(self, path: Path) -> None:
        """What is there is the user's."""
        self._mine[path] = state(path)

    def is_mine(self, path: Path) -> bool:
        return path in self._mine

    def expect(self, states: Mapping[str, str]) -> None:
        """That is the user's, and was like this."""
        self._mine |= {Path(path): was for path, was in states.items()}

    def move(self, path: Path) -> None:
        """The user moves something out of the way."""
        to = self.folder / f"moved-{len(list(self.folder.iterdir()))}"
        if os.path.lexists(path):
            os.rename(path, to)
            for old in [p for p in self._mine if p == path or path in p.parents]:
                self._mine[to / old.relative_to(path)] = self._mine.pop(old)

    def check_mine(self) -> None:
        for path, was in self._mine.items():
            assert os.path.lexists(path), f"{path} of the user's is gone"
            assert state(path) == was, f"{path} of the user's has changed"

    def source_changed(self) -> bool:
        """Whether the user has edited the source, and not undone it."""
        return {file: state(file) for file in self.source.iterdir()} != self._given

    def made(self) -> dict[str, str]:
        """What the command has made, by name."""
        if not self.out.is_dir():
            return {"": state(self.out)} if os.path.lexists(self.out) else {}
        files = (p for p in sorted(self.out.rglob("*")) if p.is_symlink() or p.is_file())
        return {str(p.relative_to(self.out)): state(p) for p in files}


def state(path: Path) -> str:
    """What a user would miss: bytes, the target of a link, which folder it is."""
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_dir():
        return f"folder {path.stat().st_ino}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Damage to what the run has made: it has to be noticed, and mended.


def damage(rng: random.Random, garden: Garden) -> str:
    """A file is cut, emptied, zeroed, changed, lengthened, exchanged or gone."""
    file = _a_file(rng, garden)
    if file is None:
        return "nothing to damage"
    data = bytearray(file.read_bytes())
    how = rng.choice(("cut", "empty", "hole", "bit", "gone", "longer", "other"))
    at = rng.randrange(len(data) + 1)
    if how == "gone":
        file.unlink()
        return f"gone {file.relative_to(garden.folder)}"
    if how == "cut":
        del data[at:]
    elif how == "empty":
        data.clear()
    elif how == "hole":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif how == "bit" and data:
        data[at - 1] ^= 1 << rng.randrange(8)
    elif how == "longer":
        data += bytes(100)
    elif how == "other":
        data = bytearray(rng.randbytes(len(data)))
    file.write_bytes(data)
    return f"{how} {file.relative_to(garden.folder)}"


def _a_file(rng: random.Random, garden: Garden) -> Path | None:
    """Of the run's; of a renamed output too, while the run has not ended."""
    if not outlived(garden.partial) and garden.out.exists():
        return None
    files = [p for p in garden.partial.rglob("*") if p.is_file() and p.name != "lock"]
    if garden.out.is_dir():
        files += [p for p in garden.out.rglob("*") if p.is_file()]
    files = [p for p in files if not garden.is_mine(p)]
    return rng.choice(sorted(files)) if files else None


# What a user does between two lives of a run. Each gives back how to undo it; None: it did nothing.


def take_the_output(rng: random.Random, garden: Garden) -> Undo | None:
    if os.path.lexists(garden.out):
        return None
    kind = rng.choice(("folder", "empty folder", "file", "link"))
    if kind == "folder":
        garden.plant(garden.out / "theirs.txt")
    elif kind == "empty folder":
        garden.out.mkdir()
    elif kind == "file":
        garden.plant(garden.out, "theirs")
    else:
        garden.out.symlink_to(garden.folder / "thesis")
    garden.take(garden.out)
    return lambda: garden.move(garden.out)


def put_a_file_beside_the_run_s(rng: random.Random, garden: Garden) -> Undo | None:
    if not garden.partial.is_dir():
        return None
    garden.plant(garden.partial / f"note-{rng.randrange(9)}.txt")
    return lambda: None


def put_a_file_among_the_run_s(rng: random.Random, garden: Garden) -> Undo | None:
    folder = garden.partial / "checkpoint"
    if not folder.is_dir():
        return None
    garden.plant(folder / "note.txt")
    return lambda: garden.move(folder / "note.txt")


def have_a_folder_of_that_name(rng: random.Random, garden: Garden) -> Undo | None:
    """The run's is put away, and a folder, a link or a file of the user's has its name."""
    away = garden.folder / "away"
    if garden.partial.is_dir():
        garden.partial.rename(away)
    kind = rng.choice(("folder", "folder", "link", "file"))
    if kind == "folder":
        garden.plant(garden.partial / rng.choice(("checkpoint", "calibration", "mine")) / "a.txt")
    elif kind == "file":
        garden.plant(garden.partial)
    else:
        garden.partial.symlink_to(garden.folder / "thesis")
    garden.take(garden.partial)

    def undo() -> None:
        garden.move(garden.partial)
        if away.exists():
            away.rename(garden.partial)

    return undo


def link_a_folder_of_the_run_s(rng: random.Random, garden: Garden) -> Undo | None:
    names = [n for n in ("checkpoint", "calibration") if (garden.partial / n).is_dir()]
    if not names:
        return None
    link = garden.partial / rng.choice(names)
    shutil.rmtree(link)
    link.symlink_to(garden.folder / "thesis")
    return link.unlink


def edit_the_source(rng: random.Random, garden: Garden) -> Undo | None:
    """Size and time of modification stay."""
    file = rng.choice(sorted(garden.source.glob("*.safetensors")))
    before = file.read_bytes()
    _write_over(file, before[:-1] + bytes([before[-1] ^ 1]))
    return _restored(garden, file, before)


def _restored(garden: Garden, file: Path, before: bytes) -> Undo:
    garden.take(file)

    def undo() -> None:
        _write_over(file, before)
        garden.take(file)

    return undo


def _write_over(file: Path, data: bytes) -> None:
    time.sleep(TICK)
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


MEDDLING: dict[str, Callable[[random.Random, Garden], Undo | None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        take_the_output, put_a_file_beside_the_run_s, put_a_file_among_the_run_s,
        have_a_folder_of_that_name, link_a_folder_of_the_run_s, edit_the_source,
    )
}  # fmt: skip


# What a user does while the run works: in its process, before one of its steps.

APPEARED = "appeared"
"""In the trial's folder: what the user made meanwhile, and how that is to stay."""


def _output_appears(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def happen(folder: Path) -> None:
        out = folder / "out"
        if not os.path.lexists(out):
            make(out)
            inside = out.glob("*") if out.is_dir() and not out.is_symlink() else ()
            made = {str(path): state(path) for path in (out, *inside)}
            (folder / APPEARED).write_text(json.dumps(made))

    return happen


def _folder_with_a_file(out: Path) -> None:
    out.mkdir()
    (out / "theirs.txt").write_text("theirs")


def _replace_the_shards(folder: Path) -> None:
    """Other files of these sizes take the names of all shards, with other data."""
    for file in sorted((folder / "source").glob("*.safetensors")):
        other = file.with_suffix(".new")
        other.write_bytes(_other_data(file))
        other.replace(file)


def _edit_the_shards(folder: Path) -> None:
    for file in sorted((folder / "source").glob("*.safetensors")):
        _write_over(file, _other_data(file))


def _other_data(file: Path) -> bytes:
    data = file.read_bytes()
    ends = range(len(data) - 2, len(data) - 2002, -2)
    return data[:-2000] + b"".join(data[at : at + 2] for at in ends)  # bf16, in the other order


MEANWHILE: dict[str, Callable[[Path], None]] = {
    "out appears: a folder": _output_appears(_folder_with_a_file),
    "out appears: an empty folder": _output_appears(Path.mkdir),
    "out appears: a file": _output_appears(lambda out: out.write_text("theirs")),
    "out appears: a link": _output_appears(lambda out: out.symlink_to(out.parent / "thesis")),
    "the shards are replaced": _replace_the_shards,
    "the shards are edited": _edit_the_shards,
}


def settle(garden: Garden, shards: Mapping[Path, bytes]) -> Undo | None:
    """After that: what is the user's now, and how they would undo it."""
    undone: list[Undo] = []
    appeared = garden.folder / APPEARED
    if appeared.exists():
        garden.expect(json.loads(appeared.read_text()))
        appeared.unlink()
        undone.append(lambda: garden.move(garden.out))
    for file, before in shards.items():
        if file.read_bytes() != before:
            undone.append(_restored(garden, file, before))

    def undo() -> None:
        for each in undone:
            each()

    return undo if undone else None
