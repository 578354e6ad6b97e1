"""The transformers model of a checkpoint without its weights: parameters on the meta device.

Built as `from_pretrained` builds it, from config.json alone, so that no family needs code here.
Buffers that are computed and not stored (RoPE frequencies, embedding scales) are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.forward import tap
from ckptq.models.refusals import WEIGHTS_ALONE, family_code, refusals
from ckptq.models.tree.transformers_model import (
    decoder_layers_of,
    model_class_of,
    on_meta,
    read_config,
)
from ckptq.spec import FLOATS, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and where its decoder layers are."""

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    """Module name -> decoder layer, in the order in which they run."""
    dtype: torch.dtype


def build_skeleton(
    ckpt: Checkpoint,
    device: torch.device,
    eager: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    attention: bool = True,
) -> Skeleton:
    """The model that config.json describes, in eval mode, with an attention function of ckptq.

    `eager` asks for the family's eager attention; a family that SDPA cannot compute gets it anyway.
    `dtype` takes the place of the config's. Without `attention` nobody wants to see q, k and v: a
    model that does not show them, or has none, is built with attention of its own.

    Raises SourceError for an architecture that the installed transformers does not have, PlanError
    for one without decoder layers or, with `attention`, without heads to be seen.
    """
    config = read_config(ckpt, trust_remote_code)
    if attention:
        _check_has_heads(ckpt, config)
    dtype = _dtype(ckpt, config, dtype)
    model_class = model_class_of(ckpt, config, trust_remote_code)
    eager = eager or not model_class._supports_sdpa
    own = None if attention else ("eager" if eager else "sdpa")
    config._attn_implementation = tap.register(eager)
    with refusals(f"{ckpt.path / CONFIG}: transformers makes no {model_class.__name__} of it"):
        model = _build(model_class, config, dtype, own)
    with family_code(str(ckpt.path), f"{model_class.__name__}'s own initialization"):
        _make_buffers(model, device)
    model.eval()
    with family_code(str(ckpt.path), f"{model_class.__name__}'s search for its decoder"):
        layers = _decoder_layers(ckpt, model)
    return Skeleton(model=model, layers=layers, dtype=dtype)


def _check_has_heads(ckpt: Checkpoint, config: PreTrainedConfig) -> None:
    with refusals(f"{ckpt.path / CONFIG}: transformers finds no text model in it"):
        text = config.get_text_config(decoder=True)
    if not getattr(text, "num_attention_heads", None):
        architecture = ", ".join(config.architectures or ["unknown architecture"])
        raise PlanError(
            f"{ckpt.path}: {architecture} has no attention heads, so there is no KV cache and no "
            f"query to scale; {WEIGHTS_ALONE}"
        )


def _dtype(ckpt: Checkpoint, config: PreTrainedConfig, asked: torch.dtype | None) -> torch.dtype:
    """What is asked for, or as `from_pretrained(dtype="auto")`: the config's, else the first
    weight's."""
    dtype = asked or config.dtype
    if dtype is None:
        stored = (t.spec.dtype for t in ckpt.tensors.values() if t.spec.dtype in FLOATS)
        dtype = torch_dtype(next(stored, "F32"))
    config.dtype = dtype
    for key in config.sub_configs:
        if (sub := getattr(config, key, None)) is not None:
            sub.dtype = dtype
    if not isinstance(dtype, torch.dtype):
        raise SourceError(f"{ckpt.path / CONFIG}: dtype is {dtype!r}, wanted one of torch's")
    return dtype


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    own: str | None,
) -> PreTrainedModel:
    """A class that does not know ckptq's attention function gets its `own`, if that is enough."""
    try:
        return on_meta(model_class, config, dtype)
    except KeyError as error:
        if error.args != (config._attn_implementation,):
            raise
        if own is not None:
            config._attn_implementation = own
            return on_meta(model_class, config, dtype)
        raise PlanError(
            f"{model_class.__name__} has attention classes of its own instead of transformers' "
            f"attention interface, so its q, k and v cannot be observed; {WEIGHTS_ALONE}"
        ) from error


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, with the model's own initialization.

    Parameters are marked as initialized, so that `initialize_weights` leaves them on the meta
    device.
    """
    for parameter in model.state_dict(keep_vars=True).values():
        parameter._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, torch.empty_like(buffer, device=device))
    model.initialize_weights()


def _decoder_layers(ckpt: Checkpoint, model: PreTrainedModel) -> dict[str, nn.Module]:
    found = decoder_layers_of(model)
    if found is None:
        wanted = model.config.get_text_config(decoder=True).num_hidden_layers
        raise PlanError(
            f"{ckpt.path}: {type(model).__name__} has no list of {wanted} decoder layers "
            f"to run one by one; {WEIGHTS_ALONE}"
        )
    return {f"{found[0]}.{index}": layer for index, layer in enumerate(found[1])}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off stderr: ckptq shows its own."""
    from transformers.utils import logging

    shown: Any = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
