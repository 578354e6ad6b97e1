"""State to resume a killed calibration: the statistics so far, and the hidden states.

    FOLDER/run.json        what the scales depend on; other runs are refused
    FOLDER/layer-00012/    the state after 12 layers: one file per batch, and the statistics
    FOLDER/result/         the scales, when all layers are done

A state is written beside the last one, synced, sealed with digests of its files and renamed; only
then is the old one removed. A state that does not match its seal is ignored. Hidden states can be
large, so a state is written only if that takes at most a tenth of the time since the last one, and
if the disk has room.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ckptq.calibrate.observers import Stats
from ckptq.calibrate.scales import Scales, load_scales, save_scales
from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.read import read_tensors
from ckptq.checkpoint.seal import is_whole, seal
from ckptq.errors import MachineError, UsageError
from ckptq.files import clear_unfinished, json_bytes, machine_errors, sync_folder, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.calibrate.statistics import Statistics
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

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Start a run, or resume the same one. UsageError if the folder holds the state of a
        different run."""
        self._folder = folder
        self._wrote = monotonic()
        self._cost: float | None = None
        self._told = False
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            clear_unfinished(folder)
            _claim(folder, json.loads(json.dumps(run)))
            for leftover in folder.glob("*.partial"):
                shutil.rmtree(leftover)

    def finished(self) -> Scales | None:
        """The scales, if an earlier run finished."""
        result = self._folder / RESULT
        return load_scales(result / SCALES) if is_whole(result) else None

    def restore(
        self,
        stream: Stream,
        statistics: Statistics,
        holds: Callable[[range], bool] | None = None,
    ) -> int:
        """Put the last state into stream and statistics; how many layers it has behind it.

        `holds` says whether what else was made of these layers is still there.
        """
        state = self._last_whole() if stream.resumable else None
        if state is None or (holds is not None and not holds(range(_layers_of(state)))):
            return 0
        for number in range(len(stream.batches)):
            file = state / _batch(number)
            stream.hidden_BSE[number] = read_tensors(read_header(file).tensors)["hidden"]
        header = read_header(state / STATISTICS)
        points: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(header.tensors).items():
            point, _, key = name.rpartition("|")
            points.setdefault(point, {})[key] = tensor
        statistics.points = {point: points[point] for point in json.loads(header.metadata["order"])}
        return _layers_of(state)

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
            self._put(RESULT, lambda folder: save_scales(folder / SCALES, scales))
            for state in self._folder.glob("layer-*"):
                shutil.rmtree(state)

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

    def _write(self, done: int, stream: Stream, points: Mapping[str, Stats]) -> None:
        former = list(self._folder.glob("layer-*"))
        # copies: Linears that are fed the same share one statistic, which safetensors refuses
        flat = {f"{p}|{key}": t.clone() for p, stats in points.items() for key, t in stats.items()}

        def fill(folder: Path) -> None:
            for number, hidden_BSE in enumerate(stream.hidden_BSE):
                _save(folder / _batch(number), {"hidden": hidden_BSE}, {})
            _save(folder / STATISTICS, flat, {"order": json.dumps(list(points))})

        state = self._put(f"layer-{done:05d}", fill)
        for old in former:
            if old != state:
                shutil.rmtree(old)

    def _put(self, name: str, fill: Callable[[Path], None]) -> Path:
        """A folder that appears whole, sealed, on the disk; what was there before is replaced."""
        scratch, folder = self._folder / f"{name}.partial", self._folder / name
        scratch.mkdir()
        fill(scratch)
        seal(scratch)
        if folder.exists():  # damaged, or it would not be made again
            shutil.rmtree(folder)
        scratch.rename(folder)
        sync_folder(self._folder)
        return folder


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


def _batch(number: int) -> str:
    return f"batch-{number:05d}.safetensors"


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
