"""A runtime that waits for its configuration: a program of the test's own in place of crun."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from holdfast.guest import ready
from holdfast.guest.children import Children
from holdfast.guest.loop import Loop
from holdfast.guest.process import Stdio
from holdfast.guest.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Reads its configuration twice, as crun does, and says what it has read.
READS = (
    "import os, sys; os.chdir(sys.argv[sys.argv.index('--bundle') + 1]);"
    "print(open('config.json').read() + '|' + open('config.json').read() + '|' + sys.argv[-1])"
)
DIES = "raise SystemExit(3)"
DIES_READING = "import os, sys; os.open(sys.argv[sys.argv.index('--bundle') + 1] + '/config.json', os.O_RDONLY)"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[object]:
    made: list[Stdio] = []

    def make(program: str) -> tuple[ready.ReadyRuntime, Children]:
        stdio = Stdio(terminal=False, stdin=0)
        made.append(stdio)
        children = Children()
        children.expect()
        runtime = Runtime((sys.executable, "-I", "-S", "-c", program))
        return ready.ReadyRuntime(runtime, children, str(tmp_path / "ready"), stdio), children

    yield make
    for stdio in made:
        stdio.close()


def end(children: Children, pid: int) -> int:
    ended: list[object] = []
    loop = Loop()
    loop.spawn(children.wait(pid), 20, lambda status, _error: (ended.append(status), loop.stop()))
    if not ended:
        loop.run()
    [status] = ended
    assert isinstance(status, int)
    return status


def test_it_waits_and_runs_what_it_is_told(make, tmp_path):
    waiting, children = make(READS)
    assert waiting.tell(b'{"a": 1}')
    assert end(children, waiting.pid) == 0
    stdio = waiting.stdio
    stdio.close_child()
    assert os.read(stdio.ours[1], 100) == b'{"a": 1}|{"a": 1}|+ready\n'
    assert (tmp_path / "ready/config.json").is_file()  # no FIFO any more


def test_a_configuration_that_a_pipe_does_not_hold_is_for_another(make, tmp_path):
    waiting, children = make(READS)
    assert not waiting.tell(b"x" * 70_000)
    assert not (tmp_path / "ready").exists()
    assert os.WTERMSIG(end(children, waiting.pid)) == 9


@pytest.mark.parametrize("program", [DIES, DIES_READING])
def test_one_that_dies_is_not_used(make, tmp_path, program):
    try:
        waiting, children = make(program)
    except OSError:  # before it came to its configuration
        assert not (tmp_path / "ready").exists()
        return
    end(children, waiting.pid)
    assert not waiting.tell(b"{}")
    assert not (tmp_path / "ready").exists()


def test_closed_it_leaves_nothing(make, tmp_path):
    waiting, children = make(READS)
    waiting.close()
    assert os.WTERMSIG(end(children, waiting.pid)) == 9
    assert not (tmp_path / "ready").exists()
