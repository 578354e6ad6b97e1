"""Tensors compared to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptq.spec import spec_of

Tensors = dict[str, Tensor]


def tensors_in(folder: Path) -> Tensors:
    """All tensors of a folder, as the safetensors library reads them."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN and -0.0 are told apart too."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in dtype, shape and every bit."""
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or spec_of(ours[name]) != spec_of(theirs[name])
        or not torch.equal(raw(ours[name]), raw(theirs[name]))
    )
