"""With which scales do vLLM's latent attentions cache? VLLM_PYTHON latent_scales.py WORKER CKPT

Prints JSON: the scale of each layer once the checkpoint is loaded, and the parameters that a scale
of the checkpoint could have filled. WORKER as for load.py.
"""

from __future__ import annotations

import sys

import torch
from load import answer


def scales(model: torch.nn.Module) -> dict[str, object]:
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "MLAAttention"}
    return {
        "cached with": {name: float(layer._k_scale) for name, layer in layers.items()},
        "parameters": [n for n, _ in model.named_parameters() if n.endswith("k_scale")],
    }


if __name__ == "__main__":
    answer(scales, sys.argv[2])
