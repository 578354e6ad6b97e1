"""vLLM's own class for a checkpoint, built on a CPU with nothing loaded."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FP8_DYNAMIC: dict[str, Any] = {
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    },
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": [],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


@contextlib.contextmanager
def built(checkpoint: Path, quantization: dict[str, Any] | None) -> Iterator[torch.nn.Module]:
    """vLLM's own class for a checkpoint, its parameters uninitialised, on the CPU."""
    from vllm.config import (
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    dtype = "bfloat16" if quantization else "float32"
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((checkpoint / "config.json").read_text())
        if quantization:
            config["quantization_config"] = quantization
        register_if_unknown(config)
        Path(folder, "config.json").write_text(json.dumps(config))
        for other in checkpoint.glob("*.json"):
            if other.name not in ("config.json", "model.safetensors.index.json"):
                Path(folder, other.name).write_bytes(other.read_bytes())
        model = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=128,
        )
        vllm = VllmConfig(
            model_config=model,
            device_config=DeviceConfig("cpu"),
            load_config=LoadConfig(device="cpu"),
        )
        with set_current_vllm_config(vllm):
            torch.set_default_dtype(getattr(torch, dtype))
            yield initialize_model(vllm)


def register_if_unknown(config: dict[str, Any]) -> None:
    """Let transformers read a config whose class lies on the hub, as plain attributes."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    kind = config["model_type"]
    if kind in CONFIG_MAPPING or kind in _CONFIG_REGISTRY:
        return

    class Plain(PreTrainedConfig):
        model_type = kind

        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            for name, value in attributes.items():
                inner = name.endswith("_config") and name != "quantization_config"
                setattr(self, name, nested(value) if inner else with_attributes(value))

    def nested(value: dict[str, Any]) -> Any:
        known = value["model_type"] in CONFIG_MAPPING
        return (CONFIG_MAPPING[value["model_type"]] if known else PreTrainedConfig)(**value)

    def with_attributes(value: Any) -> Any:
        if isinstance(value, list):
            return [with_attributes(item) for item in value]
        return Attributes(value) if isinstance(value, dict) else value

    AutoConfig.register(kind, Plain)


class Attributes(dict):
    """JSON's object, read as configs written in Python are: `block.attention.no_op`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return Attributes(value) if isinstance(value, dict) else value


def start_process_groups() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        init_distributed_environment(1, 0, meeting, 0, backend="gloo")
        initialize_model_parallel(1, 1)
