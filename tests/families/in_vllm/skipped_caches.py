"""Which caches does vLLM keep in 16 bits, with which scales? VLLM_PYTHON skipped_caches.py WORKER
CKPT LAYER ...

LAYERs are those of --kv-cache-dtype-skip-layers. Prints JSON: attention layer -> the dtype of its
cache, and k's scales once the checkpoint is loaded. WORKER as for load.py.
"""

from __future__ import annotations

import sys

import torch
from load import answer


def caches(model: torch.nn.Module) -> dict[str, list[object]]:
    found = {n: m for n, m in model.named_modules() if type(m).__name__ == "Attention"}
    for layer in found.values():
        layer.quant_method.process_weights_after_loading(layer)
    return {n: [str(m.kv_cache_torch_dtype), m._k_scale.tolist()] for n, m in found.items()}


def skipping() -> dict[str, object]:
    from vllm.config import CacheConfig

    return {"cache_config": CacheConfig(kv_cache_dtype_skip_layers=sys.argv[3:])}


if __name__ == "__main__":
    answer(caches, sys.argv[2], skipping)
