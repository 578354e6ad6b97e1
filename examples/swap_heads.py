"""The control: a copy of a checkpoint in which each layer's k and v scales sit on the wrong heads.

    python examples/swap_heads.py CHECKPOINT OUT

Shapes, dtypes and names are right, every scale is a plausible one, and every engine loads it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def swap_heads(source: Path, out: Path) -> int:
    """Copy `source` to `out` with per-head k/v scales in reverse order; returns how many."""
    shutil.copytree(source, out)
    swapped = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            metadata = shard.metadata()
        for name, tensor in tensors.items():
            if name.endswith((".k_scale", ".v_scale")) and tensor.numel() > 1:
                tensors[name] = tensor.flip(0).contiguous()
                swapped += 1
        save_file(tensors, file, metadata=metadata)
    return swapped


if __name__ == "__main__":
    count = swap_heads(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {count} scale tensors swapped between heads")
