"""Shares in copies of a pod: made anew at the same places, or refused before anything stops."""

from __future__ import annotations

import pytest

from holdfast.errors import HoldfastError
from tests.vm.forks import idle, shell
from tests.vm.support import BUSYBOX


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source/below").mkdir(parents=True)
    (tmp_path / "source/file").write_text("text")
    (tmp_path / "source/below/hot").write_text("hot")
    return tmp_path / "source"


def test_they_are_where_they_were(pod, source, tmp_path):
    (tmp_path / "both").mkdir()
    mounts = [
        f"type=bind,src={source},dst=/s,ro", f"type=bind,src={source}/file,dst=/f,ro",
        f"type=bind,src={tmp_path}/both,dst=/w,fork=share",
    ]  # fmt: skip
    idle(pod, mounts=mounts)
    pod.attach(f"type=bind,src={source}/below,dst=/hot,ro", container="c")
    [fork] = pod.fork()
    with fork:
        assert shell(fork, "c", "cat /s/file /f /hot/hot; echo fork >/w/fork") == "texttexthot"
        assert shell(pod, "c", "cat /s/file /f /hot/hot /w/fork") == "texttexthotfork\n"
        assert fork.exec("c", ["sh", "-c", "echo x >/s/no"]).status != 0
        assert [s["path"] for s in fork.storage()["shares"]] == [s["path"] for s in pod.storage()["shares"]]
        fork.detach("/hot", container="c")
        assert fork.exec("c", ["cat", "/hot/hot"]).status != 0
        [again] = fork.fork()
        with again:
            assert shell(again, "c", "cat /s/file /w/fork") == "textfork\n"


def test_one_that_is_in_use_is_refused_and_the_source_goes_on(pod, source):
    mounts = [f"type=bind,src={source},dst=/s,ro"]
    pod.run(BUSYBOX, ["sh", "-c", "cd /s; while :; do sleep 1000; done"], name="c", detach=True, mounts=mounts)
    with pytest.raises(HoldfastError, match="has /s open") as caught:
        pod.fork()
    assert caught.value.code == "share-in-use"
    assert shell(pod, "c", "cat /s/file") == "text"


@pytest.mark.parametrize("mount", ["type=bind,src={},dst=/s", "type=bind,src={},dst=/s,ro,fork=deny"])
def test_what_is_not_safe_is_refused_by_name(pod, source, mount):
    idle(pod, mounts=[mount.format(source)])
    with pytest.raises(HoldfastError, match=str(source)) as caught:
        pod.fork()
    assert caught.value.code == "not-forkable"
    assert shell(pod, "c", "cat /s/file") == "text"
