"""Stand-ins for decoder layers that record how the model calls them.

Shape letters: B batch, S positions, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ckptq.errors import PlanError
from ckptq.models.refusals import WEIGHTS_ALONE

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model passes to a decoder layer besides the hidden states."""


PASSED_ON = "prev_topk_indices"
"""What the layers of GLM-5 and its kin get from the one before them beside the hidden states, and
return with these: the positions that sparse attention keeps."""


class AllLayersSeen(Exception):
    """Ends a recording run: what follows the layers is not needed, and has no weights."""


class WantsTuples(Exception):
    """The model indexed its layer's result: older families return a tuple."""


def unpacks_two(error: BaseException | None) -> bool:
    """Whether the model failed to take two results of a layer out of what it was given."""
    return isinstance(error, ValueError) and "to unpack (expected 2" in str(error)


class Recorder:
    """Stands in for the decoder layers of one run and records how each is called.

    It answers as a layer does whose result are these hidden states.
    """

    def __init__(self, model_name: str, stop_after: int, answer: Callable[[Tensor], Any]) -> None:
        self.calls: list[LayerArguments] = []
        self._model_name = model_name
        self._stop_after = stop_after
        self._answer = answer
        self._hidden_BSE: Tensor | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._hidden_BSE is not None and not _is_all_of(hidden_states, self._hidden_BSE):
            self._refuse(hidden_states)
        self._hidden_BSE = hidden_states
        self.calls.append((args, kwargs))
        if len(self.calls) == self._stop_after:
            raise AllLayersSeen
        return self._answer(hidden_states)

    def _refuse(self, given: Tensor) -> NoReturn:
        """A layer's input is not the output of the one before it."""
        assert self._hidden_BSE is not None
        whole = self._hidden_BSE
        if given.shape == whole.shape[1:] and given.data_ptr() == whole.data_ptr():
            raise WantsTuples
        raise PlanError(
            f"{self._model_name} changes the hidden states between decoder layers "
            f"{len(self.calls) - 1} and {len(self.calls)}; it cannot be run layer by layer; "
            f"{WEIGHTS_ALONE}"
        )

    def hidden_states(self) -> Tensor:
        """What the first layer gets, [B, S, E]. PlanError if some layer was never called."""
        if self._hidden_BSE is None or len(self.calls) < self._stop_after:
            raise PlanError(
                f"{self._model_name} called {len(self.calls)} of its {self._stop_after} decoder "
                f"layers; it cannot be run layer by layer; {WEIGHTS_ALONE}"
            )
        return self._hidden_BSE


def _is_all_of(given: Tensor, whole: Tensor) -> bool:
    """Whether it is the same tensor, or a view of all of it, as Gemma-4 takes of the positions that
    it wants logits of."""
    same = given.shape == whole.shape and given.stride() == whole.stride()
    place = whole.data_ptr()  # 0 on the meta device, where views cannot be told apart
    return given is whole or (same and place != 0 and given.data_ptr() == place)


def pass_on(second: Tensor, calls: Sequence[LayerArguments]) -> None:
    """Give the second part of a layer's result to the first of these calls, if there is one."""
    for _, kwargs in calls[:1]:
        kwargs[PASSED_ON] = second.cpu()


class Memo:
    """Keeps one copy of equal tensors, on the CPU: masks and position embeddings repeat."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def keep(self, calls: Sequence[LayerArguments]) -> list[LayerArguments]:
        """The layers' arguments for one batch; many share the same tensors."""
        known: dict[int, Tensor] = {}

        def one(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                known[id(tensor)] = self._one(tensor)
            return known[id(tensor)]

        return [(args, kwargs) for args, kwargs in _map_tensors(one, list(calls))]

    def _one(self, tensor: Tensor) -> Tensor:
        import hashlib

        cpu = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(cpu.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
        return self._kept.setdefault((cpu.dtype, cpu.shape, digest), cpu)


class Moved:
    """Layer arguments on the device; repeated tensors are moved once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[int, Tensor] = {}

    def __call__(self, call: LayerArguments) -> LayerArguments:
        args, kwargs = _map_tensors(self._one, call)
        return args, kwargs

    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = tensor.to(self._device)
        return self._seen[id(tensor)]


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply to every tensor in tuples, lists and dicts; other containers are passed on unchanged.

    A model may share such a container between layers on purpose (Gemma-3n's shared keys and
    values).
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(change, each) for each in value)
    if type(value) is dict:
        return {key: _map_tensors(change, each) for key, each in value.items()}
    return value


def is_plain(value: Any) -> bool:
    """Whether no layer could change these arguments for later layers."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))


@contextmanager
def layers_replaced(layers: Sequence[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Replaces each layer's `forward` inside the block; its attributes stay."""
    for layer in layers:
        vars(layer)["forward"] = stand_in
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
