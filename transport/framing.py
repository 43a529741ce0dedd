"""Frames on a byte stream: a length of four bytes, then a body; cut out of any reads.

A stream socket has no message boundaries, so each message travels as a frame: four bytes of
length, then that many bytes of body. A read can return any cut of the stream: half a
header, three frames and a bit. `FrameReader` takes what comes and gives back whole bodies, each
with its place in the stream, because descriptors are matched to frames by place.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from statemachine.errors import FdPassing

HEADER_BYTES: Final = 4
"""Length of a frame's header: the body's length, unsigned, big-endian."""

FRAME_BYTES_MAX: Final = 65_536
"""Longest body of a frame; the shortest is one byte."""


class Frame(NamedTuple):
    """A whole frame taken off the stream."""

    body: bytes
    """1 to `FRAME_BYTES_MAX` bytes, without the header."""
    offset: int
    """Where the frame's first byte, that of its header, stood in the stream, counted from 0."""

    @property
    def end(self) -> int:
        """Where the next frame starts in the stream."""
        return self.offset + HEADER_BYTES + len(self.body)


def encode_frame(body: bytes) -> bytes:
    """
    Put the header in front of a body.

    Raises:
        ValueError: the body is empty, or longer than `FRAME_BYTES_MAX`.

    Source:
        WIRE-3.
    """
    if not 1 <= len(body) <= FRAME_BYTES_MAX:
        raise ValueError(f"a body has 1 to {FRAME_BYTES_MAX} bytes, not {len(body)}")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameReader:
    """
    Cuts a stream of bytes back into frames, however it was cut on its way.

    A caller that takes after every feed makes it hold at most one unfinished frame.
    """

    # Keeps WIRE-5.

    __slots__ = ("_buffer", "_bytes_taken")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._bytes_taken = 0

    @property
    def is_partial(self) -> bool:
        """Whether bytes are held that `take` has not given out: the start of a frame."""
        return bool(self._buffer)

    @property
    def bytes_held(self) -> int:
        """How many bytes are held that `take` has not given out."""
        return len(self._buffer)

    @property
    def bytes_missing(self) -> int:
        """How many bytes the frame that has begun lacks, as far as its header says; else 0."""
        if len(self._buffer) < HEADER_BYTES:
            return 0
        return max(0, HEADER_BYTES + self._announced() - len(self._buffer))

    @property
    def bytes_fed(self) -> int:
        """How many bytes of the stream have been fed so far."""
        return self._bytes_taken + len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what was read off the stream, of any length."""
        self._buffer += data

    def take(self) -> Frame | None:
        """
        Take the next whole frame, or None until more is fed.

        Raises:
            FdPassing: the header announces an empty or too long body; said as soon as the header
                is whole, before room is made for the body. The stream cannot be read any further,
                and every later call says so again.
        """
        # Keeps WIRE-4.
        if len(self._buffer) < HEADER_BYTES:
            return None
        body_bytes = self._announced()
        if not 1 <= body_bytes <= FRAME_BYTES_MAX:
            raise FdPassing(
                f"a frame announces {body_bytes} bytes; 1 to {FRAME_BYTES_MAX} are allowed"
            )
        if len(self._buffer) < HEADER_BYTES + body_bytes:
            return None
        return self._cut(HEADER_BYTES + body_bytes)

    def _announced(self) -> int:
        return int.from_bytes(self._buffer[:HEADER_BYTES], "big")

    def _cut(self, frame_bytes: int) -> Frame:
        frame = Frame(bytes(self._buffer[HEADER_BYTES:frame_bytes]), self._bytes_taken)
        del self._buffer[:frame_bytes]
        self._bytes_taken += frame_bytes
        return frame
