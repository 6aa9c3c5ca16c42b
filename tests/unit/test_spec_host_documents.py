"""Host documents: exact names and paths, zeroes left out and put back, strangers passed over or refused."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput, Unsupported
from holdfast.spec import host_documents as host
from holdfast.spec.host_documents import (
    Attachment,
    ComputeSystem,
    Devices,
    MappedDirectory,
    Plan9,
    Plan9Flag,
    Plan9Share,
    Scsi,
    StorageQoS,
    VirtualMachine,
    VirtualPciDevice,
    VirtualPciFunction,
    VirtualPMemController,
    VirtualPMemDevice,
    VirtualPMemMapping,
    VirtualSmb,
    VirtualSmbShare,
    VirtualSmbShareOptions,
    controller_guid,
    controller_index,
    decode_document,
    decode_settings,
    encode_document,
    plan9_share,
    scsi_resource_path,
    slot_of,
)

GUIDS = (
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
)
SMB_OPTIONS = (
    "ReadOnly", "ShareRead", "CacheIo", "NoOplocks", "TakeBackupPrivilege", "UseShareRootIdentity", "NoDirectmap",
    "NoLocks", "NoDirnotify", "VmSharedMemory", "RestrictFileAccess", "ForceLevelIIOplocks", "ReparseBaseLayer",
    "PseudoOplocks", "NonCacheIo", "PseudoDirnotify", "SingleFileMapping",
)  # fmt: skip

SHAPES = [
    (
        Attachment("VirtualDisk", "/d", True, "Cached", True, True, True, True, True, True, True, "x"),
        {
            "Type": "VirtualDisk", "Path": "/d", "IgnoreFlushes": True, "CachingMode": "Cached",
            "NoWriteHardening": True, "DisableExpansionOptimization": True, "IgnoreRelativeLocator": True,
            "CaptureIoAttributionContext": True, "ReadOnly": True, "SupportCompressedVolumes": True,
            "AlwaysAllowSparseFiles": True, "ExtensibleVirtualDiskType": "x",
        },
    ),
    (Attachment("PassThru", "/dev/sdb"), {"Type": "PassThru", "Path": "/dev/sdb"}),
    (
        Scsi({0: Attachment(path="/a"), 63: Attachment()}),
        {"Attachments": {"0": {"Path": "/a"}, "63": {}}},
    ),
    (
        VirtualPMemController({0: VirtualPMemDevice("/l", True, "Vhd1")}, 64, 2**32, "Virtual"),
        {
            "Devices": {"0": {"HostPath": "/l", "ReadOnly": True, "ImageFormat": "Vhd1"}},
            "MaximumCount": 64, "MaximumSizeBytes": 4294967296, "Backing": "Virtual",
        },
    ),
    (
        VirtualPMemDevice(mappings={0: VirtualPMemMapping("/a", "Vhdx"), 8192: VirtualPMemMapping("/b")}),
        {"Mappings": {"0": {"HostPath": "/a", "ImageFormat": "Vhdx"}, "8192": {"HostPath": "/b"}}},
    ),
    (VirtualPMemMapping("/a", "Vhd1"), {"HostPath": "/a", "ImageFormat": "Vhd1"}),
    (
        Plan9((Plan9Share("0", "0", "/d", 564, 0x85, ("f",)),)),
        {
            "Shares": [
                {"Name": "0", "AccessName": "0", "Path": "/d", "Port": 564, "Flags": 133, "AllowedFiles": ["f"]}
            ]
        },
    ),
    (
        VirtualSmbShare("s0", "C:\\d", ("f",), VirtualSmbShareOptions(*[True] * 17)),
        {"Name": "s0", "Path": "C:\\d", "AllowedFiles": ["f"], "Options": dict.fromkeys(SMB_OPTIONS, True)},
    ),
    (VirtualSmb((VirtualSmbShare("s0"),)), {"Shares": [{"Name": "s0"}]}),
    (VirtualSmbShare(options=VirtualSmbShareOptions()), {"Options": {}}),
    (
        VirtualPciDevice((VirtualPciFunction("PCIP\\1", 2), VirtualPciFunction("PCIP\\2")), True),
        {
            "Functions": [{"DeviceInstancePath": "PCIP\\1", "VirtualFunction": 2}, {"DeviceInstancePath": "PCIP\\2"}],
            "PropagateNumaAffinity": True,
        },
    ),
    (StorageQoS(5000, 10**9), {"IopsMaximum": 5000, "BandwidthMaximum": 1000000000}),
    (MappedDirectory("/h", "c:\\d", True), {"HostPath": "/h", "ContainerPath": "c:\\d", "ReadOnly": True}),
    (
        ComputeSystem(
            VirtualMachine(
                Devices(
                    {GUIDS[0]: Scsi({1: Attachment(path="/a")}), "1": Scsi()},
                    VirtualPMemController(),
                    Plan9(),
                    VirtualSmb(),
                    {"g": VirtualPciDevice()},
                ),
                StorageQoS(1),
            )
        ),
        {
            "VirtualMachine": {
                "Devices": {
                    "Scsi": {GUIDS[0]: {"Attachments": {"1": {"Path": "/a"}}}, "1": {}},
                    "VirtualPMem": {},
                    "Plan9": {},
                    "VirtualSmb": {},
                    "VirtualPci": {"g": {}},
                },
                "StorageQoS": {"IopsMaximum": 1},
            }
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("document", "wire"), SHAPES)
def test_wire(document: Any, wire: dict[str, Any]) -> None:
    assert json.loads(json.dumps(encode_document(document))) == wire
    assert decode_document(wire, type(document)) == document


KINDS = sorted(
    (kind for kind in vars(host).values() if isinstance(kind, type) and issubclass(kind, host.Shape)),
    key=lambda kind: kind.__name__,
)
KINDS.remove(host.Shape)


@pytest.mark.parametrize("kind", KINDS)
def test_zeroes_are_absent_and_strangers_passed_over(kind: type[Any]) -> None:
    assert encode_document(kind()) == {}
    document = decode_document({"Newer": {"x": 1}}, kind)
    assert document == kind()
    for item in msgspec.structs.fields(kind):
        assert getattr(document, item.name) in (0, "", (), {}, None), item.name


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        ([], Attachment, "expected `object`, got `array`"),
        ({"Type": "Tape"}, Attachment, "Type: invalid enum value 'Tape'"),
        ({"ReadOnly": 1}, Attachment, "ReadOnly: expected `bool`, got `int`"),
        ({"Attachments": {"64": {}}}, Scsi, "key in Attachments: expected `int` <= 63"),
        ({"Attachments": {"-1": {}}}, Scsi, "key in Attachments: expected `int` >= 0"),
        ({"Attachments": {"x": {}}}, Scsi, "key in Attachments: expected `int`, got `str`"),
        ({"Attachments": {"1": {"Path": 2}}}, Scsi, "Attachments[...].Path: expected `str`, got `int`"),
        ({"MaximumCount": 129}, VirtualPMemController, "MaximumCount: expected `int` <= 128"),
        ({"Devices": {"128": {}}}, VirtualPMemController, "key in Devices: expected `int` <= 127"),
        ({"MaximumSizeBytes": 95}, VirtualPMemController, "MaximumSizeBytes: expected `int` that's a multiple of 4096"),
        ({"Mappings": {"512": {}}}, VirtualPMemDevice, "key in Mappings: expected `int` that's a multiple of 4096"),
        ({"ImageFormat": "Iso"}, VirtualPMemMapping, "ImageFormat: invalid enum value 'Iso'"),
        ({"Flags": 2**32}, Plan9Share, "Flags: expected `int` <= 4294967295"),
        ({"IopsMaximum": 2**80}, StorageQoS, "IopsMaximum: expected `int` <= 9223372036854775807"),
        ({"VirtualFunction": 65536}, VirtualPciFunction, "VirtualFunction: expected `int` <= 65535"),
        ({"Functions": [{}, 1]}, VirtualPciDevice, "Functions[1]: expected `object`, got `int`"),
    ],
)  # fmt: skip
def test_bad_documents(value: object, kind: type[Any], why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_document(value, kind)
    assert (caught.value.code, caught.value.subject, caught.value.why) == ("host-document", kind.__name__, why)


def test_controllers_have_the_names_of_the_protocol() -> None:
    """#1328 of the reference: the guest's number of a controller is not the host's, so it goes by GUID."""
    assert tuple(map(controller_guid, range(4))) == GUIDS
    for index, guid in enumerate(GUIDS):
        assert controller_index(guid) == controller_index(guid.upper()) == controller_index(str(index)) == index


@pytest.mark.parametrize("name", ["4", "-1", "", "00", GUIDS[0][:-1]])
def test_no_such_controller(name: str) -> None:
    with pytest.raises(InvalidInput, match="there are 4, 0 to 3") as caught:
        controller_index(name)
    assert (caught.value.code, caught.value.subject) == ("scsi-controller", name)
    for index in (-1, 4):
        with pytest.raises(InvalidInput) as caught:
            controller_guid(index)
        assert (caught.value.code, caught.value.subject) == ("scsi-controller", str(index))


# In full, as the reference has them.
PATHS = {
    "VirtualMachine/Devices/Scsi/0/Attachments/5": Attachment,
    "VirtualMachine/Devices/Scsi/0110f83b-de10-5172-a266-78bca56bf50a/Attachments/5": Attachment,
    "VirtualMachine/Devices/VirtualPMem/Devices/3": VirtualPMemDevice,
    "VirtualMachine/Devices/VirtualPMem/Devices/3/Mappings/4096": VirtualPMemMapping,
    "VirtualMachine/Devices/Plan9/Shares": Plan9Share,
    "VirtualMachine/Devices/VirtualSmb/Shares": VirtualSmbShare,
    "VirtualMachine/Devices/VirtualPci/g": VirtualPciDevice,
    "VirtualMachine/Devices/MappedPipes/p": None,
    "VirtualMachine/Devices/NetworkAdapters/n": None,
    "VirtualMachine/Devices/HvSocket/HvSocketConfig/ServiceTable/s": None,
    "VirtualMachine/ComputeTopology/Memory/SizeInMB": int,
    "VirtualMachine/ComputeTopology/Processor/Limits": None,
    "Container/MappedDirectories": MappedDirectory,
    "Container/MappedPipes": None,
}


def test_resource_paths() -> None:
    assert list(PATHS) == [
        scsi_resource_path(0, 5),
        scsi_resource_path(controller_guid(1), 5),
        host.pmem_resource_path(3),
        host.pmem_mapping_resource_path(3, 4096),
        host.PLAN9_SHARES_PATH,
        host.VSMB_SHARES_PATH,
        host.pci_resource_path("g"),
        host.pipe_resource_path("p"),
        host.network_resource_path("n"),
        host.socket_resource_path("s"),
        host.MEMORY_PATH,
        host.PROCESSOR_LIMITS_PATH,
        host.CONTAINER_DIRECTORIES_PATH,
        host.CONTAINER_PIPES_PATH,
    ]


@pytest.mark.parametrize(("path", "kind"), PATHS.items())
def test_settings_are_of_the_shape_of_their_path(path: str, kind: type[Any] | None) -> None:
    if kind is int:
        assert decode_settings(2048, path) == 2048
        wrong: tuple[object, ...] = (-1, True, "1", {})
        for bad in wrong:
            with pytest.raises(InvalidInput, match=r"Settings: expected `int`"):
                decode_settings(bad, path)
    elif kind:
        assert decode_settings({"Newer": 1}, path) == kind()
        with pytest.raises(InvalidInput) as caught:
            decode_settings([], path)
        assert (caught.value.code, caught.value.subject) == ("host-document", path)
        assert caught.value.why == "Settings: expected `object`, got `array`"
    else:
        with pytest.raises(Unsupported) as refused:
            decode_settings({}, path)
        assert (refused.value.code, refused.value.subject) == ("resource-path", path)


@pytest.mark.parametrize("path", ["", "VirtualMachine", "Container/MappedPipes/x", "VirtualMachine/Devices/Plan9"])
def test_unknown_paths(path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_settings({}, path)
    assert (caught.value.code, caught.value.subject) == ("resource-path", path or "(none)")


def test_settings_say_where_they_are_wrong() -> None:
    with pytest.raises(InvalidInput, match=r"Settings\.Path: expected `str`, got `int`"):
        decode_settings({"Path": 1}, scsi_resource_path(0, 0))


@given(st.integers(0, 3), st.integers(0, 63))
def test_slots_of_paths(controller: int, lun: int) -> None:
    for name in (controller, controller_guid(controller)):
        assert slot_of(scsi_resource_path(name, lun)) == (controller, lun)


@pytest.mark.parametrize(
    "path", ["", scsi_resource_path(0, 64), scsi_resource_path(0, 100), "x" + scsi_resource_path(0, 0)]
)
def test_paths_of_no_slot(path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        slot_of(path)
    assert caught.value.code == "resource-path"
    with pytest.raises(InvalidInput) as caught:
        slot_of(scsi_resource_path(4, 0))
    assert caught.value.code == "scsi-controller"


def test_plan9_flags() -> None:
    assert [(flag.name, flag.value) for flag in Plan9Flag] == [
        ("READ_ONLY", 1), ("LINUX_METADATA", 4), ("CASE_SENSITIVE", 8), ("USE_SHARE_ROOT_IDENTITY", 0x10),
        ("RESTRICT_FILE_ACCESS", 0x80), ("UNLIMITED_CONNECTIONS", 0x100),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("read_only", "files", "flags"), [(False, (), 0x4), (True, (), 0x5), (False, ("f",), 0x84), (True, ("f",), 0x85)]
)
def test_plan9_share(read_only: bool, files: tuple[str, ...], flags: int) -> None:
    share = plan9_share(7, "/d", read_only=read_only, allowed_files=files)
    assert share == Plan9Share("7", "7", "/d", 564, flags, files)
    assert type(share.flags) is int
    assert encode_document(share)["Flags"] == flags


def test_requests_to_the_machine_itself() -> None:
    assert host.MACHINE_ID == "00000000-0000-0000-0000-000000000000"


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        (meta,) = arguments[1:]
        step = meta.multiple_of or 1
        return st.integers(meta.ge // step, meta.le // step).map(lambda number: number * step)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values_of, arguments))
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return shapes(annotation)
    return {str: st.text(max_size=8), bool: st.booleans(), type(None): st.none()}[annotation]


def shapes(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: values_of(hints[name]) for name in kind.__struct_fields__})


@given(st.one_of(*map(shapes, KINDS)))
def test_round_trip(document: Any) -> None:
    assert decode_document(json.loads(json.dumps(encode_document(document))), type(document)) == document
