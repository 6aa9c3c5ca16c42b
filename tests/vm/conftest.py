"""Pods for tests: clones of one template, which the first test of a fresh data folder builds.

Fixtures:
    data          the data folder, its guest and template ready, and the images BUSYBOX and RICH in it
    rich_tree     what umoci unpacks of RICH
    pod           an empty pod of the test's own
    shared_pod    an empty pod that the tests of a module share, for what does no harm to each other
    own_data      a data folder of the test's own for templates and verdicts to be harmed; guest and images are the same
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.image.store import ImageStore
from tests import images, leaks
from tests.vm.support import BUSYBOX, RICH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def data(data_root: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder, with everything in it that a pod starts from."""
    with leaks.long_lived():
        layout = images.make_busybox(tmp_path_factory.mktemp("busybox"))
        ImageStore(data_root).import_path(f"{layout}:v", BUSYBOX)
        with holdfast.Pod(root=run_folder / "first", data=data_root) as pod:
            assert pod.run(BUSYBOX, ["true"]).status == 0  # makes what scratch disks are copied from, too
    return data_root


@pytest.fixture(scope="session")
def rich_tree(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imports RICH; returns the root filesystem that umoci makes of it."""
    work = tmp_path_factory.mktemp("rich")
    with leaks.long_lived():
        made = images.make_rich(work)
        ImageStore(data).import_path(f"{made.layout}:v", RICH)
        return made.unpack(work / "unpacked")


@pytest.fixture
def pod(data: Path, state_root: Path) -> Iterator[holdfast.Pod]:
    with holdfast.Pod(root=state_root, data=data) as pod:
        yield pod


@pytest.fixture(scope="module")
def shared_pod(data: Path, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[holdfast.Pod]:
    root = run_folder / f"m{abs(hash(request.node.name)) % 10000}"
    leaks.expect(root)
    with leaks.long_lived():
        pod = holdfast.Pod(root=root, data=data)
    with pod:
        yield pod


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for guest in (data / "guests").glob("[0-9a-f]*"):
        target = folder / "guests" / guest.name
        target.mkdir(parents=True)
        for name in ("kernel", "initrd", "root.erofs"):
            os.link(guest / name, target / name)
        record = (guest / "guest.json").read_text()
        (target / "guest.json").write_text(record.replace(str(data), str(folder)))
    for name in ("accelerator.json", "qemu-version"):
        (folder / name).write_bytes((data / name).read_bytes())
    for name in ("images", "layers", "scratch"):
        os.symlink(data / name, folder / name)
    return folder
