"""Files beside the weights: which belong to a checkpoint, and which are copies of its weights.

Suffixes do not show it. sentence-transformers keeps a Dense layer in `2_Dense/model.safetensors`,
speech models a dictionary of speakers in a `.pt`, multimodal ones adapters in folders: without them
a model computes something else. What is left out is reported with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckptq.checkpoint.header import read_header
from ckptq.errors import SourceError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_FORMATS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
INDEX_SUFFIX = ".index.json"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = "adapter_model*.safetensors"

TRAINING = "they are the state of a training run"

AGAIN: Mapping[str, tuple[str, ...]] = {
    "they hold the same weights as a pickle": ("pytorch_model*.bin", "model*.bin"),
    "they hold the same weights in the original authors' layout": (
        *("consolidated*.safetensors", "consolidated*.pth", "consolidated*.pt"),
        *("original/*", "metal/*"),
    ),
    "they hold the same weights in another format": (
        *("*.gguf", "*/*.gguf", "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "*.tflite"),
        *("onnx/*", "model*.onnx", "decoder*_model*.onnx", "openvino/*", "openvino_model*.bin"),
        *("coreml/*",),
    ),
    TRAINING: (
        *("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
        *("training_args.bin", "checkpoint-*/*", "global_step*/*"),
    ),
}
"""Reason -> patterns of paths in a checkpoint; without a slash, of files at its top only."""

MODELOPT = "hf_quant_config.json"

DECLARATIONS = (MODELOPT, "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AutoAWQ say how weights are quantized, beside config.json."""

DECLARED = "config.json says how the output is quantized"

SHARDS = ("model.safetensors", "model-*-of-*.safetensors")
"""What the shards of an output are called."""

THE_SAME_TENSORS = "their tensors are in the model's own files"
IN_PART = (
    "some of their tensors are in the model's own files too, and engines differ in which count"
)

TO_FOLDERS = "they are links to folders, and only links to files are followed"
BROKEN = "they are links to files that do not exist"

SHOWN = 4
"""The most files that a line names."""


@dataclass(frozen=True, slots=True)
class Beside:
    """All files of a folder that hold none of the model's tensors, by their relative paths."""

    carried: tuple[Path, ...]
    left: Mapping[Path, str]
    """What is left out, with the reason."""


def sort_files(folder: Path, own: Collection[str], tensors: Collection[str]) -> Beside:
    """Sort what lies beside the files `own`, which hold `tensors`; hidden files excluded."""
    carried, left = [], {}
    found = (p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    for path in sorted(p.relative_to(folder) for p in found):
        if any(part.startswith(".") for part in path.parts) or str(path) in own:
            continue
        reason = _why_left(folder, path, tensors) or _why_no_file(folder / path)
        if reason is None:
            carried.append(path)
        else:
            left[path] = reason
    return Beside(tuple(carried), left)


def told_of(folder: Path, beside: Beside) -> Iterator[str]:
    """A line per reason why files are not carried; indexes of such weights are not mentioned."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in beside.left.items():
        if not path.name.endswith(INDEX_SUFFIX):
            by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        size = sum((folder / path).stat().st_size for path in paths if (folder / path).is_file())
        names = ", ".join(map(str, paths[:SHOWN])) + (", ..." if len(paths) > SHOWN else "")
        yield f"not carried: {names} ({size:,} bytes), because {reason}"


def shards_among(files: Sequence[Path]) -> list[Path]:
    """Of the safetensors files at the top, those named like the model's; all if none is."""
    found = [f for f in files if not is_adapter(f.name) and _matched(Path(f.name)) is None]
    return found or list(files)


def is_adapter(name: str) -> bool:
    """Whether the name is that of a PEFT adapter's file at the top."""
    return fnmatchcase(name, ADAPTERS)


def refuse_adapter(folder: Path, names: Collection[str]) -> None:
    """SourceError for a folder that holds an adapter and no model."""
    config = folder / ADAPTER_CONFIG
    if not config.is_file():
        return
    weights = [
        name
        for name in names
        if name.endswith((".safetensors", *PICKLES)) and _matched(Path(name)) != TRAINING
    ]
    if all(name.startswith("adapter_model") for name in weights):
        raise SourceError(f"{folder}: is a PEFT adapter ({ADAPTER_CONFIG}){_MERGE}")


def refuse_adapter_tensors(folder: Path, tensors: Collection[str]) -> None:
    """SourceError if a checkpoint holds only the matrices of an adapter."""
    first = next(iter(tensors), "")
    if tensors and all(".lora_" in name or ".ia3_" in name for name in tensors):
        raise SourceError(f"{folder}: is a PEFT adapter ({first}, ...){_MERGE}")


_MERGE = (
    "; merge it into its base first (peft: merge_and_unload(), then save_pretrained), or give the "
    "base itself"
)


def _why_no_file(path: Path) -> str | None:
    if path.is_file():
        return None
    return TO_FOLDERS if path.is_dir() else BROKEN


def _why_left(folder: Path, path: Path, tensors: Collection[str]) -> str | None:
    at_top = len(path.parts) == 1
    if at_top and path.name in DECLARATIONS:
        return DECLARED
    if path.name.endswith(INDEX_SUFFIX):
        stem = path.name.removesuffix(INDEX_SUFFIX)
        return "it is an index for other weights" if at_top else _matched(path.with_name(stem))
    if path.suffix not in WEIGHT_FORMATS:
        return None
    if (reason := _matched(path)) is not None:
        return reason
    if at_top and any(fnmatchcase(path.name, pattern) for pattern in SHARDS):
        return "no index names them, although they are named like shards"
    if at_top and path.suffix == ".safetensors":
        held = tensors_in(folder / path)
        if held <= set(tensors):
            return THE_SAME_TENSORS if held else None
        return IN_PART if not held.isdisjoint(tensors) else None
    return None


def _matched(path: Path) -> str | None:
    text = path.as_posix()
    for reason, patterns in AGAIN.items():
        for pattern in patterns:
            if ("/" in pattern) == ("/" in text) and fnmatchcase(text, pattern):
                return reason
    return None


def tensors_in(file: Path) -> frozenset[str]:
    """Names in a safetensors file; none of one that cannot be read."""
    try:
        return frozenset(read_header(file).tensors)
    except SourceError:
        return frozenset()
