"""A guest that speaks 9P to QEMU itself.

The guest's kernel resolves links and ".." before it sends anything, and sends no name with a "/" in it, so what
containers do through it (test_shares.py) says little about the server.  Here root in the guest takes one of the pod's
9p devices, which no share uses, from the kernel's driver, maps its registers, gives it a queue in pages of its own, and
sends what it likes.  All of that is one run of a small program, whose answers the tests compare; and the host is looked
at: what lies beside the shares is as it was, and nobody has opened it.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import resource
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import holdfast
from holdfast.errors import MachineFailed
from holdfast.linux.inotify import Inotify
from holdfast.spec.default import CAPABILITIES
from tests.images import busybox_tree, make_bundle
from tests.vm.support import (
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    assert_holds_nothing,
    assert_nothing_held,
    output,
    running,
    sh,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


SECRET = "nobody in the guest may read this"
#: inotify(7): every event, the reading and opening of files included.
_IN_ALL_EVENTS = 0xFFF
#: To read the numbers of pages and all of PCI's configuration, to map registers, and to keep pages in memory.
_MIGHTY = [*CAPABILITIES, "CAP_SYS_ADMIN", "CAP_SYS_RAWIO", "CAP_IPC_LOCK"]

# -- what runs in the guest -------------------------------------------------------------------------

#: A driver for one queue of a virtio-pci device: virtio 1.1, 4.1.4 (registers) and 2.6 (split queues).  A view that is
#: cast to a width reads and writes with that width, as the registers need it.  Nothing is larger than a page, so it
#: does not matter where the kernel has put the pages; MAP_LOCKED (0x2000), and no compaction, keep them there.
_DRIVER = """
import ctypes, errno, mmap, os, struct, time
PCI = "/sys/bus/pci/"
PAGE = 4096

class Broken(Exception):
    "The device could make nothing of what it got, and wants to be reset."

def put(path, text):
    with open(path, "w") as file:
        file.write(text)

def pci_function(tag):
    for device in os.scandir("/sys/bus/virtio/drivers/9pnet_virtio"):
        if device.name.startswith("virtio"):
            with open(device.path + "/mount_tag") as file:
                if file.read().rstrip("\\0") == tag:
                    return os.path.realpath(device.path).split("/")[-2]

class Device:
    def __init__(self, tag):
        self.address = pci_function(tag)
        put(PCI + "drivers/virtio-pci/unbind", self.address)
        folder = PCI + "devices/" + self.address
        put(folder + "/enable", "1")
        fd = os.open(folder + "/config", os.O_RDWR)
        os.pwrite(fd, b"\\x06\\x04", 4)  # memory, bus master, no interrupts
        config = os.pread(fd, 256, 0)
        capabilities = {}
        at = config[0x34]
        while at:
            if config[at] == 9:
                capabilities.setdefault(config[at + 3], (config[at + 4], *struct.unpack_from("<III", config, at + 8)))
            at = config[at + 1]
        bar, self.common, _, _ = capabilities[1]
        _, self.doorbells, _, self.stride = capabilities[2]
        fd = os.open(f"{folder}/resource{bar}", os.O_RDWR)
        self.registers = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
        put("/proc/sys/vm/compact_unevictable_allowed", "0")
        locked = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | 0x2000
        memory = mmap.mmap(-1, 3 * PAGE, flags=locked)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory)) // PAGE
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first * 8)
            self.pages = [(entry & (1 << 55) - 1) * PAGE for entry in struct.unpack("<3Q", file.read(24))]
        assert all(self.pages)
        self.queue, self.request, self.answer = (memoryview(memory)[n * PAGE : (n + 1) * PAGE] for n in range(3))
        self.status = self.register("B", 20)
        self.start()

    def register(self, kind, offset):
        start = self.common + offset
        return self.registers[start : start + struct.calcsize(kind)].cast(kind)

    def start(self):
        self.stop()
        self.status[0] = 3  # acknowledge, driver
        for word, features in enumerate((0, 1)):  # VIRTIO_F_VERSION_1
            self.register("I", 8)[0] = word
            self.register("I", 12)[0] = features
        self.status[0] = 11  # features are settled
        assert self.status[0] == 11
        self.queue[:] = bytes(PAGE)
        self.register("H", 22)[0] = 0
        self.register("H", 24)[0] = 8
        for number, offset in enumerate((32, 40, 48)):  # descriptors, driver's ring, device's ring
            self.register("I", offset)[0] = self.pages[0] + number * 1024 & 0xFFFFFFFF
            self.register("I", offset + 4)[0] = self.pages[0] >> 32
        start = self.doorbells + self.register("H", 30)[0] * self.stride
        self.doorbell = self.registers[start : start + 2].cast("H")
        self.register("H", 28)[0] = 1
        self.status[0] = 15
        self.given = self.queue[1024:1044].cast("H")
        self.used = self.queue[2048:2052].cast("H")
        self.given[0] = 1  # no interrupts
        self.count = 0

    def stop(self):
        self.status[0] = 0
        while self.status[0]:
            pass

    def exchange(self, message, room):
        self.request[: len(message)] = message
        self.queue[:32] = struct.pack(
            "<QIHHQIHH", self.pages[1], len(message), 1, 1, self.pages[2], room, 2, 0)
        self.count += 1
        self.given[1] = self.count
        self.doorbell[0] = 0
        deadline = time.monotonic() + 20
        while self.used[1] != self.count:
            if self.status[0] & 0x40:
                raise Broken
            assert time.monotonic() < deadline, ("no answer", message)
        return bytes(self.answer[: int.from_bytes(self.answer[:4], "little")])

    def give_back(self):
        self.stop()
        put(PCI + "drivers/virtio-pci/bind", self.address)
"""

#: Messages of 9P2000.L (diod's protocol.md), and those of 9P2000.u that QEMU answers as well.  Whatever makes or finds
#: a fid returns it; a walk that ends before its last name counts as refused, like one that does not begin.
_CLIENT = """
TOP, GROUP, LEFT, EMPTY, RW, RO, OTHER, KEPT, ALONE, ONE = range(1, 11)
ANY = 0xFFFFFFFF

class Refused(Exception):
    pass

def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<H", len(value)) + value

def message(kind, body, size=None):
    return struct.pack("<IBH", 7 + len(body) if size is None else size, kind, 1) + body

def send(data, room=PAGE):
    answer = device.exchange(data, room)
    if SECRET in answer:
        print("ESCAPED", data, answer, flush=True)
    if answer[4] in (7, 107):  # Rlerror; Rerror, which has a text before the number
        number = int.from_bytes(answer[-4:], "little")
        raise Refused(errno.errorcode.get(number, number))
    assert answer[4] == data[4] + 1, (data, answer)
    return answer[7:]

def call(kind, form, *values, data=b"", room=PAGE):
    body = [text(value) if letter == "s" else struct.pack("<" + letter, value) for letter, value in zip(form, values)]
    return send(message(kind, b"".join(body) + data), room)

def new_fid():
    global last
    last += 1
    return last

def version(size=PAGE, name="9P2000.L"):
    return call(100, "Is", size, name)[6:]

def attach(name="", user="root", fid=None):
    fid = fid or new_fid()
    call(104, "IIssI", fid, ANY, user, name, 0)
    return fid

def walk(fid, *names, to=None):
    to = to or new_fid()
    answer = call(110, "IIH" + "s" * len(names), fid, to, len(names), *names)
    if answer[0] < len(names):
        raise Refused("after %d" % answer[0])
    return to

def begin(dialect="9P2000.L"):
    global last
    last = 20
    version(name=dialect)
    attach(fid=TOP)
    for fid, names in places.items():
        walk(TOP, *names, to=fid)

def lopen(fid, flags=0):
    call(12, "II", fid, flags)
    return fid

def topen(fid, mode):
    call(112, "IB", fid, mode)

def tread(fid, offset=0, count=4000):
    return call(116, "IQI", fid, offset, count)[4:]

def read(fid, *names):
    return tread(lopen(walk(fid, *names)))

def ls(fid, *names):
    data = call(40, "IQI", lopen(walk(fid, *names)), 0, 4000)[4:]
    found = []
    while data:
        end = 24 + int.from_bytes(data[22:24], "little")
        found.append(data[24:end].decode())
        data = data[end:]
    return sorted(set(found) - {".", ".."})

def write(fid, data, offset=0):
    return int.from_bytes(call(118, "IQI", fid, offset, len(data), data=data), "little")

def lcreate(fid, name, flags=0o102):
    fid = walk(fid)
    call(14, "IsIII", fid, name, flags, 0o644, 0)
    return fid

def tcreate(fid, name, kind=0, extension=""):
    fid = walk(fid)
    call(114, "IsIBs", fid, name, kind | 0o644, 1, extension)
    return fid

def mkdir(fid, name):
    call(72, "IsII", fid, name, 0o755, 0)

def symlink(fid, name, target="target"):
    call(16, "IssI", fid, name, target, 0)

def readlink(fid, *names):
    return call(22, "I", walk(fid, *names))[2:].decode()

def mknod(fid, name, mode=0o100644, major=0, minor=0):
    call(18, "IsIIII", fid, name, mode, major, minor, 0)

def link(folder, fid, name):
    call(70, "IIs", folder, fid, name)

def rename(fid, folder, name):
    call(20, "IIs", fid, folder, name)

def renameat(folder, name, new_folder, new_name):
    call(74, "IsIs", folder, name, new_folder, new_name)

def unlinkat(fid, name, flags=0):
    call(76, "IsI", fid, name, flags)

def remove(fid):
    call(122, "I", fid)

def clunk(fid):
    call(120, "I", fid)

def setattr(fid, valid, mode=0, uid=0, gid=0, size=0):
    call(26, "IIIIIQQQQQ", fid, valid, mode, uid, gid, size, 0, 0, 0, 0)

def wstat(fid, name="", mode=ANY, size=(1 << 64) - 1):
    fixed = struct.pack("<HI13sIIIQ", 65535, ANY, b"\\xff" * 13, mode, ANY, ANY, size)
    stat = fixed + text(name) + text("") * 4 + struct.pack("<III", ANY, ANY, ANY)
    stat = struct.pack("<H", len(stat)) + stat
    call(126, "IH", fid, len(stat), data=stat)

def xattrwalk(fid, name):
    to = new_fid()
    call(30, "IIs", fid, to, name)
    return to

def xattrcreate(fid, name, size):
    call(32, "IsQI", fid, name, size, 0)
    return fid

def outcome(attack):
    try:
        return eval(attack)
    except Refused as refused:
        return refused.args[0]
    except Broken:
        device.start()
        return "broken"

def all_places():
    for name in ls(TOP):
        yield [name]
        if name[0] == "b":
            for inner in ls(TOP, name):
                yield [name, inner]

device = Device("holdfast-none")
places = {}
begin()
for names in all_places():
    content = outcome(f"read(TOP, *{names!r}, 'file')")
    if content in FILES:
        assert FILES.index(content) + RW not in places, (content, names)
        places[FILES.index(content) + RW] = names
assert {RW, RO, OTHER, ALONE, ONE} <= set(places), places
"""

_ATTACK = """
places[GROUP], places[LEFT] = places[RW][:1], places[KEPT][:1]
[places[EMPTY]] = [names for names in all_places() if names[:-1] == places[LEFT] and names != places[KEPT]]
numbers = {fid: names[-1] for fid, names in places.items()}
for attack in ATTACKS:
    begin()
    print(repr((attack, outcome(attack))))
device.give_back()
"""

# -- what it sends, and what it gets ----------------------------------------------------------------

#: What is served: two groups, and the share with a cache mode of its own and the file, which are alone.
_EXPORT = ["7", "8", "b0", "b2"]
#: The container's root and /usr are shares, too.
_IN_GROUP = ["2", "3", "4", "5", "6"]
#: A group that one share is left of: where the other was there is an empty folder.
_IN_LEFT = ["0", "1"]
_IN_RW = ["device", "dir", "fifo", "file", "hard", "moved-dir", "socket", "to-dir", "to-etc", "to-file", "up"]

#: Names that are paths, absolute and relative, to what is there and to what is not.  A server that follows them harms
#: the test's own folders; the host's are named only in messages that read.
_PATHS = (
    '"/"', '"dir/file"', '"dir/new"', '"dir/.."', '"./new"', '"../.."', '"../outside/secret"', '"../outside/new"',
    'OUTSIDE + "/secret"', 'OUTSIDE + "/new"', '"../" * 40 + OUTSIDE[1:] + "/secret"', '"to-dir/secret"',
    '"to-dir/new"',
)  # fmt: skip
_PLACES = ("numbers[GROUP]", 'numbers[GROUP] + "/" + numbers[RW]', 'numbers[GROUP] + "/.."', 'numbers[ALONE] + "/.."')
_PATHS_OF_THE_HOST = ('"/etc"', '"/etc/passwd"', '"../" * 40 + "etc/passwd"', '"/proc/self/root"', '"to-etc/passwd"')


def _all(outcome: object, *attacks: str) -> dict[str, object]:
    return dict.fromkeys(attacks, outcome)


def _names(message: str, *, up: object, here: object) -> dict[str, object]:
    """A message with everything that is no name in the place of NAME; for the host's kernel a NUL ends a name.

    Args:
        up, here: what it gets for ".." and "."; for all else it is ENOENT.
    """
    names = {'".."': up, '"."': here, 'b"..\\0new"': up, **_all("ENOENT", '""', 'b"\\0new"', *_PATHS)}
    return {message.replace("NAME", name): outcome for name, outcome in names.items()}


def _making(folder: str, name: str, file: str = 'walk(RW, "file")') -> list[str]:
    """All that makes a name: opens with O_CREAT (and O_TRUNC), the types of 9P2000.u, and links."""
    messages = (
        "lcreate(FOLDER, NAME)", "lcreate(FOLDER, NAME, 0o1102)", "tcreate(FOLDER, NAME)",
        "tcreate(FOLDER, NAME, 0x80000000)", 'tcreate(FOLDER, NAME, 0x02000000, "target")', "mkdir(FOLDER, NAME)",
        "tcreate(FOLDER, NAME, 0x01000000, str(FILE))", "symlink(FOLDER, NAME)", "mknod(FOLDER, NAME)",
        "link(FOLDER, FILE, NAME)",
    )  # fmt: skip
    return [message.replace("FOLDER", folder).replace("NAME", name).replace("FILE", file) for message in messages]


_OTHERS = ("RO", "OTHER", "KEPT", "ALONE", "ONE")
#: What is no share: the export, its groups, and where a share of one was.
_FOLDERS = ("TOP", "GROUP", "LEFT", "EMPTY")
#: What is in these.
_ENTRIES = (
    ("TOP", "GROUP"), ("TOP", "LEFT"), ("TOP", "ALONE"), ("TOP", "ONE"), ("GROUP", "RW"), ("LEFT", "KEPT"),
    ("LEFT", "EMPTY"),
)  # fmt: skip


#: Sent first: the channel works, and makes what the rest needs.
WORKS: dict[str, object] = {
    "ls(TOP)": _EXPORT,
    "ls(GROUP)": _IN_GROUP,
    "ls(LEFT)": _IN_LEFT,
    "ls(EMPTY)": [],
    'read(RW, "file")': b"rw",
    'read(KEPT, "file")': b"kept",
    'read(ALONE, "file")': b"alone",
    'read(RO, "file")': b"ro",
    'read(RW, "dir", "file")': b"in dir",
    'read(RW, "dir", "..", ".", "dir", "file")': b"in dir",
    "ls(ONE)": ["file"],
    'write(lcreate(RW, "made"), b"made by the guest")': 17,
    'mkdir(RW, "made-dir")': None,
    'rename(walk(RW, "made"), walk(RW, "made-dir"), "moved")': None,
    'renameat(RW, "made-dir", RW, "moved-dir")': None,
    'link(RW, walk(RW, "moved-dir", "moved"), "hard")': None,
    'symlink(RW, "to-file", OUTSIDE + "/secret")': None,
    'symlink(RW, "to-dir", OUTSIDE)': None,
    'symlink(RW, "to-etc", "/etc")': None,
    'symlink(RW, "up", "..")': None,
    'readlink(RW, "to-etc")': "/etc",
    "ls(RW)": _IN_RW,
}
ATTACKS: dict[str, dict[str, object]] = {
    "walk": {
        **_names("ls(GROUP, NAME)", up=_EXPORT, here=_IN_GROUP),
        **_names("ls(ALONE, NAME)", up=_EXPORT, here=["file"]),
        **_names("ls(EMPTY, NAME)", up=_IN_LEFT, here=[]),
        **_names("ls(RW, NAME)", up=_IN_GROUP, here=_IN_RW),
        **_names('ls(RW, "dir", NAME)', up=_IN_RW, here=["file"]),
        **_all("ENOENT", *(f"walk({fid}, {path})" for fid in ("RW", "GROUP", "TOP") for path in _PATHS_OF_THE_HOST)),
        **_all(
            _EXPORT, 'ls(TOP, "..")', 'ls(RW, *[".."] * 16)', 'ls(walk(RW, "dir"), "..", "..", "..")',
            'ls(GROUP, *[".."] * 16)', 'ls(RW, "to-dir", "..", "..", "..")', 'ls(walk(RW, "to-dir"), "..", "..", "..")',
        ),
        **_all(_IN_GROUP, 'ls(RW, "to-dir", "..", "..")', 'ls(walk(RW, "to-dir"), "..", "..")'),
        'walk(RW, *[".."] * 17)': "EINVAL",
        'walk(RW, "..", "..", "..", "outside", "secret")': "after 3",
        'walk(GROUP, "..", "..", "outside", "secret")': "after 2",
        'read(ONE, "secret")': "ENOENT",
        'read(ONE, "..", "secret")': "after 1",
        # What was shared there is so no longer.
        'read(EMPTY, "file")': "ENOENT",
    },
    "attach": _all(
        _EXPORT, 'ls(attach("/", user=OUTSIDE))',
        *(f"ls(attach({name}))" for name in ('""', '".."', *_PLACES, *_PATHS, *_PATHS_OF_THE_HOST)),
    ),
    "make": {
        attack: outcome
        for message in _making("RW", "NAME")
        for attack, outcome in _names(message, up="EEXIST", here="EEXIST").items()
    },
    "move and remove": {
        **_names('rename(walk(RW, "file"), RW, NAME)', up="EISDIR", here="EISDIR"),
        **_names('renameat(RW, "file", RW, NAME)', up="EISDIR", here="EISDIR"),
        **_names('renameat(RW, NAME, RW, "new")', up="EISDIR", here="EISDIR"),
        **_names("unlinkat(RW, NAME)", up="ENOTEMPTY", here="EINVAL"),
        **_names('unlinkat(walk(RW, "dir"), NAME, 0x200)', up="ENOTEMPTY", here="EINVAL"),
        # Twstat takes these names: they lead no further than to the export, which is another mount.
        **_all("EXDEV", *(f'wstat(walk(RW, {path}), "..")' for path in ('"file"', '"dir", "file"'))),
        **_all("EXDEV", 'wstat(walk(RW, "file"), ".")', 'wstat(walk(RW, "file"), b"..\\0new")'),
        **_all("EXDEV", *(f'wstat({it}, "..")' for it in ("RW", "KEPT", "EMPTY"))),
        **_all("EBUSY", *(f'wstat({it}, "..")' for it in ("ALONE", "GROUP", "LEFT"))),
    },
    "attributes": {
        **_all("ENOTSUP", *(f'xattrwalk(walk(RW, "file"), {name})' for name in ('".."', *_PATHS))),
        **_all("ENOTSUP", *(f'clunk(xattrcreate(walk(RW, "file"), {name}, 0))' for name in ('".."', *_PATHS))),
        'xattrwalk(walk(RW, "to-file"), "user.secret")': "ENODATA",
        'clunk(xattrcreate(walk(RW, "to-file"), "user.new", 0))': "EPERM",
        # What QEMU has in its memory is no attribute's value.
        'tread(xattrcreate(walk(RW, "file"), "user.new", 64))': bytes(64),
        'tread(xattrcreate(walk(RW, "file"), "user.new", 64), 64)': b"",
        'tread(xattrcreate(walk(RW, "file"), "user.new", 64), 1 << 63)': b"",
        **_all("E2BIG", *(f'xattrcreate(walk(RW, "file"), "user.new", 1 << {bits})' for bits in (17, 32, 63))),
    },
    "links that the guest has made": {
        **_all("ELOOP", *(f'lopen(walk(RW, "to-file"), {flags})' for flags in ("0", "1", "2", "0o1002", "0o2001"))),
        **_all("ELOOP", *(f'lopen(walk(RW, "{to}"), 0o400000)' for to in ("to-file", "to-dir", "to-etc", "up"))),
        **_all("ELOOP", *(f'lopen(walk(RW, "{to}"), 0o10000000)' for to in ("to-file", "to-dir", "to-etc", "up"))),
        **_all("ELOOP", *(f'ls(RW, "{to}")' for to in ("to-dir", "to-etc", "up"))),
        **_all("ENOTDIR", *(f'lopen(walk(RW, "{to}"), 0o200000)' for to in ("to-file", "to-dir", "to-etc", "up"))),
        **_all("after 1", 'read(RW, "to-dir", "secret")', 'read(RW, "to-etc", "passwd")', 'read(RW, "up", "0")'),
        **_all("ENOTDIR", 'read(walk(RW, "to-dir"), "secret")', 'read(walk(RW, "to-etc"), "passwd")'),
        **_all("ENOTDIR", *_making('walk(RW, "to-dir")', '"new"')),
        **_all("EEXIST", *_making("RW", '"to-file"')),
        **_all("ELOOP", 'lcreate(RW, "to-file")', 'lcreate(RW, "to-file", 0o1102)', 'tcreate(RW, "to-file")'),
        **_all(
            "ENOTDIR", 'unlinkat(walk(RW, "to-dir"), "secret")', 'renameat(walk(RW, "to-dir"), "secret", RW, "new")',
            'renameat(RW, "file", walk(RW, "to-dir"), "new")', 'rename(walk(RW, "file"), walk(RW, "to-dir"), "new")',
        ),
        **_all("ELOOP", 'setattr(walk(RW, "to-file"), 1, mode=0o777)', 'setattr(walk(RW, "to-file"), 8, size=0)'),
        'wstat(walk(RW, "to-file"), size=0)': "ELOOP",
        # These are the link's own: its owner, its times, a second name.
        'setattr(walk(RW, "to-file"), 6, uid=5, gid=5)': None,
        'setattr(walk(RW, "to-file"), 0x30)': None,
        'link(RW, walk(RW, "to-file"), "new")': None,
        'lopen(walk(RW, "new"))': "ELOOP",
        'remove(walk(RW, "new"))': None,
    },
    # Of the same group, of another, of none.
    "other shares": _all(
        "EXDEV", *(f'link(RW, walk({share}, "file"), "new")' for share in _OTHERS),
        *(f'link({share}, walk(RW, "file"), "new")' for share in _OTHERS if share not in ("RO", "ONE")),
        'tcreate(RW, "new", 0x01000000, str(walk(RO, "file")))',
        *(f'renameat({share}, "file", RW, "new")' for share in _OTHERS),
        *(f'rename(walk({share}, "file"), RW, "new")' for share in _OTHERS),
        *(f'renameat(RW, "{name}", {share}, "new")' for name in ("file", "dir") for share in _OTHERS),
        *(f'renameat(RW, "dir", {folder}, "new")' for folder in _FOLDERS),
        *(f'rename(walk(RW, "file"), {folder}, "new")' for folder in _FOLDERS),
        *(f'renameat({folder}, numbers[{entry}], RW, "new")' for folder, entry in _ENTRIES),
        *(
            f'renameat({folder}, numbers[{entry}], {other}, "new")'
            for folder, entry in _ENTRIES for other in _FOLDERS
            if folder != other and {folder, other} != {"LEFT", "EMPTY"}
        ),
    ),
    "read-only": {
        **_all("EROFS", *_making("RO", '"new"'), *_making("RO", '"new"', 'walk(RO, "file")')),
        **_all("EROFS", *(f'lopen(walk(RO, "file"), {flags})' for flags in ("1", "2", "0o1000", "0o2001"))),
        'write(lopen(walk(RO, "file")), b"x")': "EBADF",
        'write(walk(RO, "file"), b"x")': "EINVAL",
        **_all(
            "EROFS", 'setattr(walk(RO, "file"), 1, mode=0o777)', 'setattr(walk(RO, "file"), 6, uid=5, gid=5)',
            'setattr(walk(RO, "file"), 8, size=0)', 'setattr(walk(RO, "file"), 0x30)', "setattr(RO, 1, mode=0o777)",
            'wstat(walk(RO, "file"), size=0)', 'wstat(walk(RO, "file"), "new")', 'unlinkat(RO, "file")',
            'remove(walk(RO, "file"))', 'renameat(RO, "file", RO, "new")', 'rename(walk(RO, "file"), RO, "new")',
            'clunk(xattrcreate(walk(RO, "file"), "user.new", 0))',
        ),
    },
    "the export itself": {
        **_all("EROFS", *(message for folder in (*_FOLDERS, "ONE") for message in _making(folder, '"new"'))),
        **_all(
            "EROFS", *(
                message.replace("FOLDER", folder).replace("ENTRY", entry)
                for folder, entry in _ENTRIES
                for message in (
                    "unlinkat(FOLDER, numbers[ENTRY], 0x200)", 'renameat(FOLDER, numbers[ENTRY], FOLDER, "new")',
                    "remove(ENTRY)", 'rename(ENTRY, FOLDER, "new")', 'wstat(ENTRY, "new")',
                )
            ),
            "renameat(GROUP, numbers[RW], GROUP, numbers[RO])", "renameat(TOP, numbers[GROUP], TOP, numbers[LEFT])",
            "renameat(TOP, numbers[ALONE], TOP, numbers[ONE])", "renameat(LEFT, numbers[EMPTY], LEFT, numbers[KEPT])",
            'renameat(LEFT, numbers[KEPT], EMPTY, "new")', 'unlinkat(ONE, "file")', 'remove(walk(ONE, "file"))',
            'renameat(ONE, "file", ONE, "new")',
        ),
        **_all(
            "EROFS", *(
                message.replace("FOLDER", folder)
                for folder in _FOLDERS
                for message in (
                    "setattr(FOLDER, 1, mode=0o777)", "setattr(FOLDER, 6, uid=5, gid=5)", "setattr(FOLDER, 0x30)",
                    "wstat(FOLDER, mode=0x800001FF)", 'clunk(xattrcreate(walk(FOLDER), "user.new", 0))',
                )
            ),
        ),
        # QEMU opens a folder for reading, whatever is asked for.
        **_all("EINVAL", *(f'write(lopen(walk({it}), {flags}), b"x")' for it in _FOLDERS for flags in (1, 2, 0o1002))),
        "remove(TOP)": "EINVAL",
    },
    "special files": {
        **_all("ENXIO", *(f'lopen(walk(RW, "{it}"), {mode})' for it in ("fifo", "socket") for mode in (0, 1, 2))),
        **_all("EACCES", *(f'lopen(walk(RW, "device"), {mode})' for mode in (0, 1, 2))),
        **_all("ENXIO", *(f'setattr(walk(RW, "{it}"), 1, mode=0o777)' for it in ("fifo", "socket", "device"))),
        **_all("ENXIO", 'mknod(RW, "new", 0o10644)', 'mknod(RW, "new", 0o140644)', 'tcreate(RW, "new", 0x00200000)'),
        **_all("EPERM", 'mknod(RW, "new", 0o20666, 1, 3)', 'mknod(RW, "new", 0o60666, 8, 0)'),
        **_all("EPERM", *(f'tcreate(RW, "new", 0x00800000, "{device}")' for device in ("c 1 3", "b 8 0"))),
    },
    # Another dialect has flags and errors of its own.
    "9P2000.u": {
        f'begin("9P2000.u") or {attack}': outcome
        for attack, outcome in {
            'topen(walk(RW, "file"), 0)': None,
            **_all("ELOOP", *(f'topen(walk(RW, "to-file"), {mode})' for mode in ("0", "1", "2", "0x12"))),
            **_all("EROFS", *(f'topen(walk(RO, "file"), {mode})' for mode in ("1", "2", "0x11"))),
            **_names("tcreate(RW, NAME)", up="EEXIST", here="EEXIST"),
            'tcreate(walk(RW, "to-dir"), "new")': "ENOTDIR",
            'walk(RW, "../outside/secret")': "ENOENT",
        }.items()
    },
    # Sizes and numbers that lie.  "broken": QEMU takes no more from the device until it is reset.
    "malformed": {
        **_all(
            "broken", 'send(b"")', 'send(b"abc")', 'send(message(110, b"", 3))', 'send(message(110, b"", 7))',
            'send(message(110, b"", ANY))', 'send(message(12, b"", 100))', 'call(110, "IIH", RW, 99, 3)',
            'call(110, "IIHH", RW, 99, 1, 65535, data=b"x")', 'call(118, "IQI", lcreate(RW, "hard"), 0, 5000)',
            'call(118, "IQI", lcreate(RW, "hard"), 0, ANY)', 'tread(lopen(walk(RW, "file")), 0, ANY)',
            'call(100, "Is", PAGE, "9P2000.L", room=3)', 'call(24, "IQ", RW, 0x3FFF, room=12)',
            'call(40, "IQI", lopen(walk(RW, "dir")), 0, 4000, room=12)',
        ),
        **_all("ENOTSUP", *(f'send(message({kind}, b""))' for kind in (0, 6, 7, 102, 255))),
        **_all("EINVAL", 'call(110, "IIH", RW, 99, 65535)', "attach(fid=RW)", 'walk(RW, "dir", to=RO)'),
        **_all("EINVAL", *(f'tread(lopen(walk(RW, "file")), {offset})' for offset in ("1 << 63", "(1 << 64) - 1"))),
        'write(lcreate(RW, "hard"), b"x", (1 << 63) - 1)': "EINVAL",
        'call(108, "H", 1)': b"",
        **_all("EMSGSIZE", "version(0)", "version(100)", "version(ANY)"),
        'version(name="9P2000.L/..")': b"unknown",
        "version(0x7FFFFFFF)": b"9P2000.L",
    },
}  # fmt: skip


# -- the host's side --------------------------------------------------------------------------------


class Attacked(NamedTuple):
    """What a run of the program has left.

    Attributes:
        outcomes: what each message got.
        printed: everything that it printed.
        before: :func:`state` before it.
        seen: what happened meanwhile to what is not shared: folder, name, event.
        qemu_pid: as it was before.
    """

    outcomes: dict[str, object]
    printed: str
    before: dict[str, object]
    seen: list[tuple[str, str, int]]
    qemu_pid: int


def lay_out(base: Path) -> Path:
    """What is shared, and beside it what is not."""
    files = {
        "outside/secret": SECRET, "outside/sub/secret": SECRET, "single/secret": SECRET, "single/file": "single",
        "rw/file": "rw", "rw/dir/file": "in dir", "ro/file": "ro", "other/file": "other",
        "alone/file": "alone", "kept/file": "kept", "gone/file": SECRET,
    }  # fmt: skip
    for path, content in files.items():
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_text(content)
    os.mkfifo(base / "rw/fifo")
    os.mknod(base / "rw/socket", stat.S_IFSOCK | 0o600)
    os.mknod(base / "rw/device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    busybox_tree(base / "container")
    (base / "container/host").mkdir()
    (base / "bundle").mkdir()
    return base


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def cores_wanted() -> Iterator[None]:
    """A host that keeps cores: QEMU's would be of the machine's size."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


@contextlib.contextmanager
def one_kept(pod: holdfast.Pod, host: Path) -> Iterator[None]:
    """One share of a group is left meanwhile, for another container has it, too."""
    kept, *gone = (f"type=bind,src={host}/{name},dst=/{name}" for name in ("kept", "gone"))
    with contextlib.ExitStack() as until_the_end:
        with running(pod, "first", [kept, *gone]):
            until_the_end.enter_context(running(pod, "second", [kept]))
        yield


def run(pod: holdfast.Pod, host: Path, program: str) -> holdfast.Result:
    """Runs ``program`` on top of the driver and the client, in a container with every right that helps."""
    files = [b"rw", b"ro", b"other", b"kept", b"alone", b"single"]
    known = {"OUTSIDE": f"{host}/outside", "SECRET": SECRET.encode(), "FILES": files}
    given = "".join(f"{name} = {value!r}\n" for name, value in known.items())
    bundle = make_bundle(
        host / "bundle", [*HOST_PYTHON, "-c", given + _DRIVER + _CLIENT + program],
        root={"path": str(host / "container")},
        process={"capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _MIGHTY)},
        mounts=[
            {"destination": path, "type": kind, "source": kind}
            for path, kind in (("/proc", "proc"), ("/sys", "sysfs"), ("/dev", "tmpfs"))
        ],
    )  # fmt: skip
    mounts = (
        HOST_USR, f"type=bind,src={host}/rw,dst=/mnt/rw", f"type=bind,src={host}/ro,dst=/mnt/ro,ro",
        f"type=bind,src={host}/other,dst=/mnt/other", f"type=bind,src={host}/alone,dst=/mnt/alone,cache=loose",
        f"type=bind,src={host}/single/file,dst=/mnt/file",
    )  # fmt: skip
    return pod.run(bundle=bundle, mounts=mounts, env=HOST_PYTHON_ENV)


def state(host: Path) -> dict[str, object]:
    """All of what no message may change.  The ctime tells even of what was changed and put back."""
    found: dict[str, object] = {"": sorted(os.listdir(host))}
    for folder in ("outside", "single", "ro", "other", "alone", "kept", "gone"):
        for path in (host / folder, *(host / folder).rglob("*")):
            status = path.lstat()
            found[str(path)] = (
                path.read_bytes() if path.is_file() else sorted(os.listdir(path)), status.st_mode, status.st_uid,
                status.st_gid, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns,
            )  # fmt: skip
    return found


@contextlib.contextmanager
def watching(host: Path) -> Iterator[Callable[[], list[tuple[str, str, int]]]]:
    """A function that says what happened to what is not shared: in which folder, to what, and what."""
    folders = {}
    inotify = Inotify()
    try:
        for folder in ("outside", "outside/sub", "single", "gone"):
            fd = os.open(host / folder, os.O_PATH | os.O_CLOEXEC)
            folders[inotify.watch(fd, _IN_ALL_EVENTS)] = folder
            os.close(fd)
        yield lambda: [
            (folders[event.watch], event.name.decode(), event.mask)
            for event in inotify.read()
            if (folders[event.watch], event.name) != ("single", b"file")
        ]
    finally:
        inotify.close()


@pytest.fixture(scope="module")
def attacked(shared_pod: holdfast.Pod, host: Path) -> Attacked:
    """All messages, sent in one run."""
    attacks = [*WORKS, *(attack for group in ATTACKS.values() for attack in group)]
    before, qemu_pid = state(host), shared_pod.inspect().qemu_pid
    with one_kept(shared_pod, host), watching(host) as look:
        result = run(shared_pod, host, f"ATTACKS = {attacks!r}\n{_ATTACK}")
        seen = look()
    assert result.status == 0, result
    outcomes = dict(ast.literal_eval(line) for line in result.text.splitlines() if line.startswith("("))
    assert list(outcomes) == attacks
    return Attacked(outcomes, result.text, before, seen, qemu_pid)


def test_messages_that_are_allowed_work(attacked, host):
    """So a refusal is one, and no fault of the channel's."""
    assert {attack: attacked.outcomes[attack] for attack in WORKS} == WORKS
    assert (host / "rw/moved-dir/moved").read_bytes() == b"made by the guest"
    assert os.readlink(host / "rw/to-file") == str(host / "outside/secret")


@pytest.mark.parametrize("group", ATTACKS)
def test_every_other_message_is_refused_or_stays_inside(attacked, group):
    assert {attack: attacked.outcomes[attack] for attack in ATTACKS[group]} == ATTACKS[group]


def test_nothing_beside_the_shares_was_changed_or_opened(attacked, host):
    assert attacked.seen == []
    assert state(host) == attacked.before
    assert "ESCAPED" not in attacked.printed
    assert SECRET not in attacked.printed


def test_the_watch_sees_what_it_must(tmp_path):
    """The test before would fail had a secret been read, or had its mode been set and set back."""
    host = lay_out(tmp_path)
    before = state(host)
    with watching(host) as look:
        (host / "outside/secret").read_text()
        mode = stat.S_IMODE((host / "single/secret").stat().st_mode)
        (host / "single/secret").chmod(0o600)
        (host / "single/secret").chmod(mode)
        assert {(folder, name) for folder, name, _ in look()} == {("outside", "secret"), ("single", "secret")}
    assert {path for path, what in state(host).items() if what != before[path]} == {f"{host}/single/secret"}


def test_the_share_has_what_was_allowed_and_nothing_else(attacked, host):
    assert sorted(os.listdir(host / "rw")) == _IN_RW
    assert os.listdir(host / "rw/dir") == ["file"]
    assert [(host / "rw" / path).read_text() for path in ("file", "dir/file")] == ["rw", "in dir"]
    assert (host / "rw/hard").read_bytes() == b"made by the guest"


def test_the_pod_goes_on_and_the_device_with_it(attacked, shared_pod, host):
    """QEMU is the same, and the guest's kernel mounts the device that was taken from it."""
    assert shared_pod.inspect().qemu_pid == attacked.qemu_pid
    script = "cat /m/file; grep -o '^holdfast[^ ]* /m' /proc/mounts"
    printed = output(sh(shared_pod, script, mounts=[f"type=bind,src={host}/other,dst=/m,cache=none"]))
    assert printed == "otherholdfast-none /m\n"
    assert_holds_nothing(shared_pod)


def test_a_name_that_ends_qemu_ends_the_pod_and_nothing_else(data, state_root, tmp_path, cores_wanted):
    """QEMU 7.2 checks the names of all messages but Twstat, and asserts later that none has a "/" (local_name_to_path).

    So root in a guest can end its own machine, as it can in other ways.  A QEMU that checks this name refuses it.
    """
    host = lay_out(tmp_path)
    before = state(host)
    attack = 'wstat(walk(RW, "dir", "file"), "../../outside/new")'
    with watching(host) as look, holdfast.Pod(root=state_root, data=data) as pod:
        qemu_pid = pod.inspect().qemu_pid
        [cores] = re.findall(r"Max core file size +(\S+)", Path(f"/proc/{qemu_pid}/limits").read_text())
        assert cores == "0"
        try:
            result = run(pod, host, f"print(outcome({attack!r}))")
        except MachineFailed as error:
            assert error.code == "machine-died"
            assert "local_name_to_path" in str(error)
            wait_for_end(qemu_pid)
        else:
            assert output(result) == "ENOENT\n"
        assert look() == []
    assert state(host) == before
    assert os.listdir(host / "rw/dir") == ["file"]
    assert_nothing_held(state_root)
