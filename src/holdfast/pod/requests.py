"""What a monitor is asked to run, from an image, a bundle or a root filesystem."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.pod.messages import ContainerRequest, Stdio
from holdfast.spec.bundle import Bundle
from holdfast.spec.default import NO_CONFIG, ContainerSpec, customise, spec_for_image
from holdfast.spec.mounts import add_mounts, parse_mount
from holdfast.spec.pmem import COUNT, DEFAULT_DEVICES
from holdfast.storage import scratch
from holdfast.storage.plan import DirectoryRoot, LayeredRoot
from holdfast.storage.protect import Protection, protect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from holdfast.image.records import Verity


def container_request(
    name: str,
    data: Path,
    *,
    image: str = "",
    bundle: str | Path | None = None,
    rootfs: str | Path | None = None,
    args: Sequence[str] = (),
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    hostname: str = "",
    terminal: bool | None = None,
    annotations: Mapping[str, str] | None = None,
    mounts: Iterable[str | dict[str, Any]] = (),
    read_only: bool = False,
    scratch_bytes: int = scratch.DEFAULT_BYTES,
    verity: bool | None = None,
    encrypt_scratch: bool | None = None,
    reuse_scratch: bool | None = None,
    pmem: bool = False,
    devices: Sequence[str] = (),
    stdio: Stdio | None = None,
) -> ContainerRequest:
    """What a monitor is asked to run, from an image, a bundle or a root filesystem; nothing is started.

    Args:
        rootfs: a folder of the host that is the container's root filesystem; it writes there.
        verity: every block of the image is checked by dm-verity when it is read.
        encrypt_scratch: what the container writes is encrypted by the guest, with a key that is nowhere else.
        reuse_scratch: it writes to one scratch disk with the pod's other containers that say so; the first one's
            ``scratch_bytes`` count.  These three are what an annotation says if they are None.
        pmem: its layers go to persistent memory, if the pod has some; an annotation may say so, too.
        devices: addresses of PCI functions to assign, such as ``0000:01:00.0``.

    Raises:
        NotFound, InvalidInput: the image, the bundle or a mount is not there or not right.
        Unsupported: the image has no hash trees.
    """
    if pmem:
        annotations = {COUNT: str(DEFAULT_DEVICES), **(annotations or {})}
    root: LayeredRoot | DirectoryRoot
    trees: dict[str, Verity | None] = {}
    if bundle is not None:
        loaded = Bundle.load(bundle)
        made = customise(
            loaded.raw, args=args, env=env, cwd=cwd, user=user, hostname=hostname, terminal=bool(terminal),
            annotations=annotations, read_only=read_only,
        )  # fmt: skip
        root = _bundle_root(loaded, made, scratch_bytes)
    elif rootfs is not None:
        made = spec_for_image(
            NO_CONFIG, args=args, entrypoint=entrypoint, env=env, cwd=cwd, user=user, hostname=hostname or name,
            terminal=bool(terminal), annotations=annotations, read_only=read_only,
        )  # fmt: skip
        root = DirectoryRoot(os.path.abspath(rootfs), read_only)
    else:
        from holdfast.image.store import ImageStore

        found = ImageStore(data).get(image)
        made = spec_for_image(
            found.config, args=args, entrypoint=entrypoint, env=env, cwd=cwd, user=user, hostname=hostname or name,
            terminal=bool(terminal), annotations=annotations, read_only=read_only,
        )  # fmt: skip
        top_first = tuple((layer.disk, layer.diff_id) for layer in reversed(found.layers))
        root = LayeredRoot(
            top_first, scratch_bytes, found.root.mode, found.root.uid, found.root.gid, volumes=found.config.volumes
        )
        trees = {layer.disk: layer.verity for layer in found.layers}
    root = protect(
        root, Protection(verity, encrypt_scratch, reuse_scratch), made.raw.get("annotations") or {}, trees,
        image or str(bundle or rootfs),
    )  # fmt: skip
    if devices:
        windows = made.raw["windows"] = dict(made.raw.get("windows") or {})
        windows["devices"] = [*(windows.get("devices") or ()), *({"idType": "vpci", "id": id} for id in devices)]
    add_mounts(made.raw, [parse_mount(m, cwd=os.getcwd()) if isinstance(m, str) else m for m in mounts])
    if bundle is not None:
        _absolute_sources(made.raw, Path(bundle).absolute())
    return ContainerRequest(name, made.raw, root, made.user or "", image or str(bundle or rootfs), stdio or Stdio())


def _bundle_root(bundle: Bundle, made: ContainerSpec, scratch_bytes: int) -> LayeredRoot | DirectoryRoot:
    folders = bundle.spec.windows.layer_folders
    if folders:
        # Top-most first, the scratch folder last: hcsshim's order.  The disks in them have fixed names.
        return LayeredRoot(tuple((f"{bundle.host_path(f)}/layer.erofs", "") for f in folders[:-1]), scratch_bytes)
    assert bundle.root_path is not None
    return DirectoryRoot(bundle.root_path, bool(made.raw.get("root", {}).get("readonly")))


def _absolute_sources(raw: dict[str, Any], folder: Path) -> None:
    """A bind's relative source is relative to the bundle (runtime-spec config.md, Mounts)."""
    for mount in raw.get("mounts", ()):
        source = mount.get("source", "")
        binds = mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options") or ())
        if source and binds and not source.startswith("/") and "://" not in source:
            mount["source"] = os.path.join(folder, source)
