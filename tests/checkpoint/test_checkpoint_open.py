"""Opening: folders that are checkpoints, and everything that only looks like one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX, entry, write_raw, write_sharded
from safetensors.torch import save_file

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.partial import claim
from ckptq.errors import SourceError

A = {"a": torch.arange(4.0)}
B = {"b": torch.arange(6.0).reshape(2, 3), "c": torch.ones(1)}


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def rewrite_map(folder: Path, **changes: str | None) -> None:
    """Let the index say other files; None takes a tensor out."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_sharded_folder_and_a_single_file(tmp_path):
    sharded = open_checkpoint(write_sharded(tmp_path / "two", [B, A]))
    assert list(sharded.tensors) == ["b", "c", "a"], "in the order of files and bytes"
    assert sharded.name == "two"
    assert sharded.nbytes == 16 + 24 + 4
    single = tmp_path / "one"
    single.mkdir()
    (single / "config.json").write_text('{"text_config": {"num_hidden_layers": 3}}')
    save_file(A, single / "model.safetensors")
    save_file(B, single / "other.safetensors")
    opened = open_checkpoint(str(single))
    assert list(opened.tensors) == ["a"], "as transformers does, model.only safetensors is read"
    assert opened.text_config == {"num_hidden_layers": 3}


def test_side_files_are_all_that_is_no_weight(tmp_path):
    folder = write_sharded(tmp_path / "m", [A])
    keep = ["tokenizer.json", "sub/preprocessor.json", "chat_template.jinja"]
    drop = [".git/config", "pytorch_model.bin", "model.gguf", "consolidated.pth", "tf_model.h5"]
    for name in keep + drop:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert [str(p) for p in open_checkpoint(folder).side_files()] == sorted(keep)


@pytest.mark.parametrize(
    "target", ["../m.safetensors", "/etc/passwd", "..", "sub/m.safetensors", ""]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, target):
    folder = write_sharded(tmp_path / "m", [A])
    save_file(A, tmp_path / "m.safetensors")
    rewrite_map(folder, a=target)
    message = refusal(folder)
    assert "outside the folder" in message
    assert "'a'" in message


def test_an_index_that_names_a_missing_file(tmp_path):
    folder = write_sharded(tmp_path / "m", [A, B])
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "model-00002-of-00002.safetensors" in message
    assert "'b'" in message


def test_an_index_that_disagrees_with_its_files(tmp_path):
    folder = write_sharded(tmp_path / "m", [A, B])
    rewrite_map(folder, gone="model-00001-of-00002.safetensors", c=None)
    message = refusal(folder)
    assert f"tensor 'gone' is in {INDEX}, not in the file" in message
    assert f"tensor 'c' is in the file, not in {INDEX}" in message
    assert f"`ckptq mend {folder} OUT`" in message
    problems: list[str] = []
    assert list(open_checkpoint(folder, problems=problems).tensors) == ["a", "b", "c"]
    assert len(problems) == 2


def test_a_tensor_in_two_files(tmp_path):
    folder = write_sharded(tmp_path / "m", [A | {"d": torch.ones(2)}, A | B])
    assert "tensor 'a' is also in model-00001-of-00002.safetensors" in refusal(folder)


def test_the_damaged_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path / "m", [A, B])
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: tensor 'c': truncated" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {"a": 3}}', "weight_map must map"),
        ('{"weight_map": {}}', "weight_map is empty"),
    ],
)
def test_a_damaged_index(tmp_path, index, wanted):
    folder = write_sharded(tmp_path / "m", [A])
    (folder / INDEX).write_text(index)
    message = refusal(folder)
    assert wanted in message
    assert INDEX in message


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (None, "no config.json"),
        ("{'a': 1}", "not valid JSON"),
        ("3", "expected a JSON object, found int"),
    ],
)
def test_a_damaged_config(tmp_path, config, wanted):
    folder = write_sharded(tmp_path / "m", [A])
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert wanted in refusal(folder)


def test_pickled_weights_are_refused_and_never_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "only safetensors" in message


def test_folders_that_hold_no_checkpoint(tmp_path):
    assert "no such folder" in refusal(tmp_path / "none")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no safetensors file" in refusal(tmp_path)
    assert "is a file" in refusal(tmp_path / "config.json")
    save_file(A, tmp_path / "x.safetensors")
    save_file(B, tmp_path / "y.safetensors")
    assert f"2 safetensors files but no {INDEX}" in refusal(tmp_path)
    write_raw(tmp_path / "model.safetensors", {})
    assert "no tensor" in refusal(tmp_path)


@pytest.mark.parametrize("spelling", ["absolute", "relative"])
def test_what_an_interrupted_run_was_to_write_is_not_sought_in_the_hub(
    tmp_path, monkeypatch, spelling
):
    os.close(claim(tmp_path / "out.partial"))
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "out" if spelling == "absolute" else "out")
    assert "out.partial holds an unfinished run" in message


@pytest.mark.parametrize("name", ["a b", "-x", "a..b", "a/b c"])
def test_what_is_neither_a_folder_nor_a_hub_id(name):
    """Refused by the spelling alone, without asking the hub."""
    with pytest.raises(SourceError, match="no such folder"):
        open_checkpoint(name)


@pytest.mark.parametrize("stream", [False, True])
def test_a_typo_offline_is_said_in_one_line(monkeypatch, tmp_path, stream):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError) as told:
        open_checkpoint("modle", stream=stream)
    wanted = "modle: no such folder here; the hub's cache does not have it, and HF_HUB_OFFLINE is"
    assert str(told.value) == f"{wanted} set"


def test_tensors_without_bytes_and_scalars_are_tensors(tmp_path):
    header = {"empty": entry("F32", [0, 8], 0, 0), "scalar": entry("F32", [], 0, 4)}
    write_raw(tmp_path / "model.safetensors", header, bytes(4))
    (tmp_path / "config.json").write_text("{}")
    assert set(open_checkpoint(tmp_path).tensors) == {"empty", "scalar"}
