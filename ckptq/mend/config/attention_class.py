"""The class that an attention group of config.json names as its target."""

from __future__ import annotations

import torch

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import CkptqError
from ckptq.models.refusals import refusals
from ckptq.models.tree.transformers_model import (
    decoder_layers_of,
    model_class_of,
    on_meta,
    read_config,
)


def attention_class(ckpt: Checkpoint) -> str | None:
    """That of the decoder layers of transformers' model; None where it has several, or none."""
    try:
        with refusals("transformers"):
            config = read_config(ckpt)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = on_meta(model_class_of(ckpt, config), config, torch.bfloat16)
            layers = decoder_layers_of(model)
    except CkptqError:
        return None
    modules = layers[1].modules() if layers is not None else ()
    names = {type(module).__name__ for module in modules}
    found = [name for name in names if name.endswith("Attention")]
    return found[0] if len(found) == 1 else None
