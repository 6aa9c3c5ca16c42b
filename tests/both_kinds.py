"""Tests that are written for pods in machines, for pods in namespaces, too.

A test that gets its pod from a fixture does not say what kind it is, so the same test does for both::

    globals().update(same_as(test_containers))

makes them, and the fixtures that they need, those of the module that says so, with its own ``pod`` and ``shared_pod``.
"""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType
from typing import Any

import pytest

PODS = {"pod", "shared_pod"}


def same_as(module: ModuleType, *but: str) -> dict[str, Any]:
    """The tests of a module that get their pod from a fixture and make no other, and the module's other fixtures.

    Args:
        but: what is about something that only one kind has, each of which must be there: the name of a test, or
            ``name:text`` for those of its parameters that have the text in them.
    """
    found = {name: test for name, test in vars(module).items() if name.startswith("test_") and _fits(test)}
    for one in but:
        name, _, text = one.partition(":")
        if text:
            found[name] = _without(found[name], text)
        else:
            del found[name]
    return found | {name: thing for name, thing in vars(module).items() if _is_fixture(thing) and name not in PODS}


def _fits(test: Any) -> bool:
    asked = set(inspect.signature(test).parameters)
    return bool(asked & PODS) and "holdfast.Pod(" not in inspect.getsource(test)


def _is_fixture(thing: Any) -> bool:
    return type(thing).__name__ == "FixtureFunctionDefinition"


def _without(test: Any, text: str) -> Any:
    """A copy of a test that is not run with parameters that have ``text`` in them."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__dict__.update(test.__dict__)
    copy.__annotations__ = test.__annotations__
    marks = [_thinned(mark, text) for mark in test.pytestmark]
    assert marks != test.pytestmark, f"no parameter of {test.__name__} has {text!r} in it"
    copy.pytestmark = marks  # type: ignore[attr-defined]
    return copy


def _thinned(mark: pytest.Mark, text: str) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    names, values, *rest = mark.args
    kept = [value for value in values if text not in repr(value)]
    return (
        mark if len(kept) == len(values) else pytest.Mark(mark.name, (names, kept, *rest), mark.kwargs, _ispytest=True)
    )
