"""Every family through quantize, and back in transformers: weights and logits are the source's.

The judge is transformers itself: `from_pretrained` of the result must fill every parameter and
leave no tensor over, what compressed-tensors decompresses is within the format's noise, and the
logits are no further off than random noise of that size puts them. What transformers cannot load
has to be said by the plan before the work, or refused by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CompressedTensorsConfig

from ckptq.checkpoint.open import open_checkpoint
from ckptq.engines.table import load_table
from ckptq.verify.run import verify
from families.cells import NOISE, cells, make, quiet, write_token_ids
from families.sources import FAMILIES, HANDMADE, save

MB = 2**20

TOWER_SCALE = re.compile(r"vision.*\.[kv]_scale$")

LAYER = re.compile(r".*?\blayers\.\d+\.")

FARTHER = 3.0
"""How much farther than under random noise logits may lie: routers may choose otherwise."""

IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))

UNLOADABLE = ("transformers loads the experts", "transformers cannot r")
"""How the plan says that the result is for vLLM alone: transformers cannot read it, or run it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_ids(tmp_path_factory.mktemp("data") / "ids.jsonl")


IN_TRANSFORMERS = [family for family in FAMILIES if family not in HANDMADE]


@pytest.mark.parametrize(("family", "scheme"), cells(IN_TRANSFORMERS))
def test_a_family_comes_back_in_transformers(
    sources: Path, data: Path, tmp_path: Path, family: str, scheme: str
) -> None:
    source = save(family, sources)
    theirs = loaded(source)
    if theirs is None:
        pytest.skip("transformers does not load the source itself")
    made = make(source, scheme, tmp_path / "out", data)
    if made.out is None:
        assert len(made.refusal) > 20
        return
    for report in (verify(made.out), verify(made.out, source)):
        assert not report.findings, "verify finds a fault in what quantize has written"
    ours = loaded(made.out)
    if any(said in note for note in made.notes for said in UNLOADABLE):
        seen = ours is None or ours.missing or ours.unexpected
        assert seen or verify(made.out, engine="transformers").findings, "not vLLM's alone"
        return
    assert ours is not None, "transformers does not load the result"
    # compressed-tensors gives every attention module k and v scales, towers without a cache too
    missing = [name for name in ours.missing if not TOWER_SCALE.search(name)]
    assert missing == theirs.missing
    ours_left, theirs_left = (without_strange_layers(x.unexpected, theirs) for x in (ours, theirs))
    assert ours_left == theirs_left
    worst = max(errors(theirs.parameters, ours.parameters), default=(0.0, ""))
    assert worst[0] < NOISE[scheme], worst
    if theirs.logits_BTV is not None:
        assert ours.logits_BTV is not None, "transformers runs the source, and not the result"
        found = distance(ours.logits_BTV, theirs.logits_BTV)
        assert found < FARTHER * under_noise(theirs, NOISE[scheme])


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_parameters"])
def test_logits_show_what_no_weight_shows(
    sources: Path, data: Path, tmp_path: Path, field: str
) -> None:
    """The twin: the same weights under a config that lost its way."""
    source = save("llama", sources)
    made = make(source, "fp8-dynamic", tmp_path / "out", data)
    assert made.out is not None
    config = json.loads((made.out / "config.json").read_text())
    config[field] = {
        "rms_norm_eps": 10.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.01},
    }[field]
    (made.out / "config.json").write_text(json.dumps(config))
    ours, theirs = loaded(made.out), loaded(source)
    assert ours is not None
    assert theirs is not None
    assert ours.logits_BTV is not None
    assert theirs.logits_BTV is not None
    assert max(errors(theirs.parameters, ours.parameters))[0] < NOISE["fp8-dynamic"]
    found = distance(ours.logits_BTV, theirs.logits_BTV)
    assert found > FARTHER * under_noise(theirs, NOISE["fp8-dynamic"])


def test_every_family_is_small_and_was_asked(sources: Path) -> None:
    table = load_table()
    asked = {*table.architectures, *table.content["failed"]}
    for family in FAMILIES:
        folder = save(family, sources)
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        assert architecture in asked, family
        assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 20 * MB, family
        assert open_checkpoint(folder).tensors, family


class Loaded:
    """A model as transformers has it, its weights decompressed, and its logits of `IDS`."""

    def __init__(self, model: Any, info: dict[str, Any]) -> None:
        self.missing = sorted(info["missing_keys"])
        self.unexpected = sorted(info["unexpected_keys"])
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.logits_BTV = logits(model)


def logits(model: Any) -> torch.Tensor | None:
    """In float32; None where transformers cannot run the model."""
    try:
        with quiet(), torch.no_grad():
            return torch.as_tensor(model.eval().float()(input_ids=IDS).logits)
    except Exception:  # a family's own code raises many kinds
        return None


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def under_noise(theirs: Loaded, level: float) -> float:
    """How far random noise of this relative size on every matrix moves the logits of a source."""
    assert theirs.logits_BTV is not None
    return max(distance(noisy_logits(theirs, level, seed), theirs.logits_BTV) for seed in (1, 2))


@torch.no_grad()
def noisy_logits(theirs: Loaded, level: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrices = [w for n, w in theirs.parameters.items() if w.dim() >= 2 and "embed" not in n]
    before = [weight.clone() for weight in matrices]
    for weight in matrices:
        noise = torch.randn(weight.shape, generator=generator)
        weight.add_(noise, alpha=level * float(weight.std()))
    found = logits(theirs.model)
    for weight, whole in zip(matrices, before, strict=True):
        weight.copy_(whole)
    assert found is not None
    return found


def without_strange_layers(names: list[str], source: Loaded) -> list[str]:
    """Without those of the layers that transformers does not build of the source either (MTP): it
    reports their experts fused or one by one, as it happens."""
    strange = {match[0] for name in source.unexpected if (match := LAYER.match(name))}
    return [name for name in names if not ((match := LAYER.match(name)) and match[0] in strange)]


def loaded(folder: Path) -> Loaded | None:
    """None where transformers raises."""
    return _source(folder) if folder.name != "out" else _load(folder)


@lru_cache(maxsize=1)
def _source(folder: Path) -> Loaded | None:
    return _load(folder)


def _load(folder: Path) -> Loaded | None:
    own_class = model_class(folder)
    if own_class is None:
        return None
    options: dict[str, Any] = {"dtype": torch.bfloat16, "output_loading_info": True}
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with quiet():
            return Loaded(*own_class.from_pretrained(folder, **options))
    except Exception:  # transformers and the libraries under it raise many kinds
        return None


def model_class(folder: Path) -> Any:
    """transformers' class of a checkpoint, None where it has none."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0], None)


def errors(
    theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]
) -> Iterator[tuple[float, str]]:
    """The relative error of every weight, with its name; infinite where it is not there."""
    for name, wanted in theirs.items():
        found = ours.get(name)
        if found is None or found.shape != wanted.shape:
            yield _of_experts(name, wanted, ours), name
        elif wanted.norm() > 0:
            yield float((found.float() - wanted.float()).norm() / wanted.float().norm()), name


def _of_experts(name: str, wanted: torch.Tensor, ours: dict[str, torch.Tensor]) -> float:
    """Of a fused tensor that transformers has taken apart: Llama-4's [E, H, 2I] and [E, I, H]."""
    experts, _, which = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
    names = [[f"{experts}.{e}.{p}.weight" for p in parts] for e in range(wanted.shape[0])]
    if not all(n in ours for expert in names for n in expert):
        return float("inf")
    found = torch.stack([torch.cat([ours[n].t() for n in expert], dim=1) for expert in names])
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
