"""Which tensors on disk make which parameters of a transformers model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sources_of_parameters(
    model: PreTrainedModel, names: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Which stored tensors make each parameter, as transformers would load them.

    Example, Mixtral: "model.layers.0.mlp.experts.gate_up_proj" comes from
    "model.layers.0.block_sparse_moe.experts.{0..7}.w1.weight" and ".w3.weight". Where one stored
    tensor makes several parameters, the first stands for all. Tensors that the model has no place
    for are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets: dict[str, list[str]] = {
        pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns
    }
    state: dict[str, Any] = model.state_dict()
    found: defaultdict[str, list[str]] = defaultdict(list)
    # the order is transformers' own: some renamings depend on what was seen before
    for name in sorted(names, key=dot_natural_key):
        prefix = model.base_model_prefix
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        made = [parameter]
        if pattern is not None:
            made = [parameter.replace(targets[pattern][0], t) for t in targets[pattern]]
        for each in made:
            if each in state:
                found[each].append(name)
    return {parameter: tuple(stored) for parameter, stored in found.items()}
