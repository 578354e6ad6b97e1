"""Which layers two other tools would keep in 8 bits: their own search, on the same text.

    python benchmarks/peer_plans.py auto-round|modelopt MODEL --data TEXT --bits 5 -o plan.json

Run it in an environment with that tool (`pip install auto-round`, `pip install nvidia-modelopt`).
Candidates are INT4 in groups of 32 and dynamic FP8 per row: both tools search those on a CPU
(ModelOpt's NVFP4 needs a GPU). The plan maps each Linear to the name of ckptq's scheme;
`bench_bits.py --plan` measures it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

INT4, FP8, PLAIN = "w4a16-g32", "fp8-dynamic", "bf16"


def auto_round(asked: argparse.Namespace) -> dict[str, str]:
    """AutoScheme: gradients of the loss times the change of weights and inputs, then dynamic
    programming over Linears."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    int4 = QuantizationScheme(bits=4, group_size=32, sym=True, data_type="int", act_bits=16)
    fp8 = QuantizationScheme(
        bits=8, group_size=-1, sym=True, data_type="fp",
        act_bits=8, act_group_size=-1, act_sym=True, act_data_type="fp", act_dynamic=True,
    )  # fmt: skip
    scheme = AutoScheme(
        avg_bits=asked.bits, options=[int4, fp8], nsamples=asked.samples, seqlen=asked.seq_len,
        batch_size=1, dataset=asked.data, shared_layers=shared_layers(asked.model),
        low_gpu_mem_usage=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    rounder = AutoRound(
        asked.model, scheme=scheme, iters=0, device_map=asked.device, enable_torch_compile=False,
        dataset=asked.data, nsamples=asked.samples, seqlen=asked.seq_len,
    )  # fmt: skip
    rounder.post_init()
    found = {
        name: {4: INT4, 8: FP8}.get(layer["bits"], PLAIN)
        for name, layer in rounder.layer_config.items()
    }
    return {name: kind for name, kind in found.items() if "lm_head" not in name}


def shared_layers(model: str) -> list[list[str]]:
    """What vLLM merges, of a model of Llama's kind."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    return [
        [f"model.layers.{index}.{parent}.{name}" for name in names]
        for index in range(layers)
        for parent, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        )
    ]


def modelopt(asked: argparse.Namespace) -> dict[str, str]:
    """auto_quantize: squared gradients of the loss at the outputs, then a linear program."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    model.to(asked.device).eval()
    int4 = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": 4, "block_sizes": {-1: 32}, "effective_bits": 4.5},
            },
        ],
        "algorithm": "max",
    }
    fp8 = mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG
    _, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": asked.bits,
            "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
        },
        quantization_formats=[int4, fp8],
        data_loader=batches(asked),
        forward_step=lambda model, ids: model(input_ids=ids, labels=ids),
        loss_func=lambda output, _: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=asked.samples,
        num_score_steps=asked.samples,
        method=asked.method,
        verbose=True,
    )
    return modelopt_plan(state, model)


def modelopt_plan(state: dict[str, Any], model: Any) -> dict[str, str]:
    """Linear -> scheme, of a search's state: a group's format is that of each of its Linears."""
    plan = {}
    for group, chosen in state["best"]["recipe"].items():
        said = str(chosen)
        kind = INT4 if "CUSTOM" in said else FP8 if "FP8" in said else PLAIN
        for name in state["candidate_stats"][group]["module_names"]:
            plan[name] = kind
    return plan


def batches(asked: argparse.Namespace) -> list[Any]:
    """Token ids [1, S], as ckptq takes them of the same text."""
    import torch

    from ckptq.text.samples import read_samples

    found = read_samples(
        asked.data, Path(asked.model), samples=asked.samples, seq_len=asked.seq_len
    )
    return [torch.tensor([ids], device=asked.device) for ids in found.token_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=["auto-round", "modelopt"])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="gradient", help="ModelOpt's: gradient or kl_div")
    parser.add_argument("--output", "-o", type=Path, required=True)
    asked = parser.parse_args()
    began = time.monotonic()
    plan = (auto_round if asked.peer == "auto-round" else modelopt)(asked)
    asked.output.write_text(json.dumps(plan, indent=1) + "\n")
    counts = {kind: list(plan.values()).count(kind) for kind in sorted(set(plan.values()))}
    print(f"{asked.output}: {counts}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
