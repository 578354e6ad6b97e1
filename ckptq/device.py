"""`--device`: where heavy arithmetic runs, by one rule for every command.

Quantization and the forward passes of calibration and evaluation run on the named device, by
default on the GPU if there is one. Weights get the same bytes on every device; what a
model computes (scales, losses) may differ between devices in the last bits. Imports no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckptq.errors import MachineError, UsageError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None) -> torch.device:
    """The device of that name; of None, the GPU where there is one, else the CPU.

    Under torchrun each process uses the GPU of its local rank for "cuda". UsageError for an
    unsupported device, MachineError for a GPU that is not available."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise MachineError(f"--device {name}: no such GPU on this machine")
    if device.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs")
    return device
