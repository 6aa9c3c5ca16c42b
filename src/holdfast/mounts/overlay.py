"""Overlay: any number of layers, whatever their names are.

Options of mount(2) fill at most one page, and a comma, a colon and a backslash mean something in them.  Where the
kernel takes each layer as an option of its own (``lowerdir+``, Linux 6.8), neither matters.  Elsewhere the layers are
named in one option, escaped, and where that is too long they are links with numbers for names in a folder from
which the call is made: overlayfs follows them, on every kernel.
"""

from __future__ import annotations

import _thread
import os

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: OVL_MAX_STACK of fs/overlayfs.
MOST_LAYERS = 500
#: mount(2) takes one page of options, with the NUL that ends them.
MOST_DATA = 4095


def escape(path: str) -> str:
    """A path as one word of an option: what would separate it, or escape, is escaped."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def options(lowers: Iterable[str], upper: str = "", work: str = "") -> list[str]:
    """The options of an overlay mount.

    Args:
        lowers: read-only layers, the first on top.
        upper: where changes go; empty for none.
        work: an empty directory on the same filesystem as ``upper``.
    """
    words = ["lowerdir=" + ":".join(map(escape, lowers))]
    if upper:
        words += [f"upperdir={escape(upper)}", f"workdir={escape(work)}"]
    return words


def parse(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The layers of an overlay's options, the first on top, and the options that are not about these.

    Raises:
        InvalidInput: more layers than overlayfs takes, or one without a name.
    """
    lowers: list[str] = []
    rest = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "lowerdir":
            lowers += _split(value)
        elif name == "lowerdir+":
            lowers.append(value)
        else:
            rest.append(word)
    if len(lowers) > MOST_LAYERS:
        raise InvalidInput(
            "read overlay options", subject=lowers[0], code="too-many-layers",
            why=f"{len(lowers)} layers: overlayfs takes {MOST_LAYERS}", hint="merge some of them",
        )  # fmt: skip
    if not all(lowers):
        raise InvalidInput(
            "read overlay options", subject=",".join(words)[:200], code="bad-layer",
            why="a layer without a name", hint="data-only layers (::) are not supported",
        )  # fmt: skip
    return lowers, rest


def unescape(value: str) -> str:
    """The path that :func:`escape` made the word of."""
    return _split(value, "")[0]


def _split(value: str, separator: str = ":") -> list[str]:
    """``a:b\\:c`` -> ``a``, ``b:c``."""
    if "\\" not in value:
        return value.split(separator) if separator else [value]
    found, word, escaped = [], "", False
    for letter in value:
        if escaped or letter not in separator + "\\":
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        else:
            found.append(word)
            word = ""
    return [*found, word]


def needs_links(lowers: Sequence[str], rest: Sequence[str]) -> bool:
    """Whether the options of an overlay do not fit mount(2), so that :func:`mount` makes links."""
    return bool(lowers) and len(os.fsencode(_data(lowers, rest))) > MOST_DATA


def _data(lowers: Sequence[str], rest: Sequence[str]) -> str:
    return ",".join([*options(lowers), *rest] if lowers else rest)


def mount(lowers: Sequence[str], rest: Sequence[str], target: str, links: str, call: Callable[[str], None]) -> None:
    """Mounts by mount(2), through links in the folder ``links`` if the options would not fit.

    Args:
        lowers: layers, the first on top.
        rest: further options, escaped where they need it.
        target: what the error names.
        links: a folder to make for the links; it is gone again at the end.
        call: makes the mount, given all of the options.

    Raises:
        InvalidInput: they do not fit even so.
        OSError: as ``call``, or the folder cannot be made.
    """
    numbers = [str(number) for number in range(len(lowers))]
    linked = needs_links(lowers, rest)
    data = _data(numbers if linked else lowers, rest)
    if len(os.fsencode(data)) > MOST_DATA:
        raise InvalidInput(
            "mount overlay", subject=target, code="mount-options-too-long",
            why=f"{len(os.fsencode(data))} bytes of options: mount(2) takes {MOST_DATA}",
        )  # fmt: skip
    if not linked:
        call(data)
        return
    os.mkdir(links, 0o700)
    try:
        for number, layer in zip(numbers, lowers, strict=True):
            os.symlink(os.path.abspath(layer), f"{links}/{number}")
        run_in(links, lambda: call(data))
    finally:
        remove_links(links)


def remove_links(folder: str) -> None:
    """Removes a folder of links; anything else in it stays, and so does it then.

    Raises:
        OSError: there is something else in it.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if name.isdecimal() and os.path.islink(f"{folder}/{name}"):
            os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def run_in(folder: str, action: Callable[[], None]) -> None:
    """Runs ``action`` with ``folder`` as the current directory, and nobody else's: in a thread that shares none."""
    failed: list[BaseException] = []
    done = _thread.allocate_lock()
    done.acquire()

    def body() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_FS)
            os.chdir(folder)
            action()
        except BaseException as error:
            failed.append(error)
        finally:
            done.release()

    _thread.start_new_thread(body, ())
    done.acquire()
    if failed:
        raise failed[0]
