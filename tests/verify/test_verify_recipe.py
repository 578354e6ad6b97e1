"""config.json against the recipe.yaml that ckptq wrote: what leaves no trace in tensors too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families.cells import make, write_token_ids
from families.sources import save

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.group_size import with_group_size
from ckptq.recipes.load import load_scheme, load_text
from ckptq.recipes.scheme import Recipe
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


def differences(folder: Path) -> set[str]:
    found = verify(folder, headers_only=True).findings
    return {str(f.tensor) for f in found if f.code == "recipe-differs"}


def linear(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["linear"]
    return found


def move_half(config: dict[str, Any]) -> None:
    """The MLP to a group of its own, whose inputs are not quantized."""
    own = {**linear(config), "targets": ["re:.*down_proj$"], "input_activations": None}
    config["config_groups"] = {"mlp": own, **config["config_groups"]}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("linear.input_activations.num_bits",
         lambda c: linear(c)["input_activations"].update(num_bits=4)),
        ("linear.input_activations.strategy",
         lambda c: linear(c)["input_activations"].update(strategy="tensor")),
        ("linear.input_activations.type",
         lambda c: linear(c)["input_activations"].update(type="int")),
        ("linear.input_activations.symmetric",
         lambda c: linear(c)["input_activations"].update(symmetric=False)),
        ("linear.input_activations", lambda c: linear(c).update(input_activations=None)),
        ("linear.output_activations",
         lambda c: linear(c).update(output_activations={"num_bits": 8})),
        ("mlp.input_activations", move_half),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_group_that_was_changed_is_found_without_a_source(
    made: Callable[[str, str], Path], tmp_path: Path, family: str, field: str, change: Any
) -> None:
    if family == "mixtral" and change is move_half:
        pytest.skip("its down projections are called w2")
    out = made(family, "fp8-dynamic")
    assert differences(out) == set()
    assert differences(changed(out, tmp_path / "changed", change)) == {f"config_groups.{field}"}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: linear(c)["weights"].update(observer="mse"),
        lambda c: linear(c).update(targets=["re:.*proj$"]),
        lambda c: c.update(config_groups={"group_0": linear(c)}),
        lambda c: c["ignore"].append("model.layers.0.no_such_linear"),
    ],
    ids=["observer", "targets", "name", "ignore"],
)
def test_what_means_the_same_is_no_difference(
    made: Callable[[str, str], Path], tmp_path: Path, change: Any
) -> None:
    folder = changed(made("qwen2", "fp8-dynamic"), tmp_path / "changed", change)
    assert verify(folder, headers_only=True).findings == ()


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("ignored-but-quantized", lambda c: c["ignore"].append("re:.*mlp.*")),
        ("untargeted", lambda c: linear(c).update(targets=["re:.*mlp.*_proj$"])),
    ],
)
def test_ignore_and_targets_are_held_against_the_tensors(
    made: Callable[[str, str], Path], tmp_path: Path, code: str, change: Any
) -> None:
    folder = changed(made("qwen2", "fp8-dynamic"), tmp_path / "changed", change)
    assert code in {f.code for f in verify(folder, headers_only=True).findings}


def test_an_entry_taken_out_of_ignore_is_held_against_the_tensors(tmp_path: Path) -> None:
    request = QuantizeRequest(
        model=save("granite", tmp_path), recipe=load_scheme("w8a8"), out=tmp_path / "out",
        ignore=("re:.*down_proj$",),
    )  # fmt: skip
    out = quantize(request).out
    assert verify(out, headers_only=True).findings == ()
    folder = changed(out, tmp_path / "changed", lambda c: c.update(ignore=["lm_head"]))
    codes = {f.code for f in verify(folder, headers_only=True).findings}
    assert codes == {"targeted-but-unquantized"}


def test_a_cache_that_was_changed_is_found(
    made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = made("granite", "fp8-per-head")
    assert differences(out) == set()
    bare = changed(out, tmp_path / "bare", lambda c: c.update(kv_cache_scheme=None))
    assert differences(bare) == {"kv_cache_scheme"}
    int8 = changed(out, tmp_path / "int8", lambda c: c["kv_cache_scheme"].update(type="int"))
    assert differences(int8) == {"kv_cache_scheme.type"}


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


def test_scales_added_to_a_quantized_checkpoint_keep_its_groups(
    made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The recipe tells of the cache alone then, and of nothing else is there one."""
    weights, data = made("granite", "w8a8"), write_token_ids(tmp_path / "ids.jsonl")
    added = make(weights, "kv-fp8-per-head", tmp_path / "added", data).out
    assert added is not None
    assert verify(added).findings == ()
    free = lambda c: linear(c)["input_activations"].update(strategy="tensor")  # noqa: E731
    assert differences(changed(added, tmp_path / "free", free)) == set()
    bare = changed(added, tmp_path / "bare", lambda c: c.update(kv_cache_scheme=None))
    assert differences(bare) == {"kv_cache_scheme"}


def test_a_recipe_that_is_not_ckptqs_is_not_asked(
    made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = made("qwen2", "fp8-dynamic")
    for name, gone, text in (("other", "ckptq.json", None), ("odd", "recipe.yaml", "# nothing")):
        folder = changed(out, tmp_path / name, lambda c: linear(c).update(input_activations=None))
        (folder / gone).unlink()
        if text is not None:
            (folder / gone).write_text(text)
        assert differences(folder) == set()


OWN = """
default_stage:
  default_modifiers:
    QuantizationModifier:
      ignore: ["re:.*lm_head"]
      config_groups:
        attention:
          targets: ["re:.*self_attn.(q|k|v|o)_proj$"]
          weights: {num_bits: 8, type: float, strategy: channel}
          input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}
        mlp:
          targets: [Linear]
          weights: {num_bits: 4, type: int, strategy: group, group_size: 32, symmetric: false}
"""


def recipes() -> dict[str, Recipe]:
    schemes = ("FP8_DYNAMIC", "W4A16", "W8A8", "NVFP4A16", "mxfp8", "fp8-block", "w4a16-asym")
    made = {name: load_scheme(name) for name in schemes}
    sized = {f"g{n}": with_group_size(load_scheme("w4a16"), n) for n in (32, 64, -1)}
    return made | sized | {"own": load_text("own", OWN)}


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("family", ["llama", "llama4"])
@pytest.mark.parametrize("as_written", [False, True])
def test_every_scheme_agrees_with_its_recipe(
    tmp_path: Path, name: str, family: str, as_written: bool
) -> None:
    request = QuantizeRequest(
        model=save(family, tmp_path), recipe=recipes()[name], out=tmp_path / "out",
        as_written=as_written, ignore=("re:.*layers.0.*down_proj$",),
    )  # fmt: skip
    assert differences(quantize(request).out) == set()
    if family == "llama4":
        turned = replace(request, out=tmp_path / "turned", rope_order="half-split")
        assert differences(quantize(turned).out) == set()
