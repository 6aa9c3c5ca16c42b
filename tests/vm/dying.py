"""Has a monitor stop at a place of its code, so that a test can kill what it likes just then.

The monitors that a process starts are told by ``HOLDFAST_TEST_STOP``: ``module:attribute:path``.  What comes to the
attribute's function makes the file ``path`` and waits until that is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
from typing import TYPE_CHECKING, Any

from holdfast.pod import early, launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

_NAME = "HOLDFAST_TEST_STOP"
_SECONDS = 60


def arm() -> None:
    """In the monitor: patches the function that is named."""
    module_name, attribute, path = os.environ[_NAME].split(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = attribute.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = owner.__dict__[name] if classes else getattr(owner, name)
    function = original.__func__ if isinstance(original, classmethod) else original

    def stops(*arguments: Any, **options: Any) -> Any:
        _stop(path)
        return function(*arguments, **options)

    setattr(owner, name, classmethod(stops) if isinstance(original, classmethod) else stops)


def _stop(path: str) -> None:
    with open(path, "x"):
        pass
    poll = select.poll()
    for _ in range(_SECONDS * 100):
        if not os.path.exists(path):
            return
        poll.poll(10)
    os._exit(99)


@contextlib.contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, where: str, path: Path) -> Iterator[None]:
    """Monitors that are started in this block stop there."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_START", early.START.replace("main()", "from tests.vm.dying import arm; arm(); main()"))
        patch.setenv(_NAME, f"{where}:{path}")
        yield


def child_of(pid: int) -> int:
    """The process that a process has started."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if int(parent) == pid and state != b"Z":
                    return int(name)
    raise AssertionError(f"process {pid} has no child")
