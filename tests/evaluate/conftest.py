from collections.abc import Callable
from pathlib import Path

import pytest
from evaluate_models import quantized, save_family

from ckptq.checkpoint.open import Checkpoint, open_checkpoint

Saved = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny checkpoint of a family, or (with a scheme) that one quantized; each is made once."""
    root = tmp_path_factory.mktemp("evaluate")

    def save(family: str, scheme: str | None = None, **changes) -> Checkpoint:
        source: Path = root / family
        if not source.exists():
            save_family(family, source)
        if scheme is None:
            return open_checkpoint(source)
        out = root / "-".join([family, scheme, *map(str, changes.values())])
        if not out.exists():
            quantized(source, scheme, out, **changes)
        return open_checkpoint(out)

    return save
