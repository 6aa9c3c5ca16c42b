"""Mounts of a command line, sizes, and mounts put into a spec."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.spec.default import default_mounts
from holdfast.spec.mounts import add_mounts, parse_mount, parse_volume
from holdfast.spec.runtime import spec_from_raw
from holdfast.spec.sizes import parse_size

CWD = "/here/now"


def mount(kind: str, source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("type=bind,src=/a,dst=/b", mount("bind", "/a", "/b", "rbind", "rprivate", "rw")),
        ("type=bind,source=a/../c,target=/b,ro", mount("bind", "/here/now/a/../c", "/b", "rbind", "rprivate", "ro")),
        ("destination=/b,type=bind,src=.,readonly=true", mount("bind", CWD, "/b", "rbind", "rprivate", "ro")),
        ("type=bind,src=/a,dst=/b,readonly=false", mount("bind", "/a", "/b", "rbind", "rprivate", "rw")),
        ("type=bind,src=/a,dst=/b,RO", mount("bind", "/a", "/b", "rbind", "rprivate", "ro")),
        (
            "type=bind,src=/a,dst=/b/,bind-propagation=rslave,bind-nonrecursive,nosuid",
            mount("bind", "/a", "/b", "bind", "rslave", "rw", "nosuid"),
        ),
        ('type=bind,"src=/a,b",dst=/c', mount("bind", "/a,b", "/c", "rbind", "rprivate", "rw")),
        ('type=bind,"src=/a""b",dst=/c', mount("bind", '/a"b', "/c", "rbind", "rprivate", "rw")),
        ("type=disk,src=d.qcow2,dst=/d,ro", mount("virtual-disk", "/here/now/d.qcow2", "/d", "ro")),
        (
            "type=disk,src=/d.raw,dst=/d,noexec,noatime",
            mount("virtual-disk", "/d.raw", "/d", "rw", "noexec", "noatime"),
        ),
        ("type=physical-disk,src=/dev/vdb,dst=/d", mount("physical-disk", "/dev/vdb", "/d", "rw")),
        ("type=tmpfs,dst=/t", mount("tmpfs", "tmpfs", "/t", "rw", "nosuid", "nodev", "tmpcopyup")),
        ("type=tmpfs,src=/shared,dst=/t", mount("tmpfs", "/shared", "/t", "rw", "nosuid", "nodev")),
        (
            "type=tmpfs,dst=/t,tmpfs-size=1m,mode=1777,exec,notmpcopyup,suid",
            mount("tmpfs", "tmpfs", "/t", "rw", "exec", "suid", "nodev", "size=1048576", "mode=1777"),
        ),
        (
            "type=tmpfs,dst=/t,size=50%,ro",
            mount("tmpfs", "tmpfs", "/t", "ro", "nosuid", "nodev", "tmpcopyup", "size=50%"),
        ),
        ("type=volume,src=data,dst=/v", mount("volume", "data", "/v", "rw")),
        ("src=data,dst=/v", mount("volume", "data", "/v", "rw")),
        ("type=image,src=docker.io/x/y:1,dst=/i", mount("image", "docker.io/x/y:1", "/i", "ro")),
        ("type=image,src=x,dst=/i,rw=true", mount("image", "x", "/i", "rw")),
    ],
)
def test_mount(text: str, expected: dict[str, Any]) -> None:
    parsed = parse_mount(text, cwd=CWD)
    assert parsed == expected
    spec_from_raw({"ociVersion": "1.0.2", "mounts": [parsed]})


def test_destination_may_be_left_out_where_that_is_allowed() -> None:
    assert parse_mount("type=disk,src=/d", cwd=CWD, destination_needed=False)["destination"] == ""


BAD_MOUNTS = [
    ("", "no destination"),
    ("type=bnd,src=/a,dst=/b", "unknown type 'bnd' (type is one of bind, disk, physical-disk"),
    ("type=,src=/a,dst=/b", "'type' needs a value"),
    ("type=bind,dst=/b", "no source"),
    ("type=bind,src=,dst=/b", "'source' needs a value"),
    ("type=bind,src=/a", "no destination (say where in the container: dst=/path)"),
    ("type=bind,src=/a,dst=b", "destination must be absolute, not 'b'"),
    ("type=bind,src=/a,dst=/b/..", "destination is the root itself"),
    ("type=bind,src=/a,dst=/b,redonly", "type=bind takes no 'redonly' (it takes source, destination, ro, rw, bind-"),
    ("type=disk,src=/a,dst=/b,size=1m", "type=disk takes no 'size'"),
    ("type=bind,src=/a,source=/b,dst=/c", "'source' is given twice"),
    ("type=bind,src=/a,dst=/c,ro,readonly", "'ro' is given twice"),
    ("type=bind,src=/a,dst=/c,ro,rw", "both ro and rw"),
    ("type=bind,src=/a,dst=/c,ro=maybe", "ro: 'maybe' is neither true nor false"),
    ("type=bind,src=/a,dst=/c,nosuid=1", "'nosuid' takes no value"),
    ("type=bind,src=/a,dst=/c,bind-propagation=x", "bind-propagation=x (it is one of private, rprivate"),
    ("type=bind,,src=/a,dst=/c", "two commas"),
    ("type=bind,src=/a,dst=/c,=x", "an empty key"),
    ('type=bind,src="/a,b",dst=/c', "quotes do not match"),
    ('type=bind,"src=/a,dst=/c', "quotes do not match"),
    ('type=bind,"src=/a"b,dst=/c', "quotes do not match"),
    ('type=bind,"src=/a"b",dst=/c', "quotes do not match"),
    ('type=bind,",dst=/c', "quotes do not match"),
    ("type=bind,src=/a,dst=/c,", "one at an end"),
    ("type=bind,src=/a\n,dst=/c", "line break"),
    ("type=bind,src=/a\0,dst=/c", "NUL"),
    ("type=tmpfs,src=a,dst=/c", "'a' is not absolute"),
    ("type=tmpfs,dst=/c,size=lots", "'lots' is not a size"),
    ("type=tmpfs,dst=/c,size=101%", "'101%' is not a size"),
    ("type=tmpfs,dst=/c,mode=999", "mode=999 is not an octal mode"),
    ("type=tmpfs,dst=/c,mode=77777", "is not an octal mode"),
    ("type=volume,src=/a,dst=/c", "'/a' is not a volume's name (for a folder of this host say type=bind)"),
    ("type=image,dst=/c", "no source (say what to mount: src=IMAGE)"),
    ("type=image,src=x,dst=/c,nosuid", "type=image takes no 'nosuid'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_MOUNTS)
def test_bad_mounts(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_mount(text, cwd=CWD)
    assert caught.value.code in ("mount-option", "size")
    assert caught.value.subject == f"--mount {text}"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a:/b", mount("bind", "/a", "/b", "rbind", "rprivate", "rw")),
        ("./a:/b:ro", mount("bind", "/here/now/a", "/b", "rbind", "rprivate", "ro")),
        (".:/b:ro,z", mount("bind", CWD, "/b", "rbind", "rprivate", "ro")),
        ("/a:/b:rslave,noexec,bind", mount("bind", "/a", "/b", "bind", "rslave", "rw", "noexec")),
        ("data:/v:ro", mount("volume", "data", "/v", "ro")),
        ("/v", mount("volume", "", "/v", "rw")),
    ],
)
def test_volume(text: str, expected: dict[str, Any]) -> None:
    assert parse_volume(text, cwd=CWD) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected SRC:DST"),
        ("/a:", "expected SRC:DST"),
        (":/b", "expected SRC:DST"),
        ("/a:/b:ro:x", "expected SRC:DST"),
        ("/a:b", "destination must be absolute"),
        ("a/b:/c", "is not a volume's name"),
        ("/a:/b:U", "unknown option 'U'"),
        ("/a:/b:ro,rw", "both ro and rw"),
    ],
)
def test_bad_volumes(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match="read mount -v") as caught:
        parse_volume(text, cwd=CWD)
    assert caught.value.code == "mount-option"
    assert message in caught.value.why


# No line break or NUL: a path may hold them, a command line's mount may not.
letters = st.sampled_from('a",/') | st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])
paths = st.text(letters, min_size=1).map("/".__add__)


@given(paths)
def test_any_path_can_be_quoted(path: str) -> None:
    # ``..`` is the kernel's to resolve: after a link it is not what the text says.
    expected = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
    quoted = '"src=' + path.replace('"', '""') + '"'
    assert parse_mount(f"type=disk,{quoted},dst=/b", cwd=CWD)["source"] == expected
    if not set(path) & set('",'):
        assert parse_mount(f"type=disk,src={path},dst=/b", cwd=CWD)["source"] == expected


@given(st.text('type=bind,src/a"ro', max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (parse_mount, parse_volume):
        try:
            parsed = parse(text, cwd=CWD)
        except InvalidInput as error:
            assert error.code in ("mount-option", "size")
        else:
            spec_from_raw({"ociVersion": "1.0.2", "mounts": [parsed]})


def destinations(raw: dict[str, Any]) -> list[str]:
    return [entry["destination"] for entry in raw["mounts"]]


def test_added_mounts_take_the_place_of_others() -> None:
    raw: dict[str, Any] = {"mounts": default_mounts()}
    add_mounts(
        raw, [mount("tmpfs", "tmpfs", "/dev/shm/x"), mount("bind", "/s", "/dev/shm/"), mount("bind", "/x", "/sys")]
    )
    assert destinations(raw) == [
        "/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/dev/shm/", "/dev/shm/x",
    ]  # fmt: skip
    assert raw["mounts"][4]["source"] == "/x"


def test_a_mount_on_dev_drops_what_is_below() -> None:
    raw: dict[str, Any] = {"mounts": default_mounts()}
    add_mounts(raw, [mount("bind", "/y", "/dev/pts"), mount("bind", "/x", "/dev")])
    assert destinations(raw) == ["/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts"]
    assert raw["mounts"][4]["source"] == "/y"


def test_mounts_are_added_to_none() -> None:
    raw: dict[str, Any] = {"mounts": None}
    add_mounts(raw, [mount("bind", "/y", "/a/b"), mount("bind", "/x", "/a")])
    assert destinations(raw) == ["/a", "/a/b"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))))
def test_no_added_mount_is_hidden(added: list[str]) -> None:
    raw: dict[str, Any] = {"mounts": []}
    add_mounts(raw, [mount("bind", "/x", destination) for destination in added])
    listed = destinations(raw)
    assert set(listed) == set(added)
    for index, path in enumerate(listed):
        assert not any(earlier.startswith(path + "/") or earlier == path for earlier in listed[:index])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("65536", 65536), ("512b", 512), ("256M", 256 << 20), ("256m", 256 << 20), ("1G", 1 << 30),
        ("10GiB", 10 << 30), ("10gb", 10 << 30), ("1.5G", 3 << 29), ("0.5k", 512), (" 2 K ", 2048), ("1T", 1 << 40),
        ("8191P", 8191 << 50),
    ],
)  # fmt: skip
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a size"), ("M", "is not a size"), ("1.M", "is not a size"), (".5M", "is not a size"),
        ("1X", "is not a size"), ("-1", "is not a size"), ("1e3", "is not a size"), ("1 0", "is not a size"),
        ("1iB", "is not a size"), ("\u0662", "is not a size"), ("1MM", "is not a size"), ("0", "is too small"),
        ("0.0001b", "is too small"), ("8192P", "is too large"), ("9" * 20, "is too large"),
        ("9" * 5000, "is not a size"),
    ],
)  # fmt: skip
def test_bad_sizes(text: str, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_size(text, subject="--memory")
    assert (caught.value.code, caught.value.subject) == ("size", "--memory")
    assert why in caught.value.why


@given(st.integers(1, 8191), st.sampled_from(["", "k", "M", "g", "T", "P"]), st.sampled_from(["", "B", "iB"]))
def test_sizes_with_units(number: int, unit: str, ending: str) -> None:
    if not unit and ending == "iB":
        ending = ""
    assert parse_size(f"{number}{unit}{ending}") == number * 1024 ** " kmgtp".index(unit.lower() or " ")
