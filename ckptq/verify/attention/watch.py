"""A short forward pass of the source, which measures q, k and v under the checkpoint's scales.

The model runs layer by layer (ckptq.forward.layerwise), with a tap that repeats each attention with
q, k and v in FP8: with the stored scales, with 1.0, and with one scale for all heads. Of latent
attention it measures the row that is cached, and does not repeat anything. On a GPU that
is attention over a paged FP8 cache, as in `evaluate`; on a CPU, and where kernels do not know a
family's attention (sinks), its own attention of rounded q, k and v. Only the exact result is
passed on.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ckptq.checkpoint.read import Files, read_tensor
from ckptq.forward.latent import Latents
from ckptq.forward.over_pages import over_static_fp8, pages_serve
from ckptq.forward.tap import Asked, Attend, Qkv, Tap, tapped
from ckptq.models.attention import LATENT_COUNTS
from ckptq.models.heads import by_side
from ckptq.spec import FLOATS
from ckptq.verify.attention.fp8_heads import Choices, HeadSums, OutputSums, in_fp8
from ckptq.verify.report import HeadResult, LayerResult
from ckptq.verify.subject import Subject

if TYPE_CHECKING:
    from torch import nn

    from ckptq.forward.layerwise import LayerwiseModel
    from ckptq.text.samples import Batch


@dataclass(slots=True)
class Watch:
    """What has been seen of every attention layer whose scales are on disk."""

    choices: Mapping[str, dict[str, Choices]]
    """Attention module on disk -> "q", "k", "v" -> scales."""
    on_disk: Callable[[str], str]
    """Name of a module of the running model -> its name on disk."""
    in_pages: bool = False
    """Whether FP8 attention is that of the kernels."""
    heads: dict[tuple[str, str], HeadSums] = field(default_factory=dict)
    outputs: dict[str, OutputSums] = field(default_factory=dict)

    @contextmanager
    def layer(self, name: str, layer: nn.Module, batch: Batch) -> Iterator[None]:
        """The context in which a decoder layer runs on a batch."""
        latents = Latents(layer, name)
        compare = self._compare if not latents else partial(self._see_row, latents)
        with latents.watched(), tapped(layer, name, Tap(batch.lengths, compare=compare)):
            yield

    def _see_row(self, latents: Latents, module: str, qkv: Qkv, *_: object) -> None:
        """The row of latent attention, which is read as k and as v."""
        for which, choices in self.choices.get(self.on_disk(module), {}).items():
            if module in latents:
                sums = self.heads.setdefault((self.on_disk(module), which), HeadSums(choices))
                sums.add(latents.row(module, qkv[1]))

    def _compare(self, module: str, qkv: Qkv, exact: Tensor, attend: Attend, asked: Asked) -> None:
        name = self.on_disk(module)
        choices = self.choices.get(name, {})
        if len(choices) < len(qkv):
            return
        named = dict(zip("qkv", qkv, strict=True))
        for which, x_BHSD in named.items():
            self.heads.setdefault((name, which), HeadSums(choices[which])).add(x_BHSD)
        words = asked() if self.in_pages and qkv[1].shape == qkv[2].shape else None
        others = []
        for index in range(3):
            scales = {w: c.all()[index].to(exact.device) for w, c in choices.items()}
            if words is not None:
                others.append(over_static_fp8(qkv, scales, words))
            else:
                others.append(attend(*_rounded(named, scales))[0])
        self.outputs.setdefault(name, OutputSums()).add(exact, others)


def _rounded(qkv: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> list[Tensor]:
    return [in_fp8(x, scales[which][:, None, None]).to(x.dtype) for which, x in qkv.items()]


def watch_of(subject: Subject, model: LayerwiseModel) -> Watch:
    """What is to see every layer of the source's model as it runs."""
    return Watch(_choices(subject), model.loader.stored_module, pages_serve(model.device))


def _choices(subject: Subject) -> dict[str, dict[str, Choices]]:
    """Scales for each head, also where one is stored for all; 1.0 where there is none."""
    found: dict[str, dict[str, Choices]] = {}
    with Files() as files:
        for module, kind in subject.attention.items():
            heads = subject.heads_in(module)
            counts = by_side(heads) if heads else {}
            for which, count in (LATENT_COUNTS if kind == "latent" else counts).items():
                tensor = subject.cache_scales.get((module, which))
                scale = torch.ones(1)
                if tensor is not None and tensor.spec.dtype in FLOATS:
                    scale = read_tensor(tensor, files).reshape(-1).float()
                usable = len(scale) in (1, count) and bool((scale.isfinite() & (scale > 0)).all())
                if usable:
                    stored = scale.expand(count) if len(scale) == 1 else scale
                    found.setdefault(module, {})[which] = Choices(stored=stored)
    return found


def head_results(watch: Watch) -> list[HeadResult]:
    """One row for each head, in the order of the layers."""
    rows = []
    for (module, which), sums in watch.heads.items():
        errors = sums.errors_3H
        for head in range(len(sums.amax_H)):
            rows.append(
                HeadResult(
                    module=module,
                    which=which,
                    head=head,
                    scale=float(sums.choices.stored[head]),
                    amax=float(sums.amax_H[head]),
                    saturated=float(sums.saturated_H[head]) / max(sums.counted, 1),
                    underflowed=float(sums.underflowed_H[head] / sums.nonzero_H[head].clamp(min=1)),
                    error=float(errors[0, head]),
                    error_unscaled=float(errors[1, head]),
                    error_shared=float(errors[2, head]),
                )
            )
    return rows


def layer_results(watch: Watch) -> list[LayerResult]:
    """One row for each layer."""
    return [
        LayerResult(module=name, error=e[0], error_unscaled=e[1], error_shared=e[2])
        for name, e in ((name, sums.errors) for name, sums in watch.outputs.items())
    ]
