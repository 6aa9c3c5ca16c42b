"""Templates: built ahead or by the first pod, used without waiting, removed under clones; and clones that differ."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.cli.main import main
from holdfast.errors import HoldfastError
from holdfast.machine import accelerator, guest_image, template, vm
from holdfast.machine.config import DEFAULT_MEMORY_BYTES, MachineConfig
from tests.vm.support import (
    BUSYBOX,
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    is_running,
    output,
    python_program,
    running,
    sh,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

LITTLE = 128 << 20


@pytest.fixture
def own_data(own_data: Path) -> Path:
    """As it is for all, with a guest that is the present one."""
    guest_image.ensure(own_data)
    return own_data


def machine_config(data: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> MachineConfig:
    return MachineConfig(guest_image.ensure(data), "tcg", memory_bytes, 1, accelerator.cached_qemu_version(data))


@contextlib.asynccontextmanager
async def cloned(data: Path, folder: Path, **options: Any) -> AsyncIterator[vm.VirtualMachine]:
    config = machine_config(data)
    where, _ = await template.ensure(data, config, lambda _text: None)
    (folder / "export").mkdir(parents=True, exist_ok=True)
    machine = await template.clone(
        where, config, export=str(folder / "export"), console_log=str(folder / "console"), **options
    )
    try:
        yield machine
    finally:
        await machine.close()


def ram_of(machine: vm.VirtualMachine) -> str:
    """The file that a machine's RAM maps, and how."""
    with open(f"/proc/{machine.pid}/maps") as file:
        lines = [line.split() for line in file]
    largest = max(
        (line for line in lines if len(line) > 5 and line[5][0] == "/"),
        key=lambda line: int(line[0].split("-")[1], 16) - int(line[0].split("-")[0], 16),
    )
    return f"{largest[1][3]} {largest[5]}"


def left(data: Path) -> list[str]:
    """All that there is of templates."""
    return sorted(os.listdir(data / "templates"))


# -- the commands -----------------------------------------------------------------------------------


def holdfast_command(capsys: pytest.CaptureFixture[str], data: Path, *words: str) -> Any:
    """What a command prints as JSON, and its status if that is not 0."""
    capsys.readouterr()
    status = main([*words, "--data", str(data), "--json"])
    answer = json.loads(capsys.readouterr().out)
    return answer["error"] if status == 125 else answer


def build_command(data: Path, patch: str = "pass", *words: str) -> subprocess.Popen[str]:
    """``template build`` in a process of its own, which runs ``patch`` first."""
    arguments = ["template", "build", "--memory", "128M", "--data", str(data), *words]
    program = f"""
import os, signal, sys
from holdfast.machine import template, vm
def stop(*_arguments, **_options):
    print("here", flush=True)
    signal.pause()
{patch}
from holdfast.cli.main import main
sys.exit(main({arguments!r}))
"""
    return subprocess.Popen(python_program(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_built_ahead_used_and_removed_under_a_pod(own_data, state_root, capsys):
    with build_command(own_data) as one, build_command(own_data) as other:
        (key, said), (same, nothing) = one.communicate(timeout=100), other.communicate(timeout=100)
    assert (said + nothing).count("booting a machine once") == 1
    assert key == same
    key = key.strip()
    (listed,) = holdfast_command(capsys, own_data, "template", "list")
    assert (listed["key"], listed["stale"], listed["used_by"]) == (key, "", [])
    assert listed["record"]["memory_bytes"] == LITTLE > listed["disk_bytes"] > 0
    assert {path.stat().st_mode & 0o777 for path in (own_data / "templates" / key).iterdir()} == {0o400}

    words: list[str] = []
    with holdfast.Pod("user", root=state_root, data=own_data, memory=LITTLE, say=words.append) as pod:
        assert (words, pod.inspect().started_from) == ([], "template")
        (listed,) = holdfast_command(capsys, own_data, "template", "list")
        assert listed["used_by"] == ["user"]
        error = holdfast_command(capsys, own_data, "template", "remove", key[:6])
        assert (error["code"], error["why"], error["subject"]) == ("template-in-use", "used by user", key)
        with running(pod, "c"):
            assert holdfast_command(capsys, own_data, "template", "remove", "--force", key[:6]) == {"removed": [key]}
            assert left(own_data) == []
            assert output(pod.exec("c", ["cat", "/etc/passwd"]))
            assert output(sh(pod, "echo goes on")) == "goes on\n"
    error = holdfast_command(capsys, own_data, "template", "remove", key)
    assert error["code"] == "template-not-found"


def test_gc_removes_what_no_pod_starts_from(own_data, state_root, capsys):
    """Templates and guests that are old, and that nobody uses."""
    with holdfast.Pod("user", root=state_root, data=own_data, memory=LITTLE):
        (old,) = holdfast_command(capsys, own_data, "template", "list")
        old_key, guest = old["key"], old["record"]["guest"]
        # As if this guest were not what would be built now: another time of one of the files that it is made of.
        path = own_data / "guests" / guest / "guest.json"
        record = json.loads(path.read_text())
        known = record["inputs"]
        known[next(iter(known))]["mtime_ns"] += 1
        path.write_text(json.dumps(record))
        (old,) = holdfast_command(capsys, own_data, "template", "list")
        assert "no guest is built" in old["stale"]
        freed = holdfast_command(capsys, own_data, "gc")["freed"]
        assert old_key not in [one["object"] for one in freed], "a pod uses it"
        assert guest not in [one["object"] for one in freed]
        assert holdfast_command(capsys, own_data, "template", "remove", "--stale") == {"removed": []}
    answer = holdfast_command(capsys, own_data, "gc")
    assert (answer["collected"], answer["findings"]) == ([], [])
    freed = {one["object"]: one for one in answer["freed"]}
    assert freed[old_key]["kind"] == "template"
    assert freed[old_key]["bytes"] > 20 << 20
    assert freed[guest]["bytes"] > 20 << 20
    assert left(own_data) == []
    assert not (own_data / "guests" / guest).exists()


# -- building, and being killed meanwhile -------------------------------------------------------------


@contextlib.contextmanager
def being_built(data: Path, key: str) -> Iterator[None]:
    (data / "templates").mkdir(exist_ok=True)
    lock_fd = template.try_lock(data / "templates", key, fcntl.LOCK_EX)
    assert lock_fd >= 0
    try:
        yield
    finally:
        os.close(lock_fd)


def test_a_pod_does_not_wait_for_a_builder(own_data, state_root):
    said: list[str] = []
    key = machine_config(own_data, LITTLE).key
    with being_built(own_data, key):
        with holdfast.Pod(root=state_root, data=own_data, memory=LITTLE, say=said.append) as pod:
            assert pod.inspect().started_from == "boot"
            assert output(sh(pod, "hostname; echo runs", hostname="c")) == "c\nruns\n"
        assert said == ["booting without a template: another process is building or removing it"]
    said.clear()
    with holdfast.Pod(root=state_root, data=own_data, memory=LITTLE, say=said.append) as pod:
        assert pod.inspect().started_from == "template"
    assert said == ["booting a machine once, to start every later one from it"]


#: Named points: the function in whose place the builder is killed.
POINTS = {
    "with nothing but its folder": "template._make_ram = stop",
    "before the machine is started": "vm.start = stop",
    "with the machine running": "template._save = stop",
    "while the machine's state is being saved": "template.migration.save = stop",
    "with all written but not out": "template._finish = stop",
    "before it gets its name": "template.publish = stop",
    "after it has got its name": "template.sync = lambda path, real=template.sync: stop() if path.name == 'templates'"
    " else real(path)",
}


@pytest.mark.parametrize(
    ("point", "sweeper"),
    [*((point, "gc") for point in POINTS), (list(POINTS)[-2], "builder")],
)
def test_a_builder_that_is_killed(own_data, state_root, capsys, point, sweeper):
    """The command: its child, which builds, and the machine end with it."""
    with build_command(own_data, POINTS[point]) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "here\n"
        builder.kill()
        builder.communicate(timeout=30)  # to the end of all that have its output
    key = machine_config(own_data, LITTLE).key
    with being_built(own_data, key):  # the lock is free again
        pass
    is_whole = point == "after it has got its name"
    assert bool([name for name in left(own_data) if ".new-" in name]) == (not is_whole)
    if sweeper == "gc":
        freed = holdfast_command(capsys, own_data, "gc")["freed"]
        assert [one["object"] for one in freed if one["kind"] == "leftover"] == (
            [] if is_whole or point == "with nothing but its folder" else [key]
        )
        assert left(own_data) == ([f".{key}.lock", key] if is_whole else [])
    else:
        with build_command(own_data) as builder:
            assert builder.communicate(timeout=60)[0].strip() == key
        assert left(own_data) == [f".{key}.lock", key]


def test_the_command_that_builds_is_interrupted(own_data):
    """From a terminal, so that its child is, too: it tidies up."""
    patch = """
async def wait(machine, _path):
    print(machine.pid, flush=True)
    await machine.died
template._save = wait
os.setpgid(0, 0)
"""
    with build_command(own_data, patch) as builder:
        assert builder.stdout is not None
        qemu = int(builder.stdout.readline())
        os.killpg(builder.pid, signal.SIGINT)
        builder.communicate(timeout=30)
        assert builder.returncode == 130
    assert not is_running(qemu)
    assert [name for name in left(own_data) if ".new-" in name] == []


# -- identity -----------------------------------------------------------------------------------------


RANDOM = """
import os, uuid, random, secrets
print(open('/proc/sys/kernel/random/boot_id').read().strip())
print(open('/proc/sys/kernel/random/uuid').read().strip())
print(uuid.uuid4(), secrets.token_hex(16), random.SystemRandom().random(), sep='\\n')
for _ in range(64):
    print(os.getrandom(32).hex())
with open('/dev/urandom', 'rb') as file:
    for _ in range(64):
        print(file.read(32).hex())
"""


def test_no_two_clones_have_the_same_random_numbers(data, state_root):
    """In containers, by every way to them."""
    printed = []
    for name in ("one", "two", "three"):
        with holdfast.Pod(name, root=state_root, data=data) as pod:
            assert pod.inspect().started_from == "template"
            program = [*HOST_PYTHON, "-c", RANDOM]
            printed.append(output(pod.run(BUSYBOX, program, mounts=[HOST_USR], env=HOST_PYTHON_ENV)).splitlines())
    assert all(len(lines) == 133 for lines in printed)
    lines = [line for one in printed for line in one]
    assert len(set(lines)) == len(lines)


def test_clones_started_at_once_differ(data, tmp_path):
    async def check() -> None:
        async with cloned(data, tmp_path / "a", hostname="a") as one, cloned(data, tmp_path / "b", hostname="b") as two:
            assert (one.identity["hostname"], two.identity["hostname"]) == ("a", "b")
            for name in ("machine_id", "boot_id"):
                assert len(one.identity[name]) >= 32
                assert one.identity[name] != two.identity[name]

    asyncio.run(check())


@pytest.mark.parametrize("entropy", [b"", b"too little"])
def test_a_clone_that_cannot_be_made_unique_does_not_start(data, tmp_path, monkeypatch, entropy):
    started: list[vm.VirtualMachine] = []
    real = vm.VirtualMachine.request

    async def request(self: vm.VirtualMachine, method: str, params: dict[str, Any], seconds: float) -> Any:
        started.append(self)
        return await real(self, method, params | {"entropy": entropy.hex()}, seconds)

    async def check() -> None:
        async with cloned(data, tmp_path):
            pass

    asyncio.run(template.ensure(data, machine_config(data), lambda _text: None))
    monkeypatch.setattr(vm.VirtualMachine, "request", request)
    with pytest.raises(HoldfastError) as caught:
        asyncio.run(check())
    assert "random bytes" in str(caught.value)
    assert not is_running(started[0].pid)
