"""``image``: import, pull, list, inspect and remove."""

from __future__ import annotations

import os
import shlex
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import output as shown
from holdfast.errors import Unsupported
from holdfast.image.store import ImageStore
from holdfast.linux import user_namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.cli.options import (
        CommandLine,
        ImageImportOptions,
        ImageInspectOptions,
        ImageListOptions,
        ImagePullOptions,
        ImageRemoveOptions,
    )
    from holdfast.cli.output import Output
    from holdfast.image.records import Image, Layer, Progress, ProgressFunction

_DIGEST_WIDTH = 12


def import_image(command: ImageImportOptions, line: CommandLine, output: Output) -> int:
    """``image import``: a layout or an archive becomes layer disks."""
    _own_files(output)
    with progress(output) as tell:
        image = _store(line).import_path(command.path, command.name, tell)
    return _report(image, line, output)


def pull(command: ImagePullOptions, line: CommandLine, output: Output) -> int:
    """``image pull``: fetches with skopeo, then imports."""
    _own_files(output)
    output.say(f"fetching {command.reference}")
    with progress(output) as tell:
        image = _store(line).pull(command.reference, command.name or command.reference, tell)
    return _report(image, line, output)


def _own_files(output: Output) -> None:
    """Makes a user root of a namespace, who can give files to root, and to the users in /etc/subuid: layers have them.

    Raises:
        Unsupported: this host has no user namespaces for users.
    """
    if os.geteuid():
        if user_namespaces.granted_ids() is None:
            output.say("without /etc/subuid and newuidmap, only layers whose files are all root's can be imported")
        try:
            user_namespaces.enter()
        except OSError as error:
            raise Unsupported(
                "import image", why=f"without root it takes a user namespace: {error}", code="no-user-namespaces",
                hint="run it as root; holdfast doctor says more",
            ) from None  # fmt: skip


def list_images(_command: ImageListOptions, line: CommandLine, output: Output) -> int:
    """``image list``."""
    images = _store(line).list()
    if output.json:
        output.data([_store_record(image) for image in images])
        return 0
    rows = [
        (image.name, _short(image.digest), len(image.layers), shown.size(_bytes(image)), image.config.created[:19])
        for image in images
    ]
    output.table(("NAME", "DIGEST", "LAYERS", "SIZE", "CREATED"), rows)
    return 0


def inspect(command: ImageInspectOptions, line: CommandLine, output: Output) -> int:
    """``image inspect``: how it is run and what it is made of."""
    image = _store(line).get(command.name)
    if output.json:
        output.data(_store_record(image))
        return 0
    config = image.config
    output.fields(
        (
            ("name", image.name),
            ("digest", image.digest),
            ("platform", "/".join(filter(None, (config.os, config.architecture, config.variant)))),
            ("created", config.created),
            ("author", config.author),
            ("entrypoint", shlex.join(config.entrypoint)),
            ("command", shlex.join(config.cmd)),
            ("environment", "\n".join(config.env)),
            ("user", config.user),
            ("folder", config.working_dir),
            ("stop signal", config.stop_signal),
            ("labels", "\n".join(f"{name}={value}" for name, value in config.labels.items())),
            ("size", shown.size(_bytes(image))),
            ("layers", "\n".join(_describe(layer) for layer in image.layers)),
        )
    )
    return 0


def _describe(layer: Layer) -> str:
    return f"{_short(layer.diff_id)}  {shown.size(layer.size_bytes)}  {layer.disk}"


def remove(command: ImageRemoveOptions, line: CommandLine, output: Output) -> int:
    """``image remove``: the layers of running pods stay; goes on past one that fails."""
    store = _store(line)
    return shown.remove_each(command.names, store.remove, output)


def _store(line: CommandLine) -> ImageStore:
    return ImageStore(Path(line.data), lambda: disks_in_use(Path(line.root)))


def disks_in_use(root: Path) -> list[str]:
    """Layer disks of the pods of a state root."""
    if not (root / "journal.db").exists():
        return []
    from holdfast.storage.journal import Journal

    with Journal(root) as journal:
        return [row.object for row in journal.held() if row.kind == "attachment"]


def _store_record(image: Image) -> dict[str, object]:
    import msgspec

    record: dict[str, object] = msgspec.to_builtins(image)
    record["size_bytes"] = _bytes(image)
    return record


def _bytes(image: Image) -> int:
    """Of all its layers; one that is there twice takes its room once."""
    return sum({layer.disk: layer.size_bytes for layer in image.layers}.values())


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_DIGEST_WIDTH]


def _report(image: Image, line: CommandLine, output: Output) -> int:
    if output.json:
        output.data(_store_record(image))
    else:
        count = len(image.layers)
        layers = f"{count} layer{'s' if count != 1 else ''}"
        output.line(f"{image.name}: {layers}, {shown.size(_bytes(image))}")
    return 0


# -- progress -----------------------------------------------------------------------------------


@contextmanager
def progress(output: Output) -> Iterator[ProgressFunction]:
    """Bars on a terminal; for a pipe one line when a layer is done."""
    if not output.error_terminal:
        yield lambda event: _line(event, output)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[state]}"))
    console = Console(stderr=True, no_color=not output.error_colour)
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def tell(event: Progress) -> None:
            if event.layer not in tasks:
                tasks[event.layer] = bars.add_task(f"layer {_short(event.layer)}", total=event.bytes_total, state="")
            task = tasks[event.layer]
            bars.update(task, completed=event.bytes_done, state=_STATES[event.kind])  # type: ignore[arg-type]

        yield tell


_STATES = {"read": "", "disk": "making its disk", "done": "done", "present": "already there"}


def _line(event: Progress, output: Output) -> None:
    if event.kind in ("done", "present"):
        output.say(f"layer {_short(event.layer)}: {_STATES[event.kind]} ({shown.size(event.bytes_total)})")
