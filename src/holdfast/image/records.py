"""What is known of an image, and the OCI documents it is read from.

The first part is ours, is stored, and refuses fields it does not know.  The second part mirrors the image specification
(https://github.com/opencontainers/image-spec), which demands that unknown fields are ignored, and allows ``null`` where
a list may stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec


class Verity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The dm-verity superblock and hash tree that follow a disk's data.

    Attributes:
        root_hash, salt: as hexadecimal digits.
        data_blocks: of 4096 bytes; they are what is protected.
        hash_offset_bytes: where the superblock is; the tree begins one block later.
    """

    root_hash: str
    salt: str
    data_blocks: int
    hash_offset_bytes: int
    algorithm: str = "sha256"


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One read-only disk.

    Attributes:
        diff_id: digest of the layer's uncompressed tar, ``sha256:...``.
        disk: path of the erofs file.
        size_bytes: size of that file; a multiple of 4096.
        verity: None for a disk that was made before Holdfast made hash trees.
    """

    diff_id: str
    disk: str
    size_bytes: int
    verity: Verity | None = None


class RootDirectory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metadata of ``/``.

    An overlay takes them from the upper directory, so whoever makes that one applies these.
    """

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0


class ImageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to run the image: the OCI image configuration, flattened, ``null`` made empty."""

    architecture: str
    os: str
    variant: str = ""
    created: str = ""
    author: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = {}


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An imported image.

    Attributes:
        name: the name it was imported under.
        digest: digest of the manifest; of the configuration when it came from a ``docker save`` archive.
        config: how to run it.
        layers: disks, bottom first.  Fewer than ``config``'s diff IDs if one of them hides all below.
        root: metadata of ``/``.
    """

    name: str
    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]
    root: RootDirectory = RootDirectory()


class Progress(msgspec.Struct, frozen=True):
    """One event of an import.

    Attributes:
        kind: ``read``: so much of the layer's blob was read; ``disk``: its disk is being made; ``done``: the disk is
            there; ``present``: it was there already.
        layer: the layer's diff ID.
        bytes_done, bytes_total: of the blob, as stored.
    """

    kind: Literal["read", "disk", "done", "present"]
    layer: str
    bytes_done: int
    bytes_total: int


#: Called from several threads, one call at a time.
ProgressFunction = Callable[[Progress], None]


# -- documents of the image specification


class Platform(msgspec.Struct, frozen=True):
    """What an index says about a manifest."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """Where a blob is and what it must be."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """``index.json``, and an image index or manifest list below it."""

    manifests: list[Descriptor]
    schema_version: int = 2


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest."""

    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = 2


class RunSettings(msgspec.Struct, frozen=True, rename="pascal"):
    """The ``config`` object of a configuration."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    volumes: dict[str, object] | None = None
    exposed_ports: dict[str, object] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


class RootFs(msgspec.Struct, frozen=True):
    """The ``rootfs`` object of a configuration."""

    diff_ids: list[str]
    type: str = "layers"


class Configuration(msgspec.Struct, frozen=True):
    """An image configuration."""

    architecture: str
    os: str
    rootfs: RootFs
    variant: str | None = None
    created: str | None = None
    author: str | None = None
    config: RunSettings | None = None

    def flat(self) -> ImageConfig:
        """The part that is kept."""
        run = self.config or RunSettings()
        return ImageConfig(
            architecture=self.architecture,
            os=self.os,
            variant=self.variant or "",
            created=self.created or "",
            author=self.author or "",
            entrypoint=tuple(run.entrypoint or ()),
            cmd=tuple(run.cmd or ()),
            env=tuple(run.env or ()),
            user=run.user or "",
            working_dir=run.working_dir or "",
            volumes=tuple(sorted(run.volumes or ())),
            exposed_ports=tuple(sorted(run.exposed_ports or ())),
            stop_signal=run.stop_signal or "",
            labels=dict(run.labels or {}),
        )


class SavedImage(msgspec.Struct, frozen=True, rename="pascal"):
    """One entry of ``manifest.json`` in a ``docker save`` archive."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None
