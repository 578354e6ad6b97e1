"""Which caches does vLLM keep in 16 bits, with which scales? VLLM_PYTHON skipped_caches.py WORKER
CKPT LAYER ...

LAYERs are those of --kv-cache-dtype-skip-layers. Prints JSON: attention layer -> the dtype of its
cache, and k's scales once the checkpoint is loaded. WORKER as for load.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from load import script, tensors_of


def main(worker_file: str, checkpoint: str, *layers: str) -> None:
    from vllm.config import CacheConfig

    worker, out = script(Path(worker_file)), os.dup(1)
    os.dup2(2, 1)  # vLLM prints where it likes
    worker.LARGE = sys.maxsize  # tensors have data
    limits, building = (worker.script(worker.EXTRACT / f"{n}.py") for n in ("limits", "build"))
    worker.stand_in_for_kernels()
    limits.lift_limits_of_this_machine()
    building.start_process_groups()
    model = worker.build(checkpoint, cache_config=CacheConfig(kv_cache_dtype_skip_layers=layers))
    with torch.no_grad():
        model.load_weights(tensors_of(checkpoint))
    caches = {n: m for n, m in model.named_modules() if type(m).__name__ == "Attention"}
    for layer in caches.values():
        layer.quant_method.process_weights_after_loading(layer)
    found = {n: [str(m.kv_cache_torch_dtype), m._k_scale.tolist()] for n, m in caches.items()}
    with os.fdopen(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
