"""Shares in a real guest: followed files, cache modes, SQLite, policy, and guests that try to get out."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.linux import syscalls
from holdfast.pod.client import STDOUT
from holdfast.spec.annotations import NO_WRITABLE_SHARES
from holdfast.spec.default import CAPABILITIES
from tests.images import busybox_tree, make_bundle
from tests.vm.support import (
    BUSYBOX,
    DEADLINE_S,
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    assert_holds_nothing,
    output,
    running,
    sh,
    start_exec,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIGHTY = [*CAPABILITIES, "CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_DAC_READ_SEARCH", "CAP_SETFCAP", "CAP_SYS_RAWIO"]
SECRET = "nobody in the guest may read this"
#: For what a container runs: tells of everything it could read that it must not.
_PRELUDE = f"""
import errno, os, threading, time
SECRET = {SECRET!r}.encode()
def look(read):
    try:
        data = read()
    except OSError:
        return
    if SECRET in data:
        print("ESCAPED", data, flush=True)
def cat(path, **more):
    fd = os.open(path, os.O_RDONLY, **more)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is shared; beside it, ``outside`` is not."""
    (tmp_path / "outside/sub").mkdir(parents=True)
    (tmp_path / "outside/file").write_text(SECRET)
    (tmp_path / "outside/sub/file").write_text(SECRET)
    shared = tmp_path / "shared"
    (shared / "dir/sub").mkdir(parents=True)
    for path in ("file", "other", "dir/file", "dir/sub/file"):
        (shared / path).write_text(f"{path}\n")
    return shared


@pytest.fixture
def hostile(tmp_path: Path, shared_pod: holdfast.Pod):
    """A function that runs Python in a container with every right that helps, with shares; returns what it printed."""

    def run(program: str, mounts: list[str], pod: holdfast.Pod = shared_pod) -> str:
        root = tmp_path / "mighty"
        if not root.exists():
            busybox_tree(root)
            (root / "host").mkdir()
        capabilities = dict.fromkeys(("bounding", "effective", "permitted"), MIGHTY)
        bundle = make_bundle(
            tmp_path / "b", [*HOST_PYTHON, "-c", _PRELUDE + program], root={"path": str(root)},
            process={"capabilities": capabilities},
        )  # fmt: skip
        result = pod.run(bundle=bundle, mounts=[HOST_USR, *mounts], env=HOST_PYTHON_ENV)
        assert result.status == 0, result.stderr
        return result.text

    return run


def replace(path: Path, text: str) -> None:
    new = path.with_name(".new")
    new.write_text(text)
    os.rename(new, path)


def wait_until(condition: Callable[[], bool]) -> None:
    """The monitor follows on its own; nothing tells a test when it has."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- files alone, and directories both ways ---------------------------------------------------------


def test_two_files_of_one_directory_and_the_directory_both_ways(shared_pod, folder):
    mounts = [
        f"type=bind,src={folder}/file,dst=/file", f"type=bind,src={folder}/other,dst=/renamed,ro",
        f"type=bind,src={folder},dst=/rw", f"type=bind,src={folder},dst=/ro,ro",
    ]  # fmt: skip
    with running(shared_pod, "c", mounts):
        found = {share["guest_path"].rpartition("/")[2]: share for share in shared_pod.storage()["shares"]}
        assert {"file", "other"} <= set(found)  # each keeps its name
        script = "cat /file /renamed; echo more >> /file; echo made > /rw/made; cat /ro/made /ro/file; echo x > /ro/x"
        result = shared_pod.exec("c", ["sh", "-c", script])
        assert result.text == "file\nother\nmade\nfile\nmore\n"
        assert b"Read-only" in result.stderr
        assert b"Read-only" in shared_pod.exec("c", ["sh", "-c", "echo x > /renamed"]).stderr
    assert_holds_nothing(shared_pod)


_MAP = """
import mmap, sys
for line in sys.stdin:
    with open("/f") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        sys.stdout.write(view[:].decode())
"""


def test_gap_a_file_replaced_by_rename_is_still_served(shared_pod, folder):
    """Read, mapped, and written: what the container has mounted becomes the new file."""

    def now(*command: str) -> str:
        return shared_pod.exec("c", command, env=HOST_PYTHON_ENV, stdin=b"\n").text

    with running(shared_pod, "c", [f"type=bind,src={folder}/file,dst=/f", HOST_USR]):
        for text in ("file\n", "second, longer\n", "3rd\n"):
            if text != "file\n":
                replace(folder / "file", text)
            wait_until(lambda text=text: now("cat", "/f") == text)
            wait_until(lambda text=text: now(*HOST_PYTHON, "-c", _MAP) == text)
        (folder / "file").unlink()
        wait_until(lambda: shared_pod.exec("c", ["cat", "/f"]).status == 1)
        assert b"No such file or directory" in shared_pod.exec("c", ["cat", "/f"]).stderr
        (folder / "file").symlink_to("../outside/file")
        assert shared_pod.exec("c", ["cat", "/f"]).stdout == b""
        replace(folder / "file", "back\n")
        wait_until(lambda: now("cat", "/f") == "back\n")
        assert output(shared_pod.exec("c", ["sh", "-c", "echo more >> /f; cat /f"])) == "back\nmore\n"
        assert (folder / "file").read_text() == "back\nmore\n"
    assert_holds_nothing(shared_pod)


# -- caching ----------------------------------------------------------------------------------------


def test_a_cache_mode_for_each_share(shared_pod, folder):
    """One directory in all three at once; only those with a cache have writable shared maps."""
    program = """
import mmap
for mode in ("mmap", "loose", "none"):
    with open(f"/{mode}/map", "w+b") as file:
        file.truncate(4096)
        try:
            with mmap.mmap(file.fileno(), 4096) as view:
                view[:5] = b"hello"
                view.flush()
        except OSError as error:
            print(mode, error.strerror)
    print(mode, open(f"/{mode}/map", "rb").read(5))
"""
    mounts = [f"type=bind,src={folder},dst=/{mode},cache={mode}" for mode in ("mmap", "loose", "none")]
    result = shared_pod.run(BUSYBOX, [*HOST_PYTHON, "-c", program], env=HOST_PYTHON_ENV, mounts=[HOST_USR, *mounts])
    assert result.text.splitlines() == [
        "mmap b'hello'", "loose b'hello'", "none Invalid argument", r"none b'\x00\x00\x00\x00\x00'",
    ]  # fmt: skip
    script = "grep -o '^holdfast[^ ]* /[a-z]*' /proc/mounts"
    lines = output(sh(shared_pod, script, mounts=mounts)).splitlines()
    assert lines == ["holdfast /mmap", "holdfast-loose /loose", "holdfast-none /none"]
    assert_holds_nothing(shared_pod)


def test_many_in_one_container_and_some_of_them_in_another(pod, tmp_path):
    """They come and go together, and those that somebody else still has stay."""
    paths = [tmp_path / f"d{number}" for number in range(24)]
    for path in paths:
        path.mkdir()
        (path / "file").write_text(path.name)
    (tmp_path / "alone").write_text("alone")
    mounts = [f"type=bind,src={path},dst=/m/{path.name}{',ro' if n % 2 else ''}" for n, path in enumerate(paths)]
    kept = [f"type=bind,src={paths[0]},dst=/kept", f"type=bind,src={paths[23]},dst=/kept-ro,ro"]
    script = "cat /m/*/file /alone; for d in /m/*; do echo x > $d/new && echo wrote $d; done 2>/dev/null; true"
    for _ in range(2):
        printed = output(sh(pod, script, mounts=[*mounts, f"type=bind,src={tmp_path}/alone,dst=/alone,ro"]))
        assert printed.startswith("".join(sorted(path.name for path in paths)) + "alone")
        assert sorted(printed.partition("alone")[2].split()[1::2]) == sorted(f"/m/d{n}" for n in range(0, 24, 2))
        assert [(path / "new").exists() for path in paths] == [number % 2 == 0 for number in range(24)]
        assert_holds_nothing(pod)
        for path in paths[::2]:
            (path / "new").unlink()
    with running(pod, "other", kept):
        assert output(sh(pod, "cat /m/*/file", mounts=mounts)) == "".join(sorted(path.name for path in paths))
        assert len(pod.storage()["shares"]) == 2
        (paths[0] / "later").write_text("later")
        assert output(pod.exec("other", ["cat", "/kept/later", "/kept-ro/file"])) == "laterd23"
    assert_holds_nothing(pod)


def test_a_share_shows_nothing_of_an_earlier_one(shared_pod, tmp_path):
    """With ``loose`` the guest does not ask again what is behind a name: a name is never used for two shares."""
    for number, text in enumerate(("first", "second, longer")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_text(text)
        script = "cat /m/file; echo -n ' and more' >> /m/file"
        assert output(sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m,cache=loose"])) == text
        assert (folder / "file").read_text() == f"{text} and more"
    assert_holds_nothing(shared_pod)


def test_a_written_file_is_let_go_of(shared_pod, tmp_path):
    """With ``loose`` Linux keeps a file open for writing back, after its last user."""
    file = tmp_path / "file"
    file.write_text("old")
    mount = f"type=bind,src={file},dst=/file,cache=loose"
    assert sh(shared_pod, "echo new > /file", mounts=[mount]).status == 0
    assert_holds_nothing(shared_pod)
    assert file.read_text() == "new\n"


def test_what_is_cached_is_written_before_a_share_goes(data, state_root, folder):
    """Also with ``loose``, where Linux writes when it likes, and a pod that ends with its container."""
    program = """
import mmap
with open("/m/written", "wb") as file:
    file.write(b"w" * 3_000_000)
with open("/m/mapped", "w+b") as file:
    file.truncate(1_000_000)
    view = mmap.mmap(file.fileno(), 1_000_000)
    view[:] = b"m" * 1_000_000
    import os
    os._exit(0)
"""
    holdfast.run(
        BUSYBOX, [*HOST_PYTHON, "-c", program], env=HOST_PYTHON_ENV, root=state_root, data=data,
        mounts=[HOST_USR, f"type=bind,src={folder},dst=/m,cache=loose"],
    )  # fmt: skip
    assert (folder / "written").read_bytes() == b"w" * 3_000_000
    assert (folder / "mapped").read_bytes() == b"m" * 1_000_000


_WRITER = """
import sqlite3, sys
db = sqlite3.connect("/m/db", isolation_level=None)
db.execute(f"PRAGMA journal_mode={sys.argv[1]}")
db.execute("PRAGMA synchronous=off")
db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, x BLOB, y TEXT)")
db.execute("CREATE INDEX i ON t (y)")
print("ready", flush=True)
for number in range(60):
    db.execute("BEGIN")
    db.executemany("INSERT INTO t (x, y) VALUES (randomblob(200), ?)", [[str(n * 7919 % 1000)] for n in range(20)])
    if number % 5 == 4:
        db.execute("DELETE FROM t WHERE n % 7 = ?", [number % 7])
    db.execute("COMMIT")
print(db.execute("PRAGMA integrity_check").fetchone()[0], db.execute("SELECT count(*) FROM t").fetchone()[0])
db.close()
"""


@pytest.mark.parametrize(("journal", "cache"), [("wal", "mmap"), ("delete", "none")])
def test_sqlite_written_in_a_container_while_the_host_reads(shared_pod, tmp_path, journal, cache):
    """Its own integrity check passes on both sides.  Locks end at the machine's border, so the host reads bytes."""
    mounts = [HOST_USR, f"type=bind,src={tmp_path},dst=/m,cache={cache}"]
    with running(shared_pod, "c", mounts):
        command = ["env", *(f"{k}={v}" for k, v in HOST_PYTHON_ENV.items()), *HOST_PYTHON, "-c", _WRITER, journal]
        with start_exec(shared_pod, "c", command) as session:
            session.wait_for(b"ready")
            ended = False
            while not ended:
                assert (tmp_path / "db").read_bytes()[:15] == b"SQLite format 3"
                ended = session.ends_within(0.02)  # and leaves the guest a processor
            assert session.wait() == 0, session.output
            said = session.output[STDOUT].decode().split()
    assert said[:2] == ["ready", "ok"]
    with sqlite3.connect(tmp_path / "db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM t").fetchone() == (int(said[2]),)
    db.close()


# -- the policy -------------------------------------------------------------------------------------


def test_writable_shares_can_be_denied(data, state_root, folder):
    with holdfast.Pod(root=state_root, data=data, writable_shares=False) as pod:
        for mount in (f"type=bind,src={folder},dst=/m", f"type=bind,src={folder}/file,dst=/m"):
            with pytest.raises(HoldfastError) as failure:
                sh(pod, "true", mounts=[mount])
            assert (failure.value.code, type(failure.value)) == ("writable-share-denied", InvalidInput)
            with pytest.raises(HoldfastError, match="denied"):
                pod.attach(mount)
            assert_holds_nothing(pod)
            assert output(sh(pod, "test -e /m", mounts=[f"{mount},ro"])) == ""


def test_a_container_s_own_annotation_denies_them_too(shared_pod, folder):
    denied = {NO_WRITABLE_SHARES: "true"}
    with pytest.raises(InvalidInput, match="denied"):
        sh(shared_pod, "true", mounts=[f"type=bind,src={folder},dst=/m"], annotations=denied)
    assert_holds_nothing(shared_pod)


# -- guests that try to get out ---------------------------------------------------------------------


def unharmed(folder: Path) -> None:
    outside = folder.parent / "outside"
    assert sorted(str(path.relative_to(outside)) for path in outside.rglob("*")) == ["file", "sub", "sub/file"]
    assert (outside / "file").read_text() == (outside / "sub/file").read_text() == SECRET
    assert outside.stat().st_nlink == 3
    assert (outside / "file").stat().st_nlink == 1


def test_hostile_directories_become_links_while_they_are_walked(hostile, folder):
    """One mount holds a directory, the other (with another 9p connection) puts a link in its place meanwhile."""
    program = f"""
outside = {str(folder.parent / "outside")!r}
start = time.monotonic()
turns = 0
reads = []
def enough():
    seconds = time.monotonic() - start
    return seconds > 2 and min(len(reads), turns) > 5 or seconds > 60
ready = threading.Barrier(4)
def swap():
    global turns
    ready.wait()
    while not enough():
        for target in (outside, "../outside", "../../../../../../../../../" + outside):
            os.rename("/n/dir", "/n/away")
            os.symlink(target, "/n/dir")
            time.sleep(0.001)
            os.unlink("/n/dir")
            os.rename("/n/away", "/n/dir")
            turns += 1
def walk(place):
    here = os.open(place + "/dir", os.O_RDONLY | os.O_DIRECTORY)
    below = os.open("sub", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
    ready.wait()
    while not enough():
        look(lambda: cat("file", dir_fd=here))
        look(lambda: cat("sub/file", dir_fd=here))
        try:
            reads.append(cat(place + "/dir/sub/file"))
        except OSError:
            pass
        look(lambda: cat("file", dir_fd=below))
        look(lambda: cat("../../../outside/file", dir_fd=below))
        look(lambda: cat("../" * 20 + outside + "/file", dir_fd=below))
        look(lambda: "".join(os.listdir(below)).encode())
        for made in (lambda: os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=here)),
                     lambda: os.mkdir("made-dir", dir_fd=below), lambda: os.chmod("file", 0o777, dir_fd=here),
                     lambda: os.truncate(place + "/dir/sub/file", 0), lambda: os.rename("file", "f2", src_dir_fd=here),
                     lambda: os.link("sub/file", "hard", src_dir_fd=here, dst_dir_fd=here)):
            try:
                made()
            except OSError:
                pass
threads = [threading.Thread(target=swap), *(threading.Thread(target=walk, args=[p]) for p in ("/m", "/n", "/m"))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(reads), turns)
"""
    mounts = [f"type=bind,src={folder},dst=/m", f"type=bind,src={folder},dst=/n,cache=none"]
    printed = hostile(program, mounts)
    assert "ESCAPED" not in printed
    reads, turns = map(int, printed.split())
    assert reads > 5
    assert turns > 5
    unharmed(folder)


def test_hostile_links(hostile, folder, tmp_path):
    """Hard links end at the share; symbolic ones are the container's to follow, in its own root."""
    (tmp_path / "second").mkdir()
    (tmp_path / "second/file").write_text("second\n")
    program = f"""
outside = {str(folder.parent / "outside")!r}
for target in (outside + "/file", "../outside/file", "/../../.." + outside + "/file", "/proc/1/root" + outside):
    os.symlink(target, "/m/link")
    look(lambda: cat("/m/link"))
    look(lambda: cat("/m/link/file"))
    os.link("/m/link", "/m/hard")
    look(lambda: cat("/m/hard"))
    os.unlink("/m/link")
    os.unlink("/m/hard")
for source, target in (("/s/file", "/m/hard"), ("/m/file", "/s/hard"), ("/m/../s/file", "/m/hard")):
    try:
        os.link(source, target)
        print("LINKED", source)
    except OSError as error:
        print(errno.errorcode[error.errno])
try:
    os.rename("/s/file", "/m/taken")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    mounts = [f"type=bind,src={folder},dst=/m", f"type=bind,src={tmp_path}/second,dst=/s"]
    assert hostile(program, mounts).splitlines() == ["EXDEV"] * 4
    unharmed(folder)


def test_hostile_the_export_itself(hostile, pod, folder, tmp_path):
    """Who may mount can mount the pod's 9p devices: that shows the pod's shares as they are, and nothing else.

    What was shared together is in a group, a folder that can be changed as little as the export itself, and its shares
    are as far from each other as any.
    """
    (tmp_path / "second").mkdir()
    (tmp_path / "second/file").write_text("second\n")
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def attempt(*actions):
    for action in actions:
        try:
            action()
            yield "DONE"
        except OSError as error:
            yield errno.errorcode[error.errno]
def change(folder, entry):
    return attempt(
        lambda: os.mkdir(folder + "/new"), lambda: os.symlink("/", folder + "/new"), lambda: open(folder + "/new", "w"),
        lambda: os.mknod(folder + "/new"), lambda: os.link(f"/x/{{alone}}/other", folder + "/new"),
        lambda: os.rename(folder + "/" + entry, folder + "/new"), lambda: os.rmdir(folder + "/" + entry),
        lambda: os.chmod(folder, 0o777), lambda: os.chown(folder, 5, 5), lambda: os.utime(folder),
        lambda: os.setxattr(folder, "user.new", b""),
    )
os.mkdir("/x")
data = b"trans=virtio,version=9p2000.L,cache=none,aname=%s"
for tag in (b"holdfast", b"holdfast-loose"):
    for name in (b"/", b"..", b"/../..", b"{folder.parent}/outside"):
        if libc.mount(tag, b"/x", b"9p", 0, data % name):
            print(errno.errorcode[ctypes.get_errno()])
            continue
        alone, group = sorted(os.listdir("/x"))
        first, *others = sorted(os.listdir("/x/" + group))
        print(alone.isdigit(), group == "b" + first, all(other.isdigit() for other in others))
        for start in ("/x", "/x/" + alone, "/x/" + group, f"/x/{{group}}/{{first}}"):
            for up in ("..", "../..", "../../..", "0/../.."):
                look(lambda: cat(f"{{start}}/{{up}}/outside/file"))
                look(lambda: cat(f"{{start}}/{{up}}{folder.parent}/outside/file"))
        print(*{{*change("/x", alone), *change("/x", group), *change("/x/" + group, first)}})
        inside = [f"/x/{{group}}/{{name}}" for name in (first, *others)]
        m, s = (path for path in inside if os.path.exists(path + "/file"))
        print(cat(m + "/file"), cat(s + "/file"))
        print(*{{*attempt(
            lambda: os.link(m + "/file", s + "/new"), lambda: os.link(s + "/file", m + "/new"),
            lambda: os.rename(m + "/file", s + "/new"), lambda: os.rename(s + "/file", m + "/file"),
            lambda: os.rename(m + "/dir", s + "/dir"), lambda: os.rename(m, s + "/new"),
            lambda: os.link(f"/x/{{alone}}/other", m + "/new"), lambda: os.rename(m + "/file", f"/x/{{group}}/new"),
        )}})
        libc.umount(b"/x")
"""
    mounts = [
        f"type=bind,src={folder},dst=/m", f"type=bind,src={tmp_path}/second,dst=/s",
        f"type=bind,src={folder}/other,dst=/other",
    ]  # fmt: skip
    printed = hostile(program, mounts, pod).splitlines()
    # The first is mounted already; of the other, whatever name is asked for, the export's top.
    each = ["True True True", "EROFS", r"b'file\n' b'second\n'", "EXDEV"]
    assert printed == ["EBUSY"] * 4 + each * 4
    assert sorted(os.listdir(folder)) == ["dir", "file", "other"]
    assert os.listdir(tmp_path / "second") == ["file"]
    unharmed(folder)


def test_hostile_devices_and_privileges_on_the_host(hostile, folder):
    """No device nodes and no file capabilities; a setuid bit is a file's mode like any other (architecture.md)."""
    program = """
def attempt(what, action):
    try:
        action()
        print(what)
    except OSError as error:
        print(what, errno.errorcode[error.errno])
attempt("char", lambda: os.mknod("/m/char", 0o20666, os.makedev(1, 1)))
attempt("block", lambda: os.mknod("/m/block", 0o60666, os.makedev(8, 0)))
capability = b"\\1\\0\\0\\2\\0\\x20\\0\\0" + bytes(12)
attempt("capability", lambda: os.setxattr("/m/file", "security.capability", capability))
attempt("setuid", lambda: os.chmod("/m/file", 0o4755))
"""
    printed = hostile(program, [f"type=bind,src={folder},dst=/m"])
    # Linux's 9p has no security.* attributes unless built for them; with them, it would be EPERM.
    assert printed.splitlines() == ["char EPERM", "block EPERM", "capability ENOTSUP", "setuid"]
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o4755
    assert sorted(os.listdir(folder)) == ["dir", "file", "other"]
    assert os.listxattr(folder / "file") == []


def test_qemu_cannot_make_devices(shared_pod):
    with open(f"/proc/{shared_pod.inspect().qemu_pid}/status") as file:
        fields = dict(line.split(":\t", 1) for line in file if line.startswith("Cap"))
    for number in (syscalls.CAP_MKNOD, syscalls.CAP_SETFCAP):
        assert not any(int(fields[name], 16) >> number & 1 for name in ("CapPrm", "CapEff", "CapBnd", "CapInh"))


@pytest.mark.parametrize("cache", ["mmap", "none", "loose"])
def test_shared_again_it_is_the_same_directory(shared_pod, tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("text")
    for _ in range(3):
        mounts = [f"type=bind,src={tmp_path},dst=/a,cache={cache}"]
        assert output(sh(shared_pod, "cat /a/folder/file; ls /a", mounts=mounts)) == "textfolder\n"
