"""The timeline of a command, and what a benchmark makes of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import monotonic_ns

import pytest

from holdfast import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import run_parts


@pytest.fixture(autouse=True)
def _off(monkeypatch):
    monkeypatch.setattr(trace, "_sink", None)


@pytest.fixture
def marks(monkeypatch):
    found: list[tuple[int, str]] = []
    trace.send_to(lambda when, what: found.append((when, what)))
    return found


def test_nothing_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("HOLDFAST_TRACE", raising=False)
    trace.open_trace("client")
    assert not trace.is_on()
    trace.mark("nobody hears that")


def test_processes_write_into_one_file(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(real(*arguments)) or opened[-1])
    monkeypatch.setenv("HOLDFAST_TRACE", str(tmp_path / "trace"))
    before = monotonic_ns()
    for process in ("client", "monitor"):
        trace.open_trace(process)
        trace.mark("a thing done")
    for fd in opened:
        os.close(fd)
    lines = [line.split(" ", 2) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [line[1:] for line in lines] == [["client", "a thing done"], ["monitor", "a thing done"]]
    assert before <= int(lines[0][0]) <= int(lines[1][0]) <= monotonic_ns()


def test_another_machines_marks_are_in_our_time(marks):
    remote = trace.Remote()
    ahead = 10**15
    start = monotonic_ns()
    remote.mark({"when": start + ahead, "what": "first"})
    remote.mark({"when": start + ahead + 5, "what": "second"})
    (first, _), (second, what) = marks
    assert what == "agent: second"
    assert start <= first <= monotonic_ns()
    assert second - first <= 5  # what came quicker says better how the clocks differ


@pytest.mark.parametrize(
    "said", [{}, {"when": "1", "what": "x"}, {"when": 1, "what": 2}, {"when": 1, "what": None}, {"what": "x"}]
)
def test_nonsense_of_another_machine_is_dropped(marks, said):
    trace.Remote().mark(said)
    assert not marks


def test_another_machine_cannot_add_lines(marks):
    trace.Remote().mark({"when": 1, "what": "x\n1 client done" + "y" * 1000})
    [(_, what)] = marks
    assert "\n" not in what
    assert len(what) < 100


def test_parts_add_up_to_the_whole():
    text = "".join(
        f"{1_000_000 * ms} {process} {what}\n"
        for ms, process, what in [
            (5, "client", "interpreter"),
            (9, "monitor", "interpreter"),
            (12, "client", "plan"),
            (30, "monitor", "QEMU spawned"),
            (29, "monitor", "QEMU has greeted"),  # a clock is never read in two processes at once
            (80, "monitor", "pod is forgotten"),
        ]
    )
    parts = run_parts.split(text, 2_000_000, 90.0)
    assert parts["client: interpreter"] == 3
    assert parts["client: image, specification, plan"] == 7
    assert parts["QEMU: start"] == 0
    assert parts["client: told, ends"] == 12
    assert sum(parts.values()) == pytest.approx(90)
