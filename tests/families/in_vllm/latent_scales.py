"""With which scales do vLLM's latent attentions cache? VLLM_PYTHON latent_scales.py WORKER CKPT

Prints JSON: the scale of each layer once the checkpoint is loaded, and the parameters that a scale
of the checkpoint could have filled. WORKER as for load.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from load import script, tensors_of


def main(worker_file: str, checkpoint: str) -> None:
    worker, out = script(Path(worker_file)), os.dup(1)
    os.dup2(2, 1)  # vLLM prints where it likes
    worker.LARGE = sys.maxsize  # tensors have data
    limits, building = (worker.script(worker.EXTRACT / f"{n}.py") for n in ("limits", "build"))
    worker.stand_in_for_kernels()
    limits.lift_limits_of_this_machine()
    building.start_process_groups()
    model = worker.build(checkpoint)
    with torch.no_grad():
        model.load_weights(tensors_of(checkpoint))
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "MLAAttention"}
    found = {
        "cached with": {name: float(layer._k_scale) for name, layer in layers.items()},
        "parameters": [n for n, _ in model.named_parameters() if n.endswith("k_scale")],
    }
    with os.fdopen(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
