"""Mounts that are empty in every copy of their pod (``fork=fresh``), and full in the pod itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.pod import templates
from holdfast.spec.default import CAPABILITIES
from tests import leaks
from tests.images import busybox_tree, is_clean, make_bundle, make_disk
from tests.vm.forks import Chain, end, forks, idle, python, shell, until
from tests.vm.support import BUSYBOX, assert_nothing_held, output, sh, start_exec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VOLUME, TEMPLATE = "test-fresh", "test-fresh"
HOT_BYTES = 24 << 20
PLACES = ("/d", "/v", "/t", "/hot")
FILL = """
echo kept > file; mkdir -p a/b 'odd
name'; echo x > a/b/c; ln file a/second; ln -s / root; mkfifo fifo; echo x > 'odd
name/x'; i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i > a/b/$i; done; chmod 0 a
"""
#: A program in a mount, which ends with the shell that has started it.
RUN = """
/hot/sleep 1000 & trap 'kill $!; wait $!; exit' TERM
until [ "$(readlink /proc/$!/exe)" = /hot/sleep ]; do :; done; echo started; wait
"""
#: Ends the first of its threads; another says what is in a mount, again and again.
ENDS = """
import ctypes, os, threading, time
open("/t/file", "w").close()
def say():
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    while True:
        with open("/seen/new", "w") as file:
            file.write(str(os.listdir("/t")))
        os.rename("/seen/new", "/seen/now")
        time.sleep(0.05)
threading.Thread(target=say).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of this thread alone
"""
#: What is seen of a mount, but for what is in it: its line in the mount table, and how large it is.
LOOKS = "grep -E ' (/d|/v|/t|/hot) ' /proc/self/mountinfo; df -k /d /v /t /hot | tr -s ' ' | cut -d' ' -f2"


@pytest.fixture(scope="module")
def pod(data: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[holdfast.Pod]:
    """A pod with a container that has one of every kind, filled; and one mount that is copied as ever."""
    folder, root = tmp_path_factory.mktemp("fresh"), run_folder / "fresh"
    leaks.expect(root)
    volumes = holdfast.volumes(root=root, data=data)
    with leaks.long_lived():
        volumes.remove(VOLUME, missing_ok=True)
        volumes.create(VOLUME, "32M")
        disk, hot = make_disk(folder / "disk", "ext4"), make_disk(folder / "hot", "ext4", size="24M")
        pod = holdfast.Pod("source", root=root, data=data)
        mounts = [
            f"type=disk,src={disk},dst=/d,fork=fresh", f"type=volume,src={VOLUME},dst=/v,fork=fresh",
            "type=tmpfs,dst=/t,size=4M,fork=fresh", "type=tmpfs,dst=/copied",
        ]  # fmt: skip
        idle(pod, mounts=mounts)
        pod.attach(f"type=disk,src={hot},dst=/hot,fork=fresh", container="c")
        for place in PLACES:
            shell(pod, "c", f"cd {place}; {FILL}")
        shell(pod, "c", "echo kept > /copied/file; echo kept > /file; sync")
    with pod:
        yield pod
    volumes.remove(VOLUME)
    assert_nothing_held(root)


def check_empty(pod: holdfast.Pod) -> None:
    for place in PLACES:
        names = ["lost+found"] if place in ("/d", "/hot") else []
        assert shell(pod, "c", f"ls -A {place}").split() == names, (pod.name, place)
    assert shell(pod, "c", "ls -A /d/lost+found /hot/lost+found | grep -v :").split() == []
    assert shell(pod, "c", "cat /copied/file /file") == "kept\nkept\n"


def check_full(pod: holdfast.Pod) -> None:
    for place in PLACES:
        found = shell(pod, "c", f"cd {place}; cat file a/second a/b/300; ls a/b | wc -l; readlink root; cat odd*/x")
        assert found == "kept\nkept\n300\n301\n/\nx\n", (pod.name, place)


def test_empty_in_copies_and_in_copies_of_copies(pod, tmp_path):
    """And what each writes there is its own."""
    looks = shell(pod, "c", LOOKS)
    with forks(pod, 2) as [child, sibling]:
        for one in (child, sibling):
            check_empty(one)
            assert shell(one, "c", LOOKS) == looks
        for place in PLACES:
            shell(child, "c", f"cd {place}; echo child > file; mkdir a; echo child > a/own")
            assert shell(sibling, "c", f"ls -A {place} | grep -v lost; true") == ""
        shell(child, "c", "sync")
        check_full(pod)
        with forks(child) as [grandchild]:
            check_empty(grandchild)
            shell(grandchild, "c", "echo x > /d/x; echo x > /t/x; sync")
            child.detach("/hot", container="c")
            found = shell(child, "c", "cat /d/file /v/a/own /t/a/own; ls /d").split()
            assert found == ["child"] * 3 + ["a", "file", "lost+found"]
            assert shell(grandchild, "c", "ls /hot") == "lost+found\n"
        with Chain(sibling) as chain:
            chain.only(HOT_BYTES)
            sibling.detach("/hot", container="c")
            assert is_clean(chain.flatten(tmp_path / "flat"))
    check_full(pod)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec < /t/file; echo started; exec sleep 1000", r"\(\w+\) has /t/file open \(fd/0\)"),
        ("exec 3> /d/new; echo started; exec sleep 1000", r"\(\w+\) has /d/new open \(fd/3\)"),
        ("cd /v/a/b; echo started; exec sleep 1000", r"\(\w+\) has /v/a/b open \(cwd\)"),
        ("cp /bin/busybox /hot/sleep; RUN", r"\(sleep\) has /hot/sleep open \(exe\)"),
    ],
)
def test_refused_while_a_process_uses_one(pod, script, why):
    """By its name; the source goes on, and can be copied when the process has ended."""
    with start_exec(pod, "c", ["sh", "-c", script.replace("RUN", RUN)]) as session:
        session.wait_for(b"started")
        with pytest.raises(HoldfastError, match=why) as caught:
            pod.fork()
        assert (caught.value.code, caught.value.subject) == ("fresh-in-use", "c")
        pod.kill(session.key, 15)
        session.wait()
    shell(pod, "c", "rm -f /d/new /hot/sleep; sync")
    check_full(pod)


def test_another_container_counts_too(pod):
    """Of what it has of the same volume; one that says another thing of copies cannot have it."""
    idle(pod, "other", mounts=[f"type=volume,src={VOLUME},dst=/w,ro"])
    with start_exec(pod, "other", ["sh", "-c", "cd /w; echo started; exec sleep 1000"]) as session:
        session.wait_for(b"started")
        with pytest.raises(HoldfastError, match="has /w open") as caught:
            pod.fork()
        assert caught.value.subject == "other"
        pod.kill(session.key, 15)
        session.wait()
    with forks(pod) as [child]:
        assert shell(child, "other", "ls -A /w") == ""
    with pytest.raises(HoldfastError) as caught:
        sh(pod, "true", mounts=[f"type=volume,src={VOLUME},dst=/w,fork=copy"])
    assert caught.value.code == "fork-policy"
    end(pod, "other")


def test_all_of_a_container_counts_wherever_its_first_process_is(pod):
    """Which has moved to a control group below the container's own, as an init does; others have stayed."""
    groups = {"type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup", "options": ["nosuid"]}
    script = """
    echo x > /t/file; sleep 1000 < /t/file & echo $! > /stayed
    mkdir /sys/fs/cgroup/init; echo $$ > /sys/fs/cgroup/init/cgroup.procs; echo moved > /moved
    wait; while :; do sleep 1000; done
    """
    memory = "type=tmpfs,dst=/t,fork=fresh"
    pod.run(BUSYBOX, ["sh", "-c", script], name="init", detach=True, mounts=[groups, memory])
    until(lambda: shell(pod, "init", "cat /moved 2>/dev/null; true"))
    assert shell(pod, "init", "cat /proc/1/cgroup; cat /sys/fs/cgroup/init/cgroup.procs").splitlines()[0] == "0::/init"
    with pytest.raises(HoldfastError, match=r"\(sleep\) has /t/file open \(fd/0\)") as caught:
        pod.fork()
    assert (caught.value.code, caught.value.subject) == ("fresh-in-use", "init")
    shell(pod, "init", "kill $(cat /stayed)")
    with forks(pod) as [child]:
        assert shell(child, "init", "ls /t") == ""
    assert shell(pod, "init", "cat /t/file") == "x\n"
    end(pod, "init")


def test_a_process_whose_first_thread_has_ended(pod):
    """Its memory is empty in copies no less: it goes on, though it looks like a zombie."""
    seen = {"type": "bind", "source": "sandbox://seen", "destination": "/seen", "options": ["rbind"]}
    idle(pod, "reader", mounts=[seen])
    python(pod, "threads", ENDS, mounts=[seen, "type=tmpfs,dst=/t,fork=fresh"])
    until(lambda: shell(pod, "reader", "cat /seen/now 2>/dev/null; true") == "['file']")
    with forks(pod) as [child]:
        until(lambda: shell(child, "reader", "cat /seen/now") == "[]")
    assert shell(pod, "reader", "cat /seen/now") == "['file']"
    for name in ("reader", "threads"):
        end(pod, name)


def test_an_overlay_over_one_is_refused(pod):
    """Its files are open in it, whoever has them open in the overlay, and nobody can tell."""
    idle(pod, "over", mounts=[f"type=volume,src={VOLUME},dst=/w,overlay"])
    with pytest.raises(HoldfastError, match="an overlay lies on it") as caught:
        pod.fork()
    assert caught.value.code == "not-forkable"
    end(pod, "over")


def test_what_goes_on_from_a_file_or_a_template_is_a_copy(pod, state_root, data, tmp_path):
    file = str(tmp_path / "saved")
    pod.save(file)
    with holdfast.restore(file, "restored", root=state_root, data=data) as restored:
        check_empty(restored)
        shell(restored, "c", "echo x > /t/x")
        with forks(restored) as [child]:
            check_empty(child)
    if TEMPLATE in templates.names(data):
        templates.remove(data, TEMPLATE)
    pod.make_template(TEMPLATE)
    try:
        with holdfast.Pod(template=TEMPLATE, root=state_root, data=data) as clone:
            check_empty(clone)
    finally:
        templates.remove(data, TEMPLATE)
    check_full(pod)
    assert_nothing_held(state_root)


def test_one_that_cannot_be_emptied_does_not_start(pod, tmp_path):
    """A filesystem that a container has made read-only: nothing is left of the copy, and the source goes on."""

    def remount(access: str) -> None:
        names = [*CAPABILITIES, "CAP_SYS_ADMIN"]
        bundle = make_bundle(
            tmp_path / "bundle", ["mount", "-t", "ext4", "-o", f"remount,{access}", "none", "/w"],
            root={"path": str(tmp_path / "busybox")},
            process={"capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names)},
        )  # fmt: skip
        assert pod.run(bundle=bundle, mounts=[f"type=volume,src={VOLUME},dst=/w"]).status == 0

    busybox_tree(tmp_path / "busybox")
    remount("ro")
    try:
        with pytest.raises(HoldfastError, match="Read-only") as caught:
            pod.fork()
        assert caught.value.code == "fresh-not-emptied"
        assert [folder.name for folder in (pod.root / "pods").iterdir()] == [pod.name]
        check_full(pod)
    finally:
        remount("rw")
    with forks(pod) as [child]:
        check_empty(child)


def test_a_pod_without_containers(data, state_root, tmp_path):
    """What is mounted in the guest alone."""
    disk = make_disk(tmp_path / "disk", "ext4")
    with holdfast.Pod(root=state_root, data=data) as pod:
        path = pod.attach(f"type=disk,src={disk},fork=fresh")
        view = {"type": "bind", "source": f"uvm://{path}", "destination": "/x", "options": ["rbind"]}
        assert output(sh(pod, "echo x > /x/file; ls /x", mounts=[view])) == "file\nlost+found\n"
        with forks(pod) as [child]:
            assert output(sh(child, "ls /x", mounts=[view])) == "lost+found\n"
        assert output(sh(pod, "cat /x/file", mounts=[view])) == "x\n"
    assert_nothing_held(state_root)
