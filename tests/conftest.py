"""What all tests share: how they are divided among processes (`pytest -n 2 --dist loadgroup`), and
where kernels run: on a GPU where there is one, else in Triton's interpreter.

That is chosen before anything imports triton, which looks at the environment then.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


gc.set_threshold(50_000, 20, 100)
"""The collector is a tenth of the time where torch, transformers and all tests are in memory."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays in one process, and so do all that wait for compiled kernels: its session
    fixtures, and what it compiles, are then made once."""
    for item in items:
        name = item.path.name
        group = "builds" if name.startswith("test_builds") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is in memory by now stays there: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain, at the end, of what they cannot take apart
