"""What a forked pod's storage becomes: every kind of it, what cannot be copied, and changes while a fork is made."""

from __future__ import annotations

import os
import threading

import pytest

import holdfast
from holdfast.errors import Exhausted, HoldfastError
from holdfast.machine.disks import LONGEST_CHAIN
from tests.images import make_disk, run
from tests.vm.forks import end, forks, idle, shell, until
from tests.vm.support import assert_nothing_held, output, sh

MEMORY = {"type": "bind", "source": "sandbox://shared", "destination": "/m", "options": ["rbind"]}
HINTS = {
    f"dev.gvisor.spec.mount.cache.{key}": value
    for key, value in {"source": "/srv/cache", "type": "tmpfs", "share": "pod", "options": "rw"}.items()
}
HINTED = {"type": "tmpfs", "source": "/srv/cache", "destination": "/cache", "options": []}


@pytest.fixture(autouse=True)
def everything_is_let_go_of(state_root):
    yield
    assert_nothing_held(state_root)


def test_volumes_of_the_pod(pod):
    """They are the machine's own, so each has its own, and new containers find them."""
    idle(pod, "a", mounts=[MEMORY, HINTED], annotations=HINTS)
    idle(pod, "b", mounts=[MEMORY, HINTED])
    shell(pod, "a", "echo x > /m/file; echo y > /cache/file")
    with forks(pod, 2) as children:
        for one in (pod, *children):
            assert shell(one, "b", "cat /m/file /cache/file") == "x\ny\n"
            shell(one, "b", f"echo {one.name} > /m/file; echo {one.name} > /cache/file")
        for one in (pod, *children):
            assert shell(one, "a", "cat /m/file /cache/file").split() == [one.name] * 2
            assert output(sh(one, "cat /m/file /cache/file", mounts=[MEMORY, HINTED])).split() == [one.name] * 2
            end(one, "a")
            assert output(sh(one, "cat /cache/file", mounts=[HINTED])) == f"{one.name}\n"
        assert [v["holders"] for v in children[0].storage()["volumes"] if v["volume"] == "/srv/cache"] == [["b"]]


@pytest.mark.parametrize("options", [{"encrypt_scratch": True}, {"reuse_scratch": True}, {"verity": True}], ids=str)
def test_scratch_and_layers(pod, options):
    """And a fork of it lets go of all of them, as if it had made them."""
    if options.pop("verity", False):
        options["verity"] = True
    for name in ("a", "b"):
        idle(pod, name, scratch_bytes=64 << 20, **options)
        shell(pod, name, f"echo {name} > /own; sync")
    with forks(pod) as [child]:
        for one in (child, pod):
            shell(one, "a", f"echo {one.name} >> /own; dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null; sync")
            assert shell(one, "a", "cat /own") == f"a\n{one.name}\n"
            assert shell(one, "b", "cat /own") == "b\n"
            idle(one, "c", scratch_bytes=64 << 20, **options)
            for name in "abc":
                end(one, name)
            storage = one.storage()
            assert (storage["attachments"], storage["free_slots"]) == ([], 256)


def test_a_scratch_disk_grows_in_a_fork(pod):
    idle(pod, scratch_bytes=32 << 20)
    with forks(pod) as [child]:
        child.grow_scratch("c", 128 << 20)
        shell(child, "c", "head -c 45000000 /dev/zero > /big; sync")
        assert int(shell(child, "c", "df -k / | tail -n 1 | tr -s ' ' | cut -d' ' -f2")) > 100 << 10
        assert int(shell(pod, "c", "df -k / | tail -n 1 | tr -s ' ' | cut -d' ' -f2")) < 40 << 10
        pod.grow_scratch("c", 64 << 20)
        with forks(child) as [grandchild]:
            shell(grandchild, "c", "test $(stat -c %s /big) = 45000000; head -c 5000000 /dev/zero > /more; sync")
    shell(pod, "c", "head -c 36000000 /dev/zero > /big; sync")


def test_what_was_attached_to_a_container(pod, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4")
    idle(pod)
    pod.attach(f"type=disk,src={disk},dst=/new/place", container="c")
    shell(pod, "c", "echo x > /new/place/file")
    with forks(pod) as [child]:
        with forks(child) as [grandchild]:
            child.detach("/new/place", container="c")
            assert shell(grandchild, "c", "cat /new/place/file") == "x\n"
            end(grandchild)
            until(lambda: not grandchild.storage()["attachments"])
        assert shell(child, "c", "ls /new 2>&1; true").count("place") == 0
        assert shell(pod, "c", "cat /new/place/file") == "x\n"


def test_the_users_file_is_not_the_forks_copy(pod, tmp_path):
    """A fork that asks for the file gets that, or is refused; never its copy under the other's name."""
    disk = make_disk(tmp_path / "disk", "ext4")
    idle(pod, mounts=[f"type=disk,src={disk},dst=/d"])
    shell(pod, "c", "echo before > /d/file; sync")
    with forks(pod) as [child]:
        with pytest.raises(HoldfastError) as caught:
            child.attach(f"type=disk,src={disk}")
        assert pod.name in str(caught.value)
        shell(pod, "c", "echo after > /d/file; sync")
        end(pod)
        path = child.attach(f"type=disk,src={disk}")
        seen = {"type": "bind", "source": f"uvm://{path}", "destination": "/x", "options": ["rbind"]}
        assert output(sh(child, "cat /x/file", mounts=[seen])) == "after\n"
        assert shell(child, "c", "cat /d/file") == "before\n"


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["deny", "shared"])
def test_refused(data, state_root, tmp_path, what):
    """With the reason; the pod goes on, and nothing is left."""
    disk = make_disk(tmp_path / "disk", "ext4")
    mounts = {"deny": [f"type=disk,src={disk},dst=/d,fork=deny"], "shared": [f"type=disk,src={disk},dst=/d,fork=share"]}
    with holdfast.Pod(root=state_root, data=data) as pod:
        idle(pod, mounts=mounts[what])
        with pytest.raises(HoldfastError) as caught:
            pod.fork(2)
        assert caught.value.code == "not-forkable"
        assert str(disk) in str(caught.value)
        assert os.listdir(state_root / "pods") == [pod.name]
        shell(pod, "c", "echo x > /file; sync")
        end(pod)
        with forks(pod) as [child]:
            assert output(sh(child, "echo well")) == "well\n"


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_no_room_for_a_copy(state_root, data, tmp_path, disk_format):
    """Known before anything is copied: the source would be told that its own writes have failed."""
    raw = make_disk(tmp_path / "disk", "ext4", size="32M")
    full = tmp_path / "full"
    full.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "none", full)
    try:
        disk = full / "disk"
        run("qemu-img", "convert", "-f", "raw", "-O", disk_format, raw, disk)
        with holdfast.Pod(root=state_root, data=data) as pod:
            idle(pod, mounts=[f"type=disk,src={disk},dst=/d"])
            shell(pod, "c", "head -c 14000000 /dev/urandom > /d/much; sync")
            with pytest.raises(Exhausted) as caught:
                pod.fork()
            assert (caught.value.code, str(disk) in str(caught.value)) == ("disk-full", True)
            shell(pod, "c", "head -c 2000000 /dev/urandom > /d/more; sync")
        with holdfast.Pod(root=state_root, data=data) as pod:
            run("mount", "-o", "remount,size=80m", full)  # the same filesystem, whoever has it mounted
            idle(pod, mounts=[f"type=disk,src={disk},dst=/d"])
            with forks(pod) as [child]:
                assert shell(child, "c", "md5sum /d/more") == shell(pod, "c", "md5sum /d/more")
            end(pod)
    finally:
        run("umount", full)


def test_a_pod_without_a_machine(data, state_root):
    with holdfast.Pod(root=state_root, data=data, isolation="namespace") as pod:
        with pytest.raises(HoldfastError) as caught:
            pod.fork()
        assert caught.value.code == "not-forkable"
        assert output(sh(pod, "echo well")) == "well\n"


@pytest.mark.parametrize("names", [["no/name"], ["twice", "twice"], ["x" * 65]])
def test_names(pod, names):
    idle(pod)
    with pytest.raises(HoldfastError):
        pod.fork(names=names)
    assert os.listdir(pod.root / "pods") == [pod.name]
    shell(pod, "c", "true")


def test_a_disk_that_is_frozen_often(pod):
    """What lies between becomes part of the top file; what was frozen before stays as it was."""
    idle(pod)
    shell(pod, "c", "echo first > /first; sync")
    [early] = pod.fork()
    for number in range(2 * LONGEST_CHAIN):
        shell(pod, "c", f"echo {number} > /file; echo {number} > /file{number}; sync")
        pod._snapshot().close()
    [late] = pod.fork()
    with early, late:
        for one in (pod, late):
            assert shell(one, "c", "cat /first /file /file1 /file5") == f"first\n{2 * LONGEST_CHAIN - 1}\n1\n5\n"
        assert shell(early, "c", "cat /first; test -e /file || echo none") == "first\nnone\n"


# -- the gate -------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_while_clients_change_the_pod(pod, tmp_path):
    """A fork finds nothing half done, whatever goes on."""
    disks = [make_disk(tmp_path / f"disk{n}", "ext4") for n in range(2)]
    stop, errors, rounds = threading.Event(), [], [0] * 4

    def client(number: int) -> None:
        try:
            while not stop.is_set():
                if number < 2:
                    assert output(sh(pod, "echo hello; cat /etc/release")) == "hello\ntests\n"
                else:
                    with holdfast.Pod.open(pod.name, root=pod.root, data=pod.data) as mine:
                        mine.detach(mine.attach(f"type=disk,src={disks[number - 2]}"))
                rounds[number] += 1
        except BaseException as error:
            errors.append(error)

    idle(pod)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            before = list(rounds)
            with forks(pod) as [child]:
                assert child._client.request("verify", {}) == {"unknown": [], "missing": []}
                states = {c.name: c.state for c in child.inspect().containers}
                assert states["c"] == "running"
                assert set(states.values()) <= {"running", "exited"}
                assert output(sh(child, "echo well")) == "well\n"
                end(child)
                held = {h for disk in child.storage()["attachments"] for h in disk["holders"]}
                until(lambda: not {h for d in child.storage()["attachments"] for h in d["holders"] if h[0] == "c"})
                for path in [d["guest_paths"][0] for d in child.storage()["attachments"] if d["kind"] == "disk"]:
                    child.detach(path)
                assert child.storage()["free_slots"] == 256, held
            until(lambda before=before: errors or all(now > was for now, was in zip(rounds, before, strict=True)))
            assert not errors, number
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert sh(pod, "true").status == 0
