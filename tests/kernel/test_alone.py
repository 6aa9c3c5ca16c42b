"""Work in a process that is the first of a PID namespace, and ends with who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from holdfast.errors import HoldfastError, InUse
from holdfast.machine.alone import run_alone
from tests.vm.support import is_running, python_program, wait_for_end


def test_what_it_returns():
    assert run_alone(lambda: b"x" * 200_000) == b"x" * 200_000
    assert run_alone(lambda: str(os.getpid()).encode()) == b"1"
    assert run_alone(lambda: b"") == b""
    assert subprocess.run(["true"], check=True).returncode == 0, "this process is as it was"


def test_what_it_raises():
    def work() -> bytes:
        raise InUse("do it", subject="this", why="that", code="mine")

    with pytest.raises(InUse) as caught:
        run_alone(work)
    assert (caught.value.code, caught.value.why) == ("mine", "that")
    with pytest.raises(HoldfastError) as other:
        run_alone(lambda: bytes(1 // 0))
    assert other.value.code == "internal"


PROGRAM = """
import os, signal, subprocess
from holdfast.machine.alone import run_alone
def work():
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        with open(f"/proc/self/fdinfo/{os.pidfd_open(child.pid)}") as file:
            print(next(line.split()[1] for line in file if line.startswith("Pid:")), flush=True)
        child.wait()
    finally:
        print("tidied up", flush=True)
run_alone(work)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_end_with_who_asked(number):
    with subprocess.Popen(
        python_program(PROGRAM), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        assert is_running(sleeper)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        rest = process.communicate(timeout=20)[0]
    wait_for_end(sleeper)
    assert rest == ("tidied up\n" if number == signal.SIGINT else "")


def test_a_worker_that_is_killed():
    with subprocess.Popen(
        python_program(PROGRAM), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        with open(f"/proc/{sleeper}/stat") as file:
            worker = int(file.read().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        assert "it was killed" in process.communicate(timeout=20)[1]
    wait_for_end(sleeper)
