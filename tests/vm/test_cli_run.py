"""``holdfast run`` and ``exec`` as users call them: output, input, terminals, signals, statuses, and sudden deaths."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import termios
from typing import TYPE_CHECKING

import pytest

from tests import leaks
from tests.vm.cli import Command, answer, fails, holdfast, text
from tests.vm.support import BUSYBOX, assert_nothing_held, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHELL = (BUSYBOX, "sh", "-c")


@pytest.fixture(scope="module")
def pod(data: Path, run_folder: Path) -> Iterator[str]:
    """An empty pod that the tests of this module share; its state root is the commands' own."""
    root = run_folder / "cli"
    leaks.expect(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_ROOT", str(root))
        with leaks.long_lived():
            text("pod", "create", "shared")
        yield "shared"
        text("pod", "remove", "--force", "shared")
        assert_nothing_held(root)


# -- in a pod of its own ----------------------------------------------------------------------------


@pytest.mark.usefixtures("data")
def test_output_and_status_are_the_containers_own(state_root):
    done = holdfast("run", *SHELL, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert_nothing_held(state_root)


def test_what_is_wrong_is_said_before_anything_is_started(data, state_root):
    assert fails("run", "no-such-image")["code"] == "image-not-found"
    assert fails("run", "-v", "/no/such/folder:/x", BUSYBOX)["code"] == "source-not-found"
    assert fails("run", "--isolation", "namespace", "--memory", "1G", BUSYBOX)["code"] == "isolation-unsupported"
    assert fails("run", "--memory", "few", BUSYBOX)["code"] == "size"
    assert os.listdir(state_root) == []
    done = holdfast("run", "no-such-image")
    assert done.stderr.startswith(b"holdfast: find image no-such-image")
    assert b"\n  hint: holdfast image import" in done.stderr


def test_a_detached_container_that_cannot_start_leaves_no_pod(data, state_root):
    assert holdfast("run", "-d", BUSYBOX, "/no/such/program").returncode == 127
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("data")
def test_kill_9_of_the_client_leaves_nothing(state_root):
    with Command("run", *SHELL, "echo ready; sleep 1000") as command:
        command.wait_for(b"ready")
        monitor = answer("ps")[0]["pid"]
        command.process.kill()
        wait_for_end(monitor)
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("data")
def test_kill_9_of_the_machine_is_told_and_leaves_nothing(state_root):
    with Command("run", *SHELL, "echo ready; sleep 1000") as command:
        command.wait_for(b"ready")
        os.kill(answer("ps")[0]["qemu_pid"], signal.SIGKILL)
        assert command.wait() == 125
        assert "killed by signal 9" in command.errors()
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("data")
def test_kill_9_of_the_monitor_is_told_and_leaves_nothing(state_root):
    with Command("run", *SHELL, "echo ready; sleep 1000") as command:
        command.wait_for(b"ready")
        os.kill(answer("ps")[0]["pid"], signal.SIGKILL)
        assert command.wait() == 125
        assert "its monitor has died" in command.errors()
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("data")
def test_a_reader_who_has_gone_ends_it(state_root):
    with Command("run", BUSYBOX, "yes") as command:
        command.wait_for(b"y\n")
        command.process.stdout.close()
        assert command.wait() == 141
        assert command.errors() == ""
    assert_nothing_held(state_root)


# -- in a pod that is there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status"), [("/no/such/program", 127), ("/etc/not-executable", 126), ("false", 1), ("true", 0)]
)
def test_statuses(pod, program, status):
    done = holdfast("run", "--pod", pod, BUSYBOX, program)
    assert done.returncode == status
    assert done.stderr.startswith(b"holdfast: ") == (status > 125)


def test_input_is_passed_on_and_ends(pod):
    data = os.urandom(1 << 20)
    done = holdfast("run", "--pod", pod, "-i", BUSYBOX, "cat", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data
    assert holdfast("run", "--pod", pod, BUSYBOX, "cat", stdin=b"not asked for").stdout == b""


def test_environment_user_and_folder(pod):
    script = "echo $A $HOSTNAME; id -u; pwd"
    done = text("run", "--pod", pod, "-e", "A=1", "-u", "user", "-w", "/etc", "--hostname", "box", *SHELL, script)
    assert done.split() == ["1", "box", "1000", "/etc"]


def test_signals_are_passed_on(pod):
    script = "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with Command("run", "--pod", pod, *SHELL, script) as command:
        command.wait_for(b"ready")
        command.process.terminate()
        command.wait_for(b"got")
        assert command.wait() == 9


def test_the_third_interrupt_kills_what_ignores_them(pod):
    with Command("run", "--pod", pod, *SHELL, "trap '' INT; echo ready; exec sleep 1000") as command:
        command.wait_for(b"ready")
        for _ in range(3):
            command.process.send_signal(signal.SIGINT)
            # One at a time: two that are pending at once are one (signal(7)).
            os.sched_yield()
            _wait_until_taken(command.process.pid)
        assert command.wait() == 128 + 9
        assert "killing it" in command.errors()


def _wait_until_taken(pid: int) -> None:
    """Waits until no signal is pending for a process."""
    while os.path.exists(f"/proc/{pid}"):
        with open(f"/proc/{pid}/status") as file:
            pending = {line.partition(":")[0]: int(line.split()[1], 16) for line in file if "Pnd:" in line}
        if not any(pending.values()):
            return


def set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 33 rows and 101 columns: the person's and the program's."""
    person, program = pty.openpty()
    set_size(person, 33, 101)
    yield person, program
    os.close(person)
    os.close(program)


def test_a_terminal(pod, terminal):
    """A shell at a terminal: its size, a new size, Ctrl-C, and the terminal as it was in the end."""
    person, program = terminal
    before = termios.tcgetattr(program)
    with Command("run", "--pod", pod, "-it", BUSYBOX, terminal=program) as command:
        command.wait_for(b"# ", person)
        assert termios.tcgetattr(program) != before
        os.write(person, b"stty size; tty\n")
        command.wait_for(b"33 101\r\n", person)
        command.wait_for(b"/dev/pts/0", person)
        set_size(person, 44, 99)
        os.write(person, b"until test \"`stty size`\" = '44 99'; do sleep 0.05; done; echo si''zed\n")
        command.wait_for(b"sized\r\n", person)
        # Said by the job itself: by then it is what Ctrl-C goes to, and no longer the shell.
        os.write(person, b"sh -c 'echo star\"\"ted; exec sleep 1000'\n")
        command.wait_for(b"started\r\n", person)
        os.write(person, b"\x03")
        os.write(person, b"echo status=$?\n")
        command.wait_for(b"status=130\r\n", person)
        os.write(person, b"exit 5\n")
        assert command.wait() == 5
    assert termios.tcgetattr(program) == before


def test_a_terminal_is_put_back_when_the_command_is_ended(pod, terminal):
    person, program = terminal
    before = termios.tcgetattr(program)
    with Command("run", "--pod", pod, "-it", *SHELL, "echo ready; exec sleep 1000", terminal=program) as command:
        command.wait_for(b"ready", person)
        assert termios.tcgetattr(program) != before
        for _ in range(3):
            command.process.terminate()
            _wait_until_taken(command.process.pid)
        assert command.wait() == 128 + 9
    assert termios.tcgetattr(program) == before


def test_exec(pod):
    text("run", "-d", "--pod", pod, "--name", "one", BUSYBOX, "sleep", "1000")
    done = holdfast(
        "exec",
        "-i",
        "-e",
        "A=1",
        "-w",
        "/etc",
        "-u",
        "1000",
        f"{pod}/one",
        *SHELL[1:],
        "cat; echo $A; pwd; id -u; exit 3",
        stdin=b"in ",
    )
    assert (done.returncode, done.stdout.split()) == (3, [b"in", b"1", b"/etc", b"1000"])
    assert text("exec", pod, "hostname") == "one\n"  # the only one
    text("run", "-d", "--pod", pod, "--name", "two", BUSYBOX, "sleep", "1000")
    assert fails("exec", pod, "hostname")["why"] == "these run: one, two"
    assert holdfast("exec", f"{pod}/two", "/no/such/program").returncode == 127
    assert fails("exec", f"{pod}/three", "true")["code"] == "container-not-running"
    assert fails("exec", "no-such-pod", "true")["code"] == "pod-not-found"
