"""From a :class:`Source` to a :class:`Plan`: which image of it, its configuration, its layers' blobs.

Documents are small and are read whole, but bounded; each is verified against the digest that led to it, before it is
parsed.  Nothing is written here.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, TypeVar

import msgspec

from holdfast.errors import Corrupt, InvalidInput, Unsupported
from holdfast.image.blobs import Region, digest_hex, verify
from holdfast.image.records import Configuration, Descriptor, Index, Manifest, SavedImage

if TYPE_CHECKING:
    from holdfast.image.sources import Source

_LARGEST_DOCUMENT = 16 << 20
_DEEPEST_INDEX = 4
_REF_NAME = "org.opencontainers.image.ref.name"
_IMAGE_NAME = "io.containerd.image.name"
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json", "")
_LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
)
# uname(2)'s names in Go's, which images use.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}

Document = TypeVar("Document")


class PlannedLayer(msgspec.Struct, frozen=True):
    """One layer to be made.

    Attributes:
        digest: of the blob as it is stored, or empty if nothing says so (``docker save``).
    """

    diff_id: str
    region: Region
    digest: str


class Plan(msgspec.Struct, frozen=True):
    """Which image of a source, and what it is made of; layers bottom first."""

    digest: str
    configuration: Configuration
    layers: list[PlannedLayer]


def host_architecture() -> str:
    """This host's architecture as images name it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def plan(source: Source, tag: str) -> Plan:
    """Finds the image and its parts.

    Args:
        tag: which one, if the source has several.

    Raises:
        InvalidInput: not a layout; several images and no ``tag``, or one that is not there.
        Corrupt: a document is missing, is not what its digest says, or contradicts another.
        Unsupported: for another architecture; a layer of an unknown kind.
    """
    if (region := source.find("index.json")) is not None:
        found = _plan_layout(source, region, tag)
    elif (region := source.find("manifest.json")) is not None:
        found = _plan_saved(source, region, tag)
    else:
        raise InvalidInput(
            "read image", subject=source.subject, why="it has neither index.json nor manifest.json",
            hint="give an OCI layout folder, an archive of one, or the output of `docker save`", code="bad-layout",
        )  # fmt: skip
    _check_platform(source, found.configuration)
    return found


# -- OCI layout


def _plan_layout(source: Source, region: Region, tag: str) -> Plan:
    index = _parse(source, region, Index)
    descriptor = _pick(source, index.manifests, tag)
    for _ in range(_DEEPEST_INDEX):
        if descriptor.media_type not in _INDEXES:
            break
        nested = _parse(source, _blob(source, descriptor), Index)
        descriptor = _pick_platform(source, nested.manifests)
    if descriptor.media_type not in _MANIFESTS:
        raise Unsupported(
            "read image",
            subject=source.subject,
            why=f"{descriptor.media_type} is no image manifest",
            code="no-manifest",
        )
    manifest = _parse(source, _blob(source, descriptor), Manifest)
    configuration = _parse(source, _blob(source, manifest.config), Configuration)
    # Before the layers are looked for: a layout made by copying one platform of many has only that one's.
    _check_platform(source, configuration)
    diff_ids = configuration.rootfs.diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise Corrupt(
            "read image", subject=source.subject, code="bad-layout",
            why=f"the manifest has {len(manifest.layers)} layers and the configuration {len(diff_ids)}",
        )  # fmt: skip
    layers = []
    for diff_id, layer in zip(diff_ids, manifest.layers, strict=True):
        digest_hex(diff_id)
        if layer.media_type not in _LAYERS:
            raise Unsupported(
                "read image", subject=source.subject, why=f"layer of type {layer.media_type!r}", code="layer-type"
            )
        layers.append(PlannedLayer(diff_id, _sized(source, layer), layer.digest))
    return Plan(descriptor.digest, configuration, layers)


def _pick(source: Source, manifests: list[Descriptor], tag: str) -> Descriptor:
    if tag:
        for descriptor in manifests:
            if tag in _names(descriptor):
                return descriptor
        raise _which(source, f"nothing is named {tag!r}", manifests)
    if len(manifests) == 1:
        return manifests[0]
    # Several manifests without names are one image for several platforms.
    if manifests and not any(_names(descriptor) for descriptor in manifests):
        return _pick_platform(source, manifests)
    raise _which(source, f"it holds {len(manifests)} images", manifests)


def _names(descriptor: Descriptor) -> list[str]:
    notes = descriptor.annotations or {}
    return [notes[key] for key in (_REF_NAME, _IMAGE_NAME) if notes.get(key)]


def _which(source: Source, why: str, manifests: list[Descriptor]) -> InvalidInput:
    choices = sorted({name for descriptor in manifests for name in _names(descriptor)})
    return _choose(source, why, choices)


def _choose(source: Source, why: str, choices: list[str]) -> InvalidInput:
    listed = ", ".join(f"{source.subject}:{choice}" for choice in choices[:20])
    return InvalidInput(
        "choose image", subject=source.subject, why=why, code="which-image",
        hint=f"choose one of: {listed}" if listed else "none of them has a name",
    )  # fmt: skip


def _pick_platform(source: Source, manifests: list[Descriptor]) -> Descriptor:
    mine = host_architecture()
    for descriptor in manifests:
        if descriptor.platform and descriptor.platform.os == "linux" and descriptor.platform.architecture == mine:
            return descriptor
    # Old tools write no platform; the configuration is asked about it in any case.
    if len(manifests) == 1 and not manifests[0].platform:
        return manifests[0]
    there = sorted({f"{item.platform.os}/{item.platform.architecture}" for item in manifests if item.platform})
    raise Unsupported(
        "choose image", subject=source.subject, why=f"none for linux/{mine}; there is: {', '.join(there) or 'nothing'}",
        code="wrong-architecture",
    )  # fmt: skip


def _sized(source: Source, descriptor: Descriptor) -> Region:
    region = source.region(f"blobs/sha256/{digest_hex(descriptor.digest)}")
    if region.size != descriptor.size:
        raise Corrupt(
            "verify blob", subject=descriptor.digest, why=f"{region.size} bytes instead of {descriptor.size}",
            hint="the image was cut short or changed; fetch it again", code="digest-mismatch",
        )  # fmt: skip
    return region


def _blob(source: Source, descriptor: Descriptor) -> Region:
    region = _sized(source, descriptor)
    _bounded(source, region)
    verify(region, descriptor.digest)
    return region


# -- docker save


def _plan_saved(source: Source, region: Region, tag: str) -> Plan:
    images = _parse(source, region, list[SavedImage])
    saved = _pick_saved(source, images, tag)
    blob = source.region(saved.config)
    _bounded(source, blob)
    stem = saved.config.rpartition("/")[2].removesuffix(".json")
    digest = f"sha256:{stem}"
    # The name of the file is the image's id; other tools than docker are known to use another one.
    if len(stem) == 64:
        verify(blob, digest)
    else:
        import hashlib

        digest = "sha256:" + hashlib.sha256(b"".join(blob.chunks())).hexdigest()
    configuration = _parse(source, blob, Configuration)
    _check_platform(source, configuration)
    diff_ids = configuration.rootfs.diff_ids
    if len(diff_ids) != len(saved.layers):
        raise Corrupt(
            "read image", subject=source.subject, code="bad-layout",
            why=f"manifest.json has {len(saved.layers)} layers and the configuration {len(diff_ids)}",
        )  # fmt: skip
    layers = []
    for diff_id, path in zip(diff_ids, saved.layers, strict=True):
        digest_hex(diff_id)
        layers.append(PlannedLayer(diff_id, source.region(path), ""))
    return Plan(digest, configuration, layers)


def _pick_saved(source: Source, images: list[SavedImage], tag: str) -> SavedImage:
    choices = sorted({name for image in images for name in image.repo_tags or ()})
    if tag:
        for image in images:
            if any(tag in (name, name.rpartition(":")[2]) for name in image.repo_tags or ()):
                return image
        raise _choose(source, f"nothing is named {tag!r}", choices)
    if len(images) == 1:
        return images[0]
    raise _choose(source, f"it holds {len(images)} images", choices)


# -- both


def _check_platform(source: Source, configuration: Configuration) -> None:
    mine = host_architecture()
    if (configuration.os, configuration.architecture) != ("linux", mine):
        raise Unsupported(
            "import image", subject=source.subject, code="wrong-architecture",
            why=f"it is for {configuration.os}/{configuration.architecture}, this host is linux/{mine}",
        )  # fmt: skip


def _bounded(source: Source, region: Region) -> None:
    if region.size > _LARGEST_DOCUMENT:
        raise Corrupt("read image", subject=source.subject, why=f"{region.name} is too large", code="bad-layout")


def _parse(source: Source, region: Region, kind: type[Document]) -> Document:
    _bounded(source, region)
    try:
        return msgspec.json.decode(b"".join(region.chunks()), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt("read image", subject=source.subject, why=f"{region.name}: {error}", code="bad-layout") from error
