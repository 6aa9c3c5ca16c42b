"""The option ``overlay``: how it is said, and what it makes of a plan."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.errors import HoldfastError, InvalidInput, Unsupported
from holdfast.spec.hints import Hint
from holdfast.spec.mounts import parse_mount, parse_volume
from holdfast.spec.runtime import spec_from_raw
from holdfast.storage.mount_plan import mount_step
from holdfast.storage.plan import DirectoryRoot, LayeredRoot, plan_container
from holdfast.storage.steps import MountDisk, OverlayMount, Plan, ShareDirectory, UseVolume
from holdfast.storage.survey import Source

ROOT = LayeredRoot((("/layers/top", "sha256:" + "a" * 64),), 64 << 20)
SOURCES = {
    "/disk": Source("/disk", "file", device=1, inode=2, size_bytes=1 << 20, filesystem="ext4"),
    "/dir": Source("/dir", "directory", device=1, inode=3),
}
HINT = Hint("v", "/v", "tmpfs", "pod")


def mount(kind: str = "bind", source: str = "/dir", destination: str = "/m", *options: str) -> dict[str, Any]:
    return {"type": kind, "source": source, "destination": destination, "options": list(options)}


def plan(*mounts: dict[str, Any], root: LayeredRoot | DirectoryRoot = ROOT, hints: tuple[Hint, ...] = ()) -> Plan:
    raw = {"ociVersion": "1.0.2", "process": {"cwd": "/", "args": ["x"]}, "mounts": list(mounts)}
    return plan_container("c", raw, spec_from_raw(raw), root, SOURCES, None, hints)


# -- how it is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "kept"), [("O", []), ("O,nosuid", ["nosuid"]), ("noexec,O,rprivate", ["noexec"])])
def test_as_podman_says_it(options, kept):
    found = parse_volume(f"/dir:/m:{options}", cwd="/")["options"]
    assert found[:3] == ["rbind", "rprivate", "rw"]
    assert set(found[3:]) == {"overlay", *kept}
    assert parse_volume(f"named:/m:{options}", cwd="/")["options"][1:] == found[3:]


@pytest.mark.parametrize("kind", ["bind", "disk", "physical-disk", "volume"])
def test_of_a_mount(kind):
    assert "overlay" in parse_mount(f"type={kind},src=/x,dst=/m,overlay".replace("=/x", "=x"), cwd="/")["options"]


@pytest.mark.parametrize(
    "text",
    [
        "type=tmpfs,dst=/m,overlay",
        "type=image,src=i,dst=/m,overlay",
        "src=v,dst=/m,overlay=1",
    ],
)
def test_not_of_others(text):
    with pytest.raises(InvalidInput) as caught:
        parse_mount(text, cwd="/")
    assert caught.value.code == "mount-option"


@pytest.mark.parametrize("word", ["upperdir=/u", "workdir=/w"])
def test_where_it_is_written_is_not_for_the_user_to_say(word):
    with pytest.raises(InvalidInput, match="what is written goes with the container") as caught:
        parse_volume(f"/dir:/m:O,{word}", cwd="/")
    assert caught.value.code == "mount-option"
    with pytest.raises(InvalidInput, match="what is written goes with the container"):
        plan(mount("bind", "/dir", "/m", "overlay", word))


# -- what is planned ------------------------------------------------------------------------------


def test_a_directory():
    made = plan(mount("bind", "/dir", "/m", "rbind", "overlay", "noexec"))
    share, overlay = made.steps[-3:-1]
    assert share == ShareDirectory("m0", "/dir", 1, 3, read_only=True)
    assert overlay == OverlayMount("o0", "m0", "/m", "scratch")
    [rewrite] = made.rewrites
    assert (rewrite.step, rewrite.options) == ("o0", ("rbind", "rw", "noexec"))
    assert overlay.describe() == "put a writable overlay over what is at /m: changes are on the scratch disk"
    assert msgspec.json.decode(msgspec.json.encode(overlay), type=OverlayMount) == overlay


def test_a_disk_is_attached_read_only():
    made = plan(mount("virtual-disk", "/disk", "/m", "overlay", "noatime"))
    disk = next(step for step in made.steps if isinstance(step, MountDisk))
    assert (disk.read_only, disk.options) == (True, ("noatime",))
    # And so may any number be of it.
    made = plan(mount("virtual-disk", "/disk", "/m", "overlay"), mount("virtual-disk", "/disk", "/n", "overlay"))
    assert [step.below for step in made.steps if isinstance(step, OverlayMount)] == ["m0", "m0"]


def test_a_volume_that_the_pod_shares():
    """A hint that is read-only is satisfied: nothing is written to it."""
    for hint in (HINT, msgspec.structs.replace(HINT, options=("ro",))):
        made = plan(mount("tmpfs", "/v", "/m", "overlay"), hints=(hint,))
        assert [type(step) for step in made.steps[-3:-1]] == [UseVolume, OverlayMount]


def test_what_is_read_only_needs_none():
    made = plan(mount("bind", "/dir", "/m", "overlay", "ro"))
    assert not any(isinstance(step, OverlayMount) for step in made.steps)
    assert made.rewrites[0].options == ("rbind", "ro")


@pytest.mark.parametrize(
    "root",
    [DirectoryRoot("/dir", read_only=False), DirectoryRoot("/dir", read_only=True), LayeredRoot(ROOT.layers, 0)],
    ids=["writable directory", "directory", "no scratch"],
)
def test_without_a_scratch_disk(root):
    made = plan(mount("bind", "/dir", "/m", "overlay"), root=root)
    [overlay] = [step for step in made.steps if isinstance(step, OverlayMount)]
    assert overlay.scratch == ""
    assert overlay.describe().endswith("changes are in memory")


@pytest.mark.parametrize(
    "wrong",
    [
        mount("tmpfs", "tmpfs", "/m", "overlay"),
        mount("proc", "proc", "/m", "overlay"),
        mount("virtual-disk", "/disk", "blockdev:///dev/x", "overlay"),
    ],
    ids=["tmpfs", "proc", "device"],
)
def test_where_there_is_nothing_to_lie_on(wrong):
    with pytest.raises(InvalidInput, match="no overlay over this") as caught:
        plan(wrong)
    assert caught.value.code == "mount-option"


def test_a_mount_by_itself_cannot_have_one():
    """As for what is attached to a container that runs: it must not be mounted without, and written to."""
    spec = spec_from_raw({"ociVersion": "1.0.2", "mounts": [mount("bind", "/dir", "/m", "rw,overlay")]})
    with pytest.raises(Unsupported) as caught:
        mount_step(0, spec.mounts[0], SOURCES, [])
    assert isinstance(caught.value, HoldfastError)
    assert caught.value.code == "mount-option"
