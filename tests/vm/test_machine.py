"""The machine itself: started, cloned, talked to, killed; and the saves and verdicts that its starts rest on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import Corrupt, HoldfastError, InvalidInput, MachineFailed, TimedOut
from holdfast.machine import accelerator, guest_image, template, vm
from holdfast.machine.config import DEFAULT_MEMORY_BYTES, MIN_MEMORY_BYTES, QEMU, MachineConfig
from holdfast.pod import launch
from holdfast.spec.default import CAPABILITIES
from holdfast.wire.frames import REQUEST, Frame
from tests.images import make_bundle
from tests.vm.support import assert_nothing_held, is_running, output, python_program, running, sh, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GARBAGE = b"\0\xff\x1f\xd5" * 999 + Frame(REQUEST, 1, b"{}").encode()[:-1] + os.urandom(5000)


def machine_config(data: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> MachineConfig:
    guest = guest_image.find(data)
    assert guest is not None
    version = accelerator.cached_qemu_version(data)
    return MachineConfig(guest, "tcg", memory_bytes, 1, version)


@contextlib.asynccontextmanager
async def cloned(data: Path, tmp_path: Path) -> AsyncIterator[vm.VirtualMachine]:
    config = machine_config(data)
    folder, _ = await template.ensure(data, config, lambda _text: None)
    export = tmp_path / "export"
    export.mkdir(exist_ok=True)
    machine = await template.clone(folder, config, export=str(export), console_log=str(tmp_path / "console"))
    try:
        yield machine
    finally:
        await machine.close()


# -- the agent ------------------------------------------------------------------------------------


def test_a_clone_answers(data, tmp_path):
    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            hello = await machine.request("hello", {}, 5)
            assert (hello["version"], hello["pid"], hello["cpus"]) == (1, 1, 1)
            assert hello["kernel"] == machine.config.guest.kernel_release
            assert DEFAULT_MEMORY_BYTES * 3 // 4 < hello["memory_bytes"] < DEFAULT_MEMORY_BYTES
            for number in range(20):
                assert await machine.request("ping", {"n": number}, 5) == {"n": number}
            assert await machine.plugged() == set()
            assert is_running(machine.pid)
        assert not is_running(machine.pid)

    asyncio.run(main())


def test_clones_are_not_each_other(data, tmp_path):
    """Clock, random numbers and machine id are their own, though both have the same memory."""
    script = "cat /proc/sys/kernel/random/uuid; stat -c %Y /proc/self"
    with holdfast.Pod(data=data, root=os.environ["HOLDFAST_ROOT"]) as one:
        first = output(sh(one, script)).split()
    with holdfast.Pod(data=data, root=os.environ["HOLDFAST_ROOT"]) as two:
        second = output(sh(two, script)).split()
    assert first[0] != second[0]
    assert abs(int(second[1]) - time.time()) <= 5


def test_a_deadline_that_passes(data, tmp_path):
    """The host stops waiting, tells the guest, and the guest gives the work up."""

    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            # A disk that nobody plugs in: the guest waits for it until it is told not to.
            settings = {"MountPath": "/run/mounts/scsi/m0", "Controller": 0, "Lun": 5}
            request = {"ResourceType": "MappedVirtualDisk", "RequestType": "Add", "Settings": settings}
            with pytest.raises(TimedOut) as caught:
                await machine.request("modify", request, 0.2)
            assert "0.2 s" in str(caught.value)
            assert await machine.request("ping", {}, 5) == {}
            assert (await machine.request("mounts", {}, 5))["mountinfo"].count("/run/mounts/scsi") == 0

    asyncio.run(main())


def test_garbage_is_skipped_on_both_sides(data, tmp_path):
    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            machine.agent._transport.write(GARBAGE)
            # Half a frame of garbage may swallow what comes next: that is what synchronising is for.
            await machine.agent.synchronise(10)
            machine.agent.data_received(GARBAGE)
            machine.agent.data_received(b"\x1f")
            for number in range(3):
                assert await machine.request("ping", {"n": number}, 5) == {"n": number}

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{", b'{"method": 1}', b'{"method": "ping", "params": [], "deadline_ms": 1}', b"\xff", b"[" * 99999],
)
def test_requests_that_are_none(data, tmp_path, body):
    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            machine.agent._transport.write(Frame(REQUEST, 77, body).encode())
            assert await machine.request("ping", {"still": "there"}, 5) == {"still": "there"}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("no-such", {}, "unknown-request"),
        ("modify", {}, "invalid-input"),
        ("modify", {"ResourceType": "Rocket", "Settings": {}}, "unknown-resource"),
        ("modify", {"ResourceType": "MappedVirtualDisk", "Settings": {"MountPath": "relative"}}, "invalid-input"),
        ("modify", {"ResourceType": "MappedVirtualDisk", "Settings": {"MountPath": "/run/../etc"}}, "invalid-input"),
        ("modify", {"ResourceType": "MappedDirectory", "Settings": {"ShareName": ".."}}, "invalid-input"),
        ("start", {"id": "../x"}, "invalid-input"),
        ("start", {"id": "x", "spec": 7}, "invalid-input"),
        ("exec", {"container": "x", "key": "y"}, "container-not-running"),
        ("kill", {"key": "x"}, "process-not-running"),
    ],
)  # fmt: skip
def test_requests_that_are_wrong(data, tmp_path, method, params, code):
    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            with pytest.raises(HoldfastError) as caught:
                await machine.request(method, params, 5)
            assert caught.value.code == code
            assert await machine.request("ping", {}, 5) == {}

    asyncio.run(main())


# -- machines that die ----------------------------------------------------------------------------


def test_a_killed_qemu_fails_every_waiter_at_once(data, tmp_path):
    async def main() -> None:
        async with cloned(data, tmp_path) as machine:
            settings = {"MountPath": "/run/mounts/scsi/m0", "Controller": 0, "Lun": 5}
            request = {"ResourceType": "MappedVirtualDisk", "RequestType": "Add", "Settings": settings}
            waiters = [asyncio.ensure_future(machine.request("modify", request, 60)) for _ in range(3)]
            await machine.request("ping", {}, 5)
            os.kill(machine.pid, signal.SIGKILL)
            async with asyncio.timeout(5):
                results = await asyncio.gather(*waiters, return_exceptions=True)
                await machine.died
            for result in (*results, *(await asyncio.gather(machine.plugged(), return_exceptions=True))):
                assert isinstance(result, MachineFailed)
                assert result.code == "machine-died"
                assert "killed by signal 9; last on its console:" in result.why

    asyncio.run(main())


def privileged(tmp_path: Path, script: str) -> Path:
    """A bundle whose root may do to the guest what root may do."""
    names = (*CAPABILITIES, "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_MKNOD", "CAP_SYS_RAWIO", "CAP_DAC_READ_SEARCH")
    return make_bundle(
        tmp_path / "privileged",
        ["sh", "-c", script],
        process={"capabilities": {kind: [*names] for kind in ("bounding", "effective", "permitted")}},
    )


def test_a_panic_of_the_guests_kernel(pod, tmp_path):
    """Nobody waits for a deadline, and the error has the kernel's own words."""
    qemu = pod.inspect().qemu_pid
    with start(pod, "echo up; sleep 1000", name="beside") as session:
        session.wait_for(b"up")
        with pytest.raises(HoldfastError) as caught:
            pod.run(bundle=privileged(tmp_path, "echo up; echo c > /proc/sysrq-trigger; sleep 100"))
        assert caught.value.code == "machine-died"
        assert "sysrq triggered crash" in str(caught.value)
        with pytest.raises(HoldfastError) as caught:
            session.wait()
        assert "sysrq triggered crash" in str(caught.value)
    pod.remove()
    assert not is_running(qemu)
    assert_nothing_held(pod.root)


# -- starting -------------------------------------------------------------------------------------


def test_a_boot_of_its_own(data, state_root):
    with holdfast.Pod(root=state_root, data=data, template="none") as pod:
        assert pod.inspect().started_from == "boot"
        assert output(sh(pod, "echo booted")) == "booted\n"


def test_memory_and_processors_as_asked(data, state_root):
    with holdfast.Pod(root=state_root, data=data, memory="300M", cpus=2, template="none") as pod:
        guest = pod.inspect().guest
        assert (guest["cpus"], pod.inspect().memory_bytes) == (2, 300 << 20)
        assert 220 << 20 < guest["memory_bytes"] < 300 << 20
        assert output(sh(pod, "grep -c processor /proc/cpuinfo")) == "2\n"


def test_too_little_memory(data, state_root):
    with pytest.raises(InvalidInput) as caught:
        holdfast.Pod(root=state_root, data=data, memory=MIN_MEMORY_BYTES - (1 << 20))
    assert caught.value.code == "too-little-memory"
    assert f"{MIN_MEMORY_BYTES >> 20}M" in caught.value.hint
    assert_nothing_held(state_root)


def test_the_least_memory_boots_and_runs(own_data, state_root):
    least = holdfast.Pod(root=state_root, data=own_data, memory=MIN_MEMORY_BYTES)
    with least as pod, running(pod, "one"), running(pod, "two"):
        assert output(sh(pod, "dd if=/dev/zero of=/x bs=1M count=50 2>/dev/null; echo the least")) == "the least\n"


def test_too_little_memory_that_nobody_checked(data, tmp_path):
    """The guest's kernel gives up, and that is seen at once and said in its words."""
    export = tmp_path / "export"
    export.mkdir()
    ram = tmp_path / "ram"
    ram.write_bytes(b"")
    os.truncate(ram, 32 << 20)

    async def main() -> None:
        await vm.start(
            machine_config(data, 32 << 20), ram_path=str(ram), ram_shared=True, export=str(export),
            console_log=str(tmp_path / "console"), boot_seconds=20,
        )  # fmt: skip

    with pytest.raises(HoldfastError) as caught:
        asyncio.run(main())
    assert caught.value.code in ("machine-died", "timed-out", "machine-failed")
    assert "last on its console" in str(caught.value)


def patched_pod(state_root: Path, data: Path, patch: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Starts a pod in another process whose monitor, too, runs ``patch`` first; prints what was said, and the error."""
    program = f"""
import json, os
from holdfast.pod import launch
launch._START = launch._START.replace("from holdfast.pod.monitor", {(patch + "; from holdfast.pod.monitor")!r})
import holdfast
said = []
try:
    with holdfast.Pod(root={str(state_root)!r}, data={str(data)!r}, say=said.append) as pod:
        print(json.dumps(dict(said=said, accelerator=pod.inspect().accelerator)))
except holdfast.HoldfastError as error:
    print(json.dumps(dict(said=said, error=error.as_dict(), text=str(error))))
"""
    assert "from holdfast.pod.monitor" in launch._START
    return subprocess.run(
        python_program(program),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def patched(*arguments: Any, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(patched_pod(*arguments, **environment).stdout)
    return found


def patch_qemu(path: Path) -> str:
    return f"from holdfast.machine import accelerator, config; accelerator.QEMU = config.QEMU = {str(path)!r}"


def test_no_qemu(data, state_root):
    found = patched(state_root, data, patch_qemu(Path("/no/such/qemu")))
    assert found["error"]["code"] == "qemu-not-found"
    assert "/no/such/qemu" in found["text"]
    assert "apt install qemu-system-x86" in found["text"]
    assert_nothing_held(state_root)


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 3\n", "not a program"])
def test_a_qemu_that_is_none(own_data, state_root, tmp_path, content):
    broken = tmp_path / "qemu"
    broken.write_text(content)
    broken.chmod(0o755)
    found = patched(state_root, own_data, patch_qemu(broken))
    assert found["error"]["code"] != "internal"
    assert str(broken) in found["text"] or "QEMU" in found["text"]
    assert_nothing_held(state_root)


def test_no_kernel(own_data, state_root, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.rmtree(own_data / "guests")
    # Host() without arguments is the host itself: let it be one without kernels.
    patch = (
        "from pathlib import Path; from holdfast.machine import guest_image; "
        "real = guest_image.Host; "
        f"guest_image.Host = lambda: real(Path({str(empty)!r}), Path({str(empty)!r}))"
    )
    found = patched(state_root, own_data, patch)
    assert found["error"]["code"] in ("kernel-not-found", "not-found")
    assert "linux-image" in found["text"]
    assert_nothing_held(state_root)


# -- templates ------------------------------------------------------------------------------------


def _truncate_state(folder: Path) -> None:
    os.chmod(folder / "state", 0o600)
    os.truncate(folder / "state", 1000)


def _flip_state(folder: Path) -> None:
    os.chmod(folder / "state", 0o600)
    with open(folder / "state", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def _touch_ram(folder: Path) -> None:
    os.utime(folder / "ram")


def _lose_ram(folder: Path) -> None:
    (folder / "ram").unlink()


def _break_record(folder: Path) -> None:
    (folder / "template.json").write_text('{"version": 1, "key')


def _change_version(folder: Path) -> None:
    record = json.loads((folder / "template.json").read_text())
    (folder / "template.json").write_text(json.dumps({**record, "version": 999}))


def _change_key(folder: Path) -> None:
    record = json.loads((folder / "template.json").read_text())
    (folder / "template.json").write_text(json.dumps({**record, "key": "f" * 24}))


HARMS = (
    (_truncate_state, "state has changed"),
    (_flip_state, "state has changed"),
    (_lose_ram, "ram"),
    (_break_record, "truncated"),
    (_change_version, "version 999"),
    (_change_key, "f" * 24),
    (_touch_ram, "RAM file has changed"),  # the last: the copies share the file
)


def test_damaged_templates_are_found_out(data, tmp_path):
    key = machine_config(data).key
    whole = data / "templates" / key
    for number, (harm, word) in enumerate(HARMS):
        folder = tmp_path / str(number) / "templates" / key
        folder.mkdir(parents=True)
        for name in ("state", "template.json"):
            shutil.copyfile(whole / name, folder / name)
        if number == 0:
            shutil.copyfile(whole / "ram", tmp_path / "ram")
            shutil.copystat(whole / "ram", tmp_path / "ram")
        os.link(tmp_path / "ram", folder / "ram")
        record = json.loads((whole / "template.json").read_text())
        status = (folder / "ram").stat()
        record["ram_identity"] = [status.st_size, status.st_mtime_ns, status.st_ino]
        (folder / "template.json").write_text(json.dumps(record))
        assert template.load(tmp_path / str(number), key)[1].key == key
        harm(folder)
        with pytest.raises(Corrupt) as caught:
            template.load(tmp_path / str(number), key)
        assert caught.value.code == "template-damaged"
        assert word in caught.value.why


def test_a_damaged_template_is_not_used_and_made_again(own_data, state_root):
    """Said, rebuilt, and good afterwards; a folder without a record is in nobody's way."""
    folder = own_data / "templates" / machine_config(own_data).key
    said: list[str] = []

    def start_one() -> None:
        said.clear()
        with holdfast.Pod(root=state_root, data=own_data, say=said.append) as pod:
            assert pod.inspect().state == "running"

    start_one()
    assert [text for text in said if "booting a machine once" in text]
    start_one()
    assert said == []
    _truncate_state(folder)
    start_one()
    assert folder.name in said[0]
    assert "state has changed" in said[0]
    assert "built again" in said[0]
    assert "booting a machine once" in said[1]
    start_one()
    assert said == []
    (folder / "template.json").unlink()
    start_one()
    start_one()
    assert said == []
    assert [path.name for path in folder.parent.iterdir() if "new" in path.name] == []


def test_what_a_dead_builder_left_is_swept(own_data, state_root):
    config = machine_config(own_data)
    leftover = own_data / "templates" / f".{config.key}.new-dead"
    leftover.mkdir(parents=True)
    (leftover / "ram").write_bytes(b"half")
    with holdfast.Pod(root=state_root, data=own_data):
        assert not leftover.exists()


# -- accelerators ---------------------------------------------------------------------------------


def wrapper(tmp_path: Path, on_kvm: str) -> Path:
    """A QEMU that does ``on_kvm`` when it is to use KVM, and notes that it was asked."""
    script = tmp_path / "qemu"
    script.write_text(
        f"""#!/bin/sh
case " $* " in *' -accel kvm '*) echo asked >> {tmp_path}/asked; {on_kvm};; esac
exec {QEMU} "$@"
"""
    )
    script.chmod(0o755)
    return script


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm to be asked for")
def test_a_probe_that_hangs_ends_on_tcg_once_per_host(own_data, data, state_root, tmp_path):
    (own_data / "accelerator.json").unlink()
    os.symlink(data / "templates", own_data / "templates")
    qemu = wrapper(tmp_path, "exec sleep 1000")
    patch = f"{patch_qemu(qemu)}; accelerator.PROBE_SECONDS = 1.5"
    found = patched(state_root, own_data, patch)
    assert found["accelerator"] == "tcg"
    assert any("using TCG" in text for text in found["said"])
    verdict = json.loads((own_data / "accelerator.json").read_text())
    assert verdict["accelerator"] == "tcg"
    assert "does not boot with KVM" in verdict["why"]
    again = patched(state_root, own_data, patch)
    assert (again["accelerator"], again["said"]) == ("tcg", [])
    assert (tmp_path / "asked").read_text() == "asked\n"
    # Another host, or a damaged record: asked again.
    (own_data / "accelerator.json").write_text("{")
    assert patched(state_root, own_data, patch)["accelerator"] == "tcg"
    assert (tmp_path / "asked").read_text() == "asked\n" * 2
    assert_nothing_held(state_root)


def test_the_accelerator_that_the_environment_names(own_data, data, state_root, tmp_path):
    (own_data / "accelerator.json").unlink()
    os.symlink(data / "templates", own_data / "templates")
    found = patched(state_root, own_data, "pass", HOLDFAST_ACCELERATOR="tcg")
    assert found["accelerator"] == "tcg"
    assert not (own_data / "accelerator.json").exists()
    found = patched(state_root, own_data, "pass", HOLDFAST_ACCELERATOR="steam")
    assert "HOLDFAST_ACCELERATOR" in found["text"]
    assert found["error"]["kind"] == "InvalidInput"
    assert_nothing_held(state_root)


def test_a_pods_machine_is_its_own(shared_pod, data, state_root):
    """Two pods at once: two machines, and what ends one is nothing to the other."""
    with holdfast.Pod(root=state_root, data=data) as other, running(shared_pod, "c"):
        assert other.inspect().qemu_pid != shared_pod.inspect().qemu_pid
        os.kill(other.inspect().qemu_pid, signal.SIGKILL)
        with pytest.raises(HoldfastError):
            sh(other, "true")
        assert output(shared_pod.exec("c", ["echo", "unharmed"])) == "unharmed\n"
