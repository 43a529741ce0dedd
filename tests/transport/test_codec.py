"""Our bytes are rmp-serde's, its bytes are read in both forms, and everything else is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from statemachine.errors import (
    NAMESPACE_ERRORS,
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.testing.strategies import messages, texts
from transport.codec import ELEMENTS_MAX, NESTING_MAX, decode_message, encode_message
from transport.framing import FRAME_BYTES_MAX

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT


class Vector(NamedTuple):
    name: str
    document: Any
    named: bytes
    compact: bytes


def _vector(line: str) -> Vector:
    entry = json.loads(line)
    named, compact = bytes.fromhex(entry["named"]), bytes.fromhex(entry["compact"])
    return Vector(entry["name"], entry["json"], named, compact)


VECTORS = [
    _vector(line)
    for line in (Path(__file__).parent / "vectors" / "rmp-serde.jsonl").read_text().splitlines()
]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])


def message_of(document: Any) -> Message:
    """Build the message a vector's JSON describes, without the codec."""
    ((name, content),) = document.items()
    if name == "NamespaceError":
        ((variant, fields),) = content.items()
        kinds: dict[str, type[NamespaceError]] = {kind.kind: kind for kind in NAMESPACE_ERRORS}
        return kinds[variant](*fields.values())
    if name == "AllocationEnded":
        return AllocationEnded(content["allocation_id"])
    allocation_id, types, text = content.values()
    struct = NamespaceRequest if name == "NamespaceRequest" else NamespaceResponse
    return struct(allocation_id, tuple(map(NamespaceType, types)), text)


def refusal_of(body: bytes) -> str:
    with pytest.raises(FdPassing) as caught:
        decode_message(body)
    return caught.value.reason


def test_basic_message() -> None:
    body = b"\x81\xafAllocationEnded\x81\xadallocation_id\xa8alloc-42"
    assert encode_message(AllocationEnded("alloc-42")) == body
    assert decode_message(body) == AllocationEnded("alloc-42")


@pytest.mark.clause("WIRE-6")
@each_vector
def test_a_vector_is_written_byte_for_byte(vector: Vector) -> None:
    assert encode_message(message_of(vector.document)) == vector.named


@pytest.mark.clause("WIRE-8")
@each_vector
def test_a_vector_is_read_in_both_forms(vector: Vector) -> None:
    message = message_of(vector.document)
    assert decode_message(vector.named) == message
    assert decode_message(vector.compact) == message


@pytest.mark.clause("WIRE-7")
def test_the_vectors_cover_every_message_that_serde_can_write() -> None:
    # The seed's FdPassing holds an io::Error, which serde cannot; the next test has its bytes.
    messages = [message_of(vector.document) for vector in VECTORS]
    assert {type(message) for message in messages} == {
        NamespaceRequest,
        NamespaceResponse,
        AllocationEnded,
        *NAMESPACE_ERRORS,
    } - {FdPassing}


@pytest.mark.clause("WIRE-7")
def test_fd_passing_is_written_like_the_other_errors() -> None:
    body = b"\x81\xaeNamespaceError\x81\xa9FdPassing\x81\xa6reason\xa4EPIP"
    assert encode_message(FdPassing("EPIP")) == body
    assert decode_message(body) == FdPassing("EPIP")


def in_request(fields: bytes) -> bytes:
    return b"\x81\xb0NamespaceRequest" + fields


def in_response(fields: bytes) -> bytes:
    return b"\x81\xb1NamespaceResponse" + fields


def in_ended(fields: bytes) -> bytes:
    return b"\x81\xafAllocationEnded" + fields


def in_error(content: bytes) -> bytes:
    return b"\x81\xaeNamespaceError" + content


ID, TYPES, IMAGE = b"\xadallocation_id\xa1a", b"\xaanamespaces\x91\xa3Pid", b"\xaauenv_image\xa1i"

READ = {
    "keys in another order": (
        in_request(b"\x83" + IMAGE + TYPES + ID),
        NamespaceRequest("a", (PID,), "i"),
    ),
    "an unknown key": (
        in_request(b"\x84" + ID + b"\xa3new\x01" + TYPES + IMAGE),
        NamespaceRequest("a", (PID,), "i"),
    ),
    "an unknown key with a list": (
        in_ended(b"\x82" + ID + b"\xa3new\x93\xc0\xc3\xc4\x01\xff"),
        AllocationEnded("a"),
    ),
    "no uenv_image": (in_request(b"\x82" + ID + TYPES), NamespaceRequest("a", (PID,))),
    "a map and a text longer than they need": (
        b"\xde\x00\x01\xd9\x0fAllocationEnded\xdf\x00\x00\x00\x01\xadallocation_id\xda\x00\x01a",
        AllocationEnded("a"),
    ),
    "a repeated type, to be refused by name": (
        in_request(b"\x93\xa1a\x92\xa3Net\xa3Net\xc0"),
        NamespaceRequest("a", (NET, NET)),
    ),
    "as many types as a list may have": (
        in_request(b"\x93\xa1a\xdc\x00\x40" + b"\xa3Pid" * ELEMENTS_MAX + b"\xc0"),
        NamespaceRequest("a", (PID,) * ELEMENTS_MAX),
    ),
    "an id that the Linux kernel would refuse": (
        in_ended(b"\x81\xadallocation_id\xa4a\x00/\n"),
        AllocationEnded("a\0/\n"),
    ),
    "an empty id": (in_ended(b"\x91\xa0"), AllocationEnded("")),
}


@pytest.mark.clause("WIRE-8")
@pytest.mark.parametrize(("body", "message"), READ.values(), ids=READ)
def test_a_lenient_form_is_read(body: bytes, message: Message) -> None:
    assert decode_message(body) == message


GARBLED = "the body is not readable: "
MORE = f"{GARBLED}more bytes follow the message"
CUT = f"{GARBLED}Unpack failed: incomplete input"
NOT_UTF8 = f"{GARBLED}text is not UTF-8 (invalid start byte)"
ONE_ENTRY = "the body must be a map of one entry, not "
REFUSED = {
    # Duplicate keys.
    "a field twice": (in_ended(b"\x82" + ID + ID), "the key 'allocation_id' stands there twice"),
    "an unknown key twice": (
        in_ended(b"\x83" + ID + b"\xa1x\x01\xa1x\x01"),
        "the key 'x' stands there twice",
    ),
    "a message twice": (
        b"\x82" + in_ended(b"\x81" + ID)[1:] * 2,
        "the key 'AllocationEnded' stands there twice",
    ),
    # Bytes after the message, and too few.
    "a byte after the message": (in_ended(b"\x81" + ID) + b"\x00", MORE),
    "a message after the message": (in_ended(b"\x81" + ID) * 2, MORE),
    "a message cut short": (in_ended(b"\x81" + ID)[:-1], CUT),
    "nothing": (b"", "a body has 1 to 65536 bytes, not 0"),
    # Other types than the field's.
    "an integer for an id": (
        in_ended(b"\x81\xadallocation_id\x2a"),
        "allocation_id must be text, not an integer",
    ),
    "binary for an id": (
        in_ended(b"\x81\xadallocation_id\xc4\x01a"),
        "allocation_id must be text, not binary",
    ),
    "empty binary for an id": (in_ended(b"\x91\xc4\x00"), "allocation_id must be text, not binary"),
    "nil for an id": (in_ended(b"\x91\xc0"), "allocation_id must be text, not nil"),
    "NaN for an id": (
        in_ended(b"\x91\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"),
        "allocation_id must be text, not a float",
    ),
    "a list for an id": (in_ended(b"\x91\x90"), "allocation_id must be text, not an array"),
    "a boolean for an image": (
        in_request(b"\x93\xa1a\x90\xc2"),
        "uenv_image must be text, not a boolean",
    ),
    "binary for an image": (
        in_request(b"\x93\xa1a\x90\xc4\x01i"),
        "uenv_image must be text, not binary",
    ),
    "an integer for a mount path": (
        in_response(b"\x93\xa1a\x90\x00"),
        "uenv_mount_path must be text, not an integer",
    ),
    "text for the namespaces": (
        in_request(b"\x93\xa1a\xa3Pid\xc0"),
        "namespaces must be an array, not text",
    ),
    "nil for the types": (in_response(b"\x93\xa1a\xc0\xc0"), "fd_types must be an array, not nil"),
    "a variant as index": (
        in_request(b"\x93\xa1a\x92\xa3Pid\x01\xc0"),
        "namespaces[1] must be text, not an integer",
    ),
    "a variant as a map": (
        in_request(b"\x93\xa1a\x91\x81\xa3Pid\xc0\xc0"),
        "namespaces[0] must be text, not a map",
    ),
    "an integer for a reason": (
        in_error(b"\x81\xaeCreationFailed\x81\xa6reason\x01"),
        "reason must be text, not an integer",
    ),
    # Variants.
    "a lower-case variant": (
        in_request(b"\x93\xa1a\x91\xa3pid\xc0"),
        "namespaces[0] must be Pid, Net, Mount, not 'pid'",
    ),
    "an unknown variant": (
        in_response(b"\x93\xa1a\x92\xa3Pid\xa4User\xc0"),
        "fd_types[1] must be Pid, Net, Mount, not 'User'",
    ),
    "an unknown message": (b"\x81\xa5Hello\x90", "'Hello' is not the name of a message"),
    "the longest name that is shown": (
        b"\x81\xd9\x3a" + b"x" * 58 + b"\x90",
        f"'{'x' * 58}' is not the name of a message",
    ),
    "a lower-case message": (
        b"\x81\xb0allocation_ended\x81" + ID,
        "'allocation_ended' is not the name of a message",
    ),
    "a message as index": (b"\x81\x02\x81" + ID, "a key must be text, not an integer"),
    "an unknown kind of error": (
        in_error(b"\x81\xa7Timeout\x81\xa6reason\xa0"),
        "'Timeout' is not a kind of NamespaceError",
    ),
    "two kinds of error": (
        in_error(b"\x82\xaeCreationFailed\x91\xa0\xa9FdPassing\x91\xa0"),
        "NamespaceError must be a map of one entry, not of 2",
    ),
    "an error without a kind": (
        in_error(b"\x80"),
        "NamespaceError must be a map of one entry, not of 0",
    ),
    "an error as text": (
        in_error(b"\xa9FdPassing"),
        "NamespaceError must be a map of one entry, not text",
    ),
    # Shapes.
    "no map": (b"\x93\xa1a\x90\xc0", f"{ONE_ENTRY}an array"),
    "text alone": (b"\xafAllocationEnded", f"{ONE_ENTRY}text"),
    "nil alone": (b"\xc0", f"{ONE_ENTRY}nil"),
    "an empty map": (b"\x80", f"{ONE_ENTRY}of 0"),
    "two messages in one map": (
        b"\x82\xafAllocationEnded\x91\xa0\xb0NamespaceRequest\x93\xa0\x90\xc0",
        f"{ONE_ENTRY}of 2",
    ),
    "a struct as text": (in_ended(b"\xa1a"), "AllocationEnded must be a map or an array, not text"),
    "a struct with a field missing": (
        in_request(b"\x81" + IMAGE),
        "NamespaceRequest lacks allocation_id, namespaces",
    ),
    "a response without its mount path": (
        in_response(b"\x82\xadallocation_id\xa1a\xa8fd_types\x90"),
        "NamespaceResponse lacks uenv_mount_path",
    ),
    "an error's struct with another's field": (
        in_error(b"\x81\xb2AllocationNotFound\x81\xa6reason\xa0"),
        "AllocationNotFound lacks allocation_id",
    ),
    "an array with a field missing": (
        in_request(b"\x92\xa1a\x90"),
        "NamespaceRequest has 3 fields, not 2",
    ),
    "an array with a field too many": (
        in_ended(b"\x92\xa1a\xc0"),
        "AllocationEnded has 1 fields, not 2",
    ),
    "a binary key": (b"\x81\xc4\x0fAllocationEnded\x81" + ID, "a key must be text, not binary"),
    "an array as key": (b"\x81\x90\xc0", "a key must be text, not an array"),
    # Not UTF-8.
    "an id that is not UTF-8": (in_ended(b"\x91\xa2a\xff"), NOT_UTF8),
    "a surrogate in UTF-8's clothes": (
        in_ended(b"\x91\xa3\xed\xa0\x80"),
        f"{GARBLED}text is not UTF-8 (invalid continuation byte)",
    ),
    "an overlong NUL": (in_ended(b"\x91\xa2\xc0\x80"), NOT_UTF8),
    "a key that is not UTF-8": (b"\x81\xa1\xff\x90", NOT_UTF8),
    # What MessagePack has, and a message has not.
    "an extension": (in_ended(b"\x91\xd4\x05\x00"), f"{GARBLED}2 exceeds max_ext_len(0)"),
    "an empty extension": (
        in_ended(b"\x91\xc7\x00\x05"),
        "extension type 5 has no place in a message",
    ),
    "a timestamp": (
        in_ended(b"\x82" + ID + b"\xa1t\xd6\xff\x00\x00\x00\x00"),
        f"{GARBLED}5 exceeds max_ext_len(0)",
    ),
    "the byte that means nothing": (b"\xc1", f"{GARBLED}0xc1 is not MessagePack"),
    # Nesting, and counts over the limit.
    "a map in an unknown key's list": (
        in_ended(b"\x82" + ID + b"\xa1x\x91\x80"),
        "containers are nested more than 3 deep",
    ),
    "a list in an error's unknown key": (
        in_error(b"\x81\xa9FdPassing\x82\xa6reason\xa0\xa1x\x90"),
        "containers are nested more than 3 deep",
    ),
    "lists to the frame's end": (
        b"\x91" * FRAME_BYTES_MAX,
        f"{GARBLED}containers are nested too deep",
    ),
    "maps to the frame's end": (
        b"\x81\xa1x" * (FRAME_BYTES_MAX // 3),
        f"{GARBLED}containers are nested too deep",
    ),
    "a type too many": (
        in_request(b"\x93\xa1a\xdc\x00\x41" + b"\xa3Pid" * 65 + b"\xc0"),
        f"{GARBLED}65 exceeds max_array_len(64)",
    ),
    "an array of 4 G": (b"\xdd\xff\xff\xff\xff", f"{GARBLED}4294967295 exceeds max_array_len(64)"),
    "a map of 4 G": (b"\xdf\xff\xff\xff\xff", f"{GARBLED}4294967295 exceeds max_map_len(64)"),
    "a text of 4 G": (b"\x81\xdb\xff\xff\xff\xffAllocationEnded", CUT),
    "binary of 4 G": (in_ended(b"\x91\xc6\xff\xff\xff\xff"), CUT),
    "more than a frame": (
        b"\x81" * (FRAME_BYTES_MAX + 1),
        "a body has 1 to 65536 bytes, not 65537",
    ),
}


@pytest.mark.clause("WIRE-9")
@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_with_a_reason(body: bytes, reason: str) -> None:
    assert refusal_of(body) == reason


@pytest.mark.clause("WIRE-13")
def test_a_reason_is_short_and_can_be_sent_back() -> None:
    for text in ("x" * 60_000, "\0" * 60_000, "\u00e9" * 30_000, "\N{GRINNING FACE}" * 15_000):
        for body in (
            msgpack.packb({text: []}),
            msgpack.packb({"NamespaceError": {text: []}}),
            msgpack.packb({"NamespaceRequest": ["a", [text], None]}),
            msgpack.packb({"NamespaceRequest": {}}),
        ):
            reason = refusal_of(body)
            assert len(reason) < 200
            assert reason.isascii()
            assert decode_message(encode_message(FdPassing(reason))) == FdPassing(reason)


@pytest.mark.parametrize(
    "message",
    [
        AllocationEnded("\ud800"),
        NamespaceRequest("a", (), "\udcff"),
        CreationFailed("caf\udce9"),
    ],
)
def test_text_that_is_not_unicode_is_never_written(message: Message) -> None:
    with pytest.raises(ValueError, match="text that is not Unicode") as caught:
        encode_message(message)
    assert not isinstance(caught.value, UnicodeError)


def test_a_message_fits_into_a_frame_or_is_never_written() -> None:
    overhead = len(encode_message(AllocationEnded("x" * 60_000))) - 60_000
    longest = AllocationEnded("x" * (FRAME_BYTES_MAX - overhead))
    assert len(encode_message(longest)) == FRAME_BYTES_MAX
    assert decode_message(encode_message(longest)) == longest
    with pytest.raises(ValueError, match="AllocationEnded takes 65537 bytes"):
        encode_message(AllocationEnded(longest.allocation_id + "x"))


@given(messages(ELEMENTS_MAX))
@example(SocketUnavailable(""))
@example(AllocationNotFound("caf\u00e9"))
def test_any_message_survives_the_round_trip(message: Message) -> None:
    body = encode_message(message)
    assert decode_message(body) == message
    assert encode_message(decode_message(body)) == body


def compacted(body: bytes) -> bytes:
    """Rewrite what we encode as serde's compact form does: structs as arrays."""
    ((name, content),) = msgpack.unpackb(body).items()
    if name == "NamespaceError":
        ((variant, fields),) = content.items()
        return bytes(msgpack.packb({name: {variant: list(fields.values())}}))
    return bytes(msgpack.packb({name: list(content.values())}))


@each_vector
def test_the_compact_form_of_this_suite_is_rmp_serdes(vector: Vector) -> None:
    assert compacted(vector.named) == vector.compact


@given(messages(ELEMENTS_MAX))
def test_any_message_is_read_from_its_compact_form(message: Message) -> None:
    assert decode_message(compacted(encode_message(message))) == message


def check_outcome(body: bytes) -> None:
    """The one promise about any bytes: a message, or a reason that can be sent back."""
    outcome: Message
    try:
        outcome = decode_message(body)
    except FdPassing as error:
        outcome = error
    assert decode_message(encode_message(outcome)) == outcome


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_refusal(body: bytes) -> None:
    check_outcome(body)


@pytest.mark.clause("WIRE-9")
@given(st.sampled_from(VECTORS), st.booleans(), st.data())
def test_any_mutation_is_a_message_or_a_refusal(
    vector: Vector, is_compact: bool, data: st.DataObject
) -> None:
    body = bytearray(vector.compact if is_compact else vector.named)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        stop = data.draw(st.integers(start, min(len(body), start + 8)))
        body[start:stop] = data.draw(st.binary(max_size=8))
    check_outcome(bytes(body))


def test_every_byte_of_a_vector_changed_to_every_other() -> None:
    for vector in (VECTORS[0], VECTORS[-1]):
        for index in range(len(vector.compact)):
            for value in range(256):
                changed = bytearray(vector.compact)
                changed[index] = value
                check_outcome(bytes(changed))


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(), inner, max_size=4),
)


@given(nested | st.dictionaries(st.sampled_from(["NamespaceRequest", "NamespaceError"]), nested))
def test_any_messagepack_is_a_message_or_a_refusal(document: object) -> None:
    check_outcome(msgpack.packb(document))


def stack_of(depth: int) -> bytes:
    return in_ended(b"\x82" + ID + b"\xa1x" + b"\x91" * depth + b"\xc0")


@pytest.mark.parametrize("depth", range(NESTING_MAX + 3))
def test_depth_counts_from_the_body(depth: int) -> None:
    # The body and the struct are two.
    if depth + 2 <= NESTING_MAX:
        assert decode_message(stack_of(depth)) == AllocationEnded("a")
    else:
        assert "nested" in refusal_of(stack_of(depth))


# The worst that fits into a frame, by size: what costs most to read.
HEAVY: dict[str, Callable[[int], bytes]] = {
    "lists in lists": lambda size: b"\x91" * size,
    "maps in maps": lambda size: b"\x81\xa0" * (size // 2),
    "lists of lists": lambda size: (
        b"\xdc\x00\x40" + (b"\xdc\x00\x40" + b"\x90" * 64) * (size // 67)
    ),
    "a list of maps": lambda size: b"\xdc\x00\x40" + (b"\x8f" + b"\xa0\xc0" * 15) * (size // 31),
    "one text": lambda size: in_ended(b"\x91\xda" + (size - 20).to_bytes(2, "big")) + b"a" * size,
    "many types": lambda size: in_request(b"\x93\xa1a\xdc\x00\x40" + b"\xa3Pid" * 64 + b"\xc0"),
}


@pytest.mark.clause("WIRE-10")
@pytest.mark.parametrize("heavy", HEAVY.values(), ids=HEAVY)
def test_reading_is_bounded_in_memory(heavy: Callable[[int], bytes]) -> None:
    body = heavy(FRAME_BYTES_MAX - 100)
    tracemalloc.start()
    try:
        check_outcome(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * FRAME_BYTES_MAX


@pytest.mark.clause("WIRE-10")
@pytest.mark.parametrize("heavy", HEAVY.values(), ids=HEAVY)
def test_reading_is_linear(heavy: Callable[[int], bytes]) -> None:
    # Counted, not timed: calls made for a body four times as long.
    small, large = (calls_made_by(heavy(size)) for size in (16_000, 64_000))
    assert large <= 5 * small + 100


def calls_made_by(body: bytes) -> int:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        check_outcome(body)
    finally:
        sys.setprofile(None)
    return calls
