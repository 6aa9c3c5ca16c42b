"""Mount points that a root filesystem lacks are made, and gone when the container is: nothing stays in the host's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import msgspec
import pytest

import holdfast
from holdfast.cli import audit
from holdfast.errors import HoldfastError
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.storage.journal import Journal
from tests.images import make_bundle
from tests.vm import cli
from tests.vm.dying import stopping
from tests.vm.forks import until
from tests.vm.support import Session, assert_holds_nothing, assert_nothing_held, output, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdfast.pod.messages import PodInfo


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


def test_none_is_made_below_what_a_mount_covers(shared_pod, tmp_path, source):
    """Of a hot attach to a place in another mount of the container's: it is made in there."""
    made = bundle(tmp_path / "b", WAITING)
    (tmp_path / "other").mkdir()
    before = names(made / "rootfs")
    with waiting(shared_pod, made, source) as session:
        shared_pod.attach(f"type=bind,src={tmp_path / 'other'},dst=/hot", container="c")
        there = names(made / "rootfs")
        for place in ("/new/memory/hot", "/hot/below"):  # in one that it was started with, in one that it got then
            shared_pod.attach(f"type=bind,src={source},dst={place}", container="c")
            assert output(shared_pod.exec("c", ["cat", f"{place}/file"])) == "content\n"
        assert names(made / "rootfs") == there
        shared_pod.detach("/hot/below", container="c")
        assert names(tmp_path / "other") == []
        end(session)
    assert names(made / "rootfs") == before
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
    made = bundle(tmp_path / "b", WAITING)
    before = names(made / "rootfs")
    with waiting(shared_pod, made, source) as one:
        assert output(shared_pod.run(bundle=made, args=["cat", "/top"], mounts=mounts(source))) == "content\n"
        end(one)
    assert names(made / "rootfs") == before
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_pods_with_one_root(pod, tmp_path, source, first_to_end):
    made = bundle(tmp_path / "b", WAITING)
    before = names(made / "rootfs")
    with beside(pod) as other, waiting(pod, made, source) as one, waiting(other, made, source) as two:
        sessions = [one, two]
        end(sessions.pop(first_to_end))
        (pod, other)[first_to_end].remove()
        assert f"{made}/rootfs/new/deep/dir" in names(made / "rootfs")
        assert audit.find(pod.root) == []
        end(sessions.pop())
        assert names(made / "rootfs") == before
    with Journal(pod.root) as journal:
        assert journal.held() == []


# -- pods that are killed -------------------------------------------------------------------------


def test_a_pod_that_is_killed(pod, tmp_path, source):
    """audit names what it has left, and whoever collects it removes that, but what has been put there."""
    made = bundle(tmp_path / "b", WAITING)
    root = made / "rootfs"
    before, info = names(root), pod.inspect()
    with waiting(pod, made, source) as session:
        there = names(root)
        pod.attach(f"type=bind,src={source},dst=/hot/place", container="c")
        assert output(pod.exec("c", ["cat", "/hot/place/file"])) == "content\n"
        kill(info)
        with pytest.raises(HoldfastError):
            session.wait()
    left = sorted({*there, f"{root}/hot", f"{root}/hot/place"} - {*before})
    assert named(pod) == left
    (root / "new/deep/mine").touch()
    (root / "top").write_text("mine\n")
    assert collect(pod, tmp_path) == left
    assert names(root) == sorted([*before, *(f"{root}/{name}" for name in ("new", "new/deep", "new/deep/mine", "top"))])
    assert_nothing_held(pod.root)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A pod that is made after this stops when a container of it has everything, and is to be started."""
    with stopping(monkeypatch, "holdfast.pod.containers:Containers._start", tmp_path / "stop"):
        yield tmp_path / "stop"


def test_a_pod_that_is_killed_before_the_container_starts(stop, pod, tmp_path, source):
    made = bundle(tmp_path / "b", "true")
    before, info = names(made / "rootfs"), pod.inspect()
    request = container_request("c", pod.data, bundle=made, mounts=mounts(source), stdio=Stdio(detach=True))
    pod._client.send("run", msgspec.to_builtins(request))
    until(stop.exists)
    left = sorted({*names(made / "rootfs")} - {*before})
    assert f"{made}/rootfs/new/deep/dir" in left
    kill(info)
    assert named(pod) == collect(pod, tmp_path) == left
    assert names(made / "rootfs") == before
    assert_nothing_held(pod.root)


def test_a_pod_that_is_killed_while_another_has_its_root(pod, tmp_path, source):
    """The other one loses nothing, and removes it all when it is done."""
    made = bundle(tmp_path / "b", WAITING)
    before, info = names(made / "rootfs"), pod.inspect()
    with beside(pod) as other, contextlib.ExitStack() as stack:
        with waiting(pod, made, source):
            two = stack.enter_context(waiting(other, made, source))
            kill(info)
        assert named(pod) == collect(pod, tmp_path) == []
        end(two)
        assert names(made / "rootfs") == before
    assert_nothing_held(pod.root)


# -- what these tests do --------------------------------------------------------------------------

WAITING = "echo up; read x; cat /new/deep/dir/file /top"


@contextlib.contextmanager
def waiting(pod: holdfast.Pod, made: Path, source: Path) -> Iterator[Session]:
    """A container ``c`` that has all the mounts, until it is told to :func:`end`."""
    stdio = Stdio(STDIN, STDOUT, STDERR)
    request = container_request("c", pod.data, bundle=made, mounts=mounts(source), stdio=stdio)
    with Session(pod, "run", request, stdin=True) as session:
        session.wait_for(b"up")
        yield session


def end(session: Session) -> None:
    session.write(b"\n")
    assert session.wait() == 0
    assert session.output[STDOUT] == b"up\ncontent\ncontent\n"


def beside(pod: holdfast.Pod) -> holdfast.Pod:
    """Another pod of the same kind, with the same state root."""
    return holdfast.Pod("beside", isolation=pod.inspect().isolation, root=pod.root, data=pod.data)


def kill(info: PodInfo) -> None:
    os.kill(info.pid, signal.SIGKILL)
    wait_for_end(info.pid)
    wait_for_end(info.qemu_pid)


def named(pod: holdfast.Pod) -> list[str]:
    """The mount points of which ``audit`` has something to say."""
    return sorted(finding.object for finding in audit.find(pod.root) if finding.kind == "mount-point")


def collect(pod: holdfast.Pod, tmp_path: Path) -> list[str]:
    """Those of which ``gc`` lets go; guests and templates are none of its business here."""
    env = {"HOLDFAST_ROOT": str(pod.root), "HOLDFAST_DATA": str(tmp_path / "none")}
    done = cli.holdfast("--json", "gc", env=env)
    assert done.returncode == 0, done
    return sorted(one["object"] for one in json.loads(done.stdout)["collected"] if one["kind"] == "mount-point")
