"""Ordinary users for tests: one whom nobody knows, and ``nobody`` with ids of /etc/subuid; a module says so::

user, nobody = users.FIXTURES
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import images
from tests.vm.cli import COMMAND
from tests.vm.support import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

UID = 4711
NOBODY = 65534
SUBORDINATE = 300000
RUN = ("run", "--isolation", "namespace")


class User:
    """Somebody with a home of their own, where the state root and the data folder are."""

    def __init__(self, home: Path, uid: int, *before: str) -> None:
        self.home = home
        self.uid = uid
        self._before = (*before, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_R", "XDG_"))}
        del self.env["HOLDFAST_DATA"]
        self.env |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), "TMPDIR": str(home / "tmp")}
        self.rootfs = home / "rootfs"

    def holdfast(self, *argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self._before, COMMAND, *argv], input=stdin, capture_output=True, timeout=DEADLINE_S, check=False,
            env=self.env, cwd=self.home,
        )  # fmt: skip

    def text(self, *argv: str | Path, stdin: bytes = b"") -> str:
        done = self.holdfast(*argv, stdin=stdin)
        assert done.returncode == 0, done
        return done.stdout.decode()

    def sh(self, script: str, *options: str | Path) -> str:
        """What a script prints, run on the user's root filesystem in a pod of its own."""
        return self.text(*RUN, *options, "--rootfs", self.rootfs, "--", "sh", "-c", script)

    def answer(self, *argv: str | Path) -> Any:
        return json.loads(self.text("--json", *argv))

    def fails(self, *argv: str | Path) -> dict[str, Any]:
        done = self.holdfast("--json", *argv)
        assert done.returncode == 125, done
        error: dict[str, Any] = json.loads(done.stdout or done.stderr)["error"]
        return error

    def folder(self, name: str) -> Path:
        """A folder of the user's; what is made in it later is root's until :meth:`own`."""
        path = self.home / name
        path.mkdir()
        self.own(path)
        return path

    def own(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.uid, self.uid)

    def nothing_is_held(self) -> None:
        assert self.answer("audit")["clean"]
        assert os.listdir(self.home / "run/holdfast/pods") == []


@contextlib.contextmanager
def make_home(uid: int) -> Iterator[Path]:
    """Below a folder that everybody may enter, unlike the one of this run."""
    home = Path(tempfile.mkdtemp(prefix="hfu", dir="/tmp"))
    try:
        home.chmod(0o711)
        images.busybox_tree(home / "rootfs")
        for name in ("run", "tmp"):
            (home / name).mkdir(mode=0o700)
        for path in (home, *home.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
        yield home
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    with make_home(UID) as home:
        found = User(home, UID)
        if why := refusal(found):
            pytest.skip(f"users have no user namespaces here: {why}")
        yield found


def refusal(user: User) -> str:
    checks = json.loads(user.holdfast("--json", "doctor").stdout)["checks"]
    [check] = [one for one in checks if one["name"] == "privilege"]
    return "" if check["state"] == "warn" else str(check["what"])


@pytest.fixture(scope="module")
def nobody(user: User) -> Iterator[User]:
    """Has ids besides the own one: the files that say so are seen by the commands alone."""
    if not shutil.which("newuidmap"):
        pytest.skip("newuidmap is not installed")
    with make_home(NOBODY) as home:
        (home / "sub").write_text(f"nobody:{SUBORDINATE}:65536\n")
        show = f'mount --bind {home}/sub /etc/subuid && mount --bind {home}/sub /etc/subgid && exec "$@"'
        yield User(home, NOBODY, "unshare", "--mount", "--propagation", "private", "sh", "-c", show, "sh")


def ids(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


FIXTURES = (user, nobody)
