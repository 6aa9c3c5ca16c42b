"""A frozen pod on its way from one process to another."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from holdfast.errors import Corrupt, MachineFailed
from holdfast.machine.config import MachineConfig
from holdfast.machine.guest_image import GuestImage, Survey
from holdfast.pod.messages import ContainerInfo
from holdfast.pod.snapshot import FORMAT_VERSION, FrozenAttached, FrozenContainers, FrozenPod, Snapshot
from holdfast.storage.frozen import FrozenStorage
from holdfast.storage.pod_volumes import FrozenVolumes

EMPTY = FrozenStorage((), (), (), (), 0, FrozenVolumes(0, {}, (), {}), (), ())


def record(**changes: object) -> FrozenPod:
    info = ContainerInfo("c", "p", "running", "image", ("true",), 1)
    containers = FrozenContainers((info,), {"c": {"process": {"args": ["true"]}}}, {"c": -1, "c.exec1": 3}, 1)
    attached = FrozenAttached({"attach:1": ("/run/m", "c", "/d")}, 1)
    machine = MachineConfig(_guest(), "tcg")
    made = FrozenPod(FORMAT_VERSION, "p", 1, machine, True, EMPTY, containers, attached)
    return msgspec.structs.replace(made, **changes)


def _guest() -> GuestImage:
    data = {"id": "x", "kernel": "/k", "initrd": "/i", "root": "/r", "kernel_release": "6", "interpreter": "/py"}
    survey = Survey("1", "", {}, "/py", [])
    return GuestImage(**data, agent_digest="d", modules=[], inputs={}, survey=survey)


def memfd(data: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


def test_there_and_back():
    made = record()
    with Snapshot.make(made, memfd(b"ram"), memfd(b"state"), [memfd(b"one"), memfd(b"two")]) as snapshot:
        assert snapshot.record() == made
        assert snapshot.record() == made  # whoever reads it, and how often
        parts = (snapshot.ram_fd, snapshot.state_fd, snapshot.file(0), snapshot.file(1))
        assert [os.pread(fd, 9, 0) for fd in parts] == [b"ram", b"state", b"one", b"two"]


def test_another_version_is_refused_by_name():
    other = {"version": FORMAT_VERSION + 1, "pod": "p", "what": ["nobody", "knows"]}
    with Snapshot.make(record(), memfd(b""), memfd(b""), []) as snapshot:
        data = msgspec.msgpack.encode(other)
        os.ftruncate(snapshot.fds[0], os.pwrite(snapshot.fds[0], data, 0))
        with pytest.raises(Corrupt) as caught:
            snapshot.record()
        assert (caught.value.code, caught.value.subject) == ("snapshot-version", "p")


@pytest.mark.parametrize("length", [0, 1, 10, 100])
def test_damage_is_refused(length):
    with Snapshot.make(record(), memfd(b""), memfd(b""), []) as snapshot:
        os.ftruncate(snapshot.fds[0], length)
        with pytest.raises(Corrupt) as caught:
            snapshot.record()
        assert caught.value.code == "snapshot-damaged"


def test_from_another_process():
    """Copies: what that one does with its own afterwards makes no difference."""
    program = "import os; fd = os.memfd_create('x'); os.write(fd, b'theirs'); print(fd, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        number = int(process.stdout.readline())
        with pytest.raises(MachineFailed):
            Snapshot.of_process(process.pid, [number, 9999])
        with Snapshot.of_process(process.pid, [number, number]) as snapshot:
            process.communicate("go")
            assert [os.pread(fd, 9, 0) for fd in snapshot.fds] == [b"theirs"] * 2
    with pytest.raises(MachineFailed):
        Snapshot.of_process(process.pid, [number])


def test_closing_it_twice():
    snapshot = Snapshot([memfd(b"")])
    snapshot.close()
    snapshot.close()
    assert snapshot.fds == []
