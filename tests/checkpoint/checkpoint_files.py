"""Checkpoints made by hand, byte by byte where they have to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with this header, whatever it says; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def write_sharded(folder: Path, shards: list[dict[str, Tensor]], **index: Any) -> Path:
    """A checkpoint folder whose index is right, unless `index` says something else."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
