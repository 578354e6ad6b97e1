"""A forward pass shows what the stored q/k/v scales do, and whose they are."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny.words import word_tokenizer
from verify_checkpoints import HEAD_DIM, HEADS, KV_HEADS, LAYERS, TEXT, Editor, given, kv_recipe

from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.run import write_quantized
from ckptq.errors import UsageError
from ckptq.plan.make import make_plan
from ckptq.text.samples import read_samples
from ckptq.verify.attention.cache_diagnosis import diagnose_cache
from ckptq.verify.attention.fp8_heads import Choices, HeadSums, in_fp8
from ckptq.verify.attention.watch import Watch
from ckptq.verify.run import verify


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words of a vocabulary of 128."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 128, (3000,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{word}" for word in words))
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama whose heads differ: by powers of 8 within a layer, and from layer to layer."""
    folder = tmp_path_factory.mktemp("attention") / "source"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).bfloat16()
    for number, layer in enumerate(model.model.layers):
        for name, count in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            rows = getattr(layer.self_attn, name).weight.data.unflatten(0, (count, HEAD_DIM))
            sizes = 8.0 ** torch.arange(count) * 32**number * (40 if name == "v_proj" else 1)
            if name == "q_proj":  # small, so that no softmax becomes a choice of one position
                sizes = 1 / sizes
            rows.mul_(sizes[:, None, None].bfloat16())
    model.save_pretrained(folder)
    word_tokenizer([f"w{i}" for i in range(128)], "w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(source, text, tmp_path_factory):
    ckpt = open_checkpoint(source)
    out = tmp_path_factory.mktemp("calibrated") / "out"
    samples = read_samples(text, source, samples=6, seq_len=256)
    scales = calibrate(ckpt, samples, batch_size=2)
    plan = make_plan(ckpt, kv_recipe())
    write_quantized(ckpt, plan, out, arguments={}, scales=given(scales))
    return out


@pytest.fixture
def editor(calibrated, tmp_path):
    import shutil

    shutil.copytree(calibrated, tmp_path / "out")
    return Editor(tmp_path / "out")


def name(which: str, layer: int = 0) -> str:
    return f"model.layers.{layer}.self_attn.{which}_scale"


def test_right_scales_lose_what_fp8_loses(calibrated, source, text):
    report = verify(calibrated, source, attention=True, text=str(text))
    assert report.findings == ()
    assert len(report.heads) == LAYERS * (HEADS + 2 * KV_HEADS)
    assert len(report.layers) == LAYERS
    assert all(0.02 < head.error < 0.035 for head in report.heads)
    assert all(head.saturated < 0.001 for head in report.heads)
    assert 0 < report.layers[0].error < 0.1
    json.dumps(report.to_dict(), allow_nan=False)


def swap_heads(e):
    e.tensors[name("v")] = e.tensors[name("v")].flip(0)


def exchange_k_and_v(e):
    e.tensors[name("k")], e.tensors[name("v")] = e.tensors[name("v")], e.tensors[name("k")]


def invert(e):
    e.tensors[name("q")] = 1 / e.tensors[name("q")]


def exchange_layers(e):
    a, b = name("q"), name("q", 1)
    e.tensors[a], e.tensors[b] = e.tensors[b], e.tensors[a]


def clip(e):
    e.tensors[name("k")] = e.tensors[name("k")] / torch.tensor([1, 16]).reshape(-1, 1, 1).bfloat16()


def lose(e):
    e.tensors[name("v")] = torch.tensor([3e5, 1e5]).reshape(-1, 1, 1).bfloat16()


FAULTS = [
    (swap_heads, "heads-exchanged", {name("v")}),
    (exchange_k_and_v, "kv-exchanged", {name("k"), name("v")}),
    (invert, "cache-scale-inverted", {name("q")}),
    (exchange_layers, "cache-scale-of-another", {name("q"), name("q", 1)}),
    (clip, "head-saturates", {name("k")}),
    (lose, "cache-scale-wrong", {name("v")}),
]


@pytest.mark.parametrize(("fault", "code", "tensors"), FAULTS, ids=[f[1] for f in FAULTS])
def test_wrong_scales_are_named(editor, source, text, fault, code, tensors):
    fault(editor)
    report = verify(editor.save(), source, attention=True, text=str(text))
    assert {(f.code, f.tensor) for f in report.findings} == {(code, t) for t in tensors}


@pytest.mark.parametrize("factor", [0.5, 448 / 240, 2.0])
def test_one_factor_for_all_is_noted(editor, source, text, factor):
    for key in editor.tensors:
        if key.endswith(("q_scale", "k_scale", "v_scale")):
            editor.tensors[key] = editor.tensors[key] * factor
    report = verify(editor.save(), source, attention=True, text=str(text))
    assert {f.code for f in report.notes} == {"cache-scale-factor"}
    assert f"about {factor:.2g} times" in report.notes[0].found


def test_what_no_scale_would_give(calibrated, source, text):
    """1.0, which engines use for a missing scale, clips the large heads."""
    heads = verify(calibrated, source, attention=True, text=str(text)).heads
    large = max(heads, key=lambda h: h.amax)
    assert large.amax > 448
    assert large.error_unscaled > 0.3 > large.error


def test_what_one_scale_for_all_heads_would_give():
    """A head 10^6 times smaller than the largest vanishes under the largest's scale."""
    amax_H = torch.tensor([1e-4, 1e2])
    x_BHSD = torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    sums = HeadSums(Choices(stored=amax_H / 448))
    sums.add(x_BHSD * amax_H[:, None, None])
    own, _, shared = sums.errors_3H
    assert own.max() < 0.035
    assert shared[0] > 0.9
    assert shared[1] == own[1]


def test_head_sums_against_plain_torch():
    generator = torch.Generator().manual_seed(0)
    x_BHSD = torch.randn(2, 3, 5, 7, generator=generator)
    scale_H = torch.tensor([0.001, 0.01, 1.0])
    sums = HeadSums(Choices(stored=scale_H))
    sums.add(x_BHSD[:1])
    sums.add(x_BHSD[1:])
    for head in range(3):
        x = x_BHSD[:, head]
        y = (x / scale_H[head]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale_H[head]
        assert sums.amax_H[head] == x.abs().max()
        assert sums.saturated_H[head] == (x.abs() > 448 * scale_H[head]).sum()
        error = (y - x).norm() / x.norm()
        torch.testing.assert_close(sums.errors_3H[0, head].float(), error)
    assert torch.equal(in_fp8(torch.tensor([460.0]), torch.tensor(1.0)), torch.tensor([448.0]))
    assert sums.saturated_H[0] > 0 == sums.saturated_H[2]


def test_without_a_source_it_is_refused(calibrated):
    with pytest.raises(UsageError, match="--source"):
        verify(calibrated, attention=True)


def test_an_unquantized_folder_is_noted(source, tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    report = verify(tmp_path)
    assert report.ok
    assert [note.code for note in report.notes] == ["not-quantized"]


def watched(amax: list[float], scales: list[float]) -> Watch:
    """Normal distributions of these sizes have passed through the heads of one k."""
    generator = torch.Generator().manual_seed(0)
    x_BHSD = torch.randn(1, len(amax), 256, HEAD_DIM, generator=generator).clamp(-3, 3) / 3
    sums = HeadSums(Choices(stored=torch.tensor(scales)))
    sums.add(x_BHSD * torch.tensor(amax)[:, None, None])
    return Watch(choices={}, on_disk=str, heads={("self_attn", "k"): sums})


ALIKE = [1.0, 2.5, 1.1, 0.9]
"""Largest values of heads: none is far from another."""


def test_heads_that_are_nearly_alike_are_exchanged():
    """One is clipped, at an error of a fifth where the others have a fortieth."""
    right = [amax / 448 for amax in ALIKE]
    assert diagnose_cache(watched(ALIKE, right)) == []
    [found] = diagnose_cache(watched(ALIKE, [right[1], right[0], *right[2:]]))
    assert found.code == "heads-exchanged"
    assert "head 0 holds 1, head 1 holds 0" in found.found


def test_one_head_that_is_clipped_where_the_others_are_not():
    right = [amax / 448 for amax in ALIKE]
    [found] = diagnose_cache(watched(ALIKE, [right[0], right[1] / 2.5, *right[2:]]))
    assert found.code == "head-saturates"
    assert "head 1 reaches 2.5" in found.found


@pytest.mark.parametrize("factor", [0.7, 1.5, 2.5])
def test_text_that_is_larger_or_smaller_is_no_fault(factor):
    """All heads alike: the text is another than that of the calibration."""
    right = [amax / 448 for amax in ALIKE]
    assert diagnose_cache(watched([factor * amax for amax in ALIKE], right)) == []
