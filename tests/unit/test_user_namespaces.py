"""User namespaces: what a process and /etc/subuid say, and entering one in a child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.linux import places, user_namespaces

SOURCE = Path(user_namespaces.__file__).resolve().parents[2]


def test_ranges_are_those_of_the_user(tmp_path):
    file = tmp_path / "subuid"
    file.write_text("other:100000:65536\nme:165536:65536\n4711:1000:5\nme:7:0\n# nothing\nme:x:1\nme:1\n")
    assert user_namespaces.granted("uid", ("me", "4711"), str(file)) == [(165536, 65536), (1000, 5)]
    assert user_namespaces.granted("uid", ("nobody",), str(file)) == []
    assert user_namespaces.granted("uid", ("me",), str(tmp_path / "absent")) == []


def test_where_this_process_is():
    whole = [(0, 0, 2**32 - 1)]
    assert user_namespaces.inside() == (user_namespaces.mapped("uid") != whole)
    assert user_namespaces.rootless() == (user_namespaces.inside() or os.geteuid() != 0)


def test_entering():
    """In a process of its own, for there is no way back."""
    if why := user_namespaces.refusal():
        pytest.skip(f"no user namespaces here: {why}")
    script = (
        "import os; from holdfast.linux import user_namespaces as u; before = os.geteuid(), os.getegid(); u.enter();"
        "print(u.inside(), u.rootless(), os.geteuid(), os.getegid(), u.exists('uid', 0), u.exists('gid', 2**32 - 2),"
        " [u.mapped(kind)[0] == (0, number, 1) for kind, number in zip(('uid', 'gid'), before)])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=SOURCE)
    assert done.stdout == "True True 0 0 True False [True, True]\n"


def test_places_of_root_and_of_users(monkeypatch):
    monkeypatch.setattr(places.os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/x/run")
    monkeypatch.setenv("XDG_DATA_HOME", "/x/data")
    assert (places.default_state(), places.default_data()) == ("/run/holdfast", "/var/lib/holdfast")
    monkeypatch.setattr(places.os, "geteuid", lambda: 1000)
    assert (places.default_state(), places.default_data()) == ("/x/run/holdfast", "/x/data/holdfast")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert (places.default_state(), places.default_data()) == (
        "/run/user/1000/holdfast", "/home/me/.local/share/holdfast",
    )  # fmt: skip
