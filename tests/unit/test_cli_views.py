"""What the commands show of images, guests and storage, without any pod."""

from __future__ import annotations

import json
import re
import sys

import pytest

from holdfast.cli import images, storage, templates
from holdfast.cli import output as shown
from holdfast.cli.main import main
from holdfast.cli.output import Output
from holdfast.errors import InvalidInput, NotFound
from holdfast.image.records import Progress
from holdfast.storage.journal import Journal
from tests.image_archives import Layout, entry, tar

STORAGE = {
    "pod": "web",
    "free_slots": 254,
    "volumes": [
        {"volume": "/cache", "type": "tmpfs", "options": ["size=1m"], "holders": ["a"], "guest_paths": ["/run/v0"]},
        {"volume": "/data", "type": "sandbox", "options": [], "holders": [], "guest_paths": []},
    ],
    "attachments": [
        {
            "slot": "0:0", "file": f"/d/layers/{'ab' * 32}.erofs", "kind": "layer", "format": "raw", "read_only": True,
            "size_bytes": 4096, "holders": ["a", "b"], "guest_paths": ["/run/m0"],
        },
        {
            "slot": "0:1", "file": "/x\x1b[31m.qcow2", "kind": "disk", "format": "qcow2", "read_only": False,
            "size_bytes": 1 << 30, "holders": ["attach:1"], "guest_paths": ["/run/m1", "/run/m2"],
            "container_paths": [], "read_bytes": 2 << 20, "written_bytes": 0,
        },
    ],
    "shares": [
        {
            "share": 3, "path": "/srv", "kind": "directory", "read_only": True, "holders": ["a"],
            "guest_path": "/run/s3", "container_paths": ["a:/data"],
        },
    ],
}  # fmt: skip


def test_storage_for_a_pipe():
    assert storage.rows(STORAGE)[1:] == [
        ("0:1", "disk (qcow2)", "rw", "1 GiB", "/x\x1b[31m.qcow2", "attach:1", "/run/m1, /run/m2", "", "2 MiB", "0 B"),
        ("9p", "directory", "ro", "", "/srv", "a", "/run/s3", "a:/data", "", ""),
        ("pod", "tmpfs volume", "rw", "1m", "/cache", "a", "/run/v0", "", "", ""),
        ("pod", "sandbox volume", "rw", "", "/data", "", "", "", "", ""),
    ]


def test_storage_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    storage._tree(STORAGE, Output())
    out = capsys.readouterr().out
    assert [line.strip("│├└─ ") for line in out.splitlines()] == [
        "web",
        "disks (254 SCSI slots free)",
        "0:0  /d/layers/abababababab….erofs  ro  layer  4 KiB",
        "a, b at /run/m0",
        "0:1  /x\\x1b[31m.qcow2  rw  disk (qcow2)  1 GiB",
        "attach:1 at /run/m1 /run/m2",
        "shares (1, over 9p)",
        "3  /srv  ro  directory",
        "a at /run/s3",
        "a:/data",
        "volumes of the pod",
        "/cache  tmpfs  size=1m",
        "a at /run/v0",
        "/data  sandbox",
        "nobody at",
    ]


@pytest.mark.parametrize(
    ("target", "path"), [("/run/m2", "/run/m2"), ("/srv", "/run/s3"), ("/srv/", "/run/s3"), ("/run/../srv", "/run/s3")]
)
def test_what_to_detach_is_named_by_either_side(target, path):
    assert storage._resolve(target, STORAGE) == path


def test_what_was_attached_by_request_is_detached_before_what_a_container_holds():
    again = {**STORAGE["shares"][0], "holders": ["attach:2"], "guest_path": "/run/s4"}
    assert storage._resolve("/srv", {**STORAGE, "shares": [*STORAGE["shares"], again]}) == "/run/s4"


def test_what_is_not_there_cannot_be_detached():
    with pytest.raises(NotFound, match="the pod has nothing of it"):
        storage._resolve("/nothing", STORAGE)


# -- images -----------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    layout = Layout(tmp_path / "layout")
    layout.image(tar(entry("a", data=b"first")))
    return tmp_path / "layout"


def test_images(archive, tmp_path, capsys):
    where = ("--data", str(tmp_path / "data"))
    assert main(["image", "list", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["image", "import", str(archive), "--name", "x", *where]) == 0
    out, err = capsys.readouterr()
    assert out == "x: 1 layer, 8 KiB\n"
    assert err.startswith("holdfast: layer ")
    assert ": done (" in err
    assert main(["image", "import", str(archive), "--name", "x", *where]) == 0
    assert ": already there (" in capsys.readouterr().err
    assert main(["image", "list", *where]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "x"
    assert main(["image", "inspect", "x", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == 8192
    assert main(["image", "inspect", "x", *where]) == 0
    assert "platform:    linux/" in capsys.readouterr().out
    assert main(["image", "remove", "nothing", "x", *where, "--json"]) == 125
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "image-not-found"
    assert list((tmp_path / "data" / "layers").glob("*.erofs")) == [], "x was removed all the same"


def test_layers_of_pods_are_kept(state_root):
    assert images.disks_in_use(state_root) == []
    with Journal(state_root) as journal:
        journal.intend("p", "attachment", "/layers/a.erofs")
        journal.intend("p", "share", "/srv")
    assert images.disks_in_use(state_root) == ["/layers/a.erofs"]


def test_progress_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(shown, "_is_terminal", lambda _stream: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with images.progress(Output()) as tell:
        for kind, done in (("read", 5), ("disk", 10), ("done", 10)):
            tell(Progress(kind, "sha256:" + "c" * 64, done, 10))
    out, err = capsys.readouterr()
    assert out == ""
    assert "layer cccccccccccc" in err
    assert "done" in err


# -- guests and templates ---------------------------------------------------------------------------


def test_there_is_no_guest_yet(tmp_path, capsys):
    assert main(["guest", "inspect", "--data", str(tmp_path), "--json"]) == 125
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "holdfast guest build"


def test_templates(tmp_path, capsys):
    where = ("--data", str(tmp_path))
    assert main(["template", "list", *where]) == 0
    columns = ["TEMPLATE", "MACHINE", "MEMORY", "CPUS", "ON DISK", "STATE", "USED BY"]
    assert re.split(r" {2,}", capsys.readouterr().out.strip()) == columns
    for key in ("abc1", "abd2"):
        (tmp_path / "templates" / key).mkdir(parents=True)
    (tmp_path / "templates" / ".abc1.lock").touch()
    assert templates.find_key(tmp_path, "abc") == "abc1"
    with pytest.raises(InvalidInput, match="abc1, abd2"):
        templates.find_key(tmp_path, "ab")
    for name in ("", "x", ".abc"):
        with pytest.raises(NotFound):
            templates.find_key(tmp_path, name)
    assert main(["template", "remove", "abd", "x", *where]) == 125, (
        "nothing is done if something is wrong with the line"
    )
    capsys.readouterr()
    assert main(["template", "list", "--json", *where]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["key"], one["stale"], one["used_by"]) for one in listed] == [
        ("abc1", "it has no record", []), ("abd2", "it has no record", []),
    ]  # fmt: skip
    assert main(["template", "remove", "abd", *where]) == 0
    assert capsys.readouterr().out == "abd2\n"
    assert sorted(path.name for path in (tmp_path / "templates").iterdir()) == [".abc1.lock", "abc1"]
    assert main(["template", "remove", "--stale", *where]) == 0
    assert list((tmp_path / "templates").iterdir()) == []
