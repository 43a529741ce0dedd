"""What a provider took in and decided, line by line.

records    reading and writing a trace
check      whether a trace could have happened
clauses    what of the book an impossible line breaks
diagram    a trace as a sequence diagram
"""

from __future__ import annotations

from .records import (
    Recovered,
    Start,
    TraceEntry,
    TraceError,
    Turn,
    decode_effect,
    decode_event,
    decode_line,
    encode_effect,
    encode_event,
    encode_line,
    read_lines,
)

__all__ = [
    "Recovered",
    "Start",
    "TraceEntry",
    "TraceError",
    "Turn",
    "decode_effect",
    "decode_event",
    "decode_line",
    "encode_effect",
    "encode_event",
    "encode_line",
    "read_lines",
]
