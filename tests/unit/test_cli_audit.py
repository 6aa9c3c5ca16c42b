"""``audit`` and ``gc`` on journals made by hand."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from holdfast.cli import audit as module
from holdfast.cli.main import main
from holdfast.cli.pods import survey
from holdfast.linux.syscalls import AT_FDCWD, statx_birth
from holdfast.storage import mount_points
from holdfast.storage.journal import Journal


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0)


@pytest.fixture(autouse=True)
def data(monkeypatch, tmp_path):
    """A data folder with nothing in it, so that nothing of others' is taken for old."""
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def state_root(state_root):
    yield state_root
    shutil.rmtree(state_root)  # pods made by hand are nobody's leaks


def make_pod(journal: Journal, name: str, *, recorded: bool = True, lock: bool = True) -> None:
    folder = journal.pods_folder / name
    folder.mkdir()
    if lock:
        (folder / "lock").touch()
    if recorded:
        journal.add_pod(name, 4711, "vm")


@contextmanager
def alive(journal: Journal, name: str):
    """As if its monitor lived."""
    fd = os.open(journal.pods_folder / name / "lock", os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def found(state_root) -> list[tuple[str, str, str]]:
    return [(one.kind, one.object, one.pod) for one in module.find(state_root)]


def run(capsys, *argv: str):
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_nothing_at_all(state_root, capsys):
    assert run(capsys, "audit") == (0, {"clean": True, "findings": []})
    assert run(capsys, "gc") == (0, {"collected": [], "findings": [], "freed": []})
    assert run(capsys, "ps") == (0, [])
    assert os.listdir(state_root) == [], "a look makes nothing"


def test_a_dead_pod_and_all_it_held(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "p")
        journal.hold(journal.intend("p", "attachment", "/d.raw", {"slot": "0:1"}))
        journal.intend("p", "share", "/s")
        journal.lease("p", 1, 2, "/d.raw", writable=True)
    expected = [("pod", "p", "p"), ("attachment", "/d.raw", "p"), ("share", "/s", "p"), ("lease", "/d.raw", "p")]
    assert found(state_root) == expected
    status, answer = run(capsys, "audit")
    assert (status, answer["clean"], len(answer["findings"])) == (1, False, 4)
    status, answer = run(capsys, "gc")
    assert (status, answer["findings"]) == (0, [])
    assert [one["kind"] for one in answer["collected"]] == ["pod", "attachment", "share", "lease"]
    assert not (state_root / "pods" / "p").exists()
    assert found(state_root) == []


def test_what_a_pod_that_lives_holds_is_held(state_root):
    with Journal(state_root) as journal:
        make_pod(journal, "p")
        journal.intend("p", "share", "/s")
        with alive(journal, "p"):
            # It has no socket: not a pod that answers, but not one that nobody holds either.
            assert found(state_root) == []


def test_a_pod_that_is_being_started_is_left_alone(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "p", recorded=False)
        with alive(journal, "p"):
            assert found(state_root) == []
            assert run(capsys, "gc") == (0, {"collected": [], "findings": [], "freed": []})
    assert (state_root / "pods" / "p").is_dir()


def test_a_folder_that_no_pod_has(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "p", recorded=False)
        make_pod(journal, "q", recorded=False, lock=False)
    assert [kind for kind, _, _ in found(state_root)] == ["folder", "folder"]
    assert run(capsys, "gc")[0] == 0
    assert os.listdir(state_root / "pods") == []


def test_rows_and_leases_of_a_pod_that_nobody_knows(state_root, capsys):
    with Journal(state_root) as journal:
        journal.intend("ghost", "attachment", "/d.raw")
        journal.lease("ghost", 1, 2, "/d.raw", writable=False)
        assert found(state_root) == [("attachment", "/d.raw", "ghost"), ("lease", "/d.raw", "ghost")]
        assert run(capsys, "gc")[0] == 0
        assert (journal.held(), journal.leases()) == ([], [])


def test_mount_points_in_a_root_filesystem_that_nobody_has(state_root, tmp_path, capsys):
    """Whichever pod made them, and whether a pod of that name lives: who has the directory has it locked."""
    root = tmp_path / "root"
    (root / "made").mkdir(parents=True)
    status = root.stat()
    detail = {"root": str(root), "device": status.st_dev, "inode": status.st_ino, "path": "made", "at_ns": 0}
    with Journal(state_root) as journal:
        make_pod(journal, "live")
        row = journal.intend("live", mount_points.KIND, str(root / "made"), detail)
        journal.hold(row, {**detail, "made": statx_birth(AT_FDCWD, str(root / "made"))})
        with alive(journal, "live"):
            fd = os.open(root, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                assert found(state_root) == []
                assert run(capsys, "gc")[0] == 0
            finally:
                os.close(fd)
            assert found(state_root) == [("mount-point", str(root / "made"), "live")]
            status, answer = run(capsys, "gc")
            assert (status, answer["findings"]) == (0, [])
            assert [one["kind"] for one in answer["collected"]] == ["mount-point"]
            assert [pod.name for pod in journal.pods()] == ["live"]
    assert os.listdir(root) == []


def test_only_what_is_dead_is_collected(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "dead")
        make_pod(journal, "live")
        journal.intend("live", "share", "/s")
        with alive(journal, "live"):
            assert run(capsys, "gc")[0] == 0
            assert [pod.name for pod in journal.pods()] == ["live"]
            assert [row.object for row in journal.held()] == ["/s"]


def test_a_passing_state_is_not_reported(state_root, monkeypatch):
    answers = [[module.Finding("slot", "0:1", "p", "")], []]
    monkeypatch.setattr(module, "_look", lambda _root: answers.pop(0))
    assert module.find(state_root) == []


def test_a_machine_without_its_monitor(state_root, capsys):
    """A process that looks like one: its program's name, and the folder that it serves."""
    with Journal(state_root) as journal:
        make_pod(journal, "p", recorded=False, lock=False)
        journal.forget_pod("p")
    argument = f"local,id=shares,path={state_root}/pods/p/export,security_model=passthrough"
    script = "import sys, time; print(flush=True); time.sleep(60)"
    machine = subprocess.Popen(
        ["/x/qemu-system-x86_64", "-c", script, argument], executable=sys.executable, stdout=subprocess.PIPE
    )
    try:
        machine.stdout.readline()
        assert found(state_root) == [("process", str(machine.pid), "p")]
        assert found(state_root.with_name("other")) == []
        started = time.monotonic()
        assert run(capsys, "gc")[1]["collected"][0]["object"] == str(machine.pid)
        assert time.monotonic() - started < 4
        assert machine.wait(5) == -9
    finally:
        machine.kill()
        machine.wait()
        machine.stdout.close()


def test_for_people(state_root, capsys):
    assert main(["audit"]) == 0
    assert capsys.readouterr().out == "nothing is held by nobody\n"
    with Journal(state_root) as journal:
        make_pod(journal, "p")
        journal.lease("p", 1, 2, "/d.raw", writable=True)
    assert main(["audit"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[2].split(maxsplit=3) == [
        "lease",
        "/d.raw",
        "p",
        "the right to open it for writing is a dead pod's",
    ]
    assert "holdfast gc" in err
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == "let go of pod p\nlet go of lease /d.raw of pod p\n"
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == "there was nothing to let go of\n"


def test_what_was_left_half_made_and_copies_of_what_is_gone(state_root, data, capsys):
    """No finding of an audit, for nobody's storage is at stake; gc removes it, and says how much that was."""
    for name in ("templates/.abc1.new-dead", "guests/ab12"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_bytes(b"x" * 8000)
    assert run(capsys, "audit") == (0, {"clean": True, "findings": []})
    status, answer = run(capsys, "gc")
    assert status == 0
    freed = [(one["kind"], one["object"], one["bytes"] >= 8000) for one in answer["freed"]]
    assert freed == [("leftover", "abc1", True), ("guest", "ab12", True)]
    assert [path.name for path in (data / "templates").iterdir()] == []
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == "there was nothing to let go of\n"


# -- ps, of the same journals ---------------------------------------------------------------------


def test_ps_shows_dead_pods(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "p")
    assert [(pod.name, pod.state) for pod in survey(state_root)] == [("p", "dead")]
    assert main(["ps"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["p", "-", "dead", "-", "-", "0s"]
    assert "holdfast gc" in err


def test_ps_tolerates_a_pod_that_ends_meanwhile(state_root, monkeypatch):
    with Journal(state_root) as journal:
        make_pod(journal, "p")

        def ends(_root, name):
            journal.forget_pod(name)
            from holdfast.errors import NotFound

            raise NotFound("find pod", subject=name)

        monkeypatch.setattr("holdfast.cli.pods.ask", ends)
        assert list(survey(state_root)) == []


def test_a_dead_pod_can_be_removed(state_root, capsys):
    with Journal(state_root) as journal:
        make_pod(journal, "p")
    assert run(capsys, "pod", "remove", "p") == (0, {"removed": ["p"]})
    assert not (state_root / "pods" / "p").exists()
    status, answer = run(capsys, "pod", "remove", "p", "q")
    assert (status, answer["error"]["code"], len(answer["error"]["causes"])) == (125, "pod-not-found", 1)
