"""The file of a saved pod: what is written comes back, sparse; what is anything else is refused before it is used."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import Corrupt, HoldfastError, InvalidInput, NotFound
from holdfast.pod import restoring, savefile
from holdfast.pod.savefile import Manifest, Member, Needs, Reference
from holdfast.pod.saving import NewFile, mark_of
from holdfast.storage.restore import SavedContainer, SavedMount, SavedPod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
NEEDS = Needs("ab" * 16, "6.1", "QEMU 7.2", "tcg", "", 4 * MIB, 1, expandable=False, key="0" * 24)


def sparse(size: int, parts: dict[int, bytes]) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    for at, data in parts.items():
        os.pwrite(fd, data, at)
    return fd


@pytest.fixture
def sources() -> Iterator[dict[str, int]]:
    """Descriptors of members, in their order."""
    made = {
        "record": sparse(0, {0: b"a record"}),
        "ram": sparse(4 * MIB, {0: b"\1" * 5000, MIB: b"\2" * 4096, 3 * MIB: bytes(MIB), 4 * MIB - 1: b"\3"}),
        "state": sparse(0, {0: os.urandom(70_001)}),
        "disks/0": sparse(1 << 44, {5 << 40: b"far out"}),
        "disks/2": sparse(0, {}),
    }
    yield made
    for fd in made.values():
        os.close(fd)


def manifest_of(sources: dict[str, int], **changed: Any) -> Manifest:
    members = tuple(savefile.describe(name, fd) for name, fd in sources.items())
    reference = Reference(1, "layers/a.erofs", block_device=False, size_bytes=1, mark="ends x", diff_id="sha256:a")
    manifest = Manifest(savefile.FORMAT_VERSION, "0.1", "web", 1, NEEDS, members, (reference,), SavedPod())
    return msgspec.structs.replace(manifest, **changed)


@pytest.fixture
def saved(sources: dict[str, int], tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    with NewFile(path) as new:
        savefile.write(new.fd, manifest_of(sources), list(sources.values()))
        new.publish()
    return path


def load(path: Path) -> Manifest:
    """Reads everything, the data as well."""
    fd = os.open(path, os.O_RDONLY)
    try:
        manifest, offsets = savefile.read(fd)
        for member, offset in zip(manifest.members, offsets, strict=True):
            target = os.memfd_create("target")
            try:
                savefile.copy_in(fd, offset, member, target)
            finally:
                os.close(target)
        return manifest
    finally:
        os.close(fd)


def test_what_was_written_comes_back(saved: Path, sources: dict[str, int]) -> None:
    fd = os.open(saved, os.O_RDONLY)
    manifest, offsets = savefile.read(fd)
    assert [member.name for member in manifest.members] == list(sources)
    for member, offset, source in zip(manifest.members, offsets, sources.values(), strict=True):
        target = os.memfd_create("target")
        savefile.copy_in(fd, offset, member, target)
        assert os.fstat(target).st_size == os.fstat(source).st_size
        for start, length in [*member.extents, (0, min(member.size_bytes, 4 * MIB))]:
            assert os.pread(target, length, start) == os.pread(source, length, start)
        os.close(target)
    os.close(fd)


def test_only_data_is_stored(saved: Path) -> None:
    assert saved.stat().st_size < MIB / 2
    manifest = load(saved)
    assert manifest.member("disks/0").extents == ((5 << 40, 4096),)
    ram = manifest.member("ram")
    assert (ram.size_bytes, ram.extents) == (4 * MIB, ((0, 8192), (MIB, 4096), (4 * MIB - 65536, 65536)))


def test_it_is_a_tar_like_any_other(saved: Path) -> None:
    with tarfile.open(saved) as tar:
        names = ["manifest.json", "record", "ram", "state", "disks/0", "disks/2"]
        assert tar.getnames() == names
        record = tar.extractfile("record")
        assert record
        assert record.read() == b"a record"


def test_a_part_of_it_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [*range(0, 6000, 97), *range(6000, len(data), 8111), len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(Corrupt):
            load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(Corrupt):
        load(saved)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(where=st.floats(0, 0.999999), bit=st.integers(0, 7), late=st.booleans())
def test_no_bit_of_it_may_change(saved: Path, where: float, bit: int, late: bool) -> None:
    data = bytearray(saved.read_bytes())
    used = [at for at, byte in enumerate(data) if byte]  # what pads is zero, and holds nothing
    at = used[int(where * (len(used) if late else min(len(used), 1800)))]
    data[at] ^= 1 << bit
    other = saved.with_name("other")
    other.write_bytes(data)
    with pytest.raises(Corrupt):
        load(other)


def test_another_version_is_refused_by_its_number() -> None:
    with pytest.raises(Corrupt, match="version 7, not 1") as caught:
        savefile.decode(b'{"version":7,"anything":[]}')
    assert caught.value.code == "save-version"


def replace_member(which: str, /, **changed: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        members = [msgspec.structs.replace(m, **changed) if m.name == which else m for m in manifest.members]
        return msgspec.structs.replace(manifest, members=tuple(members))

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replace_member("record", extents=((0, 1 << 60),)), "data where none can be"),
        (replace_member("record", extents=((-8, 8),)), "data where none can be"),
        (replace_member("record", extents=((0, 8), (4, 4))), "data where none can be"),
        (replace_member("record", extents=((0, 0),)), "data where none can be"),
        (replace_member("disks/2", size_bytes=1 << 60), "bytes"),
        (replace_member("disks/2", size_bytes=-1), "bytes"),
        (replace_member("ram", size_bytes=8 * MIB), "RAM is not as large"),
        (replace_member("disks/2", name="disks/../../etc/passwd"), "not those of a saved pod"),
        (replace_member("disks/2", name="/etc/passwd"), "not those of a saved pod"),
        (replace_member("disks/2", name="disks/02"), "not those of a saved pod"),
        (replace_member("disks/2", name="disks/9"), "files of its disks are missing"),
        (replace_member("disks/2", name="disks/0"), "files of its disks are missing"),
        (replace_member("state", name="stat"), "not those of a saved pod"),
        (lambda m: msgspec.structs.replace(m, members=m.members[:2]), "not those of a saved pod"),
        (lambda m: msgspec.structs.replace(m, references=()), "files of its disks are missing"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(sources: dict[str, int], change: Any, why: str) -> None:
    """Its digest is right: somebody has made it on purpose."""
    with pytest.raises(Corrupt, match=why) as caught:
        savefile.decode(change(manifest_of(sources)).encode())
    assert caught.value.code == "save-damaged"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"version":1}', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none(data: bytes) -> None:
    with pytest.raises(Corrupt):
        savefile.decode(data)


def test_a_tar_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for name in ("manifest.json", "../../manifest.json", "x" * 300):
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        with pytest.raises(Corrupt):
            load(path)


def test_a_manifest_with_an_enormous_size_is_not_read(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    info = tarfile.TarInfo("manifest.json")
    info.size, info.mode = 1 << 50, 0o600
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)
    saved.write_bytes(data)
    with pytest.raises(Corrupt, match="no saved pod"):
        load(saved)


# -- a new file -------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with NewFile(path) as new:
        os.write(new.fd, b"half")
        assert os.listdir(tmp_path) == []
        os.write(new.fd, b", whole")
        new.publish()
    assert (os.listdir(tmp_path), path.read_bytes()) == (["new"], b"half, whole")


def test_it_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"old")
    with NewFile(path) as new:
        os.write(new.fd, b"new")
        new.publish()
    assert (os.listdir(tmp_path), path.read_bytes()) == (["new"], b"new")


def test_nothing_is_left_of_one_that_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"old")
    with NewFile(path) as new:
        os.write(new.fd, b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["new"], b"old")


def test_where_every_file_has_a_name_it_is_a_hidden_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT, NFS and FUSE, which say EOPNOTSUPP."""

    def open_without_tmpfile(path: Any, flags: int, mode: int = 0o777, real: Any = os.open) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return int(real(path, flags, mode))

    monkeypatch.setattr(os, "open", open_without_tmpfile)
    path = tmp_path / "new"
    with NewFile(path):
        (hidden,) = os.listdir(tmp_path)
        assert hidden.startswith(".new.new-")
    assert os.listdir(tmp_path) == []
    for content in (b"one", b"two"):
        with NewFile(path) as new:
            os.write(new.fd, content)
            new.publish()
        assert (os.listdir(tmp_path), path.read_bytes()) == (["new"], content)


@pytest.mark.parametrize("name", ["folder", "no/folder", "file/x"])
def test_where_no_file_can_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput):
        NewFile(tmp_path / name)


# -- what the host must have ------------------------------------------------------------------------


def mark(path: Path, *, layer: bool = False) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mark_of(fd, layer=layer)
    finally:
        os.close(fd)


def test_a_disk_is_told_by_its_time_and_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(3 * MIB))
    os.utime(path, ns=(1, 5))
    before = mark(path)
    (tmp_path / "copy").write_bytes(bytes(3 * MIB))
    os.utime(tmp_path / "copy", ns=(9, 5))
    assert mark(tmp_path / "copy") == before
    assert mark(path, layer=True) in before
    for at in (0, 3 * MIB - 1):
        path.write_bytes(bytes(at) + b"x" + bytes(3 * MIB - at - 1))
        os.utime(path, ns=(1, 5))
        assert mark(path) != before
    path.write_bytes(bytes(3 * MIB))
    assert mark(path) != before


def checked(manifest: Manifest, data: Path) -> None:
    restoring.check_mounts(manifest, data)


def on_host(sources: dict[str, int], reference: Reference, mount: SavedMount | None = None) -> Manifest:
    mounts = SavedPod((), (SavedContainer("c", (mount,)),) if mount else ())
    return manifest_of(sources, references=(reference,), mounts=mounts)


def test_a_layer_that_is_missing_is_named_with_its_image(sources: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    reference = Reference(
        1, "layers/ab.erofs", block_device=False, size_bytes=3, mark="", diff_id="sha256:ab", images=("busybox",)
    )
    with pytest.raises(NotFound, match=r"layer sha256:ab: .* has it not \(import busybox again"):
        checked(on_host(sources, reference), tmp_path)
    (tmp_path / "layers/ab.erofs").write_bytes(b"abc")
    with pytest.raises(NotFound, match="another one of that name"):
        checked(on_host(sources, reference), tmp_path)
    good = msgspec.structs.replace(reference, mark=mark(tmp_path / "layers/ab.erofs", layer=True))
    checked(on_host(sources, good), tmp_path)


@pytest.mark.parametrize("path", ["../secret", "layers/../../secret", "a\0b"])
def test_a_path_that_leads_out_of_the_data_folder_is_refused(
    sources: dict[str, int], tmp_path: Path, path: str
) -> None:
    (tmp_path / "secret").write_bytes(b"abc")
    for diff_id in ("", "sha256:ab"):
        reference = Reference(1, path, block_device=False, size_bytes=3, mark="", diff_id=diff_id)
        with pytest.raises(Corrupt):
            checked(on_host(sources, reference), tmp_path / "data")


def test_a_disk_that_changed_is_named_with_who_has_it_where(sources: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    reference = Reference(1, str(path), block_device=False, size_bytes=3, mark=mark(path))
    mount = SavedMount("/data", "virtual-disk", "host", ("ro",), str(path), size_bytes=3)
    manifest = on_host(sources, reference, mount)
    checked(manifest, tmp_path)
    path.write_bytes(b"abd")
    with pytest.raises(InvalidInput, match="not the disk that it was"):
        checked(manifest, tmp_path)
    path.write_bytes(b"abcd")
    with pytest.raises(InvalidInput, match="which container c has at /data, has 4 bytes now, 3 before"):
        checked(manifest, tmp_path)
    path.unlink()
    with pytest.raises(NotFound, match="which container c has at /data, is missing"):
        checked(manifest, tmp_path)
    os.mkfifo(path)  # opening it must not wait for a writer
    with pytest.raises(HoldfastError):
        checked(manifest, tmp_path)


def test_a_member_says_how_much_of_it_is_data() -> None:
    assert Member("ram", 100, ((0, 10), (50, 20))).data_bytes == 30
