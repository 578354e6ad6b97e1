"""A checkpoint of 100 GB by its headers alone, without a byte of its data."""

import json
import time

from ckptq.checkpoint.open import open_checkpoint
from ckptq.spec import DTYPES
from ckptq.verify.config_judge import judge_config
from ckptq.verify.structure.checks import check_structure
from ckptq.verify.structure.tensors import check_tensors
from ckptq.verify.subject import Subject

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, SHARDS = 40, 64, 5120, 2560, 20
SECONDS = 30.0
"""It takes 2 to 4; work that grows with the square of the tensors takes minutes."""


def tensors():
    """An MoE of FP8 experts: 7,680 Linears, 15,000 tensors, 104 GB."""
    linears = {"down_proj": (HIDDEN, INTERMEDIATE), "gate_proj": (INTERMEDIATE, HIDDEN),
               "up_proj": (INTERMEDIATE, HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for projection, (rows, columns) in linears.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                yield f"{name}.weight", "F8_E4M3", (rows, columns)
                yield f"{name}.weight_scale", "BF16", (rows, 1)
        for name, rows in (("q_proj", 8192), ("k_proj", 1024), ("v_proj", 1024)):
            yield f"model.layers.{layer}.self_attn.{name}.weight", "BF16", (rows, HIDDEN)


def write(folder):
    """Headers, and files that are holes."""
    entries = list(tensors())
    weight_map = {}
    for shard in range(SHARDS):
        header, at = {}, 0
        for name, dtype, shape in entries[shard::SHARDS]:
            nbytes = shape[0] * shape[1] * DTYPES[dtype][1]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            weight_map[name] = f"model-{shard}.safetensors"
            at += nbytes
        raw = json.dumps(header).encode()
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["Linear"], "format": "float-quantized", "weights": weights}
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
        "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
        "quantization_config": {
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "ignore": ["lm_head", r"re:.*self_attn\..*"], "config_groups": {"linear": group},
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_structure_of_experts_by_the_thousand_is_no_long_work(tmp_path):
    write(tmp_path)
    began = time.process_time()
    problems = []
    ckpt = open_checkpoint(tmp_path, problems=problems)
    declared, wrong = judge_config(ckpt)
    subject = Subject(ckpt, None, declared)
    found = [*wrong, *check_structure(subject, problems, check_tensors(subject))]
    seconds = time.process_time() - began
    assert found == []
    assert ckpt.nbytes > 100e9
    assert sum(module.quantized for module in subject.modules.values()) == 3 * LAYERS * EXPERTS
    assert seconds < SECONDS
