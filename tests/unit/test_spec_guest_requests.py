"""Guest requests: exact names on the wire, zeroes left out and put back, strangers passed over or refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput, Unsupported
from holdfast.spec import guest_requests
from holdfast.spec.guest_requests import (
    RESOURCE_TYPES,
    RESOURCES,
    WINDOWS_RESOURCES,
    ConfidentialOptions,
    CWCOWCombinedLayers,
    DeviceVerityInfo,
    GuestRequest,
    ImageVolume,
    Layer,
    LCOWCombinedLayers,
    LCOWMappedDirectory,
    LCOWMappedVirtualDisk,
    LCOWMappedVPCIDevice,
    LCOWMappedVPMemDevice,
    LCOWVPMemMappingInfo,
    ModifySettingRequest,
    OverlaidMount,
    PodVolume,
    SCSIDevice,
    SecurityPolicyFragment,
    WCOWCombinedLayers,
    WCOWMappedDirectory,
    WCOWMappedVirtualDisk,
    WCOWMappedVirtualDiskForContainerScratch,
    decode,
    decode_modify,
    eject,
    encode,
    mapped_disk,
    resources_of,
    scsi_resource_path,
)
from holdfast.spec.host_documents import Attachment, Plan9Share, VirtualPMemMapping, controller_guid
from tests.unit.test_spec_host_documents import shapes

VERITY = DeviceVerityInfo(4096, 1, "sha256", True, "ab", "00", 512)
VERITY_WIRE = {
    "Ext4SizeInBytes": 4096, "Version": 1, "Algorithm": "sha256", "SuperBlock": True, "RootDigest": "ab",
    "Salt": "00", "BlockSize": 512,
}  # fmt: skip

LINUX: list[tuple[Any, str, dict[str, Any]]] = [
    (
        LCOWMappedVirtualDisk(
            mount_path="/run/mounts/scsi/m0", lun=3, controller=1, partition=2, read_only=True, encrypted=True,
            options=("ro",), block_dev=True, ensure_filesystem=True, filesystem="ext4", verity_info=VERITY,
        ),
        "MappedVirtualDisk",
        {
            "MountPath": "/run/mounts/scsi/m0", "Lun": 3, "Controller": 1, "Partition": 2, "ReadOnly": True,
            "Encrypted": True, "Options": ["ro"], "BlockDev": True, "EnsureFilesystem": True, "Filesystem": "ext4",
            "VerityInfo": VERITY_WIRE,
        },
    ),
    (LCOWMappedVirtualDisk(mount_path="/m"), "MappedVirtualDisk", {"MountPath": "/m"}),
    (SCSIDevice(), "SCSIDevice", {}),
    (SCSIDevice(controller=3, lun=63), "SCSIDevice", {"Controller": 3, "Lun": 63}),
    (
        LCOWMappedDirectory(mount_path="/m", port=1, share_name="2", read_only=True, no_suid=True, last=True),
        "MappedDirectory",
        {"MountPath": "/m", "Port": 1, "ShareName": "2", "ReadOnly": True, "NoSuid": True, "Last": True},
    ),
    (
        LCOWCombinedLayers("c", "/r", (Layer(path="/top"), Layer("x", "/base", "AbsolutePath", "Enabled")), "/s"),
        "CombinedLayers",
        {
            "ContainerID": "c", "ContainerRootPath": "/r", "ScratchPath": "/s",
            "Layers": [{"Path": "/top"}, {"Id": "x", "Path": "/base", "PathType": "AbsolutePath", "Cache": "Enabled"}],
        },
    ),
    (
        LCOWMappedVPMemDevice(2, "/run/layers/p2-4096-8192", LCOWVPMemMappingInfo(4096, 8192), VERITY),
        "VPMemDevice",
        {
            "DeviceNumber": 2, "MountPath": "/run/layers/p2-4096-8192",
            "MappingInfo": {"DeviceOffsetInBytes": 4096, "DeviceSizeInBytes": 8192}, "VerityInfo": VERITY_WIRE,
        },
    ),
    (LCOWMappedVPMemDevice(mount_path="/run/layers/p0"), "VPMemDevice", {"MountPath": "/run/layers/p0"}),
    (LCOWMappedVPMemDevice(mapping_info=LCOWVPMemMappingInfo()), "VPMemDevice", {"MappingInfo": {}}),
    (LCOWMappedVPCIDevice("df6d"), "VPCIDevice", {"VMBusGUID": "df6d"}),
]  # fmt: skip

BOTH: list[tuple[Any, str, dict[str, Any]]] = [
    (
        ConfidentialOptions("rego", "cA==", "cg==", "aA=="),
        "SecurityPolicy",
        {
            "EnforcerType": "rego", "EncodedSecurityPolicy": "cA==", "EncodedUVMReference": "cg==",
            "EncodedUVMHashEnvelopeReference": "aA==",
        },
    ),
    (SecurityPolicyFragment("Zg=="), "SecurityPolicyFragment", {"Fragment": "Zg=="}),
    (SecurityPolicyFragment("Zg==", "t"), "SecurityPolicyFragment", {"Fragment": "Zg==", "MediaType": "t"}),
]  # fmt: skip

WINDOWS: list[tuple[Any, str, dict[str, Any]]] = [
    (
        WCOWMappedVirtualDisk("c:\\mounts\\scsi\\m1", 1),
        "MappedVirtualDisk",
        {"ContainerPath": "c:\\mounts\\scsi\\m1", "Lun": 1},
    ),
    (WCOWMappedVirtualDisk("c:\\m"), "MappedVirtualDisk", {"ContainerPath": "c:\\m"}),
    (
        WCOWMappedVirtualDiskForContainerScratch("c:\\m", 2),
        "MappedVirtualDiskForContainerScratch",
        {"ContainerPath": "c:\\m", "Lun": 2},
    ),
    (
        WCOWMappedDirectory("\\\\?\\VMSMB\\s0", "c:\\d", True),
        "MappedDirectory",
        {"HostPath": "\\\\?\\VMSMB\\s0", "ContainerPath": "c:\\d", "ReadOnly": True},
    ),
    (
        WCOWCombinedLayers("c:\\r", (Layer("x", "c:\\base"),), "c:\\s", "WCIFS"),
        "CombinedLayers",
        {"ContainerRootPath": "c:\\r", "Layers": [{"Id": "x", "Path": "c:\\base"}], "ScratchPath": "c:\\s"},
    ),
    (
        WCOWCombinedLayers("c:\\r", filter_type="UnionFS"),
        "CombinedLayers",
        {"ContainerRootPath": "c:\\r", "FilterType": "UnionFS"},
    ),
    (
        CWCOWCombinedLayers("c", WCOWCombinedLayers("c:\\r")),
        "CWCOWCombinedLayers",
        {"ContainerID": "c", "CombinedLayers": {"ContainerRootPath": "c:\\r"}},
    ),
]


def both_ways(guest_os: str, settings: Any, resource: str, wire: dict[str, Any]) -> None:
    request = GuestRequest("Add", settings)
    message = json.loads(json.dumps(encode(request)))
    assert message == {"ResourceType": resource, "RequestType": "Add", "Settings": wire}
    back = decode(message, guest_os)
    assert back == request
    assert type(back.settings) is type(settings)


@pytest.mark.parametrize(("settings", "resource", "wire"), LINUX + BOTH)
def test_wire(settings: Any, resource: str, wire: dict[str, Any]) -> None:
    both_ways("linux", settings, resource, wire)
    assert decode(encode(GuestRequest("Add", settings))).settings == settings, "Linux is the default"


@pytest.mark.parametrize(("settings", "resource", "wire"), WINDOWS + BOTH)
def test_wire_of_windows(settings: Any, resource: str, wire: dict[str, Any]) -> None:
    both_ways("windows", settings, resource, wire)


OURS: list[tuple[Any, str, dict[str, Any]]] = [
    (
        PodVolume("/run/mounts/volumes/m0", "cache", "tmpfs", ("size=1m",), "a/b"),
        "PodVolume",
        {
            "MountPath": "/run/mounts/volumes/m0",
            "Name": "cache",
            "Type": "tmpfs",
            "Options": ["size=1m"],
            "SubPath": "a/b",
        },
    ),
    (
        ImageVolume("/run/mounts/volumes/m1", "/run/mounts/scsi/m2/volumes/m1", "/run/gcs/c/c/rootfs", "/data"),
        "ImageVolume",
        {
            "MountPath": "/run/mounts/volumes/m1",
            "Source": "/run/mounts/scsi/m2/volumes/m1",
            "ContainerRootPath": "/run/gcs/c/c/rootfs",
            "Path": "/data",
        },
    ),
    (
        OverlaidMount("/run/mounts/volumes/m2", "/run/mounts/shares/m3", "/run/mounts/scsi/m2/overlays/m2"),
        "OverlaidMount",
        {
            "MountPath": "/run/mounts/volumes/m2",
            "Source": "/run/mounts/shares/m3",
            "ScratchPath": "/run/mounts/scsi/m2/overlays/m2",
        },
    ),
]


@pytest.mark.parametrize(("settings", "resource", "wire"), OURS)
def test_shapes_of_our_own(settings: Any, resource: str, wire: dict[str, Any]) -> None:
    both_ways("linux", settings, resource, wire)


def test_every_shape_is_on_the_wire_above() -> None:
    assert {type(row[0]) for row in LINUX + BOTH + OURS} == set(RESOURCES.values())
    assert {type(row[0]) for row in WINDOWS + BOTH} == set(WINDOWS_RESOURCES.values())
    assert set(RESOURCES) | set(WINDOWS_RESOURCES) <= set(RESOURCE_TYPES)


def test_envelope() -> None:
    inner = GuestRequest("Remove", SCSIDevice(lun=1))
    request = ModifySettingRequest("Remove", inner, scsi_resource_path(0, 1))
    message = encode(request)
    assert message["ResourcePath"] == "VirtualMachine/Devices/Scsi/0/Attachments/1"
    assert message["GuestRequest"] == encode(inner)
    assert decode_modify(message) == request
    assert decode_modify({}) == ModifySettingRequest("Add")


@pytest.mark.parametrize(
    ("path", "settings", "wire"),
    [
        (
            scsi_resource_path(controller_guid(1), 2),
            Attachment("VirtualDisk", "C:\\d.vhdx", read_only=True),
            {"Type": "VirtualDisk", "Path": "C:\\d.vhdx", "ReadOnly": True},
        ),
        (
            "VirtualMachine/Devices/Plan9/Shares",
            Plan9Share("0", "0", port=564),
            {"Name": "0", "AccessName": "0", "Port": 564},
        ),
        ("VirtualMachine/Devices/VirtualPMem/Devices/0/Mappings/4096", VirtualPMemMapping("/l"), {"HostPath": "/l"}),
        ("VirtualMachine/ComputeTopology/Memory/SizeInMB", 512, 512),
    ],
)  # fmt: skip
def test_envelope_with_the_hosts_half(path: str, settings: Any, wire: object) -> None:
    request = ModifySettingRequest("Add", GuestRequest("Add", WCOWMappedVirtualDisk("c:\\m", 2)), path, settings)
    message = json.loads(json.dumps(encode(request)))
    assert message["Settings"] == wire
    assert decode_modify(message, "windows") == request


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"ResourcePath": 1}, "ResourcePath: expected text, got int"),
        ({"GuestRequest": 1}, "expected an object, got int"),
        ({"Settings": {}}, "unknown resource path"),
        ({"RequestType": "Pre"}, "'Pre' is none of Add, Remove, PreAdd, Update"),
    ],
)
def test_bad_envelopes(message: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_modify(message)
    assert why in caught.value.why


@pytest.mark.parametrize("guest_os", ["linux", "windows"])
def test_absent_numbers_are_zero(guest_os: str) -> None:
    for name, kind in resources_of(guest_os).items():
        request = decode({"ResourceType": name}, guest_os)
        assert request == GuestRequest("Add", kind())
        for item in msgspec.structs.fields(kind):
            value = getattr(request.settings, item.name)
            assert value in (0, "", (), None, "WCIFS"), item.name


def test_strange_keys_and_absent_ones() -> None:
    message = {"ResourceType": "SCSIDevice", "New": 1, "Settings": {"Lun": 2, "Newer": {}}}
    assert decode(message) == GuestRequest("Add", SCSIDevice(0, 2))
    assert decode({"ResourceType": "SCSIDevice", "RequestType": ""}) == GuestRequest("Add", SCSIDevice())
    windows = {"ResourceType": "MappedVirtualDisk", "New": 1, "Settings": {"Lun": 2, "Newer": {}, "ReadOnly": True}}
    assert decode(windows, "windows") == GuestRequest("Add", WCOWMappedVirtualDisk(lun=2))


def test_the_same_message_means_what_its_guest_makes_of_it() -> None:
    message = {"ResourceType": "MappedVirtualDisk", "Settings": {"ContainerPath": "c:\\m", "MountPath": "/m", "Lun": 1}}
    assert decode(message).settings == LCOWMappedVirtualDisk("/m", 1)
    assert decode(message, "windows").settings == WCOWMappedVirtualDisk("c:\\m", 1)


@pytest.mark.parametrize("guest_os", ["linux", "windows"])
@pytest.mark.parametrize("name", RESOURCE_TYPES)
def test_every_resource_type(name: str, guest_os: str) -> None:
    """Read, or refused by its name; never taken for one that does not exist."""
    if name in resources_of(guest_os):
        assert decode({"ResourceType": name}, guest_os).resource_type == name
        return
    with pytest.raises(Unsupported) as caught:
        decode({"ResourceType": name}, guest_os)
    elsewhere = name in RESOURCES or name in WINDOWS_RESOURCES
    why = f"a {guest_os} guest does not have it" if elsewhere else "known, but not to be changed here"
    assert (caught.value.code, caught.value.subject) == ("resource-type", name)
    assert caught.value.why == why


def test_the_resource_types_are_those_of_the_protocol() -> None:
    """And after them our own."""
    assert RESOURCE_TYPES[-3:] == ("PodVolume", "ImageVolume", "OverlaidMount")
    assert RESOURCE_TYPES[:-3] == (
        "MappedDirectory", "SCSIDevice", "MappedVirtualDisk", "MappedVirtualDiskForContainerScratch", "WCOWBlockCims",
        "Network", "NetworkNamespace", "CombinedLayers", "CWCOWCombinedLayers", "VPMemDevice", "VPCIDevice",
        "ContainerConstraints", "HvSocket", "SecurityPolicy", "SecurityPolicyFragment", "PodCgroupMemoryLimit",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("message", "code", "subject", "why"),
    [
        ([], "guest-request", "GuestRequest", "expected an object, got list"),
        ({}, "resource-type", "(none)", "unknown resource type"),
        ({"ResourceType": ["x"]}, "resource-type", "['x']", "unknown resource type"),
        ({"ResourceType": "Floppy"}, "resource-type", "Floppy", "known are MappedVirtualDisk, SCSIDevice"),
        ({"ResourceType": "scsidevice"}, "resource-type", "scsidevice", "unknown resource type"),
        ({"ResourceType": "SCSIDevice", "RequestType": "add"}, "guest-request", "SCSIDevice", "'add' is none of Add"),
        ({"ResourceType": "SCSIDevice", "RequestType": {}}, "guest-request", "SCSIDevice", "RequestType"),
        ({"ResourceType": "SCSIDevice", "Settings": 1}, "guest-request", "Settings", "expected an object, got int"),
        (
            {"ResourceType": "SCSIDevice", "Settings": {"Lun": 64}},
            "guest-request",
            "SCSIDevice",
            "Settings.Lun: expected `int` <= 63",
        ),
        (
            {"ResourceType": "MappedVirtualDisk", "Settings": {"Controller": 4}},
            "guest-request",
            "MappedVirtualDisk",
            "Settings.Controller: expected `int` <= 3",
        ),
        (
            {"ResourceType": "CombinedLayers", "Settings": {"Layers": [{"Path": 1}]}},
            "guest-request",
            "CombinedLayers",
            "Settings.Layers[0].Path: expected `str`, got `int`",
        ),
        (
            {"ResourceType": "VPMemDevice", "Settings": {"MappingInfo": {"DeviceOffsetInBytes": 512}}},
            "guest-request",
            "VPMemDevice",
            "Settings.MappingInfo.DeviceOffsetInBytes: expected `int` that's a multiple of 4096",
        ),
    ],
)
def test_bad_messages(message: object, code: str, subject: str, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(message)
    assert (caught.value.code, caught.value.subject) == (code, subject)
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"Lun": 64}, "Settings.Lun: expected `int` <= 63"),
        ({"Controller": "0"}, "Settings.Controller: expected `int`, got `str`"),
        ({"ContainerPath": 3}, "Settings.ContainerPath: expected `str`, got `int`"),
    ],
)
def test_bad_disks_of_windows(settings: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode({"ResourceType": "MappedVirtualDisk", "Settings": settings}, "windows")
    assert caught.value.why == why
    with pytest.raises(InvalidInput, match=r"Floppy.*unknown resource type") as caught:
        decode({"ResourceType": "Floppy"}, "windows")
    assert caught.value.why.endswith(", ".join(WINDOWS_RESOURCES))


NOT_ON_WINDOWS = [
    ("Controller", {"controller": 1}, 1, "use controller 1, only 0"),
    ("Partition", {"partition": 2}, 2, "do Partition"),
    ("Encrypted", {"encrypted": True}, True, "do Encrypted"),
    ("Options", {"options": ("ro",)}, ["ro"], "do Options"),
    ("BlockDev", {"block_dev": True}, True, "do BlockDev"),
    ("EnsureFilesystem", {"ensure_filesystem": True}, True, "do EnsureFilesystem"),
    ("Filesystem", {"filesystem": "xfs"}, "xfs", "do Filesystem"),
    ("VerityInfo", {"verity_info": VERITY}, VERITY_WIRE, "do VerityInfo"),
]


@pytest.mark.parametrize(("key", "wanted", "value", "what"), NOT_ON_WINDOWS)
def test_what_windows_cannot_do_with_a_disk(key: str, wanted: dict[str, Any], value: object, what: str) -> None:
    disk = LCOWMappedVirtualDisk("c:\\m", 1, **wanted)
    with pytest.raises(Unsupported) as asked:
        mapped_disk("windows", disk)
    for name in ("MappedVirtualDisk", "MappedVirtualDiskForContainerScratch"):
        with pytest.raises(Unsupported) as read:
            decode({"ResourceType": name, "Settings": {"ContainerPath": "c:\\m", key: value}}, "windows")
        assert read.value.subject == name
        assert asked.value.why == read.value.why == f"a windows guest cannot {what}"
        assert asked.value.code == read.value.code == "guest-option"
    assert mapped_disk("linux", disk) is disk


def test_all_that_windows_cannot_do_is_named_at_once() -> None:
    with pytest.raises(Unsupported, match="cannot do Partition, Encrypted"):
        mapped_disk("windows", LCOWMappedVirtualDisk(encrypted=True, partition=1))


def test_mapped_disk() -> None:
    wanted = LCOWMappedVirtualDisk("c:\\m", 5, read_only=True)
    assert mapped_disk("windows", wanted) == WCOWMappedVirtualDisk("c:\\m", 5)
    refs = mapped_disk("windows", wanted, format_with_refs=True)
    assert refs == WCOWMappedVirtualDiskForContainerScratch("c:\\m", 5)
    assert refs != WCOWMappedVirtualDisk("c:\\m", 5)
    with pytest.raises(Unsupported, match="a linux guest cannot format with ReFS"):
        mapped_disk("linux", wanted, format_with_refs=True)


def test_windows_is_not_sent_the_eject_of_linux() -> None:
    """BUG-D of the reference: attach-only disks of Windows guests were removed with the Linux message."""
    assert eject("windows", 0, 3) is None
    assert eject("linux", 2, 3) == GuestRequest("Remove", SCSIDevice(2, 3))


@pytest.mark.parametrize("guest_os", ["", "Linux", "plan9"])
def test_unknown_guests(guest_os: str) -> None:
    for call in (
        lambda: decode({"ResourceType": "SecurityPolicy"}, guest_os),
        lambda: decode_modify({}, guest_os),
        lambda: mapped_disk(guest_os, LCOWMappedVirtualDisk()),
        lambda: eject(guest_os, 0, 0),
        lambda: resources_of(guest_os),
    ):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert (caught.value.code, caught.value.subject) == ("guest-os", guest_os or "(none)")
        assert caught.value.why == "unknown operating system; known are linux, windows"


def test_the_usual_filter_is_never_on_the_wire() -> None:
    """Older guests refuse a request with a key that they do not know."""
    computed: Any = "".join(["WC", "IFS"])
    for layers in (WCOWCombinedLayers(), WCOWCombinedLayers(filter_type=computed)):
        assert encode(GuestRequest("Add", layers))["Settings"] == {}
    message = {"ResourceType": "CombinedLayers", "Settings": {"FilterType": computed}}
    assert encode(decode(message, "windows"))["Settings"] == {}
    assert decode(message, "windows").settings == WCOWCombinedLayers()


def test_media_type_of_a_policy_fragment() -> None:
    assert SecurityPolicyFragment("x").effective_media_type == "application/cose-x509+rego"
    assert SecurityPolicyFragment("x", "text/plain").effective_media_type == "text/plain"


request_types = st.sampled_from(["Add", "Remove", "PreAdd", "Update"])


@given(request_types, st.one_of(*map(shapes, RESOURCES.values())))
def test_round_trip(request_type: Any, settings: Any) -> None:
    request = GuestRequest(request_type, settings)
    assert decode(json.loads(json.dumps(encode(request)))) == request


@given(request_types, st.one_of(*map(shapes, WINDOWS_RESOURCES.values())))
def test_round_trip_of_windows(request_type: Any, settings: Any) -> None:
    request = GuestRequest(request_type, settings)
    envelope = ModifySettingRequest(request_type, request)
    assert decode_modify(json.loads(json.dumps(encode(envelope))), "windows") == envelope


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
wire_names = sorted({item.encode_name for kind in guest_requests._NAMES for item in msgspec.structs.fields(kind)})


@given(st.sampled_from(RESOURCE_TYPES), st.dictionaries(st.sampled_from(wire_names), json_values), st.booleans())
def test_a_message_is_read_or_refused(name: str, settings: dict[str, object], windows: bool) -> None:
    """Nothing but an error of ours, whatever a peer sends."""
    guest_os = "windows" if windows else "linux"
    try:
        request = decode({"ResourceType": name, "Settings": settings}, guest_os)
    except (InvalidInput, Unsupported):
        return
    assert decode(encode(request), guest_os) == request
