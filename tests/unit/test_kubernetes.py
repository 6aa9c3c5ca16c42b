"""What Kubernetes says: roles, uids, volumes' sources, emptyDirs and /dev/shm."""

from __future__ import annotations

import fnmatch

import pytest

from holdfast.errors import InvalidInput, NotFound
from holdfast.spec.hints import GVISOR, GVISOR_2019, HOLDFAST, Hint, backing, match, parse_hints
from holdfast.spec.kubernetes import (
    SHM_HINT,
    Role,
    SeenVolume,
    VolumePath,
    mounts_as_annotated,
    pod_uid,
    role,
    shm_hint,
    volume_path,
    volumes_to_find,
    with_sources,
)
from holdfast.spec.runtime import Mount

CRI = "io.kubernetes.cri."
CRIO = "io.kubernetes.cri-o."
EMPTY = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/cache"
POD = {CRI + "sandbox-log-directory": "/var/log/pods/ns_name_u1"}


def cache(prefix: str = GVISOR, kind: str = "bind", share: str = "pod") -> dict[str, str]:
    key = f"{prefix}cache{prefix[-1]}"
    return {**POD, f"{key}type": kind, f"{key}share": share}


# Roles


@pytest.mark.parametrize(
    ("annotations", "kind", "sandbox"),
    [
        ({}, "sandbox", "me"),
        ({CRI + "container-type": "sandbox", CRI + "sandbox-id": "s"}, "sandbox", "s"),
        ({CRI + "container-type": "container", CRI + "sandbox-id": "s"}, "container", "s"),
        ({CRIO + "ContainerType": "container", CRIO + "SandboxID": "s"}, "container", "s"),
        (
            {
                CRIO + "ContainerType": "sandbox", CRIO + "SandboxID": "x",
                CRI + "container-type": "container", CRI + "sandbox-id": "s",
            },
            "container",
            "s",
        ),
        ({CRI + "sandbox-id": "s"}, "sandbox", "s"),
    ],
)  # fmt: skip
def test_role(annotations: dict[str, str], kind: str, sandbox: str) -> None:
    found = role(annotations, "me")
    assert (found.kind, found.sandbox_id) == (kind, sandbox)


def test_role_has_kubernetes_names() -> None:
    names = {"container-name": "app", "sandbox-name": "pod", "sandbox-namespace": "ns", "sandbox-uid": "u1"}
    assert role({CRI + key: value for key, value in names.items()}, "c") == Role(
        "sandbox", "c", "app", "pod", "ns", "u1"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("annotations", "code", "said"),
    [
        ({CRI + "container-type": "init"}, "container-type", "container-type=init: neither sandbox nor container"),
        ({CRIO + "ContainerType": "x"}, "container-type", "io.kubernetes.cri-o.ContainerType=x"),
        ({CRI + "container-type": "container"}, "sandbox-id", "no io.kubernetes.cri.sandbox-id"),
        ({CRI + "sandbox-id": "../x"}, "sandbox-id", "not an id"),
        ({CRI + "sandbox-id": ".."}, "sandbox-id", "not an id"),
    ],
)
def test_bad_role(annotations: dict[str, str], code: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        role(annotations)
    assert caught.value.code == code
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("annotations", "uid"),
    [
        ({}, ""),
        (POD, "u1"),
        ({CRI + "sandbox-log-directory": "/var/log/pods/u2/"}, "u2"),
        ({CRI + "sandbox-uid": "u3", **POD}, "u3"),
    ],
)
def test_pod_uid(annotations: dict[str, str], uid: str) -> None:
    assert pod_uid(annotations) == uid


@pytest.mark.parametrize(
    "annotations",
    [
        {CRI + "sandbox-log-directory": "/var/log/pods/ns_name"},
        {CRI + "sandbox-log-directory": "/var/log/pods/a_b_c_d"},
        {CRI + "sandbox-log-directory": "/var/log/pods/ns_name_"},
        {CRI + "sandbox-uid": "../.."},
    ],
)
def test_bad_pod_uid(annotations: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        pod_uid(annotations)
    assert caught.value.code == "pod-uid"


# Volumes


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (EMPTY, VolumePath("u1", "kubernetes.io~empty-dir", "cache")),
        (EMPTY + "//a/b/", VolumePath("u1", "kubernetes.io~empty-dir", "cache", "a/b")),
        ("/var/lib/kubelet/pods/u1/volume-subpaths/cache/app/0", None),
        ("/var/lib/kubelet/pods/u1/volumes/x", None),
        ("/var/lib/kubelet/podsX/u1/volumes/x/y", None),
        (EMPTY.lstrip("/"), None),
        ("/data", None),
    ],
)
def test_volume_path(source: str, found: VolumePath | None) -> None:
    assert volume_path(source) == found


@pytest.mark.parametrize("prefix", [GVISOR, GVISOR_2019, HOLDFAST])
def test_where_volumes_are_looked_for(prefix: str) -> None:
    assert volumes_to_find(cache(prefix)) == {"cache": "/var/lib/kubelet/pods/u1/volumes/*/cache"}


def test_nothing_to_find() -> None:
    key = GVISOR + "cache."
    assert volumes_to_find({**cache(), key + "source": "/given"}) == {}
    assert volumes_to_find({key + "type": "bind"}) == {}  # no pod of Kubernetes
    assert volumes_to_find({**POD, key + "share": "pod"}) == {}
    assert with_sources(POD, {}) == POD


def test_names_are_no_patterns() -> None:
    pattern = volumes_to_find({CRI + "sandbox-uid": "u[1]", GVISOR + "c*.type": "bind"})["c*"]
    assert fnmatch.fnmatchcase("/var/lib/kubelet/pods/u[1]/volumes/p/c*", pattern)
    assert not fnmatch.fnmatchcase("/var/lib/kubelet/pods/u[1]/volumes/p/cc", pattern)
    assert not fnmatch.fnmatchcase("/var/lib/kubelet/pods/u1/volumes/p/c*", pattern)


@pytest.mark.parametrize(
    ("annotated", "names", "extra", "kind", "share"),
    [
        ("tmpfs", (), {}, "tmpfs", "pod"),
        ("bind", (), {}, "tmpfs", "pod"),
        ("bind", (".gvisor.filestore.abc",), {}, "tmpfs", "pod"),
        ("bind", (".gvisor.filestore.abc", "x"), {}, "bind", "shared"),
        ("bind", ("data",), {}, "bind", "shared"),
        ("tmpfs", ("data",), {}, "bind", "shared"),
        ("bind", (), {"dev.gvisor.empty-dir.cache.force-shared": "true"}, "bind", "shared"),
        ("bind", (), {"dev.holdfast.empty-dir.cache.force-shared": "true"}, "bind", "shared"),
        ("bind", (), {"dev.gvisor.empty-dir.other.force-shared": "true"}, "tmpfs", "pod"),
        ("bind", (), {"dev.gvisor.empty-dir.cache.force-shared": "false"}, "tmpfs", "pod"),
    ],
)
@pytest.mark.parametrize("prefix", [GVISOR, GVISOR_2019])
def test_empty_dir(
    prefix: str, annotated: str, names: tuple[str, ...], extra: dict[str, str], kind: str, share: str
) -> None:
    annotations = {**cache(prefix, annotated), **extra}
    filled = with_sources(annotations, {"cache": SeenVolume((EMPTY,), names)})
    assert f"{prefix}cache{prefix[-1]}source" not in annotations, "the caller's are changed"
    assert parse_hints(filled).hints == (Hint("cache", EMPTY, kind, share),)  # type: ignore[arg-type]


def test_hint_in_two_styles_stays_without_contradiction() -> None:
    filled = with_sources(cache(GVISOR) | cache(HOLDFAST), {"cache": SeenVolume((EMPTY,), ("full",))})
    assert parse_hints(filled).hints == (Hint("cache", EMPTY, "bind", "shared"),)


def test_other_volumes_keep_their_type() -> None:
    path = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~nfs/cache"
    filled = with_sources(cache(share="shared"), {"cache": SeenVolume((path,), ())})
    assert parse_hints(filled).hints == (Hint("cache", path, "bind", "shared"),)


def test_volume_that_is_not_one() -> None:
    with pytest.raises(NotFound) as missing:
        with_sources(cache(), {})
    assert missing.value.code == "volume-not-found"
    assert GVISOR + "cache.type=bind" in str(missing.value)
    with pytest.raises(InvalidInput, match=r"any of /a, /b") as several:
        with_sources(cache(), {"cache": SeenVolume(("/b", "/a"))})
    assert several.value.code == "volume-ambiguous"


def test_force_shared_must_be_clear() -> None:
    annotations = {**cache(), "dev.gvisor.empty-dir.cache.force-shared": "perhaps"}
    with pytest.raises(InvalidInput, match="neither true nor false"):
        with_sources(annotations, {"cache": SeenVolume((EMPTY,))})


@pytest.mark.parametrize(
    ("annotated", "names", "expected"),
    [("tmpfs", (), "memory"), ("bind", (), "disk"), ("bind", ("x",), "share"), ("tmpfs", ("x",), "share")],
)
def test_annotation_and_emptiness_decide_where_data_is(annotated: str, names: tuple[str, ...], expected: str) -> None:
    """The reference's table, from the annotation to what a container gets: the kubelet binds every volume."""
    annotations = cache(kind=annotated)
    (hint,) = parse_hints(with_sources(annotations, {"cache": SeenVolume((EMPTY,), names)})).hints
    (mount,) = mounts_as_annotated(annotations, [Mount("/cache", "bind", EMPTY, ("rbind", "rprivate", "rw"))])
    assert match([hint], mount) == (hint, "")
    assert backing(hint, mount) == expected


def test_only_the_annotated_volumes_change_type() -> None:
    others = [
        Mount("/a", "bind", EMPTY.replace("cache", "other"), ("rbind",)),
        Mount("/b", "bind", EMPTY + "/inside", ("rbind",)),
        Mount("/c", "bind", "/host", ("rbind",)),
        Mount("/d", "tmpfs", EMPTY),
    ]
    assert mounts_as_annotated(cache(kind="tmpfs"), others) == tuple(others)
    (changed,) = mounts_as_annotated(cache(kind="tmpfs"), [Mount("/e", "bind", EMPTY, ("rbind", "ro"))])
    assert changed == Mount("/e", "tmpfs", EMPTY, ("ro",))


# /dev/shm

SHM_SOURCE = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s/shm"


def test_shm_of_a_pod_is_one_tmpfs_that_all_may_write_to() -> None:
    """Reports on the reference: shared memory was apart in each container, then of mode 0755."""
    hint = shm_hint([Mount("/dev/shm/", "bind", SHM_SOURCE, ("rbind", "ro"))])
    assert hint == Hint(SHM_HINT, SHM_SOURCE, "tmpfs", "pod", ("mode=1777", "size=67108864"))
    assert match([hint], Mount("/dev/shm", "bind", SHM_SOURCE, ("rbind", "rw"))) == (hint, "")


@pytest.mark.parametrize(
    "mount",
    [
        Mount("/dev/shm", "tmpfs", "shm"),
        Mount("/dev/shm", "bind", "/dev/shm", ("rbind",)),
        Mount("/dev/shm", "bind", "relative", ("rbind",)),
        Mount("/dev/mqueue", "bind", SHM_SOURCE, ("rbind",)),
    ],
)
def test_no_shm_of_the_pod(mount: Mount) -> None:
    assert shm_hint([mount]) is None


def test_shm_that_is_hinted_already() -> None:
    hint = Hint("mine", SHM_SOURCE, "tmpfs", "pod", ("size=1m",))
    assert shm_hint([Mount("/dev/shm", "bind", SHM_SOURCE, ("rbind",))], [hint]) is None
