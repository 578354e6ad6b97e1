"""State to resume a killed calibration: the statistics so far, and the hidden states.

    FOLDER/run.json        what the scales depend on; other runs are refused
    FOLDER/layer-00012/    the state after 12 layers: one file per batch, and the statistics
    FOLDER/result/         the scales, when all layers are done

A state is written beside the last one, synced, sealed with digests of its files and renamed; only
then is the old one removed. A state that does not match its seal is ignored. Hidden states can be
large, so a state is written only if that takes at most a tenth of the time since the last one, and
if the disk has room.

Several ranks write one state, each the batches that it runs: another number of ranks, or a single
process, goes on from it. They agree after every layer, so none is ever a layer ahead.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from ckptq.calibrate.divided import merged
from ckptq.calibrate.observers import Stats
from ckptq.calibrate.scales import Scales, load_scales, save_scales
from ckptq.calibrate.statistics import Statistics
from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.read import read_tensors
from ckptq.checkpoint.seal import is_whole, seal
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import MachineError, UsageError
from ckptq.files import clear_unfinished, json_bytes, machine_errors, sync_folder, write_whole
from ckptq.forward.layerwise import Stream

RUN = "run.json"
RESULT = "result"
SCALES = "scales.safetensors"
STATISTICS = "statistics.safetensors"
SHARE_OF_TIME = 0.1
GUESSED_SPEED = 1e9
"""Bytes a second, for the first state; the others are expected to take as long as the last one."""


class Journal:
    """The folder in which one calibration keeps its state."""

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        ranks: Ranks = ALONE,
        share: Ranks = ALONE,
    ) -> None:
        """Start a run, or resume the same one. UsageError if the folder holds the state of a
        different run.

        `share` are the ranks if they divide the batches, and ALONE where each runs all of them.
        """
        self._folder = folder
        self._ranks, self._share = ranks, share
        self._wrote = monotonic()
        self._cost: float | None = None
        self._told = False
        ranks.led(lambda: self._open(json.loads(json.dumps(run))))

    def _open(self, run: dict[str, Any]) -> None:
        folder = self._folder
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            clear_unfinished(folder)
            _claim(folder, run)
            for leftover in folder.glob("*.partial"):
                shutil.rmtree(leftover)

    def finished(self) -> Scales | None:
        """The scales, if an earlier run finished."""
        result = self._folder / RESULT
        there = self._ranks.led(lambda: is_whole(result))
        return load_scales(result / SCALES) if there else None

    def restore(
        self,
        stream: Stream,
        statistics: Statistics,
        holds: Callable[[range], bool] | None = None,
    ) -> int:
        """Put the last state into stream and statistics; how many layers it has behind it.

        `holds` says whether what else was made of these layers is still there.
        """
        resumable = all(self._ranks.gathered(stream.resumable))
        state = self._ranks.led(self._last_whole) if resumable else None
        if state is None:
            return 0
        done = range(_layers_of(state))
        if holds is not None and not self._ranks.led(lambda: holds(done)):
            return 0
        for number, file in enumerate(self._batches(state, stream)):
            kept = read_tensors(read_header(file).tensors)
            stream.hidden_BSE[number] = kept["hidden"]
            if "quantized" in kept:
                stream.quantized = [*(stream.quantized or ()), kept["quantized"]]
        if self._share.leads:  # what all had seen, which must not count twice
            _restore_points(state, statistics)
        return _layers_of(state)

    def _batches(self, state: Path, stream: Stream) -> list[Path]:
        """The files of this rank's batches, which are numbered through all."""
        ranks = self._share
        numbers = (ranks.rank + ranks.world * index for index in range(len(stream.batches)))
        return [state / f"batch-{number:05d}.safetensors" for number in numbers]

    def _last_whole(self) -> Path | None:
        """The state after the most layers; damaged states cause a warning and are redone."""
        for state in sorted(self._folder.glob("layer-?????"), reverse=True):
            if is_whole(state):
                return state
            warnings.warn(
                f"{state}: differs from what was written; its layers will be redone",
                stacklevel=4,
            )
        return None

    def keep(self, done: int, stream: Stream, statistics: Statistics) -> None:
        """Write the state after `done` layers, unless the last one is too recent to be worth it."""
        began = monotonic()
        held = (*stream.hidden_BSE, *(stream.quantized or ()))
        mine = sum(hidden_BSE.nbytes for hidden_BSE in held)
        every = self._share.gathered((mine, stream.resumable))
        size = sum(nbytes for nbytes, _ in every)
        if not all(resumable for _, resumable in every):
            return
        if not self._ranks.led(lambda: self._is_worth(began, size)):
            return
        self._write(done, stream, statistics)
        self._wrote = monotonic()
        self._cost = self._wrote - began

    def finish(self, scales: Scales) -> None:
        """Write the result; the states have served."""
        self._ranks.led(lambda: self._finish(scales))

    def _finish(self, scales: Scales) -> None:
        with machine_errors(self._folder):
            save_scales(self._begin(RESULT) / SCALES, scales)
            self._end(RESULT)
            for state in self._folder.glob("layer-*"):
                shutil.rmtree(state)

    def _is_worth(self, began: float, size: int) -> bool:
        """Whether it is time for a state of so many bytes, and the disk has room."""
        cost = size / GUESSED_SPEED if self._cost is None else self._cost
        return SHARE_OF_TIME * (began - self._wrote) >= cost and self._has_room(size)

    def _has_room(self, size: int) -> bool:
        """Without room no state is kept, but the calibration continues; warns once."""
        free = shutil.disk_usage(self._folder).free
        if free < size and not self._told:
            self._told = True
            warnings.warn(
                f"{self._folder}: {free / 1e9:.1f} GB are free, but the calibration state takes "
                f"{size / 1e9:.1f} GB; a killed run cannot resume from here",
                stacklevel=3,
            )
        return free >= size

    def _write(self, done: int, stream: Stream, statistics: Statistics) -> None:
        name = f"layer-{done:05d}"
        scratch = self._ranks.led(lambda: self._begin(name))
        if self._share.world > 1 or self._ranks.leads:
            self._share.agreed(lambda: self._save_batches(scratch, stream))
        whole = merged(statistics, self._share)
        self._ranks.led(lambda: self._save_points(scratch, whole.points))
        self._ranks.led(lambda: self._end(name, in_place_of="layer-*"))

    def _save_batches(self, scratch: Path, stream: Stream) -> None:
        with machine_errors(self._folder):
            for number, file in enumerate(self._batches(scratch, stream)):
                held = {"hidden": stream.hidden_BSE[number]}
                if stream.quantized is not None:
                    held["quantized"] = stream.quantized[number]
                _save(file, held, {})

    def _save_points(self, scratch: Path, points: Mapping[str, Stats]) -> None:
        # copies: Linears that are fed the same share one statistic, which safetensors refuses
        flat = {f"{p}|{key}": t.clone() for p, stats in points.items() for key, t in stats.items()}
        with machine_errors(self._folder):
            _save(scratch / STATISTICS, flat, {"order": json.dumps(list(points))})

    def _begin(self, name: str) -> Path:
        """The folder that is to appear under this name."""
        scratch = self._folder / f"{name}.partial"
        with machine_errors(scratch):
            scratch.mkdir()
        return scratch

    def _end(self, name: str, in_place_of: str = "") -> None:
        """It appears whole, sealed, on the disk; what was there before is replaced."""
        scratch, folder = self._folder / f"{name}.partial", self._folder / name
        with machine_errors(folder):
            seal(scratch)
            if folder.exists():  # damaged, or it would not be made again
                shutil.rmtree(folder)
            scratch.rename(folder)
            sync_folder(self._folder)
            for old in self._folder.glob(in_place_of) if in_place_of else ():
                if old != folder:
                    shutil.rmtree(old)


def _restore_points(state: Path, statistics: Statistics) -> None:
    header = read_header(state / STATISTICS)
    points: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(header.tensors).items():
        point, _, key = name.rpartition("|")
        points.setdefault(point, {})[key] = tensor
    statistics.points = {point: points[point] for point in json.loads(header.metadata["order"])}


def _layers_of(state: Path) -> int:
    """How many layers a state has behind it."""
    return int(state.name.removeprefix("layer-"))


def holds_work(folder: Path) -> bool:
    """Whether a run has left a state to resume from."""
    return (folder / RESULT).exists() or any(folder.glob("layer-?????"))


def _claim(folder: Path, run: Mapping[str, Any]) -> None:
    file = folder / RUN
    if not file.exists() or not holds_work(folder):
        write_whole(file, json_bytes(run, sort_keys=True))
        return
    try:
        found = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise MachineError(f"{file}: damaged ({error}); use --restart to start over") from error
    for key in sorted(found.keys() | run.keys()):
        if found.get(key) != run.get(key):
            raise UsageError(
                f"{folder}: holds a different calibration: {key} was {found.get(key)!r}, is "
                f"{run.get(key)!r}; rerun the same command to resume, or use --restart"
            )


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
