"""What mends a finding, as data: documents and tensors that change, and a sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.plan.unit import Unit
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Needs = Literal["source", "text", "convert", "choice"]
"""What a repair waits for: the unquantized model; text to calibrate on; another conversion; a
decision between several readings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A tensor whose bytes are computed when it is written."""

    spec: TensorSpec
    inputs: tuple[StoredTensor, ...]
    make: Callable[..., Tensor]
    """Gets the inputs as tensors, in their order."""

    def tensor(self, files: Files) -> Tensor:
        return self.make(*(read_tensor(stored, files) for stored in self.inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """A tensor that is converted again from the source, by the unit of a plan that makes it."""

    spec: TensorSpec
    unit: Unit


Change = StoredTensor | Made | Again | None
"""What a name stands for from now on: bytes as they are stored under whatever name, computed or
converted ones, or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """One repair, certain enough to be made."""

    code: str
    where: str | None
    said: str
    """What is done: "ignore: lm_head added"."""
    config: Mapping[str, Any] | None = None
    """config.json as it shall be."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    """Files beside the shards -> what they are copied from."""
    index: bool = False
    """The index is written anew from the shards' headers."""
    unmarked: bool = False
    """The marks of a RoPE order are removed."""

    anew: bool = False
    """Writing a new folder is the repair."""

    @property
    def of_documents(self) -> bool:
        """Whether config.json and the index are all that changes."""
        return not (self.changes or self.unmarked or self.files or self.anew)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A finding that is not repaired, and what its repair needs."""

    code: str
    where: str | None
    needs: Needs
    said: str


Outcome = Repair | Told
