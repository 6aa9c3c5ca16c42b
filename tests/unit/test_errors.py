"""Errors say what, on what, why and what next, and come out of a wire as what went in."""

from __future__ import annotations

import errno
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import errors
from holdfast.errors import CommandNotFound, HoldfastError, InUse, from_dict, from_exception

KINDS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, HoldfastError)
]  # fmt: skip
text = st.text(max_size=9)


def test_text():
    error = InUse("open disk", subject="/d", why="pod p has it", hint="end it")
    assert str(error) == "open disk /d: pod p has it (end it)"
    assert str(HoldfastError("do it")) == "do it"
    assert str(HoldfastError("do it", causes=[OSError("x"), InUse("y", subject=1)])) == "do it; also: x; also: y 1"


def test_the_kernels_words():
    error = HoldfastError("unmount", why=OSError(errno.EBUSY, "Device or resource busy", "/m"))
    assert error.why == "Device or resource busy (errno 16)"
    assert HoldfastError("read", why=OSError("odd")).why == "odd"
    assert HoldfastError("read", subject=b"a\xff").subject == "a\\xff"


def test_codes():
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert InUse("x").code == "in-use"
    assert InUse("x", code="disk-in-use").code == "disk-in-use"
    assert InUse.code == "in-use"
    assert {kind.__name__: kind.exit_status for kind in KINDS if kind.exit_status != 125} == {
        "CommandNotExecutable": 126,
        "CommandNotFound": 127,
    }
    assert {kind.__name__ for kind in KINDS if kind.retryable} == {"TimedOut", "NotReleased"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_crosses(kind):
    error = kind("w", subject="s", why="y", hint="h", code="c", causes=[InUse("i"), OSError(2, "n", "/f")])
    back = from_dict(error.as_dict())
    assert type(back) is kind
    assert back.as_dict() == error.as_dict()
    assert (back.exit_status, back.retryable) == (error.exit_status, error.retryable)
    assert str(from_dict(kind("w").as_dict())) == "w"
    assert from_dict(kind("w").as_dict()).code == kind.code


@given(st.sampled_from(KINDS), text, text, text, text, text)
def test_any_text_crosses(kind, what, subject, why, hint, code):
    error = kind(what, subject=subject, why=why, hint=hint, code=code)
    assert str(from_dict(error.as_dict())) == str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["code", "kind", "what", "subject", "why", "hint", "causes", "x"]), json_values))
def test_anything_that_a_peer_sends_is_some_error(record):
    error = from_dict(record)
    assert isinstance(error, HoldfastError)
    assert isinstance(str(error), str)
    assert isinstance(error.as_dict(), dict)


def test_from_exception():
    ours = CommandNotFound("run", subject="x")
    assert from_exception(ours) is ours
    system = from_exception(FileNotFoundError(2, "No such file or directory", "/x"))
    assert str(system) == "system call failed /x: No such file or directory (errno 2)"
    assert str(from_exception(KeyError("k"))) == "unexpected failure: KeyError: 'k'"
    assert from_exception(KeyError("k")).code == "internal"
