"""One way to run a model: which cache, which activations are rounded, spoiled or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import nn

from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.evaluate.caches.kv_cache import BF16, KVCache
from ckptq.evaluate.linears.inputs import InputScheme
from ckptq.evaluate.linears.treatments import Weights, weights_of_layer
from ckptq.evaluate.text import Line, Text
from ckptq.forward.layerwise import LayerwiseModel, Stream
from ckptq.quantize.coded import Coded
from ckptq.text.samples import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What is done to a model while it runs."""

    name: str
    cache: KVCache = BF16
    inputs: Mapping[str, InputScheme] = field(default_factory=dict)
    """Linear -> how its input is rounded."""
    spoiled: bool = False
    """The control: one layer with the rows of its weights shifted."""


@dataclass(frozen=True)
class Run(Batch):
    """A batch in one variant."""

    variant: Variant
    lines: tuple[Line, ...]
    first_line: int
    """The number of the first of them in the text."""


def runs_of(
    text: Text, batch_size: int | None, variants: Sequence[Variant], ranks: Ranks = ALONE
) -> list[Run]:
    """The batches of a text for every variant, variant after variant; of several ranks a share."""
    batches = list(text.batches(batch_size))
    first_lines = accumulate((len(lines) for _, lines in batches), initial=0)
    mine = ranks.share(zip(batches, first_lines, strict=False))
    return [
        Run(batch.input_ids_BS, batch.mask_BS, batch.lengths, variant, lines, first_line)
        for variant in variants
        for (batch, lines), first_line in mine
    ]


class Track:
    """One set of weights, and the variants that run on it: each layer is loaded once for all.

    `codes` is where the source of the weights puts the codes of those that it has just loaded.
    """

    def __init__(
        self, model: LayerwiseModel, variants: Iterable[Variant], codes: dict[str, Coded]
    ) -> None:
        self.model = model
        self.variants = tuple(variants)
        self.stream = Stream([], [], [])
        self._codes = codes
        self._weights: Weights | None = None

    def weights(
        self, name: str, layer: nn.Module, consumed: Mapping[str, tuple[str, ...]]
    ) -> Weights:
        """Of the layer that is loaded, called `name`, until `forget`."""
        if self._weights is None:
            stored = self.model.loader.stored_names(name)
            self._weights = weights_of_layer(layer, name, stored, consumed, self._codes)
        return self._weights

    def forget(self) -> None:
        """Drop what is known of a layer, when all variants have run it."""
        self._weights = None
        self._codes.clear()

    def embed(self, text: Text, batch_size: int | None, ranks: Ranks = ALONE) -> None:
        """Start every variant on its own copy of the text, variant after variant; of several ranks
        each on its share of the batches."""
        self.stream = self.model.embed(runs_of(text, batch_size, self.variants, ranks))
