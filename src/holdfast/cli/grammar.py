"""The words of the command line, for argparse: which there are, and what ``--help`` says of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from holdfast import __version__
from holdfast.cli.options import (
    AuditOptions,
    DoctorOptions,
    GcOptions,
    GuestBuildOptions,
    GuestInspectOptions,
    ImageImportOptions,
    ImageInspectOptions,
    ImageListOptions,
    ImagePullOptions,
    ImageRemoveOptions,
    PlanOptions,
    PodInspectOptions,
    PodRemoveOptions,
    PsOptions,
    StorageOptions,
    TemplateInspectOptions,
    TemplateListOptions,
    TemplateRemoveOptions,
    VolumeInspectOptions,
    VolumeListOptions,
    VolumeRemoveOptions,
)
from holdfast.cli.words import (
    Words,
    make_attach,
    make_detach,
    make_exec,
    make_pod_create,
    make_pod_fork,
    make_pod_restore,
    make_pod_save,
    make_pool,
    make_run,
    make_template_build,
    make_template_remove,
    make_volume_create,
    make_volume_grow,
    usage_error,
)
from holdfast.linux.places import default_data, default_state

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from msgspec import Struct


class Parser(argparse.ArgumentParser):
    """One that has the options for everywhere, and raises its errors."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]
        _add_everywhere(self)

    def error(self, message: str) -> None:  # type: ignore[override]
        """What argparse finds wrong is an error like any other."""
        raise usage_error(self.prog, message)


def make_parser(only: str = "") -> ArgumentParser:
    """The parser of the whole command line; ``make`` and ``prog`` of what it finds say how to go on.

    Args:
        only: the command that was given, if it is known: others are then not made, which takes 10 ms.
    """
    parser = Parser(prog="holdfast", description="OCI containers inside small virtual machines.")
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    verbs = _Verbs(parser)
    if only in ("run", "plan"):
        _add_run(verbs)
        return parser
    _add_run(verbs)
    _add_pods(verbs)
    _add_storage(verbs)
    _add_stores(verbs)
    _add_volumes(verbs)
    verbs.add("audit", "what is held, and by whom; fails if anything is held by nobody", lambda _: AuditOptions())
    verbs.add("gc", "let go of what is held by nobody", lambda _: GcOptions())
    verbs.add("doctor", "what this host can do, what is missing, and how to get it", lambda _: DoctorOptions())
    return parser


class _Verbs:
    """The commands of ``holdfast``, or of one of its groups."""

    def __init__(self, parser: ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def add(self, name: str, text: str, make: Callable[[Words], Struct], *, usage: str | None = None) -> ArgumentParser:
        parser = self._parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", usage=usage)
        parser.set_defaults(make=make, prog=parser.prog)
        return parser

    def group(self, name: str, text: str) -> _Verbs:
        return _Verbs(self._parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))


def _add_everywhere(parser: ArgumentParser) -> None:
    """Accepted before and after the command; without a default, so that the latter does not undo the former."""
    none = argparse.SUPPRESS
    group = parser.add_argument_group("everywhere")
    group.add_argument("--root", metavar="DIR", default=none, help=f"state ($HOLDFAST_ROOT, else {default_state()})")
    group.add_argument("--data", metavar="DIR", default=none, help=f"images ($HOLDFAST_DATA, else {default_data()})")
    group.add_argument("--json", action="store_true", default=none, help="print for programs, errors too")
    group.add_argument("--debug", action="store_true", default=none, help="say where an error comes from")


def _add_run(verbs: _Verbs) -> None:
    def make_plan(words: Words) -> PlanOptions:
        return PlanOptions(make_run(words))

    makers: tuple[tuple[str, str, Callable[[Words], Struct]], ...] = (
        ("run", "run a container, in a new pod if no other is named", make_run),
        ("plan", "print what run would do, and do nothing", make_plan),
    )
    for verb, text, make in makers:
        usage = (
            f"holdfast {verb} [OPTIONS] IMAGE [ARG...]\n       holdfast {verb} [OPTIONS] --bundle DIR [ARG...]\n"
            f"       holdfast {verb} [OPTIONS] --rootfs DIR PROGRAM [ARG...]"
        )
        parser = verbs.add(verb, text, make, usage=usage)
        parser.add_argument("rest", nargs="...", metavar="IMAGE [ARG...]", help="what follows IMAGE is the container's")
        option = parser.add_argument
        option("--bundle", metavar="DIR", help="run an OCI bundle instead of an image")
        option("--rootfs", metavar="DIR", help="run on a root filesystem of this host, which it writes to")
        option("--pod", metavar="POD", help="join this pod")
        option("--name", metavar="NAME", help="of the container")
        _add_sandbox(parser)
        _add_mounts(parser)
        _add_process(parser)
        option("-d", "--detach", action="store_true", help="do not wait for the end")
        option("--entrypoint", metavar="PROGRAM", help="in place of the image's; a JSON array for several words")
        option("--hostname", metavar="NAME", help="in the container")
        option("--read-only", action="store_true", help="the root filesystem is read-only")
        option("--scratch-size", metavar="SIZE", help="how much the container can write")
        option("--reuse-scratch", action="store_true", help="write to one scratch disk with others of the pod")
        option("--encrypt-scratch", action="store_true", help="encrypt what is written; the key stays in the machine")
        text = "assign a PCI function of this host (repeatable)"
        option("--device", action="append", default=[], metavar="pci:0000:BB:DD.F", help=text)
        option("--verity", action="store_true", help="check every block of the image when it is read")
        option("--annotation", action="append", default=[], metavar="K=V", help="of the container (repeatable)")
        option("--rm", action="store_true", help="accepted for podman's sake: a container is always removed")


def _add_sandbox(parser: ArgumentParser) -> None:
    parser.add_argument("--isolation", choices=("vm", "namespace"), help="virtual machine (default) or this kernel")
    parser.add_argument("--template", metavar="NAME", help="clone this one; none: boot")
    _add_machine(parser)
    text = "the pod gets no share of this host that it can write to"
    parser.add_argument("--no-writable-shares", action="store_true", default=None, help=text)


def _add_machine_size(parser: ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="SIZE", help="of the virtual machine (256M)")
    parser.add_argument("--cpus", metavar="N", help="of the virtual machine (1)")


def _add_machine(parser: ArgumentParser) -> None:
    _add_machine_size(parser)
    parser.add_argument("--pci-ports", action="store_true", help="with places for PCI devices")
    parser.add_argument("--pmem", action="store_true", help="layers go to persistent memory, if there is room")


def _add_mounts(parser: ArgumentParser) -> None:
    """Both options fill one list: the order in which they are given is kept."""

    def mount(text: str) -> tuple[str, str]:
        return "--mount", text

    def volume(text: str) -> tuple[str, str]:
        return "-v", text

    text = "type=bind|disk|physical-disk|tmpfs|volume|image,src=..,dst=..[,ro] (repeatable)"
    parser.add_argument("--mount", dest="mounts", type=mount, action="append", default=[], metavar="SPEC", help=text)
    text = "SRC:DST[:ro]: a folder or file of this host, or a volume's name (repeatable)"
    parser.add_argument("-v", "--volume", dest="mounts", type=volume, action="append", metavar="SPEC", help=text)


def _add_process(parser: ArgumentParser) -> None:
    text = "environment variable (repeatable); without =V, this process's own"
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K[=V]", help=text)
    parser.add_argument("-w", "--workdir", metavar="DIR", help="working folder in the container")
    parser.add_argument("-u", "--user", metavar="USER[:GROUP]", help="names or numbers")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    parser.add_argument("-t", "--tty", action="store_true", help="with a terminal")


def _add_pods(verbs: _Verbs) -> None:
    verbs.add("ps", "list pods and their containers", lambda _: PsOptions())
    pod = verbs.group("pod", "make, show, copy, save and remove pods")
    parser = pod.add("create", "make an empty pod", make_pod_create)
    parser.add_argument("pod", metavar="POD")
    _add_sandbox(parser)
    parser.add_argument("--annotation", action="append", default=[], metavar="K=V", help="of the pod (repeatable)")
    parser = pod.add("inspect", "all about a pod", lambda words: PodInspectOptions(words.name(words.found.pod, "POD")))
    parser.add_argument("pod", metavar="POD")
    parser = pod.add(
        "remove",
        "end pods and let go of what they hold",
        lambda words: PodRemoveOptions(words.names(words.found.pods, "POD"), words.found.force),
    )
    parser.add_argument("pods", nargs="+", metavar="POD")
    parser.add_argument("-f", "--force", action="store_true", help="even with containers that run")
    parser = pod.add("fork", "make new pods that go on from where a running one is", make_pod_fork)
    parser.add_argument("pod", metavar="POD")
    parser.add_argument("-n", dest="count", metavar="N", help="how many (1, or as many as there are names)")
    text = "of a new pod (repeatable); those that are missing are made up"
    parser.add_argument("--name", dest="names", action="append", default=[], metavar="NAME", help=text)
    parser = pod.add("save", "write a running pod to a file, to go on from later", make_pod_save)
    parser.add_argument("pod", metavar="POD")
    parser.add_argument("file", metavar="FILE", help="to make, or to replace")
    parser.add_argument("--stop", action="store_true", help="end the pod when it is saved")
    parser = pod.add("restore", "make a pod that goes on from where one was saved", make_pod_restore)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--name", metavar="NAME", help="of the new pod; else as it was called")
    text = "what a container must have been saved with: a specification with the same mounts (repeatable)"
    parser.add_argument("--bundle", dest="bundles", action="append", default=[], metavar="[CONTAINER=]DIR", help=text)
    usage = "holdfast exec [OPTIONS] POD[/CONTAINER] COMMAND [ARG...]"
    parser = verbs.add("exec", "run one more process in a container", make_exec, usage=usage)
    parser.add_argument("pod", metavar="POD[/CONTAINER]")
    parser.add_argument("rest", nargs="...", metavar="COMMAND [ARG...]")
    _add_process(parser)

    parser = verbs.add("pool", "keep pods ready, until it is interrupted", make_pool)
    parser.add_argument("--size", metavar="N", required=True, help="how many")
    _add_machine_size(parser)


def _add_storage(verbs: _Verbs) -> None:
    text = "every attachment, share and mount of a pod"
    parser = verbs.add("storage", text, lambda words: StorageOptions(words.name(words.found.pod, "POD")))
    parser.add_argument("pod", metavar="POD")
    text = "add storage to a running pod, or to a container in it, and print its path in the guest"
    parser = verbs.add("attach", text, make_attach)
    parser.add_argument("pod", metavar="POD[/CONTAINER]")
    _add_mounts(parser)
    parser = verbs.add("detach", "take storage from a running pod, or from a container in it", make_detach)
    parser.add_argument("pod", metavar="POD[/CONTAINER]")
    text = "in the guest, as attach printed it, or of this host; of the container, if one is named"
    parser.add_argument("targets", nargs="+", metavar="PATH", help=text)


def _add_stores(verbs: _Verbs) -> None:
    image = verbs.group("image", "import, pull, show and remove images")
    parser = image.add(
        "import",
        "take in an OCI layout or archive",
        lambda words: ImageImportOptions(words.path(words.found.path), words.found.name),
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--name", required=True, metavar="NAME", help="to call it by")
    parser = image.add(
        "pull", "fetch an image from a registry", lambda words: ImagePullOptions(words.found.image, words.found.name)
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--name", metavar="NAME", help="to call it by; else as it is called there")
    _add_listing(image, "image", ImageListOptions, ImageInspectOptions, ImageRemoveOptions)
    guest = verbs.group("guest", "the system that virtual machines run")
    guest.add("build", "build it, if it is not built", lambda _: GuestBuildOptions())
    guest.add("inspect", "what it is made of", lambda _: GuestInspectOptions())
    template = verbs.group("template", "saved pods that new ones are cloned from")
    parser = template.add("build", "build one ahead, for pods that ask for this machine", make_template_build)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one that is made --from-pod, or has an --image")
    parser.add_argument("--from-pod", metavar="POD", help="with what runs in this pod, to go on in each new one")
    text = "with its layers attached and mounted (repeatable)"
    parser.add_argument("--image", dest="images", action="append", default=[], metavar="IMAGE", help=text)
    _add_machine(parser)
    parser = _add_listing(
        template, "template", TemplateListOptions, TemplateInspectOptions, TemplateRemoveOptions, names="*"
    )
    parser.set_defaults(make=make_template_remove)
    parser.add_argument("--stale", action="store_true", help="all that no new pod would start from")
    parser.add_argument("-f", "--force", action="store_true", help="even those that pods run from; the pods go on")


def _add_volumes(verbs: _Verbs) -> None:
    volume = verbs.group("volume", "disks that pods mount by name, and that outlive them")
    parser = volume.add("create", "make an empty volume", make_volume_create)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--size", metavar="SIZE", help="how much can be written to it (10G)")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="for your own use (repeatable)")
    parser = volume.add("grow", "make a volume larger, while a pod writes to it, too", make_volume_grow)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--size", required=True, metavar="SIZE", help="the whole new size")

    parser = _add_listing(volume, "volume", VolumeListOptions, VolumeInspectOptions, VolumeRemoveOptions)
    parser.set_defaults(make=lambda words: VolumeRemoveOptions(tuple(words.found.names), words.found.force))
    parser.add_argument("-f", "--force", action="store_true", help="one that is not there is no error")


def _add_listing(
    verbs: _Verbs,
    noun: str,
    listing: Callable[[], Struct],
    inspect: Callable[[str], Struct],
    remove: Callable[[tuple[str, ...]], Struct],
    *,
    names: str = "+",
) -> ArgumentParser:
    verbs.add("list", f"list {noun}s", lambda _: listing())
    parser = verbs.add("inspect", f"all about one {noun}", lambda words: inspect(words.found.name))
    parser.add_argument("name", metavar=noun.upper())
    parser = verbs.add("remove", f"remove {noun}s that nothing uses", lambda words: remove(tuple(words.found.names)))
    parser.add_argument("names", nargs=names, metavar=noun.upper())
    return parser
