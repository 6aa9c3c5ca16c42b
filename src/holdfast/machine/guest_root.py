"""What lies in the guest: every file of its root disk and of its initial RAM disk, by guest path.

A tree here is data - guest path to entry - made before anything is written.  Its digest is the
guest's id, and the same tree always gives the same bytes.  Each host file that was read is remembered
with its size, time and inode, so that one look at those tells later whether the guest is still right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

import msgspec

import holdfast
from holdfast.errors import NotFound
from holdfast.machine import closure, kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

HOME = "/usr/lib/holdfast"
MODULES_LIST = f"{HOME}/modules.list"
BUSYBOX = Path("/bin/busybox")
#: Programs the agent runs; the guest path is the host's, in ``/usr``.
PROGRAMS = ("crun", "mke2fs", "e2fsck", "resize2fs", "cryptsetup")
_PACKAGES = {
    "busybox": "busybox-static", "mkfs.erofs": "erofs-utils", "crun": "crun", "cryptsetup": "cryptsetup-bin",
}  # fmt: skip
_FOLDERS = ("bin", "sbin", "usr/bin", "usr/sbin")
#: What the agent may import without its source saying so, and what the interpreter needs to start.
_MODULES = (
    "_json", "_socket", "_struct", "binascii", "codecs", "ctypes", "encodings.ascii", "encodings.latin_1",
    "encodings.utf_8", "errno", "fcntl", "json", "os", "select", "signal", "stat", "struct", "termios", "time",
    "traceback", "tty", "zlib",
)  # fmt: skip
#: The parts of the package that the agent is made of.
AGENT_PARTS = ("__init__.py", "errors.py", "trace.py", "wire", "mounts", "linux", "guest")
LAUNCHER = Path(holdfast.__file__).parent / "guest/launch.py"
# A virtio-scsi controller has 256 targets, and probing all of four controllers takes 0.12 s emulated.  The guest
# starts without disks; the launcher turns scanning on again before any can come.
_MODULE_OPTIONS = {"scsi_mod": ("scan=manual",)}
_EMPTY_FOLDERS = ("/dev", "/etc", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp", "/usr/sbin", "/var")
_LINKS = {
    "/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64", "/var/run": "../run",
    "/etc/machine-id": "../run/machine-id", "/etc/mtab": "../proc/self/mounts",
    "/usr/bin/sh": "busybox", "/usr/sbin/mkfs.ext4": "mke2fs",
}  # fmt: skip
_TEXTS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "/etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "/etc/hostname": "holdfast\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


class Input(msgspec.Struct, frozen=True):
    """A host file that went into a guest."""

    size: int
    mtime_ns: int
    inode: int
    digest: str = ""

    def is_still(self, path: str) -> bool:
        """Whether ``path`` is, by its attributes, the file that was read."""
        try:
            status = os.stat(path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns, status.st_ino) == (self.size, self.mtime_ns, self.inode)


class Entry(msgspec.Struct, frozen=True):
    """One file of the guest: ``data`` is its contents, or the target of a link."""

    mode: int
    data: bytes = b""


class Tree:
    """Guest path -> entry, and the host files they were read from."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.inputs: dict[str, Input] = {}

    def read(self, path: Path) -> bytes:
        """A host file's contents; the file is an input from now on."""
        try:
            with path.open("rb") as file:
                data, status = file.read(), os.fstat(file.fileno())
        except OSError as error:
            raise NotFound("read file for the guest", subject=path, why=error, code="guest-input-not-found") from error
        digest = hashlib.sha256(data).hexdigest()
        self.inputs[str(path)] = Input(status.st_size, status.st_mtime_ns, status.st_ino, digest)
        return data

    def folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder and those above it."""
        while path not in ("", "/") and path not in self.entries:
            self.entries[path] = Entry(stat.S_IFDIR | mode)
            path, mode = path.rpartition("/")[0], 0o755

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        self.folder(path.rpartition("/")[0])
        self.entries[path] = Entry(stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self.folder(path.rpartition("/")[0])
        self.entries[path] = Entry(stat.S_IFLNK | 0o777, target.encode())

    def digest(self) -> str:
        """Of every path, mode and content."""
        total = hashlib.sha256()
        for path, entry in sorted(self.entries.items()):
            total.update(f"{path}\0{entry.mode:o}\0{hashlib.sha256(entry.data).hexdigest()}\n".encode())
        return total.hexdigest()

    def write(self, folder: Path) -> None:
        """Create everything under ``folder``, in order of path."""
        folder.mkdir()
        for path, entry in sorted(self.entries.items()):
            target = folder / path.lstrip("/")
            if stat.S_ISDIR(entry.mode):
                target.mkdir(parents=True)
            elif stat.S_ISLNK(entry.mode):
                target.symlink_to(entry.data.decode())
                continue
            else:
                target.write_bytes(entry.data)
            target.chmod(stat.S_IMODE(entry.mode))


def root_tree(interpreter: Path, package: Path, modules: kernel.ModuleTree) -> Tree:
    """The root disk: interpreter, agent, crun, file-system tools, modules, and the libraries of all."""
    tree = Tree()
    for path in _EMPTY_FOLDERS:
        tree.folder(path, 0o1777 if path == "/tmp" else 0o755)
    for path, target in _LINKS.items():
        tree.link(path, target)
    for path, text in _TEXTS.items():
        tree.file(path, text.encode())
    programs = {f"/usr/bin/{interpreter.name}": interpreter, "/usr/bin/busybox": find_program("busybox")}
    programs |= {guest_program(name): find_program(name) for name in PROGRAMS}
    for place, program in programs.items():
        tree.file(place, tree.read(program), 0o755)
    extensions = _add_python(tree, interpreter, package)
    _add_libraries(tree, interpreter, [*programs.values(), *extensions])
    _add_modules(tree, modules)
    configuration = Path("/etc/mke2fs.conf")
    if configuration.exists():
        tree.file("/etc/mke2fs.conf", tree.read(configuration))
    return tree


def initrd_modules(modules: kernel.ModuleTree) -> list[str]:
    """The modules of the initial RAM disk, in the order to load them."""
    return modules.order(*kernel.STAGE1)


def agent_files(package: Path) -> dict[str, Path]:
    """The agent's sources in the package at ``package``, by their path below it.

    Raises:
        NotFound: ``guest/agent.py`` is not among them.
    """
    found: dict[str, Path] = {}
    for part in AGENT_PARTS:
        path = package / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            # asyncio is for the host's ends of connections; the agent has its own loop.
            if file.is_file() and file.name != "aio.py":
                found[file.relative_to(package).as_posix()] = file
    if "guest/agent.py" not in found:
        raise NotFound("find the guest agent", subject=package / "guest/agent.py", code="guest-agent-not-found")
    return found


def agent_digest(package: Path) -> str:
    """Of the agent's sources: names and contents."""
    total = hashlib.sha256()
    for name, path in agent_files(package).items():
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def guest_program(name: str) -> str:
    """Where the guest has a program."""
    return f"/usr/bin/{name}" if name in ("crun", "busybox") else f"/usr/sbin/{name}"


def find_program(name: str) -> Path:
    """A host program, wherever its folder is: a user's ``PATH`` often lacks the ``sbin`` ones."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
    found = shutil.which(name, path=search)
    if not found:
        package = _PACKAGES.get(name, "e2fsprogs")
        raise NotFound("find program", subject=name, why="not in PATH", hint=f"apt install {package}")
    return Path(os.path.realpath(found)) if name != "busybox" else Path(found)


def _add_python(tree: Tree, interpreter: Path, package: Path) -> list[Path]:
    """Add the agent and the standard library it needs, as byte code; returns the extension modules."""
    agent = agent_files(package)
    shown = {f"{HOME}/holdfast/{name}": path for name, path in agent.items()} | {f"{HOME}/agent": LAUNCHER}
    imported = closure.imports_of([*agent.values(), LAUNCHER], "holdfast")
    python = closure.python_closure(interpreter, sorted({*_MODULES, *imported}), shown)
    for name, path in shown.items():
        tree.read(path)
        tree.file(f"{name}c" if name.endswith(".py") else name, python.code[name])
    extensions = []
    for source in sorted({os.path.normpath(file) for file in python.files.values()}):
        data = tree.read(Path(source))
        # Where the interpreter looks: its library below /usr, whatever prefix it has on the host.
        place = "/usr/" + os.path.relpath(source, python.prefix)
        if source.endswith(".py"):
            tree.file(f"{place}c", python.code[source])
        else:
            tree.file(place, data)
            extensions.append(Path(source))
    return extensions


def _add_libraries(tree: Tree, interpreter: Path, programs: Iterable[Path]) -> None:
    loader = closure.loader_of(interpreter)
    needed: set[Path] = set()
    for program in programs:
        if program.suffix == ".so" or closure.loader_of(program):
            needed.update(closure.libraries(program, loader))
    if loader:
        needed.add(Path(loader))
    default = next((library.parent for library in needed if library.name.startswith("libc.so.")), Path("/lib"))
    for library in sorted(needed):
        path = _in_usr(str(library))
        tree.file(path, tree.read(library), 0o755)
        if not path.startswith("/usr/lib"):
            # Found through the host's ld.so.cache, which the guest has not got: the loader's own folder is searched.
            tree.link(f"{_in_usr(str(default))}/{library.name}", path)


def _in_usr(path: str) -> str:
    """``path`` without the link from ``/lib`` into ``/usr`` in it."""
    return f"/usr{path}" if path.startswith(("/lib/", "/lib64/")) or path in ("/lib", "/lib64") else path


def _add_modules(tree: Tree, modules: kernel.ModuleTree) -> None:
    """Add the modules below ``/usr/lib/modules``, and lists that say what to load, in order.

    ``modules.list`` is what every start loads after the root disk is mounted; ``modules.d/NAME`` is what
    an optional NAME needs besides.  A list has on each line an absolute path, and the module's options.
    """
    stage1 = initrd_modules(modules)
    always = [name for name in modules.order(*kernel.STAGE1, *kernel.STAGE2) if name not in stage1]
    lists = {MODULES_LIST: always}
    for wanted in kernel.ON_DEMAND:
        order = [name for name in modules.order(wanted) if name not in (*stage1, *always)]
        if order:
            lists[f"{HOME}/modules.d/{wanted}"] = order
    home = f"/usr/lib/modules/{modules.folder.name}"
    for name in {name: None for names in lists.values() for name in names}:
        tree.read(modules.file(name))
        tree.file(f"{home}/{name}.ko", modules.read(name))
    for path, names in lists.items():
        lines = (" ".join((f"{home}/{name}.ko", *_MODULE_OPTIONS.get(name, ()))) for name in names)
        tree.file(path, "".join(f"{line}\n" for line in lines).encode())
