"""The check that every test ends with does find what it is there for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import leaks

SLEEPER = ["/bin/sleep", "60"]


@pytest.fixture
def watch(run_folder):
    with leaks.Watch(str(run_folder), patience_s=0.2) as watch:
        yield watch
        watch.clean_up(watch.leaks())


def kinds(found):
    return [leak.kind for leak in found]


def test_nothing_is_nothing(watch):
    assert watch.settled_leaks() == []


def test_child(watch):
    with subprocess.Popen(SLEEPER) as child:
        (leak,) = watch.settled_leaks()
        assert leak.kind == "process"
        assert f"process {child.pid} " in leak.text
        assert "/bin/sleep 60" in leak.text
        child.kill()
    assert watch.settled_leaks() == []


def test_orphan_in_a_session_of_its_own(watch):
    """Neither a parent nor a process group leads back to us: the environment does."""
    script = "import subprocess; print(subprocess.Popen(['/bin/sleep', '60'], start_new_session=True, stdout=2).pid)"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    (leak,) = watch.settled_leaks()
    assert leak.key == done.stdout.decode().strip()
    watch.clean_up([leak])
    assert watch.settled_leaks() == []


def test_process_without_environment_that_names_our_folder(watch, run_folder):
    script = (
        "import subprocess; "
        f"print(subprocess.Popen(['/bin/sh', '-c', 'read x', '{run_folder}/x'], env={{}}, start_new_session=True, "
        "stdin=subprocess.PIPE, stdout=2).pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pid = parent.stdout.readline().decode().strip()
        assert pid in [leak.key for leak in watch.leaks()]
        os.kill(int(pid), signal.SIGKILL)
        parent.stdin.write(b"\n")
        parent.stdin.flush()


def test_stranger_is_not_ours(watch):
    """A process of another run of the tests, or of anybody else."""
    with subprocess.Popen(["/bin/sh", "-c", "setsid -f /bin/sleep 5 & exit"], env={"PATH": "/usr/bin:/bin"}) as shell:
        shell.wait()
    assert watch.settled_leaks() == []


def test_process_that_is_ending_gets_its_time(watch):
    watch.patience_s = 10
    child = subprocess.Popen(
        ["/bin/sh", "-c", "read line; exec sleep 0.1"], stdin=subprocess.PIPE, start_new_session=True
    )
    signal.signal(signal.SIGCHLD, lambda *_: child.poll())
    try:
        child.stdin.close()
        assert kinds(watch.leaks()) == ["process"]
        before = time.monotonic()
        assert watch.settled_leaks() == []
        assert time.monotonic() - before < 5
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def test_expected_process_and_its_children(watch):
    with subprocess.Popen(["/bin/sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE) as shell:
        shell.stdout.readline()
        assert len(watch.leaks()) == 3  # two processes and the pipe
        leaks.expect(shell.pid)
        assert kinds(watch.leaks()) == ["fd"]
        leaks.expect_no_more(shell.pid)
        watch.clean_up([leak for leak in watch.leaks() if leak.kind == "process"])


def test_file_and_socket(watch, run_folder):
    (run_folder / "tmp" / "left").write_text("x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{run_folder}/left.sock")
    assert {leak.key for leak in watch.leaks()} == {f"{run_folder}/tmp/left", f"{run_folder}/left.sock"}
    watch.clean_up(watch.leaks())
    assert not os.path.lexists(f"{run_folder}/left.sock")


def test_journal_of_a_state_root_may_stay(watch, state_root):
    (state_root / "journal.db").write_text("x")
    (state_root / "pods").mkdir()
    assert watch.leaks() == []
    (state_root / "pods" / "lock").touch()
    assert [leak.key for leak in watch.leaks()] == [f"{state_root}/pods/lock"]
    (state_root / "pods" / "lock").unlink()


def test_descriptor(watch):
    read_fd, write_fd = os.pipe()
    second = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    found = watch.leaks()
    assert kinds(found) == ["fd"] * 3
    assert any(leak.text == f"descriptor {second}: /dev/null" for leak in found)
    for fd in (read_fd, write_fd, second):
        os.close(fd)
    assert watch.leaks() == []


def test_descriptor_that_only_garbage_holds(watch):
    class Cycle:
        def __init__(self):
            self.itself = self
            self.socket = socket.socket()
            self.fd = self.socket.detach()

        def __del__(self):
            os.close(self.fd)

    Cycle()
    assert watch.settled_leaks() == []


def test_long_lived(watch, run_folder):
    before = run_folder / "tmp" / "before"
    before.touch()
    with leaks.long_lived():
        meant = run_folder / "tmp" / "meant"
        meant.touch()
        child = subprocess.Popen(SLEEPER)
        fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    assert [leak.key for leak in watch.leaks()] == [str(before)]
    os.close(fd)
    child.kill()
    child.wait()
    leaks.expect_no_more(child.pid)
    before.unlink()
    meant.unlink()


def test_default_folders_are_not_the_users(run_folder, data_root):
    assert os.environ["HOLDFAST_ROOT"] == f"{run_folder}/default"
    assert os.environ["HOLDFAST_DATA"] == str(data_root)


def test_state_root_is_short_enough_for_sockets(state_root):
    assert os.environ["HOLDFAST_ROOT"] == str(state_root)
    assert len(f"{state_root}/pods/{'x' * 64}/monitor.sock") <= 107


def test_failing_run(tmp_path, monkeypatch):
    """A whole run: the leaking test fails and names its leak, the next one passes, what is left at the end fails it."""
    monkeypatch.setenv("HOLDFAST_TEST_PATIENCE_S", "0.1")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/leaks.py"):
        shutil.copy(f"{root}/{name}", tmp_path / name)
    (tmp_path / "tests" / "unit" / "test_it.py").write_text(
        "import subprocess, pytest\n"
        "children = []\n"
        "@pytest.fixture(scope='session')\n"
        "def daemon():\n"
        "    children.append(subprocess.Popen(['/bin/sleep', '61']))\n"
        "def test_1(): children.append(subprocess.Popen(['/bin/sleep', '60']))\n"
        "def test_2(): pass\n"
        "def test_3(daemon): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--rootdir", tmp_path, "-W", "ignore", "tests/unit"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 passed, 1 error" in done.stdout
    assert "the test left behind:" in done.stdout
    assert "/bin/sleep 60" in done.stdout
    assert "the run left behind:" in done.stdout
    assert "/bin/sleep 61" in done.stdout
