"""Pods restored with bundles: the mounts that a container was saved with, or a refusal that names what is different."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.image import erofs
from holdfast.spec.mounts import parse_mount
from tests import leaks
from tests.images import busybox_tree, make_bundle
from tests.vm.cli import answer, fails, text
from tests.vm.forks import end, shell
from tests.vm.support import assert_nothing_held
from tests.vm.test_save import Saved, forge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Change = Callable[[dict[str, Any]], None]

HINT = "dev.gvisor.spec.mount.cache."


@pytest.fixture(scope="module")
def saved(data: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """A pod with the container ``web``, which a bundle asked for, and its file."""
    folder, root = tmp_path_factory.mktemp("bundles"), run_folder / "bundles"
    leaks.expect(root)
    with leaks.long_lived():
        made = Saved(folder, root, data)
        (folder / "alone").write_text("alone\n")
        busybox_tree(folder / "tree")
        (folder / "layer").mkdir()
        erofs.make(str(folder / "tree"), str(folder / "layer/layer.erofs"), "tree")
        texts = (*made.mounts, f"type=bind,src={folder}/alone,dst=/alone,ro,nosuid")
        mounts = [parse_mount(text, cwd="/") for text in texts]
        hinted = {"destination": "/cache", "type": "tmpfs", "source": "/srv/cache", "options": ["noexec"]}
        make_bundle(
            folder / "bundle", ["sleep", "1000"], root={"path": ""}, mounts=[*mounts, hinted],
            windows={"layerFolders": [str(folder / "layer"), str(folder / "scratch")]},
            annotations={f"{HINT}source": "/srv/cache", f"{HINT}type": "tmpfs", f"{HINT}share": "pod"},
        )  # fmt: skip
        with holdfast.Pod("p", root=root, data=data) as pod:
            pod.run(bundle=folder / "bundle", name="web", detach=True)
            shell(pod, "web", "echo kept >/cache/file")
            pod.save(made.file)
    yield made
    assert_nothing_held(root)


def other(saved: Saved, folder: Path, change: Change) -> Path:
    """Another bundle in a folder: that of the container, changed."""
    document = json.loads((saved.folder / "bundle/config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def at(document: dict[str, Any], destination: str) -> dict[str, Any]:
    """One of the mounts."""
    found: dict[str, Any] = next(mount for mount in document["mounts"] if mount["destination"] == destination)
    return found


def restore(saved: Saved, bundles: dict[str, Any], name: str = "q", file: Path | None = None) -> holdfast.Pod:
    return holdfast.restore(file or saved.file, name, bundles=bundles, root=saved.root, data=saved.data)


def goes_on(pod: holdfast.Pod) -> None:
    """That the container has everything that it had."""
    assert shell(pod, "web", "cat /cache/file /share/file /alone /ro/file") == "kept\nshared\nalone\nshared\n"


def refused(saved: Saved, bundles: dict[str, Any], kind: type[HoldfastError], code: str) -> HoldfastError:
    """What is said of bundles; nothing is left, and there never was a pod."""
    before = sorted(os.listdir(saved.data / "scratch"))
    with pytest.raises(kind) as caught:
        restore(saved, bundles)
    assert caught.value.code == code, caught.value
    assert_nothing_held(saved.root)
    assert sorted(os.listdir(saved.data / "scratch")) == before
    return caught.value


def test_the_bundle_that_it_was_started_from_is_accepted(saved: Saved) -> None:
    with restore(saved, {"web": saved.folder / "bundle"}) as pod:
        goes_on(pod)


def say_it_otherwise(document: dict[str, Any]) -> None:
    document["mounts"].reverse()
    at(document, "/memory")["options"] = ["tmpcopyup", "rw,relatime,nodev,nosuid"]
    at(document, "/share")["options"] = ["rprivate", "RO"]
    at(document, "/share")["destination"] = "/./share/"
    document["process"]["args"] = ["what", "is", "not", "run"]


def test_what_means_the_same_is_accepted(saved: Saved, tmp_path: Path) -> None:
    """Its only container need not be named."""
    with restore(saved, {"": other(saved, tmp_path, say_it_otherwise)}) as pod:
        goes_on(pod)


def test_a_directory_may_have_moved(saved: Saved, tmp_path: Path) -> None:
    """The restored pod has it at its new path, and so have its forks and what is saved of them."""
    bundle = other(saved, tmp_path, lambda document: at(document, "/share").update(source=str(saved.folder / "away")))
    os.rename(saved.share, saved.folder / "away")
    try:
        assert "/share, is missing" in refused(saved, {}, NotFound, "restore-source").why
        with restore(saved, {"web": bundle}) as pod:
            goes_on(pod)
            assert {share["path"] for share in pod.storage()["shares"]} == {
                str(saved.folder / "away"), str(saved.folder / "alone"),
            }  # fmt: skip
            (fork,) = pod.fork(names=["f"])
            with fork:
                fork.save(tmp_path / "again", stop=True)
        with restore(saved, {"web": bundle}, file=tmp_path / "again") as again:
            goes_on(again)
    finally:
        os.rename(saved.folder / "away", saved.share)


def another_directory(document: dict[str, Any]) -> None:
    at(document, "/share")["source"] = "/usr"


def another_file(document: dict[str, Any]) -> None:
    at(document, "/alone")["source"] = at(document, "/share")["source"] + "/file"


def another_disk(document: dict[str, Any]) -> None:
    at(document, "/disk")["source"] += ".other"


def writable(document: dict[str, Any]) -> None:
    at(document, "/share")["options"].remove("ro")


def another_size(document: dict[str, Any]) -> None:
    at(document, "/memory")["options"].append("size=1m")


def one_less(document: dict[str, Any]) -> None:
    document["mounts"].remove(at(document, "/memory"))


def one_more(document: dict[str, Any]) -> None:
    document["mounts"].append({"destination": "/more", "type": "tmpfs", "source": "tmpfs"})


def no_tmp(document: dict[str, Any]) -> None:
    document["annotations"]["dev.holdfast.tmp"] = "rootfs"


def another_layer(document: dict[str, Any]) -> None:
    document["windows"]["layerFolders"].insert(0, "/nowhere")


def another_hint(document: dict[str, Any]) -> None:
    document["annotations"][f"{HINT}options"] = "noexec"


def another_source_of_a_hint(document: dict[str, Any]) -> None:
    document["annotations"][f"{HINT}source"] = at(document, "/cache")["source"] = "/srv/other"


def no_hint(document: dict[str, Any]) -> None:
    document["annotations"] = {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_directory, "container web: the mount at /share: source was "),
        (another_file, "container web: the mount at /alone: source was "),
        (another_disk, "container web: the mount at /disk: source was "),
        (writable, "container web: the mount at /share: options was ro,rbind,rprivate, is rbind,rprivate"),
        (
            another_size,
            "container web: the mount at /memory: options was nosuid,nodev,tmpcopyup, is nosuid,nodev,size=",
        ),
        (one_less, "container web: the mount at /memory is missing"),
        (one_more, "container web: the mount at /more was not there"),
        (no_tmp, "container web: the mount at /tmp is missing"),
        (another_layer, "container web: the mount at /: layers was "),
        (another_hint, "hint cache: options was none, is noexec"),
        (another_source_of_a_hint, "hint cache: source was /srv/cache, is /srv/other"),
        (no_hint, "hint cache is missing; container web: the mount at /cache: volume was cache, is none"),
    ],
)
def test_another_specification_is_refused_by_name(saved: Saved, tmp_path: Path, change: Change, said: str) -> None:
    error = refused(saved, {"web": other(saved, tmp_path, change)}, InvalidInput, "restore-differs")
    assert error.subject == "p"
    assert error.why.startswith(said)


def test_a_bundle_that_is_none_or_nobodys_is_refused(saved: Saved, tmp_path: Path) -> None:
    bundle = saved.folder / "bundle"
    assert "p was saved with web" in refused(saved, {"w": bundle}, NotFound, "container-not-running").why
    error = refused(saved, {"": bundle, "web": tmp_path}, InvalidInput, "bundle-twice")
    assert (str(bundle) in error.why, str(tmp_path) in error.why) == (True, True)
    assert refused(saved, {"web": tmp_path}, NotFound, "spec-not-found").subject == str(tmp_path / "config.json")
    refused(saved, {"web": tmp_path / "nowhere"}, NotFound, "bundle-not-found")
    (tmp_path / "config.json").write_text("{")
    refused(saved, {"web": tmp_path}, InvalidInput, "spec-not-json")
    other(saved, tmp_path, lambda document: at(document, "/share").update(source="/nowhere"))
    assert "web: /share: its source /nowhere is missing" in str(
        refused(saved, {"web": tmp_path}, NotFound, "source-not-found")
    )


def forget_mounts(record: dict[str, Any]) -> None:
    """As Holdfast wrote a record before it had them."""
    del record["containers"]["mounts"]


def test_a_save_without_a_record_of_mounts_says_so(saved: Saved) -> None:
    original = saved.file.read_bytes()
    try:
        forge(saved, forget_mounts)
        error = refused(saved, {"web": saved.folder / "bundle"}, Unsupported, "save-no-mounts")
        assert (error.subject, "no record of its mounts" in error.why) == ("p/web", True)
        with restore(saved, {}) as pod:
            goes_on(pod)
    finally:
        saved.file.write_bytes(original)


def test_several_containers(saved: Saved, tmp_path: Path) -> None:
    """Each has its own bundle, or none; what another one of the pod said is not to be contradicted."""
    (tmp_path / "two").mkdir()
    two = other(saved, tmp_path / "two", lambda document: document["mounts"].remove(at(document, "/disk")))
    changed = tmp_path / "changed"
    changed.mkdir()
    file = tmp_path / "file"
    with restore(saved, {}) as pod:
        pod.run(bundle=two, name="two", detach=True)
        pod.run(bundle=two, name="gone", detach=True)
        end(pod, "gone")
        pod.save(file)
    with pytest.raises(InvalidInput) as caught:
        restore(saved, {"": two}, file=file)
    assert (caught.value.code, "which container" in caught.value.why) == ("bundle-container", True)
    with pytest.raises(NotFound):
        restore(saved, {"gone": two}, file=file)
    with pytest.raises(InvalidInput) as caught:
        restore(saved, {"two": two, "web": two}, file=file)
    assert caught.value.why == "container web: the mount at /disk is missing"
    with pytest.raises(InvalidInput) as caught:
        restore(saved, {"two": other(saved, changed, another_hint)}, file=file)
    assert (caught.value.code, caught.value.subject) == ("hint-conflict", "hint cache")
    assert_nothing_held(saved.root)
    for bundles in ({"two": two}, {"two": two, "web": saved.folder / "bundle"}):
        with restore(saved, bundles, file=file) as pod:
            goes_on(pod)
            assert shell(pod, "two", "cat /cache/file") == "kept\n"


def test_the_command(saved: Saved, state_root: Path, tmp_path: Path) -> None:
    bundle = other(saved, tmp_path, one_more)
    error = fails("pod", "restore", saved.file, "--bundle", f"web={bundle}")
    assert (error["code"], error["why"]) == ("restore-differs", "container web: the mount at /more was not there")
    assert answer("ps") == []
    assert text("pod", "restore", saved.file, "--bundle", f"web={saved.folder}/bundle") == "p\n"
    assert text("exec", "p/web", "cat", "/cache/file") == "kept\n"
    text("pod", "remove", "-f", "p")
    assert_nothing_held(state_root)
