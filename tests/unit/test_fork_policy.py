"""What mounts may say of copies of their pod, and what is then to be empty in these."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.errors import InvalidInput
from holdfast.spec.hints import Hint
from holdfast.spec.mounts import parse_mount
from holdfast.spec.runtime import Mount, spec_from_raw
from holdfast.storage.attachments import Disk
from holdfast.storage.fork_policy import emptied, for_runtime
from holdfast.storage.frozen import FrozenStorage
from holdfast.storage.mount_plan import mount_step
from holdfast.storage.plan import LayeredRoot, plan_container
from holdfast.storage.pod_volumes import FrozenVolumes
from holdfast.storage.steps import MountDisk, Plan
from holdfast.storage.survey import Source

ROOT = LayeredRoot((("/layers/top", "sha256:" + "a" * 64),), 64 << 20)
SOURCES = {
    "/disk": Source("/disk", "file", device=1, inode=2, size_bytes=1 << 20, filesystem="ext4"),
    "/squashed": Source("/squashed", "file", device=1, inode=3, size_bytes=1 << 20, filesystem="squashfs"),
    "/dev/x": Source("/dev/x", "block device", device=1, inode=6, size_bytes=1 << 20, filesystem="ext4"),
    "/dir": Source("/dir", "directory", device=1, inode=4),
    "/hinted": Source("/hinted", "directory", device=1, inode=5),
}
HINTS = (Hint("v", "/v", "tmpfs", "pod"), Hint("w", "/hinted", "bind", "shared"))
FRESH = "x-holdfast.fork=fresh"
NOTHING = FrozenStorage((), (), (), (), 0, FrozenVolumes(0, {}, (), {}), (), ())


def mount(kind: str, source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"type": kind, "source": source, "destination": destination, "options": list(options)}


def plan(*mounts: dict[str, Any]) -> Plan:
    raw = {"ociVersion": "1.0.2", "process": {"cwd": "/", "args": ["x"]}, "mounts": list(mounts)}
    return plan_container("c", raw, spec_from_raw(raw), ROOT, SOURCES, None, HINTS)


# -- how it is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "physical-disk", "volume", "tmpfs"])
def test_of_a_mount(kind):
    source = "" if kind == "tmpfs" else ",src=x"
    assert FRESH in parse_mount(f"type={kind}{source},dst=/m,fork=fresh", cwd="/")["options"]


@pytest.mark.parametrize(("text", "copied"), [("", True), (",fork=copy", True), (",fork=fresh", False)])
def test_memory_that_is_empty_in_copies_begins_empty(text, copied):
    assert ("tmpcopyup" in parse_mount(f"type=tmpfs,dst=/m{text}", cwd="/")["options"]) is copied


def test_an_unknown_one():
    with pytest.raises(InvalidInput, match="expected copy, share, fresh, deny"):
        parse_mount("type=disk,src=d,dst=/m,fork=new", cwd="/")


# -- what is planned ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["virtual-disk", "volume"])
def test_a_disk(kind):
    [step] = [step for step in plan(mount(kind, "/disk", "/m", FRESH)).steps if isinstance(step, MountDisk)]
    assert (step.fork, step.options) == ("fresh", ())


def test_memory_has_it_for_the_pod_and_not_for_the_runtime():
    made = plan(mount("tmpfs", "tmpfs", "/m/", f"size=1m,{FRESH}", "nosuid"), mount("proc", "proc", "/proc"))
    spec = made.rewritten({"root": "/root"})
    assert emptied(NOTHING, {"c": spec, "d": {}}) == {"disks": [], "memory": {"c": ["/m"]}}
    given = for_runtime(spec)
    assert given["mounts"][0]["options"] == ["size=1m", "nosuid"]
    assert given["mounts"][1] == spec["mounts"][1]
    assert emptied(NOTHING, {"c": given})["memory"] == {}


@pytest.mark.parametrize(("last", "memory"), [("copy", {}), ("fresh", {"c": ["/m"]})])
def test_the_last_word_on_memory_counts(last, memory):
    """As it does on a disk."""
    made = plan(mount("tmpfs", "tmpfs", "/m", f"{FRESH},x-holdfast.fork=copy", f"x-holdfast.fork={last}"))
    assert emptied(NOTHING, {"c": made.rewritten({"root": "/root"})})["memory"] == memory


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (mount("bind", "/dir", "/m", "rbind", FRESH), "what the host has"),
        (mount("virtual-disk", "/disk", "/m", "ro", FRESH), "only read"),
        (mount("virtual-disk", "/disk", "/m", "overlay", FRESH), "only read"),
        (mount("virtual-disk", "/squashed", "/m", FRESH), "only read"),
        (mount("volume", "/disk", "/m", "ro", FRESH), "only read"),
        (mount("virtual-disk", "/disk", "blockdev:///dev/x", FRESH), "not mounted"),
        (mount("physical-disk", "/dev/x", "/m", FRESH), "block device"),
        (mount("tmpfs", "tmpfs", "/m", "ro", FRESH), "only read"),
        (mount("tmpfs", "tmpfs", "/m", "tmpcopyup", FRESH), "tmpcopyup"),
        (mount("tmpfs", "tmpfs", "/m", "x-holdfast.fork=share"), "copied with the machine"),
        (mount("tmpfs", "tmpfs", "/m", "x-holdfast.fork=deny"), "copied with the machine"),
        (mount("tmpfs", "/v", "/m", FRESH), "all containers of the pod"),
        (mount("bind", "/v/below", "/m", "rbind", FRESH), "all containers of the pod"),
        (mount("bind", "/hinted", "/m", "rbind", "x-holdfast.fork=deny"), "all containers of the pod"),
        (mount("bind", "sandbox://a", "/m", "rbind", FRESH), "all containers of the pod"),
        (mount("proc", "proc", "/proc", FRESH), "of type proc"),
        (mount("mqueue", "mqueue", "/m", "x-holdfast.fork=copy"), "of type mqueue"),
    ],
    ids=str,
)
def test_refused_before_anything_is_touched(wrong, why):
    with pytest.raises(InvalidInput, match=why) as caught:
        plan(wrong)
    assert caught.value.code == "mount-option"
    assert wrong["destination"] in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [Mount("/m", "bind", "/dir", ("rbind", FRESH)), Mount("blockdev://", "virtual-disk", "/disk", (FRESH,))]
)
def test_refused_to_who_attaches_it(wrong):
    with pytest.raises(InvalidInput) as caught:
        mount_step(0, wrong, SOURCES, [])
    assert caught.value.code == "mount-option"


# -- for the pod that runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fork", "read_only", "expected"),
    [
        ("", False, "copy"), ("copy", False, "copy"), ("fresh", False, "fresh"), ("share", False, "share"),
        ("deny", False, "deny"), ("", True, "share"), ("copy", True, "share"), ("deny", True, "deny"),
    ],
)  # fmt: skip
def test_what_a_disk_is_in_copies(fork, read_only, expected):
    assert Disk("/d", "disk", read_only, fork=fork).in_copies == expected
