"""What the kubelet gives a pod: emptyDirs, in memory, on disk or filled by somebody, and ``/dev/shm``."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, InvalidInput, NotFound
from holdfast.spec.kubernetes import EMPTY_DIR, PODS
from tests.vm.support import assert_nothing_held, output, sh, start

if TYPE_CHECKING:
    from collections.abc import Iterator

CRI = "io.kubernetes.cri."
HINT = "dev.gvisor.spec.mount.cache."
MIB = 1 << 20
SEE = "grep ' /cache ' /proc/mounts | cut -d' ' -f3; stat -c %a /cache"


class KubeletPod:
    """A pod as the kubelet keeps it, and what containerd says of it."""

    def __init__(self) -> None:
        self.uid = str(uuid.uuid4())
        self.folder = Path(PODS) / self.uid
        self.shm = self.folder / "containerd/shm"  # as good a place as containerd's own
        self.empty_dir = self.folder / "volumes" / EMPTY_DIR / "cache"
        self.empty_dir.mkdir(parents=True)
        self.shm.mkdir(parents=True)

    def annotations(self, kind: str, *, sandbox: bool = False, **fields: str) -> dict[str, str]:
        """Of the sandbox, or of a container.

        Args:
            kind: the annotated type of the volume.
        """
        found = {
            CRI + "container-type": "sandbox" if sandbox else "container", CRI + "sandbox-id": "abc",
            CRI + "sandbox-log-directory": f"/var/log/pods/ns_name_{self.uid}",
        }  # fmt: skip
        return found | {HINT + "type": kind, HINT + "share": "pod"} | {HINT + key: v for key, v in fields.items()}

    def mount(self, *options: str) -> dict[str, Any]:
        return bind(self.empty_dir, "/cache", *options)

    def shm_mount(self) -> dict[str, Any]:
        return bind(self.shm, "/dev/shm")


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    """As the kubelet has containerd write it."""
    return {
        "type": "bind", "source": str(source), "destination": destination,
        "options": ["rbind", "rprivate", *(options or ("rw",))],
    }  # fmt: skip


@pytest.fixture
def kubelet() -> Iterator[KubeletPod]:
    above = Path(PODS)
    made = [path for path in (above, *above.parents) if not path.exists()]
    found = KubeletPod()
    try:
        yield found
    finally:
        shutil.rmtree(found.folder)
        for path in made:
            path.rmdir()


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_an_empty_dir_is_the_pods_own(pod, kubelet, kind):
    """In memory if it is of that medium, else on a disk of the pod: never in the host's directory."""
    first = kubelet.annotations(kind, sandbox=True)
    script = f"{SEE}; echo hello > /cache/file; mkfifo /cache/pipe; chown 5:6 /cache/file"
    text = output(sh(pod, script, mounts=[kubelet.mount()], annotations=first))
    assert text.split() == ["tmpfs" if kind == "tmpfs" else "ext4", "1777"]
    assert os.listdir(kubelet.empty_dir) == []
    # Though it would not be taken for empty now, it is what it was for the first.
    (kubelet.empty_dir / "late").touch()
    later = kubelet.annotations(kind)
    script = "cat /cache/file; stat -c '%u %g' /cache/file; touch /cache/x 2>&1 | grep -o Read-only; ls /cache"
    text = output(sh(pod, script, mounts=[kubelet.mount("ro")], annotations=later))
    assert text.split() == ["hello", "5", "6", "Read-only", "file", "pipe"]


def test_on_disk_its_size_holds_and_it_goes_with_the_pod(pod, kubelet):
    annotations = kubelet.annotations("bind", sandbox=True, options="size=32m,mode=0750,uid=7")
    script = "stat -c '%a %u' /cache; dd if=/dev/zero of=/cache/big bs=1M count=64 2>&1 | grep -o 'No space left'"
    assert output(sh(pod, script, mounts=[kubelet.mount()], annotations=annotations)) == "750 7\nNo space left\n"
    storage = pod.storage()
    [disk] = storage["attachments"]
    assert (disk["kind"], disk["size_bytes"], disk["holders"]) == ("scratch", 32 * MIB, [f"volume:{kubelet.empty_dir}"])
    [volume] = storage["volumes"]
    assert (volume["volume"], volume["type"], volume["holders"]) == (str(kubelet.empty_dir), "disk", [])
    assert output(sh(pod, "ls /cache", mounts=[kubelet.mount()], annotations=annotations)) == "big\n"
    assert len(pod.storage()["attachments"]) == 1
    root = pod.root
    pod.close()
    assert_nothing_held(root)


def test_a_pod_that_ends_while_one_is_used_loses_nothing_else(pod, kubelet, tmp_path):
    """What is to be written back keeps the end waiting; the volume's disk is not in the way of that."""
    mounts = [kubelet.mount(), f"type=bind,src={tmp_path},dst=/share"]
    annotations = kubelet.annotations("bind", sandbox=True)
    script = "echo x > /cache/f; echo kept > /share/f; exec 3> /cache/open; echo up; read x"
    with start(pod, script, name="a", stdin=True, mounts=mounts, annotations=annotations) as one:
        one.wait_for(b"up")
        root = pod.root
        pod.close()
    assert_nothing_held(root)
    assert (tmp_path / "f").read_text() == "kept\n"


def test_fifos_and_two_containers_at_once(pod, kubelet):
    annotations = kubelet.annotations("bind", sandbox=True)
    script = "mkfifo /cache/p; echo ready; cat /cache/p"
    with start(pod, script, name="a", mounts=[kubelet.mount()], annotations=annotations) as one:
        one.wait_for(b"ready")
        assert output(sh(pod, "echo x > /cache/p", mounts=[kubelet.mount()], annotations=annotations)) == ""
        assert one.wait() == 0


@pytest.mark.parametrize(
    ("name", "extra"),
    [("data", {}), ("", {"dev.gvisor.empty-dir.cache.force-shared": "true"})],
    ids=["filled", "force-shared"],
)
def test_one_that_somebody_outside_uses_is_the_hosts(pod, kubelet, name, extra):
    if name:
        (kubelet.empty_dir / name).write_text("outside\n")
    annotations = {**kubelet.annotations("bind", sandbox=True), **extra}
    assert output(sh(pod, "ls /cache; echo x > /cache/new", mounts=[kubelet.mount()], annotations=annotations)) == (
        f"{name}\n" if name else ""
    )
    assert (kubelet.empty_dir / "new").read_text() == "x\n"


def test_a_sub_path(pod, kubelet):
    annotations = kubelet.annotations("bind", sandbox=True)
    below = bind(kubelet.empty_dir / "a/b", "/cache")
    assert output(sh(pod, "echo deep > /cache/f", mounts=[below], annotations=annotations)) == ""
    assert output(sh(pod, "cat /cache/a/b/f", mounts=[kubelet.mount()], annotations=annotations)) == "deep\n"


def test_shared_memory(pod, kubelet):
    """shm_open(3) wants a tmpfs that everybody may write to, and the engine's mount is a bind of 0755."""
    see = "grep ' /dev/shm ' /proc/mounts | cut -d' ' -f3; stat -c %a /dev/shm"
    annotations = kubelet.annotations("tmpfs", sandbox=True)
    script = f"{see}; echo shared > /dev/shm/segment"
    mounts = [kubelet.shm_mount()]
    assert output(sh(pod, script, mounts=mounts, annotations=annotations)).split() == ["tmpfs", "1777"]
    later = kubelet.annotations("tmpfs")
    assert output(sh(pod, "cat /dev/shm/segment", mounts=mounts, annotations=later)) == "shared\n"
    script = "dd if=/dev/zero of=/dev/shm/big bs=1M count=80 2>&1 | grep -o 'No space left'"
    assert output(sh(pod, script, mounts=mounts, annotations=later)) == "No space left\n"
    assert os.listdir(kubelet.shm) == []


def test_without_an_engine_a_bind_is_a_bind(shared_pod, tmp_path):
    mounts = [bind(tmp_path, "/dev/shm")]
    assert output(sh(shared_pod, "echo x > /dev/shm/here", mounts=mounts)) == ""
    assert (tmp_path / "here").read_text() == "x\n"


def test_what_is_wrong_is_told_before_anything_is_done(pod, kubelet):
    with pytest.raises(InvalidInput) as caught:
        sh(pod, "true", annotations={CRI + "container-type": "init"})
    assert caught.value.code == "container-type"
    kubelet.empty_dir.rmdir()
    with pytest.raises(NotFound) as missing:
        sh(pod, "true", annotations=kubelet.annotations("bind", sandbox=True))
    assert missing.value.code == "volume-not-found"
    assert pod.storage()["volumes"] == []


def test_a_disk_of_a_container_that_does_not_start(pod, kubelet):
    """It is the volume's by then, and the next container gets it; what could not be made at all is gone."""
    annotations = kubelet.annotations("bind", sandbox=True)
    with pytest.raises(HoldfastError):
        pod.run("tests/busybox", ["/no/such"], mounts=[kubelet.mount()], annotations=annotations)
    assert output(sh(pod, "ls /cache", mounts=[kubelet.mount()], annotations=annotations)) == ""
    assert len(pod.storage()["attachments"]) == 1
