"""`ckptq permute`: sharded checkpoints with real names, of every format, and a real model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from permute_formats import BLOCK, FORMATS, permute_projection
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.tensors import differences, tensors_in
from torch import Tensor

import ckptq.checkpoint.journal
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert import output, pipeline, preflight
from ckptq.convert.permute import PermuteRequest
from ckptq.convert.permute import permute as run_permute
from ckptq.errors import MachineError, PlanError, SourceError, UsageError
from ckptq.permute import marks
from ckptq.permute.effect import Part, Projection
from ckptq.permute.targets import head_geometry, plan_permutation
from ckptq.rope_order import Heads, RopeOrder

HALF, INTER = RopeOrder.HALF_SPLIT, RopeOrder.INTERLEAVED
LAYERS = 2
HEADS = {"q_proj": Heads(4, 64), "k_proj": Heads(2, 64)}
PREFIX = "language_model.model.layers"


def config(name: str) -> dict:
    text = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 160,
    }
    made = {"model_type": "llama4", "text_config": text}
    if name != "bf16-bias":
        weights = {"num_bits": int(name[3]) if name.startswith("int") else 8}
        weights |= {"block_structure": [BLOCK, BLOCK]} if name == "fp8-block" else {}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        made["quantization_config"] = {"config_groups": groups}
    return made


def write_checkpoint(folder: Path, name: str = "int4-group-asym") -> Path:
    """Two shards, a layer's q/k split across them; a tower with a RoPE of its own; a side file."""
    torch.manual_seed(0)
    shards: list[dict[str, Tensor]] = [{}, {}]
    shards[0]["vision_model.model.layers.0.self_attn.q_proj.weight"] = torch.randn(160, 160)
    shards[0]["vision_model.model.layers.0.self_attn.k_proj.weight"] = torch.randn(160, 160)
    shards[0]["language_model.model.embed_tokens.weight"] = torch.randn(32, 160).bfloat16()
    for layer in range(LAYERS):
        attention = f"{PREFIX}.{layer}.self_attn"
        for projection, rows in {"q_proj": 256, "k_proj": 128, "v_proj": 128}.items():
            w_RC = torch.randn(rows, 160) * torch.randn(rows, 1).exp() + torch.randn(rows, 1)
            shard = shards[projection != "q_proj"]
            for local, tensor in FORMATS[name].make(w_RC).items():
                shard[f"{attention}.{projection}.{local}"] = tensor.contiguous()
        shards[1][f"{attention}.o_proj.weight"] = torch.randn(160, 256).bfloat16()
        shards[1][f"{attention}.k_scale"] = torch.rand(2, 1, 1).bfloat16()
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(name)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def permute(source: Path, out: Path, to: RopeOrder = HALF, only: tuple = tuple(Part), **kwargs):
    return run_permute(PermuteRequest(model=source, out=out, to=to, only=only), **kwargs)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return differences(a, b) == []


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_streams_as_the_library_says(tmp_path, name):
    source = write_checkpoint(tmp_path / "source", name)
    before = tensors_in(source)
    permute(source, tmp_path / "half")
    expected = dict(before)
    for layer in range(LAYERS):
        for projection, heads in HEADS.items():
            prefix = f"{PREFIX}.{layer}.self_attn.{projection}."
            local = {n.removeprefix(prefix): t for n, t in before.items() if n.startswith(prefix)}
            made = permute_projection(local, Projection(prefix, heads, (BLOCK, BLOCK)), HALF)
            expected |= {f"{prefix}{n}": t for n, t in made.items()}
    assert not same(expected, before)
    assert same(tensors_in(tmp_path / "half"), expected)


@pytest.mark.parametrize("name", ["bf16-bias", "fp8-block", "int4-group-asym", "nvfp4"])
def test_half_split_and_back_is_byte_identical(tmp_path, name):
    source = write_checkpoint(tmp_path / "source", name)
    permute(source, tmp_path / "half")
    permute(tmp_path / "half", tmp_path / "back", INTER)
    assert same(tensors_in(tmp_path / "back"), tensors_in(source))
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def test_marks_stand_in_every_shard_and_in_the_config(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    result = permute(source, tmp_path / "half")
    assert result.mark == "half-split"
    assert result.moved == dict.fromkeys(Part, 2 * LAYERS)
    files = sorted((tmp_path / "half").glob("*.safetensors"))
    assert [f.name for f in files] == [f.name for f in sorted(source.glob("*.safetensors"))]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", marks.METADATA_KEY: "half-split"}
    written = json.loads((tmp_path / "half" / "config.json").read_text())
    assert written.pop("ckptq") == {"rope_order": "half-split"}
    assert written == json.loads((source / "config.json").read_text())


def test_twice_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    permute(source, tmp_path / "half")
    with pytest.raises(UsageError, match="already in half-split order"):
        permute(tmp_path / "half", tmp_path / "twice")
    with pytest.raises(UsageError, match="already in interleaved order"):
        permute(source, tmp_path / "never", INTER)
    assert not (tmp_path / "twice").exists()


def test_shards_of_two_orders_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    permute(source, tmp_path / "half")
    first = "model-00001-of-00002.safetensors"
    (tmp_path / "half" / first).write_bytes((source / first).read_bytes())
    with pytest.raises(SourceError, match=f"contradictory RoPE order: {first} is marked 'nothing'"):
        permute(tmp_path / "half", tmp_path / "back", INTER)


def test_repair_of_one_part(tmp_path):
    """Somebody permuted weights and forgot scales and zero points: `only` puts that right."""
    source = write_checkpoint(tmp_path / "source")
    permute(source, tmp_path / "spoilt", only=(Part.WEIGHTS,))
    permute(tmp_path / "spoilt", tmp_path / "better", only=(Part.SCALES,))
    result = permute(tmp_path / "better", tmp_path / "right", only=(Part.ZERO_POINTS,))
    assert result.mark == "half-split"
    permute(source, tmp_path / "half")
    assert bytes_in(tmp_path / "right") == bytes_in(tmp_path / "half")


def test_nothing_to_permute_is_said(tmp_path):
    source = write_checkpoint(tmp_path / "source", "fp8-channel")
    with pytest.raises(UsageError, match="q/k have no zero-points indexed by row"):
        permute(source, tmp_path / "out", only=(Part.ZERO_POINTS,))


def test_unknown_tensors_are_refused_by_name(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    file, name = "model-00002-of-00002.safetensors", f"{PREFIX}.0.self_attn.k_proj.qweight"
    tensors = load_file(source / file) | {name: torch.ones(16, 128)}
    save_file(tensors, source / file, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {name: file}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.k_proj\.qweight: F32 \[16, 128\]"):
        plan_permutation(open_checkpoint(source))


def test_a_model_without_q_and_k_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "x", "num_attention_heads": 4}')
    save_file({"h.0.attn.qkv_proj.weight": torch.ones(8, 8)}, source / "model.safetensors")
    with pytest.raises(PlanError, match="no decoder layer has both a q_proj and a k_proj"):
        plan_permutation(open_checkpoint(source))


@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_a_killed_run_goes_on_and_ends_byte_identical(tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(output, "COMMIT_BYTES", 30_000)
    source = write_checkpoint(tmp_path / "source")
    permute(source, tmp_path / "whole")
    seen: list[str] = []

    def killed(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute(source, tmp_path / "out", begin=lambda *_: killed)
    assert not (tmp_path / "out").exists()
    if stop_after > 1:  # before that nothing is done that a different run could lose
        with pytest.raises(UsageError, match=r"different run: arguments\.only was"):
            permute(source, tmp_path / "out", only=(Part.SCALES,))
    permute(source, tmp_path / "out")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def interrupted(source: Path, out: Path) -> Path:
    """A run that died just before the rename; the folder of its shards."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ckptq.checkpoint.journal, "rename_new", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            permute(source, out)
    return out.with_name(out.name + ".partial") / "checkpoint"


@pytest.mark.parametrize("damage", ["cut", "zeros", "gone", "one bit", "none"])
def test_what_is_done_is_proved_before_it_is_trusted(tmp_path, damage):
    source = write_checkpoint(tmp_path / "source")
    permute(source, tmp_path / "whole")
    for shard in sorted(interrupted(source, tmp_path / "out").glob("*.safetensors")):
        data = shard.read_bytes()
        if damage == "gone":
            shard.unlink()
        elif damage != "none":
            ends = {"cut": b"", "zeros": bytes(99), "one bit": bytes([data[-1] ^ 1])}[damage]
            shard.write_bytes(data[: len(data) - max(len(ends), 1)] + ends)
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        work = pipeline.work
        patched.setattr(
            pipeline, "work", lambda unit, ends: (written.append(unit.key), work(unit, ends))[1]
        )
        permute(source, tmp_path / "out")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    tensors = len(open_checkpoint(source).tensors)
    assert len(written) == {"gone": tensors, "none": 0}.get(damage, len(written))
    assert bool(written) == (damage != "none")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, name):
    source = write_checkpoint(tmp_path / "source")
    file = source / name
    edits = [lambda: (file.rename(tmp_path / "moved"), file.write_bytes(before))]
    before = file.read_bytes()
    with pytest.raises(SourceError, match=rf"{name}: changed while it was read"):
        permute(source, tmp_path / "out", begin=lambda *_: lambda *_: edits and edits.pop()())
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_never_touched(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        permute(source, tmp_path / "out")


def test_an_output_inside_the_source_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    with pytest.raises(UsageError, match=r"out: lies inside the source"):
        permute(source, source / "out")


def test_a_disk_that_is_too_small_is_said_at_once(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(MachineError, match="free"):
        permute(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("extra", "rotary_dim"),
    [
        ({}, 64),
        ({"partial_rotary_factor": 0.5}, 32),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, 16),
        ({"rope_parameters": {"full": {"partial_rotary_factor": 0.5}}}, 32),
        ({"rotary_dim": 8}, 8),
    ],
)
def test_geometry_from_the_config(extra, rotary_dim):
    heads = head_geometry({"num_attention_heads": 4, "hidden_size": 256} | extra)
    assert heads == {"q": Heads(4, 64, rotary_dim), "k": Heads(4, 64, rotary_dim)}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"head_dim": [1]}, r"head_dim is \[1\]; expected a whole number, at least 1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 3}, "hidden_size is 3; expected a whole number, at least 4"),
        ({"hidden_size": None}, "head_dim and hidden_size are missing"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half', expected a number"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2, expected a number from 0 to 1"),
    ],
)
def test_a_config_of_no_geometry_is_refused_by_name(odd, said):
    with pytest.raises(PlanError, match=said):
        head_geometry({"num_attention_heads": 4, "hidden_size": 256} | odd)


def test_layers_that_rotate_different_shares_are_refused():
    ropes = {"full": {"partial_rotary_factor": 0.5}, "sliding": {"partial_rotary_factor": 1.0}}
    with pytest.raises(PlanError, match=r"\[0\.5, 1\.0\]"):
        head_geometry({"num_attention_heads": 4, "hidden_size": 256, "rope_parameters": ropes})


@pytest.fixture(scope="module")
def llama4(tmp_path_factory) -> Path:
    """A real Llama-4: GQA, chunked and NoPE layers, QK norm, experts, several shards."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama4") / "model"
    text = Llama4TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=16,
        max_position_embeddings=64,
    )
    assert 0 in text.no_rope_layers
    model = Llama4ForCausalLM(text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def logits(folder: Path) -> Tensor:
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(24)[None] % 64).logits


def half_split_rope(xq: Tensor, xk: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """What engines run: transformers' own signature, pairs (i, i + D / 2) instead of neighbours."""
    cos, sin = turns.real[:, :, None], turns.imag[:, :, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)

    return turn(xq), turn(xk)


def test_a_real_llama4_says_the_same_in_half_split_rope(llama4, tmp_path, monkeypatch):
    from transformers.models.llama4 import modeling_llama4

    want = logits(llama4)
    permute(llama4, tmp_path / "half")
    assert (logits(tmp_path / "half") - want).abs().max() > 0.1, "transformers reads interleaved"
    monkeypatch.setattr(modeling_llama4, "apply_rotary_emb", half_split_rope)
    torch.testing.assert_close(logits(tmp_path / "half"), want, rtol=0, atol=1e-4)
    assert (logits(llama4) - want).abs().max() > 0.1, "and this RoPE does not"
