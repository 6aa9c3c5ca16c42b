"""What the words of the command line mean: those of one command, as argparse found them, made into its record.

Everything that can be wrong with the words alone is said here.  A mistake is an :class:`InvalidInput` like any
other, for the program's end and ``--json`` know errors of one tree only; argparse leaves the program by itself
for nothing but ``--help`` and ``--version``.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from holdfast.cli.options import (
    AttachOptions,
    DetachOptions,
    ExecOptions,
    PodCreateOptions,
    PodForkOptions,
    PodRestoreOptions,
    PodSaveOptions,
    PoolOptions,
    RunOptions,
    SandboxOptions,
    TemplateBuildOptions,
    TemplateRemoveOptions,
    VolumeCreateOptions,
    VolumeGrowOptions,
)
from holdfast.errors import InvalidInput
from holdfast.spec import pmem
from holdfast.spec.annotations import NO_WRITABLE_SHARES, flag
from holdfast.spec.mounts import parse_mount, parse_volume
from holdfast.spec.sizes import parse_size

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from holdfast.spec.runtime import JsonObject

#: Mount types, as in a spec, that can be added to a pod that runs.
ATTACHABLE = ("bind", "virtual-disk", "physical-disk", "volume")


class Words(Struct, frozen=True):
    """What argparse found, and what it is to be understood against."""

    found: Namespace
    prog: str
    environ: Mapping[str, str]
    cwd: str

    def wrong(self, why: str, hint: str = "") -> InvalidInput:
        return usage_error(self.prog, why, hint)

    def path(self, text: str) -> str:
        return os.path.normpath(os.path.join(self.cwd, text))

    def name(self, text: str, option: str) -> str:
        # The name becomes a folder's, whose socket's path must stay under 108 bytes (unix(7)).
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", text):
            raise self.wrong(f"{option}: {text!r} is not a name", "letters, digits, '_', '.' and '-', at most 63")
        return text

    def names(self, texts: Sequence[str], option: str) -> tuple[str, ...]:
        return tuple(self.name(text, option) for text in texts)

    def pairs(self, option: str, texts: Sequence[str]) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not (key and equals):
                raise self.wrong(f"{option}: expected KEY=VALUE, not {text!r}")
            pairs[key] = value
        return pairs

    def env(self) -> dict[str, str]:
        """``-e K=V``, and ``-e K`` for the caller's own value, if there is one (as podman has it)."""
        values: dict[str, str] = {}
        for text in self.found.env:
            name, equals, value = text.partition("=")
            if not name:
                raise self.wrong(f"-e: expected NAME=VALUE or NAME, not {text!r}")
            if equals or name in self.environ:
                values[name] = value if equals else self.environ[name]
        return values

    def mounts(self, *, destination_needed: bool = True) -> tuple[JsonObject, ...]:
        mounts = []
        for option, text in self.found.mounts:
            if option == "--mount":
                mounts.append(parse_mount(text, cwd=self.cwd, destination_needed=destination_needed))
            else:
                mounts.append(parse_volume(text, cwd=self.cwd))
        return tuple(mounts)

    def machine_size(self) -> tuple[int, int]:
        """``--memory`` in bytes, and ``--cpus``."""
        found, given = self.found, SandboxOptions()
        memory = parse_size(found.memory, subject="--memory") if found.memory is not None else given.memory_bytes
        cpus = str(given.cpus) if found.cpus is None else found.cpus
        return memory, self.positive("--cpus", cpus, "of virtual CPUs")

    def positive(self, option: str, text: str, what: str = "of pods") -> int:
        if not (text.isascii() and text.isdecimal() and int(text) > 0):
            raise self.wrong(f"{option}: {text!r} is not a number {what}, such as 2")
        return int(text)

    def sandbox(self) -> SandboxOptions:
        found, given = self.found, SandboxOptions()
        memory, cpus = self.machine_size()
        template = None if found.template is None else self.name(found.template, "--template")
        denied = found.no_writable_shares or flag(self.pairs("--annotation", found.annotation), NO_WRITABLE_SHARES)
        return SandboxOptions(
            found.isolation or given.isolation, template, memory, cpus, not denied, found.pmem, found.pci_ports
        )


def usage_error(prog: str, why: str, hint: str = "") -> InvalidInput:
    """What is wrong with the words; ``prog`` are those of the command itself."""
    return InvalidInput("read command line", subject=prog, why=why, hint=hint or f"see {prog} --help", code="usage")


def make_run(words: Words) -> RunOptions:
    found = words.found
    rest = _container_words(found.rest)
    bundle = None if found.bundle is None else words.path(found.bundle)
    rootfs = None if found.rootfs is None else words.path(found.rootfs)
    if bundle is not None and rootfs is not None:
        raise words.wrong("a bundle has a root filesystem: --bundle or --rootfs, not both")
    if not rest and rootfs is not None:
        raise words.wrong("what to run is not said: --rootfs DIR PROGRAM [ARG...]")
    if bundle is None and not rest:
        raise words.wrong("an image, or --bundle DIR, is needed")
    if (bundle is not None or rootfs is not None) and found.entrypoint is not None:
        raise words.wrong("--entrypoint is for images; the whole command may follow --bundle DIR, or --rootfs DIR")
    if found.pod is not None:
        for option in ("isolation", "template", "memory", "cpus", "no-writable-shares"):
            if getattr(found, option.replace("-", "_")) is not None:
                raise words.wrong(f"--{option} is for a new pod; the one of --pod is there already")
    image = None if bundle is not None or rootfs is not None else rest.pop(0)
    if image == "":
        raise words.wrong("the image's name is empty")
    scratch = None if found.scratch_size is None else parse_size(found.scratch_size, subject="--scratch-size")
    return RunOptions(
        image=image,
        bundle=bundle,
        args=tuple(rest),
        pod=None if found.pod is None else words.name(found.pod, "--pod"),
        name=None if found.name is None else words.name(found.name, "--name"),
        sandbox=words.sandbox(),
        mounts=words.mounts(),
        env=words.env(),
        cwd=found.workdir,
        user=found.user,
        hostname=found.hostname,
        entrypoint=_entrypoint(words),
        annotations=_annotations(words),
        interactive=found.interactive,
        terminal=found.tty,
        detach=found.detach,
        read_only=found.read_only,
        scratch_bytes=scratch,
        verity=found.verity,
        devices=tuple(_device(words, text) for text in found.device),
        encrypt_scratch=found.encrypt_scratch,
        reuse_scratch=found.reuse_scratch,
        rootfs=rootfs,
    )


def _device(words: Words, text: str) -> str:
    kind, _, address = text.partition(":")
    if kind != "pci" or not address:
        raise words.wrong(f"--device: {text!r} is no device of this host", "such as pci:0000:01:00.0; see lspci -D")
    return address


def _annotations(words: Words) -> dict[str, str]:
    """Of the container.  What its pod shall not have is said of it too: so the plan knows before there is a pod."""
    found = words.pairs("--annotation", words.found.annotation)
    if words.found.pmem:
        found = {pmem.COUNT: str(pmem.DEFAULT_DEVICES), **found}
    return found | {NO_WRITABLE_SHARES: "true"} if words.found.no_writable_shares else found


def _container_words(rest: Sequence[str]) -> list[str]:
    """The words after our own options; one ``--`` before them only says that ours have ended."""
    return list(rest[1:] if rest[:1] == ["--"] else rest)


def _entrypoint(words: Words) -> tuple[str, ...] | None:
    """One program, or a JSON array of it and its first arguments; empty for none."""
    text: str | None = words.found.entrypoint
    if text is None or not text.startswith("["):
        return text if text is None else (text,) if text else ()
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.DecodeError as error:
        raise words.wrong(f"--entrypoint: not a JSON array of texts: {error}") from None


def make_template_build(words: Words) -> TemplateBuildOptions:
    found = words.found
    if found.from_pod is None and not found.images:
        if found.name is not None:
            raise words.wrong("only a template that is made --from-pod, or has an --image, has a name")
        return TemplateBuildOptions(*words.machine_size(), found.pmem, found.pci_ports)
    if found.name is None:
        raise words.wrong("a template that is made --from-pod, or has an --image, needs a name")
    if found.images:
        if found.from_pod is not None or found.pmem or found.pci_ports:
            raise words.wrong("a template that has an --image is of a plain pod of its own")
        name, images = words.name(found.name, "NAME"), tuple(found.images)
        return TemplateBuildOptions(*words.machine_size(), name=name, images=images)
    if found.memory is not None or found.cpus is not None or found.pmem or found.pci_ports:
        raise words.wrong("a template that is made --from-pod has the machine of that pod")
    return TemplateBuildOptions(name=words.name(found.name, "NAME"), from_pod=words.name(found.from_pod, "--from-pod"))


def make_template_remove(words: Words) -> TemplateRemoveOptions:
    names, stale = tuple(words.found.names), words.found.stale
    if bool(names) == stale:
        raise words.wrong("either templates, or --stale" if names else "no template, and no --stale")
    return TemplateRemoveOptions(names, stale, words.found.force)


def make_exec(words: Words) -> ExecOptions:
    found = words.found
    pod, slash, container = found.pod.partition("/")
    args = _container_words(found.rest)
    if not args:
        raise words.wrong("no command", f"holdfast exec {found.pod} COMMAND [ARG...]")
    return ExecOptions(
        pod=words.name(pod, "POD"),
        container=words.name(container, "CONTAINER") if slash else None,
        args=tuple(args),
        env=words.env(),
        cwd=found.workdir,
        user=found.user,
        interactive=found.interactive,
        terminal=found.tty,
    )


def make_pod_create(words: Words) -> PodCreateOptions:
    pod = words.name(words.found.pod, "POD")
    return PodCreateOptions(pod, words.sandbox(), words.pairs("--annotation", words.found.annotation))


def make_pod_fork(words: Words) -> PodForkOptions:
    pod, names = words.name(words.found.pod, "POD"), words.names(words.found.names, "--name")
    count = max(1, len(names)) if words.found.count is None else words.positive("-n", words.found.count)
    if len(names) > count:
        raise words.wrong(f"{len(names)} names for {count} pods")
    if len(set(names)) < len(names):
        raise words.wrong("--name: two pods cannot have one name")
    return PodForkOptions(pod, count, names)


def make_pool(words: Words) -> PoolOptions:
    return PoolOptions(words.positive("--size", words.found.size), *words.machine_size())


def make_pod_save(words: Words) -> PodSaveOptions:
    return PodSaveOptions(words.name(words.found.pod, "POD"), words.path(words.found.file), words.found.stop)


def make_pod_restore(words: Words) -> PodRestoreOptions:
    name = None if words.found.name is None else words.name(words.found.name, "--name")
    return PodRestoreOptions(words.path(words.found.file), name, _bundles(words))


def _bundles(words: Words) -> dict[str, str]:
    """By container; what has a slash before its first ``=`` is a path alone."""
    found: dict[str, str] = {}
    for text in words.found.bundles:
        before, equals, after = text.partition("=")
        container, folder = (words.name(before, "--bundle"), after) if equals and "/" not in before else ("", text)
        if not folder:
            raise words.wrong(f"--bundle: {text!r} names no folder")
        if container in found:
            raise words.wrong(f"--bundle: {container or 'the only container'} can have one")
        found[container] = words.path(folder)
    return found


def make_volume_create(words: Words) -> VolumeCreateOptions:
    found = words.found
    size = None if found.size is None else parse_size(found.size, subject="--size")
    return VolumeCreateOptions(found.name, size, words.pairs("--label", found.label))


def make_volume_grow(words: Words) -> VolumeGrowOptions:
    return VolumeGrowOptions(words.found.name, parse_size(words.found.size, subject="--size"))


def make_attach(words: Words) -> AttachOptions:
    pod, slash, container = words.found.pod.partition("/")
    mounts = words.mounts(destination_needed=bool(slash))
    if not mounts:
        raise words.wrong("nothing to attach: no --mount and no -v")
    for mount in mounts:
        if mount["type"] not in ATTACHABLE:
            why = f"a mount of type {mount['type']} cannot be added to a running pod"
            raise words.wrong(why, "bind, disk, physical-disk and volume can")
    return AttachOptions(words.name(pod, "POD"), mounts, words.name(container, "CONTAINER") if slash else None)


def make_detach(words: Words) -> DetachOptions:
    pod, slash, container = words.found.pod.partition("/")
    name = words.name(container, "CONTAINER") if slash else None
    return DetachOptions(words.name(pod, "POD"), tuple(words.found.targets), name)
