"""A killed calibration goes on where it stopped and ends with the bytes of one that was not."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from calibrate_models import LAYERS, samples_of
from tiny.forked import SECONDS, process
from tiny.rows import token_rows

from ckptq.calibrate import journal as journal_module
from ckptq.calibrate.run import calibrate
from ckptq.calibrate.scales import save_scales
from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import MachineError, SourceError, UsageError
from ckptq.plan.attention import AttentionPlan

SAMPLES = samples_of(token_rows([24, 11, 24, 24]))


@pytest.fixture(autouse=True)
def every_layer(monkeypatch):
    """Keep the state after every layer, however long that takes."""
    monkeypatch.setattr(journal_module, "SHARE_OF_TIME", float("inf"))


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def raise_killed() -> None:
    raise Killed


def run(ckpt, folder: Path, die_after=None, observer="percentile", die=raise_killed):
    def progress(done: int, total: int) -> None:
        if done == die_after:
            die()

    return calibrate(
        ckpt,
        SAMPLES,
        attention=AttentionPlan(observer=observer),
        batch_size=2,
        journal=folder,
        progress=progress,
    )


def written(scales, path: Path) -> bytes:
    save_scales(path, scales)
    return path.read_bytes()


@pytest.mark.parametrize("observer", ["percentile", "static_minmax"])
def test_interrupted_after_any_layer_ends_with_the_same_bytes(
    saved, tmp_path, run_layers, observer
):
    ckpt = saved("llama4")
    want = written(run(ckpt, tmp_path / "whole", observer=observer), tmp_path / "want")
    for die_after in range(1, LAYERS):
        folder = tmp_path / str(die_after)
        with pytest.raises(Killed):
            run(ckpt, folder, die_after, observer)
        run_layers.clear()
        assert written(run(ckpt, folder, observer=observer), tmp_path / "got") == want
        assert run_layers == list(range(die_after, LAYERS))


def test_killed_again_and_again(saved, tmp_path, run_layers):
    ckpt = saved("llama")
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    run_layers.clear()
    for die_after in (1, 2, 3):
        with pytest.raises(Killed):
            run(ckpt, tmp_path / "journal", die_after)
    assert written(run(ckpt, tmp_path / "journal"), tmp_path / "got") == want
    assert run_layers == [0, 1, 2, 3]


def test_finished_run_is_not_run_again(saved, tmp_path, run_layers):
    ckpt = saved("llama")
    first = written(run(ckpt, tmp_path / "journal"), tmp_path / "first")
    run_layers.clear()
    assert written(run(ckpt, tmp_path / "journal"), tmp_path / "again") == first
    assert not run_layers
    assert {file.name for file in (tmp_path / "journal").iterdir()} == {"run.json", "result"}


def test_half_written_state_is_no_state(saved, tmp_path, run_layers):
    """A run that died while it wrote the second state goes on from the first."""
    ckpt = saved("llama")
    folder = tmp_path / "journal"
    with pytest.raises(Killed):
        run(ckpt, folder, 1)
    (folder / "layer-00002.partial").mkdir()
    (folder / "layer-00002.partial" / "batch-00000.safetensors").write_bytes(b"torn")
    run_layers.clear()
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    run_layers.clear()
    assert written(run(ckpt, folder), tmp_path / "got") == want
    assert run_layers == [1, 2, 3]


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[:-64] + bytes(64),
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["batch-00000.safetensors", "statistics.safetensors", "seal.json"])
def test_a_state_is_proved_before_it_is_trusted(saved, tmp_path, run_layers, name, damage):
    ckpt, folder = saved("llama"), tmp_path / "journal"
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    with pytest.raises(Killed):
        run(ckpt, folder, 2)
    file = folder / "layer-00002" / name
    if DAMAGE[damage] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    run_layers.clear()
    with pytest.warns(UserWarning, match=r"layer-00002: differs from what was written"):
        assert written(run(ckpt, folder), tmp_path / "got") == want
    assert run_layers == list(range(LAYERS))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_result_is_proved_before_it_is_trusted(saved, tmp_path, run_layers, damage):
    ckpt, folder = saved("llama"), tmp_path / "journal"
    want = written(run(ckpt, folder), tmp_path / "want")
    file = folder / "result" / "scales.safetensors"
    if DAMAGE[damage] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    run_layers.clear()
    assert written(run(ckpt, folder), tmp_path / "got") == want
    assert run_layers == list(range(LAYERS))


def test_a_damaged_record_of_the_run_says_so(saved, tmp_path):
    ckpt = saved("llama")
    with pytest.raises(Killed):
        run(ckpt, tmp_path, 1)
    (tmp_path / "run.json").write_bytes(bytes(20))
    with pytest.raises(MachineError, match=r"run.json: damaged .*--restart to start over"):
        run(ckpt, tmp_path)


def test_a_source_that_changes_while_it_is_read_is_refused(saved, tmp_path):
    """After its last layer was read: nothing that was calibrated on it may be called done."""
    ckpt = saved("llama")
    copy = tmp_path / "source"
    shutil.copytree(ckpt.path, copy)
    file = next(copy.glob("*.safetensors"))
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns

    def progress(done: int, total: int) -> None:
        if done == total:
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            os.utime(file, ns=times)

    with pytest.raises(SourceError, match=rf"{file.name}: changed while it was read"):
        calibrate(
            open_checkpoint(copy), SAMPLES, batch_size=2, journal=tmp_path / "j", progress=progress
        )
    assert not (tmp_path / "j" / "result").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples": samples_of(token_rows([24], seed=1))}, "samples was"),
        (
            {"attention": AttentionPlan(strategy="tensor", observer="percentile")},
            "strategy was 'attn_head', is 'tensor'",
        ),
        ({"attention": AttentionPlan(observer="mse")}, "observer was"),
        ({"batch_size": 1}, "batch_size was 2, is 1"),
    ],
)
def test_a_different_run_is_refused_with_the_difference_named(saved, tmp_path, change, named):
    ckpt = saved("llama")
    with pytest.raises(Killed):
        run(ckpt, tmp_path, 1)
    before = {"attention": AttentionPlan(observer="percentile"), "batch_size": 2}
    arguments = before | {"samples": SAMPLES} | change
    with pytest.raises(UsageError, match=named):
        calibrate(ckpt, journal=tmp_path, **arguments)


def test_a_changed_source_is_refused(saved, tmp_path):
    ckpt = saved("llama")
    with pytest.raises(Killed):
        run(ckpt, tmp_path, 1)
    config = {**ckpt.config, "rms_norm_eps": 1e-3}
    with pytest.raises(UsageError, match="source was"):
        run(replace(ckpt, config=config), tmp_path)


def test_layers_that_share_keys_begin_again(saved, tmp_path, run_layers):
    """What Gemma-3n's layers hand each other is not kept: such a run starts from layer 0."""
    ckpt = saved("gemma3n")
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    with pytest.raises(Killed):
        run(ckpt, tmp_path / "journal", 3)
    run_layers.clear()
    assert written(run(ckpt, tmp_path / "journal"), tmp_path / "got") == want
    assert run_layers == [0, 1, 2, 3]


def test_writing_takes_a_tenth_of_the_time_at_most(saved, tmp_path, monkeypatch):
    """With states that take 1 s and layers that take 4 s, one state in three layers is kept."""
    clock = [0.0]
    monkeypatch.setattr(journal_module, "monotonic", lambda: clock[0])
    written_after: list[int] = []

    def write(self, done, stream, points):
        clock[0] += 1
        written_after.append(done)

    monkeypatch.setattr(journal_module.Journal, "_write", write)
    monkeypatch.setattr(journal_module, "SHARE_OF_TIME", 0.1)
    journal = journal_module.Journal(tmp_path, {})

    class AlwaysResumable:
        resumable = True
        quantized = None
        hidden_BSE = ()

    for done in range(1, 9):
        clock[0] += 4
        journal.keep(done, AlwaysResumable(), type("Empty", (), {"points": {}}))
    assert written_after == [1, 4, 7]


def killed(source: Path, folder: Path) -> None:
    journal_module.SHARE_OF_TIME = float("inf")
    run(open_checkpoint(source), folder, 2, die=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_sigkill(saved, tmp_path, run_layers):
    ckpt = saved("llama")
    folder = tmp_path / "journal"
    run_killed = process(killed, ckpt.path, folder)
    run_killed.start()
    run_killed.join(SECONDS)
    assert run_killed.exitcode == -signal.SIGKILL
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    run_layers.clear()
    assert written(run(ckpt, folder), tmp_path / "got") == want
    assert run_layers == [2, 3]


def test_a_run_that_has_kept_nothing_is_in_nobodys_way(saved, tmp_path, monkeypatch):
    """A corrected command begins where the first one ended before its first state."""
    ckpt = saved("llama")
    with monkeypatch.context() as context:
        context.setattr(journal_module, "SHARE_OF_TIME", 0.0)
        with pytest.raises(Killed):
            run(ckpt, tmp_path / "journal", 1, observer="mse")
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    assert written(run(ckpt, tmp_path / "journal"), tmp_path / "got") == want


def test_a_full_disk_costs_the_state_and_not_the_run(saved, tmp_path, monkeypatch, run_layers):
    ckpt = saved("llama")
    want = written(run(ckpt, tmp_path / "whole"), tmp_path / "want")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    said = pytest.warns(UserWarning, match="journal: 0.0 GB are free, but the calibration state")
    with said as told, pytest.raises(Killed):
        run(ckpt, tmp_path / "journal", 3)
    assert len(told) == 1
    run_layers.clear()
    with pytest.warns(UserWarning, match="cannot resume"):
        assert written(run(ckpt, tmp_path / "journal"), tmp_path / "got") == want
    assert run_layers == [0, 1, 2, 3]


def test_a_short_run_writes_no_state(saved, tmp_path, monkeypatch):
    """The first state is expected to take a second for a gigabyte."""
    monkeypatch.setattr(journal_module, "SHARE_OF_TIME", 0.1)
    monkeypatch.setattr(journal_module, "GUESSED_SPEED", 1.0)
    with pytest.raises(Killed):
        run(saved("llama"), tmp_path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
