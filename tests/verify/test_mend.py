"""`mend` as a whole: what it leaves alone, where it writes, what it proposes, how it resumes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from families.sources import save
from mend_trials import equal, same, tensors_of
from safetensors.torch import load_file, save_file
from tiny.foreign import (
    AWQ_METHOD,
    awq,
    fp8,
    fp8_method,
    gptq,
    gptq_method,
    nvfp4,
    nvfp4_method,
    write,
)
from tiny.models import causal
from verify_checkpoints import TEXT, convert, copy_of, recipe
from verify_faults import codes, mlp, turn

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.output import RunOptions
from ckptq.errors import SourceError, UsageError
from ckptq.mend import mendable as codes_of
from ckptq.mend import registry, write_mended
from ckptq.mend.config.edit import edited
from ckptq.mend.draft import draft_of
from ckptq.mend.proposal import proposal
from ckptq.mend.run import MendRequest, mend
from ckptq.mend.trial import settle_headers
from ckptq.permute.effect import Part
from ckptq.recipes.load import load_scheme
from ckptq.rope_order import RopeOrder
from ckptq.show.mending import show_mended
from ckptq.show.verification import show_report
from ckptq.verify.kinds import KINDS
from ckptq.verify.run import verify

ONE = RunOptions(workers=1)


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("weights", ["fp8-channel", "nvfp4", "int4-asym"])
def test_a_right_checkpoint_is_left_alone(good, tmp_path: Path, capsys, weights: str, kv: bool):
    folder, source = good("llama", weights, kv)
    for given in (None, source):
        done = mend(MendRequest(path=folder, out=tmp_path / "out", source=given, options=ONE))
        assert done.ok
        assert (done.repairs, done.left, done.out) == ((), (), None)
    assert list(tmp_path.iterdir()) == []
    show_mended(done, json=False)
    assert capsys.readouterr().out.endswith("nothing to mend\n")


def two_shards(sources, tmp_path: Path) -> Path:
    folder = convert(sources("llama"), tmp_path / "whole", recipe("fp8-channel"), 200_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def test_shards_that_stay_are_taken_whole(sources, tmp_path: Path):
    """As a clone or a link: another file only where the bytes are others."""
    folder = two_shards(sources, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (folder / "config.json").write_text(json.dumps(config))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done = mend(MendRequest(path=folder, out=tmp_path / "out", headers_only=True, options=ONE))
    assert done.ok
    for file in folder.glob("model-*.safetensors"):
        ours = tmp_path / "out" / file.name
        assert ours.read_bytes() == before[file.name]
        assert ours.stat().st_nlink == 1 or ours.samefile(file)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def broken_shard(folder: Path) -> str:
    """One scale of a sharded checkpoint turned into NaN, in its file."""
    ckpt = open_checkpoint(folder)
    name = next(n for n in ckpt.tensors if n.endswith("down_proj.weight_scale"))
    stored = ckpt.tensors[name]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff\x7f")
    return name


def test_only_the_shard_that_changes_is_written(sources, tmp_path: Path):
    folder = two_shards(sources, tmp_path)
    wanted = tensors_of(folder)
    name = broken_shard(folder)
    done = mend(
        MendRequest(path=folder, out=tmp_path / "out", source=sources("llama"), options=ONE)
    )
    assert done.ok
    assert [one.code for one in done.repairs] == ["scale-not-finite"]
    found = tensors_of(tmp_path / "out")
    assert all(same(tensor, found[n]) for n, tensor in wanted.items())
    shards = {f.name: (tmp_path / "out" / f.name) for f in folder.glob("model-*.safetensors")}
    alike = {n for n, ours in shards.items() if ours.read_bytes() == (folder / n).read_bytes()}
    assert set(shards) - alike == {shard_of(folder, name).name}


def test_a_killed_run_goes_on(sources, tmp_path: Path, monkeypatch):
    """Also after a shard was linked, which moves the change time of the original."""
    folder = two_shards(sources, tmp_path)
    broken_shard(folder)
    request = MendRequest(path=folder, out=tmp_path / "out", source=sources("llama"), options=ONE)
    with monkeypatch.context() as patched:
        taken = []

        def die(source: Path, target: Path) -> None:
            if taken:
                raise KeyboardInterrupt
            taken.append(target)
            os.link(source, target)

        patched.setattr("ckptq.convert.output.take_whole", die)
        with pytest.raises(KeyboardInterrupt):
            mend(request)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "journal.jsonl").read_text().count('"done"') > 0
    assert mend(request).ok
    assert not (tmp_path / "out.partial").exists()
    again = MendRequest(path=folder, out=tmp_path / "b", source=sources("llama"), options=ONE)
    assert mend(again).ok
    assert equal(tmp_path / "out", tmp_path / "b")


def test_in_place_changes_the_documents_and_keeps_copies(broken, good):
    editor, _ = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    folder = editor.save()
    before = (folder / "config.json").read_bytes()
    done = mend(MendRequest(path=folder, in_place=True))
    assert done.ok
    assert (folder / "config.json.before-mend").read_bytes() == before
    assert equal(folder, good("llama", "fp8-channel")[0])
    (folder / "config.json").write_bytes(before + b" ")
    with pytest.raises(UsageError, match="an earlier repair kept this copy"):
        mend(MendRequest(path=folder, in_place=True))


def test_in_place_goes_on_after_a_kill(broken, monkeypatch):
    """Killed after the copy was kept, and before the file was replaced."""
    editor, _ = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    folder = editor.save()
    before = (folder / "config.json").read_bytes()
    write = write_mended.write_whole

    def killed(file: Path, *args, **options) -> None:
        if not file.name.endswith(".before-mend"):
            raise KeyboardInterrupt
        write(file, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(write_mended, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            mend(MendRequest(path=folder, in_place=True))
    assert (folder / "config.json").read_bytes() == before
    assert mend(MendRequest(path=folder, in_place=True)).ok
    assert (folder / "config.json.before-mend").read_bytes() == before


def test_in_place_changes_no_tensor(broken):
    editor, _ = broken("llama", "fp8-channel")
    name = f"{mlp(editor)}.weight_scale"
    editor.tensors[name] = editor.tensors[name].flatten()
    folder = editor.save()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done = mend(MendRequest(path=folder, in_place=True))
    assert not done.ok
    assert done.out is None
    assert [(one.code, one.needs) for one in done.left] == [("scale-shape", "choice")]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_dry_run_writes_nothing(broken, tmp_path: Path, capsys):
    editor, source = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    name = codes(editor, mlp(editor))
    editor.tensors[name].view(torch.uint8)[5, 7] = 0x7F
    request = MendRequest(path=editor.save(), out=tmp_path / "out", source=source, dry_run=True)
    done = mend(request)
    assert {one.code for one in done.repairs} == {"status", "codes-nan"}
    assert done.out is None
    assert not (tmp_path / "out").exists()
    show_mended(done, json=False)
    said = capsys.readouterr().out
    assert 'mended status: quantization_status set to "compressed"' in said
    assert f"mended codes-nan: {name}: converted again from the source" in said
    assert said.endswith("2 repairs to make, 0 findings left; nothing was written\n")


def test_requests_that_contradict_themselves_are_refused(good, tmp_path: Path):
    folder, _ = good("llama", "fp8-channel")
    with pytest.raises(UsageError, match="--in-place writes no"):
        mend(MendRequest(path=folder, out=tmp_path / "out", in_place=True))
    with pytest.raises(UsageError, match="give a folder for the result"):
        mend(MendRequest(path=folder))


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    good, tmp_path: Path, monkeypatch
):
    folder, _ = good("llama", "fp8-channel")
    monkeypatch.setattr("ckptq.mend.run.judge", lambda *_: pytest.fail("read"))
    for out, said in (
        (folder, "lies inside"),
        (folder / "in", "lies inside"),
        (tmp_path, "exists"),
    ):
        with pytest.raises(UsageError, match=said):
            mend(MendRequest(path=folder, out=out))


def test_scales_per_head_are_folded_on_request(good, tmp_path: Path):
    folder, source = good("llama", "fp8-channel", True)
    request = MendRequest(
        path=folder, out=tmp_path / "out", source=source, per_tensor=True, options=ONE
    )
    assert mend(request).ok
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    scales = [name for name in before if name.endswith(("q_scale", "k_scale", "v_scale"))]
    for name in scales:
        assert torch.equal(after[name], before[name].amax().reshape(1))
    assert all(same(after[name], before[name]) for name in before if name not in scales)


@pytest.mark.parametrize("fault", ["missing", "different"])
def test_layers_that_read_another_cache_get_its_scales(good, tmp_path: Path, fault: str):
    editor = copy_of(good("llama", "kv", True)[0], tmp_path / "shared")
    own, owner = "model.layers.1.self_attn", "model.layers.0.self_attn"
    editor.config["num_kv_shared_layers"] = 1
    for which in "kv":
        if fault == "missing":
            del editor.tensors[f"{own}.{which}_scale"]
    done = mend(MendRequest(path=editor.save(), out=tmp_path / "out", options=ONE))
    assert done.ok
    after = tensors_of(tmp_path / "out")
    for which in "kv":
        assert same(after[f"{own}.{which}_scale"], after[f"{owner}.{which}_scale"])


def test_codes_that_were_chosen_stay_where_rows_only_moved(good, tmp_path: Path):
    """As GPTQ's: converting again would round them. One code is moved on purpose to tell."""
    folder, source = good("llama4", "int4")
    editor = copy_of(folder, tmp_path / "moved")
    name = next(n for n in editor.tensors if n.endswith("layers.0.self_attn.q_proj.weight_packed"))
    editor.tensors[name][:, ::3] ^= 1
    chosen = editor.tensors[name].clone()
    turn(editor, (Part.SCALES,), RopeOrder.HALF_SPLIT)
    request = MendRequest(path=editor.save(), out=tmp_path / "out", source=source, options=ONE)
    done = mend(request)
    assert {one.code for one in done.repairs} == {"scale-permuted"}
    after = tensors_of(tmp_path / "out")
    assert same(after[name], chosen)
    scales = [n for n in after if n.endswith("q_proj.weight_scale")]
    assert all(same(after[n], tensors_of(folder)[n]) for n in scales)


def test_global_scales_of_a_set_become_one(good, tmp_path: Path):
    """The weights as they were stored, within the rounding of E4M3."""
    folder, _ = good("llama", "nvfp4")
    editor = copy_of(folder, tmp_path / "apart")
    name = next(n for n in editor.tensors if n.endswith("layers.0.mlp.up_proj.weight_global_scale"))
    scale = name.replace("global_scale", "scale")
    editor.tensors[name] = editor.tensors[name] * 0.75
    halved = editor.tensors[scale].float() * 0.75
    editor.tensors[scale] = halved.to(torch.float8_e4m3fn)
    done = mend(MendRequest(path=editor.save(), out=tmp_path / "out", options=ONE))
    assert done.ok
    assert "codes untouched" in done.repairs[0].said
    after = tensors_of(tmp_path / "out")
    gate = name.replace("up_proj", "gate_proj")
    assert torch.equal(after[name], after[gate])
    stored = editor.tensors[scale].float() / editor.tensors[name]
    mended = after[scale].float() / after[name]
    assert ((mended - stored).abs() <= stored / 16 + 2.0**-10 / after[name]).all()
    unlike = [n for n, tensor in after.items() if not same(tensor, editor.tensors[n])]
    assert set(unlike) <= {name, gate, scale, gate.replace("global_scale", "scale")}


def test_what_goes_with_a_repair_is_not_left(broken, tmp_path: Path):
    """The head does not fit a wrong size of the vocabulary either, nor does a dry run say so."""
    editor, _ = broken("llama", "fp8-channel")
    editor.config["vocab_size"] += 1
    folder = editor.save()
    for request in (
        MendRequest(path=folder, dry_run=True, options=ONE),
        MendRequest(path=folder, out=tmp_path / "out", options=ONE),
    ):
        done = mend(request)
        assert [one.code for one in done.repairs] == ["config-shapes"]
        assert done.left == ()


def test_what_is_left_is_what_verify_still_finds(broken, tmp_path: Path):
    """The twin: another fault beside it, for which the source is needed."""
    editor, _ = broken("llama", "fp8-channel")
    editor.config["vocab_size"] += 1
    name = f"{mlp(editor)}.weight_scale"
    editor.tensors[name][3, 0] = float("nan")
    for request in (
        MendRequest(path=editor.save(), dry_run=True, options=ONE),
        MendRequest(path=editor.folder, out=tmp_path / "out", options=ONE),
    ):
        left = [(one.code, one.where, one.needs) for one in mend(request).left]
        assert left == [("scale-not-finite", name, "source")]


@pytest.mark.parametrize("family", ["qwen3_next_mtp", "glm4_moe_mtp"])
def test_multi_token_prediction_that_is_not_ignored(tmp_path: Path, family: str):
    """As `mtp.*`, and as one more layer, neither of which transformers builds."""
    source = save(family, tmp_path)
    folder = convert(source, tmp_path / "broken", load_scheme("fp8-dynamic"))
    config = json.loads((folder / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [
        entry for entry in ignore if not re.search(r"mtp|layers\.4\.", entry)
    ]
    assert len(config["quantization_config"]["ignore"]) < len(ignore) - 8
    (folder / "config.json").write_text(json.dumps(config))
    assert {one.code for one in verify(folder).notes} >= {"not-ignored"}
    done = mend(MendRequest(path=folder, out=tmp_path / "out", options=ONE))
    assert done.ok
    assert [one.code for one in done.repairs] == ["not-ignored"]
    assert not [one for one in verify(tmp_path / "out").notes if one.code == "not-ignored"]


def test_a_missing_index_is_written(sources, tmp_path: Path):
    folder = two_shards(sources, tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    assert [one.code for one in verify(folder).findings] == ["index-mismatch"]
    done = mend(MendRequest(path=folder, in_place=True))
    assert done.ok
    assert done.kept == ()
    assert (folder / "model.safetensors.index.json").exists()


def test_a_tensor_in_two_shards_is_left_and_told(sources, tmp_path: Path):
    """Which of the two counts, only its owner knows."""
    folder = two_shards(sources, tmp_path)
    first = min(folder.glob("model-*.safetensors"))
    tensors = load_file(first) | {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, first)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (folder / "config.json").write_text(json.dumps(config))
    done = mend(MendRequest(path=folder, out=tmp_path / "out", options=ONE))
    assert "status" in [one.code for one in done.repairs]
    assert ("index-mismatch", "model.norm.weight") in [(one.code, one.where) for one in done.left]


def test_a_tie_that_the_source_has_is_restored(tmp_path: Path):
    source = save("llama_tied", tmp_path)
    out = convert(source, tmp_path / "out", recipe("fp8-channel"))
    held = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(held.replace(b'embeddings": true', b'embeddings": false'))
    assert (out / "config.json").read_bytes() != held
    done = mend(MendRequest(path=out, out=tmp_path / "mended", source=source, options=ONE))
    assert done.ok
    assert json.loads((tmp_path / "mended" / "config.json").read_bytes()) == json.loads(held)


@pytest.mark.parametrize("damage", ["a shard cut off", "an empty shard", "an index of garbage"])
def test_a_file_that_cannot_be_read_is_told_and_mended_without_it(
    sources, tmp_path: Path, damage: str
):
    folder = two_shards(sources, tmp_path)
    good = shutil.copytree(folder, tmp_path / "good")
    broken = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    if damage == "an index of garbage":
        broken = folder / "model.safetensors.index.json"
    broken.write_bytes(broken.read_bytes()[: 0 if "empty" in damage else -100])
    request = MendRequest(path=folder, out=tmp_path / "out", source=sources("llama"), options=ONE)
    with pytest.raises(SourceError, match=f"delete {broken.name}: mend "):
        mend(request)
    broken.unlink()
    assert mend(request).ok
    assert equal(tmp_path / "out", good)


def test_a_repair_with_two_readings_is_told_not_made(broken):
    """Of two candidates that would do, none is taken; one alone is."""
    editor, _ = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    ckpt = open_checkpoint(editor.save())

    def both(case, found):
        for extra in ("one", "two"):
            fields = {"quantization_status": "compressed", "note": extra}
            yield from edited(case, "status", extra, lambda own, f=fields: own.update(f))

    settled = settle_headers(draft_of(ckpt), None, {"status": (both,)}, ())
    assert settled.repairs == ()
    assert [(one.needs, one.said) for one in settled.told] == [("choice", "one or two")]

    def one(case, found):
        yield next(both(case, found))

    assert len(settle_headers(draft_of(ckpt), None, {"status": (one,)}, ()).repairs) == 1


def test_a_candidate_that_brings_a_fault_is_not_made(broken):
    editor, _ = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    ckpt = open_checkpoint(editor.save())

    def worse(case, found):
        fields = {"quantization_status": "compressed", "ignore": ["re:.*down_proj"]}
        yield from edited(case, "status", "worse", lambda own: own.update(fields))

    assert settle_headers(draft_of(ckpt), None, {"status": (worse,)}, ()).repairs == ()


def test_verify_proposes_the_command(broken, capsys):
    editor, source = broken("llama", "fp8-channel")
    del editor.quantization["quantization_status"]
    folder = editor.save()
    show_report(verify(folder), json=False)
    assert f"mend what can be mended: ckptq mend {folder} OUT\n" in capsys.readouterr().out
    editor.tensors[f"{mlp(editor)}.weight_scale"][3, 0] = float("nan")
    assert proposal(verify(editor.save())) == f"ckptq mend {folder} OUT --source SOURCE"
    found = proposal(verify(folder, source))
    assert found == f"ckptq mend {folder} OUT --source {source}"


def test_verify_proposes_nothing_that_mend_cannot_do(broken, capsys):
    editor, source = broken("llama", "fp8-channel", True)
    del editor.tensors[editor.named("layers.1.self_attn.k_scale")]
    show_report(verify(editor.save(), source), json=False)
    assert "mend what can be mended" not in capsys.readouterr().out


def test_the_codes_are_those_that_have_a_repair():
    known = {*codes_of.ALONE, *codes_of.FROM_SOURCE, *codes_of.WITH_SOURCE}
    assert known == {*registry.NAMES, *registry.HEADERS, *registry.VALUES}
    assert {*known, *codes_of.TEXT, *codes_of.NOTES} <= KINDS.keys()


def test_another_model_is_no_source(sources, broken, tmp_path: Path):
    """Of another type, of other sizes, of the same sizes with other weights: not one is copied."""
    editor, _ = broken("llama", "fp8-channel", False)
    editor.tensors[f"{mlp(editor)}.weight_scale"][:] = torch.nan
    folder = editor.save()
    torch.manual_seed(5)
    for name, more in (("other weights", {}), ("wider", {"hidden_size": 128})):
        causal("Llama", TEXT | more).bfloat16().save_pretrained(tmp_path / name)
    for source in (sources("llama4"), tmp_path / "other weights", tmp_path / "wider"):
        with pytest.raises(UsageError, match="was not made from it"):
            mend(MendRequest(path=folder, out=tmp_path / "out", source=source, options=ONE))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["awq", "gptq", "modelopt fp8", "modelopt nvfp4"])
def test_other_makers_checkpoints_are_not_relabelled(tmp_path: Path, format: str):
    maker, method = {
        "awq": (awq, AWQ_METHOD), "gptq": (gptq(), gptq_method()),
        "modelopt fp8": (fp8, fp8_method()), "modelopt nvfp4": (nvfp4, nvfp4_method()),
    }[format]  # fmt: skip
    foreign = write(tmp_path / "theirs", maker, method)
    with pytest.raises(SourceError, match="--scheme repack"):
        mend(MendRequest(path=foreign.folder, out=tmp_path / "out", options=ONE))


def test_a_snapshot_of_the_hub_s_cache_is_mended(broken, good, tmp_path: Path):
    """Links to blobs, a space and other letters in the path; the blobs stay as they are."""
    editor, _ = broken("llama", "fp8-channel", False)
    del editor.quantization["quantization_status"]
    blobs, snapshot = tmp_path / "hüb 缓存" / "blobs", tmp_path / "hüb 缓存" / "snapshots" / "1"
    blobs.parent.mkdir()
    editor.save().rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    out = tmp_path / "öut"
    assert mend(MendRequest(path=snapshot, out=out, headers_only=True, options=ONE)).ok
    assert equal(out, good("llama", "fp8-channel", False)[0])
    assert not any(file.is_symlink() for file in out.iterdir())
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
