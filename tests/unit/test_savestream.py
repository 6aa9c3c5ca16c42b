"""Device state from one place behind the RAM section from another."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Corrupt
from holdfast.machine.savestream import join

MAGIC = b"QEVM\0\0\0\3"
CONFIGURATION = b"\7" + (7).to_bytes(4, "big") + b"pc-q35x"
DEVICES = MAGIC + b"\x04\0\0\0\x2a\3cpu\0\0\0\0\0\0\0\1 what devices say \x7e\0\0\0\x2a\0"


def word(number: int) -> bytes:
    return number.to_bytes(8, "big")


def name(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def blocks(*names: bytes) -> bytes:
    """The list of RAM blocks: name, size, and its address, as the capability has it."""
    size = 4096
    return word(len(names) * size | 0x04) + b"".join(name(n) + word(size) + word(0x1000) for n in names)


START = b"\1" + (2).to_bytes(4, "big") + name(b"ram") + (0).to_bytes(4, "big") + (4).to_bytes(4, "big")
FOOTER = b"\x7e" + (2).to_bytes(4, "big")
END_OF_RECORDS = word(0x10)
ZERO = word(0x1000 | 0x02) + name(b"rom") + b"\0"
PAGE = word(0x2000 | 0x08 | 0x20) + bytes(range(256)) * 16


def part(kind: int, records: bytes) -> bytes:
    return bytes([kind]) + (2).to_bytes(4, "big") + records + END_OF_RECORDS + FOOTER


def template(*parts: bytes) -> bytes:
    return MAGIC + CONFIGURATION + START + blocks(b"ram", b"rom") + END_OF_RECORDS + FOOTER + b"".join(parts)


AFTER = b"\x04 devices of the template\0"


@pytest.mark.parametrize("parts", [(), (part(2, ZERO + PAGE),), (part(2, PAGE), part(2, ZERO), part(3, b""))])
def test_the_first_of_one_and_the_second_of_the_other(parts):
    joined = join(template(*parts) + AFTER, DEVICES)
    assert joined == template(*parts) + DEVICES[8:] + b"\6\0\0\0\0"


def test_it_can_be_joined_again():
    """A fork of a fork starts from what was joined for the fork."""
    once = join(template(part(3, ZERO)) + AFTER, DEVICES)
    again = MAGIC + b"\x04 other devices \0"
    assert join(once, again) == template(part(3, ZERO)) + again[8:] + b"\6\0\0\0\0"


@pytest.mark.parametrize(
    "state", [b"", MAGIC, b"QEVX" + template()[4:], MAGIC + b"x" * 5000, template()[:-3], MAGIC + b"\2" + START[1:]]
)
def test_another_file_is_refused(state):
    with pytest.raises(Corrupt) as caught:
        join(state, DEVICES)
    assert caught.value.code == "state-format"


@pytest.mark.parametrize("devices", [b"", MAGIC[:-1], DEVICES[:-1], b"\0" + DEVICES])
def test_half_of_a_state_is_refused(devices):
    with pytest.raises(Corrupt):
        join(template() + AFTER, devices)


def test_unknown_records_are_refused():
    with pytest.raises(Corrupt, match="0x40"):
        join(template(part(3, word(0x40) + name(b"ram"))) + AFTER, DEVICES)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_damage_is_never_another_error(junk, at):
    whole = template(part(2, ZERO + PAGE), part(3, b"")) + AFTER
    at = min(at, len(whole))
    with contextlib.suppress(Corrupt):
        join(whole[:at] + junk, DEVICES)
    with contextlib.suppress(Corrupt):
        join(whole[:at] + junk + whole[at + len(junk) :], DEVICES)
