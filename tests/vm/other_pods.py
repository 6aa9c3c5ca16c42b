"""Pods that did not start as most do, for tests of :mod:`tests.both_kinds`: booted, and copied from one that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _root(run_folder: Path, request: pytest.FixtureRequest) -> Path:
    root = run_folder / f"o{abs(hash(request.node.name)) % 10000}"
    leaks.expect(root)
    return root


@pytest.fixture(scope="module")
def booted(data: Path, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[holdfast.Pod]:
    """A pod whose machine has booted for itself."""
    with leaks.long_lived():
        pod = holdfast.Pod(root=_root(run_folder, request), data=data, template="none")
    with pod:
        yield pod


@pytest.fixture(scope="module")
def forked(data: Path, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[holdfast.Pod]:
    """A pod that goes on from another, which has ended."""
    root = _root(run_folder, request)
    with leaks.long_lived(), holdfast.Pod(root=root, data=data) as source:
        [pod] = source.fork()
    with pod:
        yield pod
