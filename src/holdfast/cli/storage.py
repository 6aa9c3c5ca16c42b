"""``storage``, ``attach`` and ``detach``: what a pod holds, and more or less of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from holdfast import api
from holdfast.cli import output as shown
from holdfast.errors import HoldfastError, NotFound

if TYPE_CHECKING:
    from holdfast.cli.options import AttachOptions, CommandLine, DetachOptions, StorageOptions
    from holdfast.cli.output import Output

#: What ``attach`` attached is held under names that begin so.
_BY_REQUEST = "attach:"


def show(command: StorageOptions, line: CommandLine, output: Output) -> int:
    """``storage``: a tree for a terminal, a table for a pipe, everything with ``--json``."""
    with api.Pod.open(command.pod, root=line.root, data=line.data) as pod:
        found = pod.storage()
    if output.json:
        output.data(found)
    elif output.terminal:
        _tree(found, output)
    else:
        head = ("SLOT", "KIND", "MODE", "SIZE", "FILE", "HOLDERS", "GUEST PATH", "IN CONTAINERS", "READ", "WRITTEN")
        output.table(head, list(rows(found)))
    return 0


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each disk and each share."""
    lines: list[tuple[str, ...]] = []
    for disk in found["attachments"]:
        where = ", ".join(disk["guest_paths"])
        size = shown.size(disk["size_bytes"])
        lines.append(
            (disk["slot"], _kind(disk), mode(disk), size, disk.get("volume") or disk["file"],
             ", ".join(disk["holders"]), where,
             _in_containers(disk), *(shown.size(disk.get(key, 0)) for key in ("read_bytes", "written_bytes")))
        )  # fmt: skip
    for layer in found.get("pmem", ()):
        slot, kind = f"pmem{layer['device']}+{layer['offset']:#x}", "layer (dax)" if layer["dax"] else "layer"
        holders, size = ", ".join(layer["holders"]), shown.size(layer["size_bytes"])
        lines.append((slot, kind, "ro", size, layer["file"], holders, layer["guest_path"], "", "", ""))
    for share in found["shares"]:
        holders = ", ".join(share["holders"])
        where, inside = share["guest_path"], _in_containers(share)
        lines.append(("9p", share["kind"], mode(share), "", share["path"], holders, where, inside, "", ""))
    for device in found.get("devices", ()):
        holders, nodes = ", ".join(device["holders"]), " ".join(device["nodes"])
        lines.append((f"port{device['port']}", "device", "rw", "", device["device"], holders, nodes, "", "", ""))
    for volume in found.get("volumes", ()):
        holders, where = ", ".join(volume["holders"]), " ".join(volume["guest_paths"])
        size = next((o.removeprefix("size=") for o in volume["options"] if o.startswith("size=")), "")
        inside = _in_containers(volume)
        lines.append(("pod", f"{volume['type']} volume", "rw", size, volume["volume"], holders, where, inside, "", ""))
    return lines


def _in_containers(thing: dict[str, Any]) -> str:
    """``CONTAINER:PATH`` of each container that sees it."""
    return ", ".join(thing.get("container_paths", ()))


def mode(thing: dict[str, Any]) -> str:
    """``ro`` or ``rw``."""
    return "ro" if thing["read_only"] else "rw"


def _kind(disk: dict[str, Any]) -> str:
    """What the disk is for; and its format, if that is not the usual one."""
    if disk.get("volume"):
        return "volume"
    return disk["kind"] if disk["format"] == "raw" else f"{disk['kind']} ({disk['format']})"


def _file(disk: dict[str, Any]) -> str:
    """The file's path, or the volume's name; of a layer's, whose name is one digest or two, the beginning."""
    if disk.get("volume"):
        return str(disk["volume"])
    folder, _, name = disk["file"].rpartition("/")
    path: str = disk["file"]
    return f"{folder}/{name[:12]}….erofs" if disk["kind"] == "layer" and len(name) > 32 else path


def _tree(found: dict[str, Any], output: Output) -> None:
    """The picture: pod -> slot -> file -> who holds it and where the guest has it."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def text(*parts: tuple[str, str]) -> Text:
        return Text.assemble(*((shown.clean(part), style) for part, style in parts), overflow="fold")

    tree = Tree(text((found["pod"], "bold")), guide_style="dim")
    disks = tree.add(text((f"disks ({found['free_slots']} SCSI slots free)", "bold")))
    for disk in found["attachments"]:
        branch = disks.add(
            text((disk["slot"], "cyan"), ("  ", ""), (_file(disk), ""), ("  ", ""), _access(disk),
                 (f"  {_kind(disk)}  {shown.size(disk['size_bytes'])}", "dim"))
        )  # fmt: skip
        branch.add(text((", ".join(disk["holders"]), "magenta"), (" at ", "dim"), (" ".join(disk["guest_paths"]), "")))
        if inside := _in_containers(disk):
            branch.add(text((inside, "")))
    if found.get("pmem"):
        pmem = tree.add(text(("persistent memory", "bold")))
        for layer in found["pmem"]:
            place = f"{layer['device']}+{layer['offset']:#x}"
            what = f"  layer  {shown.size(layer['size_bytes'])}{'  dax' if layer['dax'] else ''}"
            branch = pmem.add(text((place, "cyan"), ("  ", ""), (layer["file"], ""), (what, "dim")))
            branch.add(text((", ".join(layer["holders"]), "magenta"), (" at ", "dim"), (layer["guest_path"], "")))
    if found.get("devices"):
        devices = tree.add(text(("devices", "bold")))
        for device in found["devices"]:
            branch = devices.add(text((str(device["port"]), "cyan"), ("  ", ""), (device["device"], "")))
            nodes = " ".join(device["nodes"])
            branch.add(text((", ".join(device["holders"]), "magenta"), (" has ", "dim"), (nodes, "")))
    shares = tree.add(text((f"shares ({len(found['shares'])}, over 9p)", "bold")))
    for share in found["shares"]:
        branch = shares.add(
            text((str(share["share"]), "cyan"), ("  ", ""), (share["path"], ""), ("  ", ""), _access(share),
                 (f"  {share['kind']}", "dim"))
        )  # fmt: skip
        branch.add(text((", ".join(share["holders"]), "magenta"), (" at ", "dim"), (share["guest_path"], "")))
        if inside := _in_containers(share):
            branch.add(text((inside, "")))
    if found.get("volumes"):
        volumes = tree.add(text(("volumes of the pod", "bold")))
        for volume in found["volumes"]:
            what = f"  {volume['type']}  {','.join(volume['options'])}"
            branch = volumes.add(text((volume["volume"], ""), (what, "dim")))
            holders = ", ".join(volume["holders"]) or "nobody"
            branch.add(text((holders, "magenta"), (" at ", "dim"), (" ".join(volume["guest_paths"]), "")))
    Console(no_color=not output.colour, highlight=False).print(tree)


def _access(thing: dict[str, Any]) -> tuple[str, str]:
    return (mode(thing), "green" if thing["read_only"] else "yellow")


def attach(command: AttachOptions, line: CommandLine, output: Output) -> int:
    """``attach``: prints the path of each in the guest; of several all are attached, or none."""
    attached: list[str] = []
    container = command.container or ""
    with api.Pod.open(command.pod, root=line.root, data=line.data) as pod:
        try:
            for mount in command.mounts:
                attached.append(pod.attach(mount, container=container))
        except HoldfastError as error:
            there = [mount["destination"] for mount in command.mounts]
            for path, where in reversed(list(zip(attached, there, strict=False))):
                try:
                    pod.detach(where if container else path, container=container)
                except HoldfastError as other:
                    error.causes = (*error.causes, other)
            raise
    if output.json:
        output.data({"guest_paths": attached})
    else:
        for path in attached:
            output.line(path)
    return 0


def detach(command: DetachOptions, line: CommandLine, output: Output) -> int:
    """``detach``: by the path in the container, or the guest, or on the host; goes on past one that fails."""
    errors: list[HoldfastError] = []
    detached: list[str] = []
    with api.Pod.open(command.pod, root=line.root, data=line.data) as pod:
        for target in command.targets:
            try:
                path = target if command.container else _resolve(target, pod.storage())
                pod.detach(path, container=command.container or "")
                detached.append(path)
            except HoldfastError as error:
                errors.append(error)
    if errors:
        first, *others = errors
        first.causes = (*first.causes, *others)
        raise first
    if output.json:
        output.data({"detached": detached})
    return 0


def _resolve(target: str, found: dict[str, Any]) -> str:
    """The guest's path of what ``target`` names there or on the host; what a container holds is not looked for first.

    Raises:
        NotFound: nothing of that name is in the pod.
    """
    things: list[tuple[str, str, list[str]]] = [
        (disk["file"], path, disk["holders"]) for disk in found["attachments"] for path in disk["guest_paths"]
    ]
    things += [(share["path"], share["guest_path"], share["holders"]) for share in found["shares"]]
    volumes = [disk for disk in found["attachments"] if disk.get("volume") == target]
    things += [(target, path, disk["holders"]) for disk in volumes for path in disk["guest_paths"]]
    if any(target == path for _, path, _ in things):
        return target
    here = os.path.realpath(target)
    matching = [(path, holders) for host, path, holders in things if target == host or here == os.path.realpath(host)]
    if not matching:
        raise NotFound(
            "detach", subject=target, why="the pod has nothing of it", code="not-attached",
            hint=f"holdfast storage {found['pod']} shows what it has",
        )  # fmt: skip
    by_request = [path for path, holders in matching if any(name.startswith(_BY_REQUEST) for name in holders)]
    return (by_request or [path for path, _ in matching])[0]
