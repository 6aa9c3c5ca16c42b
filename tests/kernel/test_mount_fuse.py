"""FUSE filesystems, which a program mounts: here one of our own, small but real."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, Unsupported
from holdfast.mounts import Mount, helper, table, unmount, unmount_recursive
from holdfast.mounts import mount as make

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).resolve().parents[2] / "src"

#: Mounts, forks, and serves an empty directory until it is unmounted: FUSE_INIT, GETATTR and STATFS, no other request.
PROGRAM = f"""#!{sys.executable} -S
import os, struct, sys
sys.path.insert(0, {str(SOURCE)!r})
from holdfast.linux import syscalls
words = sys.argv[1:]
source, target = words[:2]
options = [words[at + 1] for at, word in enumerate(words) if word == "-o"]
kind = words[words.index("-t") + 1] if "-t" in words else source.partition("#")[0]
with open(os.path.dirname(sys.argv[0]) + "/called", "w") as file:
    file.write(repr(words))
if "fail" in options:
    print("it does not like you", file=sys.stderr)
    sys.exit(3)
if "nothing" in options:
    sys.exit(0)
fuse = os.open("/dev/fuse", os.O_RDWR)
flags = syscalls.MS_RDONLY if "ro" in options else 0
data = f"fd={{fuse}},rootmode=40000,user_id=0,group_id=0"
syscalls.mount(source, target, f"fuse.{{kind}}", flags | syscalls.MS_NODEV, data)
if "late" in options:
    sys.exit(4)
if os.fork():
    sys.exit(0)
os.setsid()
while True:
    try:
        request = os.read(fuse, 1 << 20)
    except OSError:  # unmounted
        break
    _, opcode, unique, node = struct.unpack_from("IIQQ", request)
    answer, error = b"", 0
    if opcode == 26:
        answer = struct.pack("IIIIHHIIHHI28x", 7, 31, 4096, 0, 1, 1, 4096, 1, 0, 0, 0)
    elif opcode == 3:
        answer = struct.pack("QII", 3600, 0, 0)
        answer += struct.pack("6Q10I", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
    elif opcode == 17:
        answer = bytes(80)
    elif opcode in (2, 42):
        continue
    else:
        error = -38
    os.write(fuse, struct.pack("IiQ", 16 + len(answer), error, unique) + answer)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mount.fuse", "mount.fuse3"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "target"
    path.mkdir()
    yield path
    unmount_recursive(str(tmp_path), lazy=True, records=str(tmp_path / "records"))


def mount(kind: str, source: str, target: Path, *options: str) -> None:
    make(Mount(kind, source, str(target), options), records=str(target.parent / "records"))


@pytest.mark.parametrize(
    ("kind", "source", "shown"),
    [("fuse3.hello", "src", "fuse.hello"), ("fuse.hello", "src", "fuse.hello"), ("fuse3", "hello#src", "fuse.hello")],
)
def test_a_program_mounts(programs, target, kind, source, shown):
    mount(kind, source, target, "ro", "allow_other", "rshared")
    words = [source, str(target), "-o", "ro", "-o", "allow_other", *(["-t", "hello"] if "." in kind else [])]
    assert (programs / "called").read_text() == repr(words)
    with open("/proc/self/mountinfo") as file:
        line = next(one for one in file if f" {target} " in one)
    assert f" - {shown} " in line
    assert " shared:" in line
    assert " ro,nodev" in line
    assert target.stat().st_mode & 0o777 == 0o755
    assert unmount(str(target))


def test_its_words_are_in_the_error(programs, target):
    with pytest.raises(HoldfastError, match=r"mount\.fuse3 ended with status 3: it does not like you"):
        mount("fuse3.hello", "src", target, "fail")
    assert not table.at(str(target))


def test_what_failed_late_is_taken_away(programs, target):
    with pytest.raises(HoldfastError, match="status 4"):
        mount("fuse3.hello", "src", target, "late")
    assert not table.at(str(target))


def test_it_says_that_it_mounted_and_has_not(programs, target):
    with pytest.raises(HoldfastError, match="nothing is mounted"):
        mount("fuse3.hello", "src", target, "nothing")


def test_no_such_program(target, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(helper, "_FOLDERS", ())
    with pytest.raises(Unsupported, match=r"no program mount\.fuse3"):
        mount("fuse3.hello", "src", target)


def test_one_whose_program_has_died(programs, target, nothing_remains):
    """Its files cannot be looked at any more (ENOTCONN), and it goes all the same."""
    mount("fuse3.hello", "src", target)
    (server,) = [one.pid for one in nothing_remains._processes() if "mount.fuse3" in one.arguments]
    pidfd = os.pidfd_open(server)
    try:
        os.kill(server, 9)
        import select

        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)
    with pytest.raises(OSError, match="not connected"):
        target.stat()
    assert unmount(str(target))
    assert not unmount(str(target))
