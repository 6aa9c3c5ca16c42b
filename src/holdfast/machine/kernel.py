"""The guest's kernel: one of the host's own, chosen because its modules can do what a pod needs.

A distribution's kernel is what the host already trusts, updates and has the modules of.  It is chosen
from what is on disk (``modules.dep``, ``modules.builtin``, the configuration beside it), never by
starting it, so a kernel that cannot work - Debian's ``-cloud`` flavour has no 9p - is refused by name
before anything is built.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast.errors import NotFound, Unsupported
from holdfast.machine.vmlinux import decompress

BOOT = Path("/boot")
MODULES = Path("/lib/modules")
_SIGNED = b"~Module signature appended~\n"
_INSTALL = "apt install linux-image-amd64, or the full kernel package of this distribution"


class Need(NamedTuple):
    """A module without which no pod works, and the configuration symbol that says it is built in."""

    module: str
    symbol: str
    purpose: str


#: What the kernel must have, in the order it is used.
NEEDS = (
    Need("virtio_pci", "VIRTIO_PCI", "reach any device"),
    Need("virtio_blk", "VIRTIO_BLK", "read the root disk"),
    Need("erofs", "EROFS_FS", "mount the root disk and image layers"),
    Need("virtio_console", "VIRTIO_CONSOLE", "talk to the agent"),
    Need("virtio_scsi", "SCSI_VIRTIO", "attach disks"),
    Need("sd_mod", "BLK_DEV_SD", "attach disks"),
    Need("9p", "9P_FS", "mount shares"),
    Need("9pnet_virtio", "NET_9P_VIRTIO", "mount shares"),
    Need("overlay", "OVERLAY_FS", "put layers and scratch together"),
    Need("ext4", "EXT4_FS", "mount scratch disks"),
)
#: What the initial RAM disk loads to reach the root disk.
STAGE1 = ("virtio_pci", "virtio_blk", "erofs")
#: What is loaded at every start, from the root disk.  ``virtio_rng`` may be absent.
STAGE2 = ("virtio_console", "virtio_scsi", "sd_mod", "9p", "9pnet_virtio", "overlay", "ext4", "virtio_rng")
#: What lies on the root disk for the agent to load when a mount asks for it; each may be absent.
ON_DEMAND = (
    "xfs", "squashfs", "isofs", "fuse", "loop", "dm_mod", "dm_verity", "dm_crypt", "aesni_intel", "virtio_pmem",
    "nd_pmem",
)  # fmt: skip

# ``modules.softdep`` and the crypto layer ask for an algorithm by name, and user space's modprobe would
# resolve the name to every driver of it.  The guest has no modprobe, so the one to load is said here.
_ALGORITHMS = {"crc32c": "crc32c_generic", "crct10dif": "crct10dif_generic"}
# Found out by loading them: the kernel requests these at run time, which no dependency file tells.
# algif_skcipher: cryptsetup writes its header with it, and without it makes a mapped device for that alone.
_REQUESTED = {"dm_crypt": ("xts", "essiv", "algif_skcipher"), "virtio_pmem": ("nd_pmem",)}


class Kernel(msgspec.Struct, frozen=True):
    """A kernel file and the folder of the modules built with it."""

    path: Path
    release: str
    modules: Path


class ModuleTree:
    """What ``modules.dep`` and its companions say about one kernel's modules; read once, never written."""

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        self.folder = folder
        self._files: dict[str, str] = {}
        self._depends: dict[str, list[str]] = {}
        for line in _lines(folder / "modules.dep"):
            file, _, depends = line.partition(":")
            name = module_name(file)
            self._files[name] = file
            self._depends[name] = [module_name(other) for other in depends.split()]
        self._builtin = {module_name(line) for line in _lines(folder / "modules.builtin")}
        self._soft = _soft_dependencies(folder / "modules.softdep")
        self._config = {line for line in _lines(config) if line.endswith("=y")} if config else set[str]()

    def __contains__(self, name: str) -> bool:
        name = module_name(name)
        return name in self._files or name in self._builtin

    def is_built_in(self, name: str, symbol: str = "") -> bool:
        """Whether the kernel has it without any file being loaded."""
        return module_name(name) in self._builtin or (bool(symbol) and f"CONFIG_{symbol}=y" in self._config)

    def missing(self) -> list[Need]:
        """The needs that this kernel has neither as a module nor built in."""
        return [need for need in NEEDS if need.module not in self and not self.is_built_in(need.module, need.symbol)]

    def order(self, *names: str) -> list[str]:
        """The modules to load for ``names``, each after all it depends on; built-in ones are left out.

        Names that the kernel has not got are skipped: :meth:`missing` is what refuses a kernel.
        """
        ordered: dict[str, None] = {}
        visiting: set[str] = set()

        def visit(name: str) -> None:
            if name in ordered or name in visiting or name not in self._files or name in self._builtin:
                return
            visiting.add(name)
            # modules.dep lists all dependencies of a module, the deepest last.
            for other in (*self._wanted_first(name), *reversed(self._depends[name])):
                visit(other)
            ordered[name] = None

        for name in names:
            visit(module_name(name))
        return list(ordered)

    def file(self, name: str) -> Path:
        """The module's file."""
        return self.folder / self._files[module_name(name)]

    def read(self, name: str) -> bytes:
        """The module, decompressed: the guest loads it from a disk that is compressed once, or not at all."""
        path = self.file(name)
        data = path.read_bytes()
        if path.suffix != ".ko":
            data = decompress(data)
        if not data.startswith(b"\x7fELF"):
            raise Unsupported(
                "read kernel module",
                subject=path,
                why="it is not an ELF file, nor one compressed in a way that can be undone here",
                hint="apt install zstd" if path.suffix == ".zst" else f"reinstall the modules of {self.folder.name}",
                code="kernel-module-format",
            )
        return _unsigned(data)

    def _wanted_first(self, name: str) -> list[str]:
        soft = [_ALGORITHMS.get(word.removeprefix("crypto-"), module_name(word)) for word in self._soft.get(name, ())]
        return [*soft, *_REQUESTED.get(name, ())]


def module_name(file: str) -> str:
    """``kernel/drivers/md/dm-mod.ko.xz`` is the module ``dm_mod``."""
    return file.strip().rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def candidates(boot: Path = BOOT, modules: Path = MODULES) -> list[Path]:
    """The kernel files installed on this host, newest release first."""
    found = [*boot.glob("vmlinuz-*"), *modules.glob("*/vmlinuz")]
    # Rescue kernels are copies of an older one that an update leaves behind.
    return sorted((path for path in found if "rescue" not in path.name), key=_age, reverse=True)


def find(path: Path | None = None, *, boot: Path = BOOT, modules: Path = MODULES) -> tuple[Kernel, ModuleTree]:
    """The kernel at ``path``, or else the newest of this host that can run pods.

    Raises:
        NotFound: there is no kernel, or none with its modules.
        Unsupported: what was found lacks something; ``code`` is ``kernel-lacks-9p`` when it is 9p.
    """
    if path is not None:
        return _check(path, boot, modules)
    refused: list[NotFound | Unsupported] = []
    for candidate in candidates(boot, modules):
        try:
            return _check(candidate, boot, modules)
        except (NotFound, Unsupported) as error:
            refused.append(error)
    if refused:
        raise refused[0]
    raise NotFound("find guest kernel", subject=boot, why="no vmlinuz-* there", hint=_INSTALL, code="kernel-not-found")


def release_of(path: Path) -> str:
    """The release that the kernel file itself names, else the one in its file name.

    Raises:
        NotFound: the file is not there.
        Unsupported: neither tells a release.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x8000)
    except OSError as error:
        raise NotFound("read guest kernel", subject=path, why=error, hint=_INSTALL, code="kernel-not-found") from error
    if head[0x202:0x206] == b"HdrS":  # the x86 boot protocol: an offset, counted from 0x200, of a text
        start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
        words = head[start:].split(b"\0", 1)[0].split()
        if words:
            return words[0].decode("ascii", "replace")
    if path.name.startswith("vmlinuz"):
        return release_by_name(path)
    raise Unsupported("read guest kernel", subject=path, why="neither its header nor its name tells its release")


def release_by_name(path: Path) -> str:
    """The release in ``/boot/vmlinuz-RELEASE`` or ``/lib/modules/RELEASE/vmlinuz``."""
    return path.parent.name if path.name == "vmlinuz" else path.name.removeprefix("vmlinuz-")


def _check(path: Path, boot: Path, modules: Path) -> tuple[Kernel, ModuleTree]:
    release = release_of(path)
    folder = modules / release
    if not (folder / "modules.dep").is_file():
        raise NotFound(
            "find modules of guest kernel",
            subject=path,
            why=f"{folder}/modules.dep is not there",
            hint=f"install the modules of {release}, or run: depmod {release}",
            code="kernel-modules-not-found",
        )
    configs = (boot / f"config-{release}", folder / "config", path.with_name(f"config-{release}"))
    tree = ModuleTree(folder, next((config for config in configs if config.is_file()), None))
    missing = tree.missing()
    if missing:
        raise _lacking(path, release, missing)
    return Kernel(path, release, folder), tree


def _lacking(path: Path, release: str, missing: list[Need]) -> Unsupported:
    without_9p = any(need.module in ("9p", "9pnet_virtio") for need in missing)
    purposes = dict.fromkeys(need.purpose for need in missing)
    return Unsupported(
        "use guest kernel",
        subject=path,
        why=f"{release} has no {', '.join(need.module for need in missing)}, needed to {', '.join(purposes)}",
        hint=("cloud flavours leave 9p out: " if without_9p else "") + _INSTALL,
        code="kernel-lacks-9p" if without_9p else "kernel-lacks-module",
    )


def _unsigned(module: bytes) -> bytes:
    """``module`` without the signature that follows it, if one does.

    The kernel checks a signature that is there, which costs an emulated CPU up to 30 ms a module, and
    loads one without.  Whoever could exchange a module on the root disk could exchange the kernel.
    """
    if not module.endswith(_SIGNED):
        return module
    info = len(module) - len(_SIGNED) - 12  # struct module_signature; its last word is the length
    size = int.from_bytes(module[info + 8 : info + 12], "big")
    return module[: info - size] if 0 < size < info else module


def _lines(path: Path | None) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    except FileNotFoundError:
        return []


def _soft_dependencies(path: Path) -> dict[str, list[str]]:
    """``softdep NAME pre: A B post: C``: what is to be loaded before NAME."""
    found: dict[str, list[str]] = {}
    for line in _lines(path):
        words = line.split()
        if len(words) < 3 or words[0] != "softdep" or "pre:" not in words:
            continue
        before = words[words.index("pre:") + 1 :]
        if "post:" in before:
            before = before[: before.index("post:")]
        found.setdefault(module_name(words[1]), []).extend(word for word in before if ":" not in word)
    return found


def _age(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|[^\d.-]+", release_by_name(path))
    # Numbers compare as numbers, and above words: 6.1.0-56 is newer than 6.1.0-rc9.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], str(path)
