"""Propagation of a container's mounts, where crun runs it.

At the end crun makes every mount of a container private, whatever its options said, unless the specification has the
root's propagation (``linux.rootfsPropagation``); runc keeps what was asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PRIVATE = {"private", "rprivate"}
_OTHERS = {prefix + kind for prefix in ("", "r") for kind in ("shared", "slave", "unbindable")}


def keep(spec: dict[str, Any]) -> None:
    """If a mount asks for more than being private, says what crun would have done of all others, and of the root."""
    mounts = [mount for mount in spec.get("mounts") or () if isinstance(mount, dict)]
    linux = spec.setdefault("linux", {})
    if linux.get("rootfsPropagation") or not any(_OTHERS.intersection(_options(mount)) for mount in mounts):
        return
    linux["rootfsPropagation"] = "private"
    for mount in mounts:
        if {"bind", "rbind"}.intersection(_options(mount)) and not (_PRIVATE | _OTHERS).intersection(_options(mount)):
            mount["options"] = [*_options(mount), "rprivate"]


def _options(mount: dict[str, Any]) -> list[str]:
    return list(mount.get("options") or ())
