"""What several files of tests in VMs use."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.pod.client import STDERR, STDIN, STDOUT, Client
from holdfast.pod.messages import ExecRequest, Stdio
from holdfast.pod.requests import container_request
from holdfast.storage.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import holdfast

BUSYBOX = "tests/busybox"
RICH = "tests/rich"
DEADLINE_S = 90.0

#: Programs of a Debian host, run in a container that has the host's /usr at /host: no compiler needed, no image of it.
HOST_USR = "type=bind,src=/usr,dst=/host,ro"
_LIBRARIES = "/host/lib/x86_64-linux-gnu"
_PYTHON = f"/host/bin/{os.path.basename(os.path.realpath('/usr/bin/python3'))}"
HOST_PYTHON = (f"{_LIBRARIES}/ld-linux-x86-64.so.2", "--library-path", _LIBRARIES, _PYTHON, "-S", "-s", "-B")
HOST_PYTHON_ENV = {"PYTHONHOME": "/host"}


def sh(pod: holdfast.Pod, script: str, **options: Any) -> holdfast.Result:
    """Runs a shell script in a container of its own."""
    return pod.run(BUSYBOX, ["sh", "-c", script], **options)


def output(result: holdfast.Result) -> str:
    """What it printed; it must have succeeded."""
    assert result.status == 0, result
    return result.text


def assert_nothing_held(root: Path, *, pods: int = 0) -> None:
    """No pod is left in a state root: no folder, no row, no lease."""
    with Journal(root) as journal:
        assert len(journal.pods()) == pods
        if not pods:
            assert (journal.held(), journal.leases()) == ([], [])
    assert len(os.listdir(root / "pods")) == pods


def assert_holds_nothing(pod: holdfast.Pod) -> None:
    """A pod that goes on holds nothing any more: neither here, nor in its journal, nor in QEMU."""
    storage = pod.storage()
    assert (storage["attachments"], storage["shares"], storage["free_slots"]) == ([], [], 256)
    with Journal(pod.root) as journal:
        assert [row for row in journal.held() if row.pod == pod.name] == []
        assert [lease for lease in journal.leases() if lease["pod"] == pod.name] == []
    assert pod._client.request("verify", {}) == {"unknown": [], "missing": []}


def holds(capability: int) -> bool:
    """Whether these tests have a capability: root of a container need not have all."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> capability & 1)


def is_running(pid: int) -> bool:
    """Whether a process is there and no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pid: int) -> None:
    """Waits for a process that need not be a child."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            ready = select.select([pidfd], [], [], DEADLINE_S)[0]
        finally:
            os.close(pidfd)
        assert ready, f"process {pid} has not ended"


class Session:
    """A process in a pod whose output is read as it comes, and whose end can be waited for apart from its start.

    Args:
        method, request: as a client sends them; the streams are ours to number.
    """

    def __init__(self, pod: holdfast.Pod, method: str, request: msgspec.Struct, *, stdin: bool = False) -> None:
        self.client = Client.connect(pod.root, pod.name)
        self._stdin, self._stdin_writer = os.pipe() if stdin else (-1, -1)
        self.output: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
        self._grown = threading.Condition()
        self._end: int | BaseException | None = None
        try:
            self.client.open(STDOUT, STDERR, *([STDIN] if stdin else []))
            self.key = str(self.client.request(method, msgspec.to_builtins(request))["key"])
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._attend)
        self._thread.start()

    def _attend(self) -> None:
        try:
            self._end = self.client.attend(self.key, self._stdin, self._take)
        except BaseException as error:
            self._end = error
        with self._grown:
            self._grown.notify_all()

    def _take(self, channel: int, data: bytes) -> None:
        with self._grown:
            self.output[channel] += data
            self._grown.notify_all()

    def wait_for(self, text: bytes, channel: int = STDOUT) -> None:
        """Waits until the process has printed ``text``."""
        with self._grown:
            there = self._grown.wait_for(lambda: text in self.output[channel] or self._end is not None, DEADLINE_S)
        assert there and text in self.output[channel], (text, self.output, self._end)  # noqa: PT018

    def write(self, data: bytes) -> None:
        os.write(self._stdin_writer, data)

    def end_input(self) -> None:
        os.close(self._stdin_writer)
        self._stdin_writer = -1

    def ends_within(self, seconds: float) -> bool:
        """Waits so long at most; whether the process has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def wait(self) -> int:
        """The exit status; raises what ended the session otherwise."""
        self._thread.join(DEADLINE_S)
        if isinstance(self._end, BaseException):
            raise self._end
        assert self._end is not None, f"{self.key} has not ended: {self.output}"
        return self._end

    def close(self) -> None:
        """Ends the connection, and with it the process."""
        if not self.client.closed:
            self.client.shut_down()
            if hasattr(self, "_thread"):
                self._thread.join(DEADLINE_S)
            self.client.close()
        for fd in (self._stdin, self._stdin_writer):
            if fd >= 0:
                os.close(fd)
        self._stdin = self._stdin_writer = -1

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    pod: holdfast.Pod,
    script: str,
    *,
    name: str,
    stdin: bool = False,
    terminal: bool = False,
    size: tuple[int, int] = (24, 80),
    **options: Any,
) -> Session:
    """Starts a shell script in a container and returns at once."""
    stdio = Stdio(STDIN if stdin or terminal else 0, STDOUT, STDERR, size)
    request = container_request(
        name, pod.data, image=BUSYBOX, args=["sh", "-c", script], stdio=stdio, terminal=terminal, **options
    )
    return Session(pod, "run", request, stdin=stdin or terminal)


def start_exec(pod: holdfast.Pod, container: str, args: Sequence[str], *, terminal: bool = False) -> Session:
    """Starts a process in a running container and returns at once."""
    stdio = Stdio(STDIN if terminal else 0, STDOUT, STDERR)
    return Session(pod, "exec", ExecRequest(container, tuple(args), terminal=terminal, stdio=stdio), stdin=terminal)


@contextlib.contextmanager
def running(pod: holdfast.Pod, name: str, mounts: Sequence[str] = ()) -> Iterator[str]:
    """A container that does nothing until the block ends."""
    with start(pod, "echo ready; cat", name=name, stdin=True, mounts=mounts) as session:
        session.wait_for(b"ready")
        yield name
        session.end_input()
        session.wait()


def python_program(text: str) -> list[str]:
    """A command that runs Python, with the packages of these tests and of Holdfast, outside of pytest."""
    paths = [*sys.path, str(Path(__file__).parents[2])]
    return [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {paths!r}\n{text}"]
