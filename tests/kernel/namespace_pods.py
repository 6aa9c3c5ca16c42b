"""Pods in namespaces, for tests; a module that wants the fixtures says so::

    data, pod, shared_pod = namespace_pods.FIXTURES

Fixtures:
    data          the data folder with the image BUSYBOX in it
    pod           an empty pod of the test's own
    shared_pod    an empty pod that the tests of a module share, for what does no harm to each other
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.image.store import ImageStore
from tests import images, leaks
from tests.vm.support import BUSYBOX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def data(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with leaks.long_lived():
        layout = images.make_busybox(tmp_path_factory.mktemp("busybox"))
        ImageStore(data_root).import_path(f"{layout}:v", BUSYBOX)
    return data_root


@pytest.fixture
def pod(data: Path, state_root: Path) -> Iterator[holdfast.Pod]:
    with holdfast.Pod(isolation="namespace", root=state_root, data=data) as pod:
        yield pod


@pytest.fixture(scope="module")
def shared_pod(data: Path, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[holdfast.Pod]:
    root = run_folder / f"n{abs(hash(request.node.name)) % 10000}"
    leaks.expect(root)
    with leaks.long_lived():
        pod = holdfast.Pod(isolation="namespace", root=root, data=data)
    with pod:
        yield pod


FIXTURES = (data, pod, shared_pod)
