"""Two ranks, each alone on its host, with a folder in common: the bytes of one process."""

import json

import pytest
from test_ranks_quantize import files
from tiny.torchrun import forked
from typer.testing import CliRunner

from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.partial import partial_of
from ckptq.cli import app
from ckptq.convert import output
from ckptq.convert.quantize import quantize


class Stopped(Exception):
    """In the middle of a conversion."""


def stop_early(patch: pytest.MonkeyPatch) -> None:
    record = Journal.record

    def stopping(journal, done):
        record(journal, done)
        if len(journal.done) > 5:
            raise Stopped

    patch.setattr(output, "COMMIT_BYTES", 1)
    patch.setattr(Journal, "record", stopping)


def test_two_hosts_write_what_one_process_does(given, tmp_path, monkeypatch):
    """They calibrate, and go on with a conversion that one process has begun."""
    scales = ["calibrate", str(given.llama), "--data", str(given.text), "--batch-size", "2"]
    scales += ["--device", "cpu", "-o"]
    alone = CliRunner().invoke(app, [*scales, str(tmp_path / "scales-1")])
    assert alone.exit_code == 0, alone.output
    quantize(given.request(tmp_path / "out-1"))

    with monkeypatch.context() as patch:
        stop_early(patch)
        with pytest.raises(Stopped):
            quantize(given.request(tmp_path / "out-2"))
    assert partial_of(tmp_path / "out-2").exists()

    convert = ["quantize", given.llama, "-o", tmp_path / "out-2", "--scheme", "fp8-per-head"]
    convert += ["--data", given.text, "--batch-size", "2", "--shard-size", "10KB"]
    convert += ["--device", "cpu", "--json"]
    calibrated, converted = forked(
        tmp_path / "session", [[*scales, tmp_path / "scales-2"], convert], 2, a_host=1
    )
    assert [done.code for done in (*calibrated, *converted)] == [0] * 4, (calibrated, converted)
    assert (tmp_path / "scales-2").read_bytes() == (tmp_path / "scales-1").read_bytes()
    assert files(tmp_path / "out-2") == files(tmp_path / "out-1")
    assert json.loads(converted[0].stdout)["resumed_units"] > 5
    assert not partial_of(tmp_path / "out-2").exists()
    assert not partial_of(tmp_path / "scales-2").exists()
