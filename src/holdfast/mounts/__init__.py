"""Mounts as a library: making and taking away mounts, safe paths, options, probing filesystems.  See docs/mounts.md.

Runs in the guest too, and imports only what is used::

    from holdfast.mounts import Mount, mount, unmount

    mount(Mount("bind", "/srv/data", "/mnt", ["rbind", "ro"]))
    unmount("/mnt")
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.mounts.model import Mount as Mount
    from holdfast.mounts.mounting import mount as mount
    from holdfast.mounts.mounting import mount_all as mount_all
    from holdfast.mounts.release import recover as recover
    from holdfast.mounts.release import remove_mount_point as remove_mount_point
    from holdfast.mounts.release import unmount as unmount
    from holdfast.mounts.release import unmount_all as unmount_all
    from holdfast.mounts.release import unmount_recursive as unmount_recursive
    from holdfast.mounts.root import Root as Root
    from holdfast.mounts.temporary import temporary as temporary

#: Public name -> the module that has it.
_HOMES = {
    "Mount": "model",
    "Root": "root",
    "mount": "mounting",
    "mount_all": "mounting",
    "recover": "release",
    "remove_mount_point": "release",
    "temporary": "temporary",
    "unmount": "release",
    "unmount_all": "release",
    "unmount_recursive": "release",
}


def __getattr__(name: str) -> object:
    """Loads a public name when it is first used."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{home}"
    __import__(module)
    import sys

    value = getattr(sys.modules[module], name)
    globals()[name] = value
    return value
