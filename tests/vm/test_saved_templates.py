"""Templates with what runs in them: clones go on from there, share their memory, and outlive them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import holdfast
from holdfast.errors import Corrupt, HoldfastError, InUse, InvalidInput, NotFound
from holdfast.machine.config import DEFAULT_MEMORY_BYTES
from holdfast.pod import savefile, templates
from tests import leaks
from tests.vm.cli import answer, fails, text
from tests.vm.support import BUSYBOX, DEADLINE_S, assert_nothing_held, output, python_program

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "test-warm"


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the template's container reads."""
    folder = tmp_path_factory.mktemp("warm") / "share"
    folder.mkdir()
    (folder / "file").write_text("shared\n")
    return folder


@pytest.fixture(scope="module")
def made(data: Path, run_folder: Path, share: Path) -> Iterator[Path]:
    """The folder of a template with a container that has a file, a share, and something in memory alone."""
    root = run_folder / "warm"
    leaks.expect(root)
    with leaks.long_lived():
        if NAME in templates.names(data):
            templates.remove(data, NAME)
        with holdfast.Pod(root=root, data=data) as pod:
            mounts = ["type=tmpfs,dst=/memory", f"type=bind,src={share},dst=/share,ro"]
            script = "echo kept >/memory/file; echo kept >/file; sleep 1000"
            pod.run(BUSYBOX, ["sh", "-c", script], name="c", mounts=mounts, detach=True)
            output(pod.exec("c", ["sh", "-c", "until [ -s /file ]; do :; done"]))
            pod.make_template(NAME)
            assert output(pod.exec("c", ["cat", "/file"])) == "kept\n"
    yield templates.folder_of(data) / NAME
    if NAME in templates.names(data):
        templates.remove(data, NAME)
    assert_nothing_held(root)


@pytest.mark.usefixtures("made")
def test_clones_go_on_from_there_and_do_not_see_each_other(data: Path, state_root: Path) -> None:
    with (
        holdfast.Pod("a", template=NAME, root=state_root, data=data) as a,
        holdfast.Pod("b", template=NAME, root=state_root, data=data) as b,
    ):
        for pod in (a, b):
            files = ["/memory/file", "/file", "/share/file"]
            assert output(pod.exec("c", ["cat", *files])) == "kept\nkept\nshared\n"
            output(pod.exec("c", ["sh", "-c", f"echo {pod.name} | tee /memory/file >/file"]))
        for pod in (a, b):
            assert output(pod.exec("c", ["cat", "/memory/file", "/file"])) == f"{pod.name}\n" * 2
            assert output(pod.run(BUSYBOX, ["hostname"], hostname="new")) == "new\n"
        random = {pod.exec("c", ["cat", "/proc/sys/kernel/random/uuid"]).text for pod in (a, b)}
        assert len(random) == 2
        assert a.inspect().memory_bytes == DEFAULT_MEMORY_BYTES
    assert_nothing_held(state_root)


def test_their_memory_is_the_templates_own_file(made: Path, data: Path, state_root: Path) -> None:
    """Mapped privately: nothing is copied, and what none has written is in memory once."""
    with holdfast.Pod(template=NAME, root=state_root, data=data) as pod:
        maps = Path(f"/proc/{pod.inspect().qemu_pid}/maps").read_text().splitlines()
        (line,) = [line for line in maps if line.endswith(str(made / "ram"))]
        assert line.split()[1].endswith("p")
    assert (made / "ram").stat().st_blocks * 512 < DEFAULT_MEMORY_BYTES


def test_another_machine_cannot_be_asked_for(made: Path, data: Path, state_root: Path) -> None:
    for options in ({"memory": "300M"}, {"cpus": 2}, {"isolation": "namespace"}, {"pmem": True}):
        with pytest.raises(InvalidInput) as caught:
            holdfast.Pod(template=made.name, root=state_root, data=data, **options)  # type: ignore[arg-type]
        assert caught.value.code == "template-differs"
    assert_nothing_held(state_root)


@pytest.mark.parametrize("name", ["none", "0123456789abcdef01234567", "a.b", "../a", "", ".a", "a/b"])
def test_names_that_a_template_cannot_have(data: Path, name: str) -> None:
    with pytest.raises(InvalidInput), templates.making(data, name):
        pass
    with pytest.raises(InvalidInput):
        templates.remove(data, name)


def test_one_name_is_one_template(made: Path, data: Path) -> None:
    with pytest.raises(InUse) as caught, templates.making(data, made.name):
        pass
    assert caught.value.code == "template-exists"
    with templates.making(data, "another"):
        with pytest.raises(InUse) as caught, templates.making(data, "another"):
            pass
        assert caught.value.code == "template-busy"
    assert templates.names(data) == [made.name]
    assert list(templates.sweep(data)) == []


def refused(data: Path, root: Path, kind: type[HoldfastError], code: str) -> HoldfastError:
    with pytest.raises(kind) as caught:
        holdfast.Pod(template=NAME, root=root, data=data)
    assert caught.value.code == code
    return caught.value


def test_one_that_has_changed_is_refused_by_name(made: Path, data: Path, state_root: Path) -> None:
    for file in ("ram", "state", "record", *(f"disks/{name}" for name in os.listdir(made / "disks"))):
        times = (made / file).stat()
        os.utime(made / file)
        error = refused(data, state_root, Corrupt, "template-damaged")
        assert (error.subject, error.why) == (NAME, f"its {file} has changed since it was saved")
        os.utime(made / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    manifest = (made / savefile.MANIFEST).read_bytes()
    for content, why in ((manifest[:-1], "manifest"), (b'{"version":9}', "version 9")):
        (made / savefile.MANIFEST).write_bytes(content)
        assert why in refused(data, state_root, Corrupt, "template-damaged").why
        assert why in templates.describe(data, NAME)[1]
        (made / savefile.MANIFEST).write_bytes(manifest)
    assert templates.describe(data, NAME)[1] == ""
    assert_nothing_held(state_root)


@pytest.mark.usefixtures("made")
def test_what_it_shares_must_be_there(share: Path, data: Path, state_root: Path) -> None:
    away = share.with_name("away")
    os.rename(share, away)
    assert (
        f"{share}, which container c has at /share, is missing"
        in refused(data, state_root, NotFound, "restore-source").why
    )
    assert "is missing" in templates.describe(data, NAME)[1]
    os.rename(away, share)
    assert_nothing_held(state_root)


def test_its_guest_is_not_collected(made: Path, data: Path) -> None:
    manifest = msgspec.json.decode((made / savefile.MANIFEST).read_bytes(), type=savefile.Manifest)
    assert templates.guests(data) == {manifest.needs.guest}


def test_a_maker_that_is_killed_leaves_only_what_is_swept(data: Path, state_root: Path) -> None:
    program = f"""
import sys
import holdfast
from holdfast.machine.config import DEFAULT_MEMORY_BYTES
from holdfast.pod import templates
def stop_here(*arguments, copy=templates._copy):
    copy(*arguments)
    print("half", flush=True)
    sys.stdin.read()
templates._copy = stop_here
holdfast.Pod.open("p", root={str(state_root)!r}, data={str(data)!r}).make_template("half-made")
"""
    with holdfast.Pod("p", root=state_root, data=data):
        process = subprocess.Popen(python_program(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            assert process.stdout.readline() == b"half\n"
            process.kill()
            process.wait(DEADLINE_S)
    with pytest.raises(NotFound):
        templates.load(data, "half-made")
    assert [name for name, size in templates.sweep(data) if size] == ["half-made"]
    assert [path for path in templates.folder_of(data).iterdir() if "half-made" in path.name] == []


@pytest.mark.usefixtures("data")
def test_the_commands(made: Path, state_root: Path, data: Path) -> None:
    """Made, listed with its users, used, and removed while it is used: clones go on, and can be copied."""
    text("run", "-d", "--name", "web", BUSYBOX, "sh", "-c", "echo kept >/file; sleep 1000")
    text("exec", "web", "sh", "-c", "until [ -s /file ]; do :; done")
    if "cli-warm" in templates.names(data):
        templates.remove(data, "cli-warm")
    assert text("template", "build", "--from-pod", "web", "cli-warm") == "cli-warm\n"
    text("pod", "remove", "-f", "web")
    assert fails("template", "build", "--from-pod", "web", "cli-warm")["code"] == "pod-not-found"
    assert text("pod", "create", "one", "--template", "cli-warm") == "one\n"
    assert text("run", "--name", "two", "--template", "cli-warm", BUSYBOX, "echo", "hello") == "hello\n"
    assert text("exec", "one/web", "cat", "/file") == "kept\n"
    (listed,) = [one for one in answer("template", "list") if one["key"] == "cli-warm"]
    assert (listed["used_by"], listed["stale"]) == (["one"], "")
    assert "used by: one" in " ".join(text("template", "inspect", "cli-warm").split())
    assert fails("template", "remove", "cli-warm")["code"] == "template-in-use"
    assert text("template", "remove", "-f", "cli-warm") == "cli-warm\n"
    assert fails("pod", "create", "three", "--template", "cli-warm")["code"] == "template-not-found"
    assert answer("pod", "fork", "one", "--name", "fork") == ["fork"]
    for name in ("one", "fork"):
        assert text("exec", f"{name}/web", "cat", "/file") == "kept\n"
    text("pod", "remove", "-f", "one", "fork")
    assert answer("audit") == {"clean": True, "findings": []}
    assert templates.names(data) == [made.name]
    assert_nothing_held(state_root)


def test_one_with_an_image_has_its_layers_attached(data, state_root):
    name = "test-image"
    words = ("--root", str(state_root), "--data", str(data))
    assert text(*words, "template", "build", "--image", BUSYBOX, name) == f"{name}\n"
    try:
        with holdfast.Pod(template=name, root=state_root, data=data) as pod:
            before = [(one["slot"], one["kind"], *one["holders"]) for one in pod.storage()["attachments"]]
            assert {one[1:] for one in before} == {("layer", f"image:{BUSYBOX}")}
            assert output(pod.run(BUSYBOX, ["echo", "well"])) == "well\n"
            assert [(one["slot"], one["kind"], *one["holders"]) for one in pod.storage()["attachments"]] == before
        assert fails(*words, "template", "build", "--image", "missing", "other")["code"] == "image-not-found"
    finally:
        templates.remove(data, name)
    assert_nothing_held(state_root)
