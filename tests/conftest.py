"""What all tests share: where kernels run, on a GPU where there is one, else in the interpreter.

That is chosen before anything imports triton, which looks at the environment then.
"""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tiny.interpreter import hasten

        hasten()


LONGEST = ("test_families", "test_builds", "test_verify_faults", "test_gptq_verify")
LONGEST += ("test_gptq_oneshot", "test_make_checkpoint")
"""Files that would decide when all tests end, if a process began with one of them last."""

gc.set_threshold(50_000, 20, 100)
"""The collector is a tenth of the time where torch, transformers and all tests are in memory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is in memory by now stays there: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain, at the end, of what they cannot take apart
