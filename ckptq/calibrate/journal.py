"""What a killed calibration needs to go on: statistics so far, and the hidden states behind them.

    FOLDER/run.json              what the scales depend on; another run is refused
    FOLDER/layer-00012/          the state after 12 layers: one file per batch, and the statistics
    FOLDER/scales.safetensors    the result, when all layers are done

A state is written beside the last one, synced, renamed, and only then that one is removed: there
is always a whole one. Hidden states can be large, so a state is written only when the writing takes
no more than a tenth of the time since the one before, and where the disk has room for it.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ckptq.calibrate.observers import Stats
from ckptq.calibrate.scales import Scales, load_scales, save_scales
from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.read import read_tensors
from ckptq.checkpoint.write import machine_errors, sync_folder
from ckptq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.calibrate.forward import Stream
    from ckptq.calibrate.statistics import Statistics

RUN = "run.json"
RESULT = "scales.safetensors"
STATISTICS = "statistics.safetensors"
SHARE_OF_TIME = 0.1
GUESSED_SPEED = 1e9
"""Bytes a second, for the first state; the others are expected to take as long as the last one."""


class Journal:
    """The folder in which one calibration keeps its state."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Begin, or go on with the same run. UsageError when the folder is of a different one, and
        that one has done something."""
        self._folder = folder
        self._wrote = monotonic()
        self._cost: float | None = None
        self._told = False
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _claim(folder, json.loads(json.dumps(run)))
            for leftover in folder.glob("layer-*.partial"):
                shutil.rmtree(leftover)

    def finished(self) -> Scales | None:
        """The scales, where a former run got as far as that."""
        file = self._folder / RESULT
        return load_scales(file) if file.exists() else None

    def restore(self, stream: Stream, statistics: Statistics) -> int:
        """Put the last state into stream and statistics; how many layers it has behind it."""
        states = sorted(self._folder.glob("layer-?????"))
        if not states or not stream.resumable:
            return 0
        for number in range(len(stream.batches)):
            file = states[-1] / _batch(number)
            stream.hidden_BSE[number] = read_tensors(read_header(file).tensors)["hidden"]
        header = read_header(states[-1] / STATISTICS)
        points: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(header.tensors).items():
            point, _, key = name.rpartition("|")
            points.setdefault(point, {})[key] = tensor
        statistics.points = {point: points[point] for point in json.loads(header.metadata["order"])}
        return int(states[-1].name.removeprefix("layer-"))

    def keep(self, done: int, stream: Stream, statistics: Statistics) -> None:
        """Write the state after `done` layers, unless the last one is too recent to be worth it."""
        began = monotonic()
        size = sum(hidden_BSE.nbytes for hidden_BSE in stream.hidden_BSE)
        cost = size / GUESSED_SPEED if self._cost is None else self._cost
        if not stream.resumable or SHARE_OF_TIME * (began - self._wrote) < cost:
            return
        if not self._has_room(size):
            return
        with machine_errors(self._folder):
            self._write(done, stream, statistics.points)
        self._wrote = monotonic()
        self._cost = self._wrote - began

    def finish(self, scales: Scales) -> None:
        """Write the result; the states have served."""
        with machine_errors(self._folder):
            save_scales(self._folder / RESULT, scales)
            for state in self._folder.glob("layer-*"):
                shutil.rmtree(state)

    def _has_room(self, size: int) -> bool:
        """A full disk costs the chance to go on, not the calibration; it is said once."""
        free = shutil.disk_usage(self._folder).free
        if free < size and not self._told:
            self._told = True
            warnings.warn(
                f"{self._folder}: {free / 1e9:.1f} GB are free and the state of the calibration "
                f"takes {size / 1e9:.1f} GB, so a killed run will not go on from here",
                stacklevel=3,
            )
        return free >= size

    def _write(self, done: int, stream: Stream, points: Mapping[str, Stats]) -> None:
        former = list(self._folder.glob("layer-*"))
        state = self._folder / f"layer-{done:05d}"
        scratch = state.with_name(state.name + ".partial")
        scratch.mkdir()
        for number, hidden_BSE in enumerate(stream.hidden_BSE):
            _save(scratch / _batch(number), {"hidden": hidden_BSE}, {})
        # copies: Linears that are fed the same share one statistic, which safetensors refuses
        flat = {f"{p}|{key}": t.clone() for p, stats in points.items() for key, t in stats.items()}
        _save(scratch / STATISTICS, flat, {"order": json.dumps(list(points))})
        sync_folder(scratch)
        scratch.rename(state)
        sync_folder(self._folder)
        for old in former:
            shutil.rmtree(old)


def holds_work(folder: Path) -> bool:
    """Whether a run has left anything there from which to go on."""
    return (folder / RESULT).exists() or any(folder.glob("layer-?????"))


def _claim(folder: Path, run: Mapping[str, Any]) -> None:
    file = folder / RUN
    if not file.exists() or not holds_work(folder):
        scratch = file.with_name(RUN + ".partial")
        scratch.write_text(json.dumps(run, sort_keys=True))
        _sync(scratch)
        scratch.replace(file)
        sync_folder(folder)
        return
    found = json.loads(file.read_text())
    for key in sorted(found.keys() | run.keys()):
        if found.get(key) != run.get(key):
            raise UsageError(
                f"{folder}: was begun by a different calibration: {key} was {found.get(key)!r}, is "
                f"{run.get(key)!r}; give the same command to go on, or --restart to begin anew"
            )


def _batch(number: int) -> str:
    return f"batch-{number:05d}.safetensors"


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    _sync(file)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
