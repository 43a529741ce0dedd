"""Messages as MessagePack bytes and back, as the Rust peer (rmp-serde) writes and reads them.

A body is MessagePack: a map of exactly one entry, message name to fields, as serde writes an
externally tagged enum with `rmp_serde::to_vec_named`. What is written is byte for byte what
rmp-serde writes. What is read may differ from that in four ways only: structs as arrays (serde's
compact form), keys in any order, keys that are not known, and an absent `uenv_image`. Anything
else is refused with a reason that a person can act on.

The bytes come from a peer that may be hostile, so decoding is linear in their number, and every
count is compared with its limit before anything is made for it.

Pure: bytes in, values out. This module is the only one that imports `msgpack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn, TypeAlias

import msgpack

from statemachine.errors import NAMESPACE_ERRORS, AllocationNotFound, FdPassing, NamespaceError
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)

from .framing import FRAME_BYTES_MAX

NESTING_MAX: Final = 3
"""Most containers inside one another: every message has three (message, struct, list of types)."""

ELEMENTS_MAX: Final = 64
"""Most elements of a list and entries of a map: far more than any message has, so that a request
that repeats types can still be read, and refused by name."""

SHOWN_CHARACTERS_MAX: Final = 60
"""How much of a peer's text a reason repeats: the reason must fit into an answer."""

Fields: TypeAlias = Mapping[str, object]
"""The fields of a struct by name."""
Document: TypeAlias = dict[str, Any]
"""A message as plain values, ready for MessagePack."""


def encode_message(message: Message) -> bytes:
    """
    Write a message as a frame's body.

    Returns:
        1 to `FRAME_BYTES_MAX` bytes, identical to those of rmp-serde's `to_vec_named`.

    Raises:
        ValueError: a text has a lone surrogate, which UTF-8 cannot carry, or the body would be
            longer than a frame can be.
    """
    # Keeps WIRE-6.
    try:
        body: bytes = msgpack.packb(_document_of(message))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{type(message).__name__} has text that is not Unicode: {error}"
        ) from error
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(
            f"{type(message).__name__} takes {len(body)} bytes; a frame has {FRAME_BYTES_MAX}"
        )
    return body


def decode_message(body: bytes) -> Message:
    """
    Read a frame's body.

    The message is well typed, no more: whether a request can be granted is
    `statemachine.messages.objection`'s to say.

    Raises:
        FdPassing: the body is no message; the reason names the field and what is wrong with it,
            and is short enough to be sent back.

    Source:
        WIRE-8, WIRE-9.
    """
    if not 1 <= len(body) <= FRAME_BYTES_MAX:
        raise FdPassing(f"a body has 1 to {FRAME_BYTES_MAX} bytes, not {len(body)}")
    document = _unpack(body)
    name, content = _sole_entry(document, "the body")
    decode = _DECODERS.get(name)
    if decode is None:
        raise FdPassing(f"{_shown(name)} is not the name of a message")
    message = decode(content)
    # Only the value of an unknown key can still be too deep: known fields have been looked at.
    if _is_deeper_than(NESTING_MAX, document):
        raise FdPassing(f"containers are nested more than {NESTING_MAX} deep")
    return message


def _document_of(message: Message) -> Document:
    # Entries stand in the seed's field order; msgpack writes a dict in its order.
    # Keeps WIRE-7.
    match message:
        case NamespaceRequest():
            return {
                "NamespaceRequest": {
                    "allocation_id": message.allocation_id,
                    "namespaces": [kind.value for kind in message.namespaces],
                    "uenv_image": message.uenv_image,
                }
            }
        case NamespaceResponse():
            return {
                "NamespaceResponse": {
                    "allocation_id": message.allocation_id,
                    "fd_types": [kind.value for kind in message.fd_types],
                    "uenv_mount_path": message.uenv_mount_path,
                }
            }
        case AllocationEnded():
            return {"AllocationEnded": {"allocation_id": message.allocation_id}}
        case NamespaceError():
            return {"NamespaceError": {message.kind: {_error_field(type(message)): message.text}}}


def _error_field(kind: type[NamespaceError]) -> str:
    return "allocation_id" if kind is AllocationNotFound else "reason"


# From bytes to plain values: everything that is refused whatever the message.


def _unpack(body: bytes) -> object:
    # Keeps WIRE-10.
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=False,  # The hook looks at the keys, and says what is wrong with them.
            object_pairs_hook=_with_distinct_names,
            ext_hook=_refuse_extension,
            max_str_len=FRAME_BYTES_MAX,
            max_bin_len=FRAME_BYTES_MAX,
            max_array_len=ELEMENTS_MAX,
            max_map_len=ELEMENTS_MAX,
            max_ext_len=0,
        )
    # UnpackException is not a ValueError in all its kinds, nor the other way round.
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FdPassing(f"the body is not readable: {_fault_of(error)}") from error


def _fault_of(error: Exception) -> str:
    match error:
        case msgpack.exceptions.ExtraData():
            return "more bytes follow the message"
        case msgpack.exceptions.StackError():
            return "containers are nested too deep"
        case msgpack.exceptions.FormatError():
            return "0xc1 is not MessagePack"
        case UnicodeDecodeError():
            return f"text is not UTF-8 ({error.reason})"
        case _:
            return str(error)


def _with_distinct_names(pairs: Iterable[tuple[object, object]]) -> Document:
    # Left alone, msgpack takes the last of two equal keys, and serde refuses them: two readers
    # of one frame would act on different messages.
    document: Document = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise FdPassing(f"a key must be text, not {_kind_of(key)}")
        if key in document:
            raise FdPassing(f"the key {_shown(key)} stands there twice")
        document[key] = value
    return document


def _refuse_extension(code: int, content: bytes) -> NoReturn:
    raise FdPassing(f"extension type {code} has no place in a message")


def _is_deeper_than(depth: int, document: object) -> bool:
    # By levels, not by recursion: the peer chooses the depth.
    level = [document]
    for _ in range(depth):
        level = [child for container in level for child in _children_of(container)]
    return any(isinstance(value, (list, dict)) for value in level)


def _children_of(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# From plain values to messages: every reader names the place it looks at.


def _request_from(content: object) -> NamespaceRequest:
    fields = _fields_of(
        "NamespaceRequest",
        content,
        ("allocation_id", "namespaces", "uenv_image"),
        optional="uenv_image",
    )
    return NamespaceRequest(
        allocation_id=_text_in(fields, "allocation_id"),
        namespaces=_types_in(fields, "namespaces"),
        uenv_image=_optional_text_in(fields, "uenv_image"),
    )


def _response_from(content: object) -> NamespaceResponse:
    fields = _fields_of(
        "NamespaceResponse", content, ("allocation_id", "fd_types", "uenv_mount_path")
    )
    return NamespaceResponse(
        allocation_id=_text_in(fields, "allocation_id"),
        fd_types=_types_in(fields, "fd_types"),
        uenv_mount_path=_optional_text_in(fields, "uenv_mount_path"),
    )


def _ended_from(content: object) -> AllocationEnded:
    fields = _fields_of("AllocationEnded", content, ("allocation_id",))
    return AllocationEnded(_text_in(fields, "allocation_id"))


def _error_from(content: object) -> NamespaceError:
    variant, inner = _sole_entry(content, "NamespaceError")
    kind = _ERROR_KINDS.get(variant)
    if kind is None:
        raise FdPassing(f"{_shown(variant)} is not a kind of NamespaceError")
    field = _error_field(kind)
    return kind(_text_in(_fields_of(variant, inner, (field,)), field))


_DECODERS: Final[Mapping[str, Callable[[object], Message]]] = {
    "NamespaceRequest": _request_from,
    "NamespaceResponse": _response_from,
    "AllocationEnded": _ended_from,
    "NamespaceError": _error_from,
}

_ERROR_KINDS: Final[Mapping[str, type[NamespaceError]]] = {
    kind.kind: kind for kind in NAMESPACE_ERRORS
}

_NAMESPACE_TYPES: Final[Mapping[str, NamespaceType]] = {kind.value: kind for kind in NamespaceType}


def _sole_entry(value: object, place: str) -> tuple[str, object]:
    if not isinstance(value, dict):
        raise FdPassing(f"{place} must be a map of one entry, not {_kind_of(value)}")
    if len(value) != 1:
        raise FdPassing(f"{place} must be a map of one entry, not of {len(value)}")
    return next(iter(value.items()))


def _fields_of(
    struct: str, content: object, names: tuple[str, ...], optional: str | None = None
) -> Fields:
    if isinstance(content, list):
        if len(content) != len(names):
            raise FdPassing(f"{struct} has {len(names)} fields, not {len(content)}")
        return dict(zip(names, content, strict=True))
    if not isinstance(content, dict):
        raise FdPassing(f"{struct} must be a map or an array, not {_kind_of(content)}")
    missing = [name for name in names if name not in content and name != optional]
    if missing:
        raise FdPassing(f"{struct} lacks {', '.join(missing)}")
    return content


def _text_in(fields: Fields, name: str) -> str:
    return _text(name, fields[name])


def _optional_text_in(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None else _text(name, value)


def _types_in(fields: Fields, name: str) -> tuple[NamespaceType, ...]:
    value = fields[name]
    if not isinstance(value, list):
        raise FdPassing(f"{name} must be an array, not {_kind_of(value)}")
    return tuple(_type(f"{name}[{index}]", element) for index, element in enumerate(value))


def _type(place: str, value: object) -> NamespaceType:
    kind = _NAMESPACE_TYPES.get(_text(place, value))
    if kind is None:
        raise FdPassing(f"{place} must be {', '.join(_NAMESPACE_TYPES)}, not {_shown(value)}")
    return kind


def _text(place: str, value: object) -> str:
    if not isinstance(value, str):
        raise FdPassing(f"{place} must be text, not {_kind_of(value)}")
    return value


_KIND_NAMES: Final[Mapping[type, str]] = {
    type(None): "nil",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    bytes: "binary",
    str: "text",
    list: "an array",
    dict: "a map",
}


def _kind_of(value: object) -> str:
    return _KIND_NAMES[type(value)]


def _shown(value: object) -> str:
    # Quoted and in ASCII, so that a peer's text cannot break a log line or an answer's limit.
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else f"{text[:SHOWN_CHARACTERS_MAX]}..."
