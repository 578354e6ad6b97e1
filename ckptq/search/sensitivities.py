"""What each set costs in each scheme: measured, kept as it is measured, and taken up again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptq.errors import PlanError
from ckptq.evaluate.text import Text
from ckptq.progress import Begin
from ckptq.search.caches import CacheLosses, Caches
from ckptq.search.candidates import PLAIN, Candidates, LinearSet
from ckptq.search.changed import CacheChange, Change
from ckptq.search.changed_rows import AnyChange, Rows
from ckptq.search.kept_losses import Kept
from ckptq.search.weight_errors import WeightErrors

SECONDS = 5.0
"""Between two writes of the file while weights are read."""

BROKEN = 1e6
"""Loss of a cache that breaks the model: more than all others together."""

Losses = Mapping[str, Mapping[str, float]]
"""Set -> scheme -> what it costs; PLAIN costs nothing."""


@dataclass(frozen=True)
class Sensitivities:
    """Measures what `kept` lacks, and keeps it."""

    candidates: Candidates
    kept: Kept
    device: str
    begin: Begin

    def of_weights(self) -> Losses:
        """Relative squared errors of the weights."""
        wanted, errors = dict(self._missing()), WeightErrors(self.candidates, self.device)
        report = self.begin("weights", sum(self._read_bytes(each) for each in wanted.values()))
        written = time.monotonic()
        for name, each in wanted.items():
            schemes = [s for s in self.candidates.plans if self.kept.lacks(s, name)]
            for scheme, loss in errors.measure(each, schemes).items():
                self.kept.put(scheme, name, loss)
            if time.monotonic() - written > SECONDS:
                self.kept.write()
                written = time.monotonic()
            report(name, self._read_bytes(each))
        self.kept.write()
        return self._losses()

    def of_text(self, text: Text, *, per_layer: bool) -> Losses:
        """KL at the end of the model, of each set alone; `per_layer` of all sets of a layer at
        once, which share it as the errors of their weights are."""
        missing = dict(self._missing())
        if not missing:
            return self._losses()
        rows = Rows(self.candidates, text, self.device)
        together = dict(self._together(rows, missing, per_layer))
        shares = self._shares(together)

        def keep(found: Mapping[AnyChange, float]) -> None:
            for change, kl in found.items():
                assert isinstance(change, Change)
                for each in together[change]:
                    share = shares[change.scheme, each.name]
                    self.kept.put(change.scheme, each.name, max(kl, 0.0) * share)
            self.kept.write()

        rows.measure(list(together), keep, self.begin)
        return self._losses()

    def of_caches(self, text: Text, caches: Caches) -> CacheLosses:
        """KL at the end of the model, of each layer's cache alone."""
        every = [CacheChange(cache, layer) for cache in caches.bits for layer in caches.values]
        missing = [each for each in every if self.kept.lacks(*_kept_as(each))]

        def keep(found: Mapping[AnyChange, float]) -> None:
            for change, kl in found.items():
                assert isinstance(change, CacheChange)
                self.kept.put(*_kept_as(change), max(kl, 0.0))
            self.kept.write()

        if missing:
            Rows(self.candidates, text, self.device).measure(missing, keep, self.begin)
        found: dict[str, dict[int, float]] = {cache: {} for cache in caches.bits}
        for each in every:
            of, name = _kept_as(each)
            loss = self.kept.losses[of][name]
            found[each.cache][each.layer] = loss if math.isfinite(loss) else BROKEN
        return found

    def _missing(self) -> Iterator[tuple[str, LinearSet]]:
        """The sets of which some scheme's loss is not known."""
        for each in self.candidates.sets:
            if any(s != PLAIN and self.kept.lacks(s, each.name) for s in each.nbytes):
                yield each.name, each

    def _together(
        self, rows: Rows, missing: Mapping[str, LinearSet], per_layer: bool
    ) -> Iterator[tuple[Change, list[LinearSet]]]:
        """Each change of the model that is measured, and the sets in it."""
        for scheme in self.candidates.plans:
            places: dict[int | str, list[LinearSet]] = {}
            for name, each in missing.items():
                if scheme in each.nbytes and self.kept.lacks(scheme, name):
                    place = rows.layers[each.linears[0]] if per_layer else name
                    places.setdefault(place, []).append(each)
            for sets in places.values():
                yield Change(scheme, tuple(n for each in sets for n in each.linears)), sets

    def _shares(
        self, together: Mapping[Change, Sequence[LinearSet]]
    ) -> Mapping[tuple[str, str], float]:
        """(scheme, set) -> its share of what its change costs."""
        found: dict[tuple[str, str], float] = {}
        errors = WeightErrors(self.candidates, self.device)
        for change, sets in together.items():
            if len(sets) == 1:
                found[change.scheme, sets[0].name] = 1.0
                continue
            own = [errors.measure(each, [change.scheme])[change.scheme] for each in sets]
            total = sum(own)
            for each, error in zip(sets, own, strict=True):
                found[change.scheme, each.name] = error / total if total else 1 / len(sets)
        return found

    def _losses(self) -> Losses:
        found = {each.name: dict(self._known(each)) for each in self.candidates.sets}
        if broken := [name for name, losses in found.items() if not losses]:
            raise PlanError(f"{broken[0]}: every scheme breaks the model; add {PLAIN} to --schemes")
        return found

    def _known(self, each: LinearSet) -> Iterator[tuple[str, float]]:
        """Of what can be chosen: a scheme that breaks the model cannot."""
        for scheme in each.nbytes:
            loss = 0.0 if scheme == PLAIN else self.kept.losses[scheme][each.name]
            if math.isfinite(loss):
                yield scheme, loss

    def _read_bytes(self, each: LinearSet) -> int:
        layout = next(iter(self.candidates.plans.values())).layout
        return sum(layout.linears[name].weight.spec.nbytes for name in each.linears)


def _kept_as(change: CacheChange) -> tuple[str, str]:
    """Where the file has it; a scheme may have the name of a cache."""
    return f"kv-cache {change.cache}", f"layer {change.layer}"
