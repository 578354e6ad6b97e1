"""The file of sensitivities: what was measured of which source, so that it is measured once.

{"ckptq search": "0.4", "about": {source, measure, text, ...},
 "losses": {scheme: {"recipe": digest, "sets": {set: loss}}},
 "trials": {digest of text and task: {digest of a recipe: [KL, accuracy]}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq import __version__
from ckptq.checkpoint.identity import lasting
from ckptq.errors import UsageError
from ckptq.files import json_bytes, read_small, write_whole
from ckptq.progress import Note
from ckptq.search.candidates import Candidates
from ckptq.text.samples import Samples

MARK = "ckptq search"
MOST_BYTES = 1 << 28
"""Of such a file; 500 sets in 4 schemes take 100 kB."""


@dataclass
class Kept:
    """Losses by scheme and set, and what they are losses of."""

    file: Path
    about: Mapping[str, Any]
    recipes: Mapping[str, str]
    """Scheme -> digest of its recipe; caches have none."""
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scheme -> set -> loss."""
    trials: dict[str, dict[str, tuple[float, float | None]]] = field(default_factory=dict)
    """Text -> recipe -> KL and accuracy of the whole model; by digests."""

    def write(self) -> None:
        losses = {
            scheme: {"recipe": self.recipes.get(scheme, ""), "sets": found}
            for scheme, found in self.losses.items()
        }
        said = {MARK: __version__, "about": self.about, "losses": losses, "trials": self.trials}
        write_whole(self.file, json_bytes(said))

    def put(self, scheme: str, name: str, loss: float) -> None:
        self.losses.setdefault(scheme, {})[name] = loss

    def lacks(self, scheme: str, name: str) -> bool:
        return name not in self.losses.get(scheme, {})


def open_kept(
    file: Path, candidates: Candidates, samples: Samples | None, options: Mapping[str, Any],
    note: Note,
) -> Kept:  # fmt: skip
    """What `file` holds of this search; empty, with a note, where it was measured of other things.

    UsageError for a file of another kind, which is not overwritten.
    """
    recipes = {
        scheme: hashlib.sha256(plan.recipe.text.encode()).hexdigest()
        for scheme, plan in candidates.plans.items()
    }
    made = Kept(file, _about(candidates, samples, options), recipes)
    if not file.exists():
        return made
    found = _read(file)
    if found.get(MARK) != __version__ or found["about"] != made.about:
        note(f"{file}: of another source, text or version; sensitivities are measured again")
        return made
    made.trials = dict(found.get("trials", {}))
    for scheme, entry in found["losses"].items():
        if recipes.get(scheme, entry["recipe"]) == entry["recipe"]:
            made.losses[scheme] = dict(entry["sets"])
            made.recipes = {scheme: entry["recipe"], **made.recipes}
    return made


def _about(
    candidates: Candidates, samples: Samples | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    text = None
    if samples is not None:
        tokens = sum(map(len, samples.token_ids))
        text = {"source": samples.source, "tokens": tokens, "sha256": samples.digest}
    ckpt = candidates.ckpt
    source = {"name": ckpt.name, "files": lasting(ckpt.path, ckpt.identities)}
    return {"source": source, "text": text, **options}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(file, MOST_BYTES))
    except ValueError:
        found = None
    if not isinstance(found, dict) or MARK not in found:
        raise UsageError(
            f"{file}: exists, and holds no sensitivities; move it, or choose another --output"
        )
    return found
