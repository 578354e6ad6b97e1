"""What lies beside the weights: carried where it belongs to the model, else named with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX, write_sharded
from safetensors.torch import save_file

from ckptq.checkpoint.beside import AGAIN, sort_files, told_of
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.permute import PermuteRequest, permute
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import SourceError
from ckptq.recipes.load import load_scheme
from ckptq.rope_order import RopeOrder
from ckptq.verify.run import verify

H = 64
LAYER = "model.layers.0"
MODEL = {
    f"{LAYER}.self_attn.q_proj.weight": (H, H),
    f"{LAYER}.self_attn.k_proj.weight": (H, H),
    f"{LAYER}.self_attn.v_proj.weight": (H, H),
    f"{LAYER}.self_attn.o_proj.weight": (H, H),
    f"{LAYER}.mlp.gate_proj.weight": (96, H),
    f"{LAYER}.mlp.up_proj.weight": (96, H),
    f"{LAYER}.mlp.down_proj.weight": (H, 96),
    f"{LAYER}.input_layernorm.weight": (H,),
    f"{LAYER}.post_attention_layernorm.weight": (H,),
    "model.norm.weight": (H,),
    "model.embed_tokens.weight": (32, H),
    "lm_head.weight": (32, H),
}
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": H,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

CARRIED = (
    "3_Dense/model.safetensors",
    "3_Dense/config.json",
    "voices/af_heart.pt",
    "vision-lora/adapter_model.safetensors",
    "adapter_model.safetensors",
    "speech_tokenizer/model.safetensors",
    "speech_tokenizer/model.safetensors.index.json",
    "campplus.onnx",
    "spk2info.pt",
    "sparse_linear.pt",
)
LEFT = (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/consolidated.00.pth",
    "metal/model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "q4/model-q4.gguf",
    "onnx/model.onnx",
    "optimizer.pt",
    "checkpoint-20/model.safetensors",
)


def source(folder: Path, names: tuple[str, ...] = ()) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in MODEL.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"linear.weight": torch.ones(2, 3)}, folder / name)
        else:
            (folder / name).write_bytes(name.encode() * 100)
    return folder


def converted(folder: Path, out: Path) -> tuple[Path, list[str]]:
    told: list[str] = []
    recipe = load_scheme("fp8-dynamic")
    quantize(QuantizeRequest(model=folder, recipe=recipe, out=out), note=told.append)
    return out, told


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_belongs_to_the_model_arrives_and_the_rest_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", CARRIED + LEFT)
    out, told = converted(folder, tmp_path / "out")
    assert not set(CARRIED) - files(out)
    assert not set(LEFT) & files(out)
    for name in CARRIED:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    lines = [line for line in told if line.startswith("not carried: ")]
    assert len(lines) == len(AGAIN)
    said = "flax_model.msgpack, onnx/model.onnx, q4/model-q4.gguf, rust_model.ot, ... "
    assert any(said in line and "in another format" in line for line in lines)
    assert any(
        "original/consolidated.00.pth" in line and "original authors' layout" in line
        for line in lines
    )
    assert verify(out, folder).ok


def test_every_file_is_carried_or_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", CARRIED + LEFT)
    ckpt = open_checkpoint(folder)
    beside = ckpt.beside()
    sorted_out = {str(p) for p in (*beside.carried, *beside.left)}
    assert sorted_out == files(folder) - {"model.safetensors", "config.json"}
    told = " ".join(told_of(folder, beside))
    for reason in AGAIN:
        assert f"because {reason}" in told


def test_a_link_to_nothing_is_no_file_less(tmp_path: Path) -> None:
    """A tokenizer whose blob is gone from the hub's cache; one that would be left out may be."""
    folder = source(tmp_path / "source", ("vocab.json",))
    (folder / "pytorch_model.bin").symlink_to("../gone")
    (folder / "1_Pooling").symlink_to(tmp_path, target_is_directory=True)
    (folder / "merges.txt").symlink_to("vocab.json")
    out, told = converted(folder, tmp_path / "out")
    assert (out / "merges.txt").read_bytes() == (folder / "vocab.json").read_bytes()
    assert any("1_Pooling" in line and "links to folders" in line for line in told)
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    with pytest.raises(SourceError, match=r"tokenizer.json: is a link to ../../blobs/abc, which"):
        converted(folder, tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()
    assert "tokenizer.json" in " ".join(told_of(folder, open_checkpoint(folder).beside()))


def test_a_shard_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../gone")
    with pytest.raises(SourceError, match=r"model.safetensors: is a link to ../gone, which does"):
        open_checkpoint(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(SourceError, match=r"tensor 'a'\), which is a link to ../gone, which does"):
        open_checkpoint(folder)


def test_tensors_that_the_model_holds_itself_are_not_carried_twice(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    one = torch.ones(H, H)
    save_file({f"{LAYER}.self_attn.q_proj.weight": one}, folder / "fp16.safetensors")
    save_file({"extra.weight": one}, folder / "mtp.safetensors")
    save_file({"extra.weight": one}, folder / "model-00007-of-00009.safetensors")
    out, told = converted(folder, tmp_path / "out")
    assert "mtp.safetensors" in files(out)
    assert not {"fp16.safetensors", "model-00007-of-00009.safetensors"} & files(out)
    assert [line for line in told if "because their tensors are in the model's own files" in line]
    assert [line for line in told if "no index names them" in line]


def test_beside_other_safetensors_the_model_is_known_by_its_index(tmp_path: Path) -> None:
    """vLLM takes all *.safetensors of a folder without an index for the model's."""
    folder = source(tmp_path / "source", ("adapter_model.safetensors",))
    out, _ = converted(folder, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert verify(out, folder).ok
    alone, _ = converted(source(tmp_path / "alone"), tmp_path / "alone-out")
    assert not (alone / INDEX).exists()


def test_permute_carries_them_too(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", CARRIED + LEFT)
    config = CONFIG | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    permute(PermuteRequest(model=folder, out=out, to=RopeOrder.HALF_SPLIT))
    assert not set(CARRIED) - files(out)
    assert not set(LEFT) & files(out)


@pytest.mark.parametrize("name", ["3_Dense/model.safetensors", "spk2info.pt"])
def test_one_that_did_not_arrive_is_a_fault(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path / "source", CARRIED)
    out, _ = converted(folder, tmp_path / "out")
    (out / name).unlink()
    assert [(f.code, f.file) for f in verify(out, folder).findings] == [("side-file-missing", name)]


LORA = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, H),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(H, 4),
}
IA3 = {"base_model.model.model.layers.0.mlp.down_proj.ia3_l.weight": torch.ones(1, H)}
PREFIX = {"prompt_embeddings": torch.ones(8, H)}


@pytest.mark.parametrize("tensors", [LORA, IA3, PREFIX], ids=["lora", "ia3", "prefix"])
@pytest.mark.parametrize("config", [True, False], ids=["base's config", "no config"])
def test_an_adapter_is_no_model(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: bool
) -> None:
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    if config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceError, match=r"is a PEFT adapter \(adapter_config\.json\); merge it"):
        open_checkpoint(tmp_path)


def test_an_adapter_under_a_model_s_name_is_known_by_its_tensors(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", [LORA])
    with pytest.raises(SourceError, match=r"is a PEFT adapter \(base_model.*lora_A.*merge it"):
        open_checkpoint(folder)


def test_a_pickled_adapter_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="is a PEFT adapter"):
        open_checkpoint(tmp_path)


def test_a_model_that_has_an_adapter_beside_it_is_one(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", ("adapter_model.safetensors", "adapter_config.json"))
    assert len(open_checkpoint(folder).tensors) == len(MODEL)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(open_checkpoint(folder).tensors) == len(MODEL), "the adapter is no shard"


def test_weights_that_repeat_some_tensors_are_named_and_not_carried(tmp_path: Path) -> None:
    """transformers reads the one file, vLLM every one; a file of other tensors is carried."""
    own = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2)}
    save_file(own, tmp_path / "model.safetensors")
    save_file({"b.weight": torch.ones(2), "c.weight": torch.ones(2)}, tmp_path / "mine.safetensors")
    save_file({"speaker": torch.ones(2)}, tmp_path / "speakers.safetensors")
    found = sort_files(tmp_path, ["model.safetensors"], own.keys())
    assert found.carried == (Path("speakers.safetensors"),)
    assert found.left[Path("mine.safetensors")].startswith("some of their tensors are in")
