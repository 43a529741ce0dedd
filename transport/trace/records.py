"""A provider's trace as lines of JSON: what its kernel was fed, and what it decided. Pure.

    {"schema": 1, "seq": 0, "start": {"limits": {...}}}          a provider starts
    {"schema": 1, "seq": 1, "recovery": {"remembered": [...]}}   its backend has looked around
    {"schema": 1, "seq": 2, "event": {"ProviderReady": {}}, "effects": [...]}

Every value is written as its class' annotations say, so a new event or effect needs no code here:
a dataclass as an object of its fields, where any event or effect may stand under the name of its
class, an error as its kind and text, an enum as its value. Reading is strict: what is read is what
was written, or it is refused.

`seq` counts from each start. A provider that is killed may leave half a line; the next one ends it
and starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import ModuleType, NoneType, UnionType
from typing import Any, Final, TypeAlias, get_args, get_origin, get_type_hints

from statemachine import effects as do
from statemachine.effects import Effect
from statemachine.errors import NAMESPACE_ERRORS, Copyable, NamespaceError
from statemachine.events import ConsumerInput, Event, ProviderInput
from statemachine.provider import Limits
from statemachine.record import record

_write_json: Final = json.JSONEncoder(separators=(",", ":")).encode
_read_json: Final = json.JSONDecoder().decode

SCHEMA: Final = 1
"""Version of the lines; a reader refuses any other."""

LINE_BYTES_MAX: Final = 1 << 26
"""Longest line: one event that answers thousands of connections."""


class TraceError(Copyable, Exception):
    """A line of a trace that cannot be read, or cannot have happened; lines count from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line: Final = line
        self.reason: Final = reason


@record
class Start:
    """A provider starts, knowing nothing."""

    limits: Limits


@record
class Recovered:
    """Its backend has looked around; what is alive is adopted next."""

    remembered: tuple[str, ...]
    """The names of released allocations, oldest first."""


@record
class Turn:
    """The kernel was fed an event, and decided."""

    event: ProviderInput
    effects: tuple[Effect, ...]


TraceEntry: TypeAlias = Start | Recovered | Turn
"""What a line says."""


_BEGINNING: Final = b'{"schema":'


# --- Lines -------------------------------------------------------------------------------------


def encode_line(sequence: int, entry: TraceEntry) -> bytes:
    """Write a line, its end included."""
    return b'{"schema":%d,"seq":%d,%s\n' % (SCHEMA, sequence, _said(entry))


def decode_line(number: int, text: bytes) -> tuple[int, TraceEntry]:
    """
    Read a line.

    Args:
        number: Of the line, for the error.
        text: With its end or without.

    Returns:
        Its sequence number, and what it says.

    Raises:
        TraceError: it is none.
    """
    return _entry_of(number, _parsed(number, text))


def read_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, int, TraceEntry]]:
    """
    Read a trace, holding one line at a time; half a line at the end of a provider's life is none.

    Yields:
        The line's number, its sequence number, and what it says.

    Raises:
        TraceError: there is a line that is none.
    """
    half: TraceError | None = None
    text = b""
    for number, text in enumerate(lines, 1):
        try:
            plain = _parsed(number, text)
        except TraceError as error:
            if not _BEGINNING.startswith(text.rstrip(b"\n")[: len(_BEGINNING)]):
                raise  # of no line of a trace the half
            half = half or error
            continue
        sequence, entry = _entry_of(number, plain)
        if half is not None and not isinstance(entry, Start):
            raise half
        half = None
        yield number, sequence, entry
    if half is not None and text.endswith(b"\n"):
        raise half


def _said(entry: TraceEntry) -> bytes:
    plain = _ENTRIES[type(entry)].encode(entry)
    if not isinstance(entry, Turn):
        plain = {_MARKS[type(entry)]: plain}
    return _write_json(plain)[1:].encode("ascii")


def _parsed(number: int, text: bytes) -> Any:
    if len(text) > LINE_BYTES_MAX:
        raise TraceError(number, f"over {LINE_BYTES_MAX} bytes")
    try:
        return _read_json(text.decode())
    except (ValueError, RecursionError):
        raise TraceError(number, "not a line of JSON") from None


def _entry_of(number: int, plain: Any) -> tuple[int, TraceEntry]:
    try:
        if type(plain) is not dict or plain.pop("schema", None) != SCHEMA:
            raise _Unreadable(f"not of schema {SCHEMA}")
        sequence = _INTEGER.decode(plain.pop("seq", None))
        if len(plain) == 1:
            for kind, mark in _MARKS.items():
                if mark in plain:
                    return sequence, _ENTRIES[kind].decode(plain[mark])
        return sequence, _ENTRIES[Turn].decode(plain)
    except _Unreadable as fault:
        raise TraceError(number, str(fault)) from None


# --- Values ------------------------------------------------------------------------------------


def encode_event(event: Event) -> Any:
    """Write an event as plain JSON values."""
    return _EVENT.encode(event)


def encode_effect(effect: Effect) -> Any:
    """Write an effect as plain JSON values."""
    return _EFFECT.encode(effect)


def decode_event(plain: Any) -> ProviderInput | ConsumerInput:
    """Read what `encode_event` wrote; raise `ValueError` if it is something else."""
    event: ProviderInput | ConsumerInput = _EVENT.decode(plain)
    return event


def decode_effect(plain: Any) -> Effect:
    """Read what `encode_effect` wrote; raise `ValueError` if it is something else."""
    effect: Effect = _EFFECT.decode(plain)
    return effect


class _Unreadable(ValueError):
    """A value that no encoder here writes."""


@record
class _Codec:
    """How the values of one annotation are written and read."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


@cache
def _codec_of(annotation: Any) -> _Codec:
    """Make the codec of an annotation; made once for each."""
    if annotation in (ProviderInput, _FED):
        return _tagged({kind: _codec_of(kind) for kind in get_args(annotation)})
    if annotation is Effect:
        return _tagged({kind: _codec_of(kind) for kind in _leaves(do, Effect)})
    if get_origin(annotation) is UnionType:
        return _optional(_codec_of(next(x for x in get_args(annotation) if x is not NoneType)))
    if get_origin(annotation) in (tuple, frozenset):
        return _sequence(get_origin(annotation), _codec_of(get_args(annotation)[0]))
    if issubclass(annotation, NamespaceError):
        kinds = [kind for kind in NAMESPACE_ERRORS if issubclass(kind, annotation)]
        return _tagged({kind: _error(kind) for kind in kinds})
    if issubclass(annotation, Enum):
        return _enum(annotation)
    return _fields_of(annotation) if is_dataclass(annotation) else _exactly(annotation)


def _exactly(kind: type) -> _Codec:
    def decode(plain: Any) -> Any:
        if type(plain) is not kind:
            raise _Unreadable(f"{plain!r:.80} is no {kind.__name__}")
        return plain

    return _Codec(lambda value: value, decode)


def _optional(some: _Codec) -> _Codec:
    return _Codec(
        lambda value: None if value is None else some.encode(value),
        lambda plain: None if plain is None else some.decode(plain),
    )


def _sequence(kind: Any, item: _Codec) -> _Codec:
    order = sorted if kind is frozenset else list

    write, read = item.encode, item.decode

    def decode(plain: Any) -> Any:
        return kind([read(one) for one in _LIST.decode(plain)])

    return _Codec(lambda value: [write(one) for one in order(value)], decode)


def _enum(kind: type[Enum]) -> _Codec:
    members = {member.value: member for member in kind}

    def decode(plain: Any) -> Any:
        if type(plain) is not str or plain not in members:
            raise _Unreadable(f"{plain!r:.80} is no {kind.__name__}")
        return members[plain]

    return _Codec(lambda value: value.value, decode)


def _error(kind: type[NamespaceError]) -> _Codec:
    return _Codec(lambda value: value.text, lambda plain: kind(_TEXT.decode(plain)))


def _fields_of(kind: Any) -> _Codec:
    """Write a dataclass as an object; all of its fields must be there, and no others."""
    hints = get_type_hints(kind)
    codecs = {field.name: _codec_of(hints[field.name]) for field in fields(kind)}
    writers = [(name, codec.encode) for name, codec in codecs.items()]
    readers = [(name, codec.decode) for name, codec in codecs.items()]

    def encode(value: Any) -> dict[str, Any]:
        return {name: write(getattr(value, name)) for name, write in writers}

    def decode(plain: Any) -> Any:
        if type(plain) is dict and len(plain) == len(readers):
            try:
                return kind(*[read(plain[name]) for name, read in readers])
            except KeyError:
                pass  # One has another name, and another is missing.
        raise _Unreadable(f"{plain!r:.80} is no {kind.__name__}")

    return _Codec(encode, decode)


def _tagged(codecs: dict[Any, _Codec]) -> _Codec:
    """Write a value under the name of its class."""
    readers = {kind.__name__: codec.decode for kind, codec in codecs.items()}

    def decode(plain: Any) -> Any:
        if type(plain) is dict and len(plain) == 1:
            ((name, inner),) = plain.items()
            if name in readers:
                return readers[name](inner)
        raise _Unreadable(f"{plain!r:.80} is none of {', '.join(sorted(readers))}")

    return _Codec(lambda value: {type(value).__name__: codecs[type(value)].encode(value)}, decode)


def _leaves(module: ModuleType, root: type) -> list[type]:
    """Find the classes of a module below `root` that no other class of it refines."""
    kinds = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, root)]
    return [kind for kind in kinds if sum(issubclass(c, kind) for c in kinds) == 1]


_FED: Final = ProviderInput | ConsumerInput
_INTEGER: Final = _exactly(int)
_TEXT: Final = _exactly(str)
_LIST: Final = _exactly(list)
_EVENT: Final = _codec_of(_FED)
_EFFECT: Final = _codec_of(Effect)
_KINDS: Final[tuple[Any, ...]] = get_args(TraceEntry)
_ENTRIES: Final[dict[type[TraceEntry], _Codec]] = {kind: _codec_of(kind) for kind in _KINDS}
_MARKS: Final[dict[type[TraceEntry], str]] = {Start: "start", Recovered: "recovery"}
"""Under which key a line says that it is no turn."""
