"""What all tests share: how they are divided among processes (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays in one process, and so do all that wait for compiled kernels: its session
    fixtures, and what it compiles, are then made once."""
    for item in items:
        name = item.path.name
        group = "builds" if name.startswith("test_builds") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
