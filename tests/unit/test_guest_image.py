"""The built guest: found while nothing changed, built again when something did, always the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import msgspec
import pytest

from holdfast.errors import Corrupt, Exhausted, NotFound, Unsupported
from holdfast.machine import closure, guest_image, guest_root
from tests.unit.test_kernel import FakeHost, boot_image

PROGRAMS = ("mkfs.erofs", "busybox", "crun", "mke2fs")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
pytestmark = pytest.mark.skipif(
    not all(shutil.which(name, path=SEARCH) for name in PROGRAMS), reason=f"needs {', '.join(PROGRAMS)}"
)


class Builder:
    """Builds guests of a host with a false kernel and a small agent, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.fake = FakeHost(folder)
        self.image = self.fake.add("6.1.0")
        self.host = guest_image.Host(boot=self.fake.boot, modules=self.fake.modules)
        self.agent = folder / "holdfast"
        (self.agent / "guest").mkdir(parents=True)
        (self.agent / "__init__.py").touch()
        (self.agent / "guest/__init__.py").touch()
        (self.agent / "guest/agent.py").write_text("def main():\n    import colorsys\n")
        self.data = folder / "data"
        self.built = 0

    def build(self, data: Path | None = None, **options) -> guest_image.GuestImage:
        return guest_image.build(
            data or self.data, agent=self.agent, host=self.host, progress=self._progress, **options
        )

    def find(self) -> guest_image.GuestImage | None:
        return guest_image.find(self.data, agent=self.agent, host=self.host)

    def _progress(self, message: str) -> None:
        self.built += "making the root disk" in message


@pytest.fixture
def builder(tmp_path) -> Builder:
    return Builder(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(guest: guest_image.GuestImage) -> list[bytes]:
    return [Path(path).read_bytes() for path in (guest.kernel, guest.initrd, guest.root)]


def test_builds_once_and_finds_it(builder):
    assert builder.find() is None
    guest = builder.build()
    assert builder.find() == guest
    assert builder.build() == guest
    assert builder.built == 1
    assert names(builder.data / "guests") == [".lock", guest.id]
    assert names(builder.data / "guests" / guest.id) == ["guest.json", "initrd", "kernel", "root.erofs"]
    assert guest.kernel_release == "6.1.0"
    assert guest.modules.index("virtio_ring") < guest.modules.index("virtio_blk") < guest.modules.index("overlay")
    assert guest_image.ensure(builder.data, agent=builder.agent, host=builder.host) == guest


def test_the_same_files_give_the_same_bytes(builder, tmp_path):
    one, other = builder.build(), builder.build(tmp_path / "other")
    assert one.id == other.id
    assert contents(one) == contents(other)


def test_building_by_force_gives_the_same_again(builder):
    one = builder.build()
    before = contents(one)
    other = builder.build(force=True)
    assert builder.built == 2
    assert (one, before) == (other, contents(other))
    assert names(builder.data / "guests") == [".lock", one.id]


def _change_agent(builder: Builder) -> None:
    (builder.agent / "guest/agent.py").write_text("def main():\n    import colorsys, bisect\n")


def _add_to_agent(builder: Builder) -> None:
    (builder.agent / "guest/more.py").write_text("more = 1\n")


def _change_kernel(builder: Builder) -> None:
    builder.image.write_bytes(boot_image("6.1.0", b"another"))


def _change_module(builder: Builder) -> None:
    (builder.fake.modules / "6.1.0/kernel/fs/overlayfs/overlay.ko").write_bytes(b"\x7fELF another overlay")


def _install_newer_kernel(builder: Builder) -> None:
    builder.fake.add("6.2.0")


@pytest.mark.parametrize(
    "change",
    [_change_agent, _add_to_agent, _change_kernel, _change_module, _install_newer_kernel],
)
def test_any_change_builds_another(builder, change):
    one = builder.build()
    change(builder)
    assert builder.find() is None
    other = builder.build()
    assert builder.built == 2
    assert one.id != other.id
    assert builder.find() == other
    assert Path(one.root).exists()


def test_new_times_alone_build_nothing(builder):
    one = builder.build()
    os.utime(builder.image, ns=(1, 1))
    assert builder.find() is None
    other = builder.build()
    assert (other.id, builder.built) == (one.id, 1)
    assert builder.find() == other


def test_a_kernel_asked_for_is_another_guest_than_the_newest(builder):
    old = builder.build(kernel=builder.image)
    builder.fake.add("6.2.0")
    new = builder.build()
    assert (old.kernel_release, new.kernel_release) == ("6.1.0", "6.2.0")
    assert builder.find() == new
    assert builder.build(kernel=builder.image) == old


def test_finding_is_fast(builder):
    builder.build()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert builder.find()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.020


def test_builders_at_the_same_time_build_once(builder):
    found: list[guest_image.GuestImage] = []
    threads = [threading.Thread(target=lambda: found.append(builder.build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.built == 1
    assert len({guest.id for guest in found}) == 1
    assert len(found) == 3


def test_a_failed_build_leaves_nothing(builder, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guest_image, "_make_erofs", full)
    with pytest.raises(Exhausted):
        builder.build()
    assert names(builder.data / "guests") == [".lock"]


def test_what_a_killed_builder_left_is_swept(builder):
    leftover = builder.data / "guests/.build-killed/root"
    leftover.mkdir(parents=True)
    guest = builder.build()
    assert names(builder.data / "guests") == [".lock", guest.id]


def test_damaged_and_foreign_records_are_no_guests(builder):
    guest = builder.build()
    record = Path(guest.root).with_name("guest.json")
    whole = record.read_bytes()
    for damaged in (b"", whole[:-20], b'{"id": "1"}', whole.replace(b'"version": "', b'"version": "0')):
        record.write_bytes(damaged)
        assert builder.find() is None
    record.write_bytes(whole)
    Path(guest.root).unlink()
    assert builder.find() is None
    assert builder.build() == guest
    assert Path(guest.root).exists()


def test_prune_keeps_what_it_is_told(builder):
    one = builder.build()
    _change_agent(builder)
    two = builder.build()
    assert guest_image.prune(builder.data, {two.id}) == [one.id]
    assert names(builder.data / "guests") == [".lock", two.id]
    assert builder.find() == two
    assert guest_image.prune(builder.data / "none", set()) == []


def test_no_agent_to_put_in(builder):
    (builder.agent / "guest/agent.py").unlink()
    with pytest.raises(NotFound) as caught:
        builder.build()
    assert caught.value.code == "guest-agent-not-found"


def test_a_busybox_that_is_not_static_is_refused(builder, monkeypatch):
    real = guest_root.find_program
    monkeypatch.setattr(guest_root, "find_program", lambda name: real("crun" if name == "busybox" else name))
    with pytest.raises(Unsupported) as caught:
        builder.build()
    assert "busybox-static" in caught.value.hint


def test_the_root_disk_has_all_that_runs(builder, tmp_path):
    guest = builder.build()
    if not shutil.which("fsck.erofs", path=SEARCH):
        pytest.skip("needs fsck.erofs")
    root = tmp_path / "extracted"
    program = shutil.which("fsck.erofs", path=SEARCH)
    subprocess.run([program, f"--extract={root}", guest.root], check=True, capture_output=True)
    library = root / "usr/lib/python3.11"
    if guest.interpreter.endswith("/python3.11"):
        assert (library / "os.pyc").exists()
        assert (library / "colorsys.pyc").exists(), "imported inside a function of the agent"
        assert not (library / "asyncio").exists()
    assert (root / guest.interpreter.lstrip("/")).exists()
    home = root / "usr/lib/holdfast"
    assert (home / "holdfast/guest/agent.pyc").exists()
    listed = (home / "modules.list").read_text().splitlines()
    assert listed
    assert "/usr/lib/modules/6.1.0/virtio_blk.ko" not in listed, "the initial RAM disk has loaded it"
    for line in listed:
        assert (root / line.split()[0].lstrip("/")).exists()
    for program in (*guest_root.PROGRAMS, "busybox"):
        assert os.access(root / guest_root.guest_program(program).lstrip("/"), os.X_OK)
    assert os.readlink(root / "bin") == "usr/bin"


def test_the_record_says_what_went_in(builder):
    guest = builder.build()
    record = msgspec.json.decode(Path(guest.root).with_name("guest.json").read_bytes())
    assert record["id"] == guest.id
    inputs = record["inputs"]
    for path in (
        builder.image,
        builder.agent / "guest/agent.py",
        guest_root.find_program("busybox"),
        guest_image.__file__,
    ):
        assert inputs[str(path)]["digest"]


def test_imports_for_type_checkers_do_not_count(tmp_path):
    source = tmp_path / "it.py"
    source.write_text(
        "from __future__ import annotations\n"
        "TYPE_CHECKING = False\n"
        "if TYPE_CHECKING:\n    import typing\nelse:\n    import bisect\n"
        "import os.path\nfrom holdfast.wire import frames\nfrom . import other\n"
        "def f():\n    from json import decoder\n"
    )
    found = closure.imports_of([source], "holdfast")
    assert found == ["__future__", "__future__.annotations", "bisect", "json", "json.decoder", "os.path"]


def test_libraries_of_a_program():
    loader = closure.loader_of(Path("/usr/bin/crun"))
    found = {path.name for path in closure.libraries(Path("/usr/bin/crun"), loader)}
    assert {"libc.so.6", Path(loader).name} <= found


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\x7fELF\x02\x01", b""])
def test_programs_that_are_none(tmp_path, content):
    path = tmp_path / "program"
    path.write_bytes(content)
    with pytest.raises((Unsupported, Corrupt)):
        closure.loader_of(path)
