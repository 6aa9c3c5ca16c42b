"""A checkout sets itself up, and says what it cannot do by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def check(tmp_path, *, os_release="", without=(), busybox=None):
    """`scripts/setup --check` on a machine of this sort that lacks the commands ``without``."""
    (tmp_path / "os-release").write_text(os_release)
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        for name in os.listdir(place):
            if name not in without and not (folder / name).is_symlink():
                (folder / name).symlink_to(f"{place}/{name}")
    if busybox:
        (folder / "busybox").symlink_to(busybox)
    script = tmp_path / "scripts" / "setup"
    script.parent.mkdir()
    # Without the folders that it adds to the PATH, where the commands are after all.
    script.write_text((ROOT / "scripts" / "setup").read_text().replace(":/usr/sbin:/sbin", ""))
    environment = {"PATH": str(folder), "HOLDFAST_OS_RELEASE": str(tmp_path / "os-release")}
    done = subprocess.run(
        ["/bin/bash", script, "--check"], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    return done.returncode, done.stderr


def test_nothing_is_missing(tmp_path):
    assert check(tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("os_release", "command"),
    [
        ("ID=debian\n", "apt-get install --no-install-recommends qemu-utils squashfs-tools"),
        (
            "ID=linuxmint\nID_LIKE='ubuntu debian'\n",
            "apt-get install --no-install-recommends qemu-utils squashfs-tools",
        ),
        ("ID=fedora\n", "dnf install qemu-img squashfs-tools"),
        ("ID=rocky\nID_LIKE='rhel centos fedora'\n", "dnf install qemu-img squashfs-tools"),
        ("ID=arch\n", "pacman -S --needed qemu-img squashfs-tools"),
        ("ID=opensuse-leap\nID_LIKE='suse opensuse'\n", "zypper install qemu-img squashfs"),
        ("ID=alpine\n", "apk add qemu-img squashfs-tools"),
    ],
)
def test_missing_commands_are_named(tmp_path, os_release, command):
    status, text = check(tmp_path, os_release=os_release, without=("qemu-img", "mksquashfs"))
    assert status == 1
    assert "  command qemu-img - package qemu-" in text
    assert "  command mksquashfs - package squashfs" in text
    assert text.endswith(f"as root: {command}\n")


def test_what_a_distribution_has_not_is_not_asked_for(tmp_path):
    assert check(tmp_path, os_release="ID=fedora\n", without=("runsc",)) == (0, "")


def test_unknown_distribution(tmp_path):
    status, text = check(tmp_path, os_release="PRETTY_NAME='Plan 9'\n", without=("crun",))
    assert status == 1
    assert "missing on Plan 9:" in text
    assert "command crun - package crun on Debian" in text
    assert "as root" not in text


def test_dynamic_busybox_does_not_do(tmp_path):
    """The guest's first root has no C library."""
    status, text = check(tmp_path, os_release="ID=fedora\n", without=("busybox", "busybox.static"), busybox="/bin/ls")
    assert status == 1
    assert "a statically linked busybox - package busybox\n" in text


def test_lock_has_what_the_project_asks_for():
    """All of it: set-up installs the lock file and resolves nothing."""
    name = re.compile(r"[\w.-]+")
    locked = {
        name.match(line)[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    }
    wanted = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    assert {name.match(one)[0].lower() for one in wanted} <= locked


def test_installed_packages_agree():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_set_up_again_does_nothing():
    stamp = ROOT / ".venv" / ".holdfast-stamp"
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("these tests do not run in the checkout's virtual environment")
    before = stamp.stat().st_mtime_ns
    command = [ROOT / "scripts" / "setup"]
    subprocess.run(command, capture_output=True, timeout=60, check=True)  # the tests' data folder may have no guest yet
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert stamp.stat().st_mtime_ns == before


def test_launcher_names_its_interpreter():
    """Neither a shim on the PATH nor the user's own packages can come in between."""
    launcher = Path(sys.prefix) / "bin" / "holdfast"
    first, *_ = launcher.read_text().splitlines()
    assert first == f"#!{sys.prefix}/bin/python -IS"


def test_wrong_argument():
    done = subprocess.run([ROOT / "scripts" / "setup", "--nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "usage" in done.stderr
