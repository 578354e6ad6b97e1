"""What is finished, layer by layer, so that a killed run goes on, and the conversion can copy it.

FOLDER/layer-00012/made.safetensors    the stored tensors of the layer's quantized Linears
FOLDER/layer-00012/told.json           what is to be told of them
FOLDER/layer-00012/seal.json           digests of both: without it the layer is redone
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.header import StoredTensor, read_header
from ckptq.checkpoint.seal import is_whole, seal
from ckptq.files import json_bytes, machine_errors, sync_folder, write_whole

if TYPE_CHECKING:
    from torch import Tensor

MADE, TOLD = "made.safetensors", "told.json"


class Kept:
    """The finished layers of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def holds(self, layers: range) -> bool:
        """Whether these layers are there, as they were written."""
        return all(is_whole(self._of(index)) for index in layers)

    def keep(self, index: int, made: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Write a layer; it appears whole, on the disk, in place of an older one."""
        from safetensors.torch import save_file

        final = self._of(index)
        scratch = final.with_suffix(".partial")
        with machine_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in (scratch, final):
                if old.exists():
                    shutil.rmtree(old)
            scratch.mkdir()
            save_file({name: made[name] for name in sorted(made)}, scratch / MADE)
            write_whole(scratch / TOLD, json_bytes(told, sort_keys=True))
            seal(scratch)
            scratch.rename(final)
            sync_folder(self._folder)

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor that was made, by its name in the output."""
        headers = (read_header(folder / MADE) for folder in self._layers())
        return {name: tensor for header in headers for name, tensor in header.tensors.items()}

    def told(self) -> list[dict[str, Any]]:
        """Of each layer in turn."""
        return [json.loads((folder / TOLD).read_bytes()) for folder in self._layers()]

    def _layers(self) -> list[Path]:
        return sorted(self._folder.glob("layer-?????"))

    def _of(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}"


def kept_in(folder: Path) -> Kept:
    """What a run keeps in the folder that it resumes from."""
    return Kept(folder / "gptq")
