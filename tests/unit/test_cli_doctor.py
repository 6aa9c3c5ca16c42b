"""``doctor`` on hosts that lack things."""

from __future__ import annotations

import json
import os

import pytest

from holdfast.cli import doctor as module
from holdfast.cli.main import main
from holdfast.errors import NotFound
from holdfast.machine import accelerator


def examine(tmp_path, **host):
    checks = module.examine(tmp_path / "root", tmp_path / "data", module.Host(**host))
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    return {check.name: check for check in checks}


def test_this_host(tmp_path):
    found = examine(tmp_path)
    assert found["qemu"].state == found["guest kernel"].state == found["crun"].state == "ok"
    assert found["guest image"].fix == "holdfast guest build"
    assert os.listdir(tmp_path) == [], "a look makes nothing"


def test_pci_devices(tmp_path):
    groups, vfio = tmp_path / "groups", tmp_path / "vfio-pci"
    places = {"iommu_groups": str(groups), "vfio": str(vfio)}
    assert "no IOMMU" in examine(tmp_path, **places)["PCI devices"].what
    (groups / "0").mkdir(parents=True)
    assert examine(tmp_path, **places)["PCI devices"].fix == "modprobe vfio-pci"
    (vfio / "0000:01:00.0").mkdir(parents=True)
    assert examine(tmp_path, **places)["PCI devices"].what == "1 IOMMU groups; vfio-pci has 0000:01:00.0"


def test_a_host_without_anything(tmp_path, monkeypatch):
    def no_qemu():
        raise NotFound("find QEMU", subject="/usr/bin/qemu", why="not there", hint="apt install qemu-system-x86")

    monkeypatch.setattr(accelerator, "qemu_version", no_qemu)
    monkeypatch.delenv("HOLDFAST_ACCELERATOR", raising=False)
    nothing = tmp_path / "nothing"
    found = examine(tmp_path, path="", boot=nothing, modules=nothing, kvm=str(nothing), cgroup=str(nothing))
    assert found["crun"] == module.Check(
        "crun", "missing", "not installed; runs containers in the guest", "apt install crun"
    )
    assert found["skopeo"].state == "warn"
    assert (found["qemu"].state, found["qemu"].fix) == ("missing", "apt install qemu-system-x86")
    assert found["guest kernel"].state == "missing"
    assert "linux-image" in found["guest kernel"].fix
    assert found["accelerator"].state == "warn"


def test_the_remembered_verdict_is_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("HOLDFAST_ACCELERATOR", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    host = accelerator.host_identity(accelerator.qemu_version())
    record = {"accelerator": "tcg", "why": "a guest does not boot", "host": host}
    (data / "accelerator.json").write_text(json.dumps(record))
    found = examine(tmp_path)["accelerator"]
    assert (found.state, found.what) == ("warn", "TCG: a guest does not boot")
    record |= {"accelerator": "kvm", "why": "a guest boots with it"}
    (data / "accelerator.json").write_text(json.dumps(record))
    assert examine(tmp_path)["accelerator"].state == "ok"


def test_a_dynamic_busybox_does_not_do(tmp_path):
    (tmp_path / "busybox").symlink_to("/bin/sh")
    found = examine(tmp_path, path=str(tmp_path))["busybox"]
    assert (found.state, found.fix) == ("missing", "apt install busybox-static")


@pytest.mark.parametrize("name", ["root", "data"])
def test_a_file_in_place_of_a_folder(tmp_path, name):
    (tmp_path / name).touch()
    found = examine(tmp_path)[{"root": "state root", "data": "data folder"}[name]]
    assert found.state == "missing"
    assert "not a folder" in found.what


def test_a_filesystem_without_unnamed_files(tmp_path):
    check = module._unnamed_files(module.Path("/proc"))
    assert (check.state, "O_TMPFILE" in check.what) == ("missing", True)


def test_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOW_SPACE_BYTES", 1 << 62)
    assert examine(tmp_path)["free space"].state == "warn"


def test_status_and_words(tmp_path, capsys, monkeypatch):
    checks = [module.Check("a", "ok", "well"), module.Check("bbb", "missing", "not\nthere", "get it")]
    monkeypatch.setattr(module, "examine", lambda *_: checks)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "ok      a   well\nmissing bbb not there\n            fix: get it\n"
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False
    monkeypatch.setattr(module, "examine", lambda *_: checks[:1])
    assert main(["doctor"]) == 0
