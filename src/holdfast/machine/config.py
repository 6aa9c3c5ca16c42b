"""What a machine is made of, as data, and the QEMU command line that makes it."""

from __future__ import annotations

import hashlib

import msgspec

from holdfast.machine import ports
from holdfast.machine.guest_image import GuestImage  # noqa: TC001  msgspec reads the type
from holdfast.machine.sandbox import CONTROLLERS, LUNS

QEMU = "/usr/bin/qemu-system-x86_64"
#: Changes whenever the command line changes in a way that a saved machine would not fit.
MACHINE_VERSION = 2
MIN_MEMORY_BYTES = 96 << 20
DEFAULT_MEMORY_BYTES = 256 << 20
#: What q35 can have without interrupt remapping.
MOST_CPUS = 255

#: PCI device numbers on bus 0.  The agent finds SCSI controllers by theirs (guest/disks.py).
_SLOT_ROOT, _SLOT_SERIAL, _SLOT_9P, _SLOT_RNG, _SLOT_SCSI = 0x3, 0x4, 0x5, 0x6, 0x10

#: ``panic=-1`` with ``-no-reboot`` ends QEMU when the guest's kernel dies.  The self-tests of the crypto modules cost
#: 0.17 s of a boot under TCG; nothing else that was tried was worth more than the noise.
_KERNEL_COMMAND_LINE = "console=ttyS0 quiet panic=-1 random.trust_cpu=on cryptomgr.notests noreplace-smp audit=0"


class MachineConfig(msgspec.Struct, frozen=True):
    """A machine: what it runs and how big it is.

    Attributes:
        accelerator: ``kvm`` or ``tcg``.
        memory_bytes: guest RAM.
        cpus: virtual processors.
        qemu_version: the text that ``qemu --version`` starts with; part of the key of a save.
        expandable: with places for persistent memory and PCI functions; see ``ports``.
    """

    guest: GuestImage
    accelerator: str
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    cpus: int = 1
    qemu_version: str = ""
    expandable: bool = False

    @property
    def key(self) -> str:
        """Names the saves that fit this machine: 24 hexadecimal digits."""
        parts = (
            MACHINE_VERSION, self.guest.id, self.accelerator, self.memory_bytes, self.cpus, self.qemu_version,
            _KERNEL_COMMAND_LINE, *(("expandable",) if self.expandable else ()),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class Wiring(msgspec.Struct, frozen=True):
    """What differs between two runs of the same machine.

    Attributes:
        ram_path: the file that backs guest RAM.
        ram_shared: write RAM to the file (a boot to be saved) or keep changes private (a clone).
        export: folder served over 9p.
        qmp_fd, agent_fd: QEMU's ends of the socket pairs.
        incoming: wait for saved device state instead of booting.
    """

    ram_path: str
    ram_shared: bool
    export: str
    qmp_fd: int
    agent_fd: int
    incoming: bool = False


def command_line(config: MachineConfig, wiring: Wiring, vm_generation: str) -> list[str]:
    """QEMU's argv.  Everything has a fixed PCI address, so that a save fits and the guest finds its disks."""
    kvm = config.accelerator == "kvm"
    plain = f"size={config.memory_bytes // (1 << 20)}M"
    memory = ports.memory_argument(config.memory_bytes) if config.expandable else plain
    ram = f"memory-backend-file,id=ram,size={config.memory_bytes},mem-path={_escape(wiring.ram_path)}"
    argv = [
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", "q35,memory-backend=ram,hpet=off,usb=off,vmport=off,smm=off,sata=off,smbus=off,dump-guest-core=off",
        "-accel", "kvm" if kvm else "tcg", "-cpu", "host" if kvm else "max",
        "-m", memory, "-smp", str(config.cpus),
        "-object", f"{ram},share={'on' if wiring.ram_shared else 'off'}",
        "-kernel", config.guest.kernel, "-initrd", config.guest.initrd, "-append", _KERNEL_COMMAND_LINE,
        "-chardev", f"socket,id=qmp,fd={wiring.qmp_fd}", "-mon", "chardev=qmp,mode=control",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-blockdev", f"driver=file,node-name=root,filename={_escape(config.guest.root)},read-only=on,locking=off",
        "-device", f"virtio-blk-pci,drive=root,addr={_SLOT_ROOT:#x}",
        "-device", f"virtio-serial-pci,id=serial,addr={_SLOT_SERIAL:#x}",
        "-chardev", f"socket,id=agent,fd={wiring.agent_fd}",
        "-device", "virtserialport,bus=serial.0,chardev=agent,name=holdfast.agent",
        "-fsdev", f"local,id=shares,path={_escape(wiring.export)},security_model=passthrough,multidevs=remap",
        # The same folder three times, in one PCI slot: one for each cache mode (guest/storage.py).
        "-device", f"virtio-9p-pci,fsdev=shares,mount_tag=holdfast,addr={_SLOT_9P:#x},multifunction=on",
        "-device", f"virtio-9p-pci,fsdev=shares,mount_tag=holdfast-none,addr={_SLOT_9P:#x}.1",
        "-device", f"virtio-9p-pci,fsdev=shares,mount_tag=holdfast-loose,addr={_SLOT_9P:#x}.2",
        "-device", f"virtio-rng-pci,addr={_SLOT_RNG:#x}",
        "-device", f"vmgenid,guid={vm_generation}",
    ]  # fmt: skip
    for number in range(CONTROLLERS):
        address = f"addr={_SLOT_SCSI + number:#x}"
        argv += ["-device", f"virtio-scsi-pci,id=scsi{number},{address},num_queues=1"]
    if config.expandable:
        argv += ports.arguments()
    if wiring.incoming:  # deferred: which parts of RAM are not in the state must be said first, over QMP
        argv += ["-incoming", "defer"]
    assert LUNS <= 16383  # virtio-scsi's own limit
    return argv


def _escape(path: str) -> str:
    """QEMU's option parser ends a value at a comma; a doubled one stands for itself."""
    return path.replace(",", ",,")
