"""What tests/vm/test_volumes.py says of pods in machines, for pods in namespaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from tests import leaks
from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_volumes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

data = namespace_pods.data


@pytest.fixture(scope="module")
def pod(data: Path, run_folder: Path) -> Iterator[holdfast.Pod]:
    root = run_folder / "nvolumes"
    leaks.expect(root)
    with leaks.long_lived():
        pod = holdfast.Pod("shared", isolation="namespace", root=root, data=data)
    with pod:
        yield pod


globals().update(same_as(test_volumes))
