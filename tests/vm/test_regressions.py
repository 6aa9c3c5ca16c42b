"""Defects that an attack on the finished code has found, each with the test that would have."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.pod.client import STDERR, STDOUT, Client
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec.default import CAPABILITIES
from holdfast.spec.mounts import parse_mount
from tests.images import is_clean, make_bundle, make_disk
from tests.vm.support import BUSYBOX, assert_holds_nothing, output, sh

if TYPE_CHECKING:
    from pathlib import Path


def test_a_flood_whose_client_is_gone_comes_to_its_end(pod):
    """Nobody gives the process's output credit any more, and still its end must be reported and its storage freed."""
    request = container_request(
        "flood", pod.data, image=BUSYBOX, args=["sh", "-c", "while :; do echo flood flood flood; done"],
        stdio=Stdio(0, STDOUT, STDERR),
    )  # fmt: skip
    with Client.connect(pod.root, pod.name) as client:
        client.open(STDOUT, STDERR)
        client.request("run", msgspec.to_builtins(request))
        # The client reads nothing: the process stands still when all credit on the way is used up.
        for _ in range(200):
            if "pipe_write" in pod.exec("flood", ["cat", "/proc/1/wchan"]).text:
                break
        else:
            pytest.fail("the process never had to wait")
    pod.wait("flood")
    # Its name, its layers and its scratch are free again.
    assert output(sh(pod, "echo after", name="flood")) == "after\n"


def test_two_that_detach_at_once(pod, tmp_path):
    """Each lets go of one attachment; none fails, and none is left."""
    disk = make_disk(tmp_path / "disk", "ext4", size="16M")
    paths = {pod.attach(f"type=disk,src={disk}") for _ in range(4)}
    assert len(paths) == 1
    [path] = paths
    errors: list[HoldfastError] = []

    def detach() -> None:
        try:
            with holdfast.Pod.open(pod.name, root=pod.root, data=pod.data) as other:
                other.detach(path)
        except HoldfastError as error:
            errors.append(error)

    threads = [threading.Thread(target=detach) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_holds_nothing(pod)


def test_dots_after_a_link_are_the_kernels_to_resolve(shared_pod, tmp_path: Path):
    """``link/../name`` lies beside what the link leads to, not beside the link."""
    (tmp_path / "deep/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/inner")
    (tmp_path / "name").write_text("wrong\n")
    (tmp_path / "deep/name").write_text("right\n")
    source = f"{tmp_path}/link/../name"
    assert os.path.samefile(parse_mount(f"type=bind,src={source},dst=/t", cwd="/")["source"], tmp_path / "deep/name")
    assert output(sh(shared_pod, "cat /t", mounts=[f"type=bind,src={source},dst=/t"])) == "right\n"


def test_a_mount_that_a_container_left_below_its_disk(shared_pod, tmp_path):
    """Where its mounts are shared with the guest's, one with the right to mount could keep its disk for ever."""
    disk = make_disk(tmp_path / "disk", "ext4")
    mighty = (*CAPABILITIES, "CAP_SYS_ADMIN")
    bundle = make_bundle(
        tmp_path / "bundle", ["sh", "-c", "mkdir '/d/sub dir'; mount -t tmpfs none '/d/sub dir'; echo done"],
        linux={"rootfsPropagation": "rshared"},
        process={"capabilities": dict.fromkeys(("bounding", "effective", "permitted"), mighty)},
    )  # fmt: skip
    mount = f"type=disk,src={disk},dst=/d,propagation=rshared"
    assert output(shared_pod.run(bundle=bundle, mounts=[mount])) == "done\n"
    assert_holds_nothing(shared_pod)
    assert is_clean(disk)
