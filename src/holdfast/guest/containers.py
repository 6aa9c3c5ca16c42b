"""Containers: an OCI runtime runs them; the agent connects their stdio and reports their end."""

from __future__ import annotations

import json
import os
import signal

from holdfast import trace
from holdfast.errors import GuestFailed, InUse, InvalidInput, NotFound
from holdfast.guest import block_devices, files
from holdfast.guest.commands import check_command
from holdfast.guest.network import SpareNetwork
from holdfast.guest.process import Process, Stdio, listen, receive_terminal
from holdfast.guest.ready import ID, ReadyRuntime
from holdfast.guest.runtime import STATE, control_group, failure, log_text
from holdfast.guest.tmp import add_tmp
from holdfast.guest.users import apply_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Loop, Task
    from holdfast.guest.runtime import Runtime
    from holdfast.guest.streams import Input, Output
    from holdfast.wire.mux import Mux

#: Bundles hold configuration only; root filesystems are mounted elsewhere, so that a bundle can simply be removed.
BUNDLES = "/run/holdfast/bundles"
_TTYS = "/run/holdfast/tty"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class Containers:
    """Starts containers and processes in them, and knows those that run."""

    def __init__(
        self, loop: Loop, children: Children, runtime: Runtime, report: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._children = children
        self._runtime = runtime
        self._report = report
        self._launched = 0
        self._ready: ReadyRuntime | None = None
        self._network: SpareNetwork | None = None
        #: The container that the runtime knows under another name.
        self._by_ready = ""
        self._processes: dict[str, Process] = {}
        #: Exit statuses that the host has not heard of, if it is not listening; see :meth:`disconnect`.
        self._unheard: dict[str, int] | None = None

    def make_ready(self) -> None:
        """Makes for a container that may come what does not depend on it.

        Raises:
            OSError, GuestFailed: something of it could not be made, and will be made when a container needs it.
        """
        if self._network is None:
            self._network = SpareNetwork()
        if self._ready is not None or self._by_ready:
            return
        stdio = Stdio(terminal=False, stdin=0)
        try:
            self._ready = ReadyRuntime(self._runtime, self._children, f"{BUNDLES}/{ID}", stdio)
        except BaseException:
            stdio.close()
            raise

    def _tell_ready(self, name: str, configuration: bytes, params: dict[str, Any]) -> ReadyRuntime | None:
        """The runtime that waited, and runs the container from now on; None if that takes another one."""
        ready = self._ready
        if ready is None or params.get("stdin"):
            return None
        self._ready = None
        if not ready.tell(configuration):
            return None
        self._by_ready = name
        return ready

    def _give_network(self, spec: dict[str, Any]) -> SpareNetwork | None:
        """The network that the container has been given, if there was one for it."""
        network = self._network
        if network is None or not network.give(spec):
            return None
        self._network = None
        return network

    def _runtime_id(self, name: str) -> str:
        return ID if name == self._by_ready else name

    def start(self, mux: Mux, params: dict[str, Any]) -> Task:
        """Task: makes the bundle, runs the container, connects its stdio; returns ``{"pid": n}``."""
        trace.mark("asked to start container")
        name = _name(params, "id")
        if name in self._processes:
            raise InUse("start container", subject=name, why="a container of this name exists", code="container-exists")
        spec = _dict(params, "spec")
        block_devices.show(spec)
        self._runtime.prepare(spec, name)
        self._runtime.prepare_process(spec["process"])
        _own_root(spec["root"]["path"], params.get("root"))
        mounted = [str(mount.get("destination")) for mount in spec.get("mounts") or ()]
        if params.get("tmp"):
            add_tmp(spec)
        apply_user(spec["process"], str(params.get("user") or ""), spec["root"]["path"])
        check_command(spec["process"], spec["root"]["path"], mounted)
        _size_terminal(spec["process"], params.get("size"))
        network = self._give_network(spec)
        configuration = json.dumps(spec).encode()
        ready = self._tell_ready(name, configuration, params) if not spec["process"].get("terminal") else None
        bundle = f"{BUNDLES}/{self._runtime_id(name)}"
        if ready is None:
            os.makedirs(bundle, 0o700, exist_ok=True)
            files.write(f"{bundle}/config.json", configuration)
        argv = ["run", "--detach", "--bundle", bundle]
        try:
            return (yield from self._launch(mux, name, bundle, argv, [name], params, spec["process"], ready))
        finally:
            if network is not None:
                network.let_go()

    def exec(self, mux: Mux, params: dict[str, Any]) -> Task:
        """Task: runs a process in a running container; returns ``{"pid": n}``."""
        container, key = _name(params, "container"), _name(params, "key")
        main = self._processes.get(container)
        if main is None or main.status is not None:
            raise NotFound("run in container", subject=container, why="it is not running", code="container-not-running")
        if key in self._processes:
            raise InUse("run in container", subject=key, why="this process exists", code="process-exists")
        bundle = f"{BUNDLES}/{self._runtime_id(container)}"
        folder = f"{bundle}/{key}"
        os.makedirs(folder, 0o700, exist_ok=True)
        process = _dict(params, "process")
        if params.get("user"):
            with open(f"{bundle}/config.json") as file:
                apply_user(process, str(params["user"]), json.load(file)["root"]["path"])
        self._runtime.prepare_process(process)
        check_command(process, f"/proc/{main.pid}/root", [])
        _size_terminal(process, params.get("size"))
        with open(f"{folder}/process.json", "w") as file:
            json.dump(process, file)
        argv = ["exec", "--detach", "--process", f"{folder}/process.json"]
        tail = [self._runtime_id(container)]
        try:
            answer = yield from self._launch(mux, key, folder, argv, tail, params, process)
        except BaseException:
            _remove_bundle(folder)
            raise
        running = self._processes.get(key)
        if running is not None:
            running.folder = folder
        else:  # it has ended already
            _remove_bundle(folder)
        return answer

    def _launch(
        self, mux: Mux, key: str, folder: str, argv: list[str], tail: list[str], params: dict[str, Any],
        program: dict[str, Any], ready: ReadyRuntime | None = None,
    ) -> Task:  # fmt: skip
        terminal, command_name = bool(program.get("terminal")), str(program["args"][0])
        log, pid_file = f"{folder}/log", f"{folder}/pid"
        command = [*self._runtime.command(log), *argv, "--pid-file", pid_file]
        stdio = ready.stdio if ready is not None else Stdio(terminal, int(params.get("stdin") or 0))
        listener = None
        self._children.expect()
        self._launched += 1
        tty = f"{_TTYS}/{self._launched}"  # short: a socket's path has 107 bytes, and names may be long
        try:
            if terminal:
                os.makedirs(_TTYS, 0o700, exist_ok=True)
                listener = listen(tty)
                command += ["--console-socket", tty]
            trace.mark("bundle is made")
            pid = ready.pid if ready is not None else self._children.spawn(command + tail, *stdio.child)
            status = yield from self._children.wait(pid)
            trace.mark("runtime has ended")
            if status != 0:
                raise failure(log, command_name)
            stdio.close_child()
            terminal_fd = receive_terminal(listener) if listener is not None else -1
            process = Process(key, int(files.read(pid_file)), terminal_fd, mux)
            process.connect(self._loop, stdio, params, lambda: self._maybe_report(process))
            self._processes[key] = process
            self._children.on_exit(process.pid, lambda status: self._ended(process, status))
        finally:
            self._children.expect_no_more()
            stdio.close()
            if listener is not None:
                listener.close()
                os.unlink(tty)
        return {"pid": process.pid}

    def _ended(self, process: Process, status: int) -> None:
        process.ended(status)
        self._maybe_report(process)

    def _maybe_report(self, process: Process) -> None:
        """Reports the end once, after the last byte of output."""
        if not process.finished or self._processes.pop(process.key, None) is None:
            return
        process.close()
        if process.folder:  # of an exec; a container's bundle goes with the container
            _remove_bundle(process.folder)
        code, signalled = process.exit_status()
        if self._unheard is not None:
            self._unheard[process.key] = code
        self._report("exit", {"key": process.key, "pid": process.pid, "code": code, "signal": signalled})

    def find(self, key: str) -> Process:
        """The running process of that key.

        Raises:
            NotFound: there is none.
        """
        process = self._processes.get(key)
        if process is None:
            raise NotFound("find process", subject=key, why="it is not running", code="process-not-running")
        return process

    def pid_of(self, name: str) -> int:
        """Process id of a running container's first process.

        Raises:
            NotFound: it does not run.
        """
        process = self.find(name)
        if process.status is not None:
            raise NotFound("find process", subject=name, why="it has ended", code="container-not-running")
        return process.pid

    def connected(self) -> dict[str, list[int]]:
        """Key of each process -> its open streams: the one for input or 0, then those for output."""
        return {process.key: process.connected() for process in self._processes.values()}

    def disconnect(self) -> None:
        """The host has forgotten all that was before: until it reconnects, nobody hears of a process's end."""
        self._unheard = {} if self._processes else None

    def reconnect(self) -> dict[str, Any]:
        """Opens them again under the same numbers, for a host that has forgotten them and now has them open.

        Returns ``{"ended": {key: exit status}}``, of processes that have ended meanwhile.
        """
        for process in list(self._processes.values()):
            process.reconnect()
        unheard, self._unheard = self._unheard or {}, None
        return {"ended": unheard}

    def running(self) -> dict[str, int]:
        """Name of each container that runs -> process id of its first process."""
        return {key: p.pid for key, p in self._processes.items() if p.status is None and not p.folder}

    def groups(self) -> dict[str, str]:
        """Name of each container that runs -> its control group; see :func:`control_group`."""
        return {name: control_group(self._runtime_id(name)) for name in self.running()}

    def streams(self, channel: int) -> tuple[Input | None, Output | None]:
        """The process's end of a stream, whichever direction it has."""
        for process in self._processes.values():
            found = process.stream(channel)
            if found != (None, None):
                return found
        return None, None

    def kill(self, key: str, number: int) -> None:
        """Sends a signal to a process; one that has just ended is no error."""
        try:
            os.kill(self.find(key).pid, signal.Signals(number))
        except ProcessLookupError:
            return
        except ValueError:
            raise InvalidInput("send signal", subject=number, why="there is no such signal") from None

    def remove(self, params: dict[str, Any]) -> Task:
        """Task: kills and deletes a container and its bundle; one that is gone is success."""
        name = _name(params, "id")
        id = self._runtime_id(name)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        log = f"{STATE}/{name}.delete.log"
        try:
            if os.path.isdir(f"{STATE}/{id}"):
                argv = [*self._runtime.command(log), "delete", "--force", id]
                status = yield from self._children.run(argv, null, null, null)
                if status != 0 and os.path.isdir(f"{STATE}/{id}"):
                    raise GuestFailed("delete container", subject=name, why=log_text(log))
        finally:
            os.close(null)
        _remove_bundle(f"{BUNDLES}/{id}")
        if id == ID:
            self._by_ready = ""
        return {}


def _own_root(path: str, owner: object) -> None:
    """Gives ``/`` the image's mode and owner: an overlay takes them from its upper directory."""
    if isinstance(owner, dict):
        os.chown(path, int(owner.get("uid", 0)), int(owner.get("gid", 0)))
        os.chmod(path, int(owner.get("mode", 0o755)) & 0o7777)


def _size_terminal(process: dict[str, Any], size: object) -> None:
    """Has the runtime set a terminal's size, for a program may ask for it before the runtime has exited."""
    if process.get("terminal") and isinstance(size, list) and len(size) == 2:
        rows, columns = (min(max(int(number), 0), 0xFFFF) for number in size)
        process["consoleSize"] = {"height": rows, "width": columns}


def _remove_bundle(folder: str) -> None:
    """Removes the bundle's own files; nothing is ever mounted in there."""
    for path, folders, names in os.walk(folder, topdown=False):
        for name in names:
            os.unlink(f"{path}/{name}")
        for name in folders:
            os.rmdir(f"{path}/{name}")
    if os.path.isdir(folder):
        os.rmdir(folder)


def _name(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 128 or value[0] == "." or set(value) - _NAME_CHARACTERS:
        raise InvalidInput("read request", subject=key, why=f"not a name: {value!r}")
    return value


def _dict(params: dict[str, Any], key: str) -> dict[str, Any]:
    value = params.get(key)
    if not isinstance(value, dict):
        raise InvalidInput("read request", subject=key, why="not an object")
    return value
