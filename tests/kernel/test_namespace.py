"""What is particular to pods in namespaces: how they end, what they keep to themselves, and what they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import GuestFailed, HoldfastError, InUse, NotFound, NotReleased, Unsupported
from holdfast.guest.host import DEFAULT_LIMITS
from holdfast.machine import cgroups
from holdfast.spec.default import default_mounts, spec_for_image
from holdfast.storage.journal import Journal
from tests import leaks
from tests.images import is_clean, make_bundle, make_disk
from tests.kernel import namespace_pods
from tests.vm import cli
from tests.vm.support import BUSYBOX, assert_nothing_held, holds, is_running, output, running, sh, start, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator

data, pod, shared_pod = namespace_pods.FIXTURES
#: Writes for ever, so that whatever is killed is killed in the middle of it.
BUSY = "while :; do echo data > /d/file; mv /d/file /d/other; done & echo up; cat"
CAP_SYS_RESOURCE = 24


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "ext4", size="32M")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def groups_of(root: Path, pod: str) -> list[str]:
    """Control groups of a pod, in every hierarchy."""
    group = cgroups.of_pod(root, pod)
    return [top + group for top in cgroups._hierarchies() if os.path.exists(top + group)]


def new(root: Path, data: Path, name: str | None = None, *, detached: bool = False) -> holdfast.Pod:
    return holdfast.Pod(name, isolation="namespace", root=root, data=data, detached=detached)


# -- how it ends ----------------------------------------------------------------------------------


def test_nothing_of_a_pod_is_left(data, state_root, disk):
    with new(state_root, data) as pod:
        info = pod.inspect()
        assert (info.isolation, info.accelerator, info.memory_bytes, info.cpus) == ("namespace", "", 0, 0)
        assert info.guest["runtime"] == cgroups.choose_runtime().path
        sh(pod, "echo kept > /d/new; sleep 1000", detach=True, mounts=[f"type=disk,src={disk},dst=/d"])
        assert groups_of(state_root, pod.name)
        assert len(leaks.loops_of(disk)) == 1
    # At once, but for others who look for a free device: who ends a pod may want its disks.
    assert leaks.no_loop_of(disk)
    assert groups_of(state_root, pod.name) == []
    wait_for_end(info.pid)
    assert not is_running(info.qemu_pid)
    assert_nothing_held(state_root)
    assert is_clean(disk)


def test_the_agent_is_killed_while_a_container_writes(data, state_root, disk):
    with new(state_root, data) as pod:
        info = pod.inspect()
        with start(pod, BUSY, name="c", stdin=True, mounts=[f"type=disk,src={disk},dst=/d"]) as session:
            session.wait_for(b"up")
            kill(info.qemu_pid)
            with pytest.raises(HoldfastError) as caught:
                session.wait()
        assert (caught.value.code, caught.value.exit_status) == ("machine-died", 125)
        assert "the agent was killed by signal 9" in str(caught.value)
    wait_for_end(info.pid)
    assert_nothing_held(state_root)
    assert leaks.no_loop_of(disk)
    assert is_clean(disk)  # the kernel has unmounted it: it is the host's, and goes on


def test_the_monitor_is_killed_while_a_container_writes(data, state_root, disk):
    """Its PID namespace takes the agent and the containers with it; their namespaces take the mounts and the loops."""
    pod = new(state_root, data, "lost", detached=True)
    info = pod.inspect()
    sh(pod, BUSY.replace("cat", "sleep 1000"), name="c", detach=True, mounts=[f"type=disk,src={disk},dst=/d"])
    pod.close()
    kill(info.pid)
    wait_for_end(info.qemu_pid)
    with Journal(state_root) as journal:
        assert not journal.is_alive("lost")
        assert groups_of(state_root, "lost")  # nothing takes these away by itself
        assert [one["kind"] for one in cli.answer("audit", status=1)["findings"]].count("pod") == 1
    assert "let go of pod lost" in cli.text("gc")
    assert groups_of(state_root, "lost") == []
    assert cli.answer("audit")["clean"]
    with new(state_root, data, "next") as pod:
        script = "ls /d >/dev/null; echo taken over"
        assert output(sh(pod, script, mounts=[f"type=disk,src={disk},dst=/d"])) == "taken over\n"
    assert_nothing_held(state_root)
    assert is_clean(disk)


def test_a_dead_pods_name_can_be_used_again(data, state_root):
    pod = new(state_root, data, "again", detached=True)
    pid = pod.inspect().pid
    sh(pod, "sleep 1000", detach=True)
    pod.close()
    kill(pid)
    with new(state_root, data, "again") as pod:
        assert output(sh(pod, "echo well")) == "well\n"
    assert groups_of(state_root, "again") == []
    assert_nothing_held(state_root)


def test_a_group_that_is_used_is_not_forgotten(data, state_root):
    """Somebody has put a process there."""
    with new(state_root, data, "held") as pod, running(pod, "c"):
        [top, *_] = groups_of(state_root, "held")
    os.mkdir(top)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        try:
            Path(f"{top}/cgroup.procs").write_text(str(process.pid))
            with pytest.raises(NotReleased) as caught:
                cgroups.remove(f"/{os.path.basename(top)}", seconds=0.05)
            assert caught.value.code == "cgroup-busy"
        finally:
            process.kill()
    cgroups.remove(f"/{os.path.basename(top)}")
    assert not os.path.exists(top)


def test_a_disk_that_the_host_has_open_is_not_released(shared_pod, disk):
    path = shared_pod.attach(f"type=disk,src={disk}")
    [loop] = leaks.loops_of(disk)
    with open(loop, "rb"):
        with pytest.raises(NotReleased) as caught:
            shared_pod.detach(path)
        assert loop in str(caught.value)
        assert shared_pod.storage()["free_slots"] == 255
    shared_pod.detach(path)
    assert leaks.no_loop_of(disk)
    assert shared_pod.storage()["free_slots"] == 256


# -- what it keeps to itself ----------------------------------------------------------------------


def test_its_mounts_are_not_the_host_s(pod, disk, tmp_path):
    before = Path("/proc/self/mountinfo").read_text()
    with running(pod, "c", [f"type=disk,src={disk},dst=/d", f"type=bind,src={tmp_path},dst=/b"]):
        assert Path("/proc/self/mountinfo").read_text() == before
        assert not os.path.exists("/run/mounts/scsi")


def test_a_bundle_without_namespaces_of_its_own_has_none_of_the_host_s(shared_pod, tmp_path):
    """What it shares then is the sandbox's: no network, its own process 1, its own host name."""
    script = (
        "tail -n +3 /proc/net/dev | cut -d: -f1; tr '\\0' ' ' < /proc/1/cmdline; echo; cat /proc/sys/kernel/hostname"
    )
    own = {"namespaces": [{"type": "mount"}]}
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", script], hostname="", linux=own)
    network, process, name = output(shared_pod.run(bundle=bundle)).split("\n")[:3]
    assert network.strip() == "lo"
    assert "holdfast.guest.host" in process
    assert name == "holdfast"


def test_descriptors_of_the_agent_are_not_a_container_s(shared_pod):
    fds = output(sh(shared_pod, "for fd in /proc/$$/fd/*; do readlink $fd; done; true")).splitlines()
    assert len(fds) >= 3
    assert [fd for fd in fds if not fd.startswith(("/dev/null", "pipe:"))] == []
    # Not that the runtime would have to close them: neither it nor any other program gets them.
    of_agent = Path(f"/proc/{shared_pod.inspect().qemu_pid}/fdinfo")
    flags = {int(fd.name): int(fd.read_text().split("flags:")[1].split()[0], 8) for fd in of_agent.iterdir()}
    assert len(flags) > 4
    assert [fd for fd, bits in flags.items() if fd > 2 and not bits & os.O_CLOEXEC] == []


def test_a_pod_cannot_be_told_to_set_the_host_s_clock(shared_pod):
    assert b"holdfast.guest.host" in Path(f"/proc/{shared_pod.inspect().qemu_pid}/cmdline").read_bytes()
    from holdfast.guest.host import HostAgent, HostRuntime

    reader, writer = os.pipe()
    try:
        assert "resume" not in HostAgent(reader, HostRuntime(()))._methods
    finally:
        os.close(reader)
        os.close(writer)
        _forget_host()


def _forget_host() -> None:
    from holdfast.guest import disks, shares

    disks.places, shares.export = disks.Scsi(), ""


def test_setuid_programs_of_a_bundle_work_and_those_of_a_share_do_not(shared_pod, tmp_path):
    """A bundle's root filesystem is its program files; as with runc, that includes su."""
    where = "grep -E ' (/|/s) ' /proc/mounts | cut -d' ' -f2,4 | sed 's/ .*nosuid.*/ nosuid/; s/ rw.*/ suid/'"
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", where])
    (tmp_path / "s").mkdir()
    lines = output(shared_pod.run(bundle=bundle, mounts=[f"type=bind,src={tmp_path}/s,dst=/s"])).splitlines()
    assert sorted(lines) == ["/ suid", "/s nosuid"]


# -- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def block_device(disk: Path) -> Iterator[str]:
    device = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True, check=True)
    yield device.stdout.strip()
    subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


def test_two_pods_read_one_block_device_and_each_lets_go_of_its_own(data, state_root, block_device):
    """Used directly, the device would look busy to the one as long as the other has it mounted."""
    mount = f"type=physical-disk,src={block_device},dst=/d,ro,access=group"
    with new(state_root, data) as first, new(state_root, data) as second, running(first, "c", [mount]):
        assert sh(second, "ls /d", mounts=[mount]).status == 0
        assert second.storage()["free_slots"] == 256
    assert_nothing_held(state_root)


def test_a_writer_has_a_block_device_alone(data, state_root, block_device):
    with new(state_root, data) as pod, running(pod, "c", [f"type=physical-disk,src={block_device},dst=/d"]):
        with pytest.raises(OSError, match="busy"):
            os.open(block_device, os.O_RDONLY | os.O_EXCL)
        mounted = subprocess.run(["mount", block_device, "/mnt"], capture_output=True, text=True, check=False)
        assert mounted.returncode


def test_pods_of_two_state_roots_do_not_both_write_to_a_file(data, state_root, tmp_path, disk):
    """They know nothing of each other's leases; the locks on the file are QEMU's."""
    mount = f"type=disk,src={disk},dst=/d"
    (tmp_path / "r").mkdir()
    with new(state_root, data) as first, new(tmp_path / "r", data) as second:
        with running(first, "c", [mount]):
            for access in ("", ",ro"):
                with pytest.raises(InUse) as caught:
                    sh(second, "true", mounts=[mount + access])
                assert (caught.value.code, caught.value.subject) == ("disk-in-use", str(disk))
            read = ["qemu-img", "convert", "-O", "raw", disk, tmp_path / "copy"]
            refused = subprocess.run(read, capture_output=True, text=True, check=False)
            assert 'Failed to get shared "write" lock' in refused.stderr
        with running(first, "c", [mount + ",ro"]):
            assert sh(second, "ls /d", mounts=[mount + ",ro"]).status == 0
            with pytest.raises(InUse):
                sh(second, "true", mounts=[mount])


def test_a_partition_is_found_where_the_kernel_knows_tables(shared_pod, tmp_path):
    """This host's kernel may know none: then the disk has no such partition, and that is said."""
    from tests.vm.test_disk_kinds import partitioned

    disk = partitioned(tmp_path / "disk", make_disk(tmp_path / "part", "ext4"))
    run = lambda: sh(shared_pod, "echo found", mounts=[f"type=disk,src={disk},dst=/p,partition=1"])  # noqa: E731
    if _knows_partitions(disk):
        assert output(run()) == "found\n"
    else:
        with pytest.raises(NotFound) as caught:
            run()
        assert caught.value.code == "no-partition"
    assert shared_pod.storage()["free_slots"] == 256


def _knows_partitions(disk: Path) -> bool:
    loop = subprocess.run(["losetup", "-f", "--show", "-P", disk], capture_output=True, text=True, check=True)
    name = loop.stdout.strip()
    try:
        return os.path.exists(f"/sys/class/block/{os.path.basename(name)}/{os.path.basename(name)}p1")
    finally:
        subprocess.run(["losetup", "-d", name], check=True)


def test_scratch_grows_where_the_host_lets_us(shared_pod):
    """The ioctl needs CAP_SYS_RESOURCE on the host, where a machine has a kernel of its own to ask."""
    script = "echo up; cat >/dev/null; df -k / | tail -n 1 | awk '{print $2}'"
    with start(shared_pod, script, name="g", stdin=True, scratch_bytes=32 << 20) as session:
        session.wait_for(b"up")
        if holds(CAP_SYS_RESOURCE):
            shared_pod.grow_scratch("g", "64M")
        else:
            with pytest.raises(GuestFailed, match="Permission denied"):
                shared_pod.grow_scratch("g", "64M")
        session.end_input()
        assert session.wait() == 0


def test_traffic_is_counted(pod, disk):
    with running(pod, "c", [f"type=disk,src={disk},dst=/d"]) as name:
        pod.exec(name, ["sh", "-c", "head -c 1048576 /dev/urandom > /d/file; sync"])
        [found] = [one for one in pod.storage()["attachments"] if one["kind"] == "disk"]
        assert found["written_bytes"] >= 1 << 20


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "subject"),
    [({"memory": "512M"}, "--memory"), ({"cpus": 2}, "--cpus"), ({"template": "none"}, "--template"),
     ({"pmem": True}, "--pmem"), ({"ports": True}, "--device")],
)  # fmt: skip
def test_what_only_a_machine_has_is_refused(data, state_root, options, subject):
    with pytest.raises(Unsupported) as caught:
        holdfast.Pod(isolation="namespace", root=state_root, data=data, **options)
    assert (caught.value.code, caught.value.subject) == ("isolation-unsupported", subject)
    assert_nothing_held(state_root)


@pytest.mark.parametrize("options", [{"verity": True}, {"encrypt_scratch": True}])
def test_mapped_disks_are_refused(shared_pod, options):
    """They would stay when the pod is killed: nothing ends a mapped device with its last user."""
    with pytest.raises(Unsupported) as caught:
        sh(shared_pod, "true", **options)
    assert caught.value.code == "isolation-unsupported"
    assert shared_pod.storage()["free_slots"] == 256


def test_images_that_the_kernel_cannot_read_are_refused(shared_pod, tmp_path):
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    with pytest.raises(Unsupported) as caught:
        sh(shared_pod, "true", mounts=[f"type=disk,src={image},dst=/d"])
    assert (caught.value.code, caught.value.subject) == ("disk-format", str(image))
    assert "qemu-img convert" in caught.value.hint
    assert shared_pod.storage()["free_slots"] == 256


# -- runtimes and limits --------------------------------------------------------------------------


def test_crun_is_chosen_where_it_runs(tmp_path):
    """It refuses a host with both versions of control groups; one runtime is never tried after the other."""
    programs, groups = tmp_path / "bin", tmp_path / "cgroup"
    programs.mkdir()
    groups.mkdir()

    def add(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).touch(0o755)

    with pytest.raises(Unsupported) as caught:
        cgroups.choose_runtime(str(groups), (str(programs),))
    assert (caught.value.code, caught.value.hint) == ("no-runtime", "apt install runc")
    add(programs, "crun", "runc")
    assert cgroups.choose_runtime(str(groups), (str(programs),))[:2] == (f"{programs}/runc", ())
    add(groups, "cgroup.controllers")
    chosen = cgroups.choose_runtime(str(groups), (str(programs),))
    assert chosen[:2] == (f"{programs}/crun", ("--cgroup-manager=cgroupfs",))


def test_limits_that_nobody_asked_for_are_those_of_images():
    class Config:
        entrypoint, cmd, env, user, working_dir, stop_signal = (), ("sh",), (), "", "", ""

    spec = spec_for_image(Config()).raw
    assert {limit["type"]: limit["hard"] for limit in spec["process"]["rlimits"]} == DEFAULT_LIMITS
    assert default_mounts()


def test_a_limit_that_was_asked_for_is_not_lowered(shared_pod, tmp_path):
    """The runtime's refusal is the answer, on a host that does not let us raise it."""
    limit = {"type": "RLIMIT_NOFILE", "hard": 1048575, "soft": 1048575}
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", "ulimit -n"], process={"rlimits": [limit]})
    if holds(CAP_SYS_RESOURCE):
        assert output(shared_pod.run(bundle=bundle)) == "1048575\n"
    else:
        with pytest.raises(GuestFailed, match="rlimit"):
            shared_pod.run(bundle=bundle)


# -- the command ----------------------------------------------------------------------------------


def test_by_command(data, state_root, tmp_path):
    assert cli.text("run", "--isolation", "namespace", BUSYBOX, "echo", "hello") == "hello\n"
    assert cli.holdfast("run", "--isolation", "namespace", BUSYBOX, "sh", "-c", "exit 7").returncode == 7
    cli.text("pod", "create", "--isolation", "namespace", "p")
    try:
        (tmp_path / "file").write_text("shared\n")
        cli.text("run", "--pod", "p", "--name", "c", "-d", "-v", f"{tmp_path}:/s", BUSYBOX, "sleep", "1000")
        assert cli.text("exec", "p/c", "cat", "/s/file") == "shared\n"
        assert [pod["isolation"] for pod in cli.answer("ps")] == ["namespace"]
        assert "runtime:" in cli.text("pod", "inspect", "p")
        assert cli.answer("audit")["clean"]
    finally:
        cli.text("pod", "remove", "--force", "p")
    assert_nothing_held(state_root)
    assert cli.fails("run", "--isolation", "namespace", "--memory", "1G", BUSYBOX)["code"] == "isolation-unsupported"


def test_the_doctor_says_what_pods_in_namespaces_have(data, state_root):
    [check] = [one for one in cli.answer("doctor")["checks"] if one["name"] == "namespace pods"]
    assert check["state"] == "ok"
    assert cgroups.choose_runtime().path in check["what"]
