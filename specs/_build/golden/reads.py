"""The golden cases about reads: streams cut anywhere, and whose descriptors are whose."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from specs._build.golden.wire import (
    ENDED,
    ERRORS,
    FRAME_BYTES_MAX,
    REQUEST,
    RESPONSE,
    SUBSETS,
    TYPICAL,
    VectorCase,
    JsonMessage,
    framed,
    named_after,
    packed,
)

DESCRIPTOR_FAULTS: Final = {
    "descriptors-count": "another number of descriptors than the frame's `fd_types` announces",
    "descriptors-cut-off": "the kernel threw some away (MSG_CTRUNC)",
    "descriptors-late": "they came with a later byte than the first of their frame",
    "descriptors-twice": "two sets of descriptors came with one frame",
    "descriptors-refused": "descriptors came to a provider, which takes none",
}
"""What can be wrong with the descriptors of a frame."""


# --- segments: one stream, every cut -------------------------------------------------------------

STREAMS: Final = {
    "end": (ENDED.document(""),),
    "three": (ENDED.document("a"), REQUEST.document("b", ["Net"], None), ENDED.document("c")),
    "errors": (ERRORS[0].document("a"), ERRORS[2].document("b")),
}


def segments() -> Iterator[VectorCase]:
    """Yield streams of frames, cut into reads."""
    for name, messages in STREAMS.items():
        frames_of = [framed(packed(message)) for message in messages]
        stream = b"".join(frames_of)
        for cut in range(len(stream) + 1):
            yield _segment(f"{name}-cut-{cut}", messages, [stream[:cut], stream[cut:]])
        for size in range(1, 24):
            reads = [stream[i : i + size] for i in range(0, len(stream), size)]
            yield _segment(f"{name}-by-{size}", messages, reads)
        for cut in range(1, len(stream), 2):
            yield _segment(f"{name}-first-{cut}", messages, [stream[:cut]])
    (end,) = (framed(packed(message)) for message in STREAMS["end"])
    for one, two in itertools.combinations(range(1, len(end), 2), 2):
        reads = [end[:one], end[one:two], end[two:]]
        yield _segment(f"end-cuts-{one}-{two}", STREAMS["end"], reads)
    for length in (0, 65_537, (1 << 32) - 1):
        header = length.to_bytes(4, "big")
        for cut in range(5):
            reads = [end + header[:cut], header[cut:]]
            yield _segment(f"bad-length-{length}-cut-{cut}", STREAMS["end"], reads)
            reads = [header[:cut], header[cut:] + end]
            yield _segment(f"bad-length-{length}-first-cut-{cut}", STREAMS["end"], reads)
    for size in (1, 2, 3, 4, 5, 100):
        stream = end + framed(b"\xc1") + end
        reads = [stream[i : i + size] for i in range(0, len(stream), size)]
        yield _segment(f"bad-frame-by-{size}", STREAMS["end"], reads)


def _segment(name: str, messages: Sequence[JsonMessage], reads: Sequence[bytes]) -> VectorCase:
    """Count, after each read, the frames that are whole; a bad one ends the count."""
    reads = [read for read in reads if read]
    whole: list[int] = []
    refused = None
    for index in range(len(reads)):
        stream, count = b"".join(reads[: index + 1]), 0
        while len(stream) >= 4:
            length = int.from_bytes(stream[:4], "big")
            if not 1 <= length <= FRAME_BYTES_MAX or stream[4:5] == b"\xc1":
                refused = index if refused is None else refused
                break
            if len(stream) < 4 + length:
                break
            stream, count = stream[4 + length :], count + 1
        whole.append(count)
    return {
        "id": f"segments/{name}",
        "reads": [read.hex() for read in reads],
        "messages": list(messages[: max(whole)]),
        "whole": whole,
        "refused": refused,
        "pending": len(stream) if refused is None else 0,
    }


# --- descriptors: which frame gets which ---------------------------------------------------------


class Sent(NamedTuple):
    """What one `sendmsg` was given: bytes, and so many descriptors with the first of them."""

    content: bytes
    descriptors: int = 0


class Read(NamedTuple):
    """What one `recvmsg` returned."""

    content: bytes
    descriptors: int = 0
    is_cut_off: bool = False


def read_as_linux_does(sent: Iterable[Sent], sizes: Iterable[int]) -> Iterator[Read]:
    """
    Cut what was sent into reads of at most so many bytes.

    A read goes on from one `sendmsg` into the next; it ends with the first that brings descriptors.
    """
    queue = [[s.content, s.descriptors] for s in sent if s.content]
    for size in sizes:
        got, descriptors = b"", 0
        while queue and len(got) < size and not descriptors:
            content, descriptors = queue[0]
            part = content[: size - len(got)]
            got += part
            queue[0] = [content[len(part) :], 0]
            if not queue[0][0]:
                queue.pop(0)
        if got:
            yield Read(got, descriptors)


def _response(name: str, *types: str) -> JsonMessage:
    return RESPONSE.document(name, [*types], None)


HANDED: Final = {
    "one": (_response("a", "Net"),),
    "three": (_response("a", "Pid", "Net", "Mount"),),
    "none": (_response("a"),),
    "plain-three": (ENDED.document("b"), _response("a", "Mount", "Net", "Pid")),
    "one-two": (_response("a", "Net"), _response("b", "Mount", "Pid")),
    "two-plain": (_response("a", "Pid", "Mount"), ENDED.document("b")),
    "plain-one-none": (ENDED.document("c"), _response("a", "Net"), _response("b")),
    "none-one-plain": (_response("c"), _response("a", "Net"), ENDED.document("b")),
}


def descriptors() -> Iterator[VectorCase]:
    """Yield reads with descriptors, and which frame each belongs to."""
    for name, messages in HANDED.items():
        sent = [Sent(framed(packed(m)), _announced(m)) for m in messages]
        total = sum(len(s.content) for s in sent)
        seen = set()
        plans = {f"reads-of-{n}": [n] * total for n in (1, 4, 7, 16, 33, 64, 4096)}
        plans |= {f"cut-{n}": [n, *[4096] * 9] for n in range(1, total, 4)}
        for plan, sizes in plans.items():
            reads = tuple(read_as_linux_does(sent, sizes))
            if reads not in seen:
                seen.add(reads)
                yield _attributed(f"{name}-{plan}", messages, reads)
        short = [_partly_sent(s, 9) for s in sent]
        reads = tuple(read_as_linux_does(itertools.chain(*short), [4096] * 99))
        yield _attributed(f"{name}-sent-in-parts", messages, reads)
    yield from _misattributed()
    yield from _not_taken()


def _announced(message: JsonMessage) -> int:
    return len(message.get("NamespaceResponse", {}).get("fd_types", ()))


def _partly_sent(sent: Sent, size: int) -> list[Sent]:
    """Send with short writes: the descriptors leave with the first part, and never again."""
    parts = [sent.content[i : i + size] for i in range(0, len(sent.content), size)]
    return [Sent(part, 0 if index else sent.descriptors) for index, part in enumerate(parts)]


def _attributed(name: str, messages: Sequence[JsonMessage], reads: Sequence[Read]) -> VectorCase:
    """Say for frames that were sent well what is delivered, and after which read."""
    deliveries, first, end = [], 0, 0
    for message in messages:
        end += len(framed(packed(message)))
        count = _announced(message)
        sizes = itertools.accumulate(len(read.content) for read in reads)
        after = next(index for index, size in enumerate(sizes) if size >= end)
        numbers = [*range(first, first + count)]
        deliveries.append({"message": message, "descriptors": numbers, "after": after})
        first += count
    return _layout(name, "consumer", reads, deliveries)


def _layout(
    name: str,
    side: str,
    reads: Iterable[Read],
    deliveries: Sequence[Any] = (),
    faults: Sequence[str] = (),
    after: int | None = None,
) -> VectorCase:
    assert set(faults) <= DESCRIPTOR_FAULTS.keys(), faults
    return {
        "id": f"descriptors/{name}",
        "side": side,
        "reads": [
            {"bytes": r.content.hex(), "descriptors": r.descriptors, "cut_off": r.is_cut_off}
            for r in reads
        ],
        "deliveries": [*deliveries],
        "refused": {"after": after, "faults": [*faults]} if faults else None,
    }


def _misattributed() -> Iterator[VectorCase]:
    plain = framed(packed(ENDED.document("b")))
    for types in SUBSETS:
        response = framed(packed(_response("a", *types)))
        for count in range(5):
            if count == len(types):
                continue
            cut_off = count > 3
            fault = "descriptors-cut-off" if cut_off else "descriptors-count"
            name = f"count-{named_after(types)}-with-{count}"
            read = Read(response, min(count, 3), cut_off)
            faults = (fault, "descriptors-count") if cut_off and len(types) < 3 else (fault,)
            yield _layout(name, "consumer", [read], (), faults, 0)
            if not cut_off:
                before = [{"message": ENDED.document("b"), "descriptors": [], "after": 0}]
                read = Read(plain + response, count)
                yield _layout(f"{name}-after-plain", "consumer", [read], before, faults, 0)
        for count in range(len(types)):
            name = f"cut-off-{named_after(types)}-at-{count}"
            faults = ("descriptors-cut-off", "descriptors-count")
            read = Read(response, count, is_cut_off=True)
            yield _layout(name, "consumer", [read], (), faults, 0)
        if types:
            reads = [Read(response[:1], len(types), is_cut_off=True), Read(response[1:])]
            name = f"cut-off-{named_after(types)}-before-it-is-whole"
            yield _layout(name, "consumer", reads[:1], (), ("descriptors-cut-off",), 0)
            for cut in (1, 4, 5, 20, len(response) - 1):
                reads = [Read(response[:cut]), Read(response[cut:], len(types))]
                name = f"late-{named_after(types)}-{cut}"
                yield _layout(name, "consumer", reads, (), ("descriptors-late",), 1)
                reads = [Read(response[:cut], 1), Read(response[cut : cut + 1], 1)]
                name = f"twice-{named_after(types)}-{cut}"
                faults = ("descriptors-twice", "descriptors-late", "descriptors-count")
                yield _layout(name, "consumer", reads, (), faults, 1)
    for struct in (ENDED, *ERRORS, REQUEST):
        frame = framed(packed(TYPICAL[struct]))
        for count in (1, 2, 3):
            name, reads = f"plain-{struct.name}-with-{count}", [Read(frame, count)]
            yield _layout(name, "consumer", reads, (), ("descriptors-count",), 0)
    reads = [Read(framed(packed(_response("a", "Pid"))))]
    yield _layout("with-the-next-frame", "consumer", reads, (), ("descriptors-count",), 0)
    reads = [Read(plain + framed(packed(_response("a"))), 1)]
    before = [{"message": ENDED.document("b"), "descriptors": [], "after": 0}]
    yield _layout("with-the-frame-after", "consumer", reads, before, ("descriptors-count",), 0)


def _not_taken() -> Iterator[VectorCase]:
    for struct in (REQUEST, ENDED, RESPONSE):
        frame = framed(packed(TYPICAL[struct]))
        if struct is not RESPONSE:
            whole = [{"message": TYPICAL[struct], "descriptors": [], "after": 0}]
            yield _layout(f"provider-{struct.name}-with-none", "provider", [Read(frame)], whole)
        faults = ("descriptors-refused", "descriptors-count", "descriptors-cut-off")
        for count in (1, 2, 3):
            name = f"provider-{struct.name}-with-{count}"
            if struct is not RESPONSE or count != 2:
                yield _layout(name, "provider", [Read(frame, count)], (), faults, 0)
        read = Read(frame, 0, is_cut_off=True)
        yield _layout(f"provider-{struct.name}-cut-off", "provider", [read], (), faults, 0)
        early = Read(frame[:1], 0, is_cut_off=True)
        yield _layout(f"provider-{struct.name}-cut-off-early", "provider", [early], (), faults, 0)
        if struct is not RESPONSE:
            before = [{"message": TYPICAL[struct], "descriptors": [], "after": 0}]
            reads = [Read(frame), Read(frame, 0, is_cut_off=True)]
            name = f"provider-{struct.name}-then-cut-off"
            yield _layout(name, "provider", reads, before, faults, 1)
