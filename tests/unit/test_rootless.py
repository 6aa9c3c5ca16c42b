"""What a pod in namespaces cannot have without root."""

from __future__ import annotations

import pytest

from holdfast.errors import Unsupported
from holdfast.storage import rootless, steps

FITS = (
    steps.ShareDirectory("root", "/r", 1, 2, False),
    steps.CombineLayers("root", ("tree",)),
    steps.UseVolume("m0", "v", "tmpfs"),
    steps.RunContainer("run", ("sh",)),
)


def test_what_fits():
    rootless.check_steps(FITS)
    for resources in ({}, {"devices": [{"allow": False}]}, {"memory": {}, "devices": []}):
        rootless.check_limits({"linux": {"resources": resources}})
    rootless.check_limits({})


@pytest.mark.parametrize(
    ("step", "subject"),
    [
        (steps.MountLayer("layer0", "/l", "sha256:" + "a" * 64), "layer aaaaaaaaaaaa"),
        (steps.MountLayer("layer0", "/l"), "layer /l"),
        (steps.MakeScratch("scratch", 1 << 30), "scratch disk"),
        (steps.MountDisk("m1", "/disk", 1, 2, True, "raw"), "/disk"),
        (steps.UseVolume("m2", "huge", "hugepages"), "huge"),
        (steps.UseVolume("m2", "kept", "disk", size_bytes=1 << 30), "kept"),
    ],
)
def test_what_takes_the_host_s_root(step, subject):
    with pytest.raises(Unsupported) as caught:
        rootless.check_steps((*FITS, step))
    assert (caught.value.code, caught.value.subject) == (rootless.CODE, subject)
    assert caught.value.hint


def test_limits():
    with pytest.raises(Unsupported) as caught:
        rootless.check_limits({"linux": {"resources": {"devices": [], "memory": {"limit": 5}}}})
    assert caught.value.subject == "linux.resources.memory"
