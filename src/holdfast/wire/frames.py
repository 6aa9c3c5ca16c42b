"""Frames: how messages and streams travel on one byte stream.

A virtio-serial port is a byte stream without connections, and the far end is not trusted, so every
frame can be recognised on its own: a magic number, a checksum of the header (a false header never
makes the reader wait for a payload that does not come) and one of the payload.  Whatever does not
check is skipped, byte by byte, until the next frame that does.

::

    0      2      3       4         8        12            16            20
    | magic| kind | flags | channel | length | payload crc | header crc  | payload ...
"""

from __future__ import annotations

from binascii import crc32
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = 0x1FD5
SYNC, SYNCED, REQUEST, RESPONSE, EVENT, DATA, EOF, CREDIT, CANCEL = range(1, 10)
KINDS = frozenset(range(1, 10))

#: Most bytes of a request, response or event: a container's specification fits many times over.
MAX_PAYLOAD = 4 << 20
#: Most bytes of one DATA frame.
MAX_DATA = 32 << 10

_HEADER = Struct(">HBBIII")
_CRC = Struct(">I")
HEADER_SIZE = _HEADER.size + _CRC.size
_MAGIC_BYTES = MAGIC.to_bytes(2, "big")


class Frame:
    """One frame: ``kind``, ``channel`` (a request's id, or a stream's number), ``payload``."""

    __slots__ = ("channel", "kind", "payload")

    def __init__(self, kind: int, channel: int, payload: bytes = b"") -> None:
        self.kind = kind
        self.channel = channel
        self.payload = payload

    def encode(self) -> bytes:
        """The frame's bytes.

        Raises:
            ValueError: the payload is larger than :data:`MAX_PAYLOAD`.
        """
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"frame of {len(self.payload)} bytes is larger than {MAX_PAYLOAD}")
        head = _HEADER.pack(MAGIC, self.kind, 0, self.channel, len(self.payload), crc32(self.payload))
        return head + _CRC.pack(crc32(head)) + self.payload

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and (self.kind, self.channel, self.payload) == (
            other.kind, other.channel, other.payload,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.kind, self.channel, self.payload))

    def __repr__(self) -> str:
        return f"Frame({self.kind}, {self.channel}, {len(self.payload)} bytes)"


class Decoder:
    """Turns bytes, in any pieces, into frames; skips what is none.

    Attributes:
        skipped: bytes that belonged to no frame so far.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._buffer = bytearray()
        self._max_payload = max_payload
        self.skipped = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with ``data``."""
        self._buffer += data
        buffer = self._buffer
        while True:
            start = buffer.find(_MAGIC_BYTES)
            if start < 0:  # the last byte may be the first half of a magic number
                self._skip(max(0, len(buffer) - 1) if buffer[-1:] == _MAGIC_BYTES[:1] else len(buffer))
                return
            self._skip(start)
            if len(buffer) < HEADER_SIZE:
                return
            _, kind, _, channel, length, payload_crc = _HEADER.unpack_from(buffer)
            (header_crc,) = _CRC.unpack_from(buffer, _HEADER.size)
            if (
                kind not in KINDS
                or length > self._max_payload
                or crc32(memoryview(buffer)[: _HEADER.size]) != header_crc
            ):
                self._skip(1)
                continue
            end = HEADER_SIZE + length
            if len(buffer) < end:
                return
            payload = bytes(memoryview(buffer)[HEADER_SIZE:end])
            if crc32(payload) != payload_crc:
                # The header is right, so the frame is skipped whole: looking for others inside it would cost a hostile
                # peer's reader a checksum of megabytes for every twenty bytes.
                self._skip(end)
                continue
            del buffer[:end]
            yield Frame(kind, channel, payload)

    def _skip(self, count: int) -> None:
        del self._buffer[:count]
        self.skipped += count
