"""
The golden cases about meaning: what may be asked of a provider, what a consumer makes of an answer.

Written down from the protocol; nothing of `statemachine` is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

from specs._build.golden.wire import (
    ENDED,
    ERRORS,
    REQUEST,
    RESPONSE,
    SUBSETS,
    TYPES,
    VectorCase,
    JsonMessage,
)

ID_BYTES_MAX: Final = 128
IMAGE_BYTES_MAX: Final = 4096

OBJECTIONS: Final = {
    "id-size": "`allocation_id` has not 1 to 128 bytes of UTF-8",
    "id-characters": "`allocation_id` has a slash or a control character (U+0000-1F, U+7F-9F)",
    "id-reserved": "`allocation_id` is `.` or `..`, or begins with `cgroup.`",
    "types-repeated": "`namespaces` has a type twice",
    "image-without-mount": "`uenv_image` is there, and `Mount` is not asked for",
    "image-size": "`uenv_image` has not 1 to 4096 bytes of UTF-8",
    "image-characters": "`uenv_image` has a control character",
    "image-path": "`uenv_image`, without its ending `.sqfs`, is no plain relative path: "
    "a part between slashes is empty, `.` or `..`",
    "end-of-unknown": "`AllocationEnded` for an allocation that never was",
    "not-for-a-provider": "a message that only a consumer receives",
}
"""Why a provider does not grant what it is asked."""

CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
"""The control characters, by code point."""


def requests() -> Iterator[VectorCase]:
    """Yield first messages to a provider that is ready and has nothing, and what it answers."""
    for name, message, answer, objection in _questions():
        assert objection is None or objection in OBJECTIONS
        case = {"message": message, "answer": answer, "objection": objection}
        yield {"id": f"requests/{name}", **case}


def _questions() -> Iterator[tuple[str, JsonMessage, str, str | None]]:
    for types in SUBSETS:
        name = "-".join(types).lower() or "none"
        yield _request(f"types-{name}", "a", types, None)
        objection = None if "Mount" in types else "image-without-mount"
        yield _request(f"types-{name}-with-image", "a", types, "i.sqfs", objection)
    for count in (2, 3):
        for types in itertools.product(TYPES, repeat=count):
            if len(set(types)) < count:
                name = "-".join(types).lower()
                yield _request(f"types-{name}", "a", types, None, "types-repeated")
    yield _request("types-64", "a", ("Pid",) * 64, None, "types-repeated")
    for slug, name, objection in _ids():
        yield _request(f"id-{slug}", name, ("Pid",), None, objection)
        # The end of what never was: any name will do that the answer can repeat.
        if objection == "id-size":
            yield f"end-{slug}", ENDED.document(name), "FdPassing", objection
        else:
            document = ENDED.document(name)
            yield f"end-{slug}", document, "AllocationNotFound", "end-of-unknown"
    for slug, image, objection in _images():
        yield _request(f"image-{slug}", "a", ("Mount",), image, objection)
    for struct in (RESPONSE, *ERRORS):
        document = struct.document(*(["a", [], None] if struct is RESPONSE else ["a"]))
        yield f"message-{struct.name}", document, "FdPassing", "not-for-a-provider"


def _request(
    name: str, called: str, types: tuple[str, ...], image: str | None, objection: str | None = None
) -> tuple[str, JsonMessage, str, str | None]:
    answer = "CreationFailed" if objection else "NamespaceResponse"
    return name, REQUEST.document(called, [*types], image), answer, objection


def _ids() -> Iterator[tuple[str, str, str | None]]:
    yield "empty", "", "id-size"
    for size in (1, 2, 31, 32, 127, 128, 129, 130, 255, 256, 4096):
        yield f"of-{size}", "a" * size, "id-size" if size > ID_BYTES_MAX else None
    for character in "é€😀":
        width = len(character.encode())
        for size in (1, ID_BYTES_MAX // width, ID_BYTES_MAX // width + 1):
            over = size * width > ID_BYTES_MAX
            yield f"of-{size}-by-{width}", character * size, "id-size" if over else None
    for point in CONTROLS:
        for form in ("{}", "a{}", "{}a", "a{}b"):
            slug = f"U+{point:04X}-{form.replace('{}', 'x')}"
            yield slug, form.format(chr(point)), "id-characters"
    for index, name in enumerate(("/", "a/b", "/a", "a/", "../a", "//", "cgroup./x", "a\0/", "\n")):
        yield f"slash-{index}", name, "id-characters"
    for name in (
        ".",
        "..",
        "cgroup.",
        "cgroup.procs",
        "cgroup.events",
        "cgroup..",
        "cgroup.\u00e9",
    ):
        yield f"reserved-{name.encode().hex()}", name, "id-reserved"
    for name in (
        *("...", ".a", "a.", "..a", "a..b", "cgroup", "Cgroup.procs", "CGROUP.PROCS", "xcgroup."),
        *(" ", "  a", "a b", "-", "--help", "-rf", "~", "*", "$HOME", "%s", "a\\b", "'", '"', "{}"),
        *("\u00a0", "\u00ad", "\u200b", "\u202e", "\u2028", "\u2044", "\ufeff", "\ufffd", "\uffff"),
        *(
            "e\u0301",
            "\u00e9",
            "作業",
            "\U0010ffff",
            "\U000e0001",
            "cgroup\u2024procs",
            "init.scope",
        ),
        *("memory.max", "a.scope", "job-1", "4711_2.0", "UPPER", "a:b", "a;b", "a|b", "a&b"),
        "a\u00b7b",
    ):
        yield f"fine-{name.encode().hex()}", name, None


def _images() -> Iterator[tuple[str, str, str | None]]:
    yield "empty", "", "image-size"
    for size in (1, 2, 255, 256, 4095, 4096, 4097):
        yield f"of-{size}", "i" * size, "image-size" if size > IMAGE_BYTES_MAX else None
    yield "of-4098-by-2", "é" * 2049, "image-size"
    yield "of-4096-by-2", "é" * 2048, None
    for point in CONTROLS:
        for form in ("{}", "a/{}.sqfs"):
            slug = f"U+{point:04X}-{'alone' if form == '{}' else 'within'}"
            yield slug, form.format(chr(point)), "image-characters"
    for image in (
        *("/", "//", "/a", "a/", "a//b", ".", "..", "./a", "../a", "a/.", "a/..", "a/./b"),
        "a/../b",
        *("/images/a.sqfs", "../a.sqfs", "a/../../b.sqfs", ".sqfs", "a/.sqfs", "..sqfs", "...sqfs"),
        *("a/..sqfs", "a/...sqfs", "./.sqfs", "a.sqfs/", "a//.sqfs", "/etc/passwd"),
    ):
        yield f"path-{image.encode().hex()}", image, "image-path"
    for image in (
        *("a", "a.sqfs", "a/b", "a/b.sqfs", "a.sqfs.sqfs", ".sqfs.sqfs", "a.SQFS", "a.img", "..."),
        *(".a", "a.", "..a", "a/.b", "a..b", "a b", "-", "~", "~root/a", "$HOME", "*", "a\\..\\b"),
        *("....sqfs", "a.sqfs/b", "sqfs", "x/sqfs", "é.sqfs", "画像/作業.sqfs", "\ufffd", "a:b"),
        "%2e%2e/a",
    ):
        yield f"fine-{image.encode().hex()}", image, None


# --- answers -------------------------------------------------------------------------------------

MEANINGS: Final = {
    "ResponseReceived": "what was asked for; the descriptors are still to be looked at",
    "ResponseMismatched": "a response to something else: close what came with it, `FdPassing`, "
    "close the connection, serve yourself",
    "EndAnnounced": "the allocation is over",
    "CreationRefused": "report it",
    "NotFoundReceived": "report it",
    "ProviderUnavailable": "serve yourself; the provider has made nothing",
    "PassingFailed": "serve yourself; tell the provider that it is over",
    "FrameRejected": "not for a consumer: `FdPassing`, close the connection",
}
"""The events of the consumer's table that a message can be."""


def answers() -> Iterator[VectorCase]:
    """Yield messages to a consumer that has asked, and which event each is."""
    for name, request, message, event in _answers():
        assert event in MEANINGS
        yield {"id": f"answers/{name}", "request": request, "message": message, "event": event}


def _answers() -> Iterator[tuple[str, JsonMessage, JsonMessage, str]]:
    for asked, given in itertools.product(SUBSETS, SUBSETS):
        event = "ResponseReceived" if asked == given else "ResponseMismatched"
        name = f"{'-'.join(asked).lower() or 'none'}-given-{'-'.join(given).lower() or 'none'}"
        yield name, _asked("a", asked), RESPONSE.document("a", [*given], None), event
    for given in itertools.product(TYPES, repeat=2):
        if given[0] == given[1]:
            name = f"pid-net-given-{'-'.join(given).lower()}"
            response = RESPONSE.document("a", [*given], None)
            yield name, _asked("a", ("Pid", "Net")), response, "ResponseMismatched"
    image = _asked("a", ("Mount",), "i.sqfs")
    path = "/run/pact/uenv/i"
    matched, mismatched = "ResponseReceived", "ResponseMismatched"
    yield "image-with-path", image, RESPONSE.document("a", ["Mount"], path), matched
    yield "image-without-path", image, RESPONSE.document("a", ["Mount"], None), mismatched
    plain = _asked("a", ("Mount",))
    yield "no-image-with-path", plain, RESPONSE.document("a", ["Mount"], path), mismatched
    for index, theirs in enumerate(("b", "A", "", "a ", "a\0", "e\u0301", "aa")):
        mine = "é" if theirs == "e\u0301" else "a"
        for one, other in ((mine, theirs), (theirs, mine)):
            name = f"id-{index}-{'there' if one == mine else 'back'}"
            response = RESPONSE.document(other, ["Pid"], None)
            yield f"{name}-response", _asked(one, ("Pid",)), response, mismatched
            yield f"{name}-end", _asked(one, ("Pid",)), ENDED.document(other), "FrameRejected"
    for called in ("a", "é", "job-1"):
        slug = called.encode().hex()
        yield f"end-{slug}", _asked(called, ()), ENDED.document(called), "EndAnnounced"
        yield f"request-{slug}", _asked(called, ()), _asked(called, ()), "FrameRejected"
    events = ("ProviderUnavailable", "CreationRefused", "NotFoundReceived", "PassingFailed")
    for struct, event in zip(ERRORS, events, strict=True):
        for index, text in enumerate(("", "a", "b", "it did not work")):
            yield f"{struct.name}-{index}", _asked("a", ("Net",)), struct.document(text), event


def _asked(name: str, types: tuple[str, ...], image: str | None = None) -> Any:
    return REQUEST.document(name, [*types], image)
