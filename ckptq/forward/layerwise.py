"""A model's forward pass, one layer in memory at a time, equal to transformers' to the last bit.

The model runs once per batch with recorders in place of its decoder layers: they keep the
arguments (mask, position embeddings) that each layer would get. Then every layer in turn is
loaded, run on all batches and dropped. Between layers only the hidden states of all batches are
kept.

Shape letters: B batch, S positions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import SourceError
from ckptq.forward.decoded import weights_of
from ckptq.forward.loader import Loader
from ckptq.forward.reader import Reader
from ckptq.forward.record import (
    PASSED_ON,
    AllLayersSeen,
    LayerArguments,
    Memo,
    Moved,
    Recorder,
    WantsTuples,
    is_plain,
    layers_replaced,
    pass_on,
    unpacks_two,
)
from ckptq.forward.skeleton import Skeleton, build_skeleton
from ckptq.forward.source import WeightSource
from ckptq.models.refusals import family_code
from ckptq.text.samples import Batch

Watch = Callable[["nn.Module", Batch], "AbstractContextManager[None] | None"]
"""Makes the context in which a layer runs on a batch, for hooks; None where it does not run. Then,
and where the context swallows an error, the hidden states stay as they are."""

SHARE_OF_GPU = 0.25
"""Share of a GPU's free memory up to which hidden states stay there, saving two copies a layer."""


@dataclass
class Stream:
    """All batches on their way through the layers."""

    batches: list[Batch]
    hidden_BSE: list[Tensor]
    """One per batch, on `place`; replaced as layers run."""
    arguments: list[list[LayerArguments]]
    """[batch][layer]: arguments of the layer besides the hidden states."""
    place: torch.device | str = "cpu"
    """Where hidden states stay between layers."""
    pairs: bool = False
    """Whether a layer's result has a second part, which is an argument of the next."""
    quantized: list[Tensor] | None = None
    """Per batch, what quantized layers have made of it, where these run beside the others."""

    @property
    def resumable(self) -> bool:
        """False if layers pass on more than the hidden states (shared keys, values)."""
        return not self.pairs and all(is_plain(call) for calls in self.arguments for call in calls)


class LayerwiseModel:
    """A checkpoint that can be run layer by layer."""

    def __init__(self, skeleton: Skeleton, loader: Loader, device: torch.device) -> None:
        self.skeleton = skeleton
        self.loader = loader
        self.device = device
        self._layers = list(skeleton.layers.values())
        self._parts = 0
        """What the model expects of its layers: 0 the hidden states, 1 a tuple of them alone, as
        older families do, 2 with something behind them."""
        self.pairs = any(PASSED_ON in signature(each.forward).parameters for each in self._layers)
        """Whether a layer's result has a second part, which is an argument of the next."""

    @property
    def _family(self) -> str:
        return type(self.skeleton.model).__name__

    @property
    def layer_names(self) -> list[str]:
        """Module names of the decoder layers, in the order in which they run."""
        return list(self.skeleton.layers)

    def check_vocabulary(self, source: str, token_ids: Iterable[Sequence[int]]) -> None:
        """SourceError if one of these texts, which are of `source`, has a token that is not in it;
        a GPU would say so in words of its own, and be lost to the process."""
        text = self.skeleton.model.config.get_text_config(decoder=True)
        size, largest = getattr(text, "vocab_size", None), max(map(max, token_ids))
        if size is not None and largest >= size:
            raise SourceError(
                f"{source}: token id {largest} is outside the model's vocabulary of {size}"
            )

    def embed(self, batches: Iterable[Batch]) -> Stream:
        """Run everything before the first decoder layer, and record the layers' arguments."""
        given, memo = list(batches), Memo()
        stream = Stream(given, [], [], self._place(given), pairs=self.pairs)
        with self._outer_weights(), _no_grad():
            for batch in given:
                hidden_BSE, calls = self._record(batch)
                stream.hidden_BSE.append(hidden_BSE.to(stream.place))
                stream.arguments.append(memo.keep(calls))
        return stream

    def run_layer(
        self,
        index: int,
        stream: Stream,
        watch: Watch | None = None,
        after: Callable[[], None] | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Load one decoder layer, run every batch through it, drop it.

        `watch` makes the context in which the layer runs on a batch, for hooks; `after` is called
        when all have run. With `again` it changes the layer's weights, which are then loaded again:
        what comes out is what the changed layer makes of the same batches, unwatched.
        """
        name = self.layer_names[index]
        with self.loader.loaded(name), _no_grad():
            if again:
                for _ in self._results(index, stream, watch):
                    pass  # only watched
            else:
                self._advance(index, stream, watch)
            if after is not None:
                after()
        if again:
            with self.loader.loaded(name), _no_grad():
                self._advance(index, stream, None)

    def _advance(self, index: int, stream: Stream, watch: Watch | None) -> None:
        """Put what the layer makes of the batches in their place."""
        if index + 1 < len(self.layer_names):
            self.loader.announce(self.layer_names[index + 1])
        for number, result in enumerate(self._results(index, stream, watch)):
            hidden_BSE = result[0] if isinstance(result, tuple) else result
            stream.hidden_BSE[number] = hidden_BSE.to(stream.place)
            calls = stream.arguments[number]
            calls[index] = ((), {})
            if self.pairs and isinstance(result, tuple):
                pass_on(result[1], calls[index + 1 :])

    def _results(self, index: int, stream: Stream, watch: Watch | None) -> Iterator[Any]:
        """What the layer makes of each batch: hidden states [B, S, E], or a tuple of which they
        are the first."""
        name = self.layer_names[index]
        layer, moved = self.skeleton.layers[name], Moved(self.device)
        for number, hidden_BSE in enumerate(stream.hidden_BSE):
            result: Any = hidden_BSE
            context = nullcontext() if watch is None else watch(layer, stream.batches[number])
            if context is not None:
                args, kwargs = moved(stream.arguments[number][index])
                with context:
                    result = self._through(layer, name, hidden_BSE.to(self.device), args, kwargs)
            yield result

    def _through(
        self,
        layer: nn.Module,
        name: str,
        hidden_BSE: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with family_code(self.loader.label, f"{self._family} in {name}"):
            return layer(hidden_BSE, *args, **kwargs)

    def head(self, stream: Stream) -> Iterator[Tensor]:
        """Logits [B, S, V] of each batch: the final norm and the output head."""
        with self._outer_weights(), _no_grad():
            for number, batch in enumerate(stream.batches):
                yield self._finish(batch, stream.hidden_BSE[number].to(self.device))

    def _place(self, batches: list[Batch]) -> torch.device:
        """Where hidden states stay between layers: on a GPU only if they take little of it."""
        if self.device.type != "cuda":
            return torch.device("cpu")
        width = self.skeleton.model.config.get_text_config(decoder=True).hidden_size
        tokens = sum(batch.input_ids_BS.numel() for batch in batches)
        free, _ = torch.cuda.mem_get_info(self.device)
        fits = tokens * width * self.skeleton.dtype.itemsize < SHARE_OF_GPU * free
        return self.device if fits else torch.device("cpu")

    def _record(self, batch: Batch) -> tuple[Tensor, list[LayerArguments]]:
        """Run the model up to its last layer; the layers only record their arguments."""
        while True:
            try:
                recorder = self._recorded(batch)
                return recorder.hidden_states(), recorder.calls
            except WantsTuples:
                self._parts = 1
            except SourceError as error:
                if self._parts == 2 or not unpacks_two(error.__cause__):
                    raise
                self._parts = 2

    def _recorded(self, batch: Batch) -> Recorder:
        recorder = Recorder(self._family, len(self.layer_names), self._answer)
        with layers_replaced(self._layers, recorder), suppress(AllLayersSeen):
            self._call(batch)
        return recorder

    def _answer(self, hidden_BSE: Tensor) -> Any:
        """Hidden states as a layer returns them."""
        return hidden_BSE if self._parts == 0 else (hidden_BSE, None)[: self._parts]

    def _finish(self, batch: Batch, hidden_BSE: Tensor) -> Tensor:
        """Run the model with layers that only return the last layer's hidden states."""

        def given(*_: Any, **__: Any) -> Any:
            return self._answer(hidden_BSE)

        with layers_replaced(self._layers, given):
            logits_BSV: Tensor = self._call(batch).logits
        return logits_BSV

    def _call(self, batch: Batch) -> Any:
        ids_BS, mask_BS = batch.input_ids_BS.to(self.device), batch.mask_BS.to(self.device)
        with family_code(self.loader.label, f"{self._family} outside its decoder layers"):
            return self.skeleton.model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)

    @contextmanager
    def _outer_weights(self) -> Iterator[None]:
        """Modules outside the decoder layers have weights only while they are called.

        So a vision tower that text never reaches is never read.
        """
        inner = {id(m) for layer in self.skeleton.layers.values() for m in layer.modules()}
        loaded: list[str] = []

        def load_before(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if name not in loaded:
                    self.loader.load(name, recurse=False)
                    loaded.append(name)

            return hook

        with ExitStack() as stack:
            for name, module in self.skeleton.model.named_modules():
                if id(module) not in inner and _has_own_weights(module):
                    handle = module.register_forward_pre_hook(load_before(name))
                    stack.callback(handle.remove)
            try:
                yield
            finally:
                for name in loaded:
                    self.loader.unload(name, recurse=False)


def open_model(
    ckpt: Checkpoint,
    device: str = "cpu",
    weights: WeightSource | None = None,
    eager: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    attention: bool = True,
) -> LayerwiseModel:
    """Open a checkpoint for running, dequantized if it is quantized; reads only the headers now.

    `weights` replaces the checkpoint's own tensors: same names and shapes, other values. `eager`
    uses the family's eager attention instead of SDPA: the same up to rounding, but slower. `dtype`
    runs it in another one than the config's. Without `attention` a model whose q, k and v cannot be
    seen will do.
    """
    where = torch.device(device)
    source = weights_of(ckpt, Reader(where)) if weights is None else weights
    skeleton = build_skeleton(ckpt, where, eager, trust_remote_code, dtype, attention)
    with family_code(source.label, f"{type(skeleton.model).__name__}'s map of names"):
        loader = Loader(skeleton, source, where)
    return LayerwiseModel(skeleton, loader, where)


def _has_own_weights(module: nn.Module) -> bool:
    parameters: Mapping[str, Any] = module._parameters
    persistent = set(module._buffers) - module._non_persistent_buffers_set
    return any(p is not None for p in parameters.values()) or bool(persistent)


@contextmanager
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
