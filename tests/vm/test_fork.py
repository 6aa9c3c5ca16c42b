"""Forks of a running pod: every one has all that it had, at one moment, and nothing of what the others do."""

from __future__ import annotations

import hashlib
import time

import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.pod.client import STDOUT
from holdfast.storage.journal import Journal
from tests.images import is_clean, make_disk, run
from tests.vm.forks import Chain, digest, end, forks, idle, python, shell, side_by_side, until
from tests.vm.support import BUSYBOX, assert_nothing_held, output, sh, start, start_exec

#: Writes the same files everywhere, with what only the writer would write.
WRITE = """
i=0; while [ $i -lt 12 ]; do i=$((i+1)); yes "$0 $i" | head -c 70000 > /data/f$i; mv /data/f$i /data/g$i; done
ln -s $0 /data/link; mkdir /data/$0; rm /data/before; sync
"""
SUMS = "cd /data; cat g* | md5sum; readlink link; ls | tr '\\n' ' '"


@pytest.fixture(autouse=True)
def everything_is_let_go_of(state_root):
    yield
    assert_nothing_held(state_root)


def test_all_write_at_once(pod, tmp_path):
    """Eight children and their source, the same paths: each finds what it wrote itself, and its disk is whole."""
    idle(pod)
    shell(pod, "c", "mkdir /data; echo x > /data/before; sync")
    with forks(pod, 8) as children:
        everybody = [pod, *children]
        side_by_side(lambda one: shell(one, "c", WRITE.replace("$0", one.name)), everybody)
        for one in everybody:
            text = b"".join(
                (f"{one.name} {i}\n".encode() * 70000)[:70000] for i in sorted(range(1, 13), key=lambda n: f"g{n}")
            )
            sums, link, names = shell(one, "c", SUMS).splitlines()
            assert (sums.split()[0], link) == (hashlib.md5(text).hexdigest(), one.name)
            assert set(names.split()) == {one.name, "link", *(f"g{i}" for i in range(1, 13))}
        for one in everybody:
            with Chain(one) as chain:
                assert len(chain.fds) == 2
                end(one)
                assert is_clean(chain.flatten(tmp_path / "flat"))


def test_nothing_is_changed_by_it(pod, tmp_path):
    """With nothing written, the source's disks are the same byte for byte."""
    disk = make_disk(tmp_path / "disk", "ext4")
    idle(pod)
    pod.attach(f"type=disk,src={disk}", mounted=False)
    shell(pod, "c", "echo x > /file; sync")
    before, qemu = digest(disk), pod.inspect().qemu_pid
    with forks(pod) as [child], Chain(pod) as chain:
        was = chain.hashes()[0]
        assert shell(child, "c", "cat /file") == "x\n"
        for one in (pod, child):  # and whatever is written then, nothing goes into what both go on from
            shell(one, "c", f"echo {one.name} > /file; head -c 3000000 /dev/urandom > /more; sync")
        assert (digest(disk), chain.hashes()[0]) == (before, was)
        with forks(pod) as [other], Chain(pod) as longer:
            was = longer.hashes()[:2]
            shell(pod, "c", "rm /more; sync")
            shell(other, "c", "cat /more > /again; sync")
            assert longer.hashes()[:2] == was
    assert pod.inspect().qemu_pid == qemu
    assert shell(pod, "c", "cat /file") == f"{pod.name}\n"


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize("hot", [False, True])
def test_disks_of_the_users(pod, state_root, data, tmp_path, disk_format, hot):
    """The file that the user named is written to by the source alone, and a child has a copy of the moment."""
    disk = raw = make_disk(tmp_path / "disk", "ext4")
    if disk_format == "qcow2":
        disk = tmp_path / "disk.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk)
    mount = f"type=disk,src={disk},dst=/d"
    idle(pod, mounts=[] if hot else [mount])
    if hot:
        pod.attach(mount, container="c")
    shell(pod, "c", "echo before > /d/file; head -c 1000000 /dev/urandom > /d/random; sync")
    random = shell(pod, "c", "md5sum /d/random")
    with forks(pod, 2) as children:
        for one in (pod, *children):
            shell(one, "c", f"echo {one.name} > /d/{one.name}; echo {one.name} >> /d/file; sync")
        for one in (pod, *children):
            assert shell(one, "c", "cat /d/file; md5sum /d/random") == f"before\n{one.name}\n{random}"
            assert shell(one, "c", "ls /d").split() == sorted([one.name, "file", "lost+found", "random"])
        with Journal(state_root) as journal:  # the others have nothing to do with it
            assert {lease["pod"] for lease in journal.leases() if lease["path"] == str(disk)} == {pod.name}
        if hot:
            for one in (pod, *children):
                one.detach("/d", container="c")
                assert shell(one, "c", "ls / | grep -c '^d$'; true") == "0\n"
        else:
            side_by_side(end, [pod, *children])
    if disk_format == "qcow2":
        run("qemu-img", "check", disk)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw)
    assert is_clean(raw)
    assert run("debugfs", "-R", "cat /file", raw).stdout == f"before\n{pod.name}\n"


def test_a_pod_that_has_booted(state_root, data, tmp_path):
    """It goes on from a save of its own, and so a fork of it is like any other; so is what is saved."""
    file = str(tmp_path / "saved")
    with holdfast.Pod(root=state_root, data=data, template="none") as pod:
        assert pod.inspect().started_from == "boot"
        idle(pod)
        shell(pod, "c", "echo x > /file")
        with forks(pod, 2) as children:
            for one in (pod, *children):
                shell(one, "c", f"echo {one.name} >> /file")
            for one in (pod, *children):
                assert shell(one, "c", "cat /file") == f"x\n{one.name}\n"
        pod.save(file, stop=True)
    with holdfast.restore(file, root=state_root, data=data) as pod:
        assert shell(pod, "c", "head -n 1 /file") == "x\n"


def test_a_disk_that_is_only_read(pod, state_root, data, tmp_path):
    """Every child holds it too: nobody may write to it until the last of them is gone."""
    (tmp_path / "content").mkdir()
    (tmp_path / "content/file").write_text("shared\n")
    disk = make_disk(tmp_path / "disk", "ext4", tmp_path / "content")
    idle(pod, mounts=[f"type=disk,src={disk},dst=/d,ro"])
    with forks(pod) as [child], holdfast.Pod(root=state_root, data=data) as other:
        assert shell(child, "c", "cat /d/file") == "shared\n"
        with Journal(state_root) as journal:
            assert {lease["pod"] for lease in journal.leases()} == {pod.name, child.name}
        end(pod)
        with pytest.raises(HoldfastError) as caught:
            other.attach(f"type=disk,src={disk}")
        assert child.name in str(caught.value)
        end(child)
        other.detach(other.attach(f"type=disk,src={disk}"))


def test_generations(pod):
    """A fork of a fork of a fork; each goes on alone, whoever of its ancestors has ended."""
    idle(pod)
    shell(pod, "c", "echo 0 > /line")
    pods = [pod]
    try:
        for number in range(1, 7):
            [child] = pods[-1].fork()
            pods.append(child)
            shell(pods[-2], "c", "echo elsewhere > /line; sync")
            shell(child, "c", f"echo {number} >> /line; echo {number} > /{number}; sync")
        pods[2].remove()
        for number, one in enumerate(pods):
            if number == 2:
                continue
            lines = [str(n) for n in range(number + 1)] if number == 6 else ["elsewhere"]
            assert shell(one, "c", "cat /line").split() == lines
            assert output(sh(one, "echo new")) == "new\n"
    finally:
        for one in pods[1:]:
            one.close()


def test_processes(pod):
    """Those of containers, further ones, with input and with terminals: all go on; what they print goes to logs."""
    loop = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    with (
        start(pod, "echo ready; cat; sleep 1000", name="in", stdin=True) as reader,
        start(pod, f"stty size; {loop}", name="tty", terminal=True) as terminal,
    ):
        idle(pod)
        reader.wait_for(b"ready")
        terminal.wait_for(b"24 80")
        with start_exec(pod, "c", ["sh", "-c", f"echo started; {loop.replace('echo', 'echo exec')}"]) as more:
            more.wait_for(b"exec 3")
            with forks(pod) as [child]:
                folder = child.root / "pods" / child.name
                for log, text in (("tty.log", b"\r\n"), ("c.exec1.log", b"exec ")):
                    until(lambda log=log, text=text: (folder / log).read_bytes().count(text) > 3)
                # No line is torn, lost or doubled where the copy was made.
                numbers = [int(line.split()[1]) for line in (folder / "c.exec1.log").read_text().splitlines()[:-1]]
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                assert child.exec("tty", ["true"]).status == 0
                reader.write(b"to the source\n")
                reader.wait_for(b"to the source")
                assert not (folder / "in.log").read_bytes()
                child.kill("in", 15)
                child.kill("in", 9)
                assert child.wait("in") == 137
                assert pod.exec("in", ["true"]).status == 0
                more.wait_for(b"exec %d" % (numbers[-1] + 1))
            count = more.output[STDOUT].count(b"\n")
            seen = [int(line.split()[1]) for line in bytes(more.output[STDOUT]).splitlines()[1:count]]
            assert seen == list(range(1, len(seen) + 1))


def test_an_end_right_then(pod):
    """Containers that end before, during and after it: everybody knows the exit status, and has all of the output."""
    stagger = "sandbox://go"
    mount = {"type": "bind", "source": stagger, "destination": "/go", "options": ["rbind"]}
    names = []
    for number in range(6):
        quiet = "exec >/dev/null 2>&1; " if number % 2 else ""
        script = f"{quiet}while [ ! -e /go/{number} ]; do sleep 0.02; done; echo the end; exit {number + 3}"
        pod.run(BUSYBOX, ["sh", "-c", script], name=f"c{number}", detach=True, mounts=[mount])
        names.append(f"c{number}")
    idle(pod, "go", mounts=[mount])
    shell(pod, "go", "(for i in 0 1 2 3 4 5; do touch /go/$i; sleep 0.06; done) > /dev/null 2>&1 &")
    with forks(pod, 2) as children:
        for one in (pod, *children):
            assert [one.wait(name) for name in names] == list(range(3, 9)), one.name
    assert [(pod.root / "pods" / pod.name / f"{n}.log").read_text() for n in names[::2]] == ["the end\n"] * 3


def test_no_two_are_the_same(pod):
    """Names, ids, the random numbers of the kernel, and the clock."""
    python(pod, "r", RANDOM, cwd="/tmp")
    until(lambda: shell(pod, "r", "ls /tmp").strip())
    with forks(pod, 3) as children:
        everybody = [pod, *children]
        texts = side_by_side(
            lambda one: shell(one, "r", "touch stop; while [ ! -e done ]; do sleep 0.05; done; cat drawn"), everybody
        )
        drawn = [dict(line.split() for line in text.splitlines()) for text in texts]
        for number, one in enumerate(drawn):
            assert len(one) > 100
            for other in drawn[:number]:
                # Drawn at the same moment before, and by nobody twice: the time is taken first.
                assert [value for value in one.keys() & other.keys() if one[value] != other[value]] == []
        uuids = [shell(one, "r", "cat /proc/sys/kernel/random/uuid") for one in everybody]
        assert len(set(uuids)) == len(everybody)
        for one in everybody:
            assert abs(float(shell(one, "r", "date +%s")) - time.time()) < 3


RANDOM = """
import os, time
lines = []
open("up", "w").close()
while not os.path.exists("stop"):
    at = time.monotonic_ns()
    lines.append(b"%s %d\\n" % (os.getrandom(16).hex().encode(), at))
with open("drawn", "wb") as file:
    file.writelines(lines)
os.rename("stop", "done")
time.sleep(1000)
"""
