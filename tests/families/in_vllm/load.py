"""Does vLLM's own class load a checkpoint, all of it? VLLM_PYTHON load.py WORKER CHECKPOINT

The class is built as it would be to serve, every parameter is filled with bytes that no checkpoint
holds, and the real tensors go through its own `load_weights`: what still holds those bytes was
filled by no tensor. Prints JSON, {"error": text or null, "unfilled": {parameter: [elements,
size]}}. WORKER is ckptq/verify/engine/vllm_worker.py, of which only the stand-ins for kernels that
this machine lacks are taken, and how a class is built.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EMPTY = 0xFF
"""NaN in every floating dtype; in integers a row of nothing but -1."""


def main() -> None:
    worker, checkpoint = Path(sys.argv[1]), sys.argv[2]
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM prints where it likes
    with os.fdopen(out, "w") as file:
        json.dump(load(script(worker), checkpoint), file)


def load(worker: Any, checkpoint: str) -> dict[str, Any]:
    worker.LARGE = sys.maxsize  # tensors have data
    limits, building = (worker.script(worker.EXTRACT / f"{n}.py") for n in ("limits", "build"))
    try:
        worker.stand_in_for_kernels()
        limits.lift_limits_of_this_machine()
        building.register_if_unknown(json.loads(Path(checkpoint, "config.json").read_text()))
        building.start_process_groups()
        model = worker.build(checkpoint)
        for parameter in model.parameters():
            parameter.data = torch.empty_like(parameter.data)
            bytes_of(parameter.data).fill_(EMPTY)
        with torch.no_grad():
            model.load_weights(tensors_of(checkpoint))
    except Exception as error:  # vLLM raises many kinds
        return {"error": f"{type(error).__name__}: {str(error)[:400]}", "unfilled": {}}
    unfilled = {name: empty(p.data) for name, p in model.named_parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {"error": None, "unfilled": {n: [c, sizes[n]] for n, c in unfilled.items() if c}}


def answer(
    about: Callable[[torch.nn.Module], object],
    checkpoint: str,
    more: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Print JSON about vLLM's own class with the checkpoint in it; `more` of `VllmConfig`."""
    worker, out = script(Path(sys.argv[1])), os.dup(1)
    os.dup2(2, 1)  # vLLM prints where it likes
    worker.LARGE = sys.maxsize  # tensors have data
    limits, building = (worker.script(worker.EXTRACT / f"{n}.py") for n in ("limits", "build"))
    worker.stand_in_for_kernels()
    limits.lift_limits_of_this_machine()
    building.start_process_groups()
    model = worker.build(checkpoint, **more())
    with torch.no_grad():
        model.load_weights(tensors_of(checkpoint))
    with os.fdopen(out, "w") as file:
        json.dump(about(model), file)


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors_of(checkpoint: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(glob.glob(f"{checkpoint}/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, file.get_tensor(name)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def empty(tensor: torch.Tensor) -> int:
    """Elements that no tensor has filled."""
    if not tensor.numel():
        return 0
    if tensor.dtype.is_floating_point:
        return int(tensor.to(torch.float32).isnan().sum())
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    bare = torch.eq(rows.view(torch.uint8), EMPTY).all(dim=1)
    return int(bare.sum()) * rows.shape[1]


if __name__ == "__main__":
    main()
