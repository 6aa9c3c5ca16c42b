"""Layers combined by the guest's own code, on this host's kernel: which may be newer than the guest's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from holdfast.guest import layers, upper
from holdfast.linux import syscalls

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.guest.children import Children


@pytest.fixture(autouse=True)
def _links_in_a_place_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper, "_LINKS", str(tmp_path / "links"))


def combine(target: Path, folders: list[Path], scratch: Path | None = None) -> None:
    """Carries the task out, which has nothing to wait for."""
    settings = {
        "ContainerRootPath": str(target),
        "Layers": [{"Path": str(folder)} for folder in folders],
        "ScratchPath": str(scratch or ""),
    }
    no_children: Children = None  # type: ignore[assignment]
    with pytest.raises(StopIteration):
        next(layers.add(settings, no_children))


@pytest.mark.parametrize("name", ["l", "odd:, \\name", "x" * 200], ids=["short", "odd", "long"])
@pytest.mark.parametrize("count", [2, 128, 256])
def test_the_first_is_on_top(tmp_path, name, count):
    """Of all of them something is seen, whatever their names are, and however many pages those would take."""
    folders = [tmp_path / f"{name}{number}" for number in range(count)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "top").write_text(str(number))
        (folder / f"own{number}").touch()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    target = tmp_path / "root"
    combine(target, folders, scratch)
    try:
        assert (target / "top").read_text() == "0"
        assert len(os.listdir(target)) == count + 1
        (target / "new").touch()
        assert (scratch / "upper/new").exists()
    finally:
        syscalls.umount(str(target), 0)
    assert not (tmp_path / "links").exists()
