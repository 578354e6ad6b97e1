"""`--device`: one rule for all commands, and words for what is not there."""

from __future__ import annotations

import pytest
import torch

from ckptq.device import find_device
from ckptq.errors import MachineError, UsageError


@pytest.fixture
def gpus(monkeypatch):
    """How many GPUs the machine says that it has."""

    def are(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return are


@pytest.mark.parametrize(("count", "found"), [(0, "cpu"), (1, "cuda"), (4, "cuda")])
def test_without_a_name_it_is_a_gpu_where_there_is_one(gpus, count, found):
    gpus(count)
    assert str(find_device(None)) == found
    assert str(find_device("cpu")) == "cpu"


def test_each_process_of_torchrun_takes_its_own_gpu(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(find_device(None)) == str(find_device("cuda")) == "cuda:1"
    assert str(find_device("cuda:0")) == "cuda:0"
    assert str(find_device("cpu")) == "cpu"
    gpus(1)
    with pytest.raises(MachineError, match="--device cuda:1: this machine has 1 GPUs"):
        find_device(None)


def test_what_is_not_there_or_not_supported_is_said(gpus):
    gpus(0)
    with pytest.raises(MachineError, match="--device cuda:1: no such GPU on this machine"):
        find_device("cuda:1")
    for name in ("tpu", "meta", "cuda:x", "xpu"):
        with pytest.raises(UsageError, match=f"--device {name}: expected cpu, cuda or cuda:N"):
            find_device(name)
