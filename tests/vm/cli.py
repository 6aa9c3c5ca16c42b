"""The command as users call it, for tests: run to its end, or going on with its output read as it comes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.vm.support import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMAND = Path(sys.executable).parent / "holdfast"


def holdfast(
    *argv: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs the command to its end."""
    return subprocess.run(
        [COMMAND, *argv],
        input=stdin,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, **(env or {})},
    )


def text(*argv: str | Path, **options: Any) -> str:
    """What the command prints; it must succeed."""
    done = holdfast(*argv, **options)
    assert done.returncode == 0, done
    return done.stdout.decode()


def answer(*argv: str | Path, status: int = 0) -> Any:
    """What the command prints with ``--json``."""
    done = holdfast("--json", *argv)
    assert done.returncode == status, done
    return json.loads(done.stdout)


def fails(*argv: str | Path, status: int = 125) -> dict[str, Any]:
    """The error that the command ends with."""
    done = holdfast("--json", *argv)
    assert done.returncode == status, done
    error: dict[str, Any] = json.loads(done.stdout or done.stderr)["error"]
    return error


class Command:
    """The command while it runs.

    Args:
        terminal: the descriptor of a terminal to give it in place of pipes; it becomes its controlling one.
    """

    def __init__(self, *argv: str, terminal: int = -1) -> None:
        pipe = subprocess.PIPE if terminal < 0 else terminal
        self.process = subprocess.Popen(
            [COMMAND, *argv], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True,
            preexec_fn=None if terminal < 0 else lambda: _take_terminal(),
        )  # fmt: skip
        self.output = bytearray()

    def wait_for(self, wanted: bytes, fd: int = -1) -> None:
        """Reads stdout, or ``fd``, until ``wanted`` has come."""
        if fd < 0:
            assert self.process.stdout is not None
            fd = self.process.stdout.fileno()
        deadline = time.monotonic() + DEADLINE_S
        while wanted not in self.output:
            if not select.select([fd], [], [], 0.2)[0]:
                # A terminal does not end with its last program while we have both ends open.
                assert self.process.poll() is None and time.monotonic() < deadline, (wanted, bytes(self.output))  # noqa: PT018
                continue
            data = os.read(fd, 65536)
            assert data, (wanted, bytes(self.output), self.process.stderr and self.process.stderr.read())
            self.output += data

    def forget_output(self) -> None:
        self.output.clear()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def _take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
