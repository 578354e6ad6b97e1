"""One forward pass of the source, layer by layer, for all that only text can tell: q, k and v under
the stored scales, and whether codes that GPTQ chose are choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ckptq.checkpoint.read import Files
from ckptq.device import find_device
from ckptq.errors import UsageError
from ckptq.forward.layerwise import LayerwiseModel, open_model
from ckptq.gptq.gathered import Gathered
from ckptq.optional import require_llmcompressor
from ckptq.text.samples import Batch, read_samples
from ckptq.verify.attention.cache_diagnosis import diagnose_cache
from ckptq.verify.attention.watch import head_results, layer_results, watch_of
from ckptq.verify.kinds import finding
from ckptq.verify.options import Text
from ckptq.verify.report import ByText, Finding
from ckptq.verify.roundtrip.chosen_codes import damage
from ckptq.verify.roundtrip.stream import whole
from ckptq.verify.roundtrip.undo import Undo, make_undo
from ckptq.verify.roundtrip.verdict import CHOSEN
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

FOR_ATTENTION, FOR_CODES = (4, 256), (8, 512)
"""Samples, and tokens of each: enough to excite every head, and to tell choices from damage."""


def check_by_text(subject: Subject, linears: Mapping[str, StoredLinear], text: Text) -> ByText:
    """Run the source; `linears` are those that nothing else is known to be wrong with.

    UsageError for text that nothing asks for.
    """
    assert subject.source is not None
    chosen = [one for one in linears.values() if one.module.chosen and one.module.origin]
    if text.data is None:
        chosen = []
    elif not chosen and not text.attention:
        raise UsageError(
            f"--data {text.data}: no codes of {subject.ckpt.path} are said to be chosen by text; "
            "add --attention, or leave it out"
        )
    if chosen:
        require_llmcompressor("the sums of inputs that chosen codes are judged by")
    samples, seq_len = FOR_CODES if chosen else FOR_ATTENTION
    read = read_samples(
        text.data,
        subject.source.path,
        samples=text.samples or samples,
        seq_len=text.seq_len or seq_len,
    )
    device = str(find_device(text.device))
    model = open_model(subject.source, device, attention=text.attention)
    model.check_vocabulary(read.source, read.token_ids)
    stream = model.embed(read.batches(1))
    watch = watch_of(subject, model) if text.attention else None
    judges = _Judges(model, chosen, make_undo(subject), text.data)

    @contextmanager
    def watched(name: str, layer: nn.Module, batch: Batch) -> Iterator[None]:
        with ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watch.layer(name, layer, batch))
            stack.enter_context(judges.watched(name, layer, batch))
            yield

    for index, name in enumerate(model.layer_names):
        model.run_layer(index, stream, partial(watched, name), partial(judges.judge, name))
    if watch is None:
        return ByText(findings=tuple(judges.findings), judged=judges.judged)
    return ByText(
        findings=(*diagnose_cache(watch), *judges.findings),
        heads=tuple(head_results(watch)),
        layers=tuple(layer_results(watch)),
        judged=judges.judged,
    )


@dataclass
class _Judges:
    """Of the chosen codes, layer by layer."""

    model: LayerwiseModel
    chosen: list[StoredLinear]
    undo: Undo
    label: str | None
    findings: list[Finding] = field(default_factory=list)
    judged: int = 0

    def __post_init__(self) -> None:
        origins = ((one.module.origin, one) for one in self.chosen)
        self._by_origin = {origin.name: one for origin, one in origins if origin is not None}
        self._gathered = Gathered()

    def _of(self, layer: str) -> set[str]:
        inside = f"{self.model.loader.stored_module(layer)}."
        return {name for name in self._by_origin if name.startswith(inside)}

    @contextmanager
    def watched(self, name: str, layer: nn.Module, batch: Batch) -> Iterator[None]:
        with self._gathered.watched(self.model, name, layer, batch, self._of(name)):
            yield

    def judge(self, layer: str) -> None:
        """What has run on all batches. Left alone is a Linear that no token reached, and one whose
        codes another tool may have chosen for a few massive tokens."""
        with Files() as files:
            for names in self._gathered.in_turn(self._of(layer)):
                for name in sorted(names):
                    linear, moments = self._by_origin[name], self._gathered.seen.take(name)
                    if moments is not None and not (moments.left_out and linear.module.by_all):
                        self._judge(linear, moments.hessian(), files)
        self._gathered = Gathered()

    def _judge(self, linear: StoredLinear, hessian_CC: Tensor, files: Files) -> None:
        self.judged += 1
        w_RC, held = whole(linear, files, self.undo)
        module = linear.module
        said = damage(
            *(w_RC, held, linear.scheme, hessian_CC),
            refitted=module.refitted,
            rows=not module.by_layer,
        )
        if said:
            found = f"{', '.join(said)} that no other codes make up for, by {self.label}"
            tensor = linear.tensors[linear.scheme.codes]
            self.findings.append(finding("codes-corrupt", tensor, found=found, wanted=CHOSEN))
