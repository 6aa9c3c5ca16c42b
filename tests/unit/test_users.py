"""Users of an image, whose /etc/passwd says whatever its maker wanted it to say."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import InvalidInput
from holdfast.guest.users import apply_user

if TYPE_CHECKING:
    from pathlib import Path

PASSWD = """\
# a comment
root:x:0:0:root:/root:/bin/sh

web:x:33:44:web:/srv/web:/bin/false
1000:x:7:8:a name of digits:/home/digits:
nohome:x:50:50::
short:x:9
odd:x:abc:1::/odd:
"""
GROUP = """\
root:x:0:
web:x:44:
extra:x:60:other,web
more:x:61:web
odd:x:abc:web
short:x
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "in/etc").mkdir(parents=True)
    (tmp_path / "in/etc/passwd").write_text(PASSWD)
    (tmp_path / "in/etc/group").write_text(GROUP)
    return tmp_path / "in"


def apply(image: Path, name: str, **process: Any) -> dict[str, Any]:
    apply_user(process, name, str(image))
    return process


@pytest.mark.parametrize(
    ("user", "record", "home"),
    [
        ("web", {"uid": 33, "gid": 44, "additionalGids": [60, 61]}, "/srv/web"),
        ("33", {"uid": 33, "gid": 44, "additionalGids": [60, 61]}, "/srv/web"),
        ("web:extra", {"uid": 33, "gid": 60}, "/srv/web"),
        ("web:99", {"uid": 33, "gid": 99}, "/srv/web"),
        ("4711", {"uid": 4711, "gid": 0}, "/"),
        ("4711:web", {"uid": 4711, "gid": 44}, "/"),
        ("root", {"uid": 0, "gid": 0, "additionalGids": []}, "/root"),
        ("nohome", {"uid": 50, "gid": 50, "additionalGids": []}, "/"),
        ("1000", {"uid": 7, "gid": 8, "additionalGids": []}, "/home/digits"),
    ],
)
def test_users(image, user, record, home):
    process = apply(image, user)
    assert process["user"] == record
    assert process["env"] == [f"HOME={home}"]


def test_no_user_keeps_what_the_specification_says(image):
    assert apply(image, "", user={"uid": 33, "gid": 1}) == {"user": {"uid": 33, "gid": 1}, "env": ["HOME=/srv/web"]}
    assert apply(image, "", env=["HOME=/mine"]) == {"env": ["HOME=/mine"]}
    assert apply(image, "web", user={"umask": 18})["user"]["umask"] == 18


@pytest.mark.parametrize(("user", "code"), [("nosuch", "user-not-found"), ("odd", "user-not-found"),
                                            ("short", "user-not-found"), ("-1", "user-not-found"),
                                            ("web:nosuch", "group-not-found"), (":web", "user-not-found")])  # fmt: skip
def test_unknown_names(image, user, code):
    with pytest.raises(InvalidInput) as failure:
        apply(image, user)
    assert failure.value.code == code


def test_without_the_files(tmp_path):
    assert apply(tmp_path, "5")["user"] == {"uid": 5, "gid": 0}
    assert apply(tmp_path, "5")["env"] == ["HOME=/"]
    with pytest.raises(InvalidInput):
        apply(tmp_path, "web")


# -- hostile images ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["../../secret", "/secret", "../../../../../../secret"])
def test_links_stay_in_the_image(image, target):
    secret = "host:x:1234:1234::/host:\n"
    (image.parent / "secret").write_text(secret)
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to(target)
    with pytest.raises(InvalidInput):
        apply(image, "host")
    (image / "secret").write_text(secret.replace("1234", "77"))
    assert apply(image, "host")["user"]["uid"] == 77


def test_a_folder_that_is_a_link_out_of_the_image(image):
    (image.parent / "outside").mkdir()
    (image.parent / "outside/passwd").write_text("host:x:1234:1234::/host:\n")
    os.rename(image / "etc", image / "kept")
    (image / "etc").symlink_to("../outside")
    with pytest.raises(InvalidInput):
        apply(image, "host")


def test_magic_links_are_not_followed(image):
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("/proc/self/root/etc/passwd")
    with pytest.raises(InvalidInput):
        apply(image, "daemon")


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "loop"])
def test_what_is_no_file_is_no_users(image, kind):
    path = image / "etc/passwd"
    path.unlink()
    if kind == "fifo":  # opening or reading it must not wait for a writer
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path.symlink_to("passwd")
    assert apply(image, "5")["user"] == {"uid": 5, "gid": 0}
    path.rmdir() if kind == "directory" else path.unlink()


def test_a_fifo_that_has_a_writer(image):
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    writer = os.open(image / "etc/passwd", os.O_RDWR)
    try:
        assert apply(image, "5")["user"] == {"uid": 5, "gid": 0}
    finally:
        os.close(writer)
    (image / "etc/passwd").unlink()


def test_a_huge_file_is_read_to_a_bound(image):
    with open(image / "etc/passwd", "a") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write("\nfar:x:5:5::/far:\n")
    assert apply(image, "web")["user"]["uid"] == 33
    with pytest.raises(InvalidInput):
        apply(image, "far")


def test_binary(image):
    (image / "etc/passwd").write_bytes(b"\0\xff\xfe:\x80:::\n" + os.urandom(5000) + b"\nweb:x:33:44::/w:\n")
    assert apply(image, "web")["user"]["uid"] == 33


def test_a_group_id_that_is_no_number(image):
    (image / "etc/passwd").write_text("web:x:33:abc::/w:\n")
    with pytest.raises(InvalidInput):
        apply(image, "web")


def test_digits_of_other_kinds(image):
    with pytest.raises(InvalidInput):
        apply(image, "²")
