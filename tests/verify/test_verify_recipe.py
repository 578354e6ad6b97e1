"""config.json against the recipe.yaml that ckptq wrote: what leaves no trace in tensors too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.cells import make, write_token_ids
from families.sources import save

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("recipes")

    def build(family: str, scheme: str) -> Path:
        out = root / f"{family}-{scheme}"
        if not out.exists():
            made = make(save(family, root), scheme, out, write_token_ids(root / "ids.jsonl"))
            assert made.out is not None, made.refusal
        return out

    return build


def changed(out: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["linear"]
    return found


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("input_activations.num_bits", lambda c: group(c)["input_activations"].update(num_bits=4)),
        ("input_activations.strategy",
         lambda c: group(c)["input_activations"].update(strategy="tensor")),
        ("input_activations.type", lambda c: group(c)["input_activations"].update(type="int")),
        ("input_activations", lambda c: group(c).update(input_activations=None)),
        ("weights.observer", lambda c: group(c)["weights"].update(observer="mse")),
        ("output_activations", lambda c: group(c).update(output_activations={"num_bits": 8})),
        ("targets", lambda c: group(c).update(targets=["re:.*proj$"])),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_group_that_was_changed_is_found_without_a_source(
    made: Callable[[str, str], Path], tmp_path: Path, family: str, field: str, change: Any
) -> None:
    out = made(family, "fp8-dynamic")
    assert verify(out).ok
    found = verify(changed(out, tmp_path / "changed", change), headers_only=True).findings
    assert f"config_groups.linear.{field}" in {
        f.tensor for f in found if f.code == "recipe-differs"
    }


def test_a_cache_that_was_changed_is_found(
    made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = made("granite", "fp8-per-head")
    assert verify(out).ok
    bare = changed(out, tmp_path / "bare", lambda c: c.update(kv_cache_scheme=None))
    found = {f.tensor for f in verify(bare).findings if f.code == "recipe-differs"}
    assert found == {"kv_cache_scheme"}
    other = changed(out, tmp_path / "other", lambda c: c["kv_cache_scheme"].update(observer="mse"))
    found = {f.tensor for f in verify(other).findings if f.code == "recipe-differs"}
    assert found == {"kv_cache_scheme.observer"}


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama4", "w4a16-g32"), ("gemma4_e", "fp8-per-head"), ("mimo_v2_flash", "fp8-per-head"),
     ("mistral", "w8a8"), ("qwen3_moe", "nvfp4a16")],
)  # fmt: skip
def test_what_the_plan_changed_is_no_difference(
    made: Callable[[str, str], Path], family: str, scheme: str
) -> None:
    """Groups that it added for q/k, one scale a layer where heads differ."""
    assert verify(made(family, scheme)).findings == ()


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16", "mxfp8", "fp8-block"])
def test_presets_and_other_formats_agree_with_their_recipe(tmp_path: Path, scheme: str) -> None:
    source = save("llama", tmp_path)
    out = quantize(QuantizeRequest(model=source, recipe=load_scheme(scheme), out=tmp_path / "out"))
    assert verify(out.out, headers_only=True).findings == ()
