from collections.abc import Callable
from pathlib import Path

import pytest
from calibrate_models import make

from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.forward.layerwise import LayerwiseModel

Saved = Callable[[str], Checkpoint]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny checkpoint of a family, saved by transformers, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save(family: str) -> Checkpoint:
        path: Path = root / family
        if not path.exists():
            make(family).save_pretrained(path)
        return open_checkpoint(path)

    return save


@pytest.fixture
def run_layers(monkeypatch) -> list[int]:
    """Which layers are run, in order."""
    ran: list[int] = []
    run_layer = LayerwiseModel.run_layer

    def counted(self, index, *args):
        run_layer(self, index, *args)
        ran.append(index)

    monkeypatch.setattr(LayerwiseModel, "run_layer", counted)
    return ran
