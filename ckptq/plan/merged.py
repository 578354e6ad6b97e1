"""vLLM merges q/k/v and gate/up into one Linear, and looks for the group of that.

vLLM 0.32 tries its name, then the names of its parts, then its class. vLLM 0.25 tries the class
before the parts: with one group for `Linear` and another for `q_proj`, the merged Linear silently
gets the wrong one. With the merged name among the targets every version finds the right one.
"""

from __future__ import annotations

from collections.abc import Collection

from ckptq.engines.vllm import common_merged_name
from ckptq.models.witnesses import Witnesses
from ckptq.recipes.names import read_names


def merged_names(
    targets: Collection[str], linears: Collection[str], witnesses: Witnesses
) -> list[str]:
    """The merged Linears among those of a group, as far as no target matches them yet.

    Example: targets ["re:.*self_attn.(q|k|v)_proj$"] and the Linears of a layer's attention give
    ["model.layers.0.self_attn.qkv_proj"].
    """
    names = dict.fromkeys(
        name for linear in linears if (name := _merged_name(linear, witnesses)) is not None
    )
    targeted = read_names(targets)
    return [name for name in names if not targeted.match(name)]


def _merged_name(linear: str, witnesses: Witnesses) -> str | None:
    merged = witnesses.merged_name(linear)
    if merged is not None:
        return f"{linear.rpartition('.')[0]}.{merged.rpartition('.')[2]}"
    if witnesses.engine is None and ".experts." not in linear:  # experts: by another rule
        return common_merged_name(linear)
    return None
