"""Small images made by hand: tar archives entry by entry, layouts blob by blob, as wrong as a test wants them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

from holdfast.image.layout import host_architecture

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


def entry(name: str, kind: str = "file", data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One entry; ``fields`` are TarInfo's (mode, uid, linkname, pax_headers, ...)."""
    info = tarfile.TarInfo(name)
    info.type = KINDS[kind]
    info.size = len(data)
    info.mode = fields.pop("mode", 0o755 if kind == "dir" else 0o644)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI layout folder in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: list[dict[str, Any]] = []
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> dict[str, Any]:
        """Adds a blob; its descriptor."""
        self.blob_path(sha256(data)).write_bytes(data)
        return {"digest": sha256(data), "size": len(data)}

    def blob_path(self, digest: str) -> Path:
        return self.path / "blobs/sha256" / digest[7:]

    def image(
        self,
        *layers: bytes,
        tag: str = "",
        pack: Any = gzip.compress,
        media_type: str = "application/vnd.oci.image.layer.v1.tar+gzip",
        config: dict[str, Any] | None = None,
        platform: dict[str, str] | None = None,
        **top: Any,
    ) -> dict[str, Any]:
        """Adds an image; its manifest's descriptor.  ``pack`` compresses a layer."""
        document = {
            "architecture": host_architecture(),
            "os": "linux",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
            **top,
        }
        manifest = {
            "schemaVersion": 2,
            "config": {
                **self.blob(json.dumps(document).encode()),
                "mediaType": "application/vnd.oci.image.config.v1+json",
            },
            "layers": [{**self.blob(pack(layer)), "mediaType": media_type} for layer in layers],
        }
        descriptor = {
            **self.blob(json.dumps(manifest).encode()),
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
        }
        if tag:
            descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
        if platform:
            descriptor["platform"] = platform
        self.manifests.append(descriptor)
        self.write_index()
        return descriptor

    def write_index(self) -> None:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))

    def archive(self, path: Path) -> Path:
        """The layout as a tar archive."""
        with tarfile.open(path, "w") as out:
            out.add(self.path, arcname=".")
        return path


def saved(path: Path, *layers: bytes, tags: tuple[str, ...] = ("x/y:z",), link_last: bool = False) -> Path:
    """A ``docker save`` archive; ``link_last``: the last layer is a link to the first, as docker writes twins."""
    config = json.dumps(
        {
            "architecture": host_architecture(),
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        }
    ).encode()
    names = [f"{index}/layer.tar" for index in range(len(layers))]
    manifest = [{"Config": f"{sha256(config)[7:]}.json", "RepoTags": list(tags), "Layers": names}]
    members = [entry(f"{sha256(config)[7:]}.json", data=config)]
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        if link_last and index == len(layers) - 1:
            members.append(entry(name, "symlink", linkname="../0/layer.tar"))
        else:
            members.append(entry(name, data=layer))
    members.append(entry("manifest.json", data=json.dumps(manifest).encode()))
    path.write_bytes(tar(*members))
    return path


def files_under(folder: Path) -> set[str]:
    """Every name below a folder but those of the two folders that a store always has."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"images", "layers"}
