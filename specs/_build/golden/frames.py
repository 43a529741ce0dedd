"""Golden cases of reading: frames that are written as well, and others that are only accepted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from specs._build.golden.wire import (
    ELEMENTS_MAX,
    ENDED,
    ERRORS,
    FRAME_BYTES_MAX,
    NIL,
    REQUEST,
    RESPONSE,
    STRUCTS,
    SUBSETS,
    TYPES,
    TYPICAL,
    VectorCase,
    JsonMessage,
    Struct,
    compact,
    counted,
    entries,
    framed,
    named_after,
    packed,
    peer_messages,
    structs_in,
    text,
    wide,
)

# --- frames: what is written, and read back ---

SIZES: Final = (0, 1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1000)
"""Bytes of a text: around every border between MessagePack's forms."""

CHARACTERS: Final = (0, 0x1F, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10000)
CHARACTERS_MAX: Final = 0x10FFFF


def frames() -> Iterator[VectorCase]:
    """Yield every message, in the one form in which it is written."""
    for name, document in _messages():
        yield {"id": f"frames/{name}", "message": document, "frame": framed(packed(document)).hex()}


def _messages() -> Iterator[tuple[str, JsonMessage]]:
    for name, document in peer_messages():
        yield f"rmp-serde-{name}", document
    for types in SUBSETS:
        for image in (None, "pytorch-2.5.sqfs"):
            said = "with" if image else "without"
            document = REQUEST.document("job-1", [*types], image)
            yield f"request-{named_after(types)}-{said}-image", document
            path = image and f"/run/pact/uenv/{image.removesuffix('.sqfs')}"
            document = RESPONSE.document("job-1", [*types], path)
            yield f"response-{named_after(types)}-{said}-path", document
    for count in (2, 3):
        for types in itertools.product(TYPES, repeat=count):
            if len(set(types)) < count:
                document = REQUEST.document("job-1", [*types], None)
                yield f"request-repeats-{named_after(types)}", document
    for count in (15, 16, 17, ELEMENTS_MAX):
        types = [TYPES[i % 3] for i in range(count)]
        yield f"request-of-{count}-types", REQUEST.document("job-1", types, None)
        yield f"response-of-{count}-types", RESPONSE.document("job-1", types, None)
    for struct, field in _text_fields():
        place = f"{struct.name}.{field}"
        for size in SIZES:
            yield f"{place}-of-{size}-bytes", _with_text(struct, field, "a" * size)
        for point in (*CHARACTERS, CHARACTERS_MAX):
            yield f"{place}-U+{point:04X}", _with_text(struct, field, f"<{chr(point)}>")
        for wide_character in "é€😀":
            width = len(wide_character.encode())
            for size in (31, 32, 255, 256):
                value = wide_character * (size // width) + "." * (size % width)
                yield f"{place}-of-{size}-bytes-by-{width}", _with_text(struct, field, value)
    for struct in (REQUEST, ENDED):
        for name in ("0", "alloc-42", "4711.batch", "höhe", "作業-3", "a b", "A" * 128):
            slug = name.encode().hex() if not name.isascii() else name.replace(" ", "_")
            yield f"{struct.name}-id-{slug[:12]}", _with_text(struct, "allocation_id", name)
    struct = ERRORS[1]
    room = FRAME_BYTES_MAX - len(packed(struct.document("a" * 256))) + 256
    yield "longest", struct.document("r" * room)


def _with_text(struct: Struct, field: str, value: str) -> JsonMessage:
    """Put a text into one field of a typical message."""
    _, fields = structs_in(TYPICAL[struct])
    return struct.document(*{**fields, field: value}.values())


def _text_fields() -> Iterator[tuple[Struct, str]]:
    return ((s, f) for s in STRUCTS for f in s.fields if f not in ("namespaces", "fd_types"))


# --- accepted: what is read, and never written ---------------------------------------------------

SCALARS: Final = {
    "nil": b"\xc0",
    "false": b"\xc2",
    "true": b"\xc3",
    "fixint": b"\x2a",
    "negative-fixint": b"\xff",
    "uint-8": b"\xcc\xff",
    "uint-16": b"\xcd\xff\xff",
    "uint-32": b"\xce\xff\xff\xff\xff",
    "uint-64": b"\xcf" + b"\xff" * 8,
    "int-8": b"\xd0\x80",
    "int-16": b"\xd1\x80\x00",
    "int-32": b"\xd2\x80\x00\x00\x00",
    "int-64": b"\xd3\x80" + b"\x00" * 7,
    "float-32": b"\xca\x3f\x80\x00\x00",
    "float-64": b"\xcb\x3f\xf0" + b"\x00" * 6,
    "nan": b"\xcb\x7f\xf8" + b"\x00" * 6,
    "no-bytes": b"\xc4\x00",
    "bin-8": b"\xc4\x01a",
    "bin-16": b"\xc5\x00\x01a",
    "bin-32": b"\xc6\x00\x00\x00\x01a",
}
TEXTS: Final = {"fixstr": b"\xa1a", "str-8": b"\xd9\x01a", "str-32": b"\xdb\x00\x00\x00\x01a"}
CONTAINERS: Final = {
    "no-elements": b"\x90",
    "no-entries": b"\x80",
    "array": b"\x93\xc0\xa1a\x01",
    "array-16": b"\xdc\x00\x01\xc0",
    "array-32": b"\xdd\x00\x00\x00\x01\xc0",
    "map": b"\x82\xa1a\xc0\xa1b\xc3",
    "map-16": b"\xde\x00\x01\xa1a\xc0",
    "map-32": b"\xdf\x00\x00\x00\x01\xa1a\xc0",
    "64-elements": b"\xdc\x00\x40" + b"\xc0" * 64,
}


def accepted() -> Iterator[VectorCase]:
    """Yield frames that no sender writes and every receiver reads."""
    for name, body, document in _lenient():
        yield {"id": f"accepted/{name}", "frame": framed(body).hex(), "message": document}


def _lenient() -> Iterator[tuple[str, bytes, JsonMessage]]:
    for name, document in peer_messages():
        yield f"compact-rmp-serde-{name}", compact(document), document
    for types in SUBSETS:
        for text_value in (None, "u"):
            for struct in (REQUEST, RESPONSE):
                document = struct.document("job-1", [*types], text_value)
                said = f"{named_after(types)}-{'with' if text_value else 'without'}"
                yield f"compact-{struct.name}-{said}", compact(document), document
    for struct, document in TYPICAL.items():
        _, fields = structs_in(document)
        pairs = [(packed(k), packed(v)) for k, v in fields.items()]
        yield from _reordered(struct, document, pairs)
        yield from _with_unknown(struct, document, pairs)
        yield from _with_wide_forms(struct, document)
    yield from _without_image()


def _reordered(
    struct: Struct, document: JsonMessage, pairs: Sequence[tuple[bytes, bytes]]
) -> Iterator[tuple[str, bytes, JsonMessage]]:
    for order in itertools.permutations(range(len(pairs))):
        if order != tuple(sorted(order)):
            body = struct.body(entries([pairs[i] for i in order]))
            yield f"order-{struct.name}-{''.join(map(str, order))}", body, document


def _with_unknown(
    struct: Struct, document: JsonMessage, pairs: Sequence[tuple[bytes, bytes]]
) -> Iterator[tuple[str, bytes, JsonMessage]]:
    values = {**SCALARS, **TEXTS}
    if len(struct.path) == 1:
        values |= CONTAINERS  # One level deeper, in an error, they would be too deep.
    for kind, value in values.items():
        body = struct.body(entries([*pairs, (text(b"new"), value)]))
        yield f"unknown-key-{struct.name}-{kind}", body, document
    for place in range(len(pairs)):
        body = struct.body(entries([*pairs[:place], (text(b"new"), NIL), *pairs[place:]]))
        yield f"unknown-key-{struct.name}-at-{place}", body, document
    for key in (b"", b"Allocation_id", b"allocation_id ", b"\xc3\xa9", b"k" * 300):
        body = struct.body(entries([*pairs, (text(key), NIL)]))
        yield f"unknown-key-{struct.name}-called-{key.hex()[:30]}", body, document
    more = [(text(b"x%d" % i), NIL) for i in range(ELEMENTS_MAX - len(pairs))]
    yield f"unknown-keys-{struct.name}-64", struct.body(entries([*pairs, *more])), document


def _with_wide_forms(struct: Struct, document: JsonMessage) -> Iterator[tuple[str, bytes, JsonMessage]]:
    for width in (1, 2, 4):
        yield f"wide-{struct.name}-texts-{8 * width}", _widely(document, width, 0), document
    for width in (2, 4):
        yield f"wide-{struct.name}-counts-{8 * width}", _widely(document, 0, width), document
        body = _widely(document, 4, width)
        yield f"wide-{struct.name}-both-{8 * width}", body, document
        _, fields = structs_in(document)
        head = bytes([0xDC if width == 2 else 0xDD]) + len(fields).to_bytes(width, "big")
        body = struct.body(head + b"".join(map(packed, fields.values())))
        yield f"wide-{struct.name}-compact-{8 * width}", body, document


def _widely(value: Any, texts: int, counts: int) -> bytes:
    """Write a value with all lengths of texts, or all counts, in so many bytes."""
    if value is None:
        return NIL
    if isinstance(value, str):
        return wide(value.encode(), texts) if texts else packed(value)
    items = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
    inner = b"".join(_widely(item, texts, counts) for item in items)
    short, long = (0x80, 0xDE) if isinstance(value, dict) else (0x90, 0xDC)
    if not counts:
        return counted(short, long, len(value)) + inner
    return bytes([long + (counts == 4)]) + len(value).to_bytes(counts, "big") + inner


def _without_image() -> Iterator[tuple[str, bytes, JsonMessage]]:
    for types in SUBSETS:
        document = REQUEST.document("job-1", [*types], None)
        pairs = [(packed(k), packed(v)) for k, v in structs_in(document)[1].items()][:2]
        yield f"no-image-{named_after(types)}", REQUEST.body(entries(pairs)), document
        body = REQUEST.body(entries([pairs[1], (text(b"new"), NIL), pairs[0]]))
        yield f"no-image-{named_after(types)}-reordered", body, document
