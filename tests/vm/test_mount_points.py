"""Mount points that a root filesystem lacks are made, and gone when the container is: nothing stays in the host's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from tests.images import make_bundle
from tests.vm.support import Session, assert_holds_nothing, output

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory to mount, with a file to mount."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("content\n")
    return tmp_path / "source"


def mounts(source: Path) -> list[str]:
    return [
        f"type=bind,src={source},dst=/new/deep/dir",
        f"type=bind,src={source}/file,dst=/etc/new/one",
        f"type=bind,src={source}/file,dst=/top",
        "type=tmpfs,dst=/new/memory",
        f"type=bind,src={source},dst=/new/memory/below,ro",
        f"type=bind,src={source},dst=/var/run/linked",
        f"type=bind,src={source},dst=/home/user",
    ]


def names(root: Path) -> list[str]:
    return sorted(os.path.join(where, name) for where, folders, files in os.walk(root) for name in folders + files)


def bundle(folder: Path, script: str) -> Path:
    made = make_bundle(folder, ["sh", "-c", script])
    (made / "rootfs/var").mkdir()
    os.symlink("../inside", made / "rootfs/var/run")  # to what is not there yet
    return made


def test_none_stays(shared_pod, tmp_path, source):
    seen = "/new/deep/dir/file /etc/new/one /top /new/memory/below/file /inside/linked/file"
    script = f"cat {seen}; touch /mine /new/mine"
    made = bundle(tmp_path / "b", script)
    before = names(made / "rootfs")
    assert output(shared_pod.run(bundle=made, mounts=mounts(source))) == "content\n" * 5
    # What the container has made is its own, and so is the folder that it has made it in.
    root = made / "rootfs"
    assert names(root) == sorted([*before, f"{root}/mine", f"{root}/new", f"{root}/new/mine"])
    assert names(source) == [f"{source}/file"]
    assert_holds_nothing(shared_pod)


def test_none_stays_after_a_start_that_failed(shared_pod, tmp_path, source):
    made = bundle(tmp_path / "b", "true")
    before = names(made / "rootfs")
    with pytest.raises(HoldfastError):
        shared_pod.run(bundle=made, args=["/no/such/program"], mounts=mounts(source))
    assert names(made / "rootfs") == before
    assert_holds_nothing(shared_pod)


def test_two_containers_with_one_root(shared_pod, tmp_path, source):
    """The mount points go with the last: without them the other would lose its mounts."""
    made = bundle(tmp_path / "b", "echo up; read x; cat /new/deep/dir/file /top")
    before = names(made / "rootfs")
    stdio = Stdio(STDIN, STDOUT, STDERR)
    request = container_request("first", shared_pod.data, bundle=made, mounts=mounts(source), stdio=stdio)
    with Session(shared_pod, "run", request, stdin=True) as one:
        one.wait_for(b"up")
        assert output(shared_pod.run(bundle=made, args=["cat", "/top"], mounts=mounts(source))) == "content\n"
        one.write(b"\n")
        assert one.wait() == 0
        assert one.output[STDOUT] == b"up\ncontent\ncontent\n"
    assert names(made / "rootfs") == before
    assert_holds_nothing(shared_pod)
