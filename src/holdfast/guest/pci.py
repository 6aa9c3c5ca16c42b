"""Assigned PCI functions: waits for one behind its port, and tells which device nodes came with it."""

from __future__ import annotations

import os
from time import monotonic

from holdfast.errors import InvalidInput, TimedOut
from holdfast.guest.loop import sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_PCI = "/sys/bus/pci/devices"
#: Where the ports are on bus 0: machine/ports.py.
_PORT_SLOT, _PORTS = 0x8, 8
_POLL_SECONDS = 0.01
#: The kernel probes a function in the moment in which it comes; what a driver does later is waited for so long.
_SETTLE_SECONDS = 0.15
#: How long a function that has made no node yet may take to make its first: drivers bind one after the other, and
#: an emulated processor takes its time.  A function without a driver makes none, and is waited for as long.
_FIRST_NODE_SECONDS = 2.0
_MOST_DEPTH, _MOST_NODES = 8, 64


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: waits for the function; returns ``{"address", "driver", "nodes"}``, a node with path, type and numbers."""
    port = settings.get("Port", 0)
    if not isinstance(port, int) or not 0 <= port < _PORTS:
        raise InvalidInput("wait for PCI function", subject=port, why=f"ports are 0 to {_PORTS - 1}")
    folder = f"{_PCI}/0000:00:{_PORT_SLOT:02x}.{port}"
    while True:
        addresses = [name for name in os.listdir(folder) if name.startswith("0000:") and name.endswith(":00.0")]
        if addresses:
            break
        try:
            yield sleep(_POLL_SECONDS)
        except TimedOut as error:
            error.why = f"no PCI function appears behind port {port}"
            raise
    folder = f"{folder}/{addresses[0]}"
    nodes: list[dict[str, Any]] = []
    since = monotonic()
    while monotonic() - since < (_SETTLE_SECONDS if nodes else _FIRST_NODE_SECONDS):
        found = nodes_below(folder)
        if found != nodes:
            nodes, since = found, monotonic()
        yield sleep(_POLL_SECONDS)
    driver = f"{folder}/driver"
    name = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else ""
    return {"address": addresses[0], "driver": name, "nodes": nodes}


def nodes_below(folder: str, depth: int = 0) -> list[dict[str, Any]]:
    """Every device node of a device and of what its drivers made below it."""
    nodes: list[dict[str, Any]] = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and depth < _MOST_DEPTH:
                nodes += nodes_below(entry.path, depth + 1)
            elif entry.name == "dev":
                nodes.append(_node(folder))
    except FileNotFoundError:  # it is going away while it is looked at
        return nodes
    return nodes[:_MOST_NODES]


def _node(folder: str) -> dict[str, Any]:
    with open(f"{folder}/dev") as file:
        major, minor = map(int, file.read().split(":"))
    with open(f"{folder}/uevent") as file:
        name = next(line[8:].strip() for line in file if line.startswith("DEVNAME="))
    block = os.path.basename(os.path.realpath(f"{folder}/subsystem")) == "block"
    return {"path": f"/dev/{name}", "type": "b" if block else "c", "major": major, "minor": minor}
