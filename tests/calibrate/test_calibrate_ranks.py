"""Two processes under torchrun, on CPUs: the file that one process writes, to the last byte."""

import os
import subprocess
import sys

import pytest
import torch
from tiny.rows import token_rows, write_rows
from typer.testing import CliRunner

from ckptq.calibrate.divided import check_observers
from ckptq.calibrate.observers import make_observer
from ckptq.calibrate.statistics import Statistics, Wanted
from ckptq.cli import app
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import UsageError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "fp8-per-head"), ("mixtral", "fp8-static")]
)
def test_two_processes_write_what_one_does(saved, tmp_path, family, scheme):
    text = tmp_path / "rows.jsonl"
    rows = token_rows([24, 17, 9, 24, 24])
    write_rows(text, rows)
    command = ["calibrate", str(saved(family).path), "--scheme", scheme, "--data", str(text)]
    command += ["--batch-size", "2", "--device", "cpu", "-o"]
    alone = CliRunner().invoke(app, [*command, str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    done = subprocess.run(
        [*TORCHRUN, "-m", "ckptq", *command, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two").read_bytes() == (tmp_path / "alone").read_bytes()
    assert done.stdout.count("scales") == alone.stdout.count("scales")


def test_a_half_is_not_the_whole():
    """The comparison above can fail: what one of the two has seen gives other scales."""
    batches = range(5)
    halves = [Ranks(rank, 2).share(batches) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == list(batches)
    wanted = Wanted(
        strategy="tensor", attention=make_observer("static_minmax", None), inputs={},
        linear=make_observer("static_minmax", None),
    )  # fmt: skip
    one, other = Statistics(wanted), Statistics(wanted)
    one.add({"a.k": {"amin": torch.tensor([-3.0]), "amax": torch.tensor([2.0])}})
    other.add({"a.k": {"amin": torch.tensor([-1.0]), "amax": torch.tensor([7.0])}})
    before = one.scale("a.k", torch.float32)
    one.add(other.points)
    assert one.scale("a.k", torch.float32).item() == pytest.approx(7 / 448)
    assert before.item() == pytest.approx(3 / 448)


def test_an_average_in_order_is_refused():
    check_observers(["minmax"], ALONE)
    check_observers(["static_minmax", "percentile", "mse"], Ranks(0, 2))
    with pytest.raises(UsageError, match="'minmax' depends on the order of batches, which 2"):
        check_observers(["static_minmax", "minmax"], Ranks(0, 2))
