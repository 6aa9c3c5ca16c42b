"""QEMU's migration stream, as far as must be known to put RAM from one place and device state from another together.

A template's device state begins with what says which machine it is and with the RAM section, which under
``x-ignore-shared`` names QEMU's RAM blocks and holds the contents of the small ones only (firmware).  Then come the
devices.  ``xen-save-devices-state`` writes the devices alone, of a machine that goes on afterwards.  The first part of
the one and the second of the other are a stream that a machine starts from whose RAM is in a file.

Source of the format: QEMU's docs/devel/migration.rst, migration/savevm.c and migration/ram.c, the same since 2.4.
"""

from __future__ import annotations

from holdfast.errors import Corrupt

_HEADER_BYTES = 8  # magic and version
_MAGIC = b"QEVM\0\0\0\3"
_EOF, _START, _PART, _END, _DESCRIPTION, _FOOTER = 0, 1, 2, 3, 6, 0x7E
#: Flags in the low bits of a record of the RAM section.
_ZERO, _SIZES, _PAGE, _END_OF_RECORDS, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS = 0xFFF
_PAGE_BYTES = 4096
#: What precedes the RAM section is a few hundred bytes.
_LONGEST_START = 4096
#: An empty description of the state: QEMU complains on its console when there is none.
_NO_DESCRIPTION = bytes([_DESCRIPTION, 0, 0, 0, 0])


def join(template_state: bytes, devices: bytes) -> bytes:
    """The device state of a machine started from a template, and stopped: ``devices`` is what QEMU saved of it.

    Raises:
        Corrupt: one of the two is not what it should be.
    """
    if not devices.startswith(_MAGIC) or devices[-1:] != bytes([_EOF]):
        raise _corrupt("what QEMU has saved of the devices is no such state, or not all of it")
    return template_state[: _end_of_ram(template_state)] + devices[_HEADER_BYTES:] + _NO_DESCRIPTION


def _end_of_ram(state: bytes) -> int:
    """Where the first section after those of RAM begins."""
    at = state.find(b"\x03ram", 0, _LONGEST_START)
    if not state.startswith(_MAGIC) or at < 5 or state[at - 5] != _START:
        raise _corrupt("no RAM section in it")
    position = at + 4 + 8  # the name, the instance and the version
    try:
        while True:
            position = _after_records(state, position)
            if state[position] != _FOOTER:
                raise _corrupt("a RAM section without its end")
            position += 5
            if state[position] not in (_PART, _END):
                return position
            position += 5
    except IndexError:
        raise _corrupt("it ends in the RAM section") from None


def _after_records(state: bytes, position: int) -> int:
    """Skips the records of one RAM section."""
    while True:
        word = int.from_bytes(state[position : position + 8], "big")
        flags, position = word & _FLAGS, position + 8
        if flags & _END_OF_RECORDS:
            return position
        if flags & _SIZES:
            position = _after_sizes(state, position, word - flags)
            continue
        if not flags & _SAME_BLOCK:
            position += 1 + state[position]
        if flags & _ZERO:
            position += 1
        elif flags & _PAGE:
            position += _PAGE_BYTES
        else:
            raise _corrupt(f"unknown record {flags:#x} in the RAM section")


def _after_sizes(state: bytes, position: int, total: int) -> int:
    """Skips the list of RAM blocks: name, size and, as RAM files are shared, address."""
    while total > 0:
        position += 1 + state[position]
        total -= int.from_bytes(state[position : position + 8], "big")
        position += 16
        if position >= len(state):
            raise IndexError
    return position


def _corrupt(why: str) -> Corrupt:
    return Corrupt("put device state together", why=why, code="state-format")
