"""More files than a process may have open: the idle ones are closed, those in use never."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from ckptq.checkpoint.descriptors import Descriptors


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / str(i) for i in range(10)]
    for file in made:
        file.write_text(file.name)
    return made


def opener(file: Path) -> int:
    return os.open(file, os.O_RDONLY)


def count_open(files: list[Path]) -> int:
    held = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    return len(held & {str(file) for file in files})


def test_no_more_are_open_than_allowed_and_each_gives_its_own_bytes(files):
    held = Descriptors(opener, most=3)
    for file in [*files, *reversed(files)]:
        with held.lease(file) as descriptor:
            assert os.pread(descriptor, 9, 0) == file.name.encode()
        assert count_open(files) <= 3
    held.close()
    assert count_open(files) == 0


def test_the_longest_unused_goes_first(files):
    opened: list[str] = []
    held = Descriptors(lambda file: (opened.append(file.name), opener(file))[1], most=2)
    for number in (0, 1, 0, 2, 0, 1):
        with held.lease(files[number]):
            pass
    assert opened == ["0", "1", "2", "1"]
    held.close()


def test_what_is_in_use_stays_open_whatever_others_ask_for(files):
    held = Descriptors(opener, most=1)
    with held.lease(files[0]) as first:
        for file in files[1:]:
            with held.lease(file):
                assert os.pread(first, 9, 0) == b"0"
    held.close()


def test_many_threads_read_many_files_through_few_descriptors(files):
    held, wrong = Descriptors(opener, most=2), []

    def read(seed: int) -> None:
        for i in range(200):
            file = files[(seed + i * 7) % len(files)]
            with held.lease(file) as descriptor:
                if os.pread(descriptor, 9, 0) != file.name.encode():
                    wrong.append(file)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held.close()
    assert wrong == []


def test_where_the_system_has_no_more_the_idle_ones_are_given_back(files):
    refused = [True]

    def scarce(file: Path) -> int:
        if file in files[5:7] and count_open(files):
            refused.append(True)
            raise OSError(errno.EMFILE, "too many")
        return opener(file)

    held = Descriptors(scarce, most=100)
    for file in files[:6]:
        with held.lease(file):
            pass
    assert len(refused) == 2
    with held.lease(files[1]), pytest.raises(OSError, match="too many"), held.lease(files[6]):
        pass
    held.close()
