"""The attention function through which every family's q, k and v pass after RoPE.

transformers looks attention up by name in `AttentionInterface`; a model built with the name "ckptq"
comes here. The function shows q, k and v to the tap of its module, then computes what transformers'
own SDPA would, to the last bit; on a GPU our kernel does both at once where it can. Scores with a
soft cap, which SDPA leaves out, go on to the family's own eager attention, and so do all of models
that have no SDPA (attention sinks), which are built with "ckptq_eager". What a command wants to
know of attention it asks by a tap.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ckptq.forward import kernel_attention
from ckptq.forward.kernel_attention import Words
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.gpu import on_gpu

NAME = "ckptq"
NAME_EAGER = "ckptq_eager"
_TAP = "ckptq_tap"

Result = tuple["Tensor", "Tensor | None"]

Qkv = tuple["Tensor", "Tensor", "Tensor"]

Attend = Callable[["Tensor", "Tensor", "Tensor"], Result]
"""The module's own attention of any q, k and v of the same batch: [B, S, H, D] comes first."""


Asked = Callable[[], "Words | None"]
"""What is asked of attention, as kernels take it; None where they do not know it."""

Replace = Callable[[str, Qkv, Asked], "Tensor | None"]
"""Gets (module name, q [B, H, S, D], k and v [B, K, S, D], what is asked), gives the result
[B, S, H, D]; None where it has none."""

Compare = Callable[[str, Qkv, "Tensor", Attend, Asked], None]
"""Gets (module name, q, k and v, what attention made of them, how to compute it of others, what is
asked)."""


@dataclass(frozen=True)
class Tap:
    """Receives the q, k and v of one batch from attention."""

    lengths: Sequence[int]
    """How many positions of each row are real; the rest is padding."""
    see: Callable[[str, Tensor, Tensor, Tensor], None] | None = None
    """Gets (module name, q [B, H, S, D], k [B, K, S, D], v [B, K, S, D])."""
    maxima: Callable[[str, Tensor, Tensor], Maxima] | None = None
    """Gets (module name, q, k), gives buffers for a kernel to fold into; None if those don't do."""
    replace: Replace | None = None
    """Attention in the place of the module's own; asked first."""
    compare: Compare | None = None
    """Asked last, with the result."""


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

    name, tap = getattr(module, _TAP, ("", None))
    if tap is not None and tap.maxima is not None and on_gpu(query):
        buffers = partial(tap.maxima, name, query, key)
        qkv = (query, key, value)
        out = kernel_attention.fused_attention(
            module, buffers, tap.lengths, qkv, attention_mask, kwargs
        )
        if out is not None:
            return out, None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Result:
        if kwargs.get("softcap") is not None:  # which SDPA would leave out without a word
            return _by_family(module, (q, k, v), added(attention_mask, q), kwargs)
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)

    def asked() -> Words | None:
        lengths = tuple(tap.lengths) if tap is not None else ()
        return kernel_attention.in_words(module, lengths, query, key, attention_mask, kwargs)

    return _shown(name, tap, attend, (query, key, value), asked)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Result:
    """The `eager_attention_forward` of the module's own family, with its tap called first."""
    name, tap = getattr(module, _TAP, ("", None))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return _by_family(module, (q, k, v), attention_mask, kwargs)

    return _shown(name, tap, attend, (query, key, value), lambda: None)


def _by_family(
    module: nn.Module, qkv: Qkv, attention_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Result:
    family = sys.modules[type(module).__module__]
    result: Result = family.eager_attention_forward(module, *qkv, attention_mask, **kwargs)
    return result


def added(attention_mask: Tensor | None, query: Tensor) -> Tensor:
    """An SDPA mask, of which None is plain causal attention, as eager attention adds it."""
    S = query.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(S, S, dtype=torch.bool, device=query.device).tril()
    if attention_mask.dtype != torch.bool:
        return attention_mask
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, least)


def _shown(name: str, tap: Tap | None, attend: Attend, qkv: Qkv, asked: Asked) -> Result:
    """The attention of q, k and v: the tap's, or the module's own after the tap has seen them."""
    if tap is None:
        return attend(*qkv)
    out = tap.replace(name, qkv, asked) if tap.replace is not None else None
    if out is not None:
        return out, None
    if tap.see is not None:
        tap.see(name, *qkv)
    result = attend(*qkv)
    if tap.compare is not None:
        tap.compare(name, qkv, result[0], attend, asked)
    return result


def register(eager: bool) -> str:
    """Register the functions with transformers; returns the name for a model's config.

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
