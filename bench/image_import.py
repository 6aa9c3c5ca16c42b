"""How long an import takes, next to `umoci unpack` of the same image: one JSON object a line.

    .venv/bin/python bench/image_import.py [--runs N] [--layers N ...]

The image is made by umoci from copies of the host's Python library and git's programs, spread over the layers.  The two
tools take turns, so that what else the machine does hits both.  An import ends with every disk on stable storage;
umoci's unpacking does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from holdfast.image.store import ImageStore

_SOURCES = ("/usr/lib/python3.11", "/usr/lib/python3", "/usr/lib/git-core", "/usr/share/doc", "/usr/share/perl5")


def build(folder: Path, layers: int) -> Path:
    """An OCI layout with one image of that many layers; the bundle is removed."""
    layout, bundle = folder / "layout", folder / "bundle"

    def umoci(*arguments: object) -> None:
        subprocess.run(["umoci", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:v")
    umoci("unpack", "--image", f"{layout}:v", bundle)
    parts = [source for source in _SOURCES if os.path.isdir(source)]
    for number in range(layers):
        for part in parts[number::layers]:
            subprocess.run(["cp", "-a", part, str(bundle / "rootfs")], check=True)
        umoci("repack", "--refresh-bundle", "--image", f"{layout}:v", bundle)
    shutil.rmtree(bundle)
    return layout


def timed_import(layout: Path, to: Path) -> tuple[float, int]:
    """Seconds of one import into an empty store, and bytes of its disks."""
    start = time.perf_counter()
    image = ImageStore(to).import_path(f"{layout}:v", "bench")
    return time.perf_counter() - start, sum(layer.size_bytes for layer in image.layers)


def timed_unpack(layout: Path, to: Path) -> float:
    """Seconds of one `umoci unpack` into an empty folder."""
    start = time.perf_counter()
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:v", str(to)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 3])
    options = parser.parse_args()
    for layers in options.layers:
        # Not /tmp, which may be memory: both are to write to the same kind of disk as the store.
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="holdfast-bench-") as name:
            folder = Path(name)
            layout = build(folder, layers)
            # ext4 is slow where much was just deleted; spare both tools that (see _spread in holdfast.image.layers).
            subprocess.run(["chattr", "+T", name], check=False, stderr=subprocess.DEVNULL)
            imports, unpacks, size = [], [], 0
            for run in range(options.runs):
                seconds, size = timed_import(layout, folder / f"data-{run}-{os.getpid()}")
                imports.append(seconds)
                unpacks.append(timed_unpack(layout, folder / f"unpacked-{run}-{os.getpid()}"))
                for left in folder.glob("*-*-*"):
                    shutil.rmtree(left)
            ours, theirs = statistics.median(imports), statistics.median(unpacks)
            record = {
                "bench": "image_import",
                "layers": layers,
                "blob_bytes": sum(path.stat().st_size for path in layout.glob("blobs/sha256/*")),
                "disk_bytes": size,
                "import_median_s": round(ours, 3),
                "umoci_unpack_median_s": round(theirs, 3),
                "ratio": round(ours / theirs, 3),
                "runs": options.runs,
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
