"""Root filesystems of many layers: which one wins, how many there may be, and names too long for one mount."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from holdfast.errors import InvalidInput
from holdfast.image import erofs
from holdfast.machine.sandbox import Slot
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec import guest_requests as requests
from tests.images import busybox_tree, make_bundle
from tests.vm.support import BUSYBOX, Session, assert_holds_nothing, output, start
from tests.vm.test_machine import cloned

if TYPE_CHECKING:
    from pathlib import Path

MOST = 128


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Layers 0 to 127, the last on top: each has ``top`` with its number, and a file of its own that it hides next."""
    folder = tmp_path_factory.mktemp("layers")
    made = []
    for number in range(MOST):
        tree = folder / f"tree{number}"
        tree.mkdir()
        (tree / "top").write_text(f"{number}\n")
        (tree / f"own{number}").write_text(f"{number}\n")
        if number % 2:
            (tree / f"own{number - 1}").write_text("hidden\n")
        made.append(folder / f"layer {number}, of: many")  # a space, a comma, a colon: all mean something to mount(2)
        erofs.make(str(tree), str(made[-1]), str(number))
    return made


@pytest.mark.parametrize("count", [1, 2, 3, MOST])
def test_the_top_one_wins(shared_pod, disks, count):
    request = container_request(
        "c", shared_pod.data, image=BUSYBOX, stdio=Stdio(0, STDOUT), args=["sh", "-c", "cat /top; cat /own* | sort -n"]
    )
    layers = [(str(disk), f"sha256:{disk.name}") for disk in reversed(disks[:count])]
    root = msgspec.structs.replace(request.root, layers=(*layers, *request.root.layers))
    with Session(shared_pod, "run", msgspec.structs.replace(request, root=root)) as session:
        assert session.wait() == 0
        top, *own = session.output[STDOUT].decode().split()
    assert top == str(count - 1)
    assert own.count("hidden") == count // 2
    assert own[own.count("hidden") :] == [str(n) for n in range(count) if n % 2 or n == count - 1]
    assert_holds_nothing(shared_pod)


def test_one_layer_is_attached_once_for_all_containers(shared_pod):
    with start(shared_pod, "echo up; read x", name="a", stdin=True) as one:
        one.wait_for(b"up")
        before = {disk["file"]: disk["slot"] for disk in shared_pod.storage()["attachments"] if disk["kind"] == "layer"}
        with start(shared_pod, "echo up; read x", name="b", stdin=True) as two:
            two.wait_for(b"up")
            layers = [disk for disk in shared_pod.storage()["attachments"] if disk["kind"] == "layer"]
            assert {disk["file"]: disk["slot"] for disk in layers} == before
            assert all(disk["holders"] == ["a", "b"] for disk in layers)
            two.end_input()
            two.wait()
        one.end_input()
        one.wait()
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize(("count", "verity"), [(1, False), (1, True), (2, False)], ids=["one", "one, checked", "two"])
def test_a_root_without_a_scratch_disk(shared_pod, tmp_path, count, verity):
    """One layer is bound, as overlayfs wants two; nobody can write to either, and both go like any other root."""
    (tmp_path / "shared").mkdir()
    script = """
        cat /etc/group | head -n1; cat /etc/release
        for change in 'touch /new' 'rm /etc/passwd' 'mkdir /etc/new' 'chmod 777 /etc' 'mv /home /house'
        do $change 2>&1 | grep -c 'Read-only file system'; done
        echo x >> /etc/group
        echo shared > /mnt/file; echo up; read x; exit 3
    """
    request = container_request(
        "c", shared_pod.data, image=BUSYBOX, args=["sh", "-c", script], stdio=Stdio(STDIN, STDOUT, STDERR),
        mounts=[f"type=bind,src={tmp_path}/shared,dst=/mnt"], scratch_bytes=0, verity=verity,
    )  # fmt: skip
    root = msgspec.structs.replace(request.root, layers=request.root.layers[-count:])
    with Session(shared_pod, "run", msgspec.structs.replace(request, root=root), stdin=True) as session:
        session.wait_for(b"up")
        attached = shared_pod.storage()["attachments"]
        assert [(disk["kind"], disk["read_only"]) for disk in attached] == [("layer", True)] * count
        release = ["tests"] if count == 2 else []
        assert session.output[STDOUT].decode().split("\n") == ["root:x:0:", *release, *["1"] * 5, "up", ""]
        assert session.output[STDERR].count(b"Read-only file system") == 1
        assert output(shared_pod.exec("c", ["cat", "/mnt/file"])) == "shared\n"
        # What is attached meanwhile needs a place that is there.
        assert shared_pod.attach(f"type=bind,src={tmp_path}/shared,dst=/root", container="c")
        with pytest.raises(InvalidInput, match="Read-only file system") as caught:
            shared_pod.attach(f"type=bind,src={tmp_path},dst=/nowhere/yet", container="c")
        assert caught.value.code == "mount-point"
        assert output(shared_pod.exec("c", ["cat", "/root/file"])) == "shared\n"
        session.write(b"\n")
        assert session.wait() == 3
    assert_holds_nothing(shared_pod)


def test_the_layer_folders_of_a_bundle(shared_pod, tmp_path):
    """Top-most first, as hcsshim lists them, and the one of a scratch disk last; relative ones are the bundle's own."""
    bundle = tmp_path / "bundle"
    for name, where in (("below", bundle / "below"), ("top", tmp_path / "elsewhere")):
        tree = tmp_path / f"{name}-tree"
        if name == "below":
            busybox_tree(tree)
        (tree / "etc").mkdir(parents=True, exist_ok=True)
        (tree / "same").write_text(f"{name}\n")
        (tree / "etc" / name).write_text(f"{name}\n")
        where.mkdir(parents=True)
        erofs.make(str(tree), str(where / "layer.erofs"), name)
    for folders, first in (([tmp_path / "elsewhere", "below"], "top"), (["below", tmp_path / "elsewhere"], "below")):
        windows = {"layerFolders": [*map(str, folders), str(tmp_path / "no such folder")]}
        make_bundle(
            bundle, ["sh", "-c", "cat /same; cd /etc; ls below top; cat below top"], root={"path": ""}, windows=windows
        )
        assert output(shared_pod.run(bundle=bundle)).split() == [first, "below", "top", "below", "top"]
        assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
def test_gap_more_names_than_one_page_of_options_holds(data, tmp_path, disks, writable):
    """20 layers below names of 255 bytes: 5 kB.  mount(2) takes one page; Linux 6.1 has no option for each layer."""
    count = 20

    async def main() -> None:
        async with cloned(data, tmp_path) as machine:

            async def ask(action: requests.RequestType, settings: requests.Settings) -> None:
                await machine.request("modify", requests.encode(requests.GuestRequest(action, settings)), 20)

            mounted = []
            for number, disk in enumerate(reversed(disks[:count])):
                with open(disk, "rb") as file:
                    await machine.plug_disk(Slot(0, number), file.fileno(), "raw", True, False)
                path = f"/run/layers/{number:03}" + "x,:\\" * 63
                await ask("Add", requests.LCOWMappedVirtualDisk(mount_path=path, lun=number, read_only=True))
                mounted.append(path)
            layers = tuple(requests.Layer(path=path) for path in mounted)
            root = requests.LCOWCombinedLayers("c", "/run/gcs/c/c/rootfs", layers, "/run/scratch" if writable else "")
            await ask("Add", root)
            table = (await machine.request("mounts", {}, 5))["mountinfo"]
            assert [line for line in table.splitlines() if " /run/gcs/c/c/rootfs " in line and " - overlay " in line]
            await ask("Remove", requests.LCOWCombinedLayers("c", "/run/gcs/c/c/rootfs"))
            for number, path in enumerate(mounted):
                await ask("Remove", requests.LCOWMappedVirtualDisk(mount_path=path, lun=number, read_only=True))
            assert "/run/layers" not in (await machine.request("mounts", {}, 5))["mountinfo"]

    asyncio.run(main())
