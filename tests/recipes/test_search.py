"""`--search`, and scheme names with "-search": the recipe, what it writes, and what verify says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import UsageError
from ckptq.quantize import formats
from ckptq.recipes.load import built_in, load_scheme, load_text
from ckptq.recipes.searched import with_search
from ckptq.verify.run import verify

WEIGHTLESS = ("kv-fp8-per-head", "kv-fp8-per-tensor")
PER_TENSOR = ("fp8-static",)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) ** 3 * 0.02)  # outliers in each row
    folder = tmp_path_factory.mktemp("search") / "llama"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", sorted(built_in()))
def test_the_recipe_names_the_observer_as_llm_compressor_reads_it(scheme: str) -> None:
    if scheme in (*WEIGHTLESS, *PER_TENSOR):
        with pytest.raises(UsageError, match="has no weights with scales of rows"):
            load_scheme(f"{scheme}-search")
        return
    recipe = load_scheme(f"{scheme}-search")
    assert recipe.name == f"{scheme}-search"
    again = load_text(recipe.name, recipe.text)
    observers = [g.weights.observer for g in recipe.groups if g.weights is not None]
    assert observers == [g.weights.observer for g in again.groups if g.weights is not None]
    assert all(observer and "mse" in observer for observer in observers)
    schemes = [g.weight_scheme() for g in again.groups if g.weights is not None]
    assert all(each.search is not None for each in schemes)
    assert schemes == [g.weight_scheme() for g in recipe.groups if g.weights is not None]


def test_a_recipe_that_searches_already_is_left_alone() -> None:
    pytest.importorskip("llmcompressor")
    with pytest.raises(UsageError, match="--search"):
        with_search(load_scheme("w4a16-search"))
    awq = {"AWQModifier": {}, "QuantizationModifier": {"targets": ["Linear"], "scheme": "W4A16"}}
    text = yaml.safe_dump({"quantization_stage": {"quantization_modifiers": awq}})
    with pytest.raises(UsageError, match="runs in llm-compressor"):
        with_search(load_text("awq", text))


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-asym", "nvfp4a16", "mxfp4a16", "fp8-dynamic", "w8a8"]
)
def test_less_is_lost_and_verify_proves_every_scale(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    losses = {}
    for name in (scheme, f"{scheme}-search"):
        out = tmp_path / name
        quantize(QuantizeRequest(model=source, recipe=load_scheme(name), out=out))
        report = verify(out, source)
        assert report.findings == ()
        assert {note.code for note in report.notes} <= {"low-snr"}  # outliers cost that
        losses[name] = sum(tensor.snr_db for tensor in report.tensors)
    assert losses[f"{scheme}-search"] >= losses[scheme]


def test_verify_notices_a_scale_that_the_search_does_not_give(source: Path, tmp_path: Path) -> None:
    """The twin: the plain minimum and maximum, under a config that says mse."""
    plain, searched = tmp_path / "plain", tmp_path / "searched"
    for out, name in ((plain, "w4a16-g32"), (searched, "w4a16-g32-search")):
        quantize(QuantizeRequest(model=source, recipe=load_scheme(name), out=out))
    save_file(load_file(plain / "model.safetensors"), searched / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    found = verify(searched, source)
    assert [n for n in (*found.notes, *found.findings) if n.code == "scale-differs"]


def test_mxfp4_tries_the_exponent_above_and_the_one_below() -> None:
    """E8M0 rounded up is a candidate: it wins where 6.9 ends at 6 under both, as it comes first."""
    scheme = load_scheme("mxfp4a16-search").groups[0].weight_scheme()
    plain = load_scheme("mxfp4a16").groups[0].weight_scheme()
    w_RC = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    w_RC[0, :32] = torch.tensor([6.9] + [0.0] * 31)
    searched, own = (
        formats.quantize(w_RC.bfloat16(), s)["weight_scale"].int() for s in (scheme, plain)
    )
    assert (searched - own)[0, 0] == 1
    assert set((searched - own)[1:].unique().tolist()) == {-1, 0}
