"""What vLLM would load: a script for vLLM's own environment, where ckptq is not installed.

    VLLM_PYTHON vllm_worker.py < REQUEST > ANSWER

REQUEST, JSON: {"path": folder, "tensors": [[name, dtype as torch calls it, [shape]], ...]} in the
order in which vLLM would read them. ANSWER, JSON, see `answer`.

vLLM builds its model class and loads names and shapes. Large tensors are on the meta device, so
that almost nothing is allocated; small ones are real, because loaders read their values. Every
write into a parameter is recorded: vLLM's own check for unfilled parameters is off for quantized
models, and detects neither a missing half of a merged parameter nor a missing expert."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

# a script's own folder comes first on the path, and modules there are named as libraries are
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", VLLM_NO_USAGE_STATS="1")

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

LARGE = 1 << 20
"""Bytes from which on a tensor has no data."""

EXTRACT = Path(__file__).parents[2] / "engines" / "extract_vllm"
FACTORIES = ("aten::empty", "aten::zeros", "aten::ones", "aten::full")
WRITES = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::index_put_", "aten::index_copy_")
LONGEST = 600


def main() -> None:
    request = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM and the libraries below it print where they like
    with os.fdopen(out, "w") as file:
        json.dump(answer(request["path"], request["tensors"]), file)


def answer(path: str, tensors: list[list[Any]]) -> dict[str, Any]:
    """version; error and the tensor at which it occurred, or None; parameters; whether kernels were
    chosen as in serving."""
    import vllm
    from vllm.platforms import current_platform

    found: dict[str, Any] = {
        "version": vllm.__version__.split("+")[0], "error": None, "at": None, "parameters": [],
        "kernels": not current_platform.is_cpu(),
    }  # fmt: skip
    feed = Feed(tensors)
    limits, building = (script(EXTRACT / f"{name}.py") for name in ("limits", "build"))
    try:
        # whole, before parts of it are replaced
        import vllm.model_executor.model_loader.utils

        if not found["kernels"]:
            stand_in_for_kernels()
            limits.lift_limits_of_this_machine()
        building.register_if_unknown(json.loads(Path(path, "config.json").read_text()))
        building.start_process_groups()
        model: Any = build(path)
        writes = Writes(model)
        with writes, torch.no_grad():
            model.load_weights(iter(feed))
        found["parameters"] = writes.parameters()
    except Exception as error:  # vLLM raises many kinds
        found["error"] = f"{type(error).__name__}: {str(error)[:LONGEST]}"
        found["at"] = feed.last
    return found


def script(path: Path) -> Any:
    """A script of ckptq that runs in vLLM's environment, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Feed:
    """The checkpoint's tensors, without data, in order."""

    def __init__(self, tensors: list[list[Any]]) -> None:
        self.tensors = tensors
        self.last: str | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in self.tensors:
            self.last = name
            yield name, stand_in(getattr(torch, dtype), shape)
        self.last = None


def stand_in(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """On the meta device, or ones where it is small."""
    if prod(shape) * dtype.itemsize >= LARGE:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.ones(shape, dtype=torch.float32).to(dtype)


# --- building -------------------------------------------------------------------------------


def build(path: str, **more: Any) -> torch.nn.Module:
    """vLLM's own class for the checkpoint, as it is configured there; `more` of `VllmConfig`."""
    from vllm.config import (
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    model = ModelConfig(
        model=path, tokenizer=path, skip_tokenizer_init=True, dtype="auto", enforce_eager=True,
        max_model_len=128,
    )  # fmt: skip
    device, load = DeviceConfig("cpu"), LoadConfig(device="cpu")
    config = VllmConfig(model_config=model, device_config=device, load_config=load, **more)
    with set_current_vllm_config(config):
        torch.set_default_dtype(model.dtype)
        with Hollow():
            return initialize_model(config)


class Hollow(TorchDispatchMode):
    """Large tensors are made on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in FACTORIES and nbytes(args, kwargs) >= LARGE:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


def nbytes(args: Any, kwargs: Any) -> int:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return prod(args[0]) * dtype.itemsize


# --- watching -------------------------------------------------------------------------------


class Writes(TorchDispatchMode):
    """Which elements of which parameter were written, and from which dtypes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.places = dict(model.named_parameters(remove_duplicate=False))
        self.storages = {name: storage_of(place) for name, place in self.places.items()}
        known = self.storages.values()
        self.regions: dict[int, dict[Any, int]] = {storage: {} for storage in known}
        self.sources: dict[int, set[str]] = {storage: set() for storage in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WRITES:
            self.note(args[0], args[1] if name == "aten::copy_" else None)
            if name == "aten::copy_" and "meta" in (args[0].device.type, args[1].device.type):
                args[1].expand(args[0].shape)  # torch's own complaint where the shapes do not fit
                return args[0]
        return func(*args, **(kwargs or {}))

    def note(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        regions = self.regions.get(storage_of(target))
        if regions is None:
            return
        region = (target.storage_offset(), tuple(target.shape), tuple(target.stride()))
        regions[region] = target.numel()
        if source is not None:
            self.sources[storage_of(target)].add(str(source.dtype).removeprefix("torch."))

    def parameters(self) -> list[dict[str, Any]]:
        """Each parameter with its size, the number of elements written, the experts without any,
        and the dtypes written."""
        return [self.parameter(name, place) for name, place in self.places.items()]

    def parameter(self, name: str, place: torch.nn.Parameter) -> dict[str, Any]:
        storage = self.storages[name]
        regions = self.regions[storage]
        now = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
        replaced = now is None or storage_of(now) != storage
        filled = place.numel() if replaced else min(sum(regions.values()), place.numel())
        partial = 0 < filled < place.numel()
        return {
            "name": name,
            "dtype": str(place.dtype).removeprefix("torch."),
            "shape": list(place.shape),
            "filled": filled,
            "rows": bare_rows(place, regions) if partial else [],
            "sources": sorted(self.sources[storage]),
        }


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bare_rows(place: torch.Tensor, regions: dict[Any, int]) -> list[int]:
    """Indices of the first axis, experts for one, into which nothing was written."""
    step = place.stride(0) if place.ndim else 1
    touched: set[int] = set()
    for offset, shape, strides in regions:
        rows = shape[0] if shape and strides[0] == step and len(shape) == place.ndim else 1
        first = (offset - place.storage_offset()) // max(step, 1)
        touched.update(range(first, first + rows))
    return [row for row in range(place.shape[0]) if row not in touched] if place.ndim > 1 else []


# --- kernels --------------------------------------------------------------------------------


def stand_in_for_kernels() -> None:
    """Nothing is computed here: parameters are created even if this machine has no kernel for a
    format."""
    import pkgutil

    import vllm.model_executor.layers.quantization.compressed_tensors as formats

    for package in ("schemes", "compressed_tensors_moe"):
        folder = importlib.import_module(f"{formats.__name__}.{package}")
        for module in pkgutil.iter_modules(folder.__path__):
            with contextlib.suppress(ImportError):
                chosen = importlib.import_module(f"{folder.__name__}.{module.name}")
                for name in [n for n in vars(chosen) if chooses(n)]:
                    instead = experts_stand_in if name.startswith("select_") else kernel_stand_in
                    setattr(chosen, name, or_instead(getattr(chosen, name), instead))


def chooses(name: str) -> bool:
    linear = name.startswith(("init_", "choose_")) and name.endswith("_kernel")
    return linear or (name.startswith("select_") and name.endswith("_moe_backend"))


def or_instead(function: Any, instead: Any) -> Any:
    def choose(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, NotImplementedError, AttributeError):
            return instead(*args, **kwargs)

    return choose


def kernel_stand_in(*args: Any, **kwargs: Any) -> Any:
    """What is taken for a kernel, or for its class, whose name vLLM logs."""
    from unittest.mock import MagicMock

    return MagicMock(__name__="StandIn")


def experts_stand_in(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """No backend, and the class of the experts that are not quantized."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
        select_unquantized_moe_backend,
    )

    moe = kwargs.get("config") or kwargs.get("moe_config") or args[0]
    return None, select_unquantized_moe_backend(moe_config=moe)[1]


if __name__ == "__main__":
    main()
