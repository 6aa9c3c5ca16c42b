"""What several files of tests of forks use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import threading
from typing import TYPE_CHECKING, Any

from holdfast.linux import syscalls
from tests.images import run
from tests.vm.support import BUSYBOX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import holdfast

#: The guest's own Python in a container that has the guest's /usr at /host: no share, which would be in the way.
GUEST_USR = {"type": "bind", "source": "uvm:///usr", "destination": "/host", "options": ["rbind", "ro"]}
_LIBRARIES = "/host/lib/x86_64-linux-gnu"
GUEST_PYTHON = ("/host/lib64/ld-linux-x86-64.so.2", "--library-path", _LIBRARIES, "/host/bin/python3.11", "-S", "-s")
_QCOW2 = b"QFI\xfb"


def shell(pod: holdfast.Pod, container: str, script: str) -> str:
    """What a script prints in a running container; it must succeed."""
    done = pod.exec(container, ["sh", "-c", script])
    assert done.status == 0, (pod.name, done)
    return done.text


def idle(pod: holdfast.Pod, name: str = "c", **options: Any) -> str:
    """Starts a container that does nothing until it is killed."""
    pod.run(BUSYBOX, ["sh", "-c", "while :; do sleep 1000; done"], name=name, detach=True, **options)
    return name


def python(pod: holdfast.Pod, name: str, code: str, mounts: Sequence[Any] = (), **options: Any) -> None:
    """Starts a Python program in a container."""
    pod.run(
        BUSYBOX, [*GUEST_PYTHON, "-c", code], name=name, env={"PYTHONHOME": "/host"}, detach=True,
        mounts=[GUEST_USR, *mounts], **options,
    )  # fmt: skip


def end(pod: holdfast.Pod, name: str = "c") -> None:
    """Kills a container, and waits until the pod holds nothing for it any more."""
    pod.kill(name, 9)
    pod.wait(name)
    until(lambda: all(name not in disk["holders"] for disk in pod.storage()["attachments"]))


def until(condition: Callable[[], Any]) -> None:
    """Asks again and again: for what nothing tells of."""
    poll = select.poll()
    for _ in range(2000):
        if condition():
            return
        poll.poll(20)
    raise AssertionError("it has not come to pass")


@contextlib.contextmanager
def forks(pod: holdfast.Pod, count: int = 1) -> Iterator[list[holdfast.Pod]]:
    """Forks of a pod, which end with the block."""
    pods = pod.fork(count)
    try:
        yield pods
    finally:
        for one in pods:
            one.close()


def side_by_side(work: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
    """The results of doing something with each thing at the same time."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def one(number: int, thing: Any) -> None:
        try:
            results[number] = work(thing)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(things)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(things))]


class Chain:
    """The files of a pod's writable disks without a name, which stay there for as long as this is open.

    They are found among what the monitor has open: that of the disk as it was made, and those put on top, in order.
    """

    def __init__(self, pod: holdfast.Pod) -> None:
        self.fds: list[int] = []
        pid = pod.inspect().pid
        seen: set[int] = set()
        pidfd = os.pidfd_open(pid)
        try:
            for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if "/scratch/#" not in target and not target.endswith("(deleted)"):
                    continue
                inode = os.stat(f"/proc/{pid}/fd/{name}").st_ino
                if inode not in seen and "/memfd:" not in target:
                    seen.add(inode)
                    self.fds.append(syscalls.pidfd_getfd(pidfd, int(name)))
        finally:
            os.close(pidfd)
        self.fds.sort(key=lambda fd: os.pread(fd, 4, 0) == _QCOW2)  # stable: the lowest is the only raw one

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        while self.fds:
            os.close(self.fds.pop())

    def only(self, size_bytes: int) -> None:
        """Keeps those of the disk of a size, if there are several disks."""
        keep = [fd for fd in self.fds if _size(fd) == size_bytes]
        for fd in set(self.fds) - set(keep):
            os.close(fd)
        self.fds = keep

    def hashes(self) -> list[str]:
        """Of each file's bytes."""
        return [digest(f"/proc/self/fd/{fd}") for fd in self.fds]

    def flatten(self, path: Path) -> Path:
        """The disk as one raw file."""
        below: dict[str, Any] | None = None
        for fd in self.fds:
            file = {"driver": "file", "filename": f"/proc/self/fd/{fd}"}
            kind = "qcow2" if os.pread(fd, 4, 0) == _QCOW2 else "raw"
            below = {"driver": kind, "file": file} | ({"backing": below} if kind == "qcow2" else {})
        run("qemu-img", "convert", "-U", "-O", "raw", f"json:{json.dumps(below)}", path, pass_fds=self.fds)
        return path


def _size(fd: int) -> int:
    """Of the disk that a file is, in bytes (docs/interop/qcow2.txt: at 24)."""
    header = os.pread(fd, 32, 0)
    return int.from_bytes(header[24:32], "big") if header[:4] == _QCOW2 else os.fstat(fd).st_size


def digest(path: str | Path) -> str:
    """Of a file's data; holes are left out, and so the disk may be large."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        fd, end = file.fileno(), 0
        size = os.fstat(fd).st_size
        while end < size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(fd, start, os.SEEK_HOLE)
            for at in range(start // 4096 * 4096, end, 4096):  # whatever the filesystem takes for data
                data = os.pread(fd, 4096, at)
                if data.strip(b"\0"):
                    found.update(at.to_bytes(8, "big") + data)
    return found.hexdigest()
