"""The steps of a plan, as data: each can be printed, compared and sent, and does nothing by itself."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.image.records import Verity  # noqa: TC001  msgspec reads the types
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.spec.hints import Hint  # noqa: TC001
from holdfast.spec.runtime import clean_path

_OF_THE_HOST = ("blockIO", "network", "rdma")


class Step(msgspec.Struct, frozen=True, tag_field="step", omit_defaults=True):
    """One step.  ``id`` names what it yields: a path in the guest, known when it has been done."""

    id: str

    def describe(self) -> str:
        """One line for a person."""
        raise NotImplementedError


class MountLayer(Step, frozen=True, tag="layer"):
    """Attach an image layer's disk, read-only, and mount it; with ``verity`` every block is checked as it is read.

    Attributes:
        pmem: in persistent memory, if there is room.
    """

    path: str
    diff_id: str = ""
    verity: Verity | None = None
    pmem: bool = False

    def describe(self) -> str:
        name = self.diff_id.removeprefix("sha256:")[:12] or self.path
        check = f", verify it by root hash {self.verity.root_hash[:12]}" if self.verity else ""
        where = " in persistent memory, if there is room" if self.pmem else ""
        return f"attach layer {name} read-only{where}{check} and mount it"


class MakeScratch(Step, frozen=True, tag="scratch"):
    """Make a new, empty ext4 disk and mount it for the container's own writes.

    Attributes:
        encrypted: by the guest, with a key that is nowhere else.
        shared: one disk for all containers of the pod that say so, with a folder for each.  The first decides its size.
    """

    size_bytes: int
    encrypted: bool = False
    shared: bool = False

    def describe(self) -> str:
        if self.shared:
            kind = "encrypted scratch disk" if self.encrypted else "scratch disk"
            return f"mount the pod's {kind} ({self.size_bytes >> 20} MiB if it is new) and make a folder on it"
        encrypt = ", encrypt it" if self.encrypted else ""
        return f"make a scratch disk of {self.size_bytes >> 20} MiB{encrypt} and mount it"


class CombineLayers(Step, frozen=True, tag="overlay"):
    """Overlay the layers, top-most first, under the scratch disk, if there is one."""

    layers: tuple[str, ...]
    scratch: str = ""
    root_mode: int = 0o755
    root_uid: int = 0
    root_gid: int = 0

    def describe(self) -> str:
        top = "writable" if self.scratch else "read-only"
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return f"combine {layers} into a {top} root filesystem"


class MountDisk(Step, frozen=True, tag="disk"):
    """Attach a disk that the user brought, and mount what is on it.

    Attributes:
        partition: from 1; 0 is the whole disk.
        block_dev: do not mount it: a link to the device is made in the guest, and removed again.
        access, fork: see :class:`~holdfast.storage.attachments.Disk`.
    """

    path: str
    device: int
    inode: int
    read_only: bool
    disk_format: str
    block_device: bool = False
    filesystem: str = ""
    options: tuple[str, ...] = ()
    partition: int = 0
    block_dev: bool = False
    access: str = ""
    fork: str = ""

    def describe(self) -> str:
        mode = "read-only" if self.read_only else "writable"
        what = "block device" if self.block_device else f"{self.disk_format} disk"
        part = f" of partition {self.partition}" if self.partition else ""
        then = "show its device" if self.block_dev else f"mount its {self.filesystem or 'filesystem'}"
        return f"attach {what} {self.path} {mode} and {then}{part}"


class ShareDirectory(Step, frozen=True, tag="share"):
    """Show a host directory, or one file alone, in the guest.

    Attributes:
        sub_path: the folder of it that the container gets.
        fork: ``share`` if copies of the pod may write to it, too.
    """

    path: str
    device: int
    inode: int
    read_only: bool
    file: bool = False
    recursive: bool = True
    cache: str = "mmap"
    sub_path: str = ""
    fork: str = ""

    def describe(self) -> str:
        what = f"folder {self.sub_path} of" if self.sub_path else "file" if self.file else "directory"
        cache = "" if self.cache == "mmap" else f", cache={self.cache}"
        return f"share {what} {self.path} {'read-only' if self.read_only else 'writable'}{cache}"


class UseVolume(Step, frozen=True, tag="volume"):
    """Show the container a volume that the pod's containers share, or a folder of it; the first makes it.

    Attributes:
        kind: see :class:`~holdfast.spec.guest_requests.PodVolume`.
        options: of the volume, not of this view.
        size_bytes, encrypted: of the disk of a volume that is kept on one.
    """

    name: str
    kind: str
    options: tuple[str, ...] = ()
    sub_path: str = ""
    size_bytes: int = 0
    encrypted: bool = False

    @property
    def disk(self) -> MakeScratch:
        """The disk that a volume which is kept on one takes."""
        return MakeScratch("disk", self.size_bytes, self.encrypted)

    def describe(self) -> str:
        if self.kind == "uvm":
            return f"use the guest's own /{self.sub_path}"
        options = f" ({','.join(self.options)})" if self.options else ""
        if self.kind == "disk":
            encrypted = "n encrypted " if self.encrypted else " "
            options += f" on a{encrypted}disk of {self.size_bytes >> 20} MiB"
        folder = f", its folder {self.sub_path}" if self.sub_path else ""
        kind = "" if self.kind == "disk" else f"{self.kind} "
        return f"use the pod's {kind}volume {self.name}{options}{folder}; make it if it is not there"


class FillVolume(Step, frozen=True, tag="image-volume"):
    """Make a volume for the container alone and copy into it what the image has at its path, ``name``."""

    name: str
    kind: str = "image"

    def describe(self) -> str:
        return f"make a volume with what the image has at {self.name}"


class OverlayMount(Step, frozen=True, tag="overlay-mount"):
    """Put a writable overlay over what an earlier step yields, which stays as it is.

    Attributes:
        below: id of that step.
        name: the mount's destination.
        scratch: id of the step whose disk takes what is written; empty for a little memory.
    """

    below: str
    name: str
    scratch: str = ""
    kind: str = "overlay"

    def describe(self) -> str:
        where = "on the scratch disk" if self.scratch else "in memory"
        return f"put a writable overlay over what is at {self.name}: changes are {where}"


class AssignDevice(Step, frozen=True, tag="pci"):
    """Plug in a PCI function of the host, and give its device nodes to the container."""

    address: str
    function: int = 0

    def describe(self) -> str:
        which = f"virtual function {self.function} of " if self.function else ""
        return f"assign {which}PCI device {self.address}"


class MountPoint(msgspec.Struct, frozen=True):
    """A place that a container's root filesystem is to have.

    Attributes:
        path: relative to the root.
        directory: or else a file.
        mode: of a directory that has to be made.
    """

    path: str
    directory: bool = True
    mode: int = 0o755


class MakeMountPoints(Step, frozen=True, tag="mount-points"):
    """Make what a root filesystem lacks of these, until nobody has it: it is a directory of the host's.

    Attributes:
        device, inode: of the directory.
    """

    path: str
    device: int
    inode: int
    points: tuple[MountPoint, ...]

    def describe(self) -> str:
        return f"make the mount points that {self.path} lacks"


class RunContainer(Step, frozen=True, tag="run"):
    """Start the container from the rewritten specification."""

    args: tuple[str, ...]

    def describe(self) -> str:
        return "run " + " ".join(self.args)


AnyStep = (
    MountLayer | MakeScratch | CombineLayers | MountDisk | ShareDirectory | UseVolume | FillVolume | OverlayMount
    | AssignDevice | MakeMountPoints | RunContainer
)  # fmt: skip


class Rewrite(msgspec.Struct, frozen=True):
    """One mount of the specification whose source becomes a path in the guest.

    Attributes:
        index: position in the specification's ``mounts``.
        step: id of the step that yields the path.
        options: the mount's options in the guest.
        destination: for a mount that the specification has not got, where it goes; ``index`` is -1 then.
    """

    index: int
    step: str
    options: tuple[str, ...]
    destination: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What running a container takes, in order.

    Attributes:
        container: its name.
        spec: the caller's specification, not yet rewritten.
        root: id of the step that yields the root filesystem.
        rewrites: mounts that become paths in the guest; the others are the runtime's own.
        hints: what the container says of mounts that it shares with others.
        warnings: what of the specification is left out, and why.
    """

    container: str
    steps: tuple[AnyStep, ...]
    spec: dict[str, Any]
    root: str
    rewrites: tuple[Rewrite, ...]
    hints: tuple[Hint, ...] = ()
    warnings: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """One line for each step."""
        return [step.describe() for step in self.steps]

    def rewritten(self, paths: dict[str, str]) -> dict[str, Any]:
        """The specification for the guest, in a copy, from the path that each step has yielded."""
        spec: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.spec))
        spec["root"] = {**spec.get("root", {}), "path": paths[self.root]}
        if any(isinstance(step, CombineLayers) and not step.scratch for step in self.steps):
            spec["root"]["readonly"] = True
        for rewrite in self.rewrites:
            if rewrite.index >= 0:
                mount = spec["mounts"][rewrite.index]
            else:
                mount = _insert_mount(spec.setdefault("mounts", []), rewrite.destination)
            mount["type"] = "bind"
            mount["source"] = paths[rewrite.step]
            mount["options"] = list(rewrite.options)
        for mount in spec.get("mounts") or ():
            # crun makes no file at a path that ends with a slash.
            if not mount["destination"].startswith(BLOCKDEV):
                mount["destination"] = clean_path(mount["destination"])
        spec.pop("windows", None)
        for name in _OF_THE_HOST:  # they name the host's disks and network interfaces
            (spec.get("linux", {}).get("resources") or {}).pop(name, None)
        spec.pop("hooks", None)  # hooks are the host's programs; the guest has none of them
        spec.setdefault("linux", {})["cgroupsPath"] = f"/{self.container}"
        return spec


def _insert_mount(mounts: list[dict[str, Any]], destination: str) -> dict[str, Any]:
    """Adds a mount where it hides nothing: before those below it."""
    below = (i for i, mount in enumerate(mounts) if clean_path(mount["destination"]).startswith(destination + "/"))
    mount: dict[str, Any] = {"destination": destination}
    mounts.insert(next(below, len(mounts)), mount)
    return mount
