"""What transformers makes of a checkpoint: its own module tree, built on the meta device.

One of the witnesses of `models.witnesses`. Queries use names on disk, which go through
transformers' own renaming first. Modules that differ only in numbers are one kind.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.models.tree.holes import Layers, Numbers, lacking, lacking_everywhere, numbers_of
from ckptq.models.tree.initialized import wants_weights
from ckptq.numbered import starred

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SPLIT = {"gate_up_proj": "gate_proj", "down_proj": "down_proj"}
"""A fused tensor of experts -> a part that each expert has of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedParameter:
    """The experts of one layer as one parameter of three dimensions."""

    shape: tuple[int, ...]
    """[E, out, in] or [E, in, out]."""
    interleaved: bool
    """Gate and up alternate, instead of standing one after the other."""
    gated: bool
    biased: bool
    one_by_one: bool
    """Whether transformers loads the experts also where each has tensors of its own."""
    taken_apart: bool
    """Whether its quantizer makes one Linear of each, as for Llama-4."""
    dealt_out: bool
    """Whether a tensor on disk goes into several such parameters (Ernie-4.5-VL: text, vision)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The module that a tensor on disk becomes a parameter of."""

    class_name: str
    is_linear: bool
    own_forward: bool = False
    """A subclass of nn.Linear that multiplies by its weight itself."""
    tied: bool = False
    """Whether its weight is another module's too, as of layers that Zamba2 shares."""
    fused: FusedParameter | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleTree:
    """The modules of a transformers model, asked by names on disk."""

    model_class: str
    linears: Mapping[str, None] = field(repr=False)
    """Every nn.Linear, by transformers' name: what its quantizer may quantize."""
    layers: str
    """Where the decoder layers are, by transformers' name; "" where it has no such list."""
    num_layers: int
    stored_layers: str
    """The same list as it is called on disk; "" where no tensor leads into it."""
    layer_parameters: frozenset[str] = field(repr=False)
    """Parameters of decoder layers by their names within one: "self_attn.q_proj.weight"."""
    owners: Mapping[str, Owner] = field(repr=False)
    """Pattern of a tensor on disk, numbers as `*` -> whose parameter it becomes."""
    names: Mapping[str, str] = field(repr=False)
    """Module on disk -> module in transformers, for the Linears whose names differ."""
    attention: frozenset[str] = field(repr=False)
    """What compressed-tensors takes for attention with a cache, and gives scales, by transformers'
    name."""
    no_cache_sizes: str | None
    """Why compressed-tensors cannot tell how many scales such attention has."""
    dtype: str | None
    """That of config.json, "float16"."""
    runs_attention_groups: bool
    """Whether its forward pass takes a config group for attention."""
    lacking: tuple[str, ...] = field(repr=False)
    """Tensors that are not on disk, though the model cannot do without."""
    attention_interface: bool
    """Whether its attention goes through transformers' interface, where an engine that runs the
    model by way of transformers puts its own."""
    attending: frozenset[int]
    """The decoder layers with a module called attention; Mamba's have none."""
    wants_weights: frozenset[str] = field(repr=False)
    """Linears, numbers as `*`, whose parents cannot be initialized where they have no parameter
    called weight, as packed ones have not; transformers tries it on loading."""

    def owner(self, tensor: str) -> Owner | None:
        """Whose parameter a tensor becomes; None for one that the model has no place for."""
        return self.owners.get(starred(tensor))

    def module(self, disk_module: str) -> str:
        """What transformers calls a module."""
        return self.names.get(disk_module, disk_module)


def build_tree(ckpt: Checkpoint) -> ModuleTree | str:
    """The tree of a checkpoint's model, or a one-line reason why there is none. Reads no
    weights."""
    from ckptq.errors import CkptqError

    try:
        return _built(_Asked((_text(ckpt), json.dumps(ckpt.config), tuple(ckpt.tensors)), ckpt))
    except CkptqError as error:
        return str(error)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a tree is made of. Equal ones have the same: of a checkpoint and of what becomes of it,
    or of one before and after a repair of its tensors."""

    made_of: tuple[str, str, tuple[str, ...]] = field(repr=False)
    """config.json as it is on disk, which transformers reads, and in memory; the tensors' names."""
    ckpt: Checkpoint = field(compare=False)


def _text(ckpt: Checkpoint) -> str:
    file = ckpt.path / CONFIG
    return file.read_text(errors="replace") if file.is_file() else ""


@contextmanager
def _uncollected() -> Iterator[None]:
    """What transformers imports stays: looking through it for garbage again and again is a tenth of
    the time in which a command starts."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=16)
def _built(asked: _Asked) -> ModuleTree:
    import torch

    from ckptq.models.refusals import refusals
    from ckptq.models.tree.transformers_model import model_class_of, on_meta, read_config

    with refusals("transformers"), _uncollected():
        config = read_config(asked.ckpt)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = on_meta(model_class_of(asked.ckpt, config), config, torch.bfloat16)
        return _tree(model, asked.ckpt)


def _tree(model: PreTrainedModel, ckpt: Checkpoint) -> ModuleTree:
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
    from torch import nn

    from ckptq.models.tree.parameters import sources_of_parameters
    from ckptq.models.tree.transformers_model import (
        decoder_layers_of,
        dtype_of,
        no_cache_sizes,
        runs_attention_groups,
    )

    modules: dict[str, nn.Module] = dict(model.named_modules())
    first, numbers = _first_of_each(ckpt)
    made: dict[str, str] = {}
    dealt_out: set[str] = set()
    sources = sources_of_parameters(model, first.values())
    for parameter, stored in sources.items():
        dealt_out |= made.keys() & stored
        made |= dict.fromkeys(stored, parameter)
    owners = {
        pattern: _owner(model, made[name], name, dealt_out=name in dealt_out)
        for pattern, name in first.items()
        if name in made
    }
    linears = dict.fromkeys(n for n, m in modules.items() if isinstance(m, nn.Linear))
    found = decoder_layers_of(model)
    layers, count = (found[0], len(found[1])) if found else ("", 0)
    stored_layers = _stored_layers(layers, made)
    list_of_layers = Layers(layers, stored_layers, count)
    placeless = [name for name in first.values() if name not in made]
    return ModuleTree(
        model_class=type(model).__name__,
        linears=linears,
        layers=layers,
        num_layers=count,
        stored_layers=stored_layers,
        layer_parameters=frozenset(
            name.removeprefix(f"{layers}.").partition(".")[2]
            for name in model.state_dict()
            if layers and name.startswith(f"{layers}.")
        ),
        owners=owners,
        names=_names(model, ckpt, made, linears),
        attention=frozenset(n for n, m in modules.items() if is_cached_attention_module(m)),
        no_cache_sizes=no_cache_sizes(model),
        dtype=dtype_of(model.config),
        runs_attention_groups=runs_attention_groups(model),
        lacking=(
            *lacking(model, numbers, made),
            *lacking_everywhere(model, list_of_layers, sources, placeless),
        ),
        attention_interface=model.is_backend_compatible() or model._can_set_attn_implementation(),
        attending=_attending(modules, layers),
        wants_weights=wants_weights(model),  # the last: it takes the model apart
    )


def _attending(modules: Mapping[str, nn.Module], layers: str) -> frozenset[int]:
    inside = {
        name.removeprefix(f"{layers}.").partition(".")[0]
        for name, module in modules.items()
        if name.startswith(f"{layers}.") and "Attention" in type(module).__name__
    }
    return frozenset(int(index) for index in inside if layers)


def _first_of_each(ckpt: Checkpoint) -> tuple[dict[str, str], dict[str, set[Numbers]]]:
    """Pattern -> the first tensor of it, as one stored unquantized would be called, and the numbers
    of all."""
    first: dict[str, str] = {}
    numbers: dict[str, set[Numbers]] = {}
    for name in ckpt.tensors:
        plain = plain_name(name)
        pattern = starred(plain)
        first.setdefault(pattern, plain)
        numbers.setdefault(pattern, set()).add(numbers_of(plain))
    return first, numbers


CODES = {".weight_packed": ".weight", ".qweight": ".weight", "_proj_blocks": "_proj"}
"""How tensors of codes end, and the weights that they stand for."""


def plain_name(name: str) -> str:
    """A packed weight passes as the weight that it stands for."""
    for codes, weight in CODES.items():
        if name.endswith(codes):
            return name.removesuffix(codes) + weight
    return name


def _loads_split(model: PreTrainedModel, fused: str, module: nn.Module) -> bool:
    """Whether the names of one expert's tensors lead into the model as well.

    Either transformers' conversion fuses them, or its quantizer takes the module's parts apart.
    """
    from ckptq.models.tree.parameters import sources_of_parameters

    experts, _, which = fused.rpartition(".")
    if which not in SPLIT:
        return True
    return _taken_apart(module) or bool(
        sources_of_parameters(model, [f"{experts}.0.{SPLIT[which]}.weight"])
    )


def _taken_apart(module: nn.Module) -> bool:
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    return type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION


def _owner(model: PreTrainedModel, parameter: str, stored: str, *, dealt_out: bool) -> Owner:
    """Of the parameter that the tensor `stored` becomes."""
    from torch import nn

    name, _, local = parameter.rpartition(".")
    module = model.get_submodule(name)
    linear = isinstance(module, nn.Linear)
    ties: Mapping[str, str] = model.all_tied_weights_keys
    return Owner(
        class_name=type(module).__name__,
        is_linear=linear and local == "weight",
        own_forward=linear and type(module).forward is not nn.Linear.forward,
        tied=parameter in ties or parameter in ties.values(),
        fused=_fused(model, module, local, stored, dealt_out),
    )


def _fused(
    model: PreTrainedModel, module: nn.Module, local: str, stored: str, dealt_out: bool
) -> FusedParameter | None:
    parameter: Any = getattr(module, local)
    if parameter.dim() != 3 or local not in ("gate_up_proj", "up_proj", "down_proj"):
        return None
    return FusedParameter(
        shape=tuple(parameter.shape),
        interleaved=not getattr(module, "is_concatenated", True),
        gated=bool(getattr(module, "has_gate", True)),
        biased=bool(getattr(module, "has_bias", False)),
        one_by_one=_loads_split(model, stored, module),
        taken_apart=_taken_apart(module),
        dealt_out=dealt_out,
    )


def _stored_layers(layers: str, made: Mapping[str, str]) -> str:
    """The list's name on disk, from the tensors that become parameters of its layers."""
    counts: dict[str, int] = {}
    for stored, parameter in made.items():
        if not layers or not parameter.startswith(layers + "."):
            continue
        index = parameter.removeprefix(layers + ".").partition(".")[0]
        before, found, _ = stored.partition(f".{index}.")
        if found:
            counts[before] = counts.get(before, 0) + 1
    return max(counts, key=lambda prefix: counts[prefix]) if counts else ""


def _names(
    model: PreTrainedModel, ckpt: Checkpoint, made: Mapping[str, str], linears: Iterable[str]
) -> dict[str, str]:
    """Disk -> transformers, for the Linears of kinds whose names differ."""
    from ckptq.models.tree.parameters import sources_of_parameters

    renamed = {
        starred(stored)
        for stored, parameter in made.items()
        if stored != parameter and parameter.removesuffix(".weight") in linears
    }
    if not renamed:
        return {}
    wanted = [plain for name in ckpt.tensors if starred(plain := plain_name(name)) in renamed]
    found = sources_of_parameters(model, wanted)
    return {
        stored.removesuffix(".weight"): parameter.removesuffix(".weight")
        for parameter, names in found.items()
        for stored in names
    }
