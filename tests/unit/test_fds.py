"""A descriptor has one owner."""

from __future__ import annotations

import os

import pytest

from holdfast.linux.fds import OwnedFd


def opened() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_closed_by_with_and_useless_after():
    with opened() as owned:
        fd = owned.fileno()
        assert is_open(fd)
        assert repr(owned) == f"OwnedFd({fd})"
    assert not is_open(fd)
    assert owned.closed
    assert repr(owned) == "OwnedFd(closed)"
    owned.close()
    for use in (owned.fileno, owned.release, owned.dup):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_twice_does_not_close_somebody_elses():
    owned = opened()
    fd = owned.fileno()
    owned.close()
    reused = os.open("/dev/null", os.O_RDONLY)
    assert reused == fd
    owned.close()
    assert is_open(reused)
    os.close(reused)


def test_release_gives_it_away():
    with opened() as owned:
        fd = owned.release()
    assert is_open(fd)
    os.close(fd)


def test_dup():
    with opened() as owned, owned.dup() as second:
        assert second.fileno() != owned.fileno()
        assert os.path.sameopenfile(second.fileno(), owned.fileno())
        assert not os.get_inheritable(second.fileno())


def test_closed_when_the_block_fails():
    owned = opened()
    fd = owned.fileno()
    with pytest.raises(ZeroDivisionError), owned:
        raise ZeroDivisionError
    assert not is_open(fd)
