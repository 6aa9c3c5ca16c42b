"""A pod that did not start as most do, for tests of :mod:`tests.both_kinds`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def forked(data: Path, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[holdfast.Pod]:
    """A pod that goes on from another, whose machine has booted for itself, and which has ended."""
    root = run_folder / f"o{abs(hash(request.node.name)) % 10000}"
    leaks.expect(root)
    with leaks.long_lived(), holdfast.Pod(root=root, data=data, template="none") as source:
        [pod] = source.fork()
    with pod:
        yield pod
