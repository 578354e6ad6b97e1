"""Put a part of a checkpoint's weights into a model on the meta device, and take them out again.

Names on disk become parameters by transformers' own conversion (renamed prefixes, experts fused
into one tensor, ...), applied to one part of the model at a time: a decoder layer, an embedding, a
norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ckptq.errors import SourceError
from ckptq.forward.skeleton import Skeleton, quiet
from ckptq.forward.source import WeightSource
from ckptq.models.tree.parameters import sources_of_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator


class Loader:
    """Moves weights of one module at a time between a source and a skeleton."""

    def __init__(self, skeleton: Skeleton, source: WeightSource, device: torch.device) -> None:
        self._skeleton = skeleton
        self._source = source
        self._device = device
        self._parameters = frozenset(skeleton.model.state_dict())
        self._stored_modules: dict[str, str] = {}
        self._sources = sources_of_parameters(skeleton.model, source.names())

    def stored_names(self, module: str) -> dict[str, tuple[str, ...]]:
        """Parameter -> names on disk, for everything stored under a module."""
        return {p: names for p, names in self._sources.items() if p.startswith(module + ".")}

    def stored_module(self, module: str) -> str:
        """A module's name on disk.

        Example, Gemma-3 with images: "model.language_model.layers.0.self_attn" is
        "language_model.model.layers.0.self_attn" there.
        """
        if module not in self._stored_modules:
            self._stored_modules[module] = self._find_stored(module)
        return self._stored_modules[module]

    def _find_stored(self, module: str) -> str:
        stored = self.stored_names(module)
        for parameter, names in stored.items():
            suffix = parameter.removeprefix(module)
            if len(names) == 1 and names[0].endswith(suffix):
                return names[0].removesuffix(suffix)
        every = [name.split(".") for names in stored.values() for name in names]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*every, strict=False))
        return ".".join(parts[0] for parts in shared) or module

    @property
    def label(self) -> str:
        """The name of the weights' source in messages."""
        return self._source.label

    @contextmanager
    def loaded(self, module: str) -> Iterator[None]:
        """The module has its weights inside the block, and none after it."""
        self.load(module)
        try:
            yield
        finally:
            self.unload(module)

    def load(self, module: str, recurse: bool = True) -> None:
        """Read the weights of a module and put them on the device.

        `recurse=False` takes the module's own parameters only. Raises SourceError if the
        checkpoint lacks one or has it in another shape.
        """
        wanted = [name for name in self._own(module, recurse) if not self._share(name)]
        absent = [parameter for parameter in wanted if not self._sources_for(parameter)]
        if absent:
            raise SourceError(
                f"{self._source.label}: no tensor for {absent[0]!r}"
                f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, which "
                f"{type(self._skeleton.model).__name__} needs"
            )
        for names in self._portions(wanted):
            self._convert(self._source.load(sorted(names)))
            _return_free_memory()
        self._take_from_twins(wanted)
        bare = [name for name in wanted if _get(self._skeleton.model, name).is_meta]
        assert not bare, f"transformers' conversion left {bare} without weights"

    def announce(self, module: str) -> None:
        """Let the source read the weights of a module while another computes."""
        portions = self._portions(self._own(module, recurse=True))
        self._source.announce([name for names in portions for name in sorted(names)])

    def unload(self, module: str, recurse: bool = True) -> None:
        """Release the memory of a module's weights."""
        for parameter in self._own(module, recurse):
            _set(self._skeleton.model, parameter, _empty_on_meta(self._skeleton.model, parameter))
        _return_free_memory()

    def _own(self, module: str, recurse: bool) -> list[str]:
        prefix = module + "." if module else ""
        under = (name for name in sorted(self._parameters) if name.startswith(prefix))
        return [name for name in under if recurse or "." not in name.removeprefix(prefix)]

    def _portions(self, wanted: Iterable[str]) -> list[set[str]]:
        """What is read together: a parameter made of many tensors (experts) is read alone.

        While it is made, the tensors and the parameter are both in memory.
        """
        sources = {self._sources_for(parameter) for parameter in wanted}
        simple = {name for names in sources if len(names) == 1 for name in names}
        return [simple, *(set(names) for names in sorted(sources) if len(names) > 1)]

    def _sources_for(self, parameter: str) -> tuple[str, ...]:
        return self._sources.get(parameter) or self._sources.get(self._twin(parameter), ())

    def _twin(self, parameter: str) -> str:
        """The parameter whose weights this one shares, if only one of the two is stored."""
        tied: dict[str, str] = self._skeleton.model.all_tied_weights_keys
        twins = tied | {source: target for target, source in tied.items()}
        return twins.get(parameter, parameter)

    def _share(self, parameter: str) -> bool:
        """Use the weights of a tied parameter that is already loaded."""
        model, twin = self._skeleton.model, self._twin(parameter)
        shared = parameter not in self._sources and not _get(model, twin).is_meta
        if shared:
            _set(model, parameter, _get(model, twin))
        return shared

    def _take_from_twins(self, wanted: Iterable[str]) -> None:
        """Give what was read under a tied parameter's name to the requested one."""
        model = self._skeleton.model
        for parameter in wanted:
            if parameter not in self._sources:
                twin = self._twin(parameter)
                _set(model, parameter, _get(model, twin))
                _set(model, twin, _empty_on_meta(model, twin))

    def _convert(self, tensors: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model, dtype = self._skeleton.model, self._skeleton.dtype
        config = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
        )
        with quiet():
            given = handed_over(tensors)
            info, _ = convert_and_load_state_dict_in_model(model, given, config, None)
        for parameter, found, wanted in info.mismatched_keys:
            raise SourceError(
                f"{self._source.label}: {parameter!r} is {list(found)} on disk, config.json "
                f"asks for {list(wanted)}"
            )
        for parameter, reason in info.conversion_errors.items():
            raise SourceError(
                f"{self._source.label}: cannot build {parameter!r} from its tensors: "
                f"{reason.strip().splitlines()[-1]}"
            )


class HandedOver:
    """Holds a tensor until transformers' loader takes it with `[...]`, and then releases it."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        self._tensors = tensors
        self._name = name

    def __getitem__(self, _: object) -> Tensor:
        return self._tensors.pop(self._name)


def handed_over(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Lazy tensors for a loader that would otherwise keep all until the last is converted."""
    return {name: HandedOver(tensors, name) for name in tensors}


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), key)
    return tensor


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, tensor)


def _return_free_memory() -> None:
    """Return free heap pages to the system; otherwise the heap's holes grow with every layer."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _empty_on_meta(model: nn.Module, name: str) -> Tensor:
    old = _get(model, name)
    empty = torch.empty_like(old, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(old, nn.Parameter) else empty
