"""Take the factors of two out of a trained example Llama again, so that its heads are alike.

    python examples/even_heads.py MODEL OUT

OUT computes the same to the last bit (the script fails where it does not) and shows what a scheme
costs a model whose heads are tame.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import outliers
import task
from attention_fp8 import head_sizes

K_LOG2, V_LOG2 = 2, 0
"""log2 of the largest magnitude of every head's keys and values, as near as a power of two goes."""


def even_out(model: transformers.PreTrainedModel, ids_BT: torch.Tensor) -> None:
    """Bring every head of K and V to one size. The model must have no norm between k_proj and K."""
    sizes = head_sizes(model, ids_BT)
    for i, attention in enumerate(outliers.attention_layers(model)):
        if outliers.has_weighted_norm(attention) or outliers.has_plain_norm(attention):
            raise SystemExit("a norm on keys undoes factors in k_proj: give a Llama")
        values, keys = sizes[i].v.log2(), sizes[i].k.log2()
        outliers.scale_value_heads(attention, torch.exp2((V_LOG2 - values).round()))
        outliers.scale_key_heads(attention, torch.exp2((K_LOG2 - keys).round()))


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids_BT = task.draw_samples(128, seed=0)
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
        even_out(model, ids_BT)
        after = model(input_ids=ids_BT).logits
    if not torch.equal(before, after):
        raise SystemExit(f"{source}: computes something else with even heads")
    weights = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=weights)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
