"""Which kernel is chosen, what is said of one that cannot be used, and in which order modules load."""

from __future__ import annotations

import gzip
import lzma
import struct
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import NotFound, Unsupported
from holdfast.machine import kernel, vmlinux

if TYPE_CHECKING:
    from pathlib import Path

COMPLETE = {
    "drivers/virtio/virtio_pci": ["drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio", "lib/virtio_ring"],
    "drivers/virtio/virtio_pci_modern_dev": [],
    "drivers/virtio/virtio": ["lib/virtio_ring"],
    "lib/virtio_ring": [],
    "drivers/block/virtio_blk": ["drivers/virtio/virtio", "lib/virtio_ring"],
    "fs/erofs/erofs": ["lib/libcrc32c"],
    "lib/libcrc32c": [],
    "crypto/crc32c_generic": [],
    "drivers/char/virtio_console": ["drivers/virtio/virtio", "lib/virtio_ring"],
    "drivers/scsi/virtio_scsi": ["drivers/scsi/scsi_mod"],
    "drivers/scsi/scsi_mod": [],
    "drivers/scsi/sd_mod": ["drivers/scsi/scsi_mod"],
    "fs/9p/9p": ["net/9p/9pnet"],
    "net/9p/9pnet": [],
    "net/9p/9pnet_virtio": ["net/9p/9pnet"],
    "fs/overlayfs/overlay": [],
    "fs/ext4/ext4": [],
}


class FakeHost:
    """A /boot and a /lib/modules below a folder."""

    def __init__(self, folder: Path) -> None:
        self.boot = folder / "boot"
        self.modules = folder / "modules"
        self.boot.mkdir()
        self.modules.mkdir()

    def add(self, release: str, without: tuple[str, ...] = (), builtin: tuple[str, ...] = (), suffix: str = "") -> Path:
        """Install a kernel that lacks ``without``."""
        image = self.boot / f"vmlinuz-{release}"
        image.write_bytes(boot_image(release))
        folder = self.modules / release
        folder.mkdir()
        files = {name: needs for name, needs in COMPLETE.items() if not name.endswith((*without, *builtin))}
        lines = []
        for name, needs in files.items():
            target = folder / f"kernel/{name}.ko{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            data = b"\x7fELF" + name.encode()
            target.write_bytes(lzma.compress(data) if suffix == ".xz" else gzip.compress(data) if suffix else data)
            lines.append(f"kernel/{name}.ko{suffix}:" + "".join(f" kernel/{need}.ko{suffix}" for need in needs))
        (folder / "modules.dep").write_text("\n".join(lines) + "\n")
        (folder / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
        (folder / "modules.softdep").write_text("softdep libcrc32c pre: crc32c\nsoftdep ext4 pre: crypto-crc32c\n")
        return image

    def find(self, path: Path | None = None) -> tuple[kernel.Kernel, kernel.ModuleTree]:
        return kernel.find(path, boot=self.boot, modules=self.modules)


def boot_image(release: str, payload: bytes = b"") -> bytes:
    """What a bzImage begins with: one sector of setup code, and in the header where its parts are."""
    head = bytearray(2048)
    head[0x1F1] = 1  # sectors of setup code, besides the first
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, 0x180)  # counted from 0x200
    text = release.encode() + b" (somebody) #1\0"
    head[0x380 : 0x380 + len(text)] = text
    struct.pack_into("<II", head, 0x248, 1024, len(payload))
    return bytes(head) + payload


@pytest.fixture
def host(tmp_path) -> FakeHost:
    return FakeHost(tmp_path)


def test_no_kernel_at_all(host):
    with pytest.raises(NotFound) as caught:
        host.find()
    assert caught.value.code == "kernel-not-found"
    assert "apt install linux-image-amd64" in caught.value.hint


def test_kernel_asked_for_is_not_there(host):
    with pytest.raises(NotFound) as caught:
        host.find(host.boot / "vmlinuz-none")
    assert caught.value.code == "kernel-not-found"
    assert caught.value.subject.endswith("vmlinuz-none")


def test_kernel_without_its_modules(host):
    image = host.add("6.1.0")
    (host.modules / "6.1.0/modules.dep").unlink()
    with pytest.raises(NotFound) as caught:
        host.find(image)
    assert caught.value.code == "kernel-modules-not-found"
    assert "depmod 6.1.0" in caught.value.hint


def test_cloud_kernel_lacks_9p(host):
    image = host.add("6.1.0-56-cloud-amd64", without=("9p/9p", "9pnet", "9pnet_virtio"))
    with pytest.raises(Unsupported) as caught:
        host.find()
    error = caught.value
    assert error.code == "kernel-lacks-9p"
    assert error.subject == str(image)
    assert "9pnet_virtio" in error.why
    assert "mount shares" in error.why
    assert "install linux-image-amd64" in error.hint


def test_kernel_lacks_something_else(host):
    host.add("6.1.0", without=("overlay",))
    with pytest.raises(Unsupported) as caught:
        host.find()
    assert caught.value.code == "kernel-lacks-module"
    assert "overlay" in caught.value.why


def test_newest_that_can_is_chosen(host):
    host.add("6.1.0-9")
    wanted = host.add("6.1.0-56")
    host.add("6.12.3-cloud", without=("9p/9p",))
    host.add("6.1.0-100-rescue")
    chosen, _tree = host.find()
    assert chosen.path == wanted
    assert chosen.release == "6.1.0-56"
    assert chosen.modules == host.modules / "6.1.0-56"


@pytest.mark.parametrize(
    ("older", "newer"),
    [("6.1.0-9", "6.1.0-56"), ("6.9.1", "6.12.0"), ("6.1.0-rc9", "6.1.0-1"), ("6.1.0-56-amd64", "6.1.0-57-amd64")],
)
def test_releases_compare_as_people_do(host, older, newer):
    host.add(newer)
    host.add(older)
    names = [path.name for path in kernel.candidates(host.boot, host.modules)]
    assert names == [f"vmlinuz-{newer}", f"vmlinuz-{older}"]


def test_release_is_the_one_in_the_header(host):
    image = host.add("6.1.0")
    copy = host.boot / "my-kernel"
    copy.write_bytes(image.read_bytes())
    assert host.find(copy)[0].release == "6.1.0"


def test_file_that_is_no_kernel(host):
    path = host.boot / "something"
    path.write_bytes(b"nothing")
    with pytest.raises(Unsupported):
        host.find(path)


def test_built_in_counts_and_is_not_loaded(host):
    host.add("6.1.0", builtin=("fs/ext4/ext4", "fs/overlayfs/overlay"))
    _kernel, tree = host.find()
    assert tree.order("overlay", "ext4") == []


def test_configuration_counts_where_the_list_is_silent(host):
    host.add("6.1.0", without=("erofs",))
    (host.boot / "config-6.1.0").write_text("# CONFIG_X is not set\nCONFIG_EROFS_FS=y\n")
    assert host.find()[1].missing() == []


def test_order_has_every_module_after_what_it_needs(host):
    host.add("6.1.0")
    _kernel, tree = host.find()
    order = tree.order(*kernel.STAGE1, *kernel.STAGE2)
    assert len(order) == len(set(order))
    for name, needs in COMPLETE.items():
        for need in needs:
            assert order.index(kernel.module_name(need)) < order.index(kernel.module_name(name))
    # Asked for by modules.softdep, by the name of an algorithm.
    assert order.index("crc32c_generic") < order.index("libcrc32c")


def test_a_circle_ends(tmp_path):
    (tmp_path / "modules.dep").write_text("a.ko: b.ko\nb.ko: a.ko\n")
    assert sorted(kernel.ModuleTree(tmp_path).order("a")) == ["a", "b"]


def test_unknown_modules_are_left_out(host):
    host.add("6.1.0")
    assert host.find()[1].order("no_such_module") == []


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_compressed_modules_are_decompressed(host, suffix):
    host.add("6.1.0", suffix=suffix)
    assert host.find()[1].read("9pnet_virtio") == b"\x7fELFnet/9p/9pnet_virtio"


def test_module_that_cannot_be_decompressed(host):
    host.add("6.1.0", suffix=".xz")
    _kernel, tree = host.find()
    tree.file("overlay").write_bytes(b"\xfd7zXZ\0garbage")
    with pytest.raises(Unsupported) as caught:
        tree.read("overlay")
    assert caught.value.code == "kernel-module-format"


def test_signatures_are_taken_off(host):
    host.add("6.1.0")
    _kernel, tree = host.find()
    file = tree.file("overlay")
    plain = file.read_bytes()
    signature = b"S" * 300
    file.write_bytes(plain + signature + struct.pack(">8xI", len(signature)) + b"~Module signature appended~\n")
    assert tree.read("overlay") == plain


def elf(note: int = 18) -> bytes:
    """A kernel in little: a note, and a loaded segment that ends in zeros, then something not loaded."""
    notes = struct.pack("<III", 4, 8, 6) + b"Xen\0" + bytes(8) + struct.pack("<III4sQ", 4, 8, note, b"Xen\0", 0x1000)
    code = b"code" * 8 + bytes(64)
    header = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, 0, 64, 999, 0, 64, 56, 2, 64, 9, 8)
    start = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 5, start + len(notes), 0, 0, len(code), len(code), 1)
    noted = struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    return header + load + noted + notes + code + b"sections that nobody loads"


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, lambda data: data])
def test_kernel_is_unpacked_and_trimmed(compress):
    packed = compress(elf())
    image = packed if packed.startswith(b"\x7fELF") else boot_image("6.1", packed + b"\x12\x34\0\0")
    unpacked = vmlinux.unpack(image)
    assert unpacked.startswith(b"\x7fELF")
    assert unpacked.endswith(b"code")
    assert struct.unpack_from("<Q", unpacked, 64 + 32) == (32,)  # in the file
    assert struct.unpack_from("<Q", unpacked, 64 + 40) == (96,)  # in memory, as before
    assert struct.unpack_from("<Q", unpacked, 40) == (0,)  # no section headers


@pytest.mark.parametrize(
    "payload", [b"", b"what is this", b"\xfd7zXZ\0broken", lzma.compress(b"no ELF"), lzma.compress(elf(note=3))]
)
def test_kernel_that_cannot_be_entered_stays_packed(payload):
    image = boot_image("6.1", payload)
    assert vmlinux.unpack(image) == image
