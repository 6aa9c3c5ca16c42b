"""Headers: what is read, what is refused, and that nothing asks for more memory than it may."""

from __future__ import annotations

import struct
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import Corrupt, HoldfastError, InvalidInput
from holdfast.image.tarstream import Entry, TarStream, clean, entries
from tests.image_archives import entry, tar


def read(data: bytes, chunk: int = 700) -> list[Entry]:
    stream = TarStream(iter([data[at : at + chunk] for at in range(0, len(data), chunk)]), "test")
    found = list(entries(stream, "test"))
    stream.drain()
    assert stream.tell() == len(data)
    return found


def checksummed(block: bytes) -> bytes:
    """A header with its checksum set right after it was tampered with."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:512])
    return block[:148] + b"%06o\0 " % total + block[156:]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_kind_in_every_dialect(form: int) -> None:
    found = read(
        tar(
            entry("./"),
            entry("d", "dir", mode=0o1777, mtime=7),
            entry("d/f", data=b"x" * 1000, uid=65534, gid=3, mode=0o4755),
            entry("d/h", "link", linkname="d/f"),
            entry("l", "symlink", linkname="/abs/../x"),
            entry("c", "char", devmajor=1, devminor=3),
            entry("b", "block", devmajor=259, devminor=1000),
            entry("p", "fifo"),
            form=form,
        )
    )
    assert [(item.path, item.kind) for item in found[1:]] == [
        (b"d", "directory"),
        (b"d/f", "file"),
        (b"d/h", "hardlink"),
        (b"l", "symlink"),
        (b"c", "char"),
        (b"b", "block"),
        (b"p", "fifo"),
    ]
    assert (found[1].mode, found[1].mtime_ns) == (0o1777, 7 * 10**9)
    assert (found[2].uid, found[2].gid, found[2].mode, found[2].size) == (65534, 3, 0o4755, 1000)
    assert found[3].target == b"d/f"
    assert found[4].target == b"/abs/../x"


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1700000000.123456789", 1700000000123456789),
        ("1.5", 1500000000),
        ("-1.5", -1500000000),
        ("12.", 12 * 10**9),
        ("1.1234567899", 1123456789),
        ("-3", -3 * 10**9),
    ],
)
def test_times_are_exact(text: str, nanoseconds: int) -> None:
    assert read(tar(entry("f", pax_headers={"mtime": text})))[0].mtime_ns == nanoseconds


def test_names_are_bytes() -> None:
    name, target = b"\xff\xfe/\xe4", b"/\x80"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        item = read(
            tar(
                entry(
                    name.decode("utf-8", "surrogateescape"),
                    "symlink",
                    linkname=target.decode("utf-8", "surrogateescape"),
                ),
                form=form,
            )
        )[0]
        assert (item.path, item.target) == (name, target)


def test_xattrs_are_bytes() -> None:
    raw = b"\x01\x00\xff\n=\xe4"
    text = raw.decode("utf-8", "surrogateescape")
    item = read(
        tar(entry("f", pax_headers={"SCHILY.xattr.security.capability": text, "LIBARCHIVE.xattr.user.b": "AQI"}))
    )[0]
    assert item.xattrs == {"security.capability": raw, "user.b": b"\x01\x02"}


def test_large_owners() -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        item = read(tar(entry("f", uid=4294967294, gid=3000000000), form=form))[0]
        assert (item.uid, item.gid) == (4294967294, 3000000000)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [(b"/a", b"a"), (b"./a//b/.", b"a/b"), (b"a/../b", b"b"), (b"", b""), (b"///", b""), (b"a/..", b"")],
)
def test_cleans_names(name: bytes, cleaned: bytes) -> None:
    assert clean(name) == cleaned


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/../x", "./.."])
@pytest.mark.parametrize("kind", ["file", "dir", "symlink", "fifo"])
def test_refuses_to_climb(name: str, kind: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tar(entry(name, kind, linkname="x" if kind == "symlink" else "")))
    assert caught.value.code == "archive-escapes"


def test_refuses_hard_links_that_climb() -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tar(entry("x", "link", linkname="../../etc/shadow")))
    assert caught.value.code == "archive-escapes"


@pytest.mark.parametrize(
    "bad",
    [
        entry("a\0b", pax_headers={"path": "a\0b"}),
        entry("f", uid=-1, pax_headers={"uid": "-1"}),
        entry("f", pax_headers={"gid": "4294967295"}),
        entry("f", pax_headers={"mtime": "yesterday"}),
        entry("f", pax_headers={"mtime": "9" * 30}),
        entry("l", "symlink", linkname=""),
        entry("c", "char", devmajor=1 << 13),
    ],
    ids=["nul", "owner", "group", "time", "far time", "no target", "device"],
)
def test_refuses_what_cannot_be(bad: tuple[tarfile.TarInfo, bytes]) -> None:
    with pytest.raises((Corrupt, InvalidInput)):
        read(tar(bad))


def test_empty_archives_are_empty() -> None:
    assert read(b"") == []
    assert read(bytes(1024)) == []
    assert read(tar()) == []


def test_an_archive_may_end_without_zeros() -> None:
    whole = tar(entry("f", data=b"x" * 512))
    assert [item.path for item in read(whole[:1024])] == [b"f"]


def test_cut_short() -> None:
    whole = tar(entry("f", data=b"x" * 2000), entry("g", data=b"y" * 2000))
    for size in (100, 512 + 100, 512 + 2048 + 100):
        with pytest.raises(Corrupt):
            read(whole[:size])


def test_a_damaged_header_is_not_the_end() -> None:
    whole = bytearray(tar(entry("f"), entry("g"), entry("h")))
    whole[512 + 3] ^= 0xFF
    with pytest.raises(Corrupt):
        read(bytes(whole))


def test_negative_sizes_do_not_loop() -> None:
    """CVE-2025-8194."""
    block = bytearray(tar(entry("f", data=b"x"))[:512])
    for size in (-512, -1, -(1 << 40), 1 << 70):
        block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & ((1 << 88) - 1)).to_bytes(11, "big")
        with pytest.raises(Corrupt):
            read(checksummed(bytes(block)) + bytes(4096))


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_headers_are_bounded(kind: bytes) -> None:
    """A name or pax header of a gigabyte is refused before it is read."""
    block = bytearray(tar(entry("f"))[:512])
    block[156:157] = kind
    block[124:136] = b"%011o\0" % (1 << 30)
    with pytest.raises(Corrupt, match="headers are larger"):
        read(checksummed(bytes(block)) + bytes(4096))


def test_sparse_maps_are_bounded_and_checked() -> None:
    good = entry(
        "s",
        data=b"abcd",
        pax_headers={
            "GNU.sparse.map": "0,2,10,2",
            "GNU.sparse.size": "20",
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
        },
    )
    item = read(tar(good))[0]
    assert (item.size, item.stored, item.sparse) == (20, 4, [(0, 2), (10, 2)])
    for bad in ("5,2,0,2", "0,30", "0,-1", "0,2,x,2"):
        headers = {"GNU.sparse.map": bad, "GNU.sparse.size": "20"}
        with pytest.raises(Corrupt):
            read(tar(entry("s", data=b"abcd", pax_headers=headers)))


def test_gnu_sparse_extension_blocks_without_end() -> None:
    block = bytearray(tar(entry("s"), form=tarfile.GNU_FORMAT)[:512])
    block[156:157] = b"S"
    block[482] = 1
    extension = (struct.pack("12s12s", b"1\0", b"1\0") * 21).ljust(504, b"\0") + b"\1" + bytes(7)
    with pytest.raises(Corrupt):
        read(checksummed(bytes(block)) + extension * 3000)


def test_unknown_types_are_refused() -> None:
    block = bytearray(tar(entry("f"))[:512])
    block[156:157] = b"Z"
    with pytest.raises(Corrupt, match="unknown type"):
        read(checksummed(bytes(block)) + bytes(1024))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 1500), st.binary(min_size=1, max_size=40))
def test_anything_is_read_or_refused(tail: bytes, at: int, patch: bytes) -> None:
    data = bytearray(tar(entry("f", data=b"x" * 100, pax_headers={"mtime": "1.5"}), entry("g")) + tail)
    data[at : at + len(patch)] = patch
    for candidate in (bytes(data), tail, checksummed(bytes(data[:512])) + bytes(data[512:])):
        try:
            read(candidate)
        except HoldfastError:
            continue
