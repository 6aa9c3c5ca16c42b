"""Images for tests, made by umoci as people make them: a tree is changed, and each change is committed as a layer.

Everything in them has fixed bytes and times, so that an image made again has the same layers, which are then found
in the data folder and not imported again.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.spec.default import CAPABILITIES
from tests.image_archives import entry, tar

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable, Sequence

BUSYBOX = Path(shutil.which("busybox") or "/bin/busybox")
#: What a container's shell commands in these tests are made of.
APPLETS = (
    "cat", "chmod", "chown", "cmp", "cp", "cut", "dd", "df", "echo", "env", "false", "find", "grep", "head",
    "hostname", "id", "kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mknod", "mount", "mv", "od", "ps", "pwd",
    "readlink", "rm", "rmdir", "sed", "seq", "sh", "sleep", "sort", "stat", "stty", "sync", "tail", "tee", "test",
    "touch", "tr", "true", "truncate", "tty", "umount", "uname", "wc", "xargs", "yes",
)  # fmt: skip
_PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001:A user:/home/user:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
)
_GROUP = "root:x:0:\nusers:x:1001:\nextra:x:2000:nobody,user\nmore:x:2001:user\nnogroup:x:65534:\n"
#: 2020-01-01, for what has no time of its own.
EPOCH = 1577836800
#: VFS_CAP_REVISION_2, effective, CAP_NET_RAW permitted: capabilities(7), "File capability extended attribute".
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)


def run(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs a tool; what it prints is in the error when it fails."""
    done = subprocess.run([os.fspath(a) for a in arguments], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done


def busybox_tree(root: Path) -> None:
    """A root filesystem in which a shell works."""
    for folder in ("bin", "etc", "home/user", "proc", "sys", "dev", "root", "tmp", "run", "mnt", "usr/bin"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    os.chown(root / "home/user", 1000, 1001)
    shutil.copyfile(BUSYBOX, root / "bin/busybox")
    (root / "bin/busybox").chmod(0o755)
    for name in APPLETS:
        os.symlink("busybox", root / "bin" / name)
    (root / "etc/passwd").write_text(_PASSWD)
    (root / "etc/group").write_text(_GROUP)
    (root / "etc/not-executable").write_text("#!/bin/sh\n")
    (root / "etc/no-interpreter").write_text("#!/no/such/interpreter\n")
    (root / "etc/no-interpreter").chmod(0o755)
    (root / "etc/not-a-program").write_bytes(b"\0\1\2\3")
    (root / "etc/not-a-program").chmod(0o755)


def settle(root: Path) -> None:
    """Gives everything that was made just now the same time."""
    for folder, folders, files in os.walk(os.fsencode(root), topdown=False):
        for name in (*files, *folders, b"."):
            path = os.path.join(folder, name)
            if os.lstat(path).st_mtime > EPOCH + 1:
                os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


class Umoci:
    """An OCI layout with one image in the making.

    Args:
        work: an empty folder.
    """

    def __init__(self, work: Path) -> None:
        self.layout = work / "layout"
        self._image = f"{self.layout}:v"
        self._work = work
        self._count = 0
        run("umoci", "init", "--layout", self.layout)
        run("umoci", "new", "--image", self._image)

    def commit(self, change: Callable[[Path], None]) -> None:
        """Unpacks the image, lets ``change`` change the tree, and makes a layer of that."""
        self._count += 1
        bundle = self._work / f"bundle{self._count}"
        run("umoci", "unpack", "--image", self._image, bundle)
        change(bundle / "rootfs")
        settle(bundle / "rootfs")
        run("umoci", "repack", "--image", self._image, bundle)
        shutil.rmtree(bundle)

    def add(self, *entries: tuple[tarfile.TarInfo, bytes]) -> None:
        """Adds a layer whose archive no tool would have written from a tree."""
        path = self._work / "layer.tar"
        path.write_bytes(tar(*entries))
        run("umoci", "raw", "add-layer", "--image", self._image, path)
        path.unlink()

    def configure(self, *options: str) -> None:
        """``umoci config``."""
        run("umoci", "config", "--image", self._image, *options)

    def unpack(self, to: Path) -> Path:
        """Where umoci has unpacked the image."""
        run("umoci", "unpack", "--image", self._image, to)
        return to / "rootfs"


def make_busybox(work: Path) -> Path:
    """A layout of an image with two layers: busybox, and the settings of a small system."""
    made = Umoci(work)
    made.commit(busybox_tree)
    made.commit(_release)
    made.configure("--config.cmd", "/bin/sh", "--config.env", "IMAGE=yes", "--config.workingdir", "/tmp")
    return made.layout


def _release(root: Path) -> None:
    (root / "etc/release").write_text("tests\n")


def make_rich(work: Path) -> Umoci:
    """An image with everything that layers can hold, in five layers."""
    made = Umoci(work)
    made.commit(busybox_tree)
    made.commit(_odd_things)
    made.commit(_changes)
    made.add(
        # umoci writes no opaque folders; docker and buildah do.
        entry("srv/opaque", "dir", mode=0o750, uid=7, gid=8, mtime=EPOCH + 7),
        entry("srv/opaque/.wh..wh..opq", mtime=EPOCH),
        entry("srv/opaque/new", data=b"only this", mtime=EPOCH + 8),
        # A hard link to a file of a layer further down.
        entry("srv/linked-later", "link", linkname="srv/kept"),
    )
    made.commit(lambda root: (root / "srv/last").mkdir(mode=0o3771))
    return made


def _odd_things(root: Path) -> None:
    srv = root / "srv"
    for folder in ("opaque/old", "gone/below", "becomes-file", "deep"):
        (srv / folder).mkdir(parents=True)
    (srv / "opaque/old/hidden").write_text("hidden")
    (srv / "gone/below/x").write_text("x")
    (srv / "becomes-folder").write_text("a file")
    (srv / "whited-out").write_text("not for long")
    (srv / "kept").write_text("kept\n" * 1000)
    (srv / "setuid").write_bytes(b"#!/bin/sh\n")
    os.chown(srv / "setuid", 1000, 2000)
    (srv / "setuid").chmod(0o6755)
    os.link(srv / "setuid", srv / "setuid-link")
    os.link(srv / "setuid", srv / "deep/setuid-link")
    (srv / "owned").write_text("owned")
    os.chown(srv / "owned", 70000, 3000000000)
    os.utime(srv / "owned", ns=(0, 1234567890123456789))
    (srv / "before-1970").write_text("old")
    os.utime(srv / "before-1970", (0, 0))
    (srv / "xattrs").write_text("x")
    os.setxattr(srv / "xattrs", "user.note", b"\xff\x00binary")
    os.setxattr(srv / "xattrs", "user.empty", b"")
    (srv / "capable").write_bytes(b"capable")
    os.setxattr(srv / "capable", "security.capability", CAPABILITY)
    os.mknod(srv / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(srv / "disk", stat.S_IFBLK | 0o640, os.makedev(259, 1000))
    os.mkfifo(srv / "fifo", 0o622)
    with open(srv / "sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"in the middle")
    os.symlink("/etc/../etc/passwd", srv / "link")
    os.symlink("../../../../../../../etc/shadow", srv / "climbing-link")
    long = srv / "/".join("long-name-" + letter * 200 for letter in "abcd")
    long.mkdir(parents=True)
    (long / ("f" * 254)).write_text("far down")  # mkfs.erofs 1.5 cannot read a name of 255 bytes
    os.symlink("t" * 300, long / "link-to-a-long-name")
    with open(os.fsencode(srv) + b"/not utf-8 \xff\xe4\n", "wb") as file:
        file.write(b"a name of bytes")
    (srv / "empty").write_bytes(b"")
    (srv / "empty-folder").mkdir(mode=0o1700)
    for number in range(100):
        (srv / f"deep/file{number}").write_bytes(b"%d\n" % number * number)


def _changes(root: Path) -> None:
    srv = root / "srv"
    shutil.rmtree(srv / "gone")
    (srv / "whited-out").unlink()
    (srv / "deep/file7").unlink()
    (srv / "becomes-file").rmdir()
    (srv / "becomes-file").write_text("a file now")
    (srv / "becomes-folder").unlink()
    (srv / "becomes-folder").mkdir(mode=0o2750)
    (srv / "becomes-folder/x").write_text("1")
    (srv / "owned").chmod(0o600)
    (srv / "deep/file8").write_text("changed")


def make_bundle(folder: Path, args: Sequence[str], **changes: Any) -> Path:
    """A bundle as an engine would write it; ``changes`` replace keys of ``config.json``, a dict by merging."""
    folder.mkdir(parents=True, exist_ok=True)
    if "path" not in changes.get("root", {}) and not (folder / "rootfs").exists():
        busybox_tree(folder / "rootfs")
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "hostname": "bundle",
        "process": {
            "cwd": "/",
            "args": list(args),
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {kind: [*CAPABILITIES] for kind in ("bounding", "effective", "permitted")},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "uts", "ipc")]},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            document[key] |= value
        else:
            document[key] = value
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def make_disk(path: Path, filesystem: str, content: Path | None = None, size: str = "") -> Path:
    """A disk image with a filesystem; ``content`` is a folder to fill it with."""
    if filesystem == "ext4":
        run("mke2fs", "-q", "-F", "-t", "ext4", *(["-d", content] if content else []), path, size or "16M")
    elif filesystem == "xfs":
        with open(path, "wb") as file:
            file.truncate(300 << 20)  # the smallest that mkfs.xfs makes
        run("mkfs.xfs", "-q", path)
    elif filesystem == "squashfs":
        assert content is not None
        run("mksquashfs", content, path, "-quiet", "-no-progress", "-noappend")
    elif filesystem == "erofs":
        assert content is not None
        run("mkfs.erofs", "--quiet", path, content)
    return path


def is_clean(disk: Path) -> bool:
    """Whether e2fsck finds nothing to mend on an ext4 disk, its journal included."""
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "needs_recovery" not in run("dumpe2fs", "-h", disk).stdout
