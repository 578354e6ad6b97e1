"""Killed between the rename that publishes an output and the end of the run: the same command finds
that the output is its own, removes what is left of the run, and says that it is done. `mend` is
killed before that too, which the trials of `ordeal.py` do with the other commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ordeal import make_sources
from ordeal_others import Garden
from ordeal_process import Accident, Ended, ckptq
from tiny.rows import write_rows

from ckptq.checkpoint.open import open_checkpoint

LAST = {"calibrate": 2}
"""Steps: lock and folder go; other commands move their journal beside it, and remove it last."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("removal")
    made = make_sources(folder)
    write_rows(folder / "rows.jsonl", [[3 + (i * j) % 90 for j in range(1, 18)] for i in (1, 2)])
    made["rows"] = folder / "rows.jsonl"
    made["broken"] = folder / "broken"
    words = ["quantize", str(made["llama"]), "-s", "fp8-dynamic", "-o", str(made["broken"])]
    assert ckptq(words, folder).code == 0
    config = json.loads((made["broken"] / "config.json").read_text())
    config["quantization_config"]["quantization_status"] = "frozen"
    (made["broken"] / "config.json").write_text(json.dumps(config))
    made["torn"] = folder / "torn"
    words = ["quantize", str(made["llama"]), "-s", "fp8-dynamic", "-o", str(made["torn"])]
    assert ckptq([*words, "--shard-size", "60kB"], folder).code == 0
    write_nan(made["torn"], "model.layers.1.mlp.down_proj.weight_scale")
    return made


def write_nan(folder: Path, name: str) -> None:
    stored = open_checkpoint(folder).tensors[name]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff\xff")


WORDS = {
    "quantize": ("llama", ["quantize", "SOURCE", "-s", "fp8-per-head", "-o", "OUT",
                           "--data", "ROWS", "--device", "cpu"]),
    "calibrate": ("llama", ["calibrate", "SOURCE", "-o", "OUT", "--data", "ROWS",
                            "--device", "cpu"]),
    "permute": ("llama4", ["permute", "SOURCE", "OUT", "--to", "half-split"]),
    "mend values": ("torn", ["mend", "SOURCE", "OUT", "--source", "LLAMA"]),
    "mend": ("broken", ["mend", "SOURCE", "OUT", "--headers-only"]),
}  # fmt: skip


class Command:
    """One command in a folder of its own."""

    def __init__(self, folder: Path, sources: dict[str, Path], name: str) -> None:
        source, words = WORDS[name]
        self.garden = Garden(folder, sources[source])
        places = {"SOURCE": self.garden.source, "OUT": self.garden.out, "ROWS": sources["rows"],
                  "LLAMA": sources["llama"]}  # fmt: skip
        self._words = [str(places.get(word, word)) for word in words]
        self._ready = folder / "ready"

    def run(self, accident: Accident | None = None) -> Ended:
        return ckptq(self._words, self.garden.folder, accident)

    def keep(self) -> None:
        """Keep the state of the run as it is now, for `ready`."""
        shutil.copytree(self.garden.partial, self._ready)

    def ready(self) -> None:
        """Back to the state that was kept."""
        self.clear()
        if self._ready.exists():
            shutil.copytree(self._ready, self.garden.partial)

    def clear(self) -> None:
        for path in [*self.garden.folder.glob("*out*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def left(self) -> list[str]:
        """What lies beside the output."""
        return sorted(p.name for p in self.garden.folder.glob("*out*") if p != self.garden.out)


@pytest.mark.parametrize("name", [name for name in WORDS if name != "mend values"])
def test_killed_at_each_of_the_last_steps(tmp_path, sources, name):
    command = Command(tmp_path, sources, name)
    if name != "calibrate":  # a run with all its work behind it takes the same steps each time
        assert command.run(Accident("kill", 1, "rename_new")).code == -9
        command.keep()
    whole = command.run()
    assert whole.code == 0, whole.said
    wanted = command.garden.made()
    for at in range(whole.steps - LAST.get(name, 4) + 1, whole.steps + 1):
        command.ready()
        assert command.run(Accident("kill", at)).code == -9
        assert command.garden.made() == wanted
        assert command.left()
        again = command.run()
        assert again.code == 0, f"step {at} of {whole.steps}: {again.said}"
        assert command.garden.made() == wanted
        assert command.left() == []
        command.garden.check_mine()


def test_mend_killed_on_its_way(tmp_path, sources):
    """While the shard with the fault is written, and while the others are linked."""
    command = Command(tmp_path, sources, "mend values")
    whole = command.run()
    assert whole.code == 0, whole.said
    wanted = command.garden.made()
    lives = [whole.steps * part // 5 for part in (1, 2, 3, 4)]
    for at in lives:
        command.clear()
        assert command.run(Accident("kill", at)).code == -9
        command.garden.check_mine()
        again = command.run()
        assert again.code == 0, f"step {at} of {whole.steps}: {again.said}"
        assert command.garden.made() == wanted
        assert command.left() == []


def renamed(tmp_path: Path, sources: dict[str, Path]) -> Command:
    """A run that was killed before the very last step: only its journal is left."""
    command = Command(tmp_path, sources, "permute")
    assert command.run(Accident("kill", 1, "rename_new")).code == -9
    command.keep()
    steps = command.run().steps
    command.ready()
    assert command.run(Accident("kill", steps)).code == -9
    assert command.left() == [".out.partial.ckptq-unfinished"]
    return command


def test_an_output_that_was_changed_meanwhile_is_refused(tmp_path, sources):
    """The twin: what is left of the run proves that this is not what it wrote."""
    command = renamed(tmp_path, sources)
    config = command.garden.out / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    command.garden.take(config)
    ended = command.run()
    assert ended.code == 2
    assert "config.json differs" in ended.said
    command.garden.check_mine()


def test_an_output_that_is_gone_is_made_again(tmp_path, sources):
    """A journal without its output proves nothing."""
    command = renamed(tmp_path, sources)
    wanted = command.garden.made()
    shutil.rmtree(command.garden.out)
    assert command.run().code == 0
    assert command.garden.made() == wanted
    assert command.left() == []
