"""The guest's disks, found, proved unused and ejected, on a made-up kernel whose time passes when somebody waits."""

from __future__ import annotations

import errno
import os
import shutil
import types
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import GuestFailed, NotFound, NotReleased, TimedOut
from holdfast.guest import disks
from holdfast.guest.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.guest.loop import Task


class Kernel:
    """A tree such as sysfs, and devices that open or do not.

    Attributes:
        now: seconds since the start.
        opened: every device that somebody tried to open, with the flags.
        errors: device -> what opening it fails with, one after the other; then it opens.
        broken: device -> what opening it always fails with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.opened: list[tuple[str, int]] = []
        self.errors: dict[str, list[int]] = {}
        self.broken: dict[str, int] = {}
        self._hosts: dict[int, str] = {}
        self._later: list[tuple[float, Callable[[], object]]] = []
        for folder in ("bus/pci/devices", "bus/scsi/devices", "class/block", "devices/pci0000:00"):
            (root / "sys" / folder).mkdir(parents=True)

    # -- what there is ------------------------------------------------------------------------

    def controller(self, number: int, host: int) -> None:
        """Finds a SCSI controller, as the host's number that is next."""
        address = f"0000:00:{0x10 + number:02x}.0"
        folder = self.root / f"sys/devices/pci0000:00/{address}"
        (folder / f"virtio{host + 3}/host{host}/target{host}:0:0").mkdir(parents=True)
        (folder / "driver_override").write_text("(null)\n")
        (self.root / "sys/bus/pci/devices" / address).symlink_to(folder)
        self._hosts[number] = f"{folder}/virtio{host + 3}/host{host}/target{host}:0:0/{host}:0:0:"

    def disk(self, controller: int, lun: int, name: str = "", partitions: tuple[int, ...] = ()) -> Path:
        """Finds a disk, which has no name yet if there is none; returns its folder."""
        folder = disk = self.root / f"{self._hosts[controller]}{lun}"
        link = self.root / "sys/bus/scsi/devices" / folder.name
        if not folder.exists():
            folder.mkdir()
            link.symlink_to(folder)
            for file in ("delete", "rescan"):
                (folder / file).write_text("")
        if name:
            disk = folder / "block" / name
            disk.mkdir(parents=True)
            (disk / "size").write_text("8\n")
            (self.root / "sys/class/block" / name).symlink_to(disk)
            for number in partitions:
                self.partition(name, f"{name}{number}")
        return folder

    def partition(self, disk: str, name: str) -> None:
        (self.root / "sys/class/block" / disk / name).mkdir()

    def gone(self, controller: int, lun: int) -> None:
        """Lets go of a disk."""
        folder = self.root / f"{self._hosts[controller]}{lun}"
        (self.root / "sys/bus/scsi/devices" / folder.name).unlink()
        shutil.rmtree(folder)

    # -- time ---------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], object]) -> None:
        """What happens then, if somebody waits as long."""
        self._later.append((when, action))

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        due = [action for when, action in self._later if when <= self.now]
        self._later = [(when, action) for when, action in self._later if when > self.now]
        for action in due:
            action()

    def run(self, task: Task) -> Any:
        """Runs a task to its end."""
        for _ in range(100_000):
            try:
                kind, seconds = next(task)
            except StopIteration as stop:
                return stop.value
            assert kind == "sleep"
            self.wait(seconds)
        raise AssertionError("it never ends")

    # -- what stands in for the module's own --------------------------------------------------

    def listdir(self, path: str) -> list[str]:
        return os.listdir(f"{self.root}{path}")

    def isdir(self, path: str) -> bool:
        return os.path.isdir(f"{self.root}{path}")

    def open_file(self, path: str, mode: str) -> Any:
        # In sysfs nobody makes files: what is not there cannot be written to.
        return open(f"{self.root}{path}", mode.replace("w", "r+"))

    def open(self, path: str, flags: int) -> int:
        self.opened.append((path, flags))
        left = self.errors.get(path)
        number = self.broken.get(path, 0) or (left.pop(0) if left else 0)
        if number:
            raise OSError(number, os.strerror(number), path)
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


class GuestsOs:
    """The module ``os`` in the guest; what is not about its files is the real one's."""

    def __init__(self, kernel: Kernel) -> None:
        self.listdir = kernel.listdir
        self.open = kernel.open
        self.path = types.SimpleNamespace(isdir=kernel.isdir)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Four controllers, found in another order than they are plugged in."""
    kernel = Kernel(tmp_path)
    for host, number in enumerate((2, 0, 3, 1), 1):
        kernel.controller(number, host)
    monkeypatch.setattr(disks, "os", GuestsOs(kernel))
    monkeypatch.setattr(disks, "open", kernel.open_file, raising=False)
    monkeypatch.setattr(disks, "monotonic", lambda: kernel.now)
    monkeypatch.setattr(disks, "places", disks.Scsi())
    return kernel


# -- finding ----------------------------------------------------------------------------------


def test_a_disk_that_is_there(kernel):
    kernel.disk(0, 5, "sdb")
    assert kernel.run(disks.wait_for_disk(0, 5)) == "/dev/sdb"
    assert kernel.now == 0.0
    [(device, flags)] = kernel.opened
    assert device == "/dev/sdb"
    assert not flags & (os.O_EXCL | os.O_RDWR)  # only whether it can be: nobody else is kept from it


def test_a_disk_that_comes_bit_by_bit(kernel):
    """First nothing, then its folder, its name, a node that is missing (ENOENT), one that does not open (ENXIO)."""
    kernel.errors["/dev/sda"] = [errno.ENOENT] * 3 + [errno.ENXIO] * 3
    kernel.at(1.0, lambda: kernel.disk(1, 0))
    kernel.at(2.0, lambda: (kernel.disk(1, 0) / "block").mkdir())
    kernel.at(3.0, lambda: kernel.disk(1, 0, "sda"))
    assert kernel.run(disks.wait_for_disk(1, 0)) == "/dev/sda"
    assert len(kernel.opened) == 7
    assert 3.0 < kernel.now < 3.1


def test_what_is_waited_for_comes_at_once_when_it_comes(kernel):
    """Each disk of each container waits here: the pauses are short."""
    kernel.at(0.0101, lambda: kernel.disk(0, 0, "sda"))
    kernel.run(disks.wait_for_disk(0, 0))
    assert kernel.now - 0.0101 < 0.005


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOMEDIUM, errno.EBUSY])
def test_another_error_is_none_that_passes(kernel, number):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = number
    with pytest.raises(GuestFailed, match="open disk /dev/sda") as failure:
        kernel.run(disks.wait_for_disk(0, 0))
    assert os.strerror(number) in failure.value.why
    assert kernel.now == 0.0


def test_several_devices_in_one_place(kernel):
    folder = kernel.disk(0, 0, "sda")
    (folder / "block/sdb").mkdir()
    with pytest.raises(GuestFailed, match="find disk 0:0: several devices: ") as failure:
        kernel.run(disks.wait_for_disk(0, 0))
    assert "'sda'" in failure.value.why
    assert "'sdb'" in failure.value.why
    assert kernel.opened == []


def test_who_waits_is_given_up_at_the_request_s_deadline(kernel, monkeypatch):
    """It has no deadline of its own: the loop's is the request's."""
    kernel.broken["/dev/sda"] = errno.ENXIO
    kernel.disk(0, 0, "sda")
    outcomes: list[tuple[object, BaseException | None]] = []
    loop = Loop()

    def done(result: object, error: BaseException | None) -> None:
        outcomes.append((result, error))
        loop.stop()

    monkeypatch.setattr("holdfast.guest.loop.monotonic", lambda: kernel.now)
    loop.after_round = lambda: kernel.wait(0.5)
    loop.spawn(disks.wait_for_disk(0, 0), 5.0, done)
    loop.run()
    [(result, error)] = outcomes
    assert result is None
    assert isinstance(error, TimedOut)
    assert 5.0 <= kernel.now <= 5.5


# -- controllers ------------------------------------------------------------------------------


def test_controllers_go_by_address(kernel):
    """The kernel's numbers and letters come in the order of discovery; the place on the PCI bus is what is fixed."""
    for letter, number in zip("abcd", (3, 1, 0, 2), strict=True):
        kernel.disk(number, 7, f"sd{letter}")
    found = [kernel.run(disks.wait_for_disk(number, 7)) for number in range(4)]
    assert found == ["/dev/sdc", "/dev/sdb", "/dev/sdd", "/dev/sda"]


@pytest.mark.parametrize("number", [-1, 4, 255])
def test_a_controller_that_no_machine_has(kernel, number):
    for task in (disks.wait_for_disk(number, 0), disks.prove_unused(number, 0), disks.eject(number, 0)):
        with pytest.raises(GuestFailed, match=f"find SCSI controller {number}: there are controllers 0 to 3"):
            kernel.run(task)


@pytest.mark.parametrize("missing", ["device", "virtio", "host"])
def test_a_controller_that_this_machine_has_not(kernel, missing):
    link = kernel.root / "sys/bus/pci/devices/0000:00:12.0"
    folder = link.resolve()
    if missing == "device":
        link.unlink()
    elif missing == "virtio":
        shutil.rmtree(folder / "virtio4")
    else:
        shutil.rmtree(folder / "virtio4/host1")
    with pytest.raises(GuestFailed, match="find SCSI controller 2"):
        kernel.run(disks.wait_for_disk(2, 0))
    kernel.disk(1, 0, "sda")
    assert kernel.run(disks.wait_for_disk(1, 0)) == "/dev/sda"


def test_a_controller_that_comes_late_is_found_by_the_next_try(kernel):
    link = kernel.root / "sys/bus/pci/devices/0000:00:10.0"
    folder = link.resolve()
    link.unlink()
    with pytest.raises(GuestFailed):
        kernel.run(disks.wait_for_disk(0, 0))
    link.symlink_to(folder)
    kernel.disk(0, 0, "sda")
    assert kernel.run(disks.wait_for_disk(0, 0)) == "/dev/sda"


# -- partitions -------------------------------------------------------------------------------


def test_a_partition(kernel):
    kernel.disk(0, 0, "sda", partitions=(1, 2))
    assert kernel.run(disks.wait_for_disk(0, 0, 2)) == "/dev/sda2"
    assert [device for device, _ in kernel.opened] == ["/dev/sda2"]


def test_a_partition_that_comes_late(kernel):
    """The kernel reads the table when the disk can be opened already; the partition's node comes after its folder."""
    kernel.disk(0, 0, "sda", partitions=(1,))
    kernel.errors["/dev/sda"] = [errno.ENXIO] * 5
    kernel.errors["/dev/sda2"] = [errno.ENOENT, errno.ENXIO]
    kernel.at(1.5, lambda: kernel.partition("sda", "sda2"))
    assert kernel.run(disks.wait_for_disk(0, 0, 2)) == "/dev/sda2"
    assert 1.5 < kernel.now < 1.6


@pytest.mark.parametrize(
    ("there", "found"),
    [((), "no partitions"), ((1,), "partitions 1"), ((10, 2, 1), "partitions 1, 2, 10")],
)
def test_a_partition_that_never_comes(kernel, there, found):
    kernel.disk(0, 0, "sda", partitions=there)
    with pytest.raises(NotFound) as failure:
        kernel.run(disks.wait_for_disk(0, 0, 3))
    assert failure.value.code == "no-partition"
    assert str(failure.value) == f"find partition 3 of disk 0:0: the guest's kernel finds {found} on it"
    assert 2.0 < kernel.now < 2.1


def test_a_partition_s_time_begins_when_the_disk_opens(kernel):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.ENXIO
    kernel.at(10.0, kernel.broken.clear)
    with pytest.raises(NotFound):
        kernel.run(disks.wait_for_disk(0, 0, 1))
    assert 12.0 < kernel.now < 12.1


def test_a_partition_of_a_disk_that_does_not_open(kernel):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.EIO
    with pytest.raises(GuestFailed, match="open disk /dev/sda: Input/output error"):
        kernel.run(disks.wait_for_disk(0, 0, 1))


# -- proving that nothing uses it -------------------------------------------------------------


@pytest.mark.parametrize("partition", [0, 2])
def test_a_disk_that_nothing_uses(kernel, partition):
    kernel.disk(0, 0, "sda", partitions=(1, 2))
    kernel.run(disks.prove_unused(0, 0, partition))
    [(device, flags)] = kernel.opened
    assert device == ("/dev/sda2" if partition else "/dev/sda")
    assert flags & os.O_EXCL  # or it would open whatever is mounted
    assert not flags & (os.O_CREAT | os.O_RDWR)
    assert kernel.now == 0.0


def test_a_disk_that_is_busy_for_a_moment(kernel):
    """The kernel itself looks for partitions on a disk that has just come."""
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.EBUSY
    kernel.at(0.4, kernel.broken.clear)
    kernel.run(disks.prove_unused(0, 0))
    assert 0.4 <= kernel.now < 0.41


def test_a_disk_that_stays_busy(kernel):
    kernel.disk(0, 9, "sda")
    kernel.broken["/dev/sda"] = errno.EBUSY
    with pytest.raises(NotReleased, match="unmount disk 0:9: the guest still uses it") as failure:
        kernel.run(disks.prove_unused(0, 9))
    assert failure.value.code == "disk-busy"
    assert 0.5 < kernel.now < 0.6


@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENOENT])
def test_what_cannot_be_opened_is_not_busy(kernel, number):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = number
    kernel.run(disks.prove_unused(0, 0))
    assert kernel.now == 0.0


def test_an_error_that_says_nothing_about_use(kernel):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        kernel.run(disks.prove_unused(0, 0))


@pytest.mark.parametrize("named", [False, True])
def test_nothing_uses_what_is_not_there(kernel, named):
    if named:  # its folder is, but it has no device yet
        kernel.disk(0, 0)
    kernel.run(disks.prove_unused(0, 0))
    assert kernel.opened == []


# -- ejecting ---------------------------------------------------------------------------------


def test_eject_waits_until_the_disk_is_gone(kernel):
    """When the host unplugs it, the kernel must not use it any more."""
    folder = kernel.disk(0, 0, "sda")
    written = []
    kernel.at(5.0, lambda: (written.append((folder / "delete").read_text()), kernel.gone(0, 0)))
    kernel.run(disks.eject(0, 0))
    assert written == ["1\n"]
    assert 5.0 <= kernel.now < 5.01


def test_eject_of_what_is_gone_is_success(kernel):
    kernel.run(disks.eject(0, 0))
    kernel.disk(0, 0, "sda")
    kernel.gone(0, 0)
    kernel.run(disks.eject(0, 0))
    assert kernel.now == 0.0


def test_eject_of_what_goes_by_itself_meanwhile(kernel):
    kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.EBUSY
    kernel.at(0.1, lambda: (kernel.gone(0, 0), kernel.broken.update({"/dev/sda": errno.ENOENT})))
    kernel.run(disks.eject(0, 0))
    assert 0.1 <= kernel.now < 0.11


def test_eject_takes_nothing_from_who_uses_it(kernel):
    folder = kernel.disk(0, 0, "sda")
    kernel.broken["/dev/sda"] = errno.EBUSY
    with pytest.raises(NotReleased) as failure:
        kernel.run(disks.eject(0, 0))
    assert failure.value.code == "disk-busy"
    assert (folder / "delete").read_text() == ""
    kernel.broken.clear()
    kernel.at(kernel.now + 1, lambda: kernel.gone(0, 0))
    kernel.run(disks.eject(0, 0))


def test_eject_of_one_leaves_the_others(kernel):
    kernel.disk(0, 0, "sda")
    others = [kernel.disk(0, 1, "sdb"), kernel.disk(1, 0, "sdc")]
    kernel.at(0.1, lambda: kernel.gone(0, 0))
    kernel.run(disks.eject(0, 0))
    assert [(folder / "delete").read_text() for folder in others] == ["", ""]
    assert [device for device, _ in kernel.opened] == ["/dev/sda"]


def test_a_disk_that_the_kernel_keeps(kernel):
    kernel.disk(0, 0, "sda")
    with pytest.raises(NotReleased, match="eject disk 0:0: the guest's kernel keeps it"):
        kernel.run(disks.eject(0, 0))
    assert 30.0 < kernel.now < 30.1


def test_rescan(kernel):
    folder = kernel.disk(0, 0, "sda")
    disks.rescan(0, 0)
    assert (folder / "rescan").read_text() == "1\n"


# -- without a machine ------------------------------------------------------------------------


def test_places_that_the_host_tells(kernel, monkeypatch):
    """Devices of a sandbox without controllers: their names end in a digit, and partitions' in another."""
    told = disks.Told()
    monkeypatch.setattr(disks, "places", told)
    block = kernel.root / "sys/class/block/loop7"
    kernel.at(1.0, lambda: told.devices.update({(0, 3): "loop7"}))
    kernel.at(1.5, lambda: (block / "loop7p2").mkdir(parents=True))
    assert kernel.run(disks.wait_for_disk(0, 3, 2)) == "/dev/loop7p2"
    with pytest.raises(NotFound, match="the guest's kernel finds partitions 2 on it"):
        kernel.run(disks.wait_for_disk(0, 3, 1))
    kernel.opened.clear()
    kernel.run(disks.prove_unused(0, 3, 2))
    assert [device for device, _ in kernel.opened] == ["/dev/loop7p2"]
    kernel.broken["/dev/loop7"] = errno.EBUSY
    with pytest.raises(NotReleased):
        kernel.run(disks.eject(0, 3))
    assert told.names(0, 3) == ["loop7"]
    kernel.broken.clear()
    for _ in range(2):
        kernel.run(disks.eject(0, 3))
        assert told.names(0, 3) == []
