"""Named volumes: made, mounted by containers, grown under them, and whole after whatever is killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import HoldfastError, InUse, InvalidInput, NotFound
from holdfast.storage.volumes import Holder, Volumes
from tests import leaks
from tests.vm.cli import answer, fails, text
from tests.vm.support import (
    BUSYBOX,
    assert_holds_nothing,
    assert_nothing_held,
    holds,
    output,
    running,
    sh,
    start,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
CAP_SYS_RESOURCE = 24
WRITING, READING = "writing", "reading"


@pytest.fixture(scope="module")
def pod(data: Path, run_folder: Path) -> Iterator[holdfast.Pod]:
    root = run_folder / "volumes"
    leaks.expect(root)
    with leaks.long_lived():
        pod = holdfast.Pod("shared", root=root, data=data)
    with pod:
        yield pod


@pytest.fixture
def new_pod(pod: holdfast.Pod) -> Callable[[str], holdfast.Pod]:
    """Makes pods beside the module's, of the same kind."""
    kind = pod.inspect().isolation
    return lambda name: holdfast.Pod(name, isolation=kind, root=pod.root, data=pod.data)


@pytest.fixture
def volumes(pod: holdfast.Pod) -> Volumes:
    """Of the module's pod."""
    return holdfast.volumes(root=pod.root, data=pod.data)


@pytest.fixture
def volume(volumes: Volumes) -> Iterator[str]:
    """One of the test's own, 64 MiB; other runs have the same data folder."""
    name = f"test-{secrets.token_hex(4)}"
    volumes.create(name, "64M")
    yield name
    volumes.remove(name, missing_ok=True)


def at(name, where="/d", *options):
    return ",".join((f"type=volume,src={name},dst={where}", *options))


# -- written and read -------------------------------------------------------------------------------


def test_what_is_written_is_there_for_the_next(pod, volumes, volume):
    assert output(sh(pod, "ls -A /d; echo kept >/d/file", mounts=[at(volume)])) == ""  # empty: no lost+found
    assert output(sh(pod, "cat /d/file", mounts=[at(volume)])) == "kept\n"
    assert output(sh(pod, "cat /d/file", mounts=[at(volume, "/d", "ro")])) == "kept\n"
    assert sh(pod, "touch /d/x", mounts=[at(volume, "/d", "ro")]).status == 1
    assert volumes.inspect(volume).holders == ()
    assert_holds_nothing(pod)


def test_containers_of_a_pod_share_one_attachment(pod, volumes, volume):
    with running(pod, "writer", [at(volume)]), running(pod, "reader", [at(volume, "/r", "ro"), at(volume, "/n", "ro")]):
        (disk,) = (disk for disk in pod.storage()["attachments"] if disk["volume"])
        assert (disk["volume"], disk["holders"], disk["read_only"]) == (volume, ["reader", "writer"], False)
        assert disk["container_paths"] == ["writer:/d", "reader:/r", "reader:/n"]
        pod.exec("writer", ["sh", "-c", "echo seen >/d/file"])
        assert pod.exec("reader", ["cat", "/r/file"]).text == "seen\n"
        assert b"Read-only" in pod.exec("reader", ["touch", "/n/file"]).stderr
        assert volumes.inspect(volume).holders == (Holder("shared", WRITING),)
    script = "echo once >/a/file; cat /b/file; touch /b/x 2>/dev/null || echo refused; /c/true || echo not executed"
    mounts = [at(volume, "/a"), at(volume, "/b", "ro"), at(volume, "/c", "noexec")]
    found = output(sh(pod, f"cp /bin/busybox /a/true; {script} 2>/dev/null", mounts=mounts))
    assert found == "once\nrefused\nnot executed\n"
    assert_holds_nothing(pod)


def test_one_pod_writes_or_several_read(pod, new_pod, volumes, volume):
    with new_pod("other") as other:
        with running(pod, "c", [at(volume)]):
            for access in ("ro", "rw"):
                with pytest.raises(InUse) as caught:
                    sh(other, "true", mounts=[at(volume, "/d", access)])
                assert "pod shared has" in caught.value.why
            for act in (lambda: volumes.remove(volume), lambda: volumes.remove(volume, missing_ok=True)):
                with pytest.raises(InUse) as caught:
                    act()
                assert (caught.value.code, caught.value.why) == ("volume-in-use", "pod shared has it for writing")
        with running(pod, "c", [at(volume, "/d", "ro")]), running(other, "c", [at(volume, "/d", "ro")]):
            assert volumes.inspect(volume).holders == (Holder("other", READING), Holder("shared", READING))
            with pytest.raises(InUse):
                sh(other, "true", mounts=[at(volume)])
            with pytest.raises(InUse) as caught:
                volumes.remove(volume)
            assert "other has it for reading, pod shared has it for reading" in caught.value.why
            with pytest.raises(InUse):
                volumes.grow(volume, "100M")
        assert_holds_nothing(other)
    assert_holds_nothing(pod)


def test_pods_of_another_state_root_count_too(pod, volume, data, state_root):
    """Their leases are not seen; QEMU's own locks are."""
    others = Volumes(data, state_root)
    with running(pod, "c", [at(volume)]):
        for act in (lambda: others.remove(volume), lambda: others.grow(volume, "1G")):
            with pytest.raises(InUse) as caught:
                act()
            assert caught.value.code == "volume-in-use"
    assert_nothing_held(state_root)


def test_attached_to_a_container_that_runs(pod, volumes, volume):
    with running(pod, "c"):
        pod.attach(at(volume, "/hot"), container="c")
        assert pod.exec("c", ["sh", "-c", "echo hot >/hot/file && cat /hot/file"]).text == "hot\n"
        pod.attach(at(volume, "/view", "ro"), container="c")
        assert pod.exec("c", ["cat", "/view/file"]).text == "hot\n"
        assert pod.exec("c", ["touch", "/view/file"]).status == 1
        assert volumes.inspect(volume).holders == (Holder("shared", WRITING),)
        pod.detach("/view", container="c")
        pod.detach("/hot", container="c")
        assert volumes.inspect(volume).holders == ()
    assert_holds_nothing(pod)


def test_what_cannot_be_mounted(pod):
    for mounts, code in (
        ([at("missing")], "volume-not-found"),
        (["type=volume,dst=/d"], "volume-name"),
        ([{"type": "volume", "source": "../images", "destination": "/d"}], "volume-name"),
        ([{"type": "volume", "source": "/etc", "destination": "/d"}], "volume-name"),
    ):
        with pytest.raises(HoldfastError) as caught:
            sh(pod, "true", mounts=mounts)
        assert caught.value.code == code, mounts
    assert_holds_nothing(pod)


# -- its size ---------------------------------------------------------------------------------------


def test_its_size_is_a_quota(pod, volumes, volume):
    found = sh(
        pod, "dd if=/dev/zero of=/d/big bs=1M count=100; echo $?; rm /d/big; echo room >/d/x", mounts=[at(volume)]
    )
    assert b"No space left" in found.stderr
    assert (found.text, found.status) == ("1\n", 0)
    after = volumes.inspect(volume)
    assert after.size_bytes == 64 * MIB
    assert after.used_bytes <= 65 * MIB  # the host's own bookkeeping is in it


def may_grow_online(pod: holdfast.Pod) -> bool:
    """A machine has a kernel of its own to ask; on the host's the ioctl needs a capability that not all root has."""
    return pod.inspect().isolation == "vm" or holds(CAP_SYS_RESOURCE)


def test_it_grows_under_its_writer_and_when_nobody_has_it(pod, volumes, volume):
    if not may_grow_online(pod):
        pytest.skip("growing what is mounted needs CAP_SYS_RESOURCE on the host")
    script = "echo kept >/d/kept; echo up; read x; dd if=/dev/zero of=/d/big bs=1M count=100 2>&1"
    with start(pod, script, name="c", stdin=True, mounts=[at(volume)]) as session:
        session.wait_for(b"up")
        assert volumes.grow(volume, "200M").size_bytes == 200 * MIB
        assert volumes.grow(volume, "200M").size_bytes == 200 * MIB  # as after a failure in the middle
        with pytest.raises(InvalidInput) as caught:
            volumes.grow(volume, "100M")
        assert caught.value.code == "volume-size"
        session.write(b"\n")
        assert session.wait() == 0
        session.wait_for(b"100+0 records out")
    assert_grows_when_nobody_has_it(pod, volumes, volume)


def test_it_grows_when_nobody_has_it(pod, volumes, volume):
    sh(pod, "echo kept >/d/kept; touch /d/big", mounts=[at(volume)])
    assert_grows_when_nobody_has_it(pod, volumes, volume)


def assert_grows_when_nobody_has_it(pod: holdfast.Pod, volumes: Volumes, volume: str) -> None:
    assert volumes.grow(volume, "400M").size_bytes == 400 * MIB
    found = output(sh(pod, "cat /d/kept; ls /d; df -m /d | tail -n1", mounts=[at(volume)])).split()
    assert found[:3] == ["kept", "big", "kept"]
    assert 350 < int(found[4]) <= 400


# -- killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["rw", "ro"])
def test_what_was_synced_is_there_after_the_monitor_was_killed(pod, new_pod, volumes, volume, access):
    """Who only reads would not replay the journal by mounting; then the host does it before."""
    with new_pod("killed") as killed:
        info = killed.inspect()
        # fsync(2), other than sync(1), leaves it to the journal where on the disk the folder is.
        script = (
            "mkdir /d/a; echo synced | dd of=/d/a/file conv=fsync; echo up; while :; do echo >/d/x; mv /d/x /d/y; done"
        )
        with start(killed, script, name="c", mounts=[at(volume)]) as session:
            session.wait_for(b"up")
            assert volumes.inspect(volume).holders == (Holder("killed", WRITING),)
            os.kill(info.pid, signal.SIGKILL)
            wait_for_end(info.qemu_pid)
            with pytest.raises(HoldfastError):
                session.wait()
        assert volumes.inspect(volume).holders == ()  # a dead pod's lease is none
        assert output(sh(pod, "cat /d/a/file", mounts=[at(volume, "/d", access)])) == "synced\n"
    done = subprocess.run(["e2fsck", "-fn", volumes.inspect(volume).path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert_holds_nothing(pod)


def test_one_that_was_not_unmounted_can_be_grown_and_removed(pod, new_pod, volumes, volume):
    with new_pod("killed") as killed:
        info = killed.inspect()
        sh(killed, "echo x >/d/file; sync; sleep 1000", name="c", detach=True, mounts=[at(volume)])
        os.kill(info.pid, signal.SIGKILL)
        wait_for_end(info.qemu_pid)
    assert volumes.grow(volume, "100M").size_bytes == 100 * MIB
    volumes.remove(volume)
    with pytest.raises(NotFound):
        volumes.inspect(volume)


# -- the command ------------------------------------------------------------------------------------


def test_the_command(pod, data, volume, volumes, monkeypatch):
    monkeypatch.setenv("HOLDFAST_ROOT", str(pod.root))
    volumes.remove(volume)
    assert text("volume", "create", volume, "--size", "64M", "--label", "for=tests") == f"{volume}\n"
    assert fails("volume", "create", volume)["code"] == "volume-exists"
    text("run", "--pod", "shared", "-v", f"{volume}:/d", BUSYBOX, "sh", "-c", "echo by hand >/d/file")
    plan = answer("plan", "-v", f"{volume}:/d:ro", BUSYBOX, "true")["steps"]
    assert [step["path"] for step in plan if step["step"] == "disk"] == [f"{data}/volumes/{volume}/disk"]
    with running(pod, "c", [at(volume)]):
        found = answer("volume", "inspect", volume)
        assert (found["labels"], found["filesystem"]) == ({"for": "tests"}, "ext4")
        assert found["holders"] == [{"pod": "shared", "access": "writing"}]
        (line,) = (line.split() for line in text("storage", "shared").splitlines() if volume in line)
        assert line[1:3] + line[5:6] == ["volume", "rw", volume]
        assert fails("volume", "remove", "-f", volume)["code"] == "volume-in-use"
        assert "held by:    shared (writing)" in text("volume", "inspect", volume)
    assert answer("volume", "grow", volume, "--size", "100M")["size_bytes"] == 100 * MIB
    (line,) = (line.split() for line in text("volume", "list").splitlines() if volume in line)
    assert line[:3] == [volume, "100", "MiB"]
    text("attach", "shared", "-v", f"{volume}:/d")
    text("detach", "shared", volume)
    assert answer("volume", "remove", volume) == {"removed": [volume]}
    assert fails("volume", "remove", volume)["code"] == "volume-not-found"
    assert answer("volume", "remove", "--force", volume) == {"removed": [volume]}
    error = fails("run", "-v", f"{volume}:/d", BUSYBOX, "true")
    assert (error["code"], error["hint"].split(" makes")[0]) == ("volume-not-found", f"holdfast volume create {volume}")
    assert answer("audit") == {"clean": True, "findings": []}
