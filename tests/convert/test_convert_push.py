"""`--push`: what is on the hub afterwards are the bytes of the output, at once or not at all."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
from convert_cases import LAYOUTS, recipe_of, save
from convert_killed import Run, convert, digests, perform
from hub_server import Hub
from hub_uploads import TOKEN, Repository, UploadFaults

from ckptq.checkpoint.hub import patience
from ckptq.checkpoint.hub.upload import Destination
from ckptq.checkpoint.partial import partial_of
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import FoundWrong, MachineError, UsageError
from ckptq.recipes.load import load_scheme

NAME = "org/quantized"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub_server.keep(monkeypatch)
    hub = Hub(tmp_path / "nothing").start()
    hub_server.use(hub.endpoint, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("push") / "source", LAYOUTS["llama4"]())


@pytest.fixture
def run(hub, source, tmp_path) -> Run:
    return Run(
        source=source,
        out=tmp_path / "out",
        recipe=recipe_of("int4 group asym"),
        push=Destination(name=NAME),
        token=TOKEN,
        hub=(hub.endpoint, tmp_path / "cache"),
    )


def check_there(hub: Hub, out: Path, commits: int = 1) -> None:
    there = hub.uploads.repositories[NAME]
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert there.files == files
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert len(there.commits) == commits
    assert not partial_of(out).exists()


FAULTS = {
    "none": UploadFaults(),
    "errors": UploadFaults(errors=5, each=3),
    "too many": UploadFaults(errors=5, each=3, status=429),
    "cut off": UploadFaults(cuts=9),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bytes_there_are_those_here(hub, run, name):
    hub.uploads.faults = replace(FAULTS[name])
    assert convert(run).pushed == f"{hub.endpoint}/{NAME}/commit/{1:040x}"
    check_there(hub, run.out)
    assert set(hub.uploads.received.values()) == {1}
    sizes = [len(data) for data in hub.uploads.objects.values()]
    assert min(sizes) <= hub.uploads.most_bytes < max(sizes)


def test_shards_are_sent_while_others_are_converted_and_nothing_is_seen(hub, run):
    seen = []

    def before(path: str) -> None:
        if path.startswith(("/upload/", "/complete/")):
            seen.append((run.out.exists(), hub.uploads.visible()))

    hub.uploads.before = before
    convert(run)
    assert (False, {NAME: []}) in seen
    assert {str(visible) for _, visible in seen} == {str({NAME: []})}
    check_there(hub, run.out)


@pytest.mark.parametrize("case", range(3))
def test_killed_it_goes_on(hub, run, case):
    """While it converts, while it uploads, and after everything."""
    die = {0: ("pwrite", 150), 1: ("rename_new", 1), 2: ("rmdir", 1)}[case]
    code, _ = perform(replace(run, die_in=die[0], die_at=die[1]))
    assert code == -signal.SIGKILL
    convert(run)
    check_there(hub, run.out)
    assert set(hub.uploads.received.values()) == {1}


def test_killed_in_the_middle_of_the_upload_it_sends_the_rest(hub, run):
    """The output is there, and is not converted again."""

    def before(path: str) -> None:
        if run.out.exists() and path.endswith("/commit/main"):
            os.kill(killed[0], signal.SIGKILL)
            raise ConnectionAbortedError

    killed = []
    hub.uploads.before = before
    code, _ = perform(run, killed.append)
    assert code == -signal.SIGKILL
    whole = digests(run.out)
    assert hub.uploads.visible() == {NAME: []}
    hub.uploads.before = None
    first = dict(hub.uploads.received)
    assert convert(run).resumed_units
    check_there(hub, run.out)
    assert digests(run.out) == whole
    assert dict(hub.uploads.received) == first


def test_without_a_network_the_output_is_complete_and_the_command_says_what_is_left(hub, run):
    def before(path: str) -> None:
        if path.startswith("/upload/"):
            hub.uploads.faults = UploadFaults(errors=1 << 30)

    hub.uploads.before = before
    with pytest.raises(MachineError) as told:
        convert(run)
    assert "did not answer in 8 tries: " in str(told.value)
    assert f"{run.out} is complete; " in str(told.value)
    assert "rerun the same command to go on" in str(told.value)
    assert run.out.exists()
    assert hub.uploads.visible() == {NAME: []}
    hub.uploads.before, hub.uploads.faults = None, UploadFaults()
    convert(run)
    check_there(hub, run.out)


def test_a_commit_without_an_answer_is_made_again(hub, run):
    hub.uploads.faults = UploadFaults(lost_commits=1)
    convert(run)
    check_there(hub, run.out, commits=2)


def test_other_bytes_there_are_noticed(hub, run):
    hub.uploads.faults = UploadFaults(spoil="config.json")
    with pytest.raises(FoundWrong, match=r"org/quantized/config.json: differs after the upload"):
        convert(run)


def test_a_repository_with_other_weights_is_refused(hub, run):
    held = {"model.safetensors": b"", "README.md": b"", "sub/model.safetensors": b""}
    hub.uploads.repositories[NAME] = Repository(files=held)
    with pytest.raises(UsageError, match=r"weights that this output would not replace \(model\.s"):
        convert(run)
    assert not run.out.exists()
    del held["model.safetensors"]
    convert(run)
    assert hub.uploads.repositories[NAME].files["README.md"]
    assert hub.uploads.repositories[NAME].files["sub/model.safetensors"] == b""


def test_privacy_is_of_new_repositories(hub, run):
    hub.uploads.repositories["org/open"] = Repository()
    for name in ("org/open", "org/closed"):
        out = run.out.with_name(name.rpartition("/")[2])
        convert(replace(run, out=out, push=Destination(name=name, private=True)))
    made = hub.uploads.repositories
    assert (made["org/open"].private, made["org/closed"].private) == (False, True)


REFUSED = {
    "no token": ({"HF_TOKEN": ""}, NAME, "there is no token; log in with `hf auth login`"),
    "bad token": ({"HF_TOKEN": "hf_bad"}, NAME, "the hub does not accept the token"),
    "no rights": ({}, "others/model", "the token does not permit .*rights to create"),
    "no rights there": ({}, "others/theirs", "the token does not permit .*rights to write"),
    "no name": ({}, "a/b/c", "Repo id must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_ends_the_run_before_its_work(hub, run, monkeypatch, case):
    environment, name, words = REFUSED[case]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    hub.uploads.repositories["others/theirs"] = Repository()
    with pytest.raises(UsageError, match=f"--push {name}: {words}"):
        convert(replace(run, push=Destination(name=name)))
    assert not run.out.exists()
    assert hub.uploads.visible() == {"others/theirs": []}


def test_a_model_card_that_the_hub_refuses_is_said_before_the_work(hub, run, monkeypatch):
    monkeypatch.setattr("ckptq.convert.run.documents.model_card", lambda *_: "base_model: bad")
    with pytest.raises(UsageError, match=r"does not accept the model card: .*base_model is bad"):
        convert(run)
    assert not run.out.exists()


def test_offline_is_said(hub, run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"--push org/quantized: HF_HUB_OFFLINE is set"):
        convert(run)


def test_a_part_is_not_uploaded(source, tmp_path):
    from ckptq.convert.division.parts import Part

    options = RunOptions(part=Part(1, 2), push=Destination(name=NAME))
    request = QuantizeRequest(
        model=source, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "out", options=options
    )
    with pytest.raises(UsageError, match="pass --push with --join"):
        quantize(request)


def test_waits_are_as_long_as_those_of_a_stream():
    assert sum(patience.WAIT * 2**n for n in range(patience.TRIES)) > 60
