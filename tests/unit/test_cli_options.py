"""The command line: what each command's record holds, and what is said of a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.cli import options as cli
from holdfast.errors import InvalidInput

SOURCES = Path(__file__).resolve().parents[2] / "src"


def parse(*argv: str, environ: dict[str, str] | None = None) -> cli.CommandLine:
    return cli.parse(argv, environ=environ or {}, cwd="/here")


def run(*argv: str, environ: dict[str, str] | None = None) -> cli.RunOptions:
    command = parse("run", *argv, environ=environ).command
    assert isinstance(command, cli.RunOptions)
    return command


def test_run_with_everything() -> None:
    assert run(
        "--name", "web", "--isolation", "namespace", "--template", "none", "--memory=1G", "--cpus", "2",
        "--mount", "type=disk,src=d.raw,dst=/d", "-v", "/s:/t:ro", "--mount", "type=tmpfs,dst=/x,notmpcopyup",
        "-e", "A=1", "--env", "B=", "-eC", "-e", "ABSENT", "-w", "/w", "-u", "me:us", "-itd", "--annotation", "k=v=w",
        "--scratch-size", "2g", "--read-only", "--entrypoint", "/init", "--hostname", "box", "--rm", "img", "arg",
        environ={"C": "own"},
    ) == cli.RunOptions(
        image="img", bundle=None, args=("arg",), name="web",
        sandbox=cli.SandboxOptions("namespace", "none", 1 << 30, 2),
        mounts=(
            {"destination": "/d", "type": "virtual-disk", "source": "/here/d.raw", "options": ["rw"]},
            {"destination": "/t", "type": "bind", "source": "/s", "options": ["rbind", "rprivate", "ro"]},
            {"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "nosuid", "nodev"]},
        ),
        env={"A": "1", "B": "", "C": "own"}, cwd="/w", user="me:us", hostname="box", entrypoint=("/init",),
        annotations={"k": "v=w"}, interactive=True, terminal=True, detach=True, read_only=True, scratch_bytes=2 << 30,
    )  # fmt: skip


def test_run_on_a_root_filesystem() -> None:
    assert run("--rootfs", "r", "ls", "-l") == cli.RunOptions(None, None, ("ls", "-l"), rootfs="/here/r")
    assert run("--rootfs=/r", "--", "-x") == cli.RunOptions(None, None, ("-x",), rootfs="/r")


def test_run_with_nothing() -> None:
    assert run("img") == cli.RunOptions(image="img", bundle=None)


def test_persistent_memory_and_devices() -> None:
    options = run("--pmem", "--device", "pci:0000:01:00.0", "--device", "pci:02:00.0/1", "--pci-ports", "img")
    assert options.sandbox == cli.SandboxOptions(pmem=True, ports=True)
    assert options.devices == ("0000:01:00.0", "02:00.0/1")
    count = "io.microsoft.virtualmachine.devices.virtualpmem.maximumcount"
    assert options.annotations == {count: "64"}
    assert run("--pmem", "--annotation", f"{count}=8", "img").annotations == {count: "8"}
    with pytest.raises(InvalidInput, match="no device of this host"):
        run("--device", "/dev/sda", "img")


def test_a_run_can_be_sent() -> None:
    options = run("-v", "/a:/b", "-e", "A=1", "img", "x")
    assert msgspec.json.decode(msgspec.json.encode(options), type=cli.RunOptions) == options


@pytest.mark.parametrize(
    ("argv", "image", "args"),
    [
        (["img", "--memory", "1", "-e", "--json", "--", "-x"], "img", ("--memory", "1", "-e", "--json", "--", "-x")),
        (["img", "--mem", "-ti", "--", "--pod"], "img", ("--mem", "-ti", "--", "--pod")),
        (["--", "img", "--", "x"], "img", ("--", "x")),
        (["-t", "img", "-t", "-h", "--help", "--version"], "img", ("-t", "-h", "--help", "--version")),
        (["img", "-1", ""], "img", ("-1", "")),
        (["--bundle", "b", "ls", "--bundle"], None, ("ls", "--bundle")),
        (["--bundle", "b", "--", "-x"], None, ("-x",)),
        (["--bundle=b"], None, ()),
    ],
)
def test_what_follows_the_image_is_the_containers(argv: list[str], image: str | None, args: tuple[str, ...]) -> None:
    options = run(*argv)
    assert (options.image, options.args) == (image, args)
    assert options.bundle == (None if image else "/here/b")


@given(st.lists(st.text(max_size=8) | st.sampled_from(["--", "-e", "--root", "--json", "-h", "run", "-", "--pod=x"])))
def test_any_words_may_follow_the_image(words: list[str]) -> None:
    assert run("-e", "A=1", "img", *words).args == tuple(words)
    executed = parse("exec", "-i", "pod/c", "true", *words).command
    assert isinstance(executed, cli.ExecOptions)
    assert executed.args == ("true", *words)


def test_environment_variables_are_overridden_in_order() -> None:
    assert run("-e", "A=1", "-e", "A", "-e", "B=2", "img", environ={"A": "own"}).env == {"A": "own", "B": "2"}
    assert run("-e", "A", "-e", "A=1", "img", environ={"A": "own"}).env == {"A": "1"}


@pytest.mark.parametrize(
    ("text", "entrypoint"), [("", ()), ("/a b", ("/a b",)), ('["/a", "b"]', ("/a", "b")), ("[]", ())]
)
def test_entrypoint(text: str, entrypoint: tuple[str, ...]) -> None:
    assert run("--entrypoint", text, "img").entrypoint == entrypoint


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ("plan --pod p img x", cli.PlanOptions(cli.RunOptions("img", None, ("x",), pod="p"))),
        ("ps", cli.PsOptions()),
        ("pod create p --memory 1G --annotation a=b", cli.PodCreateOptions(
            "p", cli.SandboxOptions(memory_bytes=1 << 30), {"a": "b"})),
        ("pod inspect p", cli.PodInspectOptions("p")),
        ("pod remove p q -f", cli.PodRemoveOptions(("p", "q"), True)),
        ("exec -it -u 0 -w /x p ls -l", cli.ExecOptions(
            "p", None, ("ls", "-l"), cwd="/x", user="0", interactive=True, terminal=True)),
        ("exec p/c -- ls", cli.ExecOptions("p", "c", ("ls",))),
        ("storage p", cli.StorageOptions("p")),
        ("attach p --mount type=disk,src=d", cli.AttachOptions(
            "p", ({"destination": "", "type": "virtual-disk", "source": "/here/d", "options": ["rw"]},))),
        ("attach p/c --mount type=disk,src=d,dst=/x,partition=2", cli.AttachOptions(
            "p", ({"destination": "/x", "type": "virtual-disk", "source": "/here/d",
                   "options": ["rw", "x-holdfast.partition=2"]},), "c")),
        ("detach p /run/x d", cli.DetachOptions("p", ("/run/x", "d"))),
        ("detach p/c /x", cli.DetachOptions("p", ("/x",), "c")),
        ("image import x.tar --name a/b:1", cli.ImageImportOptions("/here/x.tar", "a/b:1")),
        ("image pull docker.io/x", cli.ImagePullOptions("docker.io/x")),
        ("image pull docker.io/x --name y", cli.ImagePullOptions("docker.io/x", "y")),
        ("image list", cli.ImageListOptions()),
        ("image inspect x", cli.ImageInspectOptions("x")),
        ("image remove x y", cli.ImageRemoveOptions(("x", "y"))),
        ("guest build", cli.GuestBuildOptions()),
        ("guest inspect", cli.GuestInspectOptions()),
        ("template list", cli.TemplateListOptions()),
        ("template inspect t", cli.TemplateInspectOptions("t")),
        ("template remove t", cli.TemplateRemoveOptions(("t",))),
        ("template remove --force t u", cli.TemplateRemoveOptions(("t", "u"), force=True)),
        ("template remove --stale", cli.TemplateRemoveOptions((), stale=True)),
        ("template build", cli.TemplateBuildOptions()),
        ("pod fork p", cli.PodForkOptions("p")),
        ("pod fork p -n 3 --name a --name b", cli.PodForkOptions("p", 3, ("a", "b"))),
        ("pod fork p --name a --name b", cli.PodForkOptions("p", 2, ("a", "b"))),
        ("pod save p f --stop", cli.PodSaveOptions("p", "/here/f", stop=True)),
        ("pod restore /f", cli.PodRestoreOptions("/f")),
        ("pod restore f --name q", cli.PodRestoreOptions("/here/f", "q")),
        ("pod restore f --bundle b", cli.PodRestoreOptions("/here/f", bundles={"": "/here/b"})),
        ("pod restore f --bundle a=b --bundle c=/d=e --bundle ./f=g", cli.PodRestoreOptions(
            "/here/f", bundles={"a": "/here/b", "c": "/d=e", "": "/here/f=g"})),
        ("template build --from-pod p t", cli.TemplateBuildOptions(name="t", from_pod="p")),
        ("template build --memory 1G --cpus 2 --pmem", cli.TemplateBuildOptions(1 << 30, 2, pmem=True)),
        ("template build --pci-ports", cli.TemplateBuildOptions(ports=True)),
        ("audit", cli.AuditOptions()),
        ("gc", cli.GcOptions()),
        ("doctor", cli.DoctorOptions()),
    ],
)  # fmt: skip
def test_commands(argv: str, command: object) -> None:
    parsed = parse(*argv.split()).command
    assert type(parsed) is type(command)
    assert parsed == command


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["ps"], {}, ("/run/holdfast", "/var/lib/holdfast", False, False)),
        (["ps"], {"HOLDFAST_ROOT": "r", "HOLDFAST_DATA": ""}, ("/here/r", "/var/lib/holdfast", False, False)),
        (["--root", "/a", "--json", "ps"], {"HOLDFAST_ROOT": "r"}, ("/a", "/var/lib/holdfast", True, False)),
        (["--root", "/a", "ps", "--root=/b", "--json"], {}, ("/b", "/var/lib/holdfast", True, False)),
        (["--debug", "pod", "--data", "d", "inspect", "p", "--json"], {}, ("/run/holdfast", "/here/d", True, True)),
        (["run", "--json", "img", "--debug"], {}, ("/run/holdfast", "/var/lib/holdfast", True, False)),
    ],
)
def test_everywhere(argv: list[str], environ: dict[str, str], expected: tuple[Any, ...]) -> None:
    line = parse(*argv, environ=environ)
    assert (line.root, line.data, line.json, line.debug) == expected


BAD = [
    # words, code, subject, what the message says
    ("", "usage", "holdfast", "required: COMMAND"),
    ("rnu", "usage", "holdfast", "invalid choice: 'rnu'"),
    ("ps x", "usage", "holdfast ps", "what is 'x'?"),
    ("run", "usage", "holdfast run", "an image, or --bundle DIR, is needed"),
    ("run --", "usage", "holdfast run", "an image, or --bundle DIR, is needed"),
    ("run --foo img", "usage", "holdfast run", "unknown option --foo"),
    ("--foo ps", "usage", "holdfast ps", "unknown option --foo"),
    ("run --mem 1G img", "usage", "holdfast run", "unknown option --mem"),
    ("run --memory", "usage", "holdfast run", "--memory: expected one argument"),
    ("run --isolation none img", "usage", "holdfast run", "invalid choice: 'none'"),
    ("run --memory lots img", "size", "--memory", "'lots' is not a size"),
    ("run --memory= img", "size", "--memory", "'' is not a size"),
    ("run --scratch-size 0 img", "size", "--scratch-size", "is too small"),
    ("run --cpus 0 img", "usage", "holdfast run", "--cpus: '0'"),
    ("run --cpus 1.5 img", "usage", "holdfast run", "--cpus: '1.5'"),
    ("run --name ../x img", "usage", "holdfast run", "--name: '../x' is not a name"),
    ("run --name= img", "usage", "holdfast run", "--name: '' is not a name"),
    ("run --pod / img", "usage", "holdfast run", "--pod: '/' is not a name"),
    (f"run --name {'x' * 64} img", "usage", "holdfast run", "at most 63"),
    ("template remove", "usage", "holdfast template remove", "no template, and no --stale"),
    ("template remove --stale t", "usage", "holdfast template remove", "either templates, or --stale"),
    ("pod fork p -n 0", "usage", "holdfast pod fork", "-n: '0'"),
    ("pod fork p -n 1 --name a --name b", "usage", "holdfast pod fork", "2 names for 1 pods"),
    ("pod fork p --name a --name a", "usage", "holdfast pod fork", "two pods cannot have one name"),
    ("pod fork p --name ../a", "usage", "holdfast pod fork", "--name: '../a'"),
    ("pod save p", "usage", "holdfast pod save", "FILE"),
    ("pod restore f --bundle =b", "usage", "holdfast pod restore", "--bundle: '' is not a name"),
    ("pod restore f --bundle a=", "usage", "holdfast pod restore", "'a=' names no folder"),
    ("pod restore f --bundle=", "usage", "holdfast pod restore", "'' names no folder"),
    ("pod restore f --bundle a=b --bundle a=c", "usage", "holdfast pod restore", "--bundle: a can have one"),
    ("pod restore f --bundle b --bundle c", "usage", "holdfast pod restore", "the only container can have one"),
    ("template build t", "usage", "holdfast template build", "or has an --image, has a name"),
    ("template build --from-pod p", "usage", "holdfast template build", "needs a name"),
    ("template build --from-pod p t --cpus 2", "usage", "holdfast template build", "has the machine of that pod"),
    ("template build --cpus 0", "usage", "holdfast template build", "--cpus: '0'"),
    ("run --template a/b img", "usage", "holdfast run", "--template: 'a/b' is not a name"),
    ("run --pod p --memory 1G img", "usage", "holdfast run", "--memory is for a new pod"),
    ("run --pod p --isolation vm img", "usage", "holdfast run", "--isolation is for a new pod"),
    ("run --bundle b --entrypoint x", "usage", "holdfast run", "--entrypoint is for images"),
    ("run --rootfs r", "usage", "holdfast run", "what to run is not said"),
    ("run --rootfs r --bundle b", "usage", "holdfast run", "--bundle or --rootfs, not both"),
    ("run --rootfs r --entrypoint x y", "usage", "holdfast run", "--entrypoint is for images"),
    ("run --entrypoint [1] img", "usage", "holdfast run", "--entrypoint: not a JSON array"),
    ("run --entrypoint [ img", "usage", "holdfast run", "--entrypoint: not a JSON array"),
    ("run -e =x img", "usage", "holdfast run", "-e: expected NAME=VALUE or NAME, not '=x'"),
    ("run --annotation k img", "usage", "holdfast run", "--annotation: expected KEY=VALUE, not 'k'"),
    ("run --mount type=x,dst=/a img", "mount-option", "--mount type=x,dst=/a", "unknown type 'x'"),
    ("run -v a:b img", "mount-option", "-v a:b", "destination must be absolute"),
    ("plan", "usage", "holdfast plan", "an image, or --bundle DIR, is needed"),
    ("pod", "usage", "holdfast pod", "required: COMMAND"),
    ("pod create", "usage", "holdfast pod create", "required: POD"),
    ("pod remove .", "usage", "holdfast pod remove", "'.' is not a name"),
    ("exec", "usage", "holdfast exec", "required: POD[/CONTAINER]"),
    ("exec p", "usage", "holdfast exec", "no command (holdfast exec p COMMAND [ARG...])"),
    ("exec p/ ls", "usage", "holdfast exec", "CONTAINER: '' is not a name"),
    ("attach p", "usage", "holdfast attach", "nothing to attach"),
    ("attach p --mount type=tmpfs,dst=/x", "usage", "holdfast attach", "of type tmpfs cannot be added"),
    ("detach p", "usage", "holdfast detach", "required: PATH"),
    ("image import x", "usage", "holdfast image import", "required: --name"),
]


@pytest.mark.parametrize(("words", "code", "subject", "message"), BAD)
def test_bad_command_lines(words: str, code: str, subject: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(*words.split())
    assert (caught.value.code, caught.value.subject, caught.value.exit_status) == (code, subject, 125)
    assert message in str(caught.value)


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["image", "-h"], ["pod", "remove", "-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: holdfast")
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--version")
    assert capsys.readouterr().out.startswith("holdfast ")


def test_argparse_is_not_loaded_before_it_is_used() -> None:
    code = "import sys, holdfast.cli.options; print('argparse' in sys.modules)"
    path = [*(entry for entry in sys.path if entry), str(SOURCES)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"]
