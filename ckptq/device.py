"""The device that a user names, checked before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptq.errors import MachineError, UsageError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None) -> torch.device:
    """The device of that name; of None, the GPU where there is one.

    UsageError for an unsupported device, MachineError for a GPU that is not available.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name}: wanted cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MachineError(f"--device {name}: there is no such GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device
