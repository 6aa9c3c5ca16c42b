"""Bundles and specs: what is read, what is refused with which words, and that the document is left as it is."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import HoldfastError, InvalidInput
from holdfast.spec.bundle import Bundle, parse_document
from holdfast.spec.checks import check, problems
from holdfast.spec.runtime import clean_path, spec_from_raw

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 25, "width": 80},
        "user": {"uid": 1, "gid": 2, "additionalGids": [5, 6], "umask": 18},
        "args": ["sh"],
        "env": ["PATH=/bin", "EMPTY="],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**64 - 1, "soft": 1024}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "data//x/../y", "type": "none", "source": "src", "options": ["rbind", "RO"]},
        {"destination": "/disk", "type": "virtual-disk", "source": "/d.raw", "options": ["bind"]},
    ],
    "hooks": {"createRuntime": [{"path": "/bin/true", "timeout": 3}]},
    "annotations": {"a": "b"},
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "uts", "path": "/proc/1/ns/uts"}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "cgroupsPath": "/x",
        "resources": {"memory": {"limit": -1}, "cpu": {"quota": -1}, "devices": [{"allow": False, "access": "rwm"}]},
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        "maskedPaths": ["/proc/kcore"],
        "newInVersion9": {"x": [1]},
    },
    "windows": {"layerFolders": None, "devices": [{"id": "x", "idType": "class"}]},
}


def without(document: dict[str, Any], path: str, value: object = ...) -> dict[str, Any]:
    """A copy of ``document`` with the field at ``path`` set to ``value``, or gone."""
    document = copy.deepcopy(document)
    *parents, name = path.split(".")
    inner: Any = document
    for parent in parents:
        inner = inner[int(parent)] if parent.isdigit() else inner[parent]
    if value is ...:
        del inner[name]
    else:
        inner[int(name) if name.isdigit() else name] = value
    return document


def make_bundle(folder: Path, document: object) -> Path:
    (folder / "rootfs").mkdir(exist_ok=True)
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (folder / "config.json").write_bytes(text)
    return folder


def test_bundle(tmp_path: Path) -> None:
    bundle = Bundle.load(make_bundle(tmp_path, GOOD))
    assert bundle.raw == GOOD  # unknown keys and nulls included
    assert bundle.root_path == str(tmp_path / "rootfs")
    assert bundle.host_path("src") == str(tmp_path / "src")
    spec = bundle.spec
    assert spec.process is not None
    assert spec.process.user.additional_gids == (5, 6)
    assert spec.process.rlimits[0].hard == 2**64 - 1
    assert spec.linux.resources is not None
    assert spec.linux.resources.memory is not None
    assert spec.linux.resources.memory.limit == -1
    assert spec.linux.uid_mappings[0].host_id == 1000
    assert (spec.windows.layer_folders, spec.windows.devices[0].id_type) == ((), "class")
    assert [mount.kind for mount in spec.mounts] == ["proc", "bind", "virtual-disk"]
    assert [mount.target for mount in spec.mounts] == ["/proc", "/data/y", "/disk"]
    assert [mount.read_only for mount in spec.mounts] == [False, True, False]
    assert dict(spec.hooks)["createRuntime"][0].timeout == 3
    assert (spec.linux.namespace("pid") is not None, spec.linux.namespace("user")) == (True, None)


def test_a_copy_is_deep(tmp_path: Path) -> None:
    bundle = Bundle.load(make_bundle(tmp_path, GOOD))
    bundle.copy_raw()["mounts"][1]["options"].append("nosuid")
    assert bundle.raw == GOOD


@pytest.mark.parametrize(
    ("folders", "root", "problem"),
    [
        (["/only"], False, "windows.layerFolders: needs at least two"),
        (["/layer", "/scratch"], True, "root.path: cannot be given together with windows.layerFolders"),
    ],
)
def test_layer_folders_that_make_no_root(folders: list[str], root: bool, problem: str) -> None:
    document = without(GOOD if root else without(GOOD, "root"), "windows.layerFolders", folders)
    with pytest.raises(InvalidInput, match=problem):
        check(spec_from_raw(document, "test"))


def test_layer_folders_make_a_root_unneeded(tmp_path: Path) -> None:
    document = without(without(GOOD, "root"), "windows.layerFolders", ["/layer", "/scratch"])
    bundle = Bundle.load(make_bundle(tmp_path, document))
    assert bundle.root_path is None
    assert bundle.spec.windows.layer_folders == ("/layer", "/scratch")


def test_bundle_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path, without(GOOD, "root.path", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    assert (Bundle.load(".").path, Bundle.load(".").root_path) == (str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("path", ["process", "mounts", "hooks", "linux.resources", "annotations", "process.user"])
def test_null_is_absent(path: str) -> None:
    document = without(GOOD, path, None)
    assert spec_from_raw(document) == spec_from_raw(without(GOOD, path))


def put(path: str, value: object = ...) -> bytes:
    return json.dumps(without(GOOD, path, value)).encode()


BAD_DOCUMENTS = [
    # document, code, what the reason says
    (b"", "spec-not-json", "line 1, column 1: Expecting value"),
    (b'{"ociVersion": "1.0.0",\n "root": }', "spec-not-json", "line 2, column 10: Expecting value"),
    (b'{"ociVersion": "1.0.0"}\n}', "spec-not-json", "line 2, column 1: Extra data"),
    (b'{"a": NaN}', "spec-not-json", "malformed"),
    (b'{"a":\n "\xff"}', "spec-not-json", "line 2, column 3: not UTF-8"),
    (b"[" * 100_000, "spec-not-json", "nested too deep"),
    (b"[]", "spec-invalid", "expected an object, got list"),
    (b"null", "spec-invalid", "expected an object, got NoneType"),
    (b"{}", "spec-invalid", "ociVersion: required, but missing"),
    (put("ociVersion", None), "spec-invalid", "ociVersion: required, but missing"),
    (put("ociVersion", ""), "spec-invalid", "ociVersion: '' is not a version"),
    (put("ociVersion", "1"), "spec-invalid", "ociVersion: '1' is not a version"),
    (put("ociVersion", "2.0.0"), "spec-version", "version 2.0.0"),
    (put("ociVersion", "0.5.0-dev"), "spec-version", "versions 1.x are supported"),
    (put("mounts.1.destination", 3), "spec-invalid", "mounts[1].destination: expected `str`, got `int`"),
    (put("mounts.1.destination"), "spec-invalid", "mounts[1].destination: required, but missing"),
    (put("mounts.2.options", ["ro", 1]), "spec-invalid", "mounts[2].options[1]: expected `str`, got `int`"),
    (put("mounts.2", None), "spec-invalid", "mounts[2]: expected `object`, got `null`"),
    (put("annotations", {"a": "b", "c/d": 1}), "spec-invalid", "annotations['c/d']: expected `str`, got `int`"),
    (put("linux.sysctl", {"net.x": 1}), "spec-invalid", "linux.sysctl['net.x']: expected `str`"),
    (put("process.user.uid", -1), "spec-invalid", "process.user.uid: expected `int` >= 0"),
    (put("process.user.additionalGids", [2**32]), "spec-invalid", "process.user.additionalGids[0]: expected `int`"),
    (put("process.terminal", "yes"), "spec-invalid", "process.terminal: expected `bool`, got `str`"),
    (put("process.cwd"), "spec-invalid", "process.cwd: required, but missing"),
    (put("process.cwd", "x"), "spec-invalid", "process.cwd: must be absolute, not 'x'"),
    (put("process.args", []), "spec-invalid", "process.args: names no command"),
    (put("process.args"), "spec-invalid", "process.args: names no command"),
    (put("process.args", [""]), "spec-invalid", "process.args: names no command"),
    (put("process.args", ["a\0b"]), "spec-invalid", "process.args: holds a NUL"),
    (put("process.env", ["A=1", "B"]), "spec-invalid", "process.env[1]: must be NAME=VALUE, not 'B'"),
    (put("process.env", ["=x"]), "spec-invalid", "process.env[0]: must be NAME=VALUE"),
    (
        put("process.rlimits", [{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}] * 2),
        "spec-invalid",
        "process.rlimits: RLIMIT_CORE is given 2 times",
    ),
    (put("mounts.0.destination", ""), "spec-invalid", "mounts[0].destination: is empty"),
    (put("mounts.0.destination", "/x/.."), "spec-invalid", "mounts[0].destination: '/x/..' is the root itself"),
    (put("mounts.0.type"), "spec-invalid", "mounts[0].type: required, but missing"),
    (put("mounts.1.source"), "spec-invalid", "mounts[1].source: required for a mount of type bind"),
    (put("mounts.2.source", ""), "spec-invalid", "mounts[2].source: required for a mount of type virtual-disk"),
    (put("mounts.0.uidMappings", GOOD["linux"]["uidMappings"]), "spec-invalid", "mounts[0].uidMappings, gidMappings"),
    (put("linux.namespaces", [{"type": "uts"}] * 2), "spec-invalid", "linux.namespaces: uts is given 2 times"),
    (put("linux.namespaces.0.type", "pids"), "spec-invalid", "linux.namespaces[0].type: 'pids' is none of"),
    (put("linux.namespaces.0.path", "x"), "spec-invalid", "linux.namespaces[0].path: must be absolute"),
    (put("linux.namespaces", []), "spec-invalid", "hostname: cannot be set without a uts namespace"),
    (put("hooks.createRuntime.0.path", "x"), "spec-invalid", "hooks.createRuntime[0].path: must be absolute"),
    (put("root"), "spec-invalid", "root.path: required, but missing"),
    (put("root", None), "spec-invalid", "root.path: required, but missing"),
    (put("root.path", ""), "spec-invalid", "root.path: required, but missing"),
]


@pytest.mark.parametrize(("document", "code", "why"), BAD_DOCUMENTS, ids=[why[:60] for _, _, why in BAD_DOCUMENTS])
def test_bad_documents(tmp_path: Path, document: bytes, code: str, why: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        Bundle.load(make_bundle(tmp_path, document))
    assert caught.value.code == code
    assert caught.value.subject == str(tmp_path / "config.json")
    assert why in caught.value.why


def test_every_problem_is_told_at_once() -> None:
    document = without(without(GOOD, "process.cwd", "x"), "mounts.1.source", "")
    with pytest.raises(InvalidInput) as caught:
        check(spec_from_raw(document))
    assert "process.cwd" in caught.value.why
    assert "mounts[1].source" in caught.value.why


def test_bad_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    nothing, full, loop, fifo = (tmp_path / name for name in ("nothing", "full", "loop", "fifo"))
    for folder in (full, fifo):
        folder.mkdir()
    loop.symlink_to(loop)
    os.mkfifo(fifo / "config.json")
    make_bundle(full, without(GOOD, "root.path", "../file"))
    expected = [
        (nothing, "bundle-not-found", nothing),
        (file / "x", "bundle-not-found", file / "x"),
        (file, "bundle-not-a-directory", file),
        (loop, "bundle-unreadable", loop),
        (tmp_path, "spec-not-found", tmp_path / "config.json"),
        (fifo, "spec-unreadable", fifo / "config.json"),
        (full, "rootfs-not-a-directory", file),
    ]
    for path, code, subject in expected:
        with pytest.raises(HoldfastError) as caught:
            Bundle.load(path)
        assert (caught.value.code, caught.value.subject) == (code, str(subject))
    make_bundle(full, without(GOOD, "root.path", "gone"))
    with pytest.raises(HoldfastError) as caught:
        Bundle.load(full)
    assert (caught.value.code, caught.value.subject) == ("rootfs-not-found", str(full / "gone"))


@pytest.mark.parametrize(
    ("path", "clean"),
    [("a", "/a"), ("//a", "/a"), ("/../..", "/"), ("/a/./b//", "/a/b"), ("../a", "/a"), ("", "/"), (".", "/")],
)
def test_clean_path(path: str, clean: str) -> None:
    assert clean_path(path) == clean


@given(st.text("/.ab"))
def test_clean_paths_stay_clean(path: str) -> None:
    clean = clean_path(path)
    assert clean_path(clean) == clean
    assert clean.startswith("/")
    assert not {"", ".", ".."} & set(clean[1:].split("/")) or clean == "/"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted({*GOOD, "mounts.1", "linux.namespaces", "process.user", "linux.resources"})), json_values)
def test_whatever_a_field_holds_is_read_or_refused(path: str, value: object) -> None:
    document = without(GOOD, path, value)
    before = copy.deepcopy(document)
    assert parse_document(json.dumps(document).encode()) == document
    try:
        spec = spec_from_raw(document)
    except InvalidInput as error:
        assert path.split(".")[0] in error.why
    else:
        assert all(isinstance(problem, str) for problem in problems(spec))
    assert document == before
