"""An image's files in a container are those that umoci unpacks, in everything that the kernel can tell of them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from holdfast.spec.annotations import TMP
from tests.vm.support import HOST_PYTHON, HOST_PYTHON_ENV, HOST_USR, RICH, assert_holds_nothing, output

if TYPE_CHECKING:
    from pathlib import Path

#: Runs on both sides: in the container with the host's interpreter, and here.
LIST_TREE = r"""
import hashlib, json, os, stat, sys

def tree_of(top, skip):
    found, first = {}, {}
    for folder, folders, files in os.walk(top):
        relative = os.path.relpath(folder, top)
        folders[:] = sorted(name for name in folders if os.path.normpath(os.path.join(relative, name)) not in skip)
        for name in [b"."] * (folder == top) + sorted(folders + files):
            path = os.path.join(folder, name)
            key = os.path.normpath(os.path.join(relative, name))
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            record = {"mode": oct(status.st_mode), "owner": [status.st_uid, status.st_gid]}
            if key != b".":  # a container's mount points are made in it
                record["mtime_ns"] = status.st_mtime_ns
            record["xattrs"] = {
                name: os.getxattr(path, name, follow_symlinks=False).hex()
                for name in os.listxattr(path, follow_symlinks=False) if not name.startswith("trusted.overlay.")
            }
            if kind == stat.S_IFREG:
                record["size"] = status.st_size
                with open(path, "rb") as file:
                    record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            elif kind == stat.S_IFLNK:
                record["target"] = os.readlink(path).hex()
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                record["device"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
            if status.st_nlink > 1 and kind != stat.S_IFDIR:
                record["links"] = status.st_nlink
                record["same as"] = first.setdefault(status.st_ino, repr(key))
            found[repr(key)] = record
    return found

if __name__ == "__main__":
    print(json.dumps(tree_of(os.fsencode(sys.argv[1]), {os.fsencode(path) for path in sys.argv[2:]})))
"""
#: What a container has mounted, and the folder that is made for the host's programs.
MOUNTED = ("proc", "sys", "dev", "host", "etc/hosts", "etc/hostname", "etc/resolv.conf", "run")


def test_every_file_is_what_umoci_unpacks(shared_pod, rich_tree: Path):
    scope: dict[str, object] = {"__name__": "list_tree"}
    exec(compile(LIST_TREE, "list_tree", "exec"), scope)
    theirs = scope["tree_of"](os.fsencode(rich_tree), {os.fsencode(name) for name in MOUNTED})  # type: ignore[operator]
    result = shared_pod.run(
        RICH, [*HOST_PYTHON, "-c", LIST_TREE, "/", *MOUNTED], env=HOST_PYTHON_ENV, mounts=[HOST_USR],
        annotations={TMP: "rootfs"},
    )  # fmt: skip
    ours = json.loads(output(result))
    wrong = {name: (ours.get(name), theirs.get(name)) for name in ours.keys() | theirs.keys()
             if ours.get(name) != theirs.get(name)}  # fmt: skip
    assert not wrong, json.dumps(wrong, indent=1)
    # That the image has in it what it is made for.
    kinds = {record["mode"][:4] for record in ours.values()}
    assert len(ours) > 150
    assert len(kinds) >= 5
    assert any(record["xattrs"].get("security.capability") for record in ours.values())
    assert any("owner" in record and record["owner"] == [70000, 3000000000] for record in ours.values())
    assert "b'srv/opaque/new'" in ours
    assert not {"b'srv/opaque/old'", "b'srv/gone'", "b'srv/whited-out'", "b'srv/deep/file7'"} & ours.keys()
    assert any("\\xff" in name for name in ours)
    assert_holds_nothing(shared_pod)


def test_what_a_container_writes_is_not_in_the_image(shared_pod, rich_tree: Path):
    script = "echo changed > /srv/kept; rm -r /srv/opaque; cat /srv/linked-later | head -n 1"
    assert output(shared_pod.run(RICH, ["sh", "-c", script])) == "kept\n"
    assert output(shared_pod.run(RICH, ["sh", "-c", "head -n 1 /srv/kept; ls /srv/opaque"])) == "kept\nnew\n"


def test_a_setuid_file_and_a_link_act_as_such(shared_pod, rich_tree: Path):
    script = (
        "stat -c %a /srv/setuid /srv/deep/setuid-link; readlink /srv/climbing-link; cat /srv/climbing-link; echo $?"
    )
    result = shared_pod.run(RICH, ["sh", "-c", script])
    assert result.text.splitlines()[:3] == ["6755", "6755", "../../../../../../../etc/shadow"]
    assert result.text.splitlines()[-1] == "1"
