"""From the hub in one pass: the bytes of a local conversion, whatever the network does."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
import torch
from convert_cases import LAYOUTS, recipe_of, save
from convert_killed import Run, convert, digests, perform
from hub_server import MODEL, Faults, Hub
from huggingface_hub import constants

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, plan_of, quantize
from ckptq.errors import MachineError, SourceError, UsageError
from ckptq.recipes.load import load_scheme

ABOUT = ("ckptq.json", "README.md")
"""Files that name the source."""


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Run:
    """The same model converted from a folder: what every stream must give."""
    folder = tmp_path_factory.mktemp("stream")
    torch.manual_seed(0)
    layout = LAYOUTS["llama4"]()
    more = {"model.embed_tokens.weight": torch.randn(200, 128).bfloat16()}
    source = save(folder / "source", replace(layout, tensors=layout.tensors | more))
    (source / "tokenizer_config.json").write_text("{}\n")
    run = Run(source=source, out=folder / "whole", recipe=recipe_of("int4 group asym"))
    assert perform(run)[0] == 0
    return run


@pytest.fixture
def hub(local, tmp_path, monkeypatch):
    hub_server.keep(monkeypatch)
    hub = Hub(shutil.copytree(local.source, tmp_path / "served")).start()
    hub_server.use(hub.endpoint, tmp_path / "cache")
    yield hub
    hub.stop()


def streamed(local: Run, hub: Hub, tmp_path: Path) -> Run:
    cache = Path(constants.HF_HUB_CACHE)
    return replace(local, source=MODEL, out=tmp_path / "out", hub=(hub.endpoint, cache))


def check_equal(local: Run, out: Path) -> None:
    wanted, found = digests(local.out), digests(out)
    assert {n: d for n, d in found.items() if n not in ABOUT} == {
        n: d for n, d in wanted.items() if n not in ABOUT
    }
    assert found.keys() == wanted.keys()


def shards_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


FAULTS = {
    "none": Faults(),
    "slow": Faults(seconds=0.002),
    "errors": Faults(errors=6),
    "cut off": Faults(cut_after=3000, cuts=40),
    "expiring links": Faults(link_lasts=3),
    "all": Faults(errors=3, cut_after=5000, cuts=10, link_lasts=5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bytes_are_those_of_a_local_conversion(local, hub, tmp_path, name):
    hub.faults = replace(FAULTS[name])
    run = streamed(local, hub, tmp_path)
    assert convert(run).source == MODEL
    check_equal(local, run.out)
    assert shards_in(tmp_path / "cache") == []
    assert name not in ("expiring links", "all") or hub.links > 5
    for shard in shards_of(hub):
        size = (hub.folder / shard).stat().st_size
        again = 0 if name in ("none", "slow", "errors") else size
        assert hub.bytes_asked(shard) <= 1.2 * size + 2 * again + 50_000


@pytest.mark.parametrize("case", range(3))
def test_killed_and_cut_off_it_goes_on(local, hub, tmp_path, case):
    run = streamed(local, hub, tmp_path)
    hub.faults = Faults(cut_after=6000, cuts=5, link_lasts=20)
    chance = random.Random(case)
    code, _ = perform(replace(run, die_at=chance.randrange(20, 250), die_in="pwrite"))
    assert code == -signal.SIGKILL
    assert not run.out.exists()
    hub.faults = Faults(cut_after=6000, cuts=5)
    convert(run)
    check_equal(local, run.out)
    assert not partial_of(run.out).exists()
    assert shards_in(tmp_path / "cache") == []


def test_what_is_converted_is_not_fetched_again(local, hub, tmp_path, monkeypatch):
    run = streamed(local, hub, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ckptq.convert.output.write_side_files", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(run)
    hub.ranges.clear()
    convert(run)
    assert {shard: hub.bytes_asked(shard) for shard in shards_of(hub)} == headers_of(hub)
    check_equal(local, run.out)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def shards_of(hub: Hub) -> list[str]:
    return [name for name in hub.files() if name.endswith(".safetensors")]


def headers_of(hub: Hub) -> dict[str, int]:
    """Bytes of each shard's header."""
    heads = {name: (hub.folder / name).read_bytes()[:8] for name in shards_of(hub)}
    return {name: 8 + int.from_bytes(head, "little") for name, head in heads.items()}


def test_a_file_that_changes_is_refused(local, hub, tmp_path):
    run = streamed(local, hub, tmp_path)
    ckpt = open_checkpoint(MODEL, stream=True)
    shard = ckpt.headers[0].file.name
    hub.etags[shard] = "another"
    with pytest.raises(SourceError, match=r"changed on the hub.*etag was \w+, is another"):
        ckpt.headers[0].identity.check_unchanged()
    hub.faults = Faults(link_lasts=3)  # two for the header
    tensor = next(iter(ckpt.headers[0].tensors.values()))
    tensor.identity.read(0, 1)
    with pytest.raises(SourceError, match="changed on the hub"):
        tensor.identity.read(1, 1)
    hub.etags.clear()
    with (hub.folder / shard).open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="changed on the hub"):
        tensor.identity.read(0, 1)
    assert not run.out.exists()


def test_it_gives_up_after_a_number_of_tries(local, hub, tmp_path):
    run = streamed(local, hub, tmp_path)
    ckpt = open_checkpoint(MODEL, stream=True)
    hub.faults = Faults(errors=1 << 20)
    file = ckpt.headers[0].identity
    with pytest.raises(MachineError, match=r"bytes 5 to 9 did not arrive .* in 8 tries: .*500"):
        file.read(5, 4)
    hub.faults = Faults(ranges=False)
    with pytest.raises(MachineError, match="without ranges, download the model first"):
        file.read(5, 4)
    hub.stop()
    with pytest.raises(MachineError, match=r"did not arrive .* in 8 tries"):
        file.read(5, 4)
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("faults", "said"),
    [(Faults(encoded=True), "sent them in gzip"), (Faults(surplus=b"x"), "the server sent more")],
)
def test_bytes_that_were_not_asked_for_are_refused(hub, faults, said):
    """They would be taken for the file's, or shift what follows."""
    file = open_checkpoint(MODEL, stream=True).headers[0].identity
    assert len(file.read(5, 4)) == 4
    hub.faults = faults
    with pytest.raises(MachineError, match=said):
        file.read(5, 4)


def request(tmp_path: Path, **changes) -> QuantizeRequest:
    made = {"model": MODEL, "recipe": load_scheme("fp8-dynamic"), "out": tmp_path / "out"}
    options = RunOptions(device="cpu", workers=2)
    return QuantizeRequest(**made | {"stream": True, "options": options} | changes)


def test_a_branch_that_moves_does_not_move_the_run(local, hub, tmp_path, monkeypatch):
    """A run that was interrupted reads the commit that it has begun with."""
    first = hub.commit
    with monkeypatch.context() as patch:
        patch.setattr("ckptq.convert.output.write_side_files", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(request(tmp_path))
    hub.commit = "f00d" + "0" * 36
    with pytest.raises(UsageError, match=r"source.revision was .c0ffee0+., is .f00d0+"):
        quantize(request(tmp_path, revision="main"))
    quantize(request(tmp_path))
    assert first in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_reads_headers_only(hub, tmp_path):
    plan = plan_of(request(tmp_path))
    assert plan.write_bytes
    assert {shard: hub.bytes_asked(shard) for shard in shards_of(hub)} == headers_of(hub)


def test_what_reads_weights_more_than_once_is_refused(hub, tmp_path):
    with pytest.raises(UsageError, match="pass the file of `ckptq calibrate` with --scales"):
        quantize(request(tmp_path, recipe=load_scheme("FP8")))
    with pytest.raises(UsageError, match="--stream applies only to hub ids"):
        quantize(request(tmp_path, model=hub.folder))
