"""Assigned devices: their names, what must be true of the host, and what a container gets of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import Exhausted, GuestFailed, InvalidInput, NotFound, Unsupported
from holdfast.machine.ports import PORTS
from holdfast.storage.journal import Journal
from holdfast.storage.pci import FunctionKey, Functions, Node, add_nodes, parse_function, vfio_options
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from pathlib import Path

KEY = FunctionKey("0000:01:00.0")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("0000:01:00.0", KEY),
        ("01:00.0", KEY),
        ("0000:0A:1F.7/12", FunctionKey("0000:0a:1f.7", 12)),
        ("10000:e1:00.0", FunctionKey("10000:e1:00.0")),
    ],
)
def test_addresses(text, key):
    assert parse_function(text) == key


@pytest.mark.parametrize(
    "text", ["", "eth0", "0000:01:00", "0000:01:00.8", "0000:01:20.0", "01:00.0/", "01:00.0/x", "../.."]
)
def test_what_is_no_address(text):
    with pytest.raises(InvalidInput) as wrong:
        parse_function(text)
    assert wrong.value.code == "device-id"


def test_an_unknown_type():
    with pytest.raises(InvalidInput, match="gpu"):
        parse_function("01:00.0", "class")
    assert parse_function("01:00.0", "vpci-instance-id") == KEY


def host(folder: Path, driver: str, *, iommu: bool = True) -> str:
    """A sysfs with one function of that driver, which has one virtual function."""
    for address, its_driver in (("0000:01:00.0", driver), ("0000:01:10.0", "vfio-pci")):
        (folder / address).mkdir(parents=True)
        (folder / "drivers" / its_driver).mkdir(parents=True, exist_ok=True)
        (folder / address / "driver").symlink_to(folder / "drivers" / its_driver)
        if iommu:
            (folder / address / "iommu_group").mkdir()
    (folder / "0000:01:00.0/virtfn0").symlink_to(folder / "0000:01:10.0")
    return str(folder)


def test_only_vfio_devices_are_assigned(tmp_path):
    sysfs = host(tmp_path / "one", "vfio-pci")
    assert vfio_options(KEY, sysfs) == {"driver": "vfio-pci", "host": "0000:01:00.0"}
    assert vfio_options(FunctionKey("0000:01:00.0", 1), sysfs) == {"driver": "vfio-pci", "host": "0000:01:10.0"}
    for key in (FunctionKey("0000:01:00.0", 2), FunctionKey("0000:02:00.0")):
        with pytest.raises(NotFound):
            vfio_options(key, sysfs)
    with pytest.raises(Unsupported, match="driver e1000e has it"):
        vfio_options(KEY, host(tmp_path / "two", "e1000e"))
    with pytest.raises(Unsupported) as without:
        vfio_options(KEY, host(tmp_path / "three", "vfio-pci", iommu=False))
    assert without.value.code == "no-iommu"


def test_nodes_are_made_and_allowed():
    spec: dict[str, Any] = {"linux": {"devices": None, "resources": {"devices": [{"allow": False}]}}}
    add_nodes(spec, [Node("/dev/vdb", "b", 254, 16)])
    numbers = {"type": "b", "major": 254, "minor": 16}
    assert spec["linux"]["devices"] == [{"path": "/dev/vdb", **numbers, "fileMode": 0o600, "uid": 0, "gid": 0}]
    assert spec["linux"]["resources"]["devices"] == [{"allow": False}, {"allow": True, **numbers, "access": "rwm"}]
    untouched: dict[str, Any] = {}
    add_nodes(untouched, [])
    assert untouched == {}


class Machine(FakeSandbox):
    """Answers as the guest is told to."""

    def __init__(self) -> None:
        super().__init__("")
        self.plugged_in: set[int] = set()
        self.answer: Any = {"address": "0000:01:00.0", "nodes": []}

    async def plug_function(self, port: int, options: dict[str, Any]) -> None:
        assert port not in self.plugged_in
        self.plugged_in.add(port)

    async def unplug_function(self, port: int) -> None:
        self.plugged_in.discard(port)

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        return self.answer


NODE = {"path": "/dev/x", "type": "c", "major": 1, "minor": 2}


@pytest.mark.parametrize(
    "answer",
    [
        None, {}, {"address": 1, "nodes": []}, {"address": "", "nodes": [{}]}, {"address": "", "nodes": [NODE] * 65},
        *({"address": "", "nodes": [NODE | change]} for change in (
            {"path": "/etc/passwd"}, {"path": "/dev/../etc/x"}, {"path": "/dev/a/./b"}, {"type": "p"}, {"major": -1},
        )),
    ],
)  # fmt: skip
def test_a_guest_that_lies_about_nodes(state_root, answer):
    async def main() -> None:
        machine = Machine()
        machine.answer = answer
        with Journal(state_root) as journal:
            functions = Functions(machine, machine, journal, "pod", lambda _key: {})
            with pytest.raises(GuestFailed, match="nonsense"):
                await functions.assign(KEY, "c")
            assert (machine.plugged_in, journal.held(), functions.describe()) == (set(), [], [])

    asyncio.run(main())


def test_ports_run_out_and_are_used_again(state_root):
    async def main() -> None:
        machine = Machine()
        with Journal(state_root) as journal:
            functions = Functions(machine, machine, journal, "pod", lambda _key: {})
            keys = [FunctionKey("0000:01:00.0", number) for number in range(PORTS + 1)]
            held = [await functions.assign(key, "c") for key in keys[:-1]]
            with pytest.raises(Exhausted):
                await functions.assign(keys[-1], "c")
            await functions.release(held[3], "c")
            assert (await functions.assign(keys[-1], "c")).port == 3
            assert len(journal.held("pod")) == PORTS

    asyncio.run(main())
