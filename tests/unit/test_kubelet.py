"""What is seen in the kubelet's folders, put into a specification and the pod's hints."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError
from holdfast.spec import kubernetes
from holdfast.spec.hints import Hint
from holdfast.storage.kubelet import understand

if TYPE_CHECKING:
    from pathlib import Path

CRI = "io.kubernetes.cri."
HINT = "dev.gvisor.spec.mount.cache."


@pytest.fixture
def empty_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kubernetes, "PODS", str(tmp_path))
    folder = tmp_path / "u1/volumes/kubernetes.io~empty-dir/cache"
    folder.mkdir(parents=True)
    return folder


def document(kind: str, *mounts: dict[str, Any], role: str = "sandbox") -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "annotations": {
            HINT + "type": kind, HINT + "share": "pod", CRI + "sandbox-uid": "u1",
            CRI + "container-type": role, CRI + "sandbox-id": "s",
        },
        "mounts": list(mounts),
    }  # fmt: skip


def bind(source: object, destination: str = "/cache") -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": destination, "options": ["rbind", "rw"], "more": 1}


@pytest.mark.parametrize(("kind", "becomes"), [("tmpfs", "tmpfs"), ("bind", "bind")])
def test_an_empty_dir(empty_dir, kind, becomes):
    given = document(kind, bind(empty_dir))
    before = copy.deepcopy(given)
    meant, hints, own = understand(given, ())
    assert given == before
    assert hints == own == (Hint("cache", str(empty_dir), "tmpfs", "pod"),)
    [mount] = meant["mounts"]
    assert (mount["type"], mount["more"]) == (becomes, 1)
    assert ("rbind" in mount["options"]) == (becomes == "bind")


def test_what_the_pod_knows_is_not_looked_at_again(empty_dir):
    known = (Hint("cache", str(empty_dir), "tmpfs", "pod"),)
    (empty_dir / "late").touch()
    _, hints, own = understand(document("bind", bind(empty_dir), role="container"), known)
    assert hints == own == known
    assert understand(document("bind", bind(empty_dir)), ())[1][0].kind == "bind"


def test_shared_memory_is_of_the_sandbox(empty_dir):
    shm = bind("/run/sandboxes/s/shm", "/dev/shm")
    meant, hints, own = understand(document("bind", shm), ())
    assert hints[-1] == own[-1] == kubernetes.shm_hint([_mount(shm)])
    assert meant["mounts"][0]["type"] == "tmpfs"
    later, again, _ = understand(document("bind", shm, role="container"), hints)
    assert (later["mounts"][0]["type"], again) == ("tmpfs", hints)
    # A container that binds what the sandbox did not is given that.
    other, _, _ = understand(document("bind", bind("/other", "/dev/shm"), role="container"), hints)
    assert other["mounts"][0]["type"] == "bind"


def _mount(raw: dict[str, Any]) -> Any:
    from holdfast.spec.runtime import spec_from_raw

    return spec_from_raw({"ociVersion": "1.0.2", "mounts": [raw]}).mounts[0]


def test_without_an_engine_nothing_changes(tmp_path):
    given = {"ociVersion": "1.0.2", "mounts": [bind(tmp_path, "/dev/shm")]}
    assert understand(given, ()) == (given, (), ())
    assert understand({"ociVersion": "1.0.2"}, ()) == ({"ociVersion": "1.0.2", "mounts": []}, (), ())


def test_a_volume_that_is_not_there(empty_dir):
    empty_dir.rmdir()
    with pytest.raises(HoldfastError) as caught:
        understand(document("bind"), ())
    assert caught.value.code == "volume-not-found"
