"""Frames survive every cut of the stream, and a bad header is refused before its body."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statemachine.errors import FdPassing
from transport.framing import FRAME_BYTES_MAX, HEADER_BYTES, Frame, FrameReader, encode_frame

BODIES = (b"a", b"\x00\x00\x00\x01", b"xyz")
STREAM = b"".join(map(encode_frame, BODIES))


def frames_in(*chunks: bytes) -> list[Frame]:
    reader = FrameReader()
    frames = []
    for chunk in chunks:
        reader.feed(chunk)
        while (frame := reader.take()) is not None:
            frames.append(frame)
    return frames


@pytest.mark.clause("WIRE-3")
def test_basic_frame() -> None:
    assert encode_frame(b"body") == b"\x00\x00\x00\x04body"
    assert frames_in(b"\x00\x00\x00\x04body") == [Frame(b"body", 0)]


def test_frames_know_their_place_in_the_stream() -> None:
    assert [(frame.offset, frame.end) for frame in frames_in(STREAM)] == [(0, 5), (5, 13), (13, 20)]


def test_whole_and_byte_by_byte_are_the_same() -> None:
    whole = frames_in(STREAM)
    assert tuple(frame.body for frame in whole) == BODIES
    assert frames_in(*(bytes([byte]) for byte in STREAM)) == whole


def test_every_cut_into_three_gives_the_same_frames() -> None:
    whole = frames_in(STREAM)
    for first, second in itertools.combinations_with_replacement(range(len(STREAM) + 1), 2):
        assert frames_in(STREAM[:first], STREAM[first:second], STREAM[second:]) == whole


def test_trailing_bytes_wait_for_the_rest_of_their_frame() -> None:
    reader = FrameReader()
    assert not reader.is_partial
    reader.feed(encode_frame(b"one") + b"\x00\x00")
    assert reader.take() == Frame(b"one", 0)
    assert reader.take() is None
    assert reader.is_partial
    assert reader.bytes_fed == 9
    reader.feed(b"\x00\x01")
    assert reader.take() is None
    reader.feed(b"2")
    assert reader.take() == Frame(b"2", 7)
    assert not reader.is_partial


@pytest.mark.clause("WIRE-3")
def test_the_longest_frame_passes() -> None:
    body = bytes(FRAME_BYTES_MAX)
    assert frames_in(encode_frame(body)) == [Frame(body, 0)]


@pytest.mark.clause("WIRE-4")
@pytest.mark.parametrize(
    ("header", "announced"),
    [
        (b"\x00\x00\x00\x00", 0),
        (b"\x00\x01\x00\x01", FRAME_BYTES_MAX + 1),
        (b"\xff\xff\xff\xff", 2**32 - 1),
    ],
)
def test_a_bad_length_is_refused_with_its_header(header: bytes, announced: int) -> None:
    reader = FrameReader()
    reader.feed(encode_frame(b"good") + header[:-1])
    assert reader.take() == Frame(b"good", 0)
    assert reader.take() is None
    reader.feed(header[-1:])
    for _ in range(2):
        with pytest.raises(FdPassing, match=f"announces {announced} bytes; 1 to 65536 are allowed"):
            reader.take()


@pytest.mark.parametrize("body_bytes", [0, FRAME_BYTES_MAX + 1])
def test_a_bad_body_is_never_written(body_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"not {body_bytes}"):
        encode_frame(bytes(body_bytes))


@pytest.mark.clause("WIRE-5")
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.data())
def test_any_bodies_survive_any_cuts(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(encode_frame, bodies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
    frames = frames_in(*chunks)
    assert [frame.body for frame in frames] == bodies
    assert [frame.offset for frame in frames] == [0, *(frame.end for frame in frames)][:-1]


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_a_fault_or_the_start_of_a_frame(stream: bytes) -> None:
    reader = FrameReader()
    reader.feed(stream)
    bytes_taken = 0
    try:
        while (frame := reader.take()) is not None:
            assert stream[frame.offset : frame.end] == encode_frame(frame.body)
            bytes_taken = frame.end
    except FdPassing:
        length = int.from_bytes(stream[bytes_taken : bytes_taken + HEADER_BYTES], "big")
        assert not 1 <= length <= FRAME_BYTES_MAX
    assert reader.bytes_fed == len(stream)
    assert reader.is_partial == (bytes_taken < len(stream))
