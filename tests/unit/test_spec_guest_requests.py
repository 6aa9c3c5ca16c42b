"""Guest requests: exact names on the wire, zeroes left out and put back, strangers passed over or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.spec.guest_requests import (
    GuestRequest,
    Layer,
    LCOWCombinedLayers,
    LCOWMappedDirectory,
    LCOWMappedVirtualDisk,
    ModifySettingRequest,
    SCSIDevice,
    decode,
    decode_modify,
    encode,
    scsi_resource_path,
)


@pytest.mark.parametrize(
    ("settings", "resource", "wire"),
    [
        (
            LCOWMappedVirtualDisk(
                mount_path="/run/mounts/scsi/m0", lun=3, controller=1, partition=2, read_only=True, encrypted=True,
                options=("ro",), block_dev=True, ensure_filesystem=True, filesystem="ext4",
            ),
            "MappedVirtualDisk",
            {
                "MountPath": "/run/mounts/scsi/m0", "Lun": 3, "Controller": 1, "Partition": 2, "ReadOnly": True,
                "Encrypted": True, "Options": ["ro"], "BlockDev": True, "EnsureFilesystem": True, "Filesystem": "ext4",
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
            LCOWCombinedLayers("c", "/r", (Layer(path="/top"), Layer(id="x", path="/base")), "/s"),
            "CombinedLayers",
            {
                "ContainerID": "c", "ContainerRootPath": "/r", "ScratchPath": "/s",
                "Layers": [{"Path": "/top"}, {"Id": "x", "Path": "/base"}],
            },
        ),
    ],
)  # fmt: skip
def test_wire(settings: Any, resource: str, wire: dict[str, Any]) -> None:
    request = GuestRequest("Add", settings)
    message = encode(request)
    assert json.loads(json.dumps(message)) == {"ResourceType": resource, "RequestType": "Add", "Settings": wire}
    assert decode(json.loads(json.dumps(message))) == request


def test_envelope() -> None:
    inner = GuestRequest("Remove", SCSIDevice(lun=1))
    request = ModifySettingRequest("Remove", inner, scsi_resource_path(0, 1))
    message = encode(request)
    assert message["ResourcePath"] == "VirtualMachine/Devices/Scsi/0/Attachments/1"
    assert message["GuestRequest"] == encode(inner)
    assert decode_modify(message) == request
    assert decode_modify({}) == ModifySettingRequest("Add")


def test_strange_keys_and_absent_ones() -> None:
    message = {"ResourceType": "SCSIDevice", "New": 1, "Settings": {"Lun": 2, "Newer": {}}}
    assert decode(message) == GuestRequest("Add", SCSIDevice(0, 2))
    assert decode({"ResourceType": "SCSIDevice", "RequestType": ""}) == GuestRequest("Add", SCSIDevice())


@pytest.mark.parametrize(
    ("message", "code", "subject", "why"),
    [
        ([], "guest-request", "GuestRequest", "expected an object, got list"),
        ({}, "resource-type", "(none)", "unknown resource type"),
        ({"ResourceType": ["x"]}, "resource-type", "['x']", "unknown resource type"),
        ({"ResourceType": "VPMemDevice"}, "resource-type", "VPMemDevice", "known are MappedVirtualDisk, SCSIDevice"),
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
    ],
)
def test_bad_messages(message: object, code: str, subject: str, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(message)
    assert (caught.value.code, caught.value.subject) == (code, subject)
    assert why in caught.value.why


text = st.text(max_size=8)
settings_of_any_kind = st.one_of(
    st.builds(
        LCOWMappedVirtualDisk,
        mount_path=text,
        lun=st.integers(0, 63),
        controller=st.integers(0, 3),
        read_only=st.booleans(),
        options=st.lists(text, max_size=2).map(tuple),
    ),
    st.builds(SCSIDevice, st.integers(0, 3), st.integers(0, 63)),
    st.builds(LCOWMappedDirectory, text, st.integers(0), text, st.booleans()),
    st.builds(LCOWCombinedLayers, text, text, st.lists(st.builds(Layer, text, text), max_size=3).map(tuple), text),
)


@given(st.sampled_from(["Add", "Remove", "PreAdd", "Update"]), settings_of_any_kind)
def test_round_trip(request_type: Any, settings: Any) -> None:
    request = GuestRequest(request_type, settings)
    assert decode(json.loads(json.dumps(encode(request)))) == request
