"""Frames survive being cut anywhere and being surrounded by anything."""

from __future__ import annotations

import itertools
from binascii import crc32
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.wire import frames
from holdfast.wire.frames import DATA, EOF, HEADER_SIZE, KINDS, MAX_PAYLOAD, Decoder, Frame

MAGIC = b"\x1f\xd5"

some_frames = st.lists(
    st.builds(
        Frame,
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 2**32 - 1),
        st.one_of(st.binary(max_size=200), st.just(MAGIC * 9), st.just(Frame(DATA, 1, b"inner").encode())),
    ),
    max_size=6,
)  # fmt: skip
# Bytes that are no frame, halves of magic numbers and false headers among them.
garbage = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.just(MAGIC),
        st.just(MAGIC[:1]),
        st.binary(min_size=18, max_size=18).map(MAGIC.__add__),
    ),
    max_size=4,
).map(b"".join)  # fmt: skip


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def decode(decoder: Decoder, chunks: list[bytes]) -> list[Frame]:
    return [frame for chunk in chunks for frame in decoder.feed(chunk)]


@given(some_frames, st.lists(st.integers(0), max_size=12))
def test_round_trip_cut_anywhere(sent, cuts):
    decoder = Decoder()
    assert decode(decoder, pieces(b"".join(frame.encode() for frame in sent), cuts)) == sent
    assert decoder.skipped == 0


def test_round_trip_cut_at_every_byte():
    sent = [Frame(DATA, 7, b"abc"), Frame(EOF, 7), Frame(DATA, 0, MAGIC * 4)]
    data = b"".join(frame.encode() for frame in sent)
    for cut in range(len(data) + 1):
        assert decode(Decoder(), [data[:cut], data[cut:]]) == sent
    assert decode(Decoder(), [data[n : n + 1] for n in range(len(data))]) == sent


@given(some_frames, st.data(), st.lists(st.integers(0), max_size=12))
def test_resynchronises(sent, data, cuts):
    """Garbage before, between and after; the frames themselves come through, and nothing else that was sent does."""
    stream, noise = b"", 0
    for frame in sent:
        junk = data.draw(garbage)
        stream += junk + frame.encode()
        noise += len(junk)
    tail = data.draw(garbage)
    decoder = Decoder()
    assert decode(decoder, pieces(stream + tail, cuts)) == sent
    # What is left in the decoder may yet be the beginning of a frame.
    assert noise <= decoder.skipped + HEADER_SIZE
    assert decoder.skipped <= noise + len(tail)
    assert decode(decoder, [bytes(HEADER_SIZE)]) == []
    assert noise + len(tail) <= decoder.skipped <= noise + len(tail) + HEADER_SIZE


@given(st.binary(max_size=400))
def test_noise_is_no_frame_and_is_not_kept(noise):
    decoder = Decoder()
    assert decode(decoder, [noise]) == []  # by chance, two checksums would have to be right
    assert len(noise) - decoder.skipped <= HEADER_SIZE


def header(kind: int, channel: int, length: int, payload_crc: int, *, magic: int = frames.MAGIC) -> bytes:
    head = pack(">HBBIII", magic, kind, 0, channel, length, payload_crc)
    return head + pack(">I", crc32(head))


@pytest.mark.parametrize(
    "false",
    [
        pytest.param(header(DATA, 1, MAX_PAYLOAD + 1, 0), id="longer than allowed"),
        pytest.param(header(DATA, 1, 2**32 - 1, 0), id="huge"),
        pytest.param(header(0, 1, 0, 0), id="unknown kind"),
        pytest.param(header(10, 1, 0, 0), id="another unknown kind"),
        pytest.param(header(DATA, 1, 2**20, 0)[:-1] + b"\0", id="wrong header checksum"),
        pytest.param(header(DATA, 1, 3, 0) + b"abc", id="wrong payload checksum"),
        pytest.param(header(DATA, 1, 0, 0, magic=0xD51F), id="wrong magic"),
        pytest.param(MAGIC, id="a magic alone"),
        pytest.param(MAGIC[:1], id="half a magic"),
    ],
)
def test_a_false_header_does_not_make_the_reader_wait(false):
    decoder = Decoder()
    real = Frame(DATA, 3, b"payload")
    assert decode(decoder, [false + real.encode()]) == [real]
    assert decoder.skipped == len(false)


def test_a_broken_frame_is_skipped_whole():
    """Headers inside it are not looked at: each could make the reader check megabytes."""
    inside, after = Frame(DATA, 3, b"payload"), Frame(DATA, 4, b"after")
    broken = header(DATA, 1, len(inside.encode()), 0)
    assert decode(Decoder(), [broken + inside.encode() + after.encode()]) == [after]


def test_oversize():
    assert len(Frame(DATA, 1, bytes(MAX_PAYLOAD)).encode()) == MAX_PAYLOAD + HEADER_SIZE
    with pytest.raises(ValueError, match="larger than"):
        Frame(DATA, 1, bytes(MAX_PAYLOAD + 1)).encode()
    decoder = Decoder(max_payload=10)
    assert decode(decoder, [Frame(DATA, 1, bytes(11)).encode(), Frame(DATA, 1, bytes(10)).encode()]) == [
        Frame(DATA, 1, bytes(10))
    ]
    assert decoder.skipped == HEADER_SIZE + 11


def test_largest_in_small_pieces():
    data = Frame(DATA, 1, bytes(MAX_PAYLOAD)).encode()
    [frame] = decode(Decoder(), [data[n : n + 65536] for n in range(0, len(data), 65536)])
    assert len(frame.payload) == MAX_PAYLOAD


def test_equality():
    assert Frame(DATA, 1, b"a") == Frame(DATA, 1, b"a")
    assert len({Frame(DATA, 1, b"a"), Frame(DATA, 1, b"a"), Frame(EOF, 1)}) == 2
    assert Frame(DATA, 1, b"a") != "a"
    assert repr(Frame(DATA, 1, b"a")) == f"Frame({DATA}, 1, 1 bytes)"
