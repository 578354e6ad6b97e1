"""Structured nonsense: checkpoints, recipes, tokenizers, scales and journals that are nearly right.

Each case makes a small input by a strategy, runs one command on it, and has to end in an exit code
of ckptq's: no traceback, no hang, no memory without end.

    PYTHONPATH=tests python tests/cli/strange.py --cases 10000
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from strange_inputs import (
    sound,
    strange_config,
    strange_data,
    strange_index,
    strange_journal,
    strange_names,
    strange_offsets,
    strange_recipe,
    strange_scales,
    strange_side_files,
    strange_task,
    strange_tokenizer,
)
from tiny.trials import memory, reset_peak, within

SECONDS = 10
GROWTH = 1000
"""MB."""

Words = list[str]


ON_ANY = (
    ["inspect", "{ckpt}"],
    ["inspect", "{ckpt}", "--json"],
    ["verify", "{ckpt}", "--headers-only"],
    ["verify", "{ckpt}", "--engine", "vllm"],
    ["verify", "{ckpt}", "--html", "{root}/page.html"],
    ["verify", "{ckpt}", "--engine", "transformers"],
    ["verify", "{ckpt}", "--source", "{sound}", "--json"],
    ["verify", "{sound}", "--source", "{ckpt}"],
    ["verify", "{ckpt}", "--source", "{sound}", "--attention", "--data", "{sound}/rows.jsonl"],
    ["quantize", "{ckpt}", "-s", "fp8-dynamic", "-o", "{root}/out"],
    ["quantize", "{ckpt}", "-s", "w4a16-g32", "-o", "{root}/out"],
    ["quantize", "{ckpt}", "-s", "nvfp4a16", "--dry-run"],
    ["permute", "{ckpt}", "{root}/out", "--to", "interleaved"],
    ["permute", "{ckpt}", "{root}/out", "--to", "half-split", "--only", "scales"],
    ["calibrate", "{ckpt}", "-o", "{root}/scales", "--data", "{sound}/rows.jsonl"],
    ["evaluate", "{ckpt}", "--source", "{sound}", "--data", "{sound}/rows.jsonl"],
    ["evaluate", "{ckpt}", "--schemes", "fp8-dynamic", "--data", "{sound}/rows.jsonl"],
)
"""{ckpt} is the folder that the strategy made, {sound} one that is as it should be."""

TEXT = ["--data", "{ckpt}/rows.jsonl", "--seq-len", "4", "--samples", "2", "--device", "cpu"]

STRATEGIES: dict[str, tuple[Callable[[random.Random, Path], None], tuple[Words, ...]]] = {
    "names": (strange_names, ON_ANY),
    "config": (strange_config, ON_ANY),
    "offsets": (strange_offsets, ON_ANY),
    "index": (strange_index, ON_ANY),
    "data": (strange_data, ON_ANY),
    "side files": (strange_side_files, ON_ANY),
    "recipe": (
        strange_recipe,
        (
            ["quantize", "{ckpt}", "--recipe", "{ckpt}/recipe.yaml", "--dry-run"],
            ["quantize", "{ckpt}", "--recipe", "{ckpt}/recipe.yaml", "-o", "{root}/out",
             "--data", "{sound}/rows.jsonl"],
            ["calibrate", "{ckpt}", "--recipe", "{ckpt}/recipe.yaml", "-o", "{root}/scales",
             "--data", "{sound}/rows.jsonl"],
        ),
    ),
    "tokenizer": (
        strange_tokenizer,
        (
            ["calibrate", "{ckpt}", "-o", "{root}/scales", "-s", "kv-fp8-per-tensor", *TEXT],
            ["evaluate", "{ckpt}", "--schemes", "fp8-dynamic", *TEXT],
            ["quantize", "{ckpt}", "-s", "fp8-per-head", "-o", "{root}/out", *TEXT],
        ),
    ),
    "task": (
        strange_task,
        (["evaluate", "{ckpt}", "--schemes", "fp8-dynamic", "--task", "{ckpt}/task.jsonl"],),
    ),
    "scales": (
        strange_scales,
        (
            ["quantize", "{ckpt}", "-s", "kv-fp8-per-tensor", "-o", "{root}/out", "--scales",
             "{ckpt}/scales"],
        ),
    ),
    "journal": (
        strange_journal,
        (
            ["quantize", "{ckpt}", "-s", "fp8-dynamic", "-o", "{root}/out"],
            ["quantize", "{ckpt}", "-s", "fp8-dynamic", "-o", "{root}/out", "--restart"],
            ["permute", "{ckpt}", "{root}/out", "--to", "interleaved"],
        ),
    ),
}  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """How the cases ended."""

    ended: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    growth_mb: int = 0

    def one(self, root: Path, seed: int, names: tuple[str, ...] = tuple(STRATEGIES)) -> None:
        """Make a case and run it."""
        rng = random.Random(seed)
        name = names[seed % len(names)]
        make, commands = STRATEGIES[name]
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        make(rng, root / "ckpt")
        words = rng.choice(commands)
        if any("{sound}" in word for word in words):
            sound(root / "sound")
        words = [w.format(ckpt=root / "ckpt", root=root, sound=root / "sound") for w in words]
        held, began = reset_peak(), time.monotonic()
        try:
            code, said = run(words)
            self.seconds = max(self.seconds, time.monotonic() - began)
            growth = memory("VmHWM") - held
            self.growth_mb = max(self.growth_mb, growth)
            assert code in range(5), f"exit code {code}"
            assert growth < GROWTH, f"took {growth} MB"
            assert "Traceback" not in said, "a traceback"
            strange = {c for c in said if not c.isprintable()} - {"\n"}
            assert not strange, f"prints {strange!r}"
            assert said, "not a word"
            self.ended[f"{name}: {code}"] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what must not happen is what is looked for
            what = f"{type(error).__name__}: {str(error)[:150]} {_where(error)}"
            self.failed.append(f"seed {seed} {name}: {words[0]}: {what}")


def _import_all() -> None:
    """What takes seconds the first time, and is no case's own."""
    for name in ("llmcompressor.recipe", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _where(error: BaseException) -> str:
    """The last line of ckptq's on the way to it."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/ckptq/" in f.filename]
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def run(words: Words) -> tuple[int, str]:
    """The program in this process: (exit code, all that it said)."""
    from ckptq.__main__ import main

    said = io.StringIO()
    argv, sys.argv = sys.argv, ["ckptq", *words]
    try:
        with within(SECONDS), redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else int(bool(end.code))), said.getvalue()
    finally:
        sys.argv = argv
    raise AssertionError("main returned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=STRATEGIES)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    _import_all()
    names = (arguments.strategy,) if arguments.strategy else tuple(STRATEGIES)
    outcome, began = Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            before = len(outcome.failed)
            outcome.one(Path(folder) / "case", seed, names)
            for line in outcome.failed[before:]:
                print(line, flush=True)
    print(f"{arguments.cases} cases in {time.monotonic() - began:.0f} s")
    for how, count in sorted(outcome.ended.items()):
        print(f"{count:6} {how}")
    print(f"{len(outcome.failed)} failed, slowest {outcome.seconds:.1f} s, {outcome.growth_mb} MB")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
