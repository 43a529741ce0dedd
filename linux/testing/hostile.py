"""Bodies, ids and image paths that a provider must refuse, each with a name.

One list of each, for every test that holds something to it: the codec's and the conformance suite's
frames, the cgroups' ids, the image store's paths. Names and order stay: what comes new, comes last.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import msgpack


def body_of(name: str, content: object) -> bytes:
    return bytes(msgpack.packb({name: content}))


def request_body(**changes: object) -> bytes:
    """A request that can be granted, but for the changes; `...` leaves a field out."""
    fields = {"allocation_id": "nsh-test-refused", "namespaces": ["Pid"], "uenv_image": None}
    kept = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
    return body_of("NamespaceRequest", kept)


_ENDED: Final = b"\x81" + msgpack.packb("AllocationEnded")
_ID: Final = msgpack.packb("allocation_id")

BODIES: Final[Mapping[str, bytes]] = {
    # No MessagePack at all, or not one message.
    "the unused byte": b"\xc1",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "every byte": bytes(range(256)),
    "cut short": request_body()[:-1],
    "a byte behind it": request_body() + b"\xc0",
    "two messages": request_body() * 2,
    # Not a map of one entry.
    "nil": msgpack.packb(None),
    "a name alone": msgpack.packb("NamespaceRequest"),
    "an empty map": msgpack.packb({}),
    "an array": msgpack.packb(["NamespaceRequest", ["nsh-test-refused", ["Pid"], None]]),
    "a map of two messages": msgpack.packb(
        {
            "AllocationEnded": {"allocation_id": "nsh-test-refused"},
            "NamespaceRequest": ["nsh-test-refused", ["Pid"], None],
        }
    ),
    "snake case": body_of("namespace_request", ["nsh-test-refused", ["Pid"], None]),
    "a number for a name": msgpack.packb({0: ["nsh-test-refused", ["Pid"], None]}),
    # Fields that are missing, too many, or of another type.
    "no id": request_body(allocation_id=...),
    "no types": request_body(namespaces=...),
    "a field too many": body_of("NamespaceRequest", ["nsh-test-refused", ["Pid"], None, None]),
    "no fields": body_of("NamespaceRequest", []),
    "an id that is a number": request_body(allocation_id=42),
    "an id that is nil": request_body(allocation_id=None),
    "an id that is bytes": request_body(allocation_id=b"nsh-test-refused"),
    "an id that is an array": request_body(allocation_id=["nsh-test-refused"]),
    "types that are nil": request_body(namespaces=None),
    "types that are text": request_body(namespaces="Pid"),
    "types that are a map": request_body(namespaces={"Pid": None}),
    "a type that is a number": request_body(namespaces=[0]),
    "a type that is nil": request_body(namespaces=[None]),
    "an image that is false": request_body(uenv_image=False),
    "an image that is bytes": request_body(uenv_image=b"hello.sqfs"),
    # Names that are not the protocol's.
    "a type in lower case": request_body(namespaces=["pid"]),
    "a type in upper case": request_body(namespaces=["PID"]),
    "a type that there is not": request_body(namespaces=["User"]),
    "a type with a NUL": request_body(namespaces=["Pid\0"]),
    "an error that there is not": body_of("NamespaceError", {"Unheard": {"reason": "of"}}),
    # The same key twice: two readers would see two messages.
    "two ids": (
        _ENDED + b"\x82" + _ID + msgpack.packb("nsh-test-one")
        + _ID + msgpack.packb("nsh-test-other")
    ),
    "one message twice": b"\x82" + 2 * body_of("AllocationEnded", ["nsh-test-refused"])[1:],
    "an unknown key twice": (
        _ENDED + b"\x83" + _ID + msgpack.packb("nsh-test-refused")
        + 2 * (msgpack.packb("unknown") + b"\xc0")
    ),
    # Not UTF-8, extensions, nesting, and lengths that are not there.
    "not UTF-8": request_body().replace(b"refused", b"\xff" * 7),
    "an extension": request_body(allocation_id=msgpack.ExtType(1, b"x")),
    "a time stamp": request_body(uenv_image=msgpack.Timestamp(1)),
    "an array in the types": request_body(namespaces=[["Pid"]]),
    "four arrays in each other": request_body(unknown=[[[["deep"]]]]),
    "60,000 arrays in each other": b"\x91" * 60_000 + b"\xc0",
    "20,000 maps in each other": b"\x81\xa1x" * 20_000 + b"\xc0",
    "an array of 4 G": b"\xdd\xff\xff\xff\xff",
    "a map of 4 G": b"\xdf\xff\xff\xff\xff",
    "a name of 4 G": b"\x81\xdb\xff\xff\xff\xff",
    "fields of 4 G": _ENDED + b"\xdd\xff\xff\xff\xff",
    # Much of what is not looked at; texts that only look right.
    "9,000 unknown keys": request_body(**{f"k{n}": None for n in range(9_000)}),
    "15,000 types": request_body(namespaces=["Pid"] * 15_000),
    "a surrogate as UTF-8": request_body().replace(b"refused", b"\xed\xa0\x80refu"),
    "an overlong slash": request_body().replace(b"refused", b"\xc0\xafrefus"),
    "a Cyrillic letter in the name": body_of("N\u0430mespaceRequest", ["nsh", ["Pid"], None]),
    "a name with a NUL": body_of("NamespaceRequest\0", ["nsh", ["Pid"], None]),
    "a length in little endian": request_body(allocation_id=b"").replace(b"\xc4\0", b"\xda\1\0"),
}  # fmt: skip
"""Whole bodies, none of which is a message."""

IDS: Final[Mapping[str, str]] = {
    "empty": "",
    "this directory": ".",
    "the one above": "..",
    "a slash": "nsh-test/x",
    "absolute": "/nsh-test",
    "a NUL": "nsh-test\0",
    "a line": "nsh-test\n",
    "a terminal's escape": "nsh-test\x1b[0m",
    "delete": "nsh-test\x7f",
    "a file of every cgroup": "cgroup.procs",
    "the start of one": "cgroup.",
    "129 bytes": "nsh-test-".ljust(129, "x"),
    "129 bytes, fewer characters": "nsh-test-" + "é" * 60,
    "60,000 bytes": "nsh-test-".ljust(60_000, "x"),
    "a path upwards": "../nsh-test",
    "a path far upwards": "../../../../etc/passwd",
    "a C1 control character": "nsh-test\x85",
    "the kill of every cgroup": "cgroup.kill",
    "NUL first": "\0nsh-test",
    "slashes alone": "///",
    "33 characters of four bytes": "\U0001f427" * 33,
}
"""Texts that cannot be an allocation's id."""

ODD_IDS: Final[Mapping[str, str]] = {
    "128 bytes": "{:x<128}",
    "characters of two bytes": "{:é<70}",
    "blanks and signs": "{}-a b.c:d@e+f,g",
    "dots": "{}-..",
    "other planes": "{}-☃\U0001f427",
    "for a shell": "{}-%s{{0}}$HOME`'\"\\",
    "the name of its own scope": "{}.scope",
    "another's scope in its name": "{}.scope.scope",
    "a slash of another script": "{}\u2044\uff0f\u2215x",
    "right to left": "{}\u202escope",
    "nothing to be seen": "{}\u200b\u200d\ufeff",
    "a letter and its accent apart": "{}e\u0301",
    "percent 2f": "{}%2f..%2f",
    "an option": "{}--help",
    "a file of the cgroup behind it": "{}cgroup.procs",
}
"""Texts that can; `format` fills in what they begin with, of 12 to 30 ASCII characters."""


class BadImage(NamedTuple):
    """A path below an image root that `spoil` has spoilt, or one that is none."""

    path: str
    error: str = ""
    """The name of the errno; empty where Linux versions differ."""
    advice: str = ""
    """What is said besides."""


_LEADS_OUT: Final = "it leads out"
_NO_FILE: Final = "it is no regular file"

IMAGES: Final[Mapping[str, BadImage]] = {
    "missing": BadImage("missing.sqfs", "ENOENT", "no such image below the image root"),
    "a link to nothing": BadImage("dangling.sqfs", "ENOENT", "no such image"),
    "empty": BadImage("", "ENOENT", "no such image"),
    "below a file": BadImage("a.sqfs/b", "ENOTDIR", "is no directory"),
    "a directory": BadImage("directory.sqfs", "EINVAL", _NO_FILE),
    "the root": BadImage(".", "EINVAL", _NO_FILE),
    "a FIFO": BadImage("fifo.sqfs", "EINVAL", _NO_FILE),
    "a device": BadImage("device.sqfs", "EINVAL", _NO_FILE),
    "random bytes": BadImage("random.sqfs", "EINVAL", "Can't find a SQUASHFS superblock"),
    "an empty file": BadImage("empty.sqfs", "EIO"),
    "half of one": BadImage("truncated.sqfs", "EINVAL"),
    "fifty bytes of one": BadImage("short.sqfs"),
    "a link out": BadImage("out.sqfs", "EXDEV", "it leads out of the image root"),
    "an absolute link out": BadImage("away.sqfs", "EXDEV", _LEADS_OUT),
    "an absolute link inside": BadImage("inside-but-absolute.sqfs", "EXDEV", _LEADS_OUT),
    "through a link out": BadImage("folder/outside.sqfs", "EXDEV", _LEADS_OUT),
    "upwards": BadImage("../outside.sqfs", "EXDEV", _LEADS_OUT),
    "upwards and down again": BadImage("../uenv/a.sqfs", "EXDEV", _LEADS_OUT),
    "absolute": BadImage("/etc/passwd", "EXDEV", _LEADS_OUT),
    "through a magic link": BadImage("magic/etc/passwd", "EXDEV", _LEADS_OUT),
    "a link to itself": BadImage("loop.sqfs", "ELOOP", "too many symbolic links"),
    "a NUL": BadImage("nul\0.sqfs", "EINVAL"),
    "not Unicode": BadImage("\udcff\ud800.sqfs", "EINVAL"),
    "300 bytes": BadImage("x" * 300, "ENAMETOOLONG"),
    "a socket": BadImage("socket.sqfs", "EINVAL", _NO_FILE),
    "a slash behind it": BadImage("a.sqfs/", "ENOTDIR", "is no directory"),
    "a line behind it": BadImage("a.sqfs\n", "ENOENT", "no such image"),
    "options behind it": BadImage("a.sqfs,rw,suid,dev", "ENOENT", "no such image"),
    "a place behind it": BadImage("a.sqfs:/usr", "ENOENT", "no such image"),
    "through a link to a device": BadImage("zero.sqfs", "EXDEV", _LEADS_OUT),
    "another version": BadImage("version.sqfs", "EINVAL"),
    "blocks of no size": BadImage("blocks.sqfs", "EINVAL"),
    "compressed by nothing known": BadImage("compressor.sqfs", "EINVAL"),
    "zeros without end": BadImage("zeros.sqfs", "EINVAL", "Can't find a SQUASHFS superblock"),
}
"""Each cannot be used as an image, for the store or at the first look."""

IMAGE_NAMES: Final[tuple[str, ...]] = (
    "a,rw,suid,dev,errors=panic.sqfs",
    "-o remount,rw.sqfs",
    "blank name.sqfs",
    "\\040\\134.sqfs",
    "a.sqfs.sqfs",
    "ünï☃.sqfs",
    "%s%n$(id).sqfs",
)
"""What can be an image's name, and could be taken for more than that."""

_MUTATIONS: Final = {
    # struct squashfs_super_block, squashfs_fs.h
    "version.sqfs": (28, b"\xff\xff"),
    "blocks.sqfs": (12, b"\0\0\0\0"),
    "compressor.sqfs": (20, b"\xff\x7f"),
}


def spoil(root: Path) -> None:
    """
    Make what `IMAGES` names below an image root, and one file beside the root.

    Args:
        root: a directory of the name `uenv`, with an image `a.sqfs`, and one of its own above it.
    """
    whole = (root / "a.sqfs").read_bytes()
    (root / "directory.sqfs").mkdir()
    (root / "random.sqfs").write_bytes(bytes(range(256)) * 64)
    (root / "empty.sqfs").write_bytes(b"")
    (root / "truncated.sqfs").write_bytes(whole[: len(whole) // 2])
    (root / "short.sqfs").write_bytes(whole[:50])
    (root / "dangling.sqfs").symlink_to("nowhere.sqfs")
    (root / "loop.sqfs").symlink_to("loop.sqfs")
    (root / "out.sqfs").symlink_to("../outside.sqfs")
    (root / "away.sqfs").symlink_to(root.parent / "outside.sqfs")
    (root / "folder").symlink_to("..")
    (root / "magic").symlink_to("/proc/self/root")
    (root / "inside-but-absolute.sqfs").symlink_to(root / "a.sqfs")
    (root.parent / "outside.sqfs").write_bytes(whole)
    os.mkfifo(root / "fifo.sqfs")
    os.mknod(root / "device.sqfs", 0o600 | 0o020000, os.makedev(1, 5))
    (root / "zero.sqfs").symlink_to("/dev/zero")
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(root / "socket.sqfs"))
    for name, (offset, value) in _MUTATIONS.items():
        (root / name).write_bytes(whole[:offset] + value + whole[offset + len(value) :])
    with (root / "zeros.sqfs").open("wb") as zeros:
        zeros.truncate(1 << 40)
