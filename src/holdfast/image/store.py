"""Images by name, on top of layer disks by digest.

::

    images/<name, escaped>.json     an Image; its layers' disks by file name, so that the folder may be moved
    layers/                         see holdfast.image.layers

An import holds a shared flock(2) on ``images`` from before its first layer until its record is written; whoever removes
layers that no record names takes it exclusively, and if that fails leaves them to the import that holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import urllib.parse
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import msgspec

from holdfast.errors import Corrupt, Exhausted, InvalidInput, NotFound
from holdfast.image import erofs, layout, skopeo
from holdfast.image.blobs import Stopped
from holdfast.image.layers import LayerStore, Watcher, chain_ids, sync_folder
from holdfast.image.records import Image, Layer, Progress, ProgressFunction, RootDirectory
from holdfast.image.sources import open_source, scratch_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

_SUFFIX = ".json"
_LONGEST_NAME = 255
# Two layers at a time keep two processors busy: one is written while the other's disk is made.
_AT_ONCE = 2


class ImageStore:
    """The images of a data folder.

    Args:
        data: the folder; made by the first import.
        in_use: gives the disks that must not be removed whether or not an image names them: those of running pods.
    """

    def __init__(self, data: Path, in_use: Callable[[], Collection[str]] | None = None) -> None:
        self._images = data / "images"
        self._data = data
        self._layers = LayerStore(data / "layers")
        self._in_use = in_use

    def import_path(self, path: str | Path, name: str, progress: ProgressFunction | None = None) -> Image:
        """Imports an OCI layout folder, an archive of one, or a ``docker save`` archive.

        ``path:tag`` picks one of several images.  One that has the name already is replaced.  A failure leaves nothing.

        Args:
            path: the folder or archive.
            name: what the image is to be called here.
            progress: told how it goes; what it raises stops the import.

        Raises:
            NotFound: no such file.
            InvalidInput: not an image; several and no tag; an archive that climbs out of itself.
            Corrupt: something is not what its digest or size says.
            Unsupported: for another architecture; something that cannot be read here.
            Exhausted: the host's disk is full.
        """
        _file_name(name)
        with self._room(str(path)):
            source, tag = open_source(path, scratch_folder(self._data))
            with source:
                plan = layout.plan(source, tag)
                return self._import(plan, name, progress)

    def pull(self, reference: str, name: str, progress: ProgressFunction | None = None) -> Image:
        """Fetches an image with skopeo, then imports it.

        Args:
            reference: as ``docker pull`` takes it, or with one of skopeo's transports in front (``docker://``).

        Raises:
            Unsupported: there is no skopeo.
            HoldfastError: skopeo failed (``pull-failed``); and all that :meth:`import_path` raises.
        """
        _file_name(name)
        with self._room(reference):
            self._layers.prepare()
            with self._layers.workspace() as work:
                skopeo.fetch(reference, work / "layout")
                return self.import_path(work / "layout", name, progress)

    def get(self, name: str) -> Image:
        """The image of that name.

        Raises:
            NotFound: there is none (``image-not-found``).
            Corrupt: its record or a disk is damaged or missing.
        """
        try:
            raw = (self._images / _file_name(name)).read_bytes()
        except FileNotFoundError:
            raise NotFound(
                "find image", subject=name, code="image-not-found",
                hint=f"holdfast image import PATH --name {name}, or holdfast image pull REFERENCE --name {name}",
            ) from None  # fmt: skip
        image = self._decode(raw, name)
        for layer in image.layers:
            if not os.path.exists(layer.disk):
                raise Corrupt(
                    "find image",
                    subject=name,
                    why=f"{layer.disk} is missing",
                    hint="import it again",
                    code="layer-missing",
                )
        return image

    def inspect(self, name: str) -> dict[str, object]:
        """All that is known of an image, as JSON types."""
        image = self.get(name)
        record: dict[str, object] = msgspec.to_builtins(image)
        record["size_bytes"] = sum({layer.disk: layer.size_bytes for layer in image.layers}.values())
        return record

    def list(self) -> list[Image]:
        """All images, by name.

        Raises:
            Corrupt: a record is damaged.
        """
        return [self._decode(raw, name) for name, raw in self._records()]

    def remove(self, name: str) -> None:
        """Removes an image, and the layers that no other image uses.

        Raises:
            NotFound: there is none.
        """
        try:
            os.unlink(self._images / _file_name(name))
        except FileNotFoundError:
            raise NotFound("remove image", subject=name, why="there is none of it", code="image-not-found") from None
        sync_folder(self._images)
        self.collect()

    def collect(self) -> None:
        """Removes layers that no image uses, unless an import is going on: then that one does it when it ends."""
        try:
            fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            used = {os.path.basename(layer.disk) for image in self.list() for layer in image.layers}
            used |= {os.path.basename(disk) for disk in (self._in_use() if self._in_use else ())}
            for name in self._layers.names() - used:
                os.unlink(self._layers.folder / name)
        except (BlockingIOError, Corrupt):
            # A record that cannot be read may name any layer.
            return
        finally:
            os.close(fd)

    # -- importing

    def _import(self, plan: layout.Plan, name: str, progress: ProgressFunction | None) -> Image:
        self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._layers.prepare()
        fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            layers = self._make_layers(plan, progress)
            for index in reversed(range(len(layers))):
                if self._layers.hides_all_below(layers[index]):
                    layers = layers[index:]
                    break
            image = Image(name, plan.digest, plan.configuration.flat(), layers, _root_of(layers))
            self._write(image)
            return image
        finally:
            os.close(fd)
            self.collect()

    def _make_layers(self, plan: layout.Plan, progress: ProgressFunction | None) -> tuple[Layer, ...]:
        stop = threading.Event()
        turn = threading.Lock()
        chains = chain_ids([layer.diff_id for layer in plan.layers])

        def work(count: int) -> Layer:
            planned = plan.layers[:count]
            region, diff_id = planned[-1].region, planned[-1].diff_id

            def tell(kind: Literal["read", "disk", "done", "present"]) -> None:
                if stop.is_set():
                    raise Stopped("import layer", subject=diff_id, why="the import was stopped")
                if progress:
                    done = region.done if kind == "read" else region.size
                    with turn:
                        progress(Progress(kind, diff_id, done, region.size))

            try:
                layer, made = self._layers.ensure(planned, Watcher(lambda: tell("read"), lambda: tell("disk")))
                tell("done" if made else "present")
                return layer
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="import-layer") as pool:
            jobs = {chain: pool.submit(work, count) for count, chain in enumerate(chains, 1)}
            try:
                wait(jobs.values(), return_when=FIRST_EXCEPTION)
            except BaseException:
                stop.set()
                raise
        failures = [error for job in jobs.values() if (error := job.exception())]
        for error in sorted(failures, key=lambda error: isinstance(error, Stopped)):
            raise error
        return tuple(jobs[chain].result() for chain in chains)

    # -- records

    def _write(self, image: Image) -> None:
        stored = msgspec.structs.replace(
            image,
            layers=tuple(msgspec.structs.replace(layer, disk=os.path.basename(layer.disk)) for layer in image.layers),
        )
        fd, temporary = tempfile.mkstemp(dir=self._images, prefix=".new-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(stored)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._images / _file_name(image.name))
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(self._images)

    def _decode(self, raw: bytes, name: str) -> Image:
        try:
            image = msgspec.json.decode(raw, type=Image)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Corrupt(
                "read image record", subject=name, why=error, hint="import it again", code="bad-record"
            ) from error
        folder = self._layers.folder
        return msgspec.structs.replace(
            image,
            layers=tuple(
                msgspec.structs.replace(layer, disk=str(folder / os.path.basename(layer.disk)))
                for layer in image.layers
            ),
        )

    def _records(self) -> Iterator[tuple[str, bytes]]:
        try:
            names = sorted(os.listdir(self._images))
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(_SUFFIX) and not name.startswith("."):
                try:
                    yield urllib.parse.unquote(name.removesuffix(_SUFFIX)), (self._images / name).read_bytes()
                except FileNotFoundError:
                    continue

    @contextmanager
    def _room(self, subject: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Exhausted(
                    "import image", subject=subject, why=error, code="disk-full",
                    hint="free space on the host's disk, then import again",
                ) from error  # fmt: skip
            raise


def _file_name(name: str) -> str:
    """The record's file name: the image's name with everything that is special to a path escaped."""
    if not name or not name.isprintable():
        raise InvalidInput("image name is empty or not printable", subject=repr(name), code="bad-image-name")
    escaped = urllib.parse.quote(name, safe="")
    if escaped.startswith("."):
        escaped = "%2E" + escaped[1:]
    if len(escaped + _SUFFIX) > _LONGEST_NAME:
        raise InvalidInput("image name is too long", subject=name, code="bad-image-name")
    return escaped + _SUFFIX


def _root_of(layers: tuple[Layer, ...]) -> RootDirectory:
    """The metadata of ``/`` in the topmost layer that says anything of them."""
    plain = RootDirectory()
    return next((root for layer in reversed(layers) if (root := erofs.read_root(layer.disk)) != plain), plain)
