"""NVFP4's global scale of inputs: 448 * 6 / the largest input, as llm-compressor writes it."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from calibrate_models import samples_of
from calibrate_oneshot import Tensors, no_eager_switch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_calibrate_inputs import on_disk
from tiny.oneshot import calibration
from tiny.rows import token_rows, write_rows
from tiny.tensors import tensors_in

from ckptq.calibrate.observers import NVFP4_MAX, make_observer
from ckptq.calibrate.request import CalibrationRequest
from ckptq.calibrate.run import calibrate
from ckptq.calibrate.statistics import Statistics, Wanted
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.recipes.load import load_scheme

ROWS = token_rows([24] * 4)
GLOBAL = ".input_global_scale"


def oneshot_folder(ckpt: Checkpoint, out: Path) -> Path:
    """What `oneshot` with the preset NVFP4 and `save_pretrained` write."""
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model_class = getattr(transformers, ckpt.config["architectures"][0])
    model = model_class.from_pretrained(ckpt.path, dtype="auto")
    with no_eager_switch():
        oneshot(
            model=model,
            recipe=QuantizationModifier(
                targets="Linear", scheme="NVFP4", ignore=["lm_head", "re:.*gate$"]
            ),
            **calibration(ROWS),
        )
    model.save_pretrained(out)
    return out


def our_folder(ckpt: Checkpoint, out: Path) -> Path:
    """`ckptq quantize --scheme nvfp4` on the same tokens."""
    data = out.with_suffix(".jsonl")
    write_rows(data, ROWS)
    wanted = CalibrationRequest(data=str(data), samples=len(ROWS), seq_len=24)
    recipe = load_scheme("nvfp4")
    quantize(QuantizeRequest(model=ckpt.path, recipe=recipe, out=out, calibration=wanted))
    return out


def wrong(ours: Tensors, theirs: Tensors) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, tensor in theirs.items()
        if ours[name].dtype != tensor.dtype
        or not torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))
    ]


Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def both(saved, tmp_path_factory):
    """Family -> our folder and oneshot's, each made once."""
    root, made = tmp_path_factory.mktemp("nvfp4"), {}

    def make(family: str) -> Pair:
        if family not in made:
            ckpt = saved(family)
            made[family] = (
                our_folder(ckpt, root / f"{family}-ours"),
                oneshot_folder(ckpt, root / f"{family}-theirs"),
            )
        return made[family]

    return make


@pytest.mark.parametrize(("family", "linears"), [("llama", 4 * 7), ("qwen3-moe", 4 * (4 + 3 * 4))])
def test_a_checkpoint_is_llm_compressors_bit_for_bit(both, family, linears):
    ours, theirs = map(tensors_in, both(family))
    assert sum(name.endswith(GLOBAL) for name in ours) == linears
    assert len({t.item() for n, t in ours.items() if n.endswith(GLOBAL)}) > 4
    assert wrong(ours, theirs) == []


def test_global_scales_of_a_mixtral_are_llm_compressors(both):
    """It sums experts in another order, so inputs of later layers may differ by a bf16 step."""
    ours, theirs = (
        {name: t for name, t in tensors_in(folder).items() if name.endswith(GLOBAL)}
        for folder in both("mixtral")
    )
    assert len(ours) == 4 * (4 + 3 * 4)
    theirs = {on_disk(name.removesuffix(GLOBAL)) + GLOBAL: t for name, t in theirs.items()}
    assert not any(".layers.0." in name for name in wrong(ours, theirs))
    for name, scale in theirs.items():
        torch.testing.assert_close(ours[name], scale, rtol=2**-6, atol=0)


def test_a_scale_the_other_way_round_is_not_llm_compressors(both):
    """The twin: what FP8 stores, amax / top, is seen in every Linear."""
    ours, theirs = map(tensors_in, both("llama"))
    inverted = {n: 1 / t if n.endswith(GLOBAL) else t for n, t in ours.items()}
    assert wrong(inverted, theirs) == [name for name in theirs if name.endswith(GLOBAL)]


def test_the_config_says_what_llm_compressors_says(both):
    ours, theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in both("llama")
    )
    assert ours["format"] == theirs["format"] == "nvfp4-pack-quantized"
    (group,), (wanted,) = ours["config_groups"].values(), theirs["config_groups"].values()
    for part in ("weights", "input_activations"):
        said = {key: value for key, value in wanted[part].items() if value not in (None, {})}
        zero_point = said.pop("zp_dtype", None)
        assert zero_point is None or "float8" in zero_point
        assert group[part] == said | {"observer": group[part]["observer"]}


def test_members_of_a_fused_set_have_one_scale(both):
    scales = {n: t.item() for n, t in tensors_in(both("qwen3-moe")[0]).items() if GLOBAL in n}
    for name, scale in scales.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if f".{first}." in name:
                assert {scales[name.replace(first, other)] for other in others} == {scale}


def global_scale(xs: Iterable[torch.Tensor], observer: str = "static_minmax") -> torch.Tensor:
    """Of these batches of inputs [T, F]."""
    plain = make_observer("static_minmax")
    wanted = Wanted(
        strategy=None, attention=plain, inputs={"a": NVFP4_MAX}, linear=make_observer(observer)
    )
    statistics = Statistics(wanted)
    for x_TF in xs:
        statistics.add_input(["a"], x_TF)
    statistics.check_finite("test")
    assert statistics.scale_name("a.input") == "a.input_global_scale"
    return statistics.scale("a.input", torch.bfloat16)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=1, max_size=8), st.sampled_from([torch.bfloat16, torch.float32]))
@example([0.0], torch.bfloat16)
@example([1e38, 1e-3], torch.bfloat16)
@example([1e-38], torch.float32)
@example([-0.0, 2.0**-133], torch.bfloat16)
def test_any_finite_input_gives_llm_compressors_scale(values, dtype):
    """Zeros, subnormals, outliers: always [1], float32, finite and positive."""
    from compressed_tensors.quantization.utils import generate_gparam

    x_TF = torch.tensor([values]).clamp(-3e38, 3e38).to(dtype)
    found = global_scale([x_TF, x_TF / 2])
    assert found.shape == (1,)
    assert found.dtype == torch.float32
    assert 0 < found.item() < float("inf")
    assert torch.equal(found, generate_gparam(x_TF.amin().reshape(1), x_TF.amax().reshape(1)))


def test_zeros_alone_have_the_scale_one():
    assert global_scale([torch.zeros(3, 16)]).item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(SourceError, match=r"a\.input is (nan|inf) during calibration"):
        global_scale([torch.tensor([[1.0, bad]])])


def test_nan_in_a_weight_is_refused_by_the_name_of_the_linear_it_reaches(saved, tmp_path):
    source = saved("llama")
    tensors = tensors_in(source.path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source.path / "config.json").read_text())
    inputs = {"model.layers.1.mlp.down_proj": NVFP4_MAX}
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.down_proj\.input is nan"):
        calibrate(open_checkpoint(tmp_path), samples_of(ROWS), attention=None, inputs=inputs)


def test_a_percentile_clips_the_outlier():
    x_TF = torch.cat([torch.ones(1, 20_000), torch.full((1, 1), 64.0)], 1)
    assert global_scale([x_TF]).item() == NVFP4_MAX / 64
    assert global_scale([x_TF], "percentile").item() == NVFP4_MAX
    with pytest.raises(UsageError, match="FP8 only"):
        global_scale([x_TF], "mse")


def test_an_expert_that_is_not_there_has_no_scale_and_is_named(saved):
    inputs = {"model.layers.0.mlp.experts.9.down_proj": NVFP4_MAX}
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts\.9.* received no input"):
        calibrate(saved("qwen3-moe"), samples_of(ROWS), attention=None, inputs=inputs)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("input_activations", {"num_bits": 8}),
        ("input_activations", {"dynamic": True}),
        ("weights", {"strategy": "group"}),
    ],
)
def test_what_is_half_nvfp4_is_refused_by_the_name_of_its_group(saved, part, change):
    recipe = load_scheme("nvfp4")
    group = recipe.groups[0]
    changed = replace(group, **{part: replace(getattr(group, part), **change)})
    request = QuantizeRequest(
        model=saved("llama").path, recipe=replace(recipe, groups=(changed,)), out=Path("unused")
    )
    with pytest.raises(PlanError, match=f"group 'linear': vLLM supports NVFP4 .*: {part} are"):
        quantize(request)
