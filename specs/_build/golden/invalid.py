"""The golden cases about what is refused: every fault there is, wherever it can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

from specs._build.golden.frames import CONTAINERS, SCALARS, TEXTS
from specs._build.golden.wire import (
    ELEMENTS_MAX,
    ENDED,
    ERRORS,
    NESTING_MAX,
    NIL,
    REQUEST,
    RESPONSE,
    STRUCTS,
    TYPICAL,
    VectorCase,
    Struct,
    array,
    compact,
    entries,
    framed,
    nested,
    packed,
    structs_in,
    text,
    wide,
)

FAULTS: Final = {
    "length-zero": "the header announces no body",
    "length-over-limit": "the header announces more than 65,536 bytes; said before they have come",
    "truncated": "the body ends before the message does",
    "trailing": "the message ends before the body does",
    "not-messagepack": "the byte c1, which MessagePack does not use",
    "not-utf-8": "a text is not UTF-8: overlong, a surrogate, over U+10FFFF, cut short, stray",
    "extension": "an extension type, timestamps among them",
    "too-deep": "more than 3 containers inside one another, counted from the body",
    "too-many": "more than 64 elements in an array, or entries in a map",
    "key-type": "a key of a map, known or not, that is not text",
    "duplicate-key": "a key that stands twice in one map, known or not",
    "wrong-type": "a value of another type than its place has",
    "entries": "a message, or a `NamespaceError`, that is not a map of exactly one entry",
    "missing-field": "a struct as a map without a field (only `uenv_image` may be absent)",
    "field-count": "a struct as an array of another length than it has fields",
    "unknown-message": "the name of no message",
    "unknown-error": "the name of no kind of `NamespaceError`",
    "unknown-type": "the name of no `NamespaceType`; upper and lower case differ",
}
"""What can be wrong with a frame, under names that stay."""

NOT_UTF_8: Final = {
    "stray-continuation": b"\x80",
    "last-stray-continuation": b"\xbf",
    "overlong-nul": b"\xc0\x80",
    "overlong-2": b"\xc1\xbf",
    "overlong-3": b"\xe0\x9f\xbf",
    "overlong-4": b"\xf0\x8f\xbf\xbf",
    "first-surrogate": b"\xed\xa0\x80",
    "last-surrogate": b"\xed\xbf\xbf",
    "surrogate-pair": b"\xed\xa0\xbd\xed\xb8\x80",
    "over-10ffff": b"\xf4\x90\x80\x80",
    "five-bytes": b"\xf8\x88\x80\x80\x80",
    "six-bytes": b"\xfc\x84\x80\x80\x80\x80",
    "fe": b"\xfe",
    "ff": b"\xff",
    "cut-2": b"\xc3",
    "cut-3": b"\xe2\x82",
    "cut-4": b"\xf0\x9f\x98",
    "broken-2": b"\xc3(",
    "broken-3": b"\xe2(\xac",
    "broken-4": b"\xf0\x9f(\x80",
    "latin-1": b"caf\xe9",
}
EXTENSIONS: Final = {
    "fixext-1": b"\xd4\x05a",
    "fixext-2": b"\xd5\x05aa",
    "fixext-4": b"\xd6\x05aaaa",
    "fixext-8": b"\xd7\x05" + b"a" * 8,
    "fixext-16": b"\xd8\x05" + b"a" * 16,
    "ext-8": b"\xc7\x01\x05a",
    "ext-8-empty": b"\xc7\x00\x05",
    "ext-16": b"\xc8\x00\x01\x05a",
    "ext-32": b"\xc9\x00\x00\x00\x01\x05a",
    "timestamp-32": b"\xd6\xff\x00\x00\x00\x00",
    "timestamp-64": b"\xd7\xff" + b"\x00" * 8,
    "timestamp-96": b"\xc7\x0c\xff" + b"\x00" * 12,
}
NO_TYPES: Final = (
    *("pid", "PID", "net", "NET", "mount", "MOUNT", "Pid ", " Pid", "Pid\0", "", "P", "Pi", "Pids"),
    *("User", "Ipc", "Uts", "Cgroup", "Time", "Mnt", "Network", "CLONE_NEWPID", "0", "\u0420id"),
)
NO_MESSAGES: Final = (
    *("", "Hello", "namespace_request", "namespaceRequest", "NAMESPACEREQUEST"),
    "NamespaceRequest ",
    *("NamespaceReques", "NamespaceRequests", "NamespaceRequest\0", "allocation_ended", "Error"),
    *(
        "AllocationEnd",
        "CreationFailed",
        "FdPassing",
        "Ping",
        "0",
        "N\u0430mespaceRequest",
        "m" * 300,
    ),
)
NO_ERRORS: Final = (
    *("", "Timeout", "creation_failed", "creationFailed", "FdPassing ", "FDPassing", "Io", "Other"),
    *("SocketUnavailabl", "AllocationNotFound\0", "NamespaceError", "AllocationEnded", "k" * 300),
)
LENGTHS_OVER: Final = (
    *(65_537, 65_538, 65_540, 70_000, 131_072, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(0x25000000, 0x47455420, 0x16030100, 0x81AF416C),
)
"""Among the last: a little-endian length, `GET `, a TLS record, a body without a header."""


def invalid() -> Iterator[VectorCase]:
    """Yield frames that are refused, each with the faults that may be named."""
    for name, length in [("length-zero", 0), *((f"length-{n}", n) for n in LENGTHS_OVER)]:
        fault = "length-over-limit" if length else "length-zero"
        yield _refused(name, length.to_bytes(4, "big"), fault)
    for name, body, *faults in itertools.chain(
        _cut(), _continued(), _doubled(), _mistyped(), _misnamed(), _misshapen(), _miskeyed(),
        _mistexted(), _extended(), _overdone(),
    ):  # fmt: skip
        yield _refused(name, framed(body), *faults)


def _refused(name: str, frame: bytes, *faults: str) -> VectorCase:
    assert set(faults) <= FAULTS.keys(), faults
    return {"id": f"invalid/{name}", "frame": frame.hex(), "faults": [*faults]}


def _cut() -> Iterator[Any]:
    for struct in (REQUEST, RESPONSE, ENDED, ERRORS[1]):
        body = packed(TYPICAL[struct])
        for size in range(1, len(body)):
            yield f"cut-{struct.name}-{size}", body[:size], "truncated"
        for size in range(len(body) - 12, len(body)):
            short = compact(TYPICAL[struct])
            if 0 < size - len(body) + len(short) < len(short):
                size += len(short) - len(body)
                yield f"cut-compact-{struct.name}-{size}", short[:size], "truncated"
    long = b"\xff\xff\xff\xff"
    head = b"\x81" + packed("AllocationEnded")
    yield "cut-text-of-4-g", head + b"\x91\xdb" + long + b"a", "truncated"
    yield "cut-text-of-64-k", head + b"\x91\xda\xff\xffa", "truncated"
    yield "cut-binary-of-4-g", head + b"\x82" + packed("new") + b"\xc6" + long, "truncated"
    yield "cut-name-of-4-g", b"\x81\xdb" + long + b"AllocationEnded", "truncated"
    yield "cut-array-of-4-g", head + b"\xdd" + long, "truncated", "too-many", "field-count"
    yield "cut-map-of-4-g", head + b"\xdf" + long, "truncated", "too-many"


def _continued() -> Iterator[Any]:
    for struct, document in TYPICAL.items():
        for form, body in (("named", packed(document)), ("compact", compact(document))):
            for tail in (b"\x00", b"\xc0", b"\xc1", b"\xff", b"\x80", b"\n", b"\x00" * 8, body):
                name = "itself" if tail is body else tail.hex()
                yield f"trailing-{struct.name}-{form}-{name}", body + tail, "trailing"


def _doubled() -> Iterator[Any]:
    for struct, document in TYPICAL.items():
        pairs = [(packed(k), packed(v)) for k, v in structs_in(document)[1].items()]
        for index, (key, value) in enumerate(pairs):
            name = f"duplicate-{struct.name}.{struct.fields[index]}"
            wide_key = wide(struct.fields[index].encode(), 1)
            yield f"{name}-next", _with_pairs(struct, pairs, index, (key, value)), "duplicate-key"
            body = _with_pairs(struct, pairs, index, (wide_key, value))
            yield f"{name}-wide", body, "duplicate-key"
            body = struct.body(entries([*pairs, (key, value)]))
            yield f"{name}-last", body, "duplicate-key"
        new = (text(b"new"), NIL)
        body = struct.body(entries([*pairs, new, new]))
        yield f"duplicate-{struct.name}-unknown", body, "duplicate-key"
        apart = struct.body(entries([new, *pairs, new]))
        yield f"duplicate-{struct.name}-unknown-apart", apart, "duplicate-key"
        whole = packed(document)[1:]
        yield f"duplicate-{struct.name}-message", b"\x82" + whole * 2, "duplicate-key", "entries"
    inner = entries([(text(b"k"), NIL)] * 2)
    pairs = [(packed("allocation_id"), packed("a")), (text(b"new"), inner)]
    yield "duplicate-inside-an-unknown-map", ENDED.body(entries(pairs)), "duplicate-key"
    kind = packed("FdPassing") + b"\x91\xa0"
    body = entries([(packed("NamespaceError"), b"\x82" + kind * 2)])
    yield "duplicate-kind-of-error", body, "duplicate-key", "entries"


def _with_pairs(
    struct: Struct, pairs: list[tuple[bytes, bytes]], index: int, more: tuple[bytes, bytes]
) -> bytes:
    return struct.body(entries([*pairs[: index + 1], more, *pairs[index + 1 :]]))


def _mistyped() -> Iterator[Any]:
    containers = {k: CONTAINERS[k] for k in ("no-elements", "no-entries", "array", "map")}
    for struct, document in TYPICAL.items():
        fields = structs_in(document)[1]
        deep = ("too-deep",) if len(struct.path) > 1 else ()
        for field in struct.fields:
            values = {**SCALARS, **containers}
            if field in ("namespaces", "fd_types"):
                values = {**SCALARS, **TEXTS, "no-entries": b"\x80", "map": b"\x81\xa3Pid\xc0"}
            if field in ("uenv_image", "uenv_mount_path"):
                del values["nil"]
            for kind, value in values.items():
                written = {k: packed(v) for k, v in fields.items()} | {field: value}
                name = f"type-{struct.name}.{field}-{kind}"
                extra = deep if kind in containers else ()
                named = entries([(packed(k), v) for k, v in written.items()])
                yield f"{name}", struct.body(named), "wrong-type", *extra
                body = struct.body(array([*written.values()]))
                yield f"{name}-compact", body, "wrong-type", *extra
        for kind, value in {**SCALARS, **TEXTS}.items():
            yield f"type-{struct.name}-{kind}", struct.body(value), "wrong-type"
    for kind, value in {**SCALARS, **containers}.items():
        extra = ("too-deep",) if kind in containers else ()
        for place, types in (("first", [value]), ("second", [packed("Pid"), value])):
            body = REQUEST.body(array([packed("a"), array(types), NIL]))
            yield f"type-namespaces-{place}-{kind}", body, "wrong-type", *extra
    for kind, value in {**SCALARS, **TEXTS, "array": b"\x91\xc0", "no-elements": b"\x90"}.items():
        yield f"type-body-{kind}", value, "wrong-type", "entries"
        body = entries([(packed("NamespaceError"), value)])
        yield f"type-NamespaceError-{kind}", body, "wrong-type", "entries"


def _misnamed() -> Iterator[Any]:
    for name in NO_TYPES:
        for struct in (REQUEST, RESPONSE):
            for place, types in (("first", [name, "Net"]), ("last", ["Net", name])):
                body = packed(struct.document("job-1", types, None))
                yield f"name-{struct.name}-{place}-{_slug(name)}", body, "unknown-type"
    for name in NO_MESSAGES:
        for form, content in (("map", packed({"allocation_id": "a"})), ("array", packed(["a"]))):
            body = entries([(packed(name), content)])
            yield f"name-message-{_slug(name)}-{form}", body, "unknown-message"
    for name in NO_ERRORS:
        body = packed({"NamespaceError": {name: {"reason": "r"}}})
        yield f"name-error-{_slug(name)}", body, "unknown-error"
        body = packed({"NamespaceError": {name: ["r"]}})
        yield f"name-error-{_slug(name)}-compact", body, "unknown-error"


def _slug(name: str) -> str:
    is_plain = name.isalnum() and name.isascii() and len(name) < 40
    return name if is_plain else f"x{name.encode().hex()[:40]}"


def _misshapen() -> Iterator[Any]:
    yield "entries-none", b"\x80", "entries"
    yield "entries-no-error", packed({"NamespaceError": {}}), "entries"
    for one, two in itertools.permutations(STRUCTS[:3], 2):
        body = packed({**TYPICAL[one], **TYPICAL[two]})
        yield f"entries-{one.name}-{two.name}", body, "entries"
    for one, two in itertools.permutations(ERRORS, 2):
        both = {e.name: {e.fields[0]: "x"} for e in (one, two)}
        yield f"entries-{one.name}-{two.name}", packed({"NamespaceError": both}), "entries"
    for struct, document in TYPICAL.items():
        yield f"entries-{struct.name}-and-more", packed({**document, "new": None}), "entries"
        fields = structs_in(document)[1]
        for count in range(len(fields)):
            for kept in itertools.combinations(struct.fields, count):
                if struct is REQUEST and set(kept) == {"allocation_id", "namespaces"}:
                    continue
                left = "-".join(kept) or "nothing"
                body = struct.body(packed({k: fields[k] for k in kept}))
                yield f"missing-{struct.name}-has-{left}", body, "missing-field"
        values = [packed(value) for value in fields.values()]
        for count in range(len(values) + 4):
            if count != len(values):
                body = struct.body(array([*values, *[NIL] * 4][:count]))
                yield f"count-{struct.name}-{count}", body, "field-count"
    for struct, wrong in itertools.product(STRUCTS, ("reason", "allocation_id", "Allocation_id")):
        if wrong not in struct.fields:
            body = struct.body(packed({wrong: "x"}))
            yield f"missing-{struct.name}-has-only-{wrong}", body, "missing-field"


def _miskeyed() -> Iterator[Any]:
    keys = {**SCALARS, "no-elements": b"\x90", "no-entries": b"\x80"}
    for kind, key in keys.items():
        yield f"key-message-{kind}", entries([(key, packed(["a"]))]), "key-type"
        pairs = [(packed("allocation_id"), packed("a")), (key, NIL)]
        extra = ("too-deep",) if kind in CONTAINERS else ()
        yield f"key-field-{kind}", ENDED.body(entries(pairs)), "key-type"
        yield f"key-field-{kind}-first", ENDED.body(entries(pairs[::-1])), "key-type"
        body = entries([(packed("NamespaceError"), entries([(key, packed(["r"]))]))])
        yield f"key-error-{kind}", body, "key-type"
        inner = (text(b"new"), entries([(key, NIL)]))
        body = ENDED.body(entries([pairs[0], inner]))
        yield f"key-inside-an-unknown-map-{kind}", body, "key-type", *extra


def _mistexted() -> Iterator[Any]:
    for kind, wrong in NOT_UTF_8.items():
        for form, content in (("alone", wrong), ("first", wrong + b"ab"), ("last", b"ab" + wrong)):
            if kind.startswith("cut") and form == "first":
                content = wrong + b"a"
            yield f"utf-8-id-{kind}-{form}", ENDED.body(array([text(content)])), "not-utf-8"
        image = REQUEST.body(array([packed("a"), packed(["Mount"]), text(wrong)]))
        yield f"utf-8-image-{kind}", image, "not-utf-8"
        yield f"utf-8-reason-{kind}", ERRORS[3].body(array([text(wrong)])), "not-utf-8"
        known = (packed("allocation_id"), packed("a"))
        yield f"utf-8-key-{kind}", ENDED.body(entries([known, (text(wrong), NIL)])), "not-utf-8"
        unknown = (text(b"new"), text(wrong))
        yield f"utf-8-unknown-{kind}", ENDED.body(entries([known, unknown])), "not-utf-8"
        body = REQUEST.body(array([packed("a"), array([text(wrong)]), NIL]))
        yield f"utf-8-type-{kind}", body, "not-utf-8", "unknown-type"
        body = entries([(text(wrong), packed(["a"]))])
        yield f"utf-8-message-{kind}", body, "not-utf-8", "unknown-message"


def _extended() -> Iterator[Any]:
    known = (packed("allocation_id"), packed("a"))
    for kind, value in {**EXTENSIONS, "c1": b"\xc1"}.items():
        fault = "not-messagepack" if kind == "c1" else "extension"
        also = () if kind == "c1" else ("wrong-type",)
        yield f"extension-body-{kind}", value, fault, *also
        yield f"extension-struct-{kind}", ENDED.body(value), fault, *also
        yield f"extension-id-{kind}", ENDED.body(array([value])), fault, *also
        body = REQUEST.body(array([packed("a"), array([value]), NIL]))
        yield f"extension-type-{kind}", body, fault, *also
        body = REQUEST.body(array([packed("a"), packed(["Mount"]), value]))
        yield f"extension-image-{kind}", body, fault, *also
        unknown = (text(b"new"), value)
        yield f"extension-unknown-{kind}", ENDED.body(entries([known, unknown])), fault
        unknown = (text(b"new"), array([NIL, value]))
        yield f"extension-in-unknown-{kind}", ENDED.body(entries([known, unknown])), fault
        if kind != "c1":
            body = ENDED.body(entries([known, (value, NIL)]))
            yield f"extension-key-{kind}", body, fault, "key-type"


def _overdone() -> Iterator[Any]:
    for struct, document in TYPICAL.items():
        pairs = [(packed(k), packed(v)) for k, v in structs_in(document)[1].items()]
        allowed = NESTING_MAX - len(struct.path) - 1
        for depth in (*range(allowed + 1, allowed + 6), 16, 64, 500):
            for kind in ("arrays", "maps"):
                unknown = (text(b"new"), nested(depth, maps=kind == "maps"))
                body = struct.body(entries([*pairs, unknown]))
                yield f"deep-{struct.name}-{depth}-{kind}", body, "too-deep"
        for count in (ELEMENTS_MAX + 1, 100, 256):
            keys = [(text(b"x%d" % i), NIL) for i in range(count - len(pairs))]
            body = struct.body(entries([*pairs, *keys]))
            yield f"many-{struct.name}-{count}-entries", body, "too-many"
            if len(struct.path) == 1:
                unknown = (text(b"new"), array([NIL] * count))
                body = struct.body(entries([*pairs, unknown]))
                yield f"many-{struct.name}-{count}-unknown", body, "too-many"
    yield "deep-body-5000-arrays", nested(5000), "too-deep", "wrong-type", "entries"
    yield "deep-body-5000-maps", nested(5000, maps=True), "too-deep", "unknown-message"
    for struct, count in itertools.product((REQUEST, RESPONSE), (ELEMENTS_MAX + 1, 100, 1000)):
        body = packed(struct.document("a", ["Pid"] * count, None))
        yield f"many-{struct.name}-{count}-types", body, "too-many"
