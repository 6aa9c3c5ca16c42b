"""What a test leaves behind: processes, mounts, loop devices, files, descriptors.

A :class:`Watch` notes what there is, and later says what is there in addition.  Other programs, other runs of these
tests among them, may use the machine at the same time, so only what belongs to *this* run counts:

* a process, if it descends from this one or has the run's token in its environment or its folder in its arguments;
* a mount, if this process sees it (the run has a mount namespace of its own when it is root; see ``conftest.py``);
* a loop device, if its file lies in one of the run's folders;
* a file, if it lies in a watched folder, or is ``/tmp/holdfast*``;
* a descriptor, if this process holds it.

What a longer-lived fixture makes while a test is already running is made inside :func:`long_lived`; what it adds later
on (a folder, the children of a process) is named with :func:`expect`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import re
import select
import shutil
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from holdfast.linux import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN_NAME = "HOLDFAST_TEST_SESSION"
PATIENCE_S = float(os.environ.get("HOLDFAST_TEST_PATIENCE_S", "5"))
#: What a state root may keep when its pods are gone: the journal, and folders with nothing in them.
KEPT_IN_STATE_ROOT = ("journal.db", "journal.db-wal", "journal.db-shm", "journal.db-lock")
_LOOP_CLR_FD = 0x4C01
#: As long as a program that only looks has a loop device open, at the most, on a busy machine.
_LOOK_S = 1.0

_expected_pids: set[int] = set()
_expected_paths: list[str] = []
_active: list[Watch] = []


class Leak(NamedTuple):
    """Something that is left: ``kind`` and ``key`` identify it, ``text`` is for people."""

    kind: str
    key: str
    text: str


class Process(NamedTuple):
    """One line of ``/proc``."""

    pid: int
    parent: int
    state: str
    arguments: str
    environment: bytes


def expect(*things: int | str | Path) -> None:
    """Lets ``things`` outlive the tests: process ids (children too) and paths (what lies below them too)."""
    for thing in things:
        if isinstance(thing, int):
            _expected_pids.add(thing)
        else:
            _expected_paths.append(os.fspath(thing))


def expect_no_more(pid: int) -> None:
    """``pid`` was meant to have ended by now."""
    _expected_pids.discard(pid)


def expect_nothing() -> None:
    """Forgets what was expected: the run ends."""
    _expected_pids.clear()
    _expected_paths.clear()


def report(who: str, found: list[Leak]) -> str:
    """``found``, for people."""
    return f"{who} left behind:\n" + "\n".join(f"  {leak.text}" for leak in found)


@contextlib.contextmanager
def long_lived() -> Iterator[None]:
    """Whatever comes into being inside this block, and stays, is meant to outlive the test that is running."""
    inner = Watch(*{folder for watch in _active for folder in watch.folders})
    try:
        yield
    finally:
        for leak in inner.leaks():
            if leak.kind == "process":
                _expected_pids.add(int(leak.key))
            for watch in _active:
                watch.accept(leak)


class Watch:
    """Notes what there is now.

    Args:
        folders: where files must not be left; one may be added to the list later, and is then taken to have been empty.
        patience_s: how long what is ending (a killed process, an autoclear loop device) gets to end.
    """

    def __init__(self, *folders: str, patience_s: float | None = None) -> None:
        self.folders = list(folders)
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._pids = _pids()
        self._mounts = set(mounts())
        self._loops = set(_loops())
        self._files = set(_files(self.folders))
        self._fds = Counter(_fds().values())

    def __enter__(self) -> Watch:
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)

    def accept(self, leak: Leak) -> None:
        """From now on ``leak`` counts as having been there from the start."""
        match leak.kind:
            case "process":
                self._pids.add(int(leak.key))
            case "mount":
                self._mounts.add(leak.key)
            case "loop":
                self._loops.add(leak.key)
            case "file":
                self._files.add(leak.key)
            case "fd":
                self._fds[leak.key] += 1

    def leaks(self) -> list[Leak]:
        """What is left, now."""
        found = [
            Leak(
                "process", str(one.pid), f"process {one.pid} ({one.state}, parent {one.parent}): {one.arguments[:200]}"
            )
            for one in self._processes()
        ]
        for identity, where in mounts().items():
            if identity not in self._mounts and not _is_expected(where):
                found.append(Leak("mount", identity, f"mount {identity}"))
        for loop, file in _loops().items():
            if loop not in self._loops and not _is_expected(file) and self._is_ours(file):
                found.append(Leak("loop", loop, f"loop device {loop}: {file}"))
        for path in _files(self.folders):
            if path not in self._files and not _is_expected(path):
                found.append(Leak("file", path, f"file {path}"))
        fds = _fds()
        surplus = Counter(fds.values()) - self._fds
        for fd, target in sorted(fds.items(), reverse=True):
            if surplus[target] > 0 and not _is_expected(target):
                surplus[target] -= 1
                found.append(Leak("fd", target, f"descriptor {fd}: {target}"))
        return found

    def settled_leaks(self) -> list[Leak]:
        """What is left once everything that was ending has had its time to end."""
        if not (found := self.leaks()):
            return found
        gc.collect()  # a descriptor may hang on a cycle of objects
        deadline = time.monotonic() + self.patience_s
        while (found := self.leaks()) and (remaining := deadline - time.monotonic()) > 0:
            pids = [int(leak.key) for leak in found if leak.kind == "process"]
            if pids:
                _wait_for_any(pids, remaining)
            elif any(leak.kind in ("loop", "mount") for leak in found):
                time.sleep(0.01)  # nothing tells when a loop device has let go
            else:
                break  # files and descriptors do not go away by themselves
        return found

    def clean_up(self, found: list[Leak]) -> None:
        """Gets rid of ``found`` as far as possible, so that one leak fails one test; what cannot go is accepted."""
        for leak in sorted(found, key=lambda leak: ["process", "mount", "loop", "file", "fd"].index(leak.kind)):
            with contextlib.suppress(OSError):
                if leak.kind == "process":
                    os.kill(int(leak.key), signal.SIGKILL)
                    _wait_for_any([int(leak.key)], 2.0)
                    os.waitpid(int(leak.key), os.WNOHANG)
                elif leak.kind == "mount":
                    syscalls.umount(mounts()[leak.key], syscalls.MNT_DETACH)
                elif leak.kind == "loop":
                    _clear_loop(leak.key)
                elif leak.kind == "file":
                    os.unlink(leak.key)
        for leak in self.leaks():
            self.accept(leak)

    def _processes(self) -> list[Process]:
        """Processes of this run that are new.  A pid that was there before is not read again: that keeps this cheap."""
        new = {pid: process for pid in _pids() - self._pids if (process := _read_process(pid))}
        token = f"{TOKEN_NAME}={os.environ.get(TOKEN_NAME, '')}".encode()
        ours = []
        for process in new.values():
            if process.state == "Z" and process.parent != os.getpid():
                continue  # dead, and reaping it is somebody else's business
            ancestors = set(_ancestors(process.pid))
            if ancestors & _expected_pids:
                continue
            mentions_us = any(f"{folder}/" in f"{process.arguments}/" for folder in self.folders)
            if os.getpid() in ancestors or token in process.environment.split(b"\0") or mentions_us:
                ours.append(process)
        return ours

    def _is_ours(self, path: str) -> bool:
        return any(path.startswith(folder + "/") for folder in self.folders)


def _is_expected(path: str) -> bool:
    return any(path == expected or path.startswith(expected + "/") for expected in _expected_paths)


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _read_process(pid: int) -> Process | None:
    environment = b""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # "pid (name) state parent ...", and the name may contain anything.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().replace(b"\0", b" ").decode("utf-8", "backslashreplace")
        with contextlib.suppress(PermissionError), open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(parent), state.decode(), arguments, environment)


def _ancestors(pid: int) -> Iterator[int]:
    """``pid``, its parent, and so on."""
    while pid > 1 and (process := _read_process(pid)):
        yield pid
        pid = process.parent


def wait_for_who_mentions(path: str | Path) -> None:
    """Waits until no process has a path in its arguments: programs leave others behind that tidy up."""
    deadline = time.monotonic() + 10 * PATIENCE_S
    while (remaining := deadline - time.monotonic()) > 0:
        found = [process for pid in _pids() if (process := _read_process(pid)) and str(path) in process.arguments]
        if not (pids := [process.pid for process in found if process.state != "Z"]):
            break
        _wait_for_any(pids, remaining)


def _wait_for_any(pids: list[int], timeout_s: float) -> None:
    """Returns when one of ``pids`` has ended."""
    poll = select.poll()
    fds = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                poll.register(fds[-1], select.POLLIN)
        if len(fds) == len(pids):
            poll.poll(timeout_s * 1000)
        time.sleep(0.005)  # until its parent has reaped it
    finally:
        for fd in fds:
            os.close(fd)


def mounts() -> dict[str, str]:
    """Every mount of this mount namespace: identity -> where."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            number, _parent, device, _root, where, *_ = line.split(" ")
            where = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), where)
            kind = line.partition(" - ")[2].split(" ")[0]
            found[f"{number} {kind} ({device}) on {where}"] = where
    return found


def _loops() -> dict[str, str]:
    found = {}
    for name in os.listdir("/sys/block"):  # twice for every test, and there may be hundreds that are free
        path = f"/sys/block/{name}/loop/backing_file"
        if name.startswith("loop") and os.access(path, os.F_OK):
            with contextlib.suppress(OSError), open(path) as file:
                found[f"/dev/{name}"] = file.read().rstrip("\n")
    return found


def loops_of(path: str | Path) -> list[str]:
    """The loop devices over a file, now."""
    return [device for device, file in _loops().items() if file == str(path)]


def no_loop_of(path: str | Path) -> bool:
    """Whether the last loop device over a file has let go.

    That is a moment after its last user has when another program looks for a free device just then: the kernel lets
    it open one that is in use, to find that out, and the device ends with the last that has it open.
    """
    deadline = time.monotonic() + _LOOK_S
    while loops_of(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _clear_loop(device: str) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    finally:
        os.close(fd)


def _files(folders: list[str]) -> Iterator[str]:
    """Files (sockets, pipes, links, all that is not a folder) below ``folders``, and ``/tmp/holdfast*``."""
    for folder in folders:
        for where, _subfolders, names in os.walk(folder):
            yield from (f"{where}/{name}" for name in names if name not in KEPT_IN_STATE_ROOT)
    yield from (f"/tmp/{name}" for name in os.listdir("/tmp") if name.startswith("holdfast"))


def _fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def remove_folder(folder: str) -> None:
    """Removes ``folder``, and never what is mounted in it."""
    for where in reversed(mounts().values()):
        if where == folder or where.startswith(folder + "/"):
            syscalls.umount(where, syscalls.MNT_DETACH)
    shutil.rmtree(folder, ignore_errors=True)
