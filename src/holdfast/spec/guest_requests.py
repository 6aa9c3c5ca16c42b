"""Requests to a guest to change what it has mounted: the names and shapes of the utility-VM protocol.

On that wire a field with its zero value is left out: LUN 0, controller 0, ``false`` and the empty text are all
absent, and the reader puts them back.  Keys that a reader does not know are passed over, so that either side may
be the newer one; an unknown *resource* is an error, as not doing what was asked is no option.

What ``Settings`` are depends on the guest's operating system, which the message does not say: the reader must.
:mod:`holdfast.spec.host_documents` is the host's half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
from msgspec import Struct, field

from holdfast.errors import InvalidInput, Unsupported
from holdfast.spec.host_documents import (
    Controller,
    HostSettings,
    Lun,
    MappedDirectory,
    PageAligned,
    PmemDevice,
    Shape,
    Unsigned,
    convert,
    decode_settings,
    encode_document,
)
from holdfast.spec.host_documents import scsi_resource_path as scsi_resource_path

if TYPE_CHECKING:
    from collections.abc import Sequence

GuestOs = Literal["linux", "windows"]
RequestType = Literal["Add", "Remove", "PreAdd", "Update"]
#: All that the protocol has; not all of them have a shape here.
ResourceType = Literal[
    "MappedDirectory", "SCSIDevice", "MappedVirtualDisk", "MappedVirtualDiskForContainerScratch", "WCOWBlockCims",
    "Network", "NetworkNamespace", "CombinedLayers", "CWCOWCombinedLayers", "VPMemDevice", "VPCIDevice",
    "ContainerConstraints", "HvSocket", "SecurityPolicy", "SecurityPolicyFragment", "PodCgroupMemoryLimit",
    "PodVolume", "ImageVolume", "OverlaidMount",
]  # fmt: skip
RESOURCE_TYPES: tuple[str, ...] = get_args(ResourceType)
FilterType = Literal["WCIFS", "UnionFS"]


class DeviceVerityInfo(Shape, frozen=True):
    """Of older hosts: the guest now reads this from the device itself."""

    ext4_size_in_bytes: Unsigned = 0
    version: Unsigned = 0
    algorithm: str = ""
    super_block: bool = False
    root_digest: str = ""
    salt: str = ""
    block_size: Unsigned = 0


class LCOWMappedVirtualDisk(Shape, frozen=True):
    """A disk in a slot, or one of its partitions, mounted at a path."""

    mount_path: str = ""
    lun: Lun = 0
    controller: Controller = 0
    partition: Unsigned = 0
    read_only: bool = False
    encrypted: bool = False
    options: tuple[str, ...] = ()
    block_dev: bool = False
    ensure_filesystem: bool = False
    filesystem: str = ""
    verity_info: DeviceVerityInfo | None = None


class WCOWMappedVirtualDisk(Shape, frozen=True):
    """A disk of controller 0, mounted at a path; it is read-only if its attachment is."""

    container_path: str = ""
    lun: Lun = 0


class WCOWMappedVirtualDiskForContainerScratch(WCOWMappedVirtualDisk, frozen=True):
    """The same, but formatted with ReFS first."""


class SCSIDevice(Shape, frozen=True):
    """A slot.  Only removed: the guest lets go of the device before the host takes it away."""

    controller: Controller = 0
    lun: Lun = 0


class LCOWMappedDirectory(Shape, frozen=True):
    """A share of the host, mounted at a path.

    Not in the protocol of others: ``no_suid``; ``last``, with which the removed share takes along what
    all shares of the pod have in common; and ``cache``, how the guest caches it.
    """

    mount_path: str = ""
    port: Unsigned = 0
    share_name: str = ""
    read_only: bool = False
    no_suid: bool = False
    last: bool = False
    cache: str = ""


WCOWMappedDirectory = MappedDirectory


class Layer(Shape, frozen=True):
    """A layer of an image.  A Linux guest needs only ``path``."""

    id: str = ""
    path: str = ""
    path_type: str = ""
    cache: str = ""


class LCOWCombinedLayers(Shape, frozen=True):
    """An overlay: ``layers`` from the top-most down; without ``scratch_path`` it is read-only."""

    container_id: str = field(default="", name="ContainerID")
    container_root_path: str = ""
    layers: tuple[Layer, ...] = ()
    scratch_path: str = ""


class WCOWCombinedLayers(Shape, frozen=True):
    """A filter over ``container_root_path``, where the scratch disk is, that shows ``layers`` below.

    The usual filter is never named on the wire: older guests refuse a request with a key that they do not know.
    """

    container_root_path: str = ""
    layers: tuple[Layer, ...] = ()
    scratch_path: str = ""
    filter_type: FilterType = "WCIFS"

    def __post_init__(self) -> None:
        # omit_defaults looks for the default itself, not for an equal text.
        if self.filter_type == "WCIFS":
            msgspec.structs.force_setattr(self, "filter_type", "WCIFS")


class CWCOWCombinedLayers(Shape, frozen=True):
    """The same in a confidential guest, which wants to know the container."""

    container_id: str = field(default="", name="ContainerID")
    combined_layers: WCOWCombinedLayers | None = None


class LCOWVPMemMappingInfo(Shape, frozen=True):
    """Where on its device a layer is."""

    device_offset_in_bytes: PageAligned = 0
    device_size_in_bytes: PageAligned = 0


class LCOWMappedVPMemDevice(Shape, frozen=True):
    """A read-only layer on persistent memory, mounted at a path; it has all of the device without ``mapping_info``.

    Not in the protocol of others: ``no_dax``, with which files are not mapped from the device itself.
    """

    device_number: PmemDevice = 0
    mount_path: str = ""
    mapping_info: LCOWVPMemMappingInfo | None = None
    verity_info: DeviceVerityInfo | None = None
    no_dax: bool = False


class LCOWMappedVPCIDevice(Shape, frozen=True):
    """An assigned device, to be waited for.

    Not in the protocol of others, whose devices come by a bus that QEMU has not got: ``port``, behind which it appears.
    """

    vm_bus_guid: str = field(default="", name="VMBusGUID")
    port: Unsigned = 0


class PodVolume(Shape, frozen=True):
    """A container's view of a volume that the pod's containers share.  Not in the protocol of others.

    ``type`` is ``tmpfs``, ``sandbox``, ``sandbox-tmp``, ``hugepages``, ``uvm``, ``share`` or ``disk``: a folder of what
    is mounted at ``source``.  ``options`` are the volume's, and count for who makes it.
    """

    mount_path: str = ""
    name: str = ""
    type: str = ""
    options: tuple[str, ...] = ()
    sub_path: str = ""
    source: str = ""


class ImageVolume(Shape, frozen=True):
    """A volume of an image, filled with what the container's root filesystem has at ``path``.  Not in others' protocol.

    ``source`` is the folder that it is made of; without one it is in memory.
    """

    mount_path: str = ""
    source: str = ""
    container_root_path: str = ""
    path: str = ""


class OverlaidMount(Shape, frozen=True):
    """What is at ``source`` shown at another path, where it can be written to and stays.  Not in others' protocol.

    ``scratch_path`` is the folder to be made for what is written; without one that is in memory.
    """

    mount_path: str = ""
    source: str = ""
    scratch_path: str = ""


class ConfidentialOptions(Shape, frozen=True):
    enforcer_type: str = ""
    encoded_security_policy: str = ""
    encoded_uvm_reference: str = field(default="", name="EncodedUVMReference")
    encoded_uvm_hash_envelope_reference: str = field(default="", name="EncodedUVMHashEnvelopeReference")


class SecurityPolicyFragment(Shape, frozen=True):
    fragment: str = ""
    media_type: str = ""

    @property
    def effective_media_type(self) -> str:
        """With the default, which hosts that do not know the field mean."""
        return self.media_type or "application/cose-x509+rego"


Settings = (
    LCOWMappedVirtualDisk | SCSIDevice | LCOWMappedDirectory | LCOWCombinedLayers | LCOWMappedVPMemDevice
    | LCOWMappedVPCIDevice | WCOWMappedVirtualDisk | WCOWMappedVirtualDiskForContainerScratch | WCOWMappedDirectory
    | PodVolume | ImageVolume | OverlaidMount | WCOWCombinedLayers | CWCOWCombinedLayers | ConfidentialOptions
    | SecurityPolicyFragment
)  # fmt: skip

#: ``ResourceType`` on the wire -> the shape of its ``Settings`` for a Linux guest, ...
RESOURCES: dict[str, type[Settings]] = {
    "MappedVirtualDisk": LCOWMappedVirtualDisk,
    "SCSIDevice": SCSIDevice,
    "MappedDirectory": LCOWMappedDirectory,
    "CombinedLayers": LCOWCombinedLayers,
    "VPMemDevice": LCOWMappedVPMemDevice,
    "VPCIDevice": LCOWMappedVPCIDevice,
    "PodVolume": PodVolume,
    "ImageVolume": ImageVolume,
    "OverlaidMount": OverlaidMount,
    "SecurityPolicy": ConfidentialOptions,
    "SecurityPolicyFragment": SecurityPolicyFragment,
}
#: ... and for a Windows guest.
WINDOWS_RESOURCES: dict[str, type[Settings]] = {
    "MappedVirtualDisk": WCOWMappedVirtualDisk,
    "MappedVirtualDiskForContainerScratch": WCOWMappedVirtualDiskForContainerScratch,
    "MappedDirectory": WCOWMappedDirectory,
    "CombinedLayers": WCOWCombinedLayers,
    "CWCOWCombinedLayers": CWCOWCombinedLayers,
    "SecurityPolicy": ConfidentialOptions,
    "SecurityPolicyFragment": SecurityPolicyFragment,
}
_NAMES = {kind: name for table in (RESOURCES, WINDOWS_RESOURCES) for name, kind in table.items()}

#: What of a disk's mount only Linux guests can do, apart from its controller.
_LINUX_ONLY = ("partition", "encrypted", "options", "block_dev", "ensure_filesystem", "filesystem", "verity_info")


class GuestRequest(Struct, frozen=True):
    """One change; what is changed follows from the class of ``settings``."""

    request_type: RequestType
    settings: Settings

    @property
    def resource_type(self) -> str:
        return _NAMES[type(self.settings)]


class ModifySettingRequest(Struct, frozen=True):
    """The envelope: ``resource_path`` and ``settings`` are the host's half of it, ``guest_request`` the guest's."""

    request_type: RequestType
    guest_request: GuestRequest | None = None
    resource_path: str = ""
    settings: HostSettings | None = None


def resources_of(guest_os: str) -> dict[str, type[Settings]]:
    """The resources of such a guest.

    Raises:
        InvalidInput: ``guest-os``; it is neither ``linux`` nor ``windows``.
    """
    if guest_os == "linux":
        return RESOURCES
    if guest_os == "windows":
        return WINDOWS_RESOURCES
    why = f"unknown operating system; known are {', '.join(get_args(GuestOs))}"
    raise InvalidInput("choose guest requests", subject=guest_os or "(none)", why=why, code="guest-os")


def mapped_disk(
    guest_os: str, wanted: LCOWMappedVirtualDisk, *, format_with_refs: bool = False
) -> LCOWMappedVirtualDisk | WCOWMappedVirtualDisk:
    """The settings by which a guest of this kind does what is ``wanted``.

    For a Windows guest ``read_only`` is not among them: the attachment says it.

    Raises:
        Unsupported: ``guest-option``; the guest cannot do all of it, and why names what.
        InvalidInput: ``guest-os``.
    """
    resources_of(guest_os)
    if guest_os == "linux":
        if format_with_refs:
            raise _refused(guest_os, "MappedVirtualDisk", "format with ReFS")
        return wanted
    _refuse_linux_only(wanted, "MappedVirtualDisk")
    kind = WCOWMappedVirtualDiskForContainerScratch if format_with_refs else WCOWMappedVirtualDisk
    return kind(wanted.mount_path, wanted.lun)


def eject(guest_os: str, controller: int, lun: int) -> GuestRequest | None:
    """The request to let go of a disk before the host takes it away; a Windows guest wants none.

    Raises:
        InvalidInput: ``guest-os``.
    """
    if SCSIDevice not in resources_of(guest_os).values():
        return None
    return GuestRequest("Remove", SCSIDevice(controller, lun))


def encode(request: GuestRequest | ModifySettingRequest) -> dict[str, Any]:
    """The request as a JSON object."""
    if isinstance(request, GuestRequest):
        settings = msgspec.to_builtins(request.settings)
        return {"ResourceType": request.resource_type, "RequestType": request.request_type, "Settings": settings}
    message: dict[str, Any] = {"RequestType": request.request_type}
    if request.resource_path:
        message["ResourcePath"] = request.resource_path
    if request.settings is not None:
        message["Settings"] = encode_document(request.settings)
    if request.guest_request:
        message["GuestRequest"] = encode(request.guest_request)
    return message


def encode_all(request_type: RequestType, many: Sequence[Settings]) -> dict[str, Any]:
    """One request for many things of one kind, which is not in the protocol of others: ``Settings`` is a list.

    The answer is ``{"results": [...]}``: for each what it would have been alone, or ``{"error": ...}``.
    """
    name = _NAMES[type(many[0])]
    return {"ResourceType": name, "RequestType": request_type, "Settings": msgspec.to_builtins(list(many))}


def decode(message: object, guest_os: str = "linux") -> GuestRequest:
    """The request that :func:`encode` wrote, or another implementation of the protocol, to such a guest.

    Raises:
        InvalidInput: ``resource-type`` for a resource that is not known; ``guest-request`` for wrong settings;
            ``guest-os``.
        Unsupported: ``resource-type`` for a resource that this guest does not have; ``guest-option`` for what a
            Windows guest cannot do with a disk.
    """
    resources = resources_of(guest_os)
    fields = _object(message, "GuestRequest")
    name = fields.get("ResourceType")
    kind = resources.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or kind is None:
        raise _no_resource(name, guest_os, resources)
    request_type = _request_type(fields)
    values = _object(fields.get("Settings", {}), "Settings")
    settings = _settings(values, kind, name)
    if issubclass(kind, WCOWMappedVirtualDisk):
        # To pass these over, as unknown keys are, would be to mount another disk, or the right one wrongly.
        _refuse_linux_only(_settings(values, LCOWMappedVirtualDisk, name), name)
    return GuestRequest(request_type, settings)


def decode_modify(message: object, guest_os: str = "linux") -> ModifySettingRequest:
    """The envelope and what is in it.

    Raises:
        InvalidInput: as :func:`decode`, and as :func:`holdfast.spec.host_documents.decode_settings`.
        Unsupported: likewise.
    """
    resources_of(guest_os)
    fields = _object(message, "ModifySettingRequest")
    inner, settings = fields.get("GuestRequest"), fields.get("Settings")
    path = fields.get("ResourcePath") or ""
    if not isinstance(path, str):
        raise _bad("ModifySettingRequest", f"ResourcePath: expected text, got {type(path).__name__}")
    return ModifySettingRequest(
        _request_type(fields),
        None if inner is None else decode(inner, guest_os),
        path,
        None if settings is None else decode_settings(settings, path),
    )


def _settings(values: dict[str, Any], kind: type[Settings], name: str) -> Any:
    return convert(values, kind, what="read guest request", subject=name, place="Settings", code="guest-request")


def _refuse_linux_only(disk: LCOWMappedVirtualDisk, name: str) -> None:
    if disk.controller:
        raise _refused("windows", name, f"use controller {disk.controller}, only 0")
    default = LCOWMappedVirtualDisk()
    set_ = [option for option in _LINUX_ONLY if getattr(disk, option) != getattr(default, option)]
    if set_:
        wire = {item.name: item.encode_name for item in msgspec.structs.fields(disk)}
        raise _refused("windows", name, f"do {', '.join(wire[option] for option in set_)}")


def _refused(guest_os: str, name: str, what: str) -> Unsupported:
    return Unsupported("ask guest", subject=name, why=f"a {guest_os} guest cannot {what}", code="guest-option")


def _no_resource(name: object, guest_os: str, resources: dict[str, type[Settings]]) -> InvalidInput | Unsupported:
    if name not in RESOURCE_TYPES:
        why = f"unknown resource type; known are {', '.join(resources)}"
        return InvalidInput("read guest request", subject=name or "(none)", why=why, code="resource-type")
    others = [other for other in get_args(GuestOs) if name in resources_of(other)]
    why = f"a {guest_os} guest does not have it" if others else "known, but not to be changed here"
    return Unsupported("read guest request", subject=name, why=why, code="resource-type")


def _request_type(fields: dict[str, Any]) -> RequestType:
    text = fields.get("RequestType", "")
    try:
        known: RequestType = msgspec.convert("Add" if text == "" else text, RequestType)
    except msgspec.ValidationError:
        why = f"RequestType: {text!r} is none of {', '.join(get_args(RequestType))}"
        raise _bad(fields.get("ResourceType", ""), why) from None
    return known


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(name, f"expected an object, got {type(value).__name__}")
    return value


def _bad(subject: object, why: str) -> InvalidInput:
    return InvalidInput("read guest request", subject=subject, why=why, code="guest-request")
