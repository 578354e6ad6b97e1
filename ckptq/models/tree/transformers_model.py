"""The transformers model that config.json describes: its config, its class, its decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import SourceError
from ckptq.models.refusals import refusals
from ckptq.models.tree.counts import check_counts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(ckpt: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """config.json as transformers reads it; SourceError where it cannot.

    A model_type that transformers lacks is read as its architecture is, where transformers has
    that: Kimi-K2 is a "kimi_k2" whose architecture is DeepseekV3ForCausalLM.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    check_counts(ckpt)
    config: PreTrainedConfig
    with refusals(f"{ckpt.path / CONFIG}: transformers cannot read it"):
        known = _known_class(ckpt)
        foreign = ckpt.config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code
        if foreign and known is not None and known.config_class is not None:
            return known.config_class.from_dict(dict(ckpt.config))
        config = AutoConfig.from_pretrained(
            ckpt.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    return config


def model_class_of(
    ckpt: Checkpoint, config: PreTrainedConfig, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The class in transformers, or the checkpoint's own from its folder where that is trusted.

    Without `architectures` the class that transformers' auto classes take for the config.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class: type[PreTrainedModel]
    own = (ckpt.config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own is not None and trust_remote_code:
        with refusals(f"{ckpt.path}: its model code ({own}) does not load"):
            model_class = get_class_from_dynamic_module(own, ckpt.path, local_files_only=True)
        return model_class
    known = _known_class(ckpt)
    if known is not None:
        return known
    if not config.architectures:
        for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
            mapping: Any = auto._model_mapping
            if type(config) in mapping:
                model_class = mapping[type(config)]
                return model_class
    raise SourceError(
        f"{ckpt.path / CONFIG}: architectures {config.architectures or []} are not in transformers "
        f"{transformers.__version__}"
    )


def on_meta(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model without weights, built as `from_pretrained` builds it."""
    from transformers.utils.generic import ContextManagers

    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        return model_class(config)


def dtype_of(config: PreTrainedConfig) -> str | None:
    """In which a model with this config is loaded, "float16"; None where it does not say."""
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def no_cache_sizes(model: PreTrainedModel) -> str | None:
    """Why compressed-tensors' `initialize_attn_qparams` ends in an error: it asks the config for
    numbers of heads by one name each, which some families lack (OPT, BioGPT)."""
    from compressed_tensors.utils import get_head_dim, get_num_attn_heads, get_num_kv_heads

    config = model.config.get_text_config(decoder=True)
    try:
        for size in (get_num_attn_heads, get_num_kv_heads, get_head_dim):
            size(config)
    except ValueError as error:
        return str(error).partition(".")[0]
    except Exception:  # Gemma-4 refuses one number for layers that differ, which is told by itself
        pass
    return None


def runs_attention_groups(model: PreTrainedModel) -> bool:
    """Whether transformers runs what a config group for attention asks for.

    compressed-tensors replaces a registered attention implementation. "eager", the only one of
    models without SDPA (gpt-oss and others with sinks), is not registered, so the forward pass ends
    in KeyError. A kv_cache_scheme alone runs everywhere.
    """
    return bool(model._supports_sdpa)


def decoder_name(model: PreTrainedModel) -> str:
    """Name of the decoder among the model's modules; "" where it is the model itself."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def decoder_layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the language model's layers: in its decoder, as many as its config says.

    LongCat's `num_hidden_layers` are its caches, two in each of `num_layers` layers.
    """
    from torch import nn

    config = model.config.get_text_config(decoder=True)
    prefix = decoder_name(model)
    for wanted in (getattr(config, key, None) for key in ("num_hidden_layers", "num_layers")):
        for name, module in model.get_decoder().named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return ".".join(part for part in (prefix, name) if part), module
    return None


def _known_class(ckpt: Checkpoint) -> type[PreTrainedModel] | None:
    """The first of config.json's architectures that transformers has."""
    import transformers

    names = ckpt.config.get("architectures")
    found = (
        getattr(transformers, str(n), None) for n in (names if isinstance(names, list) else ())
    )
    return next((cls for cls in found if hasattr(cls, "config_class")), None)
