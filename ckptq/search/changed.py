"""Rows that differ from the source in one layer: their streams, and the layer while they run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptq.evaluate.variant import Run, Variant
from ckptq.forward.layerwise import Stream, Watch

if TYPE_CHECKING:
    from torch import nn

    from ckptq.text.samples import Batch


@dataclass(frozen=True, slots=True)
class Change:
    """Linears of one layer in a scheme."""

    scheme: str
    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.scheme}: {self.linears[0]} and {len(self.linears) - 1} more"


@dataclass(frozen=True, slots=True)
class CacheChange:
    """The KV cache of one layer in a format."""

    cache: str
    layer: int

    @property
    def name(self) -> str:
        return f"cache {self.cache}: layer {self.layer}"


Exchange = Callable[["nn.Module", Variant], "AbstractContextManager[None] | None"]
"""(layer, row) -> the context in which the layer has other weights; None where it keeps them."""


def first_of(stream: Stream, count: int) -> Stream:
    """The first batches of a stream, which then go their own way."""
    return replace(
        stream,
        batches=stream.batches[:count],
        hidden_BSE=stream.hidden_BSE[:count],
        arguments=[list(calls) for calls in stream.arguments[:count]],
    )


def append(stream: Stream, row: Variant, count: int) -> None:
    """Let a row go on from where the first batches, the source's, are."""
    own = first_of(stream, count)
    for batch in own.batches:
        assert isinstance(batch, Run)
        stream.batches.append(replace(batch, variant=row))
    stream.hidden_BSE += own.hidden_BSE
    stream.arguments += own.arguments


def exchanging(watch: Watch, exchange: Exchange) -> Watch:
    """`watch`, around a layer that has the row's own weights."""

    def both(layer: nn.Module, run: Batch) -> AbstractContextManager[None]:
        assert isinstance(run, Run)
        inner, outer = watch(layer, run), exchange(layer, run.variant)
        return _within([each for each in (outer, inner) if each is not None])

    return both


@contextmanager
def _within(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


@contextmanager
def exchanged(layer: nn.Module, other: nn.Module, parameters: Sequence[str]) -> Iterator[None]:
    """In the block, these parameters of a layer have the other's values."""
    kept = {name: layer.get_parameter(name).data for name in parameters}
    for name in parameters:
        layer.get_parameter(name).data = other.get_parameter(name).data
    try:
        yield
    finally:
        for name, data in kept.items():
            layer.get_parameter(name).data = data
