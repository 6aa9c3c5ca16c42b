"""Volumes that the containers of a pod share, by hints, by sources of the pod's own, and those that an image has."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import HoldfastError, InvalidInput, NotFound
from holdfast.image.store import ImageStore
from holdfast.pod.client import STDERR, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from tests import leaks
from tests.images import Umoci, busybox_tree, make_bundle
from tests.vm.support import (
    BUSYBOX,
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    Session,
    assert_holds_nothing,
    output,
    sh,
    start,
)

if TYPE_CHECKING:
    from pathlib import Path

CACHE = {
    "dev.gvisor.spec.mount.cache.source": "/srv/cache",
    "dev.gvisor.spec.mount.cache.type": "tmpfs",
    "dev.gvisor.spec.mount.cache.share": "pod",
    "dev.gvisor.spec.mount.cache.options": "size=1m,nodev",
}
#: How an engine writes the mount of such a volume.
MOUNT = {"type": "tmpfs", "source": "/srv/cache", "destination": "/cache", "options": ["nodev"]}


def mount(*options: str, source: str = "/srv/cache", destination: str = "/cache") -> dict[str, object]:
    return {**MOUNT, "source": source, "destination": destination, "options": ["nodev", *options]}


# -- hints ----------------------------------------------------------------------------------------


def test_what_one_container_writes_another_reads(pod):
    """And nobody loses it when there is no user for a while."""
    assert output(sh(pod, "echo hello > /cache/file", mounts=[mount()], annotations=CACHE)) == ""
    [volume] = pod.storage()["volumes"]
    assert (volume["volume"], volume["type"], volume["holders"]) == ("/srv/cache", "tmpfs", [])
    assert output(sh(pod, "cat /cache/file", mounts=[mount()], annotations=CACHE)) == "hello\n"
    other = mount(
        source="/srv/x/..//cache/", destination="/elsewhere"
    )  # a path is what it means, not how it is written
    assert output(sh(pod, "cat /elsewhere/file", mounts=[other])) == "hello\n"  # the pod knows the hint by now
    assert_holds_nothing(pod)


def test_two_containers_at_once(pod):
    """A pipe: one file system, not two that look alike."""
    with start(pod, "mkfifo /cache/p; echo ready; cat /cache/p", name="a", mounts=[mount()], annotations=CACHE) as one:
        one.wait_for(b"ready")
        assert output(sh(pod, "echo through the pipe > /cache/p", mounts=[mount()], annotations=CACHE)) == ""
        assert one.wait() == 0
        assert bytes(one.output[STDOUT]) == b"ready\nthrough the pipe\n"


def test_locks_and_sockets_of_two_containers(pod):
    """What a shared mount is for: a lock that one has the other does not get, and its socket can be talked to."""
    server = """
import fcntl, socket
lock = open("/cache/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/cache/socket")
listener.listen()
print("up", flush=True)
client, _ = listener.accept()
client.sendall(b"hello from there")
"""
    client = """
import fcntl, socket
try:
    fcntl.flock(open("/cache/lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("locked")
talk = socket.socket(socket.AF_UNIX)
talk.connect("/cache/socket")
print(talk.recv(99).decode())
"""
    options = {"env": HOST_PYTHON_ENV, "mounts": [HOST_USR, mount()], "annotations": CACHE}
    request = container_request(
        "server", pod.data, image=BUSYBOX, args=[*HOST_PYTHON, "-c", server], stdio=Stdio(0, STDOUT, STDERR), **options
    )
    with Session(pod, "run", request) as one:
        one.wait_for(b"up")
        assert output(pod.run(BUSYBOX, [*HOST_PYTHON, "-c", client], **options)) == "locked\nhello from there\n"
        assert one.wait() == 0


def test_its_size_holds(pod):
    script = "dd if=/dev/zero of=/cache/big bs=64k count=100 2>&1 | grep -o 'No space left'; stat -c %s /cache/big"
    assert output(sh(pod, script, mounts=[mount()], annotations=CACHE)) == "No space left\n1048576\n"


def test_a_container_may_be_stricter(pod):
    script = "echo up; read x; cat /cache/file"
    with start(pod, script, name="w", stdin=True, mounts=[mount()], annotations=CACHE) as one:
        one.wait_for(b"up")
        script = "touch /cache/x 2>&1; cp /bin/busybox /cache/b 2>&1; grep ' /cache ' /proc/mounts"
        text = output(sh(pod, f"{script}; true", mounts=[mount("ro", "noexec")], annotations=CACHE))
        assert text.count("Read-only file system") == 2
        assert {"ro", "noexec", "nodev"} <= set(text.splitlines()[-1].split()[3].split(","))
        assert output(sh(pod, "echo still > /cache/file", mounts=[mount()], annotations=CACHE)) == ""
        one.write(b"\n")
        assert one.wait() == 0
        assert one.output[STDOUT].endswith(b"still\n")


@pytest.mark.parametrize(
    ("annotations", "wanted", "code"),
    [
        ({"dev.gvisor.spec.mount.cache.options": "ro,nodev"}, mount(), "hint-less-strict"),
        ({}, mount("size=2m"), "hint-options-conflict"),
        ({"dev.holdfast.exact-hints": "true"}, mount("noexec"), "hint-options-differ"),
        ({"dev.gvisor.spec.mount.cache.share": "all"}, mount(), "hint-share"),
        ({"gvisor.dev/spec/mount/other/source": "/srv/cache"}, mount(), "hint-incomplete"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_done(shared_pod, annotations, wanted, code):
    with pytest.raises(InvalidInput) as caught:
        sh(shared_pod, "true", mounts=[wanted], annotations={**CACHE, **annotations})
    assert caught.value.code == code
    assert shared_pod.storage()["volumes"] == []
    assert_holds_nothing(shared_pod)


def test_a_hint_that_contradicts_the_pod_s(pod):
    assert sh(pod, "true", mounts=[mount()], annotations=CACHE).status == 0
    with pytest.raises(InvalidInput) as caught:
        sh(pod, "true", mounts=[mount()], annotations={**CACHE, "dev.gvisor.spec.mount.cache.options": "nodev"})
    assert caught.value.code == "hint-conflict"
    assert_holds_nothing(pod)


def test_a_folder_of_a_shared_volume(pod):
    """9.3: a sub-path of a hinted source; gVisor makes a volume of its own of it, without a word."""
    assert output(sh(pod, "echo deep > /cache/file", mounts=[mount(source="/srv/cache/a/b")], annotations=CACHE)) == ""
    assert output(sh(pod, "cat /cache/a/b/file; ls /cache", mounts=[mount()])) == "deep\na\n"


def test_a_folder_that_another_container_has_made_a_link(pod):
    """Links in a volume are its containers' making: they do not lead out of it."""
    assert sh(pod, "ln -s / /cache/out; ln -s ../../etc /cache/up", mounts=[mount()], annotations=CACHE).status == 0
    for name in ("out", "out/run", "up"):
        script = "ls -A /cache | sort"
        seen = output(sh(pod, script, mounts=[mount(source=f"/srv/cache/{name}")])).split()
        assert not {"holdfast", "mounts", "passwd", "proc"} & set(seen)


def test_a_directory_of_the_host_shared_by_hint(pod, tmp_path):
    """One share for all, writable as the hint says; each container sees it as strictly as it asks."""
    folder = tmp_path / "dir"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").write_text("from the host\n")
    hint = {
        "dev.holdfast.mount.dir.source": str(folder),
        "dev.holdfast.mount.dir.type": "bind",
        "dev.holdfast.mount.dir.share": "pod",
    }
    bind = {"type": "bind", "source": str(folder), "destination": "/d", "options": ["rbind"]}
    script = "echo up; read x; cat /d/new"
    with start(pod, script, name="a", stdin=True, mounts=[bind], annotations=hint) as one:
        one.wait_for(b"up")
        read_only = {**bind, "options": ["rbind", "ro"]}
        script = "touch /d/x 2>&1 | grep -o Read-only; cat /d/sub/file"
        assert output(sh(pod, script, mounts=[read_only], annotations=hint)) == "Read-only\nfrom the host\n"
        assert len(pod.storage()["shares"]) == 1
        below = {**bind, "source": f"{folder}/sub/"}
        assert (
            output(sh(pod, "cat /d/file; echo new > /d/../d/n", mounts=[below], annotations=hint)) == "from the host\n"
        )
        assert output(sh(pod, "echo written > /d/new", mounts=[bind], annotations=hint)) == ""
        one.write(b"\n")
        assert one.wait() == 0
        assert one.output[STDOUT].endswith(b"written\n")
    assert (folder / "sub/n").read_text() == "new\n"
    assert_holds_nothing(pod)


def test_what_others_write_in_a_directory_that_they_share_is_seen(pod, tmp_path):
    """``share=shared``: then nothing of it is kept back in the guest, which costs the locks."""
    bind = {"type": "bind", "source": str(tmp_path), "destination": "/d", "options": ["rbind"]}
    script = "echo up; while read x; do cat /d/file; echo mine > /d/mine; echo done; done"
    hint = of_the_host(tmp_path, "shared")
    with start(pod, script, name="a", stdin=True, mounts=[bind], annotations=hint) as one:
        one.wait_for(b"up")
        for text in (b"one\n", b"two two\n"):
            (tmp_path / "file").write_bytes(text)
            one.write(b"\n")
            one.wait_for(text + b"done\n")
            assert (tmp_path / "mine").read_text() == "mine\n"
        one.end_input()
        assert one.wait() == 0


def of_the_host(folder: Path, share: str = "pod") -> dict[str, str]:
    """A hint of a directory of the host's."""
    fields = {"source": str(folder), "type": "bind", "share": share}
    return {f"dev.holdfast.mount.dir.{field}": value for field, value in fields.items()}


WATCH = """
import ctypes, fcntl, os, struct
MODIFY, CREATE = 0x2, 0x100  # inotify(7)
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
folder, file = libc.inotify_add_watch(watch, b"/d", CREATE), libc.inotify_add_watch(watch, b"/d/file", MODIFY)
held, ranged = open("/d/lock", "w"), open("/d/range", "w")
fcntl.flock(held, fcntl.LOCK_EX)
fcntl.lockf(ranged, fcntl.LOCK_EX, 10, 5)
print("up", flush=True)
wanted = {(folder, CREATE), (file, MODIFY)}
while wanted:
    events = os.read(watch, 4096)
    while events:
        number, mask, _, length = struct.unpack_from("iIII", events)
        wanted.discard((number, mask))
        events = events[16 + length:]
print(open("/d/file").read(), end="", flush=True)
"""
LOCKED = """
import fcntl
for name, lock in ("lock", fcntl.flock), ("range", lambda f, how: fcntl.lockf(f, how, 1, 7)):
    try:
        lock(open("/d/" + name, "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(name, "is locked")
fcntl.lockf(open("/d/range", "a"), fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 20)
open("/d/file", "a").write("written\\n")
open("/d/made", "w").close()
"""


def test_locks_inotify_and_pipes_in_a_directory_of_the_host(pod, tmp_path):
    """One inode for all containers of the pod, in a machine too, where the host's files are served over 9p."""
    folder = tmp_path / "dir"
    folder.mkdir()
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    bind = {"type": "bind", "source": str(folder), "destination": "/d", "options": ["rbind"]}
    options = {"env": HOST_PYTHON_ENV, "mounts": [HOST_USR, bind], "annotations": of_the_host(folder)}
    request = container_request(
        "watcher", pod.data, image=BUSYBOX, args=[*HOST_PYTHON, "-c", WATCH], stdio=Stdio(0, STDOUT, STDERR), **options
    )
    with Session(pod, "run", request) as one:
        one.wait_for(b"up")
        told = output(pod.run(BUSYBOX, [*HOST_PYTHON, "-c", LOCKED], **options))
        assert told == "lock is locked\nrange is locked\n"
        one.wait_for(b"written")
        assert one.wait() == 0
    only = {"mounts": [bind], "annotations": of_the_host(folder)}
    with start(pod, "echo up; cat /d/pipe", name="reader", **only) as one:
        one.wait_for(b"up")
        assert output(sh(pod, "echo through > /d/pipe", **only)) == ""
        assert one.wait() == 0
        assert one.output[STDOUT] == b"up\nthrough\n"
    # Nobody has it any more: all that was written is the host's.
    assert ((folder / "file").read_text(), (folder / "made").exists()) == ("written\n", True)
    assert_holds_nothing(pod)


def test_without_hints_memory_is_a_container_s_own(shared_pod):
    tmpfs = {"type": "tmpfs", "source": "tmpfs", "destination": "/cache"}
    assert output(sh(shared_pod, "echo x > /cache/f", mounts=[tmpfs])) == ""
    assert output(sh(shared_pod, "ls -A /cache", mounts=[tmpfs])) == ""


# -- sources that the pod has ---------------------------------------------------------------------


def pod_source(source, destination="/m", *options):
    return {"type": "bind", "source": source, "destination": destination, "options": ["rbind", *options]}


@pytest.mark.parametrize("kind", ["sandbox", "sandbox-tmp"])
def test_folders_of_the_pod(pod, kind):
    """Made for everybody (0777) by the first that names one, and there for the next."""
    assert output(sh(pod, "echo x > /m/f; stat -c %a /m", mounts=[pod_source(f"{kind}://some/where")])) == "777\n"
    assert output(sh(pod, "cat /m/where/f", mounts=[pod_source(f"{kind}://some", "/m", "ro")])) == "x\n"
    assert output(sh(pod, "ls -A /m", mounts=[pod_source(f"{kind}://other")])) == ""
    assert_holds_nothing(pod)


def test_a_path_of_the_guest(shared_pod):
    assert "PRETTY" not in output(sh(shared_pod, "ls /m", mounts=[pod_source("uvm:///sys/block", "/m", "ro")]))
    with pytest.raises(NotFound) as caught:
        sh(shared_pod, "true", mounts=[pod_source("uvm:///no/such")])
    assert caught.value.code == "uvm-not-found"
    assert_holds_nothing(shared_pod)


def test_huge_pages(shared_pod):
    text = output(sh(shared_pod, "grep ' /m ' /proc/mounts", mounts=[pod_source("hugepages://2M/app")]))
    assert text.split()[2] == "hugetlbfs"
    assert "pagesize=2M" in text


@pytest.mark.parametrize(
    "source", ["sandbox://../../etc", "hugepages://4K/x", "hugepages://2M", "uvm://", "sandbox-tmp://a/../../b"]
)
def test_sources_that_mean_nothing(shared_pod, source):
    with pytest.raises(InvalidInput) as caught:
        sh(shared_pod, "true", mounts=[pod_source(source)])
    assert caught.value.code == "pod-source"


# -- /tmp -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "memory"), [("", True), ("auto", True), ("tmpfs", True), ("rootfs", False)], ids=str
)
def test_tmp(shared_pod, policy, memory):
    annotations = {"dev.holdfast.tmp": policy} if policy else {}
    text = output(
        sh(shared_pod, "grep -c ' /tmp tmpfs' /proc/mounts; stat -c %a /tmp || true", annotations=annotations)
    )
    assert text.split()[0] == str(int(memory))
    if memory:
        assert text.split()[1] == "1777"


def test_tmp_that_has_something_in_it_is_left_alone(shared_pod, tmp_path):
    (tmp_path / "file").touch()
    mounts = [f"type=bind,src={tmp_path},dst=/tmp/below"]
    assert output(sh(shared_pod, "grep -c ' /tmp tmpfs' /proc/mounts || true; ls /tmp", mounts=mounts)) == "0\nbelow\n"


# -- volumes of an image --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(data, tmp_path_factory):
    """An image with volumes: a tree of odd things, a place that it does not have, a link, one in the other."""
    work = tmp_path_factory.mktemp("volumes")
    made = Umoci(work)

    def fill(root: Path) -> None:
        busybox_tree(root)
        (root / "data/sub").mkdir(parents=True)
        (root / "data/file").write_text("from the image\n")
        (root / "data/sub/deep").write_text("deep\n")
        os.link(root / "data/file", root / "data/sub/same")
        os.symlink("sub/deep", root / "data/link")
        os.mkfifo(root / "data/pipe", 0o640)
        os.chown(root / "data/file", 7, 8)
        os.chmod(root / "data/file", 0o4711)  # after the change of owners, which takes the bit away
        os.setxattr(root / "data/file", "user.name", b"value")
        os.utime(root / "data/sub", ns=(10**18, 10**18))
        os.chmod(root / "data", 0o2775)
        os.symlink("data", root / "alias")

    made.commit(fill)
    made.configure(
        "--config.volume", "/data", "--config.volume", "/missing", "--config.volume", "/data/sub", "--config.cmd", "sh"
    )
    with leaks.long_lived():
        ImageStore(data).import_path(f"{made.layout}:v", "with-volumes")
    return "with-volumes"


@pytest.fixture(scope="module")
def linked_image(data, tmp_path_factory):
    """An image in which three volumes are two places: one by a link, one by a link that what is missing is below."""
    made = Umoci(tmp_path_factory.mktemp("linked"))

    def fill(root: Path) -> None:
        busybox_tree(root)
        (root / "data").mkdir()
        (root / "data/file").write_text("from the image\n")
        os.symlink("data", root / "alias")

    made.commit(fill)
    volumes = ("/data", "/alias", "/alias/new", "/data/new")
    made.configure(*(word for path in volumes for word in ("--config.volume", path)), "--config.cmd", "sh")
    with leaks.long_lived():
        ImageStore(data).import_path(f"{made.layout}:v", "with-linked-volumes")
    return "with-linked-volumes"


@pytest.mark.parametrize("options", [{}, {"read_only": True}])
def test_volumes_that_are_links_to_one_place_are_one(shared_pod, linked_image, options):
    script = "echo x > /alias/by-alias; echo y > /data/new/z; cat /data/by-alias /alias/new/z /data/file; ls /data"
    result = shared_pod.run(linked_image, ["sh", "-c", script], **options)
    assert output(result).split() == ["x", "y", "from", "the", "image", "by-alias", "file", "new"]
    assert_holds_nothing(shared_pod)


SEE = "cd /data; stat -c '%n %a %u %g %h' file sub pipe .; cat file sub/deep; readlink link; stat -c %Y sub"


def test_volumes_hold_what_the_image_has(shared_pod, image):
    script = f"{SEE}; grep -c ' /data ext4\\| /missing ext4' /proc/mounts; ls -A /missing"
    result = shared_pod.run(image, ["sh", "-c", script])
    assert output(result).splitlines() == [
        "file 4711 7 8 2", "sub 755 0 0 2", "pipe 640 0 0 1", ". 2775 0 0 3", "from the image", "deep", "sub/deep",
        "1000000000", "2",
    ]  # fmt: skip
    assert_holds_nothing(shared_pod)


def test_volumes_can_be_written_on_a_read_only_root(shared_pod, image):
    script = "touch /x 2>&1 | grep -o Read-only; echo new > /data/new; cat /data/new /data/file"
    assert output(shared_pod.run(image, ["sh", "-c", script], read_only=True)) == "Read-only\nnew\nfrom the image\n"


def test_what_is_mounted_by_request_goes_before_a_volume(shared_pod, image, tmp_path):
    (tmp_path / "file").write_text("from the host\n")
    mounts = [f"type=bind,src={tmp_path},dst=/data"]
    result = shared_pod.run(image, ["sh", "-c", "cat /data/file; ls /data"], mounts=mounts)
    assert output(result) == "from the host\nfile\nsub\n"
    below = [f"type=bind,src={tmp_path},dst=/data/sub/mine"]
    script = "cat /data/sub/mine/file /data/sub/deep"
    assert output(shared_pod.run(image, ["sh", "-c", script], mounts=below)) == "from the host\ndeep\n"
    assert_holds_nothing(shared_pod)


def test_each_container_has_volumes_of_its_own(shared_pod, image):
    assert output(shared_pod.run(image, ["sh", "-c", "echo x > /data/mine"], reuse_scratch=True)) == ""
    assert output(shared_pod.run(image, ["sh", "-c", "ls /data"], reuse_scratch=True)) == "file\nlink\npipe\nsub\n"


def test_what_a_hint_cannot_be_is_forgotten_with_its_container(pod):
    """A container that did not start leaves nothing: neither its hint, nor a volume that could not be made."""
    wrong = {**CACHE, "dev.gvisor.spec.mount.cache.options": "nr_inodes=none"}
    with pytest.raises(HoldfastError):
        sh(pod, "true", mounts=[mount()], annotations=wrong)
    assert sh(pod, "true", mounts=[mount()], annotations=CACHE).status == 0
    assert_holds_nothing(pod)


def test_a_file_below_a_shared_directory(pod, tmp_path):
    """It is mounted as a file, and one that is not there is not made."""
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "app.conf").write_text("setting\n")
    hint = {f"dev.holdfast.mount.conf.{k}": v for k, v in (("source", str(folder)), ("type", "bind"), ("share", "pod"))}
    bind = {"type": "bind", "source": f"{folder}/app.conf", "destination": "/etc/app.conf", "options": ["rbind", "ro"]}
    assert output(sh(pod, "cat /etc/app.conf", mounts=[bind], annotations=hint)) == "setting\n"
    with pytest.raises(NotFound) as caught:
        sh(pod, "true", mounts=[{**bind, "source": f"{folder}/missing"}], annotations=hint)
    assert caught.value.code == "source-not-found"
    assert os.listdir(folder) == ["app.conf"]
    assert_holds_nothing(pod)


def test_two_first_users_at_once(pod):
    """Whoever comes second finds the volume of the first, or is told; nobody's options are dropped."""
    other = {**CACHE, "dev.gvisor.spec.mount.cache.options": "size=2m,nodev"}
    outcomes: list[object] = []

    def run(annotations: dict[str, str]) -> None:
        try:
            with holdfast.Pod.open(pod.name, root=pod.root, data=pod.data) as mine:
                outcomes.append(sh(mine, "true", mounts=[mount()], annotations=annotations).status)
        except HoldfastError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=run, args=(annotations,)) for annotations in (CACHE, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["0", "hint-conflict"]


@pytest.mark.parametrize("mode", [0o711, 0o555])
def test_a_read_only_root_looks_as_it_is(shared_pod, tmp_path, mode):
    """What is put above it for mount points has owner and mode of its own, and must not show them."""
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", "stat -c '%a %u' /"], root={"readonly": True})
    os.chown(bundle / "rootfs", 7, 8)
    os.chmod(bundle / "rootfs", mode)
    assert output(shared_pod.run(bundle=bundle)) == f"{mode:o} 7\n"
