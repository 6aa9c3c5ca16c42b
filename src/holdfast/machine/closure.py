"""What a program needs to run somewhere else: shared libraries, and modules of the interpreter.

Both are asked of the programs that decide it - the dynamic loader and the interpreter itself - and
never guessed from names.  The agent's imports are read from its source, so that one inside a function
counts as well.
"""

from __future__ import annotations

import ast
import struct
import subprocess
from pathlib import Path

import msgspec

from holdfast.errors import Corrupt, NotFound, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_PT_INTERP = 3
_TIMEOUT_S = 120

# Run by the guest's interpreter, which need not be the one that runs the builder: byte code and the
# modules built in differ between versions.  Reads a request, writes a reply, both JSON.
_PROBE = """
import sys, json, importlib, marshal
request = json.load(sys.stdin)
absent = []
for name in request["modules"]:
    try:
        importlib.import_module(name)
    except ImportError:
        absent.append(name)
files = {}
for name, module in list(sys.modules.items()):
    origin = getattr(module, "__file__", None)
    if origin and name != "__main__":
        files[name] = origin
from importlib.util import MAGIC_NUMBER
import base64
head = MAGIC_NUMBER + b"\\x01\\0\\0\\0" + b"\\0" * 8
code = {}
for shown, path in sorted({**request["sources"], **{f: f for f in files.values() if f.endswith(".py")}}.items()):
    with open(path, "rb") as file:
        tree = compile(file.read(), shown, "exec", dont_inherit=True, optimize=0)
    code[shown] = base64.b64encode(head + marshal.dumps(tree)).decode()
json.dump({"version": list(sys.version_info[:3]), "prefix": sys.base_prefix, "files": files, "code": code,
           "absent": absent}, sys.stdout)
"""


class PythonClosure(msgspec.Struct, frozen=True):
    """What the interpreter said: its version and prefix, files of the imported modules, compiled sources."""

    version: tuple[int, int, int]
    prefix: str
    #: module name -> file (a source, or a shared library)
    files: dict[str, str]
    #: path the source was given as -> contents of its ``.pyc``
    code: dict[str, bytes]
    #: names that could not be imported: submodule guesses, and modules of other systems
    absent: list[str]


def loader_of(program: Path) -> str:
    """The dynamic loader that ``program`` names, or ``""`` for a static one.

    Raises:
        NotFound: there is no such program.
        Unsupported: it is not a 64-bit little-endian ELF file.
    """
    try:
        data = program.read_bytes()
    except OSError as error:
        raise NotFound("read program", subject=program, why=error) from error
    if not data.startswith(_ELF64_LITTLE):
        raise Unsupported("read program", subject=program, why="it is not a 64-bit ELF file")
    try:
        table, size, count = (
            struct.unpack_from(form, data, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56))
        )
        for at in range(table, table + size * count, size):
            kind, _flags, offset, _vaddr, _paddr, length = struct.unpack_from("<IIQQQQ", data, at)
            if kind == _PT_INTERP:
                return data[offset : offset + length].rstrip(b"\0").decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise Corrupt("read program", subject=program, why=error) from error
    return ""


def libraries(program: Path, loader: str) -> list[Path]:
    """The shared libraries that ``loader`` would map for ``program``, by the paths it would open."""
    listing = _run([loader, "--list", str(program)], "list libraries of", program)
    found = []
    for line in listing.decode().splitlines():
        name, arrow, target = line.strip().partition(" => ")
        path = (target if arrow else name).rpartition(" (")[0]
        if path.startswith("/"):
            found.append(Path(path))
        elif "not found" in target:
            raise NotFound("find library of", subject=program, why=f"{name} is not found")
    return found


def imports_of(sources: Iterable[Path], package: str) -> list[str]:
    """The modules outside ``package`` that ``sources`` import anywhere, with ``from`` names as guesses.

    Imports for the type checker alone are left out, as they never run.
    """
    names: set[str] = set()
    for source in sources:
        try:
            tree = ast.parse(source.read_bytes(), str(source))
        except SyntaxError as error:
            raise Corrupt("read agent source", subject=source, why=error) from error
        names.update(_imports(tree))
    return sorted(name for name in names if name.partition(".")[0] != package)


def python_closure(interpreter: Path, modules: Sequence[str], sources: dict[str, Path]) -> PythonClosure:
    """Import ``modules`` in ``interpreter`` and compile ``sources`` (shown path -> file) and all it imported."""
    request = msgspec.json.encode({"modules": modules, "sources": {name: str(path) for name, path in sources.items()}})
    reply = _run([str(interpreter), "-I", "-S", "-c", _PROBE], "ask interpreter", interpreter, request)
    try:
        return msgspec.json.decode(reply, type=PythonClosure)
    except msgspec.DecodeError as error:
        raise Corrupt("ask interpreter", subject=interpreter, why=error) from error


def _imports(node: ast.AST) -> Iterable[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.module and not child.level:
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []))
        else:
            yield from _imports(child)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def _run(argv: list[str], what: str, subject: Path, stdin: bytes = b"") -> bytes:
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, check=True, timeout=_TIMEOUT_S, env={"LC_ALL": "C"}
        )
    except OSError as error:
        raise NotFound(what, subject=subject, why=error) from error
    except subprocess.CalledProcessError as error:
        raise Unsupported(what, subject=subject, why=error.stderr.decode(errors="replace").strip()[-800:]) from error
    except subprocess.TimeoutExpired as error:
        raise Unsupported(what, subject=subject, why=f"no answer within {_TIMEOUT_S} s") from error
    return done.stdout
