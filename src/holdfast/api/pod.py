"""A pod, and all that can be asked of it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.api.monitor import Monitor, go_on, start
from holdfast.api.places import data_folder, state_root
from holdfast.api.process import Result, complete, stdio_for
from holdfast.machine.config import DEFAULT_MEMORY_BYTES
from holdfast.pod.client import Client
from holdfast.pod.launch import check_new
from holdfast.pod.messages import ContainerRequest, ExecRequest, PodInfo, PodRequest, Stdio
from holdfast.pod.requests import container_request
from holdfast.pod.snapshot import Snapshot
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.spec.mounts import parse_mount
from holdfast.spec.pmem import DEFAULT_DEVICES, PmemLimits, check_limits
from holdfast.spec.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

#: Copying a disk of the user's may take as long as this.
_FREEZE_SECONDS = 3600.0
#: Characters of a pod's name that the names of its forks begin with.
_STEM = 32


class Pod:
    """A pod: a sandbox and the containers in it.  Ends with its ``with``, or by :meth:`remove`.

    Args:
        name: of the pod; made up if not given.
        isolation: ``"vm"``, or ``"namespace"`` for containers on the host's own kernel: nothing of a machine can be
            asked for then, and one never takes the place of the other.
        memory: guest RAM, as bytes or text such as ``"256M"``.
        cpus: virtual processors.
        template: name of one that :meth:`make_template` made: the pod goes on from there, its machine is that one's;
            ``"none"`` boots a machine of its own instead of starting from the saved one.
        writable_shares: whether containers may get shares of the host that they can write to.
        pmem: how much persistent memory containers may have their layers in, if they ask for it; True is the default.
        ports: with places for assigned devices.
        root, data: the state root and the data folder.
        say: called with each line about slow work, such as the first boot.
        detached: the pod outlives this object and this process.

    Raises:
        HoldfastError: the pod could not be started; nothing of it is left.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        memory: int | str = DEFAULT_MEMORY_BYTES,
        cpus: int = 1,
        isolation: str = "vm",
        template: str | None = None,
        root: str | Path | None = None,
        data: str | Path | None = None,
        say: Callable[[str], None] | None = None,
        detached: bool = False,
        writable_shares: bool = True,
        pmem: PmemLimits | bool = False,
        ports: bool = False,
    ) -> None:
        self.name = name or f"pod-{secrets.token_hex(4)}"
        self.root = state_root(root)
        self.data = data_folder(data)
        memory_bytes = parse_size(memory) if isinstance(memory, str) else memory
        request = PodRequest(
            self.name, str(self.root), str(self.data), isolation, memory_bytes, cpus, not detached, template == "none",
            writable_shares, _pmem_limits(pmem), ports,
        )  # fmt: skip
        self._monitor = Monitor(self.name, self.root, start(request, template), detached=detached)
        self._client.on_say = say or (lambda _text: None)
        self._monitor.wait_for_start()

    @classmethod
    def _of(cls, monitor: Monitor, data: Path) -> Pod:
        pod = cls.__new__(cls)
        pod.name, pod.root, pod.data, pod._monitor = monitor.name, monitor.root, data, monitor
        return pod

    @classmethod
    def _launch(cls, name: str, snapshot: Snapshot, root: Path, data: Path, *, detached: bool) -> Pod:
        """A pod that goes on from a snapshot, before it has started."""
        client = go_on(name, snapshot, root, data, detached=detached)
        return cls._of(Monitor(name, root, client, detached=detached), data)

    @classmethod
    def open(cls, name: str, *, root: str | Path | None = None, data: str | Path | None = None) -> Pod:
        """A pod that runs already.

        Raises:
            NotFound: there is none of that name.
        """
        root_path, data_path = state_root(root), data_folder(data)
        monitor = Monitor(name, root_path, Client.connect(root_path, name), detached=True)
        return cls._of(monitor, data_path)

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _client(self) -> Client:
        return self._monitor.client

    # -- processes ----------------------------------------------------------------------------

    def run(
        self,
        image: str = "",
        args: Sequence[str] = (),
        *,
        name: str | None = None,
        bundle: str | Path | None = None,
        rootfs: str | Path | None = None,
        mounts: Iterable[str | dict[str, Any]] = (),
        stdin: bytes | None = None,
        detach: bool = False,
        ends_pod: bool = False,
        **options: Any,
    ) -> Result:
        """Runs a container to its end (or starts it, with ``detach``) and returns what it left.

        Args:
            image: name of an imported image; or give ``bundle``, or ``rootfs`` and ``args``.
            args: the command; empty for the image's own.
            mounts: as ``--mount`` takes them, or runtime-spec objects.
            stdin: bytes for its standard input.
            ends_pod: the pod is closed right after, so nothing needs to be released before.
            options: ``env``, ``cwd``, ``user``, ``hostname``, ``entrypoint``, ``annotations``, ``read_only``,
                ``scratch_bytes``, ``verity``, ``encrypt_scratch``, ``reuse_scratch``, as the command line has them.

        Raises:
            HoldfastError: it could not be run; the container's own failure is its status.
        """
        stdio = Stdio(detach=True) if detach else stdio_for(stdin)
        request = container_request(
            name or f"c-{secrets.token_hex(4)}", self.data, image=image, bundle=bundle, rootfs=rootfs, args=args,
            mounts=mounts, stdio=stdio, **options,
        )  # fmt: skip
        return self._complete("run", msgspec.structs.replace(request, ends_pod=ends_pod), stdin, detach)

    def exec(
        self, container: str, args: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None,
        cwd: str = "", user: str = "",
    ) -> Result:  # fmt: skip
        """Runs a process in a running container and returns what it left.

        Raises:
            NotFound: the container does not run.
        """
        variables = tuple(f"{name}={value}" for name, value in (env or {}).items())
        request = ExecRequest(container, tuple(args), variables, cwd, user, False, stdio_for(stdin))
        return self._complete("exec", request, stdin, False)

    def _complete(self, method: str, request: msgspec.Struct, stdin: bytes | None, detach: bool) -> Result:
        with Client.connect(self.root, self.name) as client:
            if detach:
                client.request(method, msgspec.to_builtins(request))
                return Result(0, b"", b"")
            try:
                return complete(client, method, request, stdin)
            except BaseException as error:
                raise self._monitor.better(error) from None

    def wait(self, container: str) -> int:
        """Waits for a container's end; returns its exit status."""
        return int(self._client.request("wait", {"container": container}, 86400)["code"])

    def kill(self, container: str, signal: int = 15) -> None:
        """Sends a signal to a container's first process."""
        self._client.request("kill", {"key": container, "signal": int(signal)})

    # -- storage ------------------------------------------------------------------------------

    def attach(self, mount: str | dict[str, Any], *, container: str = "", mounted: bool = True) -> str:
        """Attaches a disk or shares a directory, and returns the path that the guest has it at.

        Args:
            mount: as ``--mount`` takes it; without a ``container`` the destination may be left out.
            container: a running container that sees it at the mount's destination from now on.
            mounted: False gives the guest a disk's device, and mounts nothing.

        Raises:
            HoldfastError: it could not be attached; nothing of it is left.
        """
        raw = parse_mount(mount, cwd=os.getcwd(), destination_needed=False) if isinstance(mount, str) else mount
        if not mounted and not str(raw.get("destination", "")).startswith(BLOCKDEV):
            raw = {**raw, "destination": BLOCKDEV}
        return str(self._client.request("attach", {"mount": raw, "container": container})["guest_path"])

    def detach(self, path: str, *, container: str = "") -> None:
        """Lets go of what :meth:`attach` attached; can be tried again when it fails.

        Args:
            path: in the guest, as :meth:`attach` returned it; in the container, if one is named.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        self._client.request("detach", {"guest_path": path, "container": container})

    def grow_scratch(self, container: str, size: int | str) -> int:
        """Makes the scratch disk that a running container writes to larger; returns its size in bytes.

        Args:
            size: the whole new size, as bytes or text such as ``"20G"``.

        Raises:
            NotFound: it has no scratch disk.
            InvalidInput: the disk is larger already.
            Unsupported: it is encrypted.
        """
        size_bytes = parse_size(size) if isinstance(size, str) else size
        answer = self._client.request("grow", {"container": container, "size_bytes": size_bytes})
        return int(answer["size_bytes"])

    def storage(self) -> dict[str, Any]:
        """Everything the pod holds: ``attachments`` by slot and ``shares`` by number."""
        found: dict[str, Any] = self._client.request("storage", {})
        return found

    def plan(self, request: ContainerRequest) -> dict[str, Any]:
        """The steps that a container would take in this pod as it is now; nothing is done."""
        found: dict[str, Any] = self._client.request("plan", msgspec.to_builtins(request))
        return found

    def inspect(self) -> PodInfo:
        """What the pod is and what runs in it."""
        return msgspec.convert(self._client.request("inspect", {}), PodInfo)

    # -- copies -------------------------------------------------------------------------------

    def fork(self, n: int = 1, *, names: Sequence[str] = (), detached: bool = False) -> list[Pod]:
        """New pods that go on from where this one is: its processes, memory, disks and volumes, at one moment.

        This pod stands still for some milliseconds and goes on unchanged.  What it writes to from now on, and what each
        new pod writes to, is its own; disks and layers that are only read are shared.  What processes print goes to the
        new pods' logs.

        Args:
            n: how many.
            names: of the new pods; those that are missing are made up.
            detached: they outlive this process.

        Raises:
            Unsupported: something that the pod holds cannot be copied safely; the error names it and says why.
            HoldfastError: one could not be started; none of them is left.
        """
        given = list(names)
        stem = self.name[:_STEM]  # a fork of a fork of a fork has no longer name than one of them
        given += [f"{stem}-{secrets.token_hex(4)}" for _ in range(n - len(given))]
        for name in given:
            check_new(self.root, name)
        pods: list[Pod] = []
        with self._snapshot() as snapshot:
            try:
                for name in given:
                    pods.append(Pod._launch(name, snapshot, self.root, self.data, detached=detached))
                for pod in pods:
                    pod._monitor.wait_for_start()
            except BaseException:
                for pod in pods:
                    pod._monitor.undo()
                raise
        return pods

    def save(self, path: str | Path, *, stop: bool = False) -> None:
        """Writes the pod as it is at one moment to a file, from which :func:`restore` goes on: also after a restart.

        This pod goes on; what it can write to is in the file, what it only reads is named there.

        Args:
            path: of a file that is replaced, or not there yet; it is there when it is complete.
            stop: the pod ends when it is saved.

        Raises:
            Unsupported: something that the pod holds cannot be copied safely; the error names it and says why.
            InvalidInput: no file can be made there.
            Exhausted: there is no room for it.
        """
        from holdfast.pod import saving

        with saving.NewFile(Path(path).absolute()) as new, self._snapshot() as snapshot:
            saving.save(snapshot, new, self.data)
        if stop:
            self.remove()

    def hold(self, image: str) -> None:
        """Attaches and mounts an image's layers, for containers to come; they stay until the pod ends.

        Raises:
            NotFound: there is no such image.
            Exhausted: no slot is free.
        """
        from holdfast.image.store import ImageStore

        layers = [(layer.disk, layer.diff_id) for layer in ImageStore(self.data).get(image).layers]
        self._client.request("hold", {"image": image, "layers": layers})

    def make_template(self, name: str) -> None:
        """Saves the pod as it is at one moment for ``Pod(template=name)`` to go on from, in no time.

        This pod goes on.  See :meth:`save`; the files stay where they are, for all pods that start from it.

        Raises:
            InUse: there is one of that name.
            Unsupported: something that the pod holds cannot be copied safely; the error names it and says why.
            Exhausted: there is no room for it.
        """
        from holdfast.pod import templates

        with templates.making(self.data, name) as folder, self._snapshot() as snapshot:
            templates.save(snapshot, folder, self.data, name)

    def _snapshot(self) -> Snapshot:
        with Client.connect(self.root, self.name) as client:
            answer = client.request("freeze", {}, _FREEZE_SECONDS)
            snapshot = Snapshot.of_process(answer["pid"], answer["fds"])
            client.request("thawed", {})
        return snapshot

    # -- end ----------------------------------------------------------------------------------

    def remove(self) -> None:
        """Ends the pod and everything in it; returns when nothing of it is left.

        Raises:
            NotReleased: something could not be let go of.
        """
        self._monitor.remove()

    def close(self) -> None:
        """Ends the pod, unless it is detached: then only this connection."""
        self._monitor.close()


def _pmem_limits(pmem: PmemLimits | bool) -> PmemLimits:
    limits = pmem if isinstance(pmem, PmemLimits) else PmemLimits(DEFAULT_DEVICES if pmem else 0)
    check_limits(limits)
    return limits


def restore(
    path: str | Path, name: str | None = None, *, root: str | Path | None = None, data: str | Path | None = None,
    detached: bool = False, bundles: Mapping[str, str | Path] | None = None,
) -> Pod:  # fmt: skip
    """A pod that goes on from where one was saved; see :meth:`Pod.save`.

    Args:
        name: of the new pod; that of the saved one if not given.
        root, data, detached: see :class:`Pod`.
        bundles: by container (``""`` for the only one), bundles that must ask for the mounts which it was saved with.
            The processes go on with those; where a bundle says another path for the same directory, that is used.

    Raises:
        Corrupt: the file is damaged, or of another version.
        Unsupported: it needs another guest, QEMU, accelerator or processor; the error says which.
        NotFound, InvalidInput: a layer, disk or share that it reads is missing, or another one now; or a bundle is, or
            asks for other mounts, which are named.
        HoldfastError: the pod could not be started; nothing of it is left.
    """
    from holdfast.pod import restoring

    file, root_path, data_path = Path(path).absolute(), state_root(root), data_folder(data)
    name = name or restoring.name_in(file)
    check_new(root_path, name)
    with restoring.restore(file, data_path, bundles) as snapshot:
        pod = Pod._launch(name, snapshot, root_path, data_path, detached=detached)
    pod._monitor.wait_for_start()
    return pod
