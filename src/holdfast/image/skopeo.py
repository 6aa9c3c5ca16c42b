"""Images from registries, by skopeo: it knows the transports, credentials and signature policies, and we need not."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError, InvalidInput, Unsupported

if TYPE_CHECKING:
    from pathlib import Path

# containers-transports(5).
_TRANSPORT = re.compile(
    r"(docker|docker-archive|docker-daemon|dir|oci|oci-archive|containers-storage|ostree|sif|tarball):"
)


def fetch(reference: str, folder: Path) -> None:
    """Copies an image into a new OCI layout.

    Args:
        reference: as ``docker pull`` takes it, or with a transport.
        folder: the layout to make; its path has no colon.

    Raises:
        InvalidInput: no reference.
        Unsupported: there is no skopeo.
        HoldfastError: skopeo failed; the error has its words.
    """
    if not reference or reference.startswith("-") or not reference.isprintable():
        raise InvalidInput("not an image reference", subject=repr(reference), code="bad-reference")
    if not shutil.which("skopeo"):
        raise Unsupported(
            "pull image",
            subject=reference,
            why="skopeo is not installed",
            hint="apt-get install skopeo",
            code="no-skopeo",
        )
    source = reference if _TRANSPORT.match(reference) else f"docker://{reference}"
    done = subprocess.run(
        ["skopeo", "--override-os", "linux", "copy", "--quiet", "--", source, f"oci:{folder}:pulled"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise HoldfastError("pull image", subject=reference, why=why[-2000:], code="pull-failed")
