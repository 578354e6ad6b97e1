"""Runs that are killed, fail, are damaged, and are meddled with: trials by the seed.

A trial takes one command through some lives. Each ends at a random step of the disk, by a real
SIGKILL, an error of the disk, or by what a user does meanwhile; in between something may be damaged
or put in its way. It has to end in the bytes of an undisturbed run, or in a refusal that says what
to do; when that is done, in those bytes. Nothing of the user's may have changed.

    PYTHONPATH=tests python tests/convert/ordeal.py --trials 200
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ordeal_others import MEANWHILE, MEDDLING, TICK, Garden, Undo, damage, settle
from ordeal_process import ERRORS, SABOTAGE, Accident, Ended, ckptq
from tiny.rows import write_rows

LAYERS = 3
REFUSED = (2, 3, 4)
COMMANDS = ("quantize", "plain", "calibrate", "permute")

IO_ERRORS = (*ERRORS, "full", "bad sector")


@dataclass(frozen=True, slots=True)
class Life:
    accident: Accident
    damaged: bool
    """A file of the run's is damaged afterwards."""


@dataclass(frozen=True, slots=True)
class Story:
    """What happens in a trial. `seed` says what exactly."""

    seed: int
    command: str
    lives: tuple[Life, ...]
    meddle: str | None
    """What a user does before the last life."""

    @property
    def disk_only(self) -> bool:
        """Nobody but the machine does anything: what was written stays, and what is read too."""
        accidents = {life.accident.what for life in self.lives}
        damaged = any(life.damaged for life in self.lives)
        return accidents <= {"kill", *IO_ERRORS} and not damaged and self.meddle is None

    def __str__(self) -> str:
        lives = (f"{life.accident}{' damaged' if life.damaged else ''}" for life in self.lives)
        return f"seed {self.seed}, {self.command}: {', '.join(lives)}; {self.meddle}"


class Trials:
    """Sources, what an undisturbed run makes of each, and how many steps it takes."""

    def __init__(self, folder: Path, commands: tuple[str, ...] = COMMANDS) -> None:
        self.folder = folder
        self.commands = commands
        self.rows = folder / "rows.jsonl"
        rows = [[3 + (i * j) % 90 for j in range(1, 18)] for i in range(1, 5)]
        write_rows(self.rows, rows)
        self.sources = make_sources(folder)
        self.whole: dict[str, Ended] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        for command in commands:
            garden = self._garden(command)
            self.whole[command] = self._run(garden, command)
            assert self.whole[command].code == 0, self.whole[command].said
            self.wanted[command] = garden.made()

    def story(self, seed: int) -> Story:
        rng = random.Random(seed)
        command = self.commands[seed % len(self.commands)]
        count = rng.choice((1, 1, 2, 3))
        lives = (self._life(rng, command, number) for number in range(count))
        meddle = rng.choice(sorted(MEDDLING)) if rng.random() < 0.3 else None
        return Story(seed, command, tuple(lives), meddle)

    def _life(self, rng: random.Random, command: str, number: int) -> Life:
        kind = rng.choice(("kill", "kill", "kill", "disk", "meanwhile"))
        what = {
            "kill": "kill",
            "disk": rng.choice(IO_ERRORS),
            "meanwhile": rng.choice(sorted(MEANWHILE)),
        }[kind]
        whole = self.whole[command]
        steps = whole.reads if what == "bad sector" else whole.steps * 21 // 20
        at = rng.randrange(1, steps >> number)  # the next life has less to do
        return Life(Accident(what, at), kind == "kill" and rng.random() < 0.5)

    def one(self, seed: int, left_out: str | None = None) -> str:
        """A trial; how it ended. AssertionError where it must not end like that."""
        story = self.story(seed)
        if left_out is not None:
            story = TEMPTED[left_out](self, story)
        try:
            return Trial(self, story, left_out).play()
        except AssertionError as error:
            raise AssertionError(f"{story}: {error}") from error

    def _garden(self, command: str) -> Garden:
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return Garden(folder, self.sources["llama4" if command == "permute" else "llama"])

    def _run(
        self,
        garden: Garden,
        command: str,
        *more: str,
        accident: Accident | None = None,
        left_out: str | None = None,
    ) -> Ended:
        source, out = str(garden.source), str(garden.out)
        text = ["--data", str(self.rows), "--batch-size", "2", "--device", "cpu"]
        words = {
            "quantize": ["quantize", source, "-s", "fp8-per-head", "-o", out, *text,
                         "--shard-size", "100kB", "--workers", "2"],
            "plain": ["quantize", source, "-s", "w4a16-g32", "-o", out, "--shard-size", "100kB"],
            "calibrate": ["calibrate", source, "-o", out, *text],
            "permute": ["permute", source, out, "--to", "half-split", "--workers", "2"],
        }[command]  # fmt: skip
        return ckptq([*words, *more], garden.folder, accident, left_out)


class Trial:
    def __init__(self, trials: Trials, story: Story, left_out: str | None) -> None:
        self._story = story
        self._rng = random.Random(story.seed)
        self._garden = trials._garden(story.command)
        self._wanted = trials.wanted[story.command]
        self._undos: list[Undo] = []
        self._hit: list[str] = []

        def run(*more: str, accident: Accident | None = None) -> Ended:
            return trials._run(
                self._garden, story.command, *more, accident=accident, left_out=left_out
            )

        self._run: Callable[..., Ended] = run

    def play(self) -> str:
        for life in self._story.lives:
            self._live(life)
        if self._story.meddle is not None:
            undo = MEDDLING[self._story.meddle](self._rng, self._garden)
            self._undos += [undo] if undo is not None else []
        finished = self._finished()
        ended = self._run()
        how = self._judge(ended)
        if ended.code == 0 or finished:
            return self._equal("the output is there" if finished else how)
        assert not self._story.disk_only, f"a disk that failed is to blame: {ended.said}"
        return self._as_advised(ended)

    def _live(self, life: Life) -> None:
        shards = {f: f.read_bytes() for f in self._garden.source.glob("*.safetensors")}
        ended = self._run(accident=life.accident)
        undo = settle(self._garden, shards)
        self._undos += [undo] if undo is not None else []
        if ended.code != -9 or life.accident.what != "kill":
            self._judge(ended)
        if life.accident.what in IO_ERRORS and self._story.disk_only:
            assert ended.code in (0, 4) or self._finished(), f"{ended.code}: {ended.said}"
        self._garden.check_mine()
        if life.damaged:
            self._hit.append(damage(self._rng, self._garden))

    def _finished(self) -> bool:
        return not self._garden.partial.exists() and self._garden.made() == self._wanted

    def _judge(self, ended: Ended) -> str:
        self._garden.check_mine()
        assert "Traceback" not in ended.said, ended.said
        if ended.code == 0:
            return self._equal("equal")
        assert ended.code in REFUSED, f"exit code {ended.code}: {ended.said}"
        assert "error: " in ended.said, f"exit code {ended.code}: {ended.said}"
        return "refused"

    def _equal(self, how: str) -> str:
        self._garden.check_mine()
        made = self._garden.made()
        if made != self._wanted and self._garden.source_changed():
            assert made == self._anew(), f"other bytes, and not of the new source ({self._hit})"
            self._wanted = made
            return f"{how}, of the new source"
        assert made == self._wanted, f"other bytes ({self._hit})"
        return how

    def _anew(self) -> dict[str, str]:
        """What an undisturbed run makes of the source as it is now."""
        garden, out = self._garden, self._garden.out
        garden.out = Path(tempfile.mkdtemp(dir=garden.folder)) / "out"
        try:
            ended = self._run()
            assert ended.code == 0, ended.said
            return garden.made()
        finally:
            garden.out = out

    def _as_advised(self, ended: Ended) -> str:
        """Do what the refusals say until it works."""
        how = "refused"
        for undo in reversed(self._undos):
            undo()
        if self._undos:
            how, ended = f"{how}, undone", self._run()
        if ended.code and "not what the run" in ended.said:
            self._garden.move(self._garden.out)
            how, ended = f"{how}, output moved away", self._run()
        if ended.code and "already exists; remove it" in ended.said:
            whole = any(" out/" in hit for hit in self._hit) or self._garden.made() == self._wanted
            assert whole, "an output that nobody damaged is not whole"
            return f"{how}: the output is there, its journal is not"
        if ended.code:
            assert "--restart" in ended.said, f"{ended.said} ({self._hit})"
            how, ended = f"{how}, --restart", self._run("--restart")
        if ended.code and "already exists" in ended.said and "move it away" in ended.said:
            self._garden.move(self._garden.out)
            how, ended = f"{how}, output moved away", self._run("--restart")
        assert ended.code == 0, f"{how}: {ended.said} ({self._hit})"
        return self._equal(f"{how}, equal")


def _damaged(command: str) -> Callable[[Trials, Story], Story]:
    def tempt(trials: Trials, story: Story) -> Story:
        at = trials.whole[command].steps * 3 // 4 + story.seed % 8
        lives = (Life(Accident("kill", at), True),)
        return replace(story, command=command, lives=lives, meddle=None)

    return tempt


def _meanwhile(what: str, command: str = "plain") -> Callable[[Trials, Story], Story]:
    def tempt(trials: Trials, story: Story) -> Story:
        at = random.Random(story.seed).randrange(1, trials.whole[command].steps)
        lives = (Life(Accident(what, at), False),)
        return replace(story, command=command, lives=lives, meddle=None)

    return tempt


def _meddled(meddle: str, at: float) -> Callable[[Trials, Story], Story]:
    def tempt(trials: Trials, story: Story) -> Story:
        lives = (Life(Accident("kill", int(trials.whole["plain"].steps * at)), False),)
        return replace(story, command="plain", lives=lives, meddle=meddle)

    return tempt


def _renamed(trials: Trials, story: Story) -> Story:
    """Killed after the rename, and damaged."""
    lives = (Life(Accident("kill", trials.whole["plain"].steps - 3), True),)
    return replace(story, command="plain", lives=lives, meddle=None)


TEMPTED: dict[str, Callable[[Trials, Story], Story]] = {
    "units are proved": _damaged("plain"),
    "the source is the same file": _meanwhile("the shards are edited"),
    "only a marked folder is a run's": _meddled("have a folder of that name", 0.01),
    "the output's name is new": _meanwhile("out appears: an empty folder"),
    "what was renamed is proved": _renamed,
    "the output has no other files": _meddled("put a file among the run s", 0.5),
}
"""Guard that is left out -> a story in which it would be needed."""

assert TEMPTED.keys() == SABOTAGE.keys()


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ended: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        print("steps of an undisturbed run:", {c: e.steps for c, e in trials.whole.items()})
        for seed in range(arguments.seed, arguments.seed + arguments.trials):
            story = trials.story(seed)
            happened[f"command: {story.command}"] += 1
            happened.update(f"accident: {life.accident.what}" for life in story.lives)
            happened["damaged"] += sum(life.damaged for life in story.lives)
            happened[f"a user: {story.meddle}"] += story.meddle is not None
            try:
                ended[trials.one(seed)] += 1
            except AssertionError as error:
                failed.append(str(error))
                print(error, flush=True)
    for what, count in sorted((+happened).items()):
        print(f"{count:5} {what}")
    for how, count in ended.most_common():
        print(f"{count:5} ended: {how}")
    print(f"{arguments.trials} trials, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
