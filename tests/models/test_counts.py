"""A config that asks for more layers than any model has is told so, before they are built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from families.sources import save

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError
from ckptq.models.tree.transformers_model import read_config
from ckptq.models.witnesses import read_witnesses


def changed(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1 << 31},
        {"num_hidden_layers": 1e9},
        {"num_local_experts": 1 << 40},
        {"vision_config": {"depth": 1 << 31}},
    ],
)
def test_too_many_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    folder = changed(save("llama", tmp_path), **fields)
    with pytest.raises(SourceError, match="no model has more than"):
        read_config(open_checkpoint(folder))
    assert read_witnesses(open_checkpoint(folder)).tree is None


def test_as_many_as_models_have_are_read(tmp_path: Path) -> None:
    """Also sizes that count no modules, and are large."""
    fields = {"num_hidden_layers": 256, "num_experts": 16_384, "expert_intermediate_size": 1 << 20}
    folder = changed(save("llama", tmp_path), **fields)
    assert read_config(open_checkpoint(folder)).num_hidden_layers == 256


def test_no_config_that_transformers_has_is_refused() -> None:
    """Of what generates text; all others would take as long to import as to ask."""
    from transformers.models.auto import modeling_auto as auto

    from ckptq.models.tree import counts

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    asked = 0
    for name in names:
        try:
            config = transformers.CONFIG_MAPPING[name]().to_dict()
        except Exception:  # some want more than their defaults
            continue
        asked += 1
        counts.check_config("config.json", config)
    assert asked > 200
