"""The folder in which a run works: what goes with it, and what stays."""

import os

import pytest

from ckptq.checkpoint.partial import check_ours, claim, discard, remove
from ckptq.files import UNFINISHED


@pytest.fixture
def partial(tmp_path):
    """As a killed run leaves it."""
    folder = tmp_path / "out.partial"
    os.close(claim(folder))
    (folder / "calibration").mkdir()
    (folder / f".967fcc7f1c9d{UNFINISHED}").write_bytes(b"")
    return folder


def test_what_a_killed_run_was_writing_goes_with_its_folder(partial):
    remove(partial)
    assert not partial.exists()


def test_what_a_killed_run_was_writing_goes_with_its_work(partial):
    discard(partial)
    assert os.listdir(partial) == ["lock"]
    check_ours(partial)


@pytest.mark.parametrize("name", ["notes.txt", f"notes{UNFINISHED}"])
def test_files_of_a_user_stay(partial, name):
    (partial / name).write_text("mine")
    remove(partial)
    assert os.listdir(partial) == [name]
