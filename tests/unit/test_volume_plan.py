"""Which mounts are a volume of the pod's, where it is kept, and how a directory that containers share is cached."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.errors import Exhausted
from holdfast.spec.hints import Hint
from holdfast.spec.runtime import spec_from_raw
from holdfast.storage.plan import LayeredRoot, PodSnapshot, plan_container
from holdfast.storage.scratch import DEFAULT_BYTES, MIN_BYTES
from holdfast.storage.steps import MakeScratch, Plan, ShareDirectory, UseVolume
from holdfast.storage.survey import Source

LAYER = (("/layers/top", "sha256:" + "a" * 64),)
SOURCES = {"/v": Source("/v", "directory", device=1, inode=3), "/v/a": Source("/v/a", "directory", device=1, inode=4)}


def plan(hint: Hint, *mounts: dict[str, Any], snapshot: PodSnapshot | None = None, encrypted: bool = False) -> Plan:
    raw = {"ociVersion": "1.0.2", "process": {"cwd": "/", "args": ["x"]}, "mounts": list(mounts)}
    root = LayeredRoot(LAYER, 64 << 20, encrypted=encrypted)
    return plan_container("c", raw, spec_from_raw(raw), root, SOURCES, snapshot, (hint,))


def bind(source: str = "/v", *options: str) -> dict[str, Any]:
    return {"type": "bind", "source": source, "destination": "/m", "options": ["rbind", *options]}


MEMORY = {"type": "tmpfs", "source": "/v", "destination": "/m"}


def volume(made: Plan) -> UseVolume:
    return next(step for step in made.steps if isinstance(step, UseVolume))


# -- where it is kept -----------------------------------------------------------------------------


def test_a_tmpfs_is_in_memory():
    made = volume(plan(Hint("v", "/v", "tmpfs", "pod", ("size=1048576", "nodev")), {**MEMORY, "options": ["nodev"]}))
    assert made == UseVolume("m0", "/v", "tmpfs", ("size=1048576", "nodev"))


def test_a_bind_of_what_is_the_pod_s_own_is_on_a_disk():
    """The reference's table: the pod has the directory for itself, and may keep the data in any form."""
    hint = Hint("v", "/v", "tmpfs", "pod", ("size=64m", "nodev", "mode=750", "uid=7", "nr_inodes=9"))
    made = volume(plan(hint, bind("/v/a", "nodev")))
    assert made == UseVolume("m0", "/v", "disk", ("mode=750", "uid=7"), "a", 64 << 20)
    assert made.disk == MakeScratch("disk", 64 << 20)
    assert made.describe() == (
        "use the pod's volume /v (mode=750,uid=7) on a disk of 64 MiB, its folder a; make it if it is not there"
    )


@pytest.mark.parametrize(
    ("option", "size"), [((), DEFAULT_BYTES), (("size=50%",), DEFAULT_BYTES), (("size=1m",), MIN_BYTES)]
)
def test_sizes_of_disks(option, size):
    assert volume(plan(Hint("v", "/v", "tmpfs", "pod", option), bind())).size_bytes == size


def test_it_is_encrypted_like_all_else_that_the_container_writes():
    made = volume(plan(Hint("v", "/v", "tmpfs", "pod"), bind(), encrypted=True))
    assert made.disk.encrypted
    assert "on an encrypted disk" in made.describe()


@pytest.mark.parametrize(("kind", "mount"), [("tmpfs", bind()), ("disk", MEMORY)])
def test_its_first_user_has_decided(kind, mount):
    snapshot = PodSnapshot(volumes={"/v": kind})
    assert volume(plan(Hint("v", "/v", "tmpfs", "pod"), mount, snapshot=snapshot)).kind == kind


def test_its_disk_takes_a_slot_once():
    hint = Hint("v", "/v", "tmpfs", "pod")
    other = {**bind(), "destination": "/n"}
    plan(hint, bind(), other, snapshot=PodSnapshot(free_slots=3))
    with pytest.raises(Exhausted, match="3 disks needed, 2 SCSI slots free"):
        plan(hint, bind(), other, snapshot=PodSnapshot(free_slots=2))
    plan(hint, bind(), snapshot=PodSnapshot(free_slots=2, volumes={"/v": "disk"}))


# -- directories of the host ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "options", "cache"),
    [
        ("container", (), "loose"),
        ("pod", ("ro",), "loose"),
        ("pod", ("cache=none",), "none"),
        ("shared", (), "mmap"),
        ("shared", ("cache=loose",), "loose"),
    ],
)
def test_what_nobody_else_writes_to_is_cached(share, options, cache):
    made = plan(Hint("v", "/v", "bind", share, options), bind("/v", "ro"))
    [step] = [step for step in made.steps if isinstance(step, ShareDirectory)]
    assert (step.cache, step.read_only) == (cache, "ro" in options)
