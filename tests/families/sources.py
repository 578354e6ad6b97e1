"""Tiny sources of many families: `save("qwen3_moe", folder)`, or from a shell

    PYTHONPATH=tests python -m families.sources FOLDER [FAMILY ...]

Random weights in bf16, two to four layers, as transformers saves them; names are the hub's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from families.handmade import HANDMADE, tensors_of
from families.hub import (
    FP8_BLOCK,
    FP8_CONFIG,
    HUB_NAMES,
    VARIANTS,
    Change,
    in_fp8_blocks,
    renamed,
)
from families.text import EXTRA, TEXT
from families.vision import VISION, VISION_EXTRA

FAMILIES = (*TEXT, *VISION, *VARIANTS, *HANDMADE)


def save(family: str, folder: Path) -> Path:
    """Write one family's source into `folder/family`, unless it is there. KeyError if unknown."""
    out = folder / family
    if not (out / "config.json").exists():
        if family in VARIANTS:
            base, change, extra = VARIANTS[family]
            save_variant(save(base, folder), out, change, extra)
        elif family in FP8_BLOCK:
            source = save(FP8_BLOCK[family], folder)
            save_variant(source, out, in_fp8_blocks, {"quantization_config": FP8_CONFIG})
        elif family in HANDMADE:
            config, shapes = HANDMADE[family]
            write(out, tensors_of(shapes), config)
        else:
            save_model(family, out)
    return out


def save_model(family: str, out: Path) -> None:
    """A family that transformers has."""
    model_type, arguments = TEXT[family] if family in TEXT else VISION[family]
    config = transformers.AutoConfig.for_model(model_type, **arguments)
    make(config, "CausalLM" if family in TEXT else "ImageTextToText").save_pretrained(out)
    if family in HUB_NAMES:
        tensors = renamed(load_file(out / "model.safetensors"), HUB_NAMES[family])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((out / "config.json").read_text()) | EXTRA.get(family, {})
    for part, extra in VISION_EXTRA.get(family, {}).items():
        written[part] |= extra
    (out / "config.json").write_text(json.dumps(written, indent=2))


def make(config: transformers.PreTrainedConfig, kind: str) -> transformers.PreTrainedModel:
    """A model of that config, its matrices drawn with a spread that shows in the logits."""
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(0, 0.05)
    return model


def save_variant(source: Path, out: Path, change: Change, extra: dict[str, Any]) -> Path:
    """A family made from another one's tensors, and its config.json with something more."""
    torch.manual_seed(0)
    tensors = change(load_file(source / "model.safetensors"))
    write(out, tensors, json.loads((source / "config.json").read_text()) | extra)
    return out


def write(out: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    for name in sys.argv[2:] or FAMILIES:
        print(save(name, Path(sys.argv[1])))
