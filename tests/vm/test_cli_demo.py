"""The guided tour works, and cleans up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from holdfast.image.store import ImageStore

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"


@pytest.mark.usefixtures("state_root")
def test_demo(data):
    before = [image.name for image in ImageStore(data).list()]
    done = subprocess.run([DEMO], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done
    assert "hello from hello: a file of this host\nexit status: 7\n" in done.stdout
    assert "nothing is held by nobody" in done.stdout
    assert "written by the container" in done.stdout.splitlines()
    assert [image.name for image in ImageStore(data).list()] == before
    assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("holdfast-demo")]
