"""The host's half of the utility-VM protocol: what devices a machine has, and by which paths one is changed.

The rules of the wire are those of :mod:`holdfast.spec.guest_requests`, which is the guest's half: zeroes are left
out and put back, keys that are not known are passed over.
"""

from __future__ import annotations

import enum
import re
import uuid
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from holdfast.errors import InvalidInput, Unsupported

Controller = Annotated[int, Meta(ge=0, le=3)]
Lun = Annotated[int, Meta(ge=0, le=63)]
#: Bytes, ports, partitions: what fits the signed 64 bits that every reader has.
Unsigned = Annotated[int, Meta(ge=0, le=2**63 - 1)]
PmemDevice = Annotated[int, Meta(ge=0, le=127)]
#: Mappings begin and end where pages do.
PageAligned = Annotated[int, Meta(ge=0, le=2**63 - 1, multiple_of=4096)]

AttachmentType = Literal["", "VirtualDisk", "PassThru", "ExtensibleVirtualDisk", "Iso"]
ImageFormat = Literal["", "Vhd1", "Vhdx"]

CONTROLLERS = 4
LUNS = 64
PLAN9_PORT = 564
#: The container id of requests that are to the machine itself.
MACHINE_ID = "00000000-0000-0000-0000-000000000000"
_CONTROLLER_NAMESPACE = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"


class Shape(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """Base of all objects on this wire."""


class Attachment(Shape, frozen=True):
    """A disk in a slot; ``path`` is the host's."""

    type: AttachmentType = ""
    path: str = ""
    ignore_flushes: bool = False
    caching_mode: str = ""
    no_write_hardening: bool = False
    disable_expansion_optimization: bool = False
    ignore_relative_locator: bool = False
    capture_io_attribution_context: bool = False
    read_only: bool = False
    support_compressed_volumes: bool = False
    always_allow_sparse_files: bool = False
    extensible_virtual_disk_type: str = ""


class Scsi(Shape, frozen=True):
    """A controller: its disks by LUN."""

    attachments: dict[Lun, Attachment] = {}


class VirtualPMemMapping(Shape, frozen=True):
    """A read-only layer that shares its device with others."""

    host_path: str = ""
    image_format: ImageFormat = ""


class VirtualPMemDevice(Shape, frozen=True):
    """One layer, or with ``mappings``, by offset in bytes, several."""

    host_path: str = ""
    read_only: bool = False
    image_format: ImageFormat = ""
    mappings: dict[PageAligned, VirtualPMemMapping] = {}


class VirtualPMemController(Shape, frozen=True):
    devices: dict[PmemDevice, VirtualPMemDevice] = {}
    maximum_count: Annotated[int, Meta(ge=0, le=128)] = 0
    maximum_size_bytes: PageAligned = 0
    backing: str = ""


class Plan9Flag(enum.IntFlag):
    """Bits of :attr:`Plan9Share.flags`."""

    READ_ONLY = 0x1
    LINUX_METADATA = 0x4
    CASE_SENSITIVE = 0x8
    USE_SHARE_ROOT_IDENTITY = 0x10
    RESTRICT_FILE_ACCESS = 0x80
    UNLIMITED_CONNECTIONS = 0x100


class Plan9Share(Shape, frozen=True):
    name: str = ""
    access_name: str = ""
    path: str = ""
    port: Unsigned = 0
    flags: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    allowed_files: tuple[str, ...] = ()


class Plan9(Shape, frozen=True):
    shares: tuple[Plan9Share, ...] = ()


class VirtualSmbShareOptions(Shape, frozen=True):
    read_only: bool = False
    share_read: bool = False
    cache_io: bool = False
    no_oplocks: bool = False
    take_backup_privilege: bool = False
    use_share_root_identity: bool = False
    no_directmap: bool = False
    no_locks: bool = False
    no_dirnotify: bool = False
    vm_shared_memory: bool = False
    restrict_file_access: bool = False
    force_level_ii_oplocks: bool = field(default=False, name="ForceLevelIIOplocks")
    reparse_base_layer: bool = False
    pseudo_oplocks: bool = False
    non_cache_io: bool = False
    pseudo_dirnotify: bool = False
    single_file_mapping: bool = False


class VirtualSmbShare(Shape, frozen=True):
    name: str = ""
    path: str = ""
    allowed_files: tuple[str, ...] = ()
    options: VirtualSmbShareOptions | None = None


class VirtualSmb(Shape, frozen=True):
    shares: tuple[VirtualSmbShare, ...] = ()


class VirtualPciFunction(Shape, frozen=True):
    device_instance_path: str = ""
    virtual_function: Annotated[int, Meta(ge=0, le=2**16 - 1)] = 0


class VirtualPciDevice(Shape, frozen=True):
    functions: tuple[VirtualPciFunction, ...] = ()
    propagate_numa_affinity: bool = False


class StorageQoS(Shape, frozen=True):
    """What a machine's disks may do together; 0 is without limit."""

    iops_maximum: Unsigned = 0
    bandwidth_maximum: Unsigned = 0


class MappedDirectory(Shape, frozen=True):
    """A directory of the host at a path of a Windows guest."""

    host_path: str = ""
    container_path: str = ""
    read_only: bool = False


class Devices(Shape, frozen=True):
    """All of a machine's.  ``scsi`` is by controller: its GUID, or in older documents its number."""

    scsi: dict[str, Scsi] = {}
    virtual_p_mem: VirtualPMemController | None = None
    plan9: Plan9 | None = None
    virtual_smb: VirtualSmb | None = None
    virtual_pci: dict[str, VirtualPciDevice] = {}


class VirtualMachine(Shape, frozen=True):
    devices: Devices | None = None
    storage_qos: StorageQoS | None = field(default=None, name="StorageQoS")


class ComputeSystem(Shape, frozen=True):
    """A whole document."""

    virtual_machine: VirtualMachine | None = None


#: What ``Settings`` of a change may be; a plain number is the machine's memory.
HostSettings = (
    Attachment | VirtualPMemDevice | VirtualPMemMapping | Plan9Share | VirtualSmbShare | VirtualPciDevice
    | MappedDirectory | int
)  # fmt: skip

MEMORY_PATH = "VirtualMachine/ComputeTopology/Memory/SizeInMB"
PROCESSOR_LIMITS_PATH = "VirtualMachine/ComputeTopology/Processor/Limits"
PLAN9_SHARES_PATH = "VirtualMachine/Devices/Plan9/Shares"
VSMB_SHARES_PATH = "VirtualMachine/Devices/VirtualSmb/Shares"
CONTAINER_DIRECTORIES_PATH = "Container/MappedDirectories"
CONTAINER_PIPES_PATH = "Container/MappedPipes"

_SCSI_PATH = r"VirtualMachine/Devices/Scsi/([^/]+)/Attachments/([0-9]{1,2})"
#: Resource path -> the shape of its ``Settings``; nothing for what is known and has no shape here.
_SETTINGS: tuple[tuple[str, type[HostSettings] | None], ...] = (
    (_SCSI_PATH, Attachment),
    (r"VirtualMachine/Devices/VirtualPMem/Devices/[0-9]+", VirtualPMemDevice),
    (r"VirtualMachine/Devices/VirtualPMem/Devices/[0-9]+/Mappings/[0-9]+", VirtualPMemMapping),
    (PLAN9_SHARES_PATH, Plan9Share),
    (VSMB_SHARES_PATH, VirtualSmbShare),
    (r"VirtualMachine/Devices/VirtualPci/[^/]+", VirtualPciDevice),
    (CONTAINER_DIRECTORIES_PATH, MappedDirectory),
    (MEMORY_PATH, int),
    (PROCESSOR_LIMITS_PATH, None),
    (CONTAINER_PIPES_PATH, None),
    (r"VirtualMachine/Devices/(MappedPipes|NetworkAdapters|HvSocket/HvSocketConfig/ServiceTable)/.+", None),
)


def scsi_resource_path(controller: int | str, lun: int) -> str:
    """The host's name of a slot.  Its controller is a number, or a GUID: see :func:`controller_guid`."""
    return f"VirtualMachine/Devices/Scsi/{controller}/Attachments/{lun}"


def pmem_resource_path(device: int) -> str:
    return f"VirtualMachine/Devices/VirtualPMem/Devices/{device}"


def pmem_mapping_resource_path(device: int, offset_bytes: int) -> str:
    return f"{pmem_resource_path(device)}/Mappings/{offset_bytes}"


def pci_resource_path(bus_guid: str) -> str:
    return f"VirtualMachine/Devices/VirtualPci/{bus_guid}"


def pipe_resource_path(name: str) -> str:
    return f"VirtualMachine/Devices/MappedPipes/{name}"


def network_resource_path(adapter: str) -> str:
    return f"VirtualMachine/Devices/NetworkAdapters/{adapter}"


def socket_resource_path(service: str) -> str:
    return f"VirtualMachine/Devices/HvSocket/HvSocketConfig/ServiceTable/{service}"


@lru_cache(maxsize=CONTROLLERS)
def controller_guid(index: int) -> str:
    """The name by which host and guest mean the same controller (their numbers of it differ).

    Raises:
        InvalidInput: ``scsi-controller``; there is none of this number.
    """
    if not 0 <= index < CONTROLLERS:
        raise _no_controller(index)
    return str(uuid.uuid5(uuid.UUID(_CONTROLLER_NAMESPACE), str(index)))


def controller_index(name: str) -> int:
    """The number of the controller that ``name``, a decimal number or a GUID, is the key of.

    Raises:
        InvalidInput: ``scsi-controller``; there is no such controller.
    """
    for index in range(CONTROLLERS):
        if name == str(index) or name.lower() == controller_guid(index):
            return index
    raise _no_controller(name)


def slot_of(resource_path: str) -> tuple[int, int]:
    """Controller and LUN of a path that :func:`scsi_resource_path` made.

    Raises:
        InvalidInput: ``resource-path``, it is not a slot's; ``scsi-controller``.
    """
    match = re.fullmatch(_SCSI_PATH, resource_path)
    if match is None or int(match[2]) >= LUNS:
        raise InvalidInput("read resource path", subject=resource_path, why="names no SCSI slot", code="resource-path")
    return controller_index(match[1]), int(match[2])


def plan9_share(number: int, path: str, *, read_only: bool = False, allowed_files: tuple[str, ...] = ()) -> Plan9Share:
    """The share of a machine's ``number``; with ``allowed_files``, nothing else of the directory is served."""
    flags = Plan9Flag.LINUX_METADATA
    if read_only:
        flags |= Plan9Flag.READ_ONLY
    if allowed_files:
        flags |= Plan9Flag.RESTRICT_FILE_ACCESS
    return Plan9Share(str(number), str(number), path, PLAN9_PORT, int(flags), allowed_files)


T = TypeVar("T")


def encode_document(document: Shape | int) -> Any:
    """A document, or part of one, as JSON has it."""
    return msgspec.to_builtins(document, str_keys=True)


def decode_document(value: object, kind: type[T]) -> T:
    """The document of this ``kind`` that :func:`encode_document` wrote, or another implementation.

    Raises:
        InvalidInput: ``host-document``, with the place in it.
    """
    return convert(value, kind, what="read host document", subject=kind.__name__, code="host-document")


def decode_settings(value: object, resource_path: str) -> HostSettings:
    """The ``Settings`` of a change of what is at ``resource_path``.

    Raises:
        InvalidInput: ``host-document`` for wrong settings; ``resource-path`` for a path that is not known.
        Unsupported: ``resource-path``; known, but not what is there.
    """
    matching = [kind for pattern, kind in _SETTINGS if re.fullmatch(pattern, resource_path)]
    if not matching:
        why = "unknown resource path"
        raise InvalidInput("read host settings", subject=resource_path or "(none)", why=why, code="resource-path")
    kind = matching[0]
    if kind is None:
        why = "only storage and memory are changed here"
        raise Unsupported("read host settings", subject=resource_path, why=why, code="resource-path")
    target: Any = Unsigned if kind is int else kind
    settings: HostSettings = convert(
        value, target, what="read host settings", subject=resource_path, place="Settings", code="host-document"
    )
    return settings


def convert(value: object, kind: type[T], *, what: str, subject: str, code: str, place: str = "") -> T:
    """``value`` as a ``kind``.  ``place`` is where in the message it was found.

    Raises:
        InvalidInput: with ``code``; it is not of that shape, and why says where not.
    """
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        where = where.replace("`", "").replace("$" if place else "$.", place, 1) or place
        why = f"{where}: " if where else ""
        why += problem[:1].lower() + problem[1:]
        raise InvalidInput(what, subject=subject, why=why, code=code) from None


def _no_controller(name: object) -> InvalidInput:
    why = f"there are {CONTROLLERS}, 0 to {CONTROLLERS - 1}"
    return InvalidInput("find SCSI controller", subject=name, why=why, code="scsi-controller")
