"""Specs for images: command, environment, user and folder as podman combines them."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from holdfast.errors import InvalidInput
from holdfast.spec.checks import check
from holdfast.spec.default import PATH, ContainerSpec, customise, spec_for_image
from holdfast.spec.runtime import spec_from_raw


class Config(msgspec.Struct, frozen=True):
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ("sh",)
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""


def make(config: Config | None = None, **options: Any) -> ContainerSpec:
    made = spec_for_image(config or Config(), **options)
    check(spec_from_raw(made.raw))
    return made


def test_the_least() -> None:
    made = make()
    process = made.raw["process"]
    assert made.user is None
    assert process["args"] == ["sh"]
    assert process["env"] == [f"PATH={PATH}"]
    assert process["cwd"] == "/"
    assert (process["user"]["uid"], process["user"]["gid"], process["terminal"]) == (0, 0, False)
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}
    assert {entry["type"] for entry in made.raw["linux"]["namespaces"]} >= {"network", "cgroup"}
    assert [mount["destination"] for mount in made.raw["mounts"]] == [
        "/proc", "/dev", "/sys", "/dev/pts", "/dev/mqueue", "/dev/shm", "/sys/fs/cgroup",
    ]  # fmt: skip
    assert "hostname" not in made.raw


def test_specs_share_nothing() -> None:
    one, other = make(), make()
    one.raw["mounts"][0]["options"].append("x")
    one.raw["linux"]["namespaces"].clear()
    assert other == make()


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "given_entrypoint", "args", "command"),
    [
        ((), ("sh",), None, (), ["sh"]),
        ((), ("sh",), None, ("ls", "-l"), ["ls", "-l"]),
        (("/run",), ("a",), None, (), ["/run", "a"]),
        (("/run",), ("a",), None, ("b",), ["/run", "b"]),
        (("/run",), ("a",), ("/other", "-x"), (), ["/other", "-x"]),
        (("/run",), ("a",), ("/other",), ("b",), ["/other", "b"]),
        (("/run",), ("a",), (), ("b",), ["b"]),
    ],
)
def test_command(entrypoint: Any, cmd: Any, given_entrypoint: Any, args: Any, command: list[str]) -> None:
    config = Config(entrypoint=entrypoint, cmd=cmd)
    assert make(config, entrypoint=given_entrypoint, args=args).raw["process"]["args"] == command


@pytest.mark.parametrize(("config", "entrypoint"), [(Config(cmd=()), None), (Config(entrypoint=("x",)), ())])
def test_no_command(config: Config, entrypoint: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        make(config, entrypoint=entrypoint)
    assert caught.value.code == "no-command"


def test_environment() -> None:
    config = Config(env=("PATH=/x", "A=1", "A=2", "B=b=c", "bare", "=lost"))
    env = make(config, env={"B": "", "C": "3"}, hostname="box", terminal=True).raw["process"]["env"]
    assert env == ["PATH=/x", "A=2", "B=", "bare=", "HOSTNAME=box", "TERM=xterm", "C=3"]
    env = make(Config(env=("TERM=vt100",)), env={"HOSTNAME": "mine"}, hostname="box", terminal=True).raw["process"][
        "env"
    ]
    assert env == [f"PATH={PATH}", "TERM=vt100", "HOSTNAME=mine"]


def test_folder_hostname_annotations_read_only() -> None:
    made = make(
        Config(working_dir="srv/./x", stop_signal="SIGINT"), hostname="box", annotations={"k": "v"}, read_only=True
    ).raw
    assert (made["process"]["cwd"], made["hostname"]) == ("/srv/x", "box")
    assert made["annotations"] == {"org.opencontainers.image.stopSignal": "SIGINT", "k": "v"}
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert [mount["destination"] for mount in made["mounts"]][-3:] == ["/run", "/tmp", "/var/tmp"]
    assert make(Config(working_dir="/x"), cwd="/y/").raw["process"]["cwd"] == "/y"
    with pytest.raises(InvalidInput) as caught:
        make(cwd="y")
    assert (caught.value.code, caught.value.subject) == ("cwd-not-absolute", "y")


@pytest.mark.parametrize(
    ("image_user", "given_user", "numbers", "unresolved"),
    [
        ("", None, (0, 0), None),
        ("", "", (0, 0), None),
        ("1000:100", None, (1000, 100), None),
        ("1000:100", "0:0", (0, 0), None),
        ("root", None, (0, 0), "root"),
        ("postgres", None, (0, 0), "postgres"),
        ("postgres", "7:8", (7, 8), None),
        ("0", None, (0, 0), None),
        ("1000", None, (1000, 0), "1000"),
        ("1000:staff", None, (1000, 0), "1000:staff"),
        ("nobody:5", None, (0, 5), "nobody:5"),
        (":5", None, (0, 5), None),
        (":staff", None, (0, 0), "0:staff"),
        ("4294967294:0", None, (4294967294, 0), None),
    ],
)
def test_user(image_user: str, given_user: str | None, numbers: tuple[int, int], unresolved: str | None) -> None:
    made = make(Config(user=image_user), user=given_user)
    assert (made.raw["process"]["user"]["uid"], made.raw["process"]["user"]["gid"]) == numbers
    assert made.user == unresolved


@pytest.mark.parametrize("user", ["a:b:c", "a:", ":", "4294967295", "1:4294967295", "a b", "a\0"])
def test_bad_users(user: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make(user=user)
    assert (caught.value.code, caught.value.subject) == ("user", user)


BUNDLE = {
    "ociVersion": "1.0.0",
    "process": {
        "args": ["sh"],
        "cwd": "/x",
        "env": ["A=1"],
        "terminal": True,
        "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
        "unknown": 1,
    },
    "root": {"path": "rootfs"},
    "mounts": None,
}


def test_a_bundle_is_customised_in_a_copy() -> None:
    before = copy.deepcopy(BUNDLE)
    assert customise(BUNDLE) == ContainerSpec(BUNDLE, None)
    made = customise(
        BUNDLE, args=["ls"], env={"A": "2", "B": "3"}, cwd="/y", user="web", annotations={"k": "v"}, read_only=True
    )
    assert before == BUNDLE
    assert made.user == "web"
    assert made.raw == {
        "ociVersion": "1.0.0",
        "process": {
            "args": ["ls"],
            "cwd": "/y",
            "env": ["A=2", "B=3"],
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "unknown": 1,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": None,
        "annotations": {"k": "v"},
    }


def test_a_bundle_without_a_process_gets_one() -> None:
    made = customise({"ociVersion": "1.0.0", "root": {"path": "r"}}, args=["ls"])
    check(spec_from_raw(made.raw))
    assert made.raw["process"] == {"cwd": "/", "args": ["ls"], "env": []}
