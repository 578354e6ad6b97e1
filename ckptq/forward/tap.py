"""The attention function through which every family's q, k and v pass after RoPE.

transformers looks attention up by name in `AttentionInterface`; a model built with the name "ckptq"
comes here. The function shows q, k and v to the tap of its module, then computes what transformers'
own SDPA would, to the last bit; on a GPU our kernel does both at once where it can. Models that
SDPA cannot compute (attention sinks, soft caps) are built with "ckptq_eager", which goes on to the
family's own eager attention.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptq.forward import kernel_attention

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckptq.kernels.maxima import Maxima

NAME = "ckptq"
NAME_EAGER = "ckptq_eager"
_TAP = "ckptq_tap"

Result = tuple["Tensor", "Tensor | None"]


@dataclass(frozen=True)
class Tap:
    """What attention shows its q, k and v of one batch to."""

    lengths: Sequence[int]
    """How many positions of each row are real; the rest is padding."""
    see: Callable[[str, Tensor, Tensor, Tensor], None]
    """Gets (module name, q [B, H, S, D], k [B, K, S, D], v [B, K, S, D])."""
    maxima: Callable[[str, Tensor, Tensor], Maxima] | None
    """Gets (module name, q, k), gives buffers for a kernel to fold into; None if those don't do."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Result:
    """transformers' `sdpa_attention_forward`, with the module's tap called first."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from ckptq.kernels.dispatch import on_gpu

    name, tap = getattr(module, _TAP, ("", None))
    if tap is not None and tap.maxima is not None and on_gpu(query):
        buffers = partial(tap.maxima, name, query, key)
        qkv = (query, key, value)
        out = kernel_attention.fused_attention(
            module, buffers, tap.lengths, qkv, attention_mask, kwargs
        )
        if out is not None:
            return out, None
    _show(module, query, key, value)
    result: Result = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Result:
    """The `eager_attention_forward` of the module's own family, with its tap called first."""
    _show(module, query, key, value)
    family = sys.modules[type(module).__module__]
    result: Result = family.eager_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _show(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    name, tap = getattr(module, _TAP, ("", None))
    if tap is not None:
        tap.see(name, query, key, value)


def register(eager: bool) -> str:
    """Make the functions known to transformers and return the name to put in a model's config.

    Masks are made as for SDPA (None where plain causal attention is meant, else booleans), or as
    for eager attention (0 and the lowest number).
    """
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AttentionInterface.register(NAME_EAGER, eager_attention)
    AttentionMaskInterface.register(NAME_EAGER, eager_mask)
    return NAME_EAGER if eager else NAME


@contextmanager
def tapped(root: nn.Module, name: str, tap: Tap) -> Iterator[None]:
    """In the block, `tap` sees q, k and v of every attention inside `root`, called `name`."""
    modules = list(root.named_modules(prefix=name))
    for path, module in modules:
        setattr(module, _TAP, (path, tap))
    try:
        yield
    finally:
        for _, module in modules:
            delattr(module, _TAP)
