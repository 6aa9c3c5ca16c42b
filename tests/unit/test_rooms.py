"""Who may import whom: the arrows of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "holdfast"

# From the lowest to the highest; rooms on one line may import each other.
ORDER = (
    ("errors", "trace"),
    ("linux",),
    ("mounts",),
    ("wire",),
    ("spec",),
    ("image",),
    ("guest", "machine"),
    ("storage",),
    ("pod",),
    ("api",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# What the agent is made of: it runs where nothing but the standard library is installed, ...
IN_THE_GUEST = ("errors", "trace", "linux", "mounts", "wire", "guest")
# ... and starts with every pod, so it does without the modules that take long to import.
# (json, which it cannot do without, needs re and enum.)
NOT_IN_THE_AGENT = ("asyncio", "contextlib", "dataclasses", "inspect", "pathlib", "subprocess", "typing")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that ``file`` imports, inside functions too, for type checkers too."""
    package = file.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])))
            name = base if node.level else str(node.module)
            # `from holdfast import wire` names a room in the list of names.
            yield from ((node.lineno, f"{name}.{alias.name}" if name == "holdfast" else name) for alias in node.names)


def room_of(name: str) -> str:
    """``holdfast.wire.frames`` -> ``wire``; nothing for the package's own names, such as ``__version__``."""
    room = name.split(".")[1] if name.count(".") else ""
    return room if room in LEVEL else ""


def files_of(room: str) -> list[Path]:
    if (PACKAGE / f"{room}.py").exists():
        return [PACKAGE / f"{room}.py"]
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_room_is_in_the_order():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__main__", "__pycache__"} <= set(LEVEL)


@pytest.mark.parametrize("room", LEVEL)
def test_imports_only_from_below(room):
    wrong = []
    for file in files_of(room):
        for line, name in imports(file):
            where = f"{file.relative_to(PACKAGE.parent)}:{line}: {room} imports {name}"
            if name.partition(".")[0] == "holdfast":
                other = room_of(name)
                if other and LEVEL[other] > LEVEL[room]:
                    wrong.append(f"{where}, which is above it")
                elif other and room in IN_THE_GUEST and other not in IN_THE_GUEST:
                    wrong.append(f"{where}, which is not in the guest")
            elif room in IN_THE_GUEST and name.partition(".")[0] not in sys.stdlib_module_names:
                wrong.append(f"{where}, which is not in the standard library")
    assert not wrong, "\n" + "\n".join(wrong)


def test_agent_is_light():
    """What the agent imports at run time, not what type checkers see."""
    if not (PACKAGE / "guest" / "agent.py").exists():
        pytest.skip("there is no holdfast.guest.agent yet")
    script = (
        "import sys; sys.path.append(sys.argv[1]); before = set(sys.modules); import holdfast.guest.agent; "
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    # -S: the site module imports things of its own accord.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(PACKAGE.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "holdfast.guest.agent" in loaded
    heavy = [name for name in NOT_IN_THE_AGENT if name in loaded]
    assert not heavy, f"find out where from with python -X importtime; all that is loaded: {loaded}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import holdfast.cli.main as m", "holdfast.cli.main"),
        ("from holdfast import pod", "holdfast.pod"),
        ("from holdfast.pod import monitor", "holdfast.pod"),
        ("from ..pod import monitor", "holdfast.pod"),
        ("from .. import pod", "holdfast.pod"),
        ("def f():\n    from holdfast.pod import monitor", "holdfast.pod"),
    ],
)
def test_every_way_to_import_is_seen(source, found, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "holdfast")
    file = tmp_path / "holdfast" / "wire" / "it.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert [name for _line, name in imports(file)] == [found]
