"""Hostile and clumsy peers of a daemon on this node, while a polite consumer is served.

`CASES` is the table: what is said on one connection, and what has to be heard there. One test runs
each of them. In the middle of it and after it a polite consumer makes an allocation, runs a command
in it and ends it, and has held another one since before the first case. After each case nothing is
left, neither on the node nor in the daemon, whose memory has at no moment grown by more than a
bound. `FLOODS` are what one connection cannot do: each has a daemon of its own, which is stopped
while the flood goes on.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import pytest

from linux.cgroups import DEFAULT_PLACE, Scope
from linux.forge.spawn import spawn_within
from linux.mountinfo import parse_mount
from linux.testing.hostile import BODIES, IDS, IMAGE_NAMES, IMAGES, ODD_IDS, spoil
from linux.testing.worlds import SCOPE_PREFIX
from specs import vectors
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    SocketUnavailable,
)
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    mount_path_below,
)
from tests.conftest import MakeImage
from tests.support.forging import run_within
from tests.support.programs import DEADLINE_S, MOUNT, NET, PID, Daemon, wait_until
from tests.support.serving import connect_as
from transport.channel import SENDMSG_DESCRIPTORS_MAX, send_once
from transport.framing import FRAME_BYTES_MAX, encode_frame
from transport.request import Handoff
from transport.serve.peers import UNREAD_BYTES_PER_UID_MAX, UNSENT_BYTES_PER_UID_MAX
from transport.testing.peer import Line, frame_of

pytestmark = pytest.mark.needs_root

OTHER: Final = 54_321
"""A user whom no provider here serves."""

KIB: Final = 1024
CASE_BYTES_MAX: Final = 8 << 20
"""How much more memory the daemon may have during a case; a frame has 64 KiB."""

FLOOD_BYTES_MAX: Final = 2 * (UNREAD_BYTES_PER_UID_MAX + UNSENT_BYTES_PER_UID_MAX) + (8 << 20)
"""The same during a flood: what may wait for one user, twice as buffers grow, and connections."""

FLOOD_BYTES: Final = 3 * FLOOD_BYTES_MAX
"""How much a flood says at least, so that it is found if it is kept."""


# --- The daemon, and a polite consumer of it -----------------------------------------------------


class Target:
    """A daemon, what it has of this machine, and a polite consumer with an allocation."""

    def __init__(self, daemon: Daemon, cgroup2: Path) -> None:
        self.daemon: Final = daemon
        self.prefix: Final = f"{SCOPE_PREFIX}{daemon.pid}"
        self._cgroup2: Final = cgroup2
        self._count = 0
        self.held: Final = daemon.obtain(f"{self.prefix}-held", PID, NET)
        self.is_served()
        wait_until(lambda: self._resources() == self._resources(pause_s=0.2))
        self.resources = self._resources()
        """Descriptors and threads of the daemon at rest."""

    def name(self, rest: str = "") -> str:
        self._count += 1
        return f"{self.prefix}-{self._count}{rest}"

    def is_served(self) -> bool:
        """Make an allocation, run a command in it, and end it."""
        with self.daemon.obtain(self.name(), PID, MOUNT) as handoff:
            path = DEFAULT_PLACE.path_of(self._cgroup2, handoff.request.allocation_id)
            with Scope(path, "").open_procs() as procs:
                command = spawn_within(("true",), handoff.bundle, scope=procs)
            assert command.wait(DEADLINE_S) == 0
            assert handoff.end(DEADLINE_S)
        return True

    def still_holds(self) -> bool:
        """Whether what has been held all the time is the same as what it is given now."""
        with self.daemon.obtain(f"{self.prefix}-held", PID, NET) as again:
            files = [[os.fstat(fd).st_ino for fd in x.bundle.filenos()] for x in (again, self.held)]
        return files[0] == files[1]

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes that the daemon has, or with `VmHWM` the most since `forget_peak`."""
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * KIB

    def forget_peak(self) -> int:
        """Have the peak begin at the memory that it has now, and return that."""
        Path(f"/proc/{self.daemon.pid}/clear_refs").write_text("5")
        return self.memory()

    def check_nothing_left(self) -> None:
        """End what a peer had a right to make; then all is as it was before."""
        for name in self.daemon.alive():
            if name != f"{self.prefix}-held":
                with suppress(AllocationNotFound):
                    self.daemon.consumer().end(name, DEADLINE_S)
        wait_until(lambda: self.daemon.alive() == [f"{self.prefix}-held"])
        wait_until(lambda: self._resources() == self.resources)

    def close(self) -> None:
        self.held.close()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))

    def _resources(self, pause_s: float = 0) -> tuple[int, int]:
        time.sleep(pause_s)
        return self.descriptors(), len(os.listdir(f"/proc/{self.daemon.pid}/task"))


@contextmanager
def attacked(directory: Path, image_root: Path, cgroup2: Path) -> Iterator[Target]:
    """Have a daemon to be attacked; it ends as told, and leaves nothing."""
    daemon = Daemon(directory, image_root)
    daemon.start()
    try:
        target = Target(daemon, cgroup2)
        try:
            yield target
        finally:
            target.close()
            daemon.clear()
    finally:
        assert daemon.program is None or daemon.stop() == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "uenv"
    files = {"hello.txt": "inside\n", "noise": random.Random(0).randbytes(40_000).hex()}
    whole = make_image(root / "a.sqfs", files).read_bytes()
    spoil(root)
    make_image(root.parent / "other.sqfs", {"hello.txt": "outside\n"}).replace(
        root.parent / "outside.sqfs"
    )
    for name in IMAGE_NAMES:
        (root / name).write_bytes(whole)
    return root


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory, images: Path, cgroup2: Path
) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("d"), images, cgroup2) as target:
        yield target


# --- The cases -----------------------------------------------------------------------------------

Act: TypeAlias = Callable[[Target, Line], None]
Heard: TypeAlias = type[Message] | None
"""The type of a message, or None for the end of the connection."""


class Talk(NamedTuple):
    """What a peer says and does, in this order, and what it must hear; then it is served on."""

    says: Sequence[bytes | Act]
    hears: tuple[Heard, ...] = ()
    uid: int = 0


REJECTED: Final[tuple[Heard, ...]] = (FdPassing, None)
REFUSED: Final[tuple[Heard, ...]] = (CreationFailed,)
NOT_FOUND: Final[tuple[Heard, ...]] = (AllocationNotFound,)
GONE: Final[tuple[Heard, ...]] = (None,)

NEVER: Final = frame_of(AllocationEnded("nsh-test-never"))
HALF: Final = NEVER[: len(NEVER) // 2]
REST: Final = NEVER[len(HALF) :]


def requests(rest: str = "", *kinds: NamespaceType, image: str | None = None) -> Act:
    """Request an allocation of its own."""

    def act(target: Target, line: Line) -> None:
        line.say(NamespaceRequest(target.name(rest), kinds, image))

    return act


def polite(target: Target, line: Line) -> None:
    assert target.is_served()


def half_closes(target: Target, line: Line) -> None:
    line.sock.shutdown(socket.SHUT_WR)


def stops_listening(target: Target, line: Line) -> None:
    line.sock.shutdown(socket.SHUT_RD)


def hangs_up(target: Target, line: Line) -> None:
    line.hang_up()


def hangs_up_unread(target: Target, line: Line) -> None:
    """Hang up with an answer that was not read, which resets the connection."""
    wait_until(lambda: not line.hears_nothing())
    line.hang_up()


def byte_by_byte(data: bytes) -> Sequence[bytes]:
    return [bytes([byte]) for byte in data]


def out_of_band(target: Target, line: Line) -> None:
    """Put a byte beside the stream, where the Linux kernel has that for unix sockets."""
    with suppress(OSError):
        line.sock.send(b"!", socket.MSG_OOB)


def forged_credentials(target: Target, line: Line) -> None:
    """Say to be another user, which root may."""
    ucred = struct.pack("3i", os.getpid(), OTHER, OTHER)
    line.sock.sendmsg([NEVER], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)])


def descriptors(data: bytes, count: int, opens: Callable[[], int]) -> Act:
    """Send bytes with descriptors; hang up where they are refused before they are sent."""

    def act(target: Target, line: Line) -> None:
        fd = opens()
        try:
            send_once(line.sock, data, [fd] * count)
        except PermissionError:
            line.hang_up()  # SO_PASSRIGHTS is off at the other end: nothing has left
        finally:
            os.close(fd)

    return act


def _devnull() -> int:
    return os.open("/dev/null", os.O_RDWR)


def _directory() -> int:
    return os.open("/", os.O_RDONLY)


def _namespace() -> int:
    return os.open("/proc/self/ns/mnt", os.O_RDONLY)


def _memory() -> int:
    return os.memfd_create("nsh")


def _pidfd() -> int:
    return os.pidfd_open(os.getpid())


def _socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


FILES: Final = {
    "a file": _devnull,
    "a directory": _directory,
    "a mount namespace": _namespace,
    "memory": _memory,
    "a pidfd": _pidfd,
    "a socket": _socket,
}


def _cases() -> Iterator[tuple[str, Talk]]:
    for name, body in BODIES.items():
        yield f"body: {name}", Talk([encode_frame(body), polite], REJECTED)
    for name, text in IDS.items():
        asked = frame_of(NamespaceRequest(text, (PID,)))
        yield f"id: {name}", Talk([asked, polite], REFUSED)
    for name, text in ODD_IDS.items():

        def ask(target: Target, line: Line, text: str = text) -> None:
            line.say(NamespaceRequest(text.format(target.name()), (PID,)))

        yield f"odd id: {name}", Talk([ask, polite], (NamespaceResponse,))
    for name, bad in IMAGES.items():
        if bad.path.isascii():  # the rest is no message
            yield f"image: {name}", Talk([requests("", MOUNT, image=bad.path), polite], REFUSED)
    for name, opens in FILES.items():
        yield f"descriptor: {name}", Talk([descriptors(NEVER, 1, opens), polite], REJECTED)
    yield from STREAMS.items()
    yield from STRANGERS.items()


STREAMS: Final = {
    "stream: nothing": Talk([polite]),
    "stream: nothing, and the end": Talk([half_closes, polite], GONE),
    "stream: a byte": Talk([b"\0", polite, hangs_up]),
    "stream: half a length, and the end": Talk([b"\0\0", half_closes, polite], GONE),
    "stream: a length, and the end": Talk([NEVER[:4], half_closes, polite], GONE),
    "stream: half a frame, and the end": Talk([HALF, half_closes, polite], GONE),
    "stream: half a frame, and gone": Talk([HALF, polite, hangs_up]),
    "stream: a frame but for a byte": Talk([NEVER[:-1], polite, NEVER[-1:]], NOT_FOUND),
    "stream: a length of nothing": Talk([b"\0\0\0\0", polite], REJECTED),
    "stream: a length of one too many": Talk([b"\0\1\0\1", polite], REJECTED),
    "stream: a length of 4 G": Talk([b"\xff\xff\xff\xff", polite], REJECTED),
    "stream: a length in little endian": Talk([b"\x10\0\0\0", polite], REJECTED),
    "stream: a TLS hello": Talk([bytes.fromhex("1603010200010001fc0303"), polite], REJECTED),
    "stream: text": Talk([b"AllocationEnded\n", polite], REJECTED),
    "stream: 64 KiB of zeros": Talk([bytes(FRAME_BYTES_MAX), polite], REJECTED),
    "stream: 1 MiB behind a refusal": Talk([b"\0\0\0\0", bytes(1 << 20), polite], REJECTED),
    "stream: a frame byte by byte": Talk([*byte_by_byte(NEVER), polite], NOT_FOUND),
    "stream: a bad frame byte by byte": Talk(
        [*byte_by_byte(encode_frame(b"\xc1")), polite], REJECTED
    ),
    "stream: half a frame, and no more": Talk([HALF, polite], REJECTED),
    "stream: a frame in the middle of another": Talk([HALF, NEVER, polite], REJECTED),
    "stream: one and a half": Talk([NEVER + HALF, polite, REST], NOT_FOUND * 2),
    "stream: a good one behind a bad one": Talk([encode_frame(b"\xc1") + NEVER, polite], REJECTED),
    "stream: a bad one behind good ones": Talk(
        [NEVER * 3 + encode_frame(b"\xc1"), polite], NOT_FOUND * 3 + REJECTED
    ),
    "stream: a message that is a provider's": Talk(
        [frame_of(NamespaceResponse("nsh-test-x", ())), polite], REJECTED
    ),
    "stream: an error": Talk([frame_of(FdPassing("no")), polite], REJECTED),
    "stream: a request, and the end": Talk([requests("", PID), half_closes, polite, hangs_up]),
    "stream: a request, and gone": Talk([requests("", PID, NET, MOUNT), hangs_up, polite]),
    "stream: a request, not listening": Talk(
        [stops_listening, requests("", PID), polite, hangs_up]
    ),
    "stream: an answer, not read": Talk([NEVER, hangs_up_unread, polite]),
    "stream: namespaces, not taken": Talk([requests("", PID), hangs_up_unread, polite]),
    "stream: a byte out of band": Talk([out_of_band, NEVER, polite], NOT_FOUND),
    "stream: out of band in a frame": Talk([HALF, out_of_band, REST, polite], NOT_FOUND),
    "stream: out of band, and gone": Talk([HALF, out_of_band, hangs_up, polite]),
    "stream: credentials of another": Talk([forged_credentials, polite], NOT_FOUND),
    "stream: 129 messages at once": Talk([NEVER * 128, polite], NOT_FOUND * 128),
    "request: types twice": Talk([requests("", PID, PID), polite], REFUSED),
    "request: sixteen types": Talk([requests("", *(MOUNT,) * 16), polite], REFUSED),
    "request: an image without a mount": Talk([requests("", PID, image="a.sqfs"), polite], REFUSED),
    "request: an image of 60,000 bytes": Talk(
        [requests("", MOUNT, image="x" * 60_000), polite], REFUSED
    ),
    "request: no namespaces": Talk([requests(), polite], (NamespaceResponse,)),
    "end: an id of no bytes": Talk([frame_of(AllocationEnded("")), polite], REJECTED),
    "end: an id of 65,000 bytes": Talk([frame_of(AllocationEnded("x" * 65_000)), polite], REJECTED),
    "end: a path": Talk([frame_of(AllocationEnded("../../pact.slice")), polite], NOT_FOUND),
    "descriptor: as many as can be sent": Talk(
        [descriptors(NEVER, SENDMSG_DESCRIPTORS_MAX, _devnull), polite], REJECTED
    ),
    "descriptor: in the middle of a frame": Talk(
        [HALF, descriptors(REST, 1, _devnull), polite], REJECTED
    ),
    "descriptor: with a length alone": Talk(
        [descriptors(NEVER[:4], 3, _devnull), polite], REJECTED
    ),
}
"""Streams and messages; the rest of the table is made from lists that other tests use as well."""

TURNED_AWAY: Final[tuple[Heard, ...]] = (SocketUnavailable, None)

STRANGERS: Final = {
    "stranger: says nothing": Talk([polite], TURNED_AWAY, OTHER),
    "stranger: a request": Talk([requests("", PID), polite], TURNED_AWAY, OTHER),
    "stranger: an end": Talk([NEVER, polite], TURNED_AWAY, OTHER),
    "stranger: garbage": Talk([b"\xff" * 4096, polite], TURNED_AWAY, OTHER),
    "stranger: says to be root": Talk([forged_credentials, polite], TURNED_AWAY, OTHER),
    "stranger: descriptors": Talk([descriptors(NEVER, 3, _devnull), polite], TURNED_AWAY, OTHER),
    "stranger: hangs up": Talk([hangs_up, polite], (), OTHER),
    "stranger: uid 65534": Talk([NEVER, polite], TURNED_AWAY, 65_534),
}

CASES: Final = dict(_cases())


@pytest.mark.sample(3)
@pytest.mark.clause("PEER-8", "WIRE-12", "ERR-1")
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_peer_is_answered_and_costs_no_other_anything(target: Target, name: str) -> None:
    case, before = CASES[name], target.forget_peak()
    with open_line(target, case.uid) as line:
        for step in case.says:
            # It can be refused, and hung up on, before it has said everything.
            with suppress(BrokenPipeError, ConnectionResetError):
                line.say(step) if isinstance(step, bytes) else step(target, line)
        if line.sock.fileno() >= 0:
            heard = [line.hear() for _ in case.hears]
            assert tuple(message and type(message) for message in heard) == case.hears
            if None not in case.hears:
                assert isinstance(line.ask(NEVER), AllocationNotFound)
    assert target.memory("VmHWM") - before < CASE_BYTES_MAX
    target.check_nothing_left()
    assert target.is_served()
    assert target.still_holds()


def open_line(target: Target, uid: int) -> Line:
    return connect_as(target.daemon.socket, uid) if uid else Line.to(target.daemon.socket)


# --- Every frame that the vectors have ------------------------------------------------------------

FAULTS: Final = tuple(vectors.manifest("invalid")["words"])


@pytest.mark.clause("WIRE-9", "WIRE-11")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_invalid_vector_is_refused_and_costs_no_other_anything(
    target: Target, fault: str
) -> None:
    before = target.forget_peak()
    for case in vectors.cases("invalid"):
        if case["faults"][0] == fault:
            with Line.to(target.daemon.socket) as line:
                line.say(bytes.fromhex(case["frame"]))
                assert isinstance(line.hear(), FdPassing), case["id"]
                assert line.hear() is None, case["id"]
    assert target.memory("VmHWM") - before < CASE_BYTES_MAX
    target.check_nothing_left()
    assert target.is_served()
    assert target.still_holds()


# --- Images --------------------------------------------------------------------------------------


def seen_in(handoff: Handoff, daemon: Daemon, image: str) -> tuple[str, set[str]]:
    """What the image's file says inside, and the options of the image's mount."""
    path = mount_path_below(str(daemon.uenv_base), image)
    lines = run_within(handoff.bundle, "cat", "/proc/self/mountinfo").splitlines()
    (mount,) = (mount for mount in map(parse_mount, lines) if mount.point == path)
    return run_within(handoff.bundle, "cat", f"{path}/hello.txt"), set(mount.options)


@pytest.mark.clause("NODE-12")
@pytest.mark.parametrize("image", IMAGE_NAMES)
def test_a_name_of_an_image_is_no_option(target: Target, image: str) -> None:
    with target.daemon.obtain(target.name(), MOUNT, image=image) as handoff:
        text, options = seen_in(handoff, target.daemon, image)
    assert text == "inside\n"
    assert {"ro", "nosuid", "nodev"} <= options
    target.check_nothing_left()


def flip(path: Path, images: Path, stops: threading.Event) -> None:
    """Put one thing after another in an image's place, at once each."""
    new, choose = images / "new", random.Random(0)
    makes: list[Callable[[], object]] = [
        lambda: os.link(images / "a.sqfs", new),
        # Often, so that a provider that follows it is found out by few of those that are granted.
        *[lambda: new.symlink_to("../outside.sqfs")] * 4,
        lambda: new.symlink_to("a.sqfs"),
        lambda: new.symlink_to("/dev/zero"),
        lambda: os.mkfifo(new),
        lambda: new.write_bytes(b"no image"),
    ]
    while not stops.is_set():
        choose.choice(makes)()
        new.replace(path)
        new.unlink(missing_ok=True)  # it stays where both are names of one file


@pytest.mark.clause("NODE-11")
def test_an_image_that_changes_all_the_time_never_leads_out(target: Target, images: Path) -> None:
    path, stops = images / "flip.sqfs", threading.Event()
    thread = threading.Thread(target=flip, args=(path, images, stops))
    thread.start()
    granted = refused = 0

    def both_were_seen() -> bool:
        nonlocal granted, refused
        try:
            with target.daemon.obtain(target.name(), MOUNT, image=path.name) as handoff:
                assert seen_in(handoff, target.daemon, path.name)[0] == "inside\n"
                assert handoff.end(DEADLINE_S)
                granted += 1
        except CreationFailed:
            refused += 1
        return granted >= 6 and refused >= 6

    try:
        wait_until(both_were_seen)
    finally:
        stops.set()
        thread.join()
        path.unlink(missing_ok=True)
    target.check_nothing_left()
    assert target.is_served()


@pytest.mark.clause("NODE-15")
def test_an_image_that_is_emptied_under_its_user_harms_no_other(
    target: Target, images: Path
) -> None:
    path = images / "emptied.sqfs"
    path.write_bytes((images / "a.sqfs").read_bytes())
    with target.daemon.obtain(target.name(), MOUNT, image=path.name):
        os.truncate(path, 0)
        with pytest.raises(CreationFailed, match="emptied"):
            target.daemon.obtain(target.name(), MOUNT, image=path.name)
        assert target.is_served()
    path.unlink()
    target.check_nothing_left()


# --- Floods --------------------------------------------------------------------------------------


class Flood(NamedTuple):
    """What each of many connections says, as far as the other end takes it; it reads nothing."""

    connections: int
    says: bytes | Callable[[Target], bytes]
    uid: int = 0


UNWHOLE: Final = FRAME_BYTES_MAX.to_bytes(4, "big") + bytes(FRAME_BYTES_MAX - 1)
WHOLE_CONNECTIONS: Final = FLOOD_BYTES // FRAME_BYTES_MAX


def asks_for_what_is_held(target: Target) -> bytes:
    return frame_of(target.held.request) * 1_000


FLOODS: Final = {
    "frames that are never whole": Flood(WHOLE_CONNECTIONS, UNWHOLE),
    "frames that are too long": Flood(WHOLE_CONNECTIONS, b"\xff" * FRAME_BYTES_MAX),
    "frames that are no message": Flood(WHOLE_CONNECTIONS, encode_frame(b"\xc1" * FRAME_BYTES_MAX)),
    "connections that say nothing": Flood(2_000, b""),
    "ends that no one knows": Flood(20, NEVER * 2_000),
    "requests that cannot be": Flood(20, frame_of(NamespaceRequest("x", (PID, PID))) * 2_000),
    "hand-overs that are not taken": Flood(20, asks_for_what_is_held),
    "strangers": Flood(8, NEVER * 100, OTHER),
}


SHORT_FLOODS: Final = {"hand-overs that are not taken", "strangers"}


def pour(line: Line, data: bytes) -> None:
    """Send as much as the other end, and the Linux kernel, take at once."""
    line.sock.setblocking(False)
    with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        left = memoryview(data)
        while left:
            left = left[line.sock.send(left) :]


@pytest.mark.clause("PEER-8", "PEER-9", "CRASH-12")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHORT_FLOODS else pytest.mark.deep("long"))
        for name in FLOODS
    ],
)
def test_under_a_flood_others_are_served_memory_is_bounded_and_it_stops(
    tmp_path: Path, images: Path, cgroup2: Path, name: str
) -> None:
    flood = FLOODS[name]
    with attacked(tmp_path, images, cgroup2) as target, ExitStack() as stack:
        before = target.forget_peak()
        for _ in range(flood.connections):
            line = stack.enter_context(open_line(target, flood.uid))
            pour(line, flood.says if isinstance(flood.says, bytes) else flood.says(target))
        assert target.is_served()
        assert target.still_holds()
        grown = target.memory("VmHWM") - before
        print(f"{name}: {grown >> 10} KiB more, for {flood.connections} connections")
        assert grown < FLOOD_BYTES_MAX
        # Of each connection one, and a pidfd of its peer; namespaces only while they are sent.
        assert target.descriptors() <= target.resources[0] + 2 * flood.connections + 8
        assert target.daemon.stop() == 0
