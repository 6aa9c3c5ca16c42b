"""``holdfast pod``, ``ps``, ``storage``, ``attach``, ``plan``, ``audit`` and ``gc`` on pods that run."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from holdfast.storage.journal import Journal
from tests import images, leaks
from tests.vm.cli import answer, fails, holdfast, text
from tests.vm.support import BUSYBOX, assert_nothing_held, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def pod(data: Path, run_folder: Path) -> Iterator[str]:
    """A detached pod with a container that sleeps, which the tests of this module share."""
    root = run_folder / "cli-pods"
    leaks.expect(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_ROOT", str(root))
        with leaks.long_lived():
            done = holdfast("run", "-d", "--name", "web", BUSYBOX, "sleep", "1000")
            assert (done.returncode, done.stdout) == (0, b"web\n")
        yield "web"
        assert text("pod", "remove", "-f", "web") == "web\n"
        assert_nothing_held(root)


def test_ps(pod):
    shown = [line.split() for line in text("ps").splitlines()]
    assert shown[0] == ["POD", "CONTAINER", "STATE", "IMAGE", "COMMAND", "AGE"]
    assert shown[1][:-1] == ["web", "web", "running", BUSYBOX, "sleep", "1000"]
    listed = answer("ps")
    assert [(one["name"], one["state"], one["containers"][0]["name"]) for one in listed] == [("web", "running", "web")]


def test_inspect(pod):
    assert answer("pod", "inspect", pod)["containers"][0]["args"] == ["sleep", "1000"]
    assert "command: sleep 1000" in " ".join(text("pod", "inspect", pod).split())
    assert fails("pod", "inspect", "no-such-pod")["code"] == "pod-not-found"


def test_a_pod_that_is_there_is_not_made_again(pod):
    assert fails("pod", "create", pod)["code"] == "pod-exists"
    assert fails("run", "--name", pod, BUSYBOX)["code"] == "pod-exists"
    assert answer("audit") == {"clean": True, "findings": []}


def test_a_pod_with_a_container_that_runs_is_removed_only_by_force(pod):
    assert fails("pod", "remove", pod)["code"] == "pod-busy"


def test_storage(pod):
    found = answer("storage", pod)
    assert [disk["kind"] for disk in found["attachments"]] == ["layer", "layer", "scratch"]
    lines = text("storage", pod).splitlines()
    head = ["SLOT", "KIND", "MODE", "SIZE", "FILE", "HOLDERS", "GUEST PATH", "IN CONTAINERS", "READ", "WRITTEN"]
    assert " ".join(lines[0].split()) == " ".join(head)
    assert lines[3].split()[:3] == ["0:2", "scratch", "rw"]


def held(pod):
    """What a pod holds, without the counters that go on by themselves."""
    found = answer("storage", pod)
    for disk in found["attachments"]:
        del disk["read_bytes"], disk["written_bytes"]
    return found


def test_attach_and_detach(pod, tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share/file").write_text("shared")
    disk = images.make_disk(tmp_path / "disk.raw", "ext4")
    before = held(pod)
    paths = text(
        "attach", pod, "--mount", f"type=bind,src={tmp_path}/share,ro", "--mount", f"type=disk,src={disk}"
    ).splitlines()
    found = answer("storage", pod)
    assert [share["guest_path"] for share in found["shares"]] == paths[:1]
    assert found["attachments"][-1]["guest_paths"] == paths[1:]
    text("detach", pod, paths[0], disk)  # by the guest's path, and by the host's
    assert held(pod) == before
    assert fails("detach", pod, paths[0])["code"] == "not-attached"


def test_of_several_attachments_all_are_made_or_none(pod, tmp_path):
    before = held(pod)
    error = fails("attach", pod, "-v", f"{tmp_path}:/x", "--mount", "type=disk,src=/no/such/disk")
    assert error["code"] == "source-not-found"
    assert held(pod) == before


def test_plan(pod, tmp_path):
    arguments = ("-v", f"{tmp_path}:/x:ro", BUSYBOX, "echo", "hi")
    plan = answer("plan", *arguments)
    assert [step["step"] for step in plan["steps"]] == ["layer", "layer", "scratch", "overlay", "share", "run"]
    assert len(plan["describe"]) == 6
    assert answer("plan", "--pod", pod, *arguments) == plan
    assert text("plan", *arguments).splitlines() == [f"{n}. {line}" for n, line in enumerate(plan["describe"], 1)]
    assert fails("plan", "--pod", pod, "--name", pod, *arguments)["code"] == "container-exists"


@pytest.mark.usefixtures("data")
def test_what_a_killed_monitor_leaves_is_found_and_collected(state_root, tmp_path):
    disk = images.make_disk(tmp_path / "disk.raw", "ext4")
    text("run", "-d", "--name", "p", "--mount", f"type=disk,src={disk},dst=/d", BUSYBOX, "sleep", "1000")
    info = answer("pod", "inspect", "p")
    os.kill(info["pid"], signal.SIGKILL)
    wait_for_end(info["pid"])
    wait_for_end(info["qemu_pid"])
    assert text("ps").splitlines()[1].split()[2] == "dead"
    kinds = {finding["kind"] for finding in answer("audit", status=1)["findings"]}
    assert kinds == {"pod", "attachment", "lease"}
    assert fails("exec", "p", "true")["hint"] == "holdfast gc lets go of what it left"
    assert {one["kind"] for one in answer("gc")["collected"]} == kinds
    assert answer("audit")["clean"]
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("data")
def test_an_empty_pod(state_root):
    assert text("pod", "create", "p") == "p\n"
    assert text("ps").splitlines()[1].split()[:3] == ["p", "-", "running"]
    assert fails("exec", "p", "true")["code"] == "container-not-running"
    with Journal(state_root) as journal:
        assert journal.is_alive("p")
    assert answer("pod", "remove", "p") == {"removed": ["p"]}
    assert_nothing_held(state_root)


def test_fork(pod):
    """The new pods outlive the command, have what the pod has, and write where nobody else sees it."""
    text("exec", pod, "sh", "-c", "echo common >/before")
    try:
        assert text("pod", "fork", pod, "-n", "2", "--name", "left").startswith("left\n" + pod + "-")
        forks = [name for name in (one["name"] for one in answer("ps")) if name != pod]
        assert len(forks) == 2
        for name in (pod, *forks):
            text("exec", f"{name}/web", "sh", "-c", f"echo {name} >/own")
        for name in (pod, *forks):
            assert text("exec", f"{name}/web", "cat", "/before", "/own") == f"common\n{name}\n"
        assert answer("pod", "fork", "left", "--name", "grandchild") == ["grandchild"]
        assert text("exec", "grandchild/web", "cat", "/own") == "left\n"
        assert answer("audit") == {"clean": True, "findings": []}
    finally:
        for name in [one["name"] for one in answer("ps") if one["name"] != pod]:
            text("pod", "remove", "-f", name)


def test_a_fork_that_is_refused_leaves_everything_as_it_was(pod, tmp_path):
    (path,) = text("attach", pod, "--mount", f"type=bind,src={tmp_path}").splitlines()
    error = fails("pod", "fork", pod)
    assert (error["code"], str(tmp_path) in error["subject"]) == ("not-forkable", True)
    text("detach", pod, path)
    assert fails("pod", "fork", pod, "--name", "new", "--name", pod, "-n", "2")["code"] == "pod-exists"
    assert fails("pod", "fork", "no-such-pod")["code"] == "pod-not-found"
    assert [one["name"] for one in answer("ps")] == [pod]
    assert text("exec", pod, "echo", "goes on") == "goes on\n"
