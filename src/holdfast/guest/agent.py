"""The agent: PID 1 of the guest.

Mounts the guest's own filesystems, opens the port to the host and answers requests until told to power
off.  Everything that arrives is checked; a request that fails answers with an error and changes nothing
else; only a broken kernel ends the agent, and then the machine with it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys

from holdfast import trace
from holdfast.errors import GuestFailed, InvalidInput, ProtocolError, from_exception
from holdfast.guest import boot, fresh, renew, still, storage
from holdfast.guest.children import Children
from holdfast.guest.containers import Containers
from holdfast.guest.hot_mounts import HotMounts
from holdfast.guest.loop import Loop
from holdfast.guest.runtime import Runtime
from holdfast.wire.frames import CANCEL, CREDIT, DATA, EOF, REQUEST, SYNC
from holdfast.wire.mux import Mux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.loop import Task
    from holdfast.wire.mux import Incoming

PORT = "holdfast.agent"
PROTOCOL_VERSION = 1
_MOST_SECONDS = 3600.0


class Agent:
    """Answers requests that arrive on one descriptor."""

    def __init__(self, fd: int, runtime: Runtime | None = None) -> None:
        self._fd = fd
        self._runtime = runtime or Runtime()
        self._mux = Mux()
        self._loop = Loop()
        self._children = Children()
        self._containers = Containers(self._loop, self._children, self._runtime, self._report)
        self._hot_mounts = HotMounts(self._children, self._containers.pid_of)
        self._tasks: dict[int, object] = {}
        self._writing = False
        self._frozen = False
        self._methods: dict[str, Callable[[dict[str, Any]], Any]] = {
            "hello": self._hello,
            "ping": lambda params: params,
            "resume": self._resume,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "renew": self._renew,
            "make_ready": lambda _params: self.make_ready(),
            "processes": lambda _params: self._containers.connected(),
            "reconnect": lambda _params: self._containers.reconnect(),
            "modify": lambda params: storage.modify(params, self._children),
            "start": lambda params: self._containers.start(self._mux, params),
            "exec": lambda params: self._containers.exec(self._mux, params),
            "kill": self._kill,
            "resize": self._resize,
            "remove": lambda params: self._containers.remove(params),
            "bind": lambda params: self._hot_mounts.add(params),
            "unbind": lambda params: self._hot_mounts.remove(params),
            "mounts": _mounts,
            "shutdown": self._shutdown,
        }
        os.set_blocking(fd, False)

    def make_ready(self) -> None:
        """Does what can be done before anything is asked for: a machine that is saved then has it done.

        That it fails is no reason not to serve: it will be done, or fail again, when it is asked for.
        """
        try:
            self._containers.make_ready()
        except (OSError, GuestFailed) as error:
            say(f"nothing waits for a container: {error}")

    def run(self) -> None:
        """Serves until a ``shutdown`` request."""
        wakeup_reader, wakeup_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        # Whatever had something to say - a request, a stream, a child's end - it is sent once, together.
        self._loop.after_round = self._flush
        self._loop.watch(wakeup_reader, select.EPOLLIN, lambda _events: self._on_signal(wakeup_reader))
        self._loop.watch(self._fd, select.EPOLLIN, self._on_port)
        self._loop.run()

    def _on_signal(self, fd: int) -> None:
        os.read(fd, 4096)
        self._children.reap()

    def _on_port(self, events: int) -> None:
        if events & select.EPOLLIN:
            try:
                data = self._receive()
            except BlockingIOError:
                data = b""
            self._feed(data)

    def _receive(self) -> bytes:
        return os.read(self._fd, 65536)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                for incoming in self._mux.feed(data):
                    self._dispatch(incoming)
                return
            except ProtocolError as error:
                # The host is not expected to break the protocol: say so on the console and go on with what follows.
                say(error)
                data = b""

    def _dispatch(self, incoming: Incoming) -> None:
        kind, channel = incoming.kind, incoming.channel
        if kind == REQUEST:
            self._request(channel, incoming.body)
        elif kind in (DATA, EOF, CREDIT):
            writer, reader = self._containers.streams(channel)
            if kind == DATA and writer is not None:
                writer.feed(incoming.data)
            elif kind == EOF and writer is not None:
                writer.end()
            elif kind == CREDIT and reader is not None:
                reader.pump()
        elif kind == CANCEL:
            self._loop.cancel(self._tasks.get(channel))
        elif kind == SYNC:
            self._mux.synced(incoming.data)
            self._containers.disconnect()

    def _request(self, request_id: int, body: dict[str, Any]) -> None:
        method = self._methods.get(str(body.get("method")))
        params, deadline_ms = body.get("params"), body.get("deadline_ms")
        if method is None or not isinstance(params, dict) or not isinstance(deadline_ms, int):
            error = InvalidInput(
                "answer request", subject=body.get("method", ""), why="unknown or malformed", code="unknown-request"
            )
            self._mux.respond(request_id, error=error.as_dict())
            return
        try:
            result = method(params)
        except Exception as failure:
            self._mux.respond(request_id, error=from_exception(failure).as_dict())
            return
        if not hasattr(result, "send"):
            self._mux.respond(request_id, result)
            return
        self._start_task(request_id, result, min(deadline_ms / 1000, _MOST_SECONDS))

    def _start_task(self, request_id: int, task: Task, seconds: float) -> None:
        finished = False

        def done(result: object, failure: BaseException | None) -> None:
            nonlocal finished
            finished = True
            self._tasks.pop(request_id, None)
            self._mux.respond(request_id, result, from_exception(failure).as_dict() if failure is not None else None)

        handle = self._loop.spawn(task, seconds, done)
        if not finished:
            self._tasks[request_id] = handle

    def _report(self, name: str, params: dict[str, Any]) -> None:
        self._mux.event(name, params)

    def _flush(self) -> None:
        if self._frozen:
            self._stand_still()
        outgoing = self._mux.outgoing
        while outgoing:
            try:
                count = os.write(self._fd, memoryview(outgoing)[:65536])
            except BlockingIOError:
                break
            del outgoing[:count]
        writing = bool(outgoing)
        if writing != self._writing:
            self._writing = writing
            self._loop.watch(self._fd, select.EPOLLIN | (select.EPOLLOUT if writing else 0), self._on_port)

    # -- requests -----------------------------------------------------------------------------

    def _hello(self, _params: dict[str, Any]) -> dict[str, Any]:
        system = os.uname()
        return {
            "version": PROTOCOL_VERSION,
            "kernel": system.release,
            "python": sys.version.split()[0],
            "pid": os.getpid(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cpus": os.cpu_count() or 1,
            "runtime": self._runtime.argv[0],
        }

    def _resume(self, params: dict[str, Any]) -> dict[str, Any]:
        if params.get("trace"):
            trace.send_to(lambda when, what: self._report("trace", {"when": when, "what": what}))
        trace.mark("asked to resume")
        entropy = bytes.fromhex(params["entropy"])
        identity = boot.refresh_identity(int(params["time_ns"]), entropy, str(params["hostname"]))
        trace.mark("has resumed")
        return identity

    def _freeze(self, params: dict[str, Any]) -> Task:
        pids, groups = self._containers.running(), self._containers.groups()
        yield from still.stand_still(pids, groups, params, self._children)
        self._frozen = True
        return {}

    def _thaw(self, _params: dict[str, Any]) -> dict[str, Any]:
        still.go_on()
        return {}

    def _renew(self, _params: dict[str, Any]) -> Task:
        answer = yield from renew.renew(self._containers.running(), self._children)
        self._hot_mounts.renumber(answer["numbers"])
        yield from fresh.empty(self._children)
        return {}

    def _stand_still(self) -> None:
        """Sends everything, and does nothing until the host says something: this machine may be copied meanwhile.

        So no frame is ever cut in two by that, and whoever goes on from the copy finds an agent that waits.
        """
        self._frozen = False
        port = select.poll()
        while self._mux.outgoing:
            port.register(self._fd, select.POLLOUT)
            port.poll()
            try:
                del self._mux.outgoing[: os.write(self._fd, memoryview(self._mux.outgoing)[:65536])]
            except BlockingIOError:
                continue
        port.register(self._fd, select.POLLIN)
        port.poll()
        self._on_port(select.EPOLLIN)  # first of all: a host that has forgotten everything says so

    def _kill(self, params: dict[str, Any]) -> dict[str, Any]:
        self._containers.kill(str(params.get("key")), int(params.get("signal", signal.SIGTERM)))
        return {}

    def _resize(self, params: dict[str, Any]) -> dict[str, Any]:
        self._containers.find(str(params.get("key"))).resize(params.get("size"))
        return {}

    def _shutdown(self, _params: dict[str, Any]) -> dict[str, Any]:
        os.sync()
        self._loop.stop()
        return {}


def say(text: object) -> None:
    """Writes a line to the console."""
    os.write(2, f"agent: {text}\n".encode("utf-8", "replace"))


def _mounts(_params: dict[str, Any]) -> dict[str, Any]:
    with open("/proc/self/mountinfo") as file:
        return {"mountinfo": file.read(1 << 20)}


def _open_port() -> int:
    """Opens the port to the host, waiting for the driver to have made it."""
    from time import sleep

    while not (path := boot.find_port(PORT)):
        sleep(0.005)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def main() -> None:
    """Runs as PID 1; powers the machine off at the end, whatever the end is."""
    try:
        boot.mount_system()
        boot.enable_cgroup_controllers()
        agent = Agent(_open_port())
        agent.make_ready()
        gc.freeze()  # what exists now is shared by every clone: keep the collector from writing to it
        agent.run()
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
        raise
    finally:
        if os.getpid() == 1:
            with open("/proc/sysrq-trigger", "w") as file:
                file.write("o")
            signal.pause()
