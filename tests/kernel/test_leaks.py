"""The check that every test ends with finds mounts and loop devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from holdfast.linux import syscalls
from tests import leaks


@pytest.fixture
def watch(run_folder):
    with leaks.Watch(str(run_folder), patience_s=0.2) as watch:
        yield watch
        watch.clean_up(watch.leaks())


def test_mount(watch, run_folder):
    where = run_folder / "tmp" / "a b"  # mountinfo writes the blank as \\040
    where.mkdir()
    syscalls.mount("none", str(where), "tmpfs")
    found = watch.settled_leaks()
    assert [(leak.kind, leak.text.partition(" tmpfs ")[0].split()[0]) for leak in found] == [("mount", "mount")]
    assert found[0].text.endswith(f" on {where}")
    watch.clean_up(found)
    assert str(where) not in leaks.mounts().values()
    where.rmdir()


def test_mounts_stay_in_the_run(run_folder):
    """The host's mount table is not touched."""
    assert os.readlink("/proc/self/ns/mnt") != os.readlink(f"/proc/{os.getppid()}/ns/mnt")
    assert " shared:" not in Path("/proc/self/mountinfo").read_text()


def test_loop_device(watch, run_folder):
    file = run_folder / "tmp" / "disk"
    with open(file, "wb") as disk:
        disk.truncate(1 << 20)
    done = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode:
        file.unlink()
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    found = {leak.kind: leak for leak in watch.settled_leaks()}
    assert found["loop"].text == f"loop device {done.stdout.strip()}: {file}"
    watch.clean_up(list(found.values()))
    assert not [leak for leak in watch.settled_leaks() if leak.kind == "loop"]
