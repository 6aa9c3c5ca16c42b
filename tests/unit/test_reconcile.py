"""The journal beside the machine: what only one of them knows, and what is only on its way."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.machine.ports import place_of
from holdfast.storage.journal import Journal
from holdfast.storage.reconcile import reconcile


class Machine:
    """Says what it is told to, and does something meanwhile."""

    def __init__(self, *places, meanwhile=lambda: None):
        self.places = set(places)
        self.meanwhile = meanwhile

    async def occupied(self):
        self.meanwhile()
        return self.places


@pytest.fixture
def journal(state_root):
    with Journal(state_root) as journal:
        yield journal
        journal.forget_pod("pod")


def row(journal, kind, detail, *, held=True):
    number = journal.intend("pod", kind, "thing", detail)
    if held:
        journal.hold(number)
    return number


def check(journal, machine):
    found = asyncio.run(reconcile(machine, journal, "pod"))
    return found["unknown"], found["missing"]


def test_they_agree(journal):
    row(journal, "attachment", {"slot": "0:3"})
    row(journal, "pmem", {"device": 1})
    row(journal, "pci", {"port": 2})
    row(journal, "share", {"number": 7})
    assert check(journal, Machine("slot 0:3", "pmem 1", "port 2")) == ([], [])


def test_what_only_one_knows(journal):
    row(journal, "attachment", {"slot": "0:3"})
    row(journal, "pmem", {"device": 0})
    row(journal, "pci", {"port": 2})
    assert check(journal, Machine("slot 1:0", "port 5")) == (["port 5", "slot 1:0"], ["pmem 0", "port 2", "slot 0:3"])


def test_a_device_of_persistent_memory_outlives_its_layers(journal):
    assert check(journal, Machine("pmem 0")) == ([], [])


def test_what_is_coming_or_going_is_neither(journal):
    row(journal, "attachment", {"slot": "0:0"}, held=False)
    going = row(journal, "attachment", {"slot": "0:1"})
    assert check(journal, Machine(meanwhile=lambda: journal.release(going))) == ([], [])
    machine = Machine("slot 0:2", meanwhile=lambda: row(journal, "attachment", {"slot": "0:2"}, held=False))
    assert check(journal, machine) == ([], [])


@pytest.mark.parametrize(
    ("device", "place"),
    [("disk3-63", "slot 3:63"), ("pmem12dev", "pmem 12"), ("function7", "port 7"), ("scsi0", ""), ("serial", "")],
)
def test_places(device, place):
    assert place_of(device) == place
