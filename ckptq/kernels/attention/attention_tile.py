"""How a launch of `attention` is cut, by head size, dtype and the shared memory of a GPU."""

from dataclasses import dataclass

import torch

from ckptq.kernels.gpu import shared_memory


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut: queries and keys of a tile, warps of a program, pipeline depth."""

    rows: int
    columns: int
    warps: int
    stages: int


def default_tile(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tuned on the H200; smaller where a program has less shared memory than there."""
    if dtype == torch.float32:
        return Tile(64, 32, 4, 1) if head_dim <= 128 else Tile(32, 16, 4, 1)
    room = shared_memory(device)
    if room < 120 << 10:
        return Tile(64, 32, 4, 2) if head_dim <= 128 else Tile(64, 16, 4, 2)
    if head_dim > 128:
        return Tile(128, 64 if room > 200 << 10 else 32, 8, 2)
    return Tile(64, 64, 4, 3)
