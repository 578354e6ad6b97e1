"""Checkpoints that carry their own model code: a Llama in which one thing goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

from calibrate_models import make

CONFIGURATION = """
from transformers import LlamaConfig


class {name}Config(LlamaConfig):
    model_type = "{type}"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        {config}
"""

MODELING = """
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from .configuration_{type} import {name}Config


class {name}Layer(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        {layer}
        return super().forward(*args, **kwargs)


class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1] = {name}Layer(config, 1)

    def initialize_weights(self):
        {init}
        super().initialize_weights()

    def get_decoder(self):
        {decoder}
        return super().get_decoder()
"""


def save(
    folder: Path,
    name: str,
    *,
    config: str = "pass",
    layer: str = "pass",
    init: str = "pass",
    decoder: str = "pass",
) -> Path:
    """A checkpoint of a family called `name`, with a statement of its own in one place."""
    make("llama").save_pretrained(folder)
    kind = name.lower()
    parts = {"name": name, "type": kind, "config": config}
    (folder / f"configuration_{kind}.py").write_text(CONFIGURATION.format(**parts))
    code = MODELING.format(**parts, layer=layer, init=init, decoder=decoder)
    (folder / f"modeling_{kind}.py").write_text(code)
    file = folder / "config.json"
    declared = json.loads(file.read_text()) | {
        "model_type": kind,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{name}Config",
            "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
        },
    }
    file.write_text(json.dumps(declared))
    return folder
