"""Requests to a guest to change what it has mounted: the names and shapes of the utility-VM protocol.

On that wire a field with its zero value is left out: LUN 0, controller 0, ``false`` and the empty text are all
absent, and the reader puts them back.  Keys that a reader does not know are passed over, so that either side may
be the newer one; an unknown *resource* is an error, as not doing what was asked is no option.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct, field

from holdfast.errors import InvalidInput

RequestType = Literal["Add", "Remove", "PreAdd", "Update"]
Controller = Annotated[int, Meta(ge=0, le=3)]
Lun = Annotated[int, Meta(ge=0, le=63)]
Unsigned = Annotated[int, Meta(ge=0)]


class LCOWMappedVirtualDisk(Struct, frozen=True, rename="pascal", omit_defaults=True):
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


class SCSIDevice(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """A slot.  Only removed: the guest lets go of the device before the host takes it away."""

    controller: Controller = 0
    lun: Lun = 0


class LCOWMappedDirectory(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """A share of the host, mounted at a path.

    Not in the protocol of others: ``no_suid``, and ``last``, with which the removed share takes along what
    all shares of the pod have in common.
    """

    mount_path: str = ""
    port: Unsigned = 0
    share_name: str = ""
    read_only: bool = False
    no_suid: bool = False
    last: bool = False


class Layer(Struct, frozen=True, rename="pascal", omit_defaults=True):
    id: str = ""
    path: str = ""


class LCOWCombinedLayers(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """An overlay: ``layers`` from the top-most down; without ``scratch_path`` it is read-only."""

    container_id: str = field(default="", name="ContainerID")
    container_root_path: str = ""
    layers: tuple[Layer, ...] = ()
    scratch_path: str = ""


Settings = LCOWMappedVirtualDisk | SCSIDevice | LCOWMappedDirectory | LCOWCombinedLayers

#: ``ResourceType`` on the wire -> the shape of its ``Settings``.
RESOURCES: dict[str, type[Settings]] = {
    "MappedVirtualDisk": LCOWMappedVirtualDisk,
    "SCSIDevice": SCSIDevice,
    "MappedDirectory": LCOWMappedDirectory,
    "CombinedLayers": LCOWCombinedLayers,
}
_NAMES = {kind: name for name, kind in RESOURCES.items()}


class GuestRequest(Struct, frozen=True):
    """One change; what is changed follows from the class of ``settings``."""

    request_type: RequestType
    settings: Settings

    @property
    def resource_type(self) -> str:
        return _NAMES[type(self.settings)]


class ModifySettingRequest(Struct, frozen=True):
    """The envelope: ``resource_path`` names the host's half of the change, ``guest_request`` is the guest's."""

    request_type: RequestType
    guest_request: GuestRequest | None = None
    resource_path: str = ""


def scsi_resource_path(controller: int, lun: int) -> str:
    """The host's name of a slot."""
    return f"VirtualMachine/Devices/Scsi/{controller}/Attachments/{lun}"


def encode(request: GuestRequest | ModifySettingRequest) -> dict[str, Any]:
    """The request as a JSON object."""
    if isinstance(request, GuestRequest):
        settings = msgspec.to_builtins(request.settings)
        return {"ResourceType": request.resource_type, "RequestType": request.request_type, "Settings": settings}
    message: dict[str, Any] = {"RequestType": request.request_type}
    if request.resource_path:
        message["ResourcePath"] = request.resource_path
    if request.guest_request:
        message["GuestRequest"] = encode(request.guest_request)
    return message


def decode(message: object) -> GuestRequest:
    """The request that :func:`encode` wrote, or another implementation of the protocol.

    Raises:
        InvalidInput: ``resource-type`` for a resource that is not known; ``guest-request`` for wrong settings.
    """
    fields = _object(message, "GuestRequest")
    name = fields.get("ResourceType")
    kind = RESOURCES.get(name) if isinstance(name, str) else None
    if kind is None:
        why = f"unknown resource type; known are {', '.join(RESOURCES)}"
        raise InvalidInput("read guest request", subject=name or "(none)", why=why, code="resource-type")
    request_type = _request_type(fields)
    try:
        settings = msgspec.convert(_object(fields.get("Settings", {}), "Settings"), kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        why = f"Settings{path.removesuffix('`')}: {problem[:1].lower()}{problem[1:]}"
        raise InvalidInput("read guest request", subject=name, why=why, code="guest-request") from None
    return GuestRequest(request_type, settings)


def decode_modify(message: object) -> ModifySettingRequest:
    """The envelope and what is in it.

    Raises:
        InvalidInput: as :func:`decode`.
    """
    fields = _object(message, "ModifySettingRequest")
    inner = fields.get("GuestRequest")
    path = fields.get("ResourcePath") or ""
    if not isinstance(path, str):
        raise _bad("ModifySettingRequest", f"ResourcePath: expected text, got {type(path).__name__}")
    return ModifySettingRequest(_request_type(fields), None if inner is None else decode(inner), path)


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
