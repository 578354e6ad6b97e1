"""Runs that are killed, whose files are damaged, and whose folders others use: trials by the seed.

A trial takes one command, kills it some times at a random step by a real SIGKILL, damages something
in between, and lets it go on. It has to end in the bytes of an undisturbed run, or in a refusal
that says what to do; when that is done, in those bytes. Nothing of the user's may have changed.

    python tests/convert/ordeal.py --trials 200
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_killed import SECONDS, STEPS, server

LAYERS = 3
REFUSED = (2, 3, 4)
TICK = 0.02
"""Seconds in which the clock that stamps files moves on."""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    said: str
    steps: int


def ckptq(words: list[str], die_at: int | None, said: Path) -> Ended:
    """The program in a process of its own, killed before a step of the disk."""
    count = server.Value("i", 0)
    process = server.Process(target=_main, args=(words, die_at, str(said), count))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, f"{words} hangs"
    return Ended(process.exitcode, said.read_text(errors="replace"), count.value)


def _main(words: list[str], die_at: int | None, said: str, count: Any) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["ckptq", *words]
    import ckptq.calibrate.journal
    import ckptq.permute.run
    from ckptq.__main__ import main
    from ckptq.checkpoint import journal
    from ckptq.convert import run

    # many entries of a journal in a run of a second
    ckptq.calibrate.journal.SHARE_OF_TIME = float("inf")
    ckptq.permute.run.COMMIT_BYTES = 30_000
    assert run.write_quantized.__kwdefaults__ is not None
    run.write_quantized.__kwdefaults__["commit_bytes"] = 20_000
    lock = threading.Lock()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                count.value += 1
                if count.value == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    journal.rename_new = counted(journal.rename_new)
    main()


class Garden:
    """A folder with a source, an output in the making, and much that is the user's."""

    def __init__(self, folder: Path, source: Path, command: str) -> None:
        self.folder = folder
        self.source = folder / "source"
        shutil.copytree(source, self.source)
        self.out = folder / "out"
        self.partial = folder / "out.partial"
        self.command = command
        (folder / "notes.txt").write_text("mine")
        (folder / "thesis").mkdir()
        (folder / "thesis" / "chapter.txt").write_text("mine too")
        self.mine = {folder / "notes.txt", folder / "thesis" / "chapter.txt"}
        self.before = {path: _digest(path) for path in self.mine}

    def words(self, *more: str) -> list[str]:
        source, out = str(self.source), str(self.out)
        text = str(self.source.parent / "rows.jsonl")
        if not Path(text).exists():
            rows = [[3 + (i * j) % 90 for j in range(1, 18)] for i in range(1, 5)]
            Path(text).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        calibrated = ["--data", text, "--batch-size", "2", "--device", "cpu"]
        return {
            "quantize": ["quantize", source, "-s", "fp8-per-head", "-o", out, *calibrated,
                         "--shard-size", "100kB", "--workers", "2"],
            "plain": ["quantize", source, "-s", "w4a16-g32", "-o", out, "--shard-size", "100kB"],
            "calibrate": ["calibrate", source, "-o", out, *calibrated],
            "permute": ["permute", source, out, "--to", "half-split", "--workers", "2"],
        }[self.command] + list(more)  # fmt: skip

    def run(self, *more: str, die_at: int | None = None) -> Ended:
        return ckptq(self.words(*more), die_at, self.folder / "said")

    def plant(self, path: Path, text: str = "mine as well") -> None:
        """Something of the user's, which is to stay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.mine.add(path)
        self.before[path] = _digest(path)

    def check_mine(self) -> None:
        for path in self.mine:
            assert path.exists(), f"{path} of the user's is gone"
            assert _digest(path) == self.before[path], f"{path} of the user's has changed"

    def made(self) -> dict[str, str]:
        """What the command has made, by name."""
        if self.out.is_file():
            return {"": _digest(self.out)}
        files = (p for p in sorted(self.out.rglob("*")) if p.is_file())
        return {str(p.relative_to(self.out)): _digest(p) for p in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Damage to what the run has made: it has to be noticed, and mended.


def _a_file(rng: random.Random, garden: Garden) -> Path | None:
    files = sorted(p for p in garden.partial.rglob("*") if p.is_file() and p.name != "lock")
    return rng.choice(files) if files else None


def damage(rng: random.Random, garden: Garden) -> str:
    """One file of the folder is cut, zeroed, changed, or gone."""
    file = _a_file(rng, garden)
    if file is None:
        return "nothing"
    data = bytearray(file.read_bytes())
    how = rng.choice(("cut", "empty", "hole", "bit", "gone", "longer", "other"))
    at = rng.randrange(len(data) + 1)
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
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"{how} {file.relative_to(garden.partial)}"


# What others do meanwhile. Each gives back how to undo it, by hand, as a user would.

Undo = Callable[[], None]


def output_taken(rng: random.Random, garden: Garden) -> Undo | None:
    """Somebody makes something of the output's name."""
    if os.path.lexists(garden.out):
        return None
    kind = rng.choice(("folder", "empty folder", "file", "link"))
    target = garden.folder / "theirs"
    if kind == "folder":
        garden.plant(garden.out / "theirs.txt")
    elif kind == "empty folder":
        garden.out.mkdir()
    elif kind == "file":
        garden.plant(garden.out, "theirs")
    else:
        target.mkdir(exist_ok=True)
        garden.plant(target / "theirs.txt")
        garden.out.symlink_to(target)

    def undo() -> None:
        _move(garden, garden.out, garden.folder / f"moved-{rng.random()}")

    return undo


def file_in_the_partial_folder(rng: random.Random, garden: Garden) -> Undo | None:
    """Something of the user's beside a run's own files; it is in nobody's way."""
    if not garden.partial.is_dir():
        return None
    garden.plant(garden.partial / f"note-{rng.randrange(9)}.txt")
    return lambda: None


def file_in_the_output_in_the_making(rng: random.Random, garden: Garden) -> Undo | None:
    folder = garden.partial / "checkpoint"
    if not folder.is_dir():
        return None
    note = folder / "note.txt"
    garden.plant(note)
    return lambda: _move(garden, note, garden.folder / f"moved-{rng.random()}")


def partial_of_somebody_else(rng: random.Random, garden: Garden) -> Undo | None:
    """The folder of the run is taken away, and the user has one of that name."""
    away = garden.folder / f"away-{rng.random()}"
    if garden.partial.is_dir():
        garden.partial.rename(away)
    if rng.random() < 0.5:
        garden.plant(garden.partial / rng.choice(("checkpoint", "mine")) / "a.txt")
    else:
        garden.partial.symlink_to(garden.folder / "thesis")

    def undo() -> None:
        _move(garden, garden.partial, garden.folder / f"moved-{rng.random()}")
        if away.exists():
            away.rename(garden.partial)

    return undo


def linked_folder(rng: random.Random, garden: Garden) -> Undo | None:
    """Where the run keeps what it has made there is a link to something of the user's."""
    names = [n for n in ("checkpoint", "calibration") if (garden.partial / n).is_dir()]
    if not names:
        return None
    link = garden.partial / rng.choice(names)
    shutil.rmtree(link)
    link.symlink_to(garden.folder / "thesis")
    return link.unlink


def _move(garden: Garden, path: Path, to: Path) -> None:
    if not os.path.lexists(path):
        return
    os.rename(path, to)
    moved = {p for p in garden.mine if p == path or path in p.parents}
    for old in moved:
        new = to if old == path else to / old.relative_to(path)
        garden.mine.discard(old)
        garden.mine.add(new)
        garden.before[new] = garden.before.pop(old)


def edit_source(rng: random.Random, garden: Garden) -> Undo | None:
    """The source is another one now; what was done is of the old one."""
    time.sleep(TICK)
    file = rng.choice(sorted(garden.source.glob("*.safetensors")))
    before, times = file.read_bytes(), file.stat()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def undo() -> None:
        time.sleep(TICK)
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    return undo


MEDDLING = (
    output_taken, file_in_the_partial_folder, file_in_the_output_in_the_making,
    partial_of_somebody_else, linked_folder, edit_source,
)  # fmt: skip


class Trials:
    """Sources, what an undisturbed run makes of each, and how many steps it takes."""

    def __init__(self, folder: Path, commands: tuple[str, ...]) -> None:
        self.folder = folder
        self.commands = commands
        self.sources = make_sources(folder)
        self.wanted: dict[str, dict[str, str]] = {}
        self.steps: dict[str, int] = {}
        for command in commands:
            garden = Garden(_new(folder / f"whole-{command}"), self.source(command), command)
            done = garden.run()
            assert done.code == 0, done.said
            self.wanted[command], self.steps[command] = garden.made(), done.steps

    def source(self, command: str) -> Path:
        return self.sources["llama4" if command == "permute" else "llama"]

    def one(self, seed: int) -> str:
        """A trial; how it ended. AssertionError where it must not end like that."""
        rng = random.Random(seed)
        command = self.commands[seed % len(self.commands)]
        folder = _new(self.folder / "trial")
        garden = Garden(folder, self.source(command), command)
        story = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            die_at = rng.randrange(1, self.steps[command] * 21 // 20)
            story.append(f"die at {die_at}: {garden.run(die_at=die_at).code}")
            if rng.random() < 0.5:
                story.append(damage(rng, garden))
        meddle = rng.choice(MEDDLING) if rng.random() < 0.4 else None
        undo = meddle(rng, garden) if meddle is not None else None
        story.append(meddle.__name__ if meddle is not None and undo is not None else "alone")
        try:
            return self._end(garden, undo, meddle is edit_source)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {command}: {'; '.join(story)}: {error}") from error

    def _end(self, garden: Garden, undo: Undo | None, edited: bool) -> str:
        finished = garden.out.exists() and garden.made() == self.wanted[garden.command]
        ended = garden.run()
        how = self._judge(garden, ended, undo, finished)
        garden.check_mine()
        if how == "equal":
            return how
        if undo is not None:
            undo()
            ended = garden.run()
            if ended.code == 0:
                return self._equal(garden, f"{how}, undone, equal")
            garden.check_mine()
        assert ended.code in REFUSED, ended.said
        if finished or "is there, and is not what the run" in ended.said:
            return f"{how}: the output is there"
        assert "--restart" in ended.said or "move it away" in ended.said, ended.said
        ended = garden.run("--restart")
        assert ended.code == 0, ended.said
        return self._equal(garden, f"{how}, --restart, equal")

    def _judge(self, garden: Garden, ended: Ended, undo: Undo | None, finished: bool) -> str:
        if ended.code == 0:
            return self._equal(garden, "equal")
        assert ended.code in REFUSED, f"{ended.code}: {ended.said}"
        assert "Traceback" not in ended.said, ended.said
        assert "error: " in ended.said, ended.said
        return "refused"

    def _equal(self, garden: Garden, how: str) -> str:
        garden.check_mine()
        assert garden.made() == self.wanted[garden.command], "other bytes, and exit code 0"
        return how


def make_sources(folder: Path) -> dict[str, Path]:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    }  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    text = sizes | {
        "intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 2,
    }  # fmt: skip
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text))
    made = {}
    for name, model in {"llama": llama, "llama4": llama4}.items():
        made[name] = folder / name
        model.bfloat16().save_pretrained(made[name], max_shard_size="60kB")
        (made[name] / "tokenizer.json").write_text('{"version": "1.0"}')
    time.sleep(TICK)
    return made


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


COMMANDS = ("quantize", "plain", "calibrate", "permute")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ended: Counter[str] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), COMMANDS)
        print("steps of an undisturbed run:", trials.steps, flush=True)
        for seed in range(arguments.seed, arguments.seed + arguments.trials):
            try:
                ended[trials.one(seed)] += 1
            except AssertionError as error:
                failed.append(str(error))
                print(error, flush=True)
    for how, count in ended.most_common():
        print(f"{count:5} {how}")
    print(f"{arguments.trials} trials, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
