"""Containers: their output, input, users, signals, terminals, and how many of them live side by side."""

from __future__ import annotations

import hashlib
import os
import signal
import threading

import pytest

import holdfast
from holdfast.errors import CommandNotExecutable, CommandNotFound, InUse, InvalidInput, NotFound
from holdfast.pod.client import STDERR, STDOUT, Client
from tests.images import make_bundle
from tests.vm.support import BUSYBOX, assert_holds_nothing, assert_nothing_held, output, running, sh, start, start_exec

MIB = 1 << 20


# -- output and input -----------------------------------------------------------------------------


def test_output_and_errors_are_apart_and_complete(shared_pod):
    result = sh(shared_pod, "seq 1 300000; seq 1 250000 >&2; exit 3")
    assert result.status == 3
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 300001))
    assert result.stderr == b"".join(b"%d\n" % n for n in range(1, 250001))


def test_input_of_several_mebibytes_comes_back(shared_pod):
    data = os.urandom(3 * MIB)
    result = shared_pod.run(BUSYBOX, ["cat"], stdin=data)
    assert (result.status, hashlib.sha256(result.stdout).digest()) == (0, hashlib.sha256(data).digest())


def test_input_ends(shared_pod):
    assert shared_pod.run(BUSYBOX, ["cat"], stdin=b"").stdout == b""
    assert shared_pod.run(BUSYBOX, ["cat"]).stdout == b""  # none at all is /dev/null


def test_input_that_nobody_reads_stops_nobody(shared_pod):
    assert shared_pod.run(BUSYBOX, ["true"], stdin=bytes(3 * MIB)).status == 0
    assert output(shared_pod.run(BUSYBOX, ["head", "-c", "3"], stdin=b"abc" + bytes(3 * MIB))) == "abc"


def test_a_slow_reader_does_not_stall_others(shared_pod):
    """Its window is full; nothing of it is held elsewhere, and the agent goes on."""
    with start(shared_pod, "yes", name="slow") as slow:
        slow.wait_for(b"y\n" * 1000)
        slow.client.on_say = lambda _text: None
        with slow._grown:  # its reader stops in here
            assert output(sh(shared_pod, "seq 1 100000 | tail -n 1")) == "100000\n"
            assert output(shared_pod.exec("slow", ["echo", "beside it"])) == "beside it\n"
        shared_pod.kill("slow", signal.SIGKILL)
        assert slow.wait() == 128 + signal.SIGKILL


def test_output_that_a_child_left_behind_is_not_waited_for(shared_pod):
    assert output(sh(shared_pod, "sleep 1000 & echo done")) == "done\n"


def test_a_large_command_line_and_environment(shared_pod):
    text = "x" * 100_000
    assert output(sh(shared_pod, 'echo ${#V}; echo "$0" | wc -c', env={"V": text})) == "100000\n3\n"


# -- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_exit_status(shared_pod, code):
    assert sh(shared_pod, f"exit {code}").status == code


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV", "USR1"])
def test_ended_by_a_signal(shared_pod, name):
    """PID 1 of its namespace is deaf to signals from inside that it does not handle: the child gets it, sh reports."""
    number = getattr(signal, f"SIG{name}")
    assert sh(shared_pod, f"sh -c 'kill -{name} $$'; exit $?").status == 128 + number
    with start(shared_pod, "echo up; exec sleep 1000", name="victim") as session:
        session.wait_for(b"up")
        if number == signal.SIGKILL:  # from outside
            shared_pod.kill("victim", number)
            assert session.wait() == 128 + number


def test_a_handler_gets_its_signal(shared_pod):
    with start(shared_pod, "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.01; done", name="h") as session:
        session.wait_for(b"up")
        shared_pod.kill("h")
        assert session.wait() == 5
        assert session.output[STDOUT] == b"up\nbye\n"


def test_an_unknown_signal(shared_pod):
    with running(shared_pod, "c"), pytest.raises(InvalidInput):
        shared_pod.kill("c", 1000)
    with pytest.raises(NotFound) as caught:
        shared_pod.kill("nobody")
    assert caught.value.code == "container-not-running"


@pytest.mark.parametrize(
    ("command", "kind", "status"),
    [
        ("no-such-command", CommandNotFound, 127),
        ("/no/such/command", CommandNotFound, 127),
        ("/etc/no-interpreter", CommandNotFound, 127),
        ("/etc/not-executable", CommandNotExecutable, 126),
        ("/etc/not-a-program", CommandNotExecutable, 126),
        ("/etc", CommandNotExecutable, 126),
    ],
)
def test_commands_that_do_not_run(shared_pod, command, kind, status):
    with pytest.raises(kind) as caught:
        shared_pod.run(BUSYBOX, [command])
    assert caught.value.exit_status == status
    assert command in str(caught.value)
    assert_holds_nothing(shared_pod)
    with running(shared_pod, "c"), pytest.raises(kind) as caught:
        shared_pod.exec("c", [command])
    assert caught.value.exit_status == status
    assert command in str(caught.value)


# -- what it runs as ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, "uid=0 gid=0"),
        ("user", "uid=1000(user) gid=1001(users) groups=2000(extra),2001(more)"),
        ("1000", "uid=1000(user) gid=1001(users)"),
        ("user:extra", "uid=1000(user) gid=2000(extra)"),
        ("12345", "uid=12345 gid=0"),
        ("12345:54321", "uid=12345 gid=54321"),
        ("nobody", "uid=65534(nobody) gid=65534(nogroup)"),
    ],
)
def test_users(shared_pod, user, expected):
    found = output(shared_pod.run(BUSYBOX, ["id"], user=user)).replace("(root)", "")
    assert found.startswith(expected)


def test_home_is_the_users(shared_pod):
    assert output(sh(shared_pod, "echo $HOME", user="user")) == "/home/user\n"
    assert output(sh(shared_pod, "echo $HOME")) == "/root\n"
    assert output(sh(shared_pod, "echo $HOME", user="4242")) == "/\n"


@pytest.mark.parametrize(("user", "code"), [("who", "user-not-found"), ("user:which", "group-not-found")])
def test_unknown_users(shared_pod, user, code):
    with pytest.raises(InvalidInput) as caught:
        shared_pod.run(BUSYBOX, ["id"], user=user)
    assert caught.value.code == code
    assert_holds_nothing(shared_pod)


def test_folder_environment_and_name(shared_pod):
    script = "pwd; echo $IMAGE $MINE; hostname; echo $PATH"
    found = output(sh(shared_pod, script, cwd="/made/for/it", env={"MINE": "a=b c"}, hostname="mine")).splitlines()
    assert found[:3] == ["/made/for/it", "yes a=b c", "mine"]
    assert "/bin" in found[3]
    assert output(sh(shared_pod, "pwd")) == "/tmp\n"  # the image's


def test_the_root_is_writable_and_private(shared_pod):
    assert output(sh(shared_pod, "echo x > /etc/new; rm /etc/passwd; cat /etc/new")) == "x\n"
    assert sh(shared_pod, "test -e /etc/new || test ! -e /etc/passwd").status == 1


def test_a_read_only_root(shared_pod):
    found = sh(shared_pod, "echo x > /etc/new; echo $?; mount -o remount,rw /; echo y > /tmp/there; cat /tmp/there",
               read_only=True)  # fmt: skip
    assert b"Read-only file system" in found.stderr
    assert found.stdout == b"1\ny\n"


def test_isolation_from_the_guest(shared_pod):
    """The container sees its own processes, no disk of the guest's, and no network."""
    assert (
        output(sh(shared_pod, "echo $$; ls /proc | grep -c '^[0-9]'; ls /dev | grep -c '^[sv]d' ; true")).split()[0]
        == "1"
    )
    assert output(sh(shared_pod, "ls /dev | grep -c -e '^sd' -e '^vd' -e vport; true")) == "0\n"
    assert output(sh(shared_pod, "ls /sys/class/net")) == "lo\n"


def test_scratch_has_the_size_asked_for(shared_pod):
    size = output(sh(shared_pod, "df -m / | tail -n 1", scratch_bytes=64 << 20)).split()[1]
    assert 40 < int(size) < 64
    full = sh(shared_pod, "dd if=/dev/zero of=/big bs=1M count=200", scratch_bytes=64 << 20)
    assert full.status == 1
    assert b"No space left" in full.stderr


# -- terminals ------------------------------------------------------------------------------------


def test_a_terminal(shared_pod):
    with start(shared_pod, "tty; stty size; read x; echo got $x; stty size", name="t", terminal=True,
               size=(33, 99)) as session:  # fmt: skip
        session.wait_for(b"33 99\r\n")
        shared_pod._client.request("resize", {"key": "t", "size": [11, 22]})
        session.write(b"hello\r")
        assert session.wait() == 0
    text = bytes(session.output[STDOUT]).replace(b"\r", b"")
    assert text.startswith(b"/dev/")
    assert text.endswith(b"hello\ngot hello\n11 22\n")
    assert not session.output[STDERR]


def test_the_terminals_interrupt_key(shared_pod):
    with start(shared_pod, "trap 'echo interrupted; exit 7' INT; echo up; while :; do sleep 0.01; done", name="i",
               terminal=True) as session:  # fmt: skip
        session.wait_for(b"up")
        session.write(b"\x03")
        assert session.wait() == 7
        assert b"interrupted" in session.output[STDOUT]


def test_output_at_a_terminal_is_complete(shared_pod):
    with start(shared_pod, "stty -opost; seq 1 50000", name="t", terminal=True) as session:
        assert session.wait() == 0
    assert bytes(session.output[STDOUT]) == b"".join(b"%d\n" % n for n in range(1, 50001))


# -- more than one process ------------------------------------------------------------------------


def test_exec(shared_pod):
    with start(shared_pod, "echo $$ > /tmp/x; echo up; cat", name="main", stdin=True, env={"A": "1"}) as session:
        session.wait_for(b"up")
        assert output(shared_pod.exec("main", ["cat", "/tmp/x"])) == "1\n"
        assert (
            output(shared_pod.exec("main", ["sh", "-c", "echo $A $B; pwd"], env={"B": "2"}, cwd="/etc"))
            == "1 2\n/etc\n"
        )
        assert output(shared_pod.exec("main", ["id", "-u"], user="user")) == "1000\n"
        assert shared_pod.exec("main", ["cat"], stdin=b"z" * MIB).stdout == b"z" * MIB
        assert shared_pod.exec("main", ["sh", "-c", "exit 9"]).status == 9
        assert shared_pod.exec("main", ["sh", "-c", "kill -9 $$"]).status == 128 + 9
        with pytest.raises(CommandNotFound):
            shared_pod.exec("main", ["nothing-of-the-kind"])
        with pytest.raises(InvalidInput):
            shared_pod.exec("main", ["id"], user="who")
        with start_exec(shared_pod, "main", ["sh", "-c", "stty size; tty"], terminal=True) as terminal:
            assert terminal.wait() == 0
            assert terminal.output[STDOUT].startswith(b"24 80\r\n/dev/")
        session.end_input()
        assert session.wait() == 0
    with pytest.raises(NotFound) as caught:
        shared_pod.exec("main", ["true"])
    assert caught.value.code == "container-not-running"


def test_many_at_once(shared_pod):
    """Containers and processes in them, from threads with a connection each; every byte comes to its own."""
    results: dict[int, holdfast.Result] = {}

    def one(number: int) -> None:
        if number % 2:
            results[number] = sh(shared_pod, f"seq {number} {20000 + number}; exit {number}", name=f"many{number}")
        else:
            results[number] = shared_pod.exec("base", ["sh", "-c", f"seq {number} {20000 + number}; exit {number}"])

    with running(shared_pod, "base"):
        threads = [threading.Thread(target=one, args=[number]) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(10):
        assert results[number].status == number
        assert results[number].stdout == b"".join(b"%d\n" % n for n in range(number, 20001 + number))
    assert_holds_nothing(shared_pod)


def test_two_containers_share_the_layers_of_their_image(shared_pod):
    with running(shared_pod, "one"), running(shared_pod, "two"):
        attachments = shared_pod.storage()["attachments"]
        layers = [a for a in attachments if a["kind"] == "layer"]
        assert len(layers) == 2
        assert all(layer["holders"] == ["one", "two"] and layer["read_only"] for layer in layers)
        scratch = sorted(a["holders"] for a in attachments if a["kind"] == "scratch")
        assert scratch == [["one"], ["two"]]
        assert shared_pod.storage()["free_slots"] == 252
    assert_holds_nothing(shared_pod)


def test_a_name_is_free_again_when_its_container_has_ended(shared_pod):
    for _ in range(3):
        assert output(sh(shared_pod, "cat /mark 2>/dev/null; echo $$ > /mark; cat /mark", name="again")) == "1\n"
    with running(shared_pod, "again"):
        with pytest.raises(InUse) as caught:
            sh(shared_pod, "true", name="again")
        assert caught.value.code == "container-exists"
        assert output(shared_pod.exec("again", ["echo", "unharmed"])) == "unharmed\n"
    assert [c.state for c in shared_pod.inspect().containers if c.name == "again"] == ["exited"]


# -- bundles --------------------------------------------------------------------------------------


def test_a_bundle_over_9p_is_writable(shared_pod, tmp_path):
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", "echo written > /new; chown 5:6 /new; hostname; echo $$"])
    assert output(shared_pod.run(bundle=bundle)) == "bundle\n1\n"
    new = bundle / "rootfs/new"
    assert (new.read_text(), new.stat().st_uid, new.stat().st_gid) == ("written\n", 5, 6)
    assert_holds_nothing(shared_pod)


def test_a_bundle_over_9p_is_read_only_when_it_says_so(shared_pod, tmp_path):
    """With the right to mount it makes its own view writable: a little memory, in which its mount points are made."""
    script = "echo x > /new; mount -o remount,rw /; echo x > /new; rm /etc/passwd; mkdir /place; cat /new"
    bundle = make_bundle(
        tmp_path / "b", ["sh", "-c", script], root={"readonly": True},
        process={"capabilities": {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")}},
    )  # fmt: skip
    before = sorted(path for path in (bundle / "rootfs").rglob("*"))
    place = [f"type=bind,src={tmp_path},dst=/no/such/place"]
    result = shared_pod.run(bundle=bundle, mounts=place)
    assert output(result) == "x\n"
    assert result.stderr.count(b"Read-only file system") == 1
    assert sorted(path for path in (bundle / "rootfs").rglob("*")) == before


def test_arguments_over_a_bundle(shared_pod, tmp_path):
    bundle = make_bundle(tmp_path / "b", ["false"])
    assert output(shared_pod.run(bundle=bundle, args=["sh", "-c", "echo $X"], env={"X": "y"})) == "y\n"


# -- detached -------------------------------------------------------------------------------------


def test_detached(shared_pod):
    result = sh(shared_pod, "echo out; echo err >&2; cat; sleep 0.1; exit 6", name="d", detach=True)
    assert result == holdfast.Result(0, b"", b"")
    assert shared_pod.wait("d") == 6
    log = shared_pod.root / "pods" / shared_pod.name / "d.log"
    assert sorted(log.read_text().split()) == ["err", "out"]
    with pytest.raises(NotFound):
        shared_pod.wait("nobody")


def test_a_detached_pod(data, state_root):
    """It outlives the object that started it, and every client; removing it ends all."""
    pod = holdfast.Pod("lasting", root=state_root, data=data, detached=True)
    sh(pod, "echo up; sleep 1000", name="d", detach=True)
    pod.close()
    again = holdfast.Pod.open("lasting", root=state_root, data=data)
    assert [c.name for c in again.inspect().containers if c.state == "running"] == ["d"]
    assert output(again.exec("d", ["echo", "hello"])) == "hello\n"
    again.remove()
    assert_nothing_held(state_root)
    with pytest.raises(NotFound) as caught:
        holdfast.Pod.open("lasting", root=state_root, data=data)
    assert caught.value.code == "pod-not-found"


def test_two_pods_of_one_name(pod, data, state_root):
    with pytest.raises(InUse) as caught:
        holdfast.Pod(pod.name, root=state_root, data=data)
    assert caught.value.code == "pod-exists"
    assert output(sh(pod, "echo unharmed")) == "unharmed\n"


def test_the_shortest_way(data, state_root):
    result = holdfast.run(BUSYBOX, ["sh", "-c", "echo hello; cat"], stdin=b" and bye", data=data)
    assert (result.status, result.text) == (0, "hello\n and bye")
    assert_nothing_held(state_root)


def test_a_client_that_goes_takes_its_process_with_it(shared_pod):
    with start(shared_pod, "echo up; sleep 1000", name="left") as session:
        session.wait_for(b"up")
    with Client.connect(shared_pod.root, shared_pod.name) as client:
        assert client.request("wait", {"container": "left"}, 30)["code"] == 128 + signal.SIGKILL
    assert output(sh(shared_pod, "echo next", name="next")) == "next\n"
