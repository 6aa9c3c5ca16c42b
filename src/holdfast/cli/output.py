"""What people and programs see: lines, tables, JSON and errors.

Results go to stdout; what is said meanwhile, and errors, go to stderr.  A terminal gets colour, a pipe or a file gets
plain text, and ``$NO_COLOR`` makes a terminal plain too.  With ``--json`` stdout holds exactly one JSON document:
the result, or ``{"error": {...}}``.  Only ``run`` and ``exec`` put that error on stderr, for stdout is the container's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.errors import HoldfastError, from_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
#: What would move the cursor or change the terminal is shown as text: names and errors come from images and guests.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


class Output:
    """Where a command's words go.

    Args:
        json: print for programs.
        container_output: stdout belongs to a container, so nothing of ours but its bytes may go there.
    """

    def __init__(self, *, json: bool = False, container_output: bool = False) -> None:
        self.json = json
        self._container_output = container_output
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # closed (None), or a test's
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        self.colour = _has_colour(sys.stdout)
        self.error_colour = _has_colour(sys.stderr)

    @property
    def terminal(self) -> bool:
        """Whether results are read by a person."""
        return not self.json and _is_terminal(sys.stdout)

    @property
    def error_terminal(self) -> bool:
        """Whether progress can be drawn."""
        return not self.json and _is_terminal(sys.stderr)

    # -- results ------------------------------------------------------------------------------

    def line(self, text: str, *styles: str) -> None:
        """One line, or several, of a result."""
        print(paint(clean(text), *styles) if self.colour else clean(text))

    def data(self, value: object) -> None:
        """The result for ``--json``."""
        print(encode(value))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as what is in them, for people and for ``awk``; an empty cell is ``-``."""
        cells = [[clean(str(cell)).replace("\n", " ") or "-" for cell in row] for row in rows]
        widths = [max(len(line[index]) for line in (columns, *cells)) for index in range(len(columns))]
        for number, line in enumerate((columns, *cells)):
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            print(paint(text, BOLD) if self.colour and not number else text)

    def fields(self, pairs: Sequence[tuple[str, object]]) -> None:
        """One thing's properties, a line each; those without a value are left out."""
        width = max((len(name) for name, _ in pairs), default=0) + 1
        for name, value in pairs:
            if value not in ("", None, (), [], {}):
                title = f"{name}:".ljust(width)
                text = clean(str(value)).replace("\n", "\n" + " " * (width + 1))
                print(f"{paint(title, BOLD) if self.colour else title} {text}")

    # -- meanwhile ----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """What is going on: the first boot, a probe.  Not a result, so on stderr."""
        text = f"holdfast: {clean(text)}"
        _to_stderr(paint(text, DIM) if self.error_colour else text)

    def warn(self, text: str) -> None:
        """Something that the caller should know although the command goes on."""
        text = f"holdfast: {clean(text)}"
        _to_stderr(paint(text, YELLOW) if self.error_colour else text)

    def error(self, error: BaseException) -> None:
        """The one place that errors are printed."""
        found = from_exception(error)
        if not self.json:
            _to_stderr("\n".join(self._error_lines(found.as_dict(), "holdfast: ")))
        elif self._container_output:
            _to_stderr(encode({"error": found.as_dict()}))
        else:
            self.data({"error": found.as_dict()})

    def _error_lines(self, record: dict[str, Any], prefix: str) -> list[str]:
        """``what subject: why``, what to do next, and what failed besides; further lines are indented."""

        def colour(text: str, *styles: str) -> str:
            return paint(text, *styles) if self.error_colour else text

        head = clean(f"{record['what']} {record['subject']}".strip())
        text = colour(prefix, RED, BOLD) + colour(head, BOLD)
        if record["why"]:
            text += f": {clean(str(record['why']))}"
        lines = [text.replace("\n", "\n    ")]
        if record["hint"]:
            lines.append("  " + colour("hint: ", CYAN) + clean(str(record["hint"])).replace("\n", "\n    "))
        for cause in record.get("causes", ()):
            lines += ["  " + line for line in self._error_lines(cause, "also: ")]
        return lines


def encode(value: object) -> str:
    """JSON for programs, indented for people who look too."""
    try:
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a path that is no UTF-8: JSON can say what it is only by escapes
        import json

        return json.dumps(msgspec.to_builtins(value, str_keys=True), indent=2)


def paint(text: str, *styles: str) -> str:
    """``text`` in styles, for a terminal (ECMA-48, SGR)."""
    return f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if styles and text else text


def clean(text: str) -> str:
    """``text`` with what would drive the terminal made visible."""
    return text.translate(_CONTROLS)


def size(count: int) -> str:
    """A number of bytes for people: ``4.2 MiB``."""
    number, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{count} B" if unit == "B" else f"{number:.1f}".removesuffix(".0") + f" {unit}"


def age(since_ns: int, now_ns: int | None = None) -> str:
    """How long ago, in the largest unit of which there is one: ``3h``."""
    seconds = max(0, ((time.time_ns() if now_ns is None else now_ns) - since_ns) // 1_000_000_000)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def shorten(text: str, width: int) -> str:
    """``text`` cut to ``width``, with a sign that it was."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _has_colour(stream: TextIO | None) -> bool:
    return _is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _to_stderr(text: str) -> None:
    # Flushed with what stdout holds before it, so that a terminal shows both in the order of happening.
    with contextlib.suppress(OSError, AttributeError):  # nobody is left to tell
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def remove_each(names: Sequence[str], remove: Callable[[str], object], output: Output) -> int:
    """Removes several things, going on past one that fails, and prints those that are gone.

    Raises:
        HoldfastError: the first failure; the others are among its causes.
    """
    errors: list[HoldfastError] = []
    removed: list[str] = []
    for name in names:
        try:
            remove(name)
            removed.append(name)
        except HoldfastError as error:
            errors.append(error)
    if errors:
        first, *others = errors
        first.causes = (*first.causes, *others)
        raise first
    if output.json:
        output.data({"removed": removed})
    else:
        for name in removed:
            output.line(name)
    return 0
