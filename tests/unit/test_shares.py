"""Shares as they are asked for and planned: cache modes, and the policy that denies writable ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from holdfast.cli.options import PodCreateOptions, RunOptions, parse
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.pod.attach import HotAttach
from holdfast.pod.containers import Containers
from holdfast.spec.annotations import NO_WRITABLE_SHARES
from holdfast.spec.mounts import parse_mount
from holdfast.spec.runtime import spec_from_raw
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.plan import DirectoryRoot, PodSnapshot, plan_container
from holdfast.storage.steps import ShareDirectory
from holdfast.storage.survey import Source
from tests.fakes import FakeSandbox, Faulty

if TYPE_CHECKING:
    from pathlib import Path

DENIED = PodSnapshot(writable_shares=False)
SOURCES = {"/root": Source("/root", "directory", device=1, inode=2), "/dir": Source("/dir", "directory", inode=3),
           "/dir/file": Source("/dir/file", "file", inode=4)}  # fmt: skip


def plan(
    *options: str, source: str = "/dir", read_only_root: bool = True, pod: PodSnapshot | None = None, **annotations: Any
):
    raw = {
        "ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}, "root": {"path": "/root"},
        "mounts": [{"type": "bind", "source": source, "destination": "/m", "options": ["rbind", *options]}],
        "annotations": annotations.get("annotations", {}),
    }  # fmt: skip
    return plan_container("c", raw, spec_from_raw(raw, "c"), DirectoryRoot("/root", read_only_root), SOURCES, pod)


# -- cache modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "mmap", "loose"])
def test_a_cache_mode_reaches_the_step(mode):
    mount = parse_mount(f"type=bind,src=/dir,dst=/m,cache={mode}", cwd="/")
    assert f"cache={mode}" in mount["options"]
    made = plan(*mount["options"])
    share = made.steps[2]
    assert isinstance(share, ShareDirectory)
    assert share.cache == mode
    assert (f"cache={mode}" in share.describe()) is (mode != "mmap")
    assert not any("cache" in option for option in made.rewrites[0].options)  # the container's bind has none


def test_the_default_always_shows_what_the_host_has():
    share = plan().steps[2]
    assert isinstance(share, ShareDirectory)
    assert share.cache == "mmap"


def test_unknown_cache_modes():
    with pytest.raises(InvalidInput, match="none, mmap, loose"):
        parse_mount("type=bind,src=/dir,dst=/m,cache=fscache", cwd="/")
    with pytest.raises(InvalidInput, match="cache=fscache is none of") as failure:
        plan("cache=fscache")
    assert failure.value.code == "cache-mode"
    with pytest.raises(InvalidInput, match="takes no 'cache'"):
        parse_mount("type=disk,src=/dir,dst=/m,cache=none", cwd="/")


# -- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["/dir", "/dir/file"])
@pytest.mark.parametrize("how", ["pod", "annotation"])
def test_writable_shares_can_be_denied(source, how):
    deny: dict[str, Any] = {"pod": DENIED} if how == "pod" else {"annotations": {NO_WRITABLE_SHARES: "true"}}
    with pytest.raises(InvalidInput, match="adding writable shares is denied") as failure:
        plan("rw", source=source, **deny)
    assert failure.value.code == "writable-share-denied"
    assert plan("ro", source=source, **deny).steps[2].describe().endswith("read-only")
    with pytest.raises(InvalidInput, match="denied"):
        plan("ro", read_only_root=False, **deny)


def test_an_annotation_cannot_allow_what_the_pod_denies():
    with pytest.raises(InvalidInput, match="denied"):
        plan("rw", pod=DENIED, annotations={NO_WRITABLE_SHARES: "false"})
    with pytest.raises(InvalidInput, match="neither true nor false"):
        plan("rw", annotations={NO_WRITABLE_SHARES: "perhaps"})


def test_hot_attach_obeys_the_policy(tmp_path: Path, state_root: Path):
    async def test() -> None:
        (tmp_path / "export").mkdir()
        with Journal(state_root) as journal:
            sandbox = Faulty(FakeSandbox(str(tmp_path / "export")))
            engine = Engine(sandbox, journal, "pod", tmp_path, writable_shares=False)
            attach = HotAttach(engine, sandbox, Mock(spec=Containers, rootless=False))
            with pytest.raises(HoldfastError) as failure:
                await attach.attach({"type": "bind", "source": str(tmp_path), "options": ["rbind", "rw"]})
            assert failure.value.code == "writable-share-denied"
            assert (sandbox.steps, journal.held(), engine.held()) == ([], [], [])

    asyncio.run(test())


def test_the_switch_of_the_command_line():
    run = parse(["run", "--no-writable-shares", "image"]).command
    assert isinstance(run, RunOptions)
    assert not run.sandbox.writable_shares
    assert run.annotations == {NO_WRITABLE_SHARES: "true"}  # so that it is said before a machine is started
    annotated = parse(["run", "--annotation", f"{NO_WRITABLE_SHARES}=true", "image"]).command
    assert isinstance(annotated, RunOptions)
    assert not annotated.sandbox.writable_shares
    create = parse(["pod", "create", "--no-writable-shares", "p"]).command
    assert isinstance(create, PodCreateOptions)
    assert not create.sandbox.writable_shares
    usual = parse(["run", "image"]).command
    assert isinstance(usual, RunOptions)
    assert usual.sandbox.writable_shares
    assert usual.annotations == {}
    with pytest.raises(InvalidInput, match="for a new pod"):
        parse(["run", "--pod", "p", "--no-writable-shares", "image"])
