"""Messages and descriptors over real sockets: on every cut, to the right frame, and none left open.

The descriptors are memfds, told apart by their inodes. The autouse census counts what is open
before and after each test, so a test that passes has closed everything.
"""

from __future__ import annotations

import array
import errno
import itertools
import os
import re
import select
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TypeGuard

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statemachine.errors import CreationFailed, FdPassing
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from tests.support.scarcity import descriptors_left
from transport import channel as channel_module
from transport.channel import (
    FRAME_DESCRIPTORS_MAX,
    OUTGOING_BUNDLES_MAX,
    OUTGOING_BYTES_MAX,
    RECEIVE_BYTES_MAX,
    RECEIVE_READS_MAX,
    SENDMSG_DESCRIPTORS_MAX,
    Channel,
    Delivery,
    Lost,
    Received,
    Rejected,
    receive_once,
    send_once,
)
from transport.codec import encode_message
from transport.descriptors import Descriptor, DescriptorBundle, close_all
from transport.framing import FRAME_BYTES_MAX, encode_frame
from transport.testing.peer import frame_of

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
SO_PASSRIGHTS = 83


def memfds(count: int) -> list[Descriptor]:
    return [Descriptor(os.memfd_create("test")) for _ in range(count)]


def inode(descriptor: Descriptor) -> int:
    return os.fstat(descriptor.fileno()).st_ino


def descriptors_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def response(*types: NamespaceType, path: str | None = None) -> NamespaceResponse:
    return NamespaceResponse("a", types, path)


class RawPeer(NamedTuple):
    """A raw socket, and the channel at its other end."""

    sock: socket.socket
    channel: Channel
    takes_one: bool = False
    """Whether it takes message after message, as a provider does."""

    def send(self, data: bytes, descriptors: Sequence[Descriptor] = ()) -> None:
        """Put bytes on the wire as a peer that minds no rule: all in one sendmsg."""
        fds = array.array("i", [descriptor.fileno() for descriptor in descriptors])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        assert self.sock.sendmsg([data], rights) == len(data)

    def give(self, data: bytes, count: int) -> None:
        """Send bytes with so many new descriptors, and keep none."""
        descriptors = memfds(count)
        self.send(data, descriptors)
        close_all(descriptors)

    def receive(self) -> list[Received]:
        """Receive until nothing is left or nothing more can come."""
        received: list[Received] = []
        while more := self._receive_some():
            received += more
        return received

    def _receive_some(self) -> list[Received]:
        if not self.takes_one:
            return self.channel.receive()
        received = self.channel.receive_next()
        return [] if received is None else [received]


@contextmanager
def wire_to(*, accepts_descriptors: bool = True, takes_one: bool = False) -> Iterator[RawPeer]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, Channel(theirs, accepts_descriptors=accepts_descriptors) as channel:
        yield RawPeer(ours, channel, takes_one)


@pytest.fixture(params=[False, True], ids=["all", "one"])
def takes_one(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def consumer(takes_one: bool) -> Iterator[RawPeer]:
    """A consumer's channel, and the raw socket in place of its provider's."""
    with wire_to(takes_one=takes_one) as wire:
        yield wire


@pytest.fixture
def provider(takes_one: bool) -> Iterator[RawPeer]:
    """A provider's channel, and the raw socket in place of its consumer's."""
    with wire_to(accepts_descriptors=False, takes_one=takes_one) as wire:
        yield wire


class ChannelPair(NamedTuple):
    """Two channels, connected."""

    provider: Channel
    consumer: Channel


@pytest.fixture
def pair() -> Iterator[ChannelPair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        Channel(ours, accepts_descriptors=False) as provider,
        Channel(theirs, accepts_descriptors=True) as consumer,
    ):
        yield ChannelPair(provider, consumer)


Handed = tuple[Message, list[int]]
"""A message, and the inodes of the descriptors that came with it."""


def taken(received: Sequence[Received]) -> list[Handed]:
    """Look at deliveries, and close what they brought."""
    handed: list[Handed] = []
    for delivery in received:
        assert isinstance(delivery, Delivery), delivery
        with delivery.bundle as bundle:
            types = delivery.message.fd_types if is_response(delivery.message) else ()
            assert bundle.types == types
            assert not any(os.get_inheritable(fd) for fd in bundle.filenos())
            handed.append((delivery.message, [inode(descriptor) for _, descriptor in bundle]))
    return handed


def is_response(message: Message) -> TypeGuard[NamespaceResponse]:
    return isinstance(message, NamespaceResponse)


def rejection(received: Sequence[Received]) -> str:
    """The reason of the one thing that was received: a rejection."""
    (rejected,) = received
    assert isinstance(rejected, Rejected)
    return rejected.error.reason


def test_basic_handoff(pair: ChannelPair) -> None:
    request = NamespaceRequest("a", (MOUNT, PID))
    pair.consumer.send(request)
    assert taken(pair.provider.receive()) == [(request, [])]
    sent = memfds(2)
    expected = [inode(descriptor) for descriptor in sent]
    pair.provider.send(response(MOUNT, PID), DescriptorBundle((MOUNT, PID), sent))
    assert all(descriptor.closed for descriptor in sent), "the provider keeps no copy"
    assert taken(pair.consumer.receive()) == [(response(MOUNT, PID), expected)]
    assert pair.consumer.receive() == []


# Receiving: every way in which Linux can cut and join what was sent.

ENDED = AllocationEnded("")
STREAMS: dict[str, tuple[Message, ...]] = {
    "plain, then three": (ENDED, response(PID, NET, MOUNT)),
    "one, then two": (response(NET), response(MOUNT, PID)),
    "two, then plain": (response(PID, MOUNT), ENDED),
    "plain, one, none": (ENDED, response(NET), response()),
}


class Chunk(NamedTuple):
    """What goes into one sendmsg."""

    data: bytes
    descriptors: Sequence[Descriptor]


class Plan:
    """Messages as frames in one stream, with the descriptors that go with them."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.frames = [frame_of(message) for message in messages]
        self.stream = b"".join(self.frames)
        self.starts = [0, *itertools.accumulate(map(len, self.frames))][:-1]
        self.descriptors = [
            memfds(len(message.fd_types)) if is_response(message) else [] for message in messages
        ]

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(itertools.chain(*self.descriptors))

    @property
    def expected(self) -> list[Handed]:
        inodes = [[inode(descriptor) for descriptor in group] for group in self.descriptors]
        return list(zip(self.messages, inodes, strict=True))

    def chunks(self, cuts: Sequence[int]) -> list[Chunk]:
        """
        Cut the stream as an honest sender may.

        A frame's descriptors go with its first byte, and nothing of another frame goes with them.
        What brings none may be cut anywhere, or not at all.
        """
        frames = zip(self.starts, self.frames, self.descriptors, strict=True)
        forced = [(start, start + len(frame)) for start, frame, group in frames if group]
        bounds = sorted({0, len(self.stream), *itertools.chain(*forced), *cuts})
        return [
            Chunk(self.stream[start:end], self._descriptors_between(start, end))
            for start, end in itertools.pairwise(bounds)
        ]

    def _descriptors_between(self, start: int, end: int) -> Sequence[Descriptor]:
        groups = zip(self.starts, self.descriptors, strict=True)
        return next((group for first, group in groups if group and start <= first < end), ())


def deliver(plan: Plan, wire: RawPeer, ways: Iterable[Sequence[int]]) -> None:
    expected = plan.expected
    for cuts in ways:
        for chunk in plan.chunks(cuts):
            wire.send(*chunk)
        assert taken(wire.receive()) == expected, cuts


each_stream = pytest.mark.parametrize("messages", STREAMS.values(), ids=STREAMS)


@pytest.mark.clause("WIRE-5")
@each_stream
def test_cuts_into_three_deliver_the_same(messages: tuple[Message, ...]) -> None:
    """Every pair of cuts of which one is in the length of a frame, or beside it."""
    with Plan(messages) as plan, wire_to() as wire:
        near = [at for start in plan.starts for at in range(max(0, start - 1), start + 6)]
        deliver(plan, wire, itertools.product(near, range(len(plan.stream))))


@pytest.mark.deep("long")
@each_stream
def test_every_cut_into_three_delivers_the_same(messages: tuple[Message, ...]) -> None:
    with Plan(messages) as plan, wire_to() as wire:
        cuts = itertools.combinations_with_replacement(range(len(plan.stream)), 2)
        deliver(plan, wire, cuts)


@pytest.mark.clause("FD-7")
@each_stream
def test_every_cut_delivers_the_same_when_read_at_once(messages: tuple[Message, ...]) -> None:
    with Plan(messages) as plan, wire_to() as wire:
        expected = plan.expected
        for cut in range(len(plan.stream)):
            received: list[Received] = []
            for chunk in plan.chunks([cut]):
                wire.send(*chunk)
                received += wire.receive()
            assert taken(received) == expected, cut


@each_stream
def test_byte_by_byte_delivers_the_same(messages: tuple[Message, ...]) -> None:
    with Plan(messages) as plan, wire_to() as wire:
        for chunk in plan.chunks(range(len(plan.stream))):
            wire.send(*chunk)
        assert taken(wire.receive()) == plan.expected


@each_stream
def test_every_size_of_read_delivers_the_same(
    messages: tuple[Message, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Plan(messages) as plan, wire_to() as wire:
        expected = plan.expected
        for size in range(1, len(plan.stream) + 1):
            monkeypatch.setattr(channel_module, "RECEIVE_BYTES_MAX", size)
            for chunk in plan.chunks([]):
                wire.send(*chunk)
            received: list[Received] = []
            for _ in plan.stream:
                received += wire.channel.receive()
            assert taken(received) == expected, size


@pytest.mark.clause("FD-7")
def test_linux_joins_plain_bytes_with_the_descriptors_after_them() -> None:
    # The trap this suite is about, shown without a channel.
    (descriptor,) = memfds(1)
    ours, theirs = socket.socketpair()
    with descriptor, ours, theirs:
        send_once(ours, b"plain")
        send_once(ours, b"with", [descriptor.fileno()])
        send_once(ours, b"after")
        first, second = receive_once(theirs, 100, 3), receive_once(theirs, 100, 3)
        close_all(first.descriptors)
        assert (first.data, len(first.descriptors)) == (b"plainwith", 1)
        assert second == (b"after", [], False, ())


message_lists = st.lists(
    st.one_of(
        st.builds(AllocationEnded, st.text("ab", max_size=40)),
        st.permutations(list(NamespaceType)).flatmap(
            lambda types: st.integers(0, 3).map(lambda count: response(*types[:count]))
        ),
    ),
    max_size=6,
)


@given(message_lists, st.data())
def test_any_messages_survive_any_cuts(messages: list[Message], data: st.DataObject) -> None:
    with Plan(messages) as plan, wire_to() as wire:
        cuts = data.draw(st.lists(st.integers(0, len(plan.stream)), max_size=10))
        chunks = plan.chunks(cuts)
        pauses = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))
        received: list[Received] = []
        for chunk, pause in zip(chunks, pauses, strict=True):
            wire.send(*chunk)
            if pause:
                received += wire.channel.receive()
        received += wire.receive()
        assert taken(received) == plan.expected
        assert not wire.channel.is_mid_frame


@pytest.mark.parametrize("bytes_ahead", [1, 4, 20])
def test_descriptors_that_come_late_are_rejected(consumer: RawPeer, bytes_ahead: int) -> None:
    frame = frame_of(response(NET))
    with Plan([response(NET)]) as plan:
        consumer.send(frame[:bytes_ahead])
        assert consumer.receive() == []
        consumer.send(frame[bytes_ahead:], plan.descriptors[0])
        reason = "descriptors came later than the first byte of their frame"
        assert rejection(consumer.receive()) == reason


def test_descriptors_that_come_late_in_one_read_cannot_be_told_apart(consumer: RawPeer) -> None:
    # Linux joins both writes into one read, and says nothing of where the second began.
    frame = frame_of(response(NET))
    with Plan([response(NET)]) as plan:
        consumer.send(frame[:4])
        consumer.send(frame[4:], plan.descriptors[0])
        assert taken(consumer.receive()) == plan.expected


def test_a_peer_with_much_to_say_is_read_in_turns(provider: RawPeer) -> None:
    frame = frame_of(AllocationEnded("x" * 100))
    count = 2 * RECEIVE_BYTES_MAX // len(frame)
    provider.send(frame * count)
    first = provider.channel.receive()
    assert 0 < len(first) <= RECEIVE_BYTES_MAX // len(frame)
    assert select.select([provider.channel], [], [], 0)[0], "the rest keeps the socket readable"
    assert len(first) + len(provider.receive()) == count


def test_a_peer_with_many_descriptors_is_read_in_turns(consumer: RawPeer) -> None:
    with Plan([response(NET)] * (RECEIVE_READS_MAX + 1)) as plan:
        for chunk in plan.chunks([]):
            consumer.send(*chunk)
        first = consumer.channel.receive()
        assert len(first) == RECEIVE_READS_MAX
        assert taken(first + consumer.receive()) == plan.expected


def test_is_mid_frame_from_the_first_byte_to_the_last(provider: RawPeer) -> None:
    frame = frame_of(ENDED)
    assert not provider.channel.is_mid_frame
    for byte in frame[:-1]:
        provider.send(bytes([byte]))
        assert provider.receive() == []
        assert provider.channel.is_mid_frame
    provider.send(frame[-1:])
    assert taken(provider.receive()) == [(ENDED, [])]
    assert not provider.channel.is_mid_frame


# Receiving: what is refused. Nothing stays open, nothing follows, the answer still goes out.


@pytest.mark.clause("FD-9")
@pytest.mark.parametrize(
    ("message", "count", "reason"),
    [
        (response(PID, NET), 0, "NamespaceResponse announces 2 descriptors and came with 0"),
        (response(PID, NET), 1, "NamespaceResponse announces 2 descriptors and came with 1"),
        (response(PID, NET), 3, "NamespaceResponse announces 2 descriptors and came with 3"),
        (response(), 1, "NamespaceResponse announces 0 descriptors and came with 1"),
        (ENDED, 1, "AllocationEnded announces 0 descriptors and came with 1"),
        (CreationFailed("no"), 2, "CreationFailed announces 0 descriptors and came with 2"),
        (
            response(PID, NET, MOUNT),
            4,
            "descriptors were cut off: more than 3 came with a frame",
        ),
        (response(PID, NET, MOUNT), SENDMSG_DESCRIPTORS_MAX, "descriptors were cut off"),
        (response(*[NET] * 4), 4, "descriptors were cut off"),
    ],
)
def test_a_wrong_number_of_descriptors_is_rejected(
    consumer: RawPeer, message: Message, count: int, reason: str
) -> None:
    before = descriptors_open()
    consumer.give(frame_of(message), count)
    received = consumer.receive()
    assert descriptors_open() == before
    assert rejection(received).startswith(reason)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_receiver_without_descriptors_left_rejects_and_keeps_none(
    consumer: RawPeer, left: int
) -> None:
    with Plan([response(PID, NET, MOUNT)]) as plan:
        consumer.send(plan.stream, plan.descriptors[0])
        with descriptors_left(left):
            received = consumer.receive()
            spare = memfds(left)
        close_all(spare)
        assert rejection(received) == (
            "descriptors were cut off: the receiver has no descriptor left for them: raise its "
            "RLIMIT_NOFILE"
        )


def test_with_exactly_enough_descriptors_left_all_are_delivered(consumer: RawPeer) -> None:
    with Plan([response(PID, NET, MOUNT)]) as plan:
        consumer.send(plan.stream, plan.descriptors[0])
        with descriptors_left(3):
            received = consumer.receive()
        assert taken(received) == plan.expected


@pytest.mark.clause("FD-11")
def test_a_provider_never_opens_what_a_consumer_sends(provider: RawPeer) -> None:
    provider.give(frame_of(NamespaceRequest("a", (PID,))), SENDMSG_DESCRIPTORS_MAX)
    with descriptors_left(0):
        received = provider.receive()
    assert rejection(received) == "descriptors came with a frame; none are accepted here"


def test_a_provider_takes_no_response(provider: RawPeer) -> None:
    provider.send(frame_of(response(PID)))
    assert rejection(provider.receive()).startswith("NamespaceResponse announces 1")


def test_descriptors_that_come_twice_with_a_frame_are_rejected(consumer: RawPeer) -> None:
    frame = frame_of(response(PID, NET))
    consumer.give(frame[:10], 1)
    consumer.give(frame[10:], 1)
    assert rejection(consumer.receive()) == "descriptors came twice with one frame"


def test_a_frame_that_never_ends_cannot_pile_up_descriptors(consumer: RawPeer) -> None:
    frame = frame_of(response(PID, path="x" * 1000))
    before = descriptors_open()
    consumer.give(frame[:1], 3)
    assert consumer.receive() == []
    assert descriptors_open() == before + FRAME_DESCRIPTORS_MAX
    consumer.give(frame[1:2], 3)
    assert rejection(consumer.receive()) == "descriptors came twice with one frame"
    assert descriptors_open() == before


def test_a_provider_rejects_descriptors_before_their_frame_is_whole(provider: RawPeer) -> None:
    provider.give(frame_of(ENDED)[:1], 1)
    assert rejection(provider.receive()).startswith("descriptors came with a frame")


GARBAGE = {
    "an empty frame": (b"\0\0\0\0", "a frame announces 0 bytes"),
    "a frame too long": (b"\0\1\0\1", "a frame announces 65537 bytes"),
    "the longest length": (b"\xff\xff\xff\xff", "a frame announces 4294967295 bytes"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "a frame announces 1195725856 bytes"),
    "no message": (encode_frame(b"\xc0"), "the body must be a map of one entry, not nil"),
    "no MessagePack": (encode_frame(b"\xc1"), "the body is not readable"),
}
each_garbage = pytest.mark.parametrize(("garbage", "reason"), GARBAGE.values(), ids=GARBAGE)


@each_garbage
def test_garbage_is_rejected_after_what_came_before_it(
    consumer: RawPeer, garbage: bytes, reason: str
) -> None:
    with Plan([ENDED, response(MOUNT)]) as plan:
        for chunk in plan.chunks([]):
            consumer.send(*chunk)
        consumer.send(garbage + frame_of(ENDED))
        *before, last = consumer.receive()
        assert taken(before) == plan.expected
        assert rejection([last]).startswith(reason)


@each_garbage
def test_garbage_with_descriptors_leaves_none_open(
    consumer: RawPeer, garbage: bytes, reason: str
) -> None:
    consumer.give(garbage, 2)
    assert rejection(consumer.receive())


def test_after_a_rejection_nothing_follows(consumer: RawPeer) -> None:
    consumer.send(encode_frame(b"\xc0"))
    assert rejection(consumer.receive())
    consumer.send(frame_of(ENDED))
    assert consumer.receive() == []
    assert not consumer.channel.is_mid_frame
    consumer.sock.close()
    assert consumer.receive() == []


def test_the_rejected_can_read_why(provider: RawPeer) -> None:
    # What the peer sent meanwhile is unread when the channel closes, which resets the connection;
    # the answer is read before the reset is.
    provider.send(encode_frame(b"\xc0"))
    (rejected,) = provider.receive()
    assert isinstance(rejected, Rejected)
    provider.send(frame_of(ENDED))
    provider.channel.send(rejected.error)
    provider.channel.close()
    assert provider.sock.recv(65_536) == frame_of(rejected.error)
    with pytest.raises(ConnectionResetError):
        provider.sock.recv(65_536)


def test_a_reset_connection_is_lost(pair: ChannelPair, takes_one: bool) -> None:
    pair.consumer.send(ENDED)
    pair.provider.close()
    lost = Lost("the connection broke: Connection reset by peer")
    if takes_one:
        assert pair.consumer.receive_next() == lost
    else:
        assert pair.consumer.receive() == [lost]


def test_the_end_of_the_stream_is_told_once(consumer: RawPeer) -> None:
    consumer.send(frame_of(ENDED))
    consumer.sock.close()
    delivery, lost = consumer.receive()
    assert taken([delivery]) == [(ENDED, [])]
    assert lost == Lost("the peer closed the connection")
    assert consumer.receive() == []


@pytest.mark.clause("FD-6")
def test_a_frame_cut_short_is_lost_and_its_descriptors_closed(consumer: RawPeer) -> None:
    consumer.give(frame_of(response(PID, NET, MOUNT))[:-1], 3)
    before = descriptors_open()
    assert consumer.receive() == []
    assert descriptors_open() == before + 3
    consumer.sock.shutdown(socket.SHUT_WR)
    assert consumer.receive() == [Lost("the peer closed in the middle of a frame")]
    assert descriptors_open() == before


def test_closing_a_channel_closes_what_it_holds(consumer: RawPeer) -> None:
    consumer.give(frame_of(response(PID, NET, MOUNT))[:-1], 3)
    before = descriptors_open()
    assert consumer.receive() == []
    consumer.channel.close()
    assert descriptors_open() == before - 1
    consumer.channel.close()
    assert consumer.channel.closed
    for use in (consumer.channel.fileno, consumer.channel.receive):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.clause("FD-6")
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.binary(min_size=1, max_size=60),
                st.sampled_from([frame_of(ENDED), frame_of(response(PID)), frame_of(response())]),
            ),
            st.integers(0, 5),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_any_bytes_with_any_descriptors_leave_nothing_open(
    chunks: list[tuple[bytes, int]], accepts_descriptors: bool
) -> None:
    before = descriptors_open()
    with wire_to(accepts_descriptors=accepts_descriptors) as wire:
        received: list[Received] = []
        for data, count in chunks:
            wire.give(data, count)
            received += wire.channel.receive()
        wire.sock.close()
        received += wire.receive()
        *deliveries, last = received
        assert isinstance(last, Rejected | Lost)
        taken(deliveries)
    assert descriptors_open() == before


# Sending.


def fill(channel: Channel) -> int:
    """Send until there is no room; returns how many bytes that took."""
    filled = 0
    with (
        socket.fromfd(channel.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock,
        suppress(BlockingIOError),
    ):
        sock.setblocking(False)
        while True:
            filled += sock.send(bytes(4096))
    return filled


@pytest.fixture
def narrow() -> Iterator[RawPeer]:
    """A provider's channel with the smallest send buffer, and the raw socket it sends to."""
    with wire_to(accepts_descriptors=False) as wire:
        with socket.fromfd(wire.channel.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        wire.sock.setblocking(False)
        yield wire


def send_until_refused(channel: Channel, message: Message) -> tuple[int, str]:
    """Send a message again and again; returns how often that went well, and why not for ever."""
    types = message.fd_types if is_response(message) else ()
    for sent in itertools.count():
        try:
            channel.send(message, DescriptorBundle(types, memfds(len(types))))
        except FdPassing as error:
            return sent, error.reason
    raise AssertionError


def drain(wire: RawPeer) -> list[tuple[bytes, int]]:
    """Read what has been sent so far: each read's bytes, and how many descriptors came."""
    reads: list[tuple[bytes, int]] = []
    while True:
        try:
            reception = receive_once(wire.sock, 65_536, SENDMSG_DESCRIPTORS_MAX)
        except BlockingIOError:
            return reads
        close_all(reception.descriptors)
        assert not reception.is_truncated
        reads.append((reception.data, len(reception.descriptors)))


@pytest.mark.clause("FD-3")
def test_descriptors_leave_once_however_often_the_rest_is_sent(narrow: RawPeer) -> None:
    message = response(PID, NET, MOUNT, path="x" * 60_000)
    descriptors = memfds(3)
    narrow.channel.send(message, DescriptorBundle(message.fd_types, descriptors))
    assert narrow.channel.wants_write, "the frame is longer than the buffer"
    assert all(descriptor.closed for descriptor in descriptors), "the first byte has left"
    reads = drain(narrow)
    flushes = 0
    while not narrow.channel.flush():
        flushes += 1
        reads += drain(narrow)
    reads += drain(narrow)
    assert flushes > 1
    assert [count for _, count in reads if count] == [3]
    assert reads[0][1] == 3, "with the first byte"
    assert b"".join(data for data, _ in reads) == frame_of(message)
    assert not narrow.channel.wants_write


@pytest.mark.clause("PEER-14")
def test_what_is_offered_while_there_is_no_room_is_not_kept(narrow: RawPeer) -> None:
    message = response(NET)
    filled = fill(narrow.channel)
    refused = memfds(1)
    assert not narrow.channel.offer(message, DescriptorBundle((NET,), refused))
    assert refused[0].closed
    assert len(b"".join(data for data, _ in drain(narrow))) == filled, "nothing of it was sent"
    taken = memfds(1)
    assert narrow.channel.offer(message, DescriptorBundle((NET,), taken))
    assert taken[0].closed
    assert narrow.channel.offer(ENDED, DescriptorBundle())
    assert drain(narrow) == [(frame_of(message), 1), (frame_of(ENDED), 0)]


@pytest.mark.clause("PEER-14")
def test_offers_that_found_no_room_do_not_count_among_what_waits(narrow: RawPeer) -> None:
    fill(narrow.channel)
    before = repr(narrow.channel)
    for _ in range(OUTGOING_BUNDLES_MAX + 1):
        assert not narrow.channel.offer(response(NET), DescriptorBundle((NET,), memfds(1)))
    assert repr(narrow.channel) == before
    assert send_until_refused(narrow.channel, response(NET))[0] == OUTGOING_BUNDLES_MAX


def test_after_stop_sending_nothing_leaves_and_the_reason_is_said(narrow: RawPeer) -> None:
    filled = fill(narrow.channel)
    narrow.channel.send(ENDED)
    narrow.channel.stop_sending("enough")
    assert not narrow.channel.wants_write
    with pytest.raises(FdPassing, match="enough"):
        narrow.channel.send(ENDED)
    assert len(b"".join(data for data, _ in drain(narrow))) == filled


@pytest.mark.clause("FD-1")
def test_descriptors_wait_while_there_is_no_room(narrow: RawPeer) -> None:
    descriptors = memfds(1)
    filled = fill(narrow.channel)
    narrow.channel.send(response(NET), DescriptorBundle((NET,), descriptors))
    assert not narrow.channel.flush()
    assert not descriptors[0].closed
    plain = drain(narrow)
    assert sum(len(data) for data, _ in plain) == filled
    assert not any(count for _, count in plain)
    assert narrow.channel.flush()
    assert descriptors[0].closed
    assert drain(narrow) == [(frame_of(response(NET)), 1)]


def test_messages_leave_in_order_each_with_its_own_descriptors(narrow: RawPeer) -> None:
    large = response(PID, path="x" * 30_000)
    messages: list[Message] = [ENDED, large, response(NET, MOUNT), ENDED]
    with ExitStack() as stack:
        receiver = stack.enter_context(Channel(narrow.sock, accepts_descriptors=True))
        expected: list[Handed] = []
        for message in messages:
            types = message.fd_types if is_response(message) else ()
            descriptors = memfds(len(types))
            expected.append((message, [inode(descriptor) for descriptor in descriptors]))
            narrow.channel.send(message, DescriptorBundle(types, descriptors))
        received = receiver.receive()
        while not narrow.channel.flush():
            received += receiver.receive()
        received += receiver.receive()
        assert taken(received) == expected


def test_the_longest_frame_goes_through(pair: ChannelPair) -> None:
    overhead = len(encode_message(AllocationEnded("x" * 60_000))) - 60_000
    longest = AllocationEnded("x" * (FRAME_BYTES_MAX - overhead))
    for _ in range(5):
        pair.provider.send(longest)
    received = pair.consumer.receive()
    while len(received) < 5:
        pair.provider.flush()
        received += pair.consumer.receive()
    assert taken(received) == [(longest, [])] * 5


@pytest.mark.clause("FD-4")
@pytest.mark.parametrize(
    ("message", "types"),
    [
        (response(PID, NET), (PID,)),
        (response(PID, NET), (NET, PID)),
        (response(PID, NET), ()),
        (response(), (PID,)),
        (AllocationEnded("a"), (PID,)),
        (FdPassing("a"), (NET,)),
        (response(*[NET] * 4), (NET,) * 4),
    ],
)
def test_a_bundle_that_the_message_does_not_announce_is_misuse(
    pair: ChannelPair, message: Message, types: tuple[NamespaceType, ...]
) -> None:
    bundle = DescriptorBundle(types, memfds(len(types)))
    name = type(message).__name__
    with pytest.raises(ValueError, match=rf"^{name} does not announce|a frame has 3"):
        pair.provider.send(message, bundle)
    assert bundle.closed
    assert pair.consumer.receive() == []
    pair.provider.send(ENDED)
    assert taken(pair.consumer.receive()) == [(ENDED, [])]


def test_a_message_that_cannot_be_encoded_closes_its_bundle(pair: ChannelPair) -> None:
    for message in (response(PID, path="\ud800"), response(PID, path="x" * FRAME_BYTES_MAX)):
        bundle = DescriptorBundle((PID,), memfds(1))
        with pytest.raises(ValueError, match="NamespaceResponse"):
            pair.provider.send(message, bundle)
        assert bundle.closed


def test_a_closed_channel_or_bundle_is_misuse(pair: ChannelPair) -> None:
    bundle = DescriptorBundle((PID, NET), memfds(2))
    bundle[NET].close()
    with pytest.raises(ValueError, match="closed"):
        pair.provider.send(response(PID, NET), bundle)
    assert bundle.closed
    pair.provider.close()
    bundle = DescriptorBundle((PID,), memfds(1))
    with pytest.raises(ValueError, match=r"^the channel is closed$"):
        pair.provider.send(response(PID), bundle)
    assert bundle.closed


def test_a_channel_shows_how_it_stands(narrow: RawPeer) -> None:
    number = narrow.channel.fileno()
    assert repr(narrow.channel) == f"<Channel {number}: reading, 0 bytes wait to be sent>"
    fill(narrow.channel)
    narrow.channel.send(ENDED)
    waiting = f"{len(frame_of(ENDED))} bytes wait to be sent"
    assert repr(narrow.channel) == f"<Channel {number}: reading, {waiting}>"
    narrow.sock.close()
    narrow.channel.receive()
    with pytest.raises(FdPassing):
        narrow.channel.flush()
    shown = f"<Channel {number}: reading over, sending failed: Broken pipe>"
    assert repr(narrow.channel) == shown
    narrow.channel.close()
    assert repr(narrow.channel) == "<Channel closed>"


def test_a_lost_peer_closes_everything_that_waits(narrow: RawPeer) -> None:
    bundles = [DescriptorBundle((PID,), memfds(1)) for _ in range(3)]
    fill(narrow.channel)
    for bundle in bundles[:2]:
        narrow.channel.send(response(PID), bundle)
    assert narrow.channel.wants_write
    narrow.sock.close()
    with pytest.raises(FdPassing, match="sending failed: "):
        narrow.channel.flush()
    assert not narrow.channel.wants_write
    with pytest.raises(FdPassing, match="sending failed: "):
        narrow.channel.send(response(PID), bundles[2])
    assert all(bundle.closed for bundle in bundles)


def test_what_a_lost_peer_had_sent_is_still_received(provider: RawPeer) -> None:
    provider.send(frame_of(ENDED))
    provider.sock.close()
    with pytest.raises(FdPassing, match="sending failed: Broken pipe"):
        provider.channel.send(ENDED)
    delivery, lost = provider.receive()
    assert taken([delivery]) == [(ENDED, [])]
    assert isinstance(lost, Lost)


def test_closing_a_channel_closes_what_waits_to_be_sent(narrow: RawPeer) -> None:
    fill(narrow.channel)
    bundle = DescriptorBundle((PID,), memfds(1))
    narrow.channel.send(response(PID), bundle)
    assert not bundle.closed
    narrow.channel.close()
    assert bundle.closed


@pytest.mark.clause("PEER-9")
def test_a_peer_that_does_not_read_cannot_pile_up_bytes(narrow: RawPeer) -> None:
    _, reason = send_until_refused(narrow.channel, AllocationEnded("x" * 60_000))
    assert re.search(r"the peer does not read: \d+ bytes wait", reason)
    assert not narrow.channel.wants_write


@pytest.mark.clause("PEER-9")
def test_a_peer_that_does_not_read_cannot_pile_up_descriptors(narrow: RawPeer) -> None:
    before = descriptors_open()
    fill(narrow.channel)
    for _ in range(OUTGOING_BUNDLES_MAX):
        narrow.channel.send(response(PID), DescriptorBundle((PID,), memfds(1)))
    narrow.channel.send(ENDED)
    with pytest.raises(FdPassing, match="the peer does not read: 256 bundles wait"):
        narrow.channel.send(response(PID), DescriptorBundle((PID,), memfds(1)))
    assert descriptors_open() == before
    with pytest.raises(FdPassing, match="the peer does not read: 256 bundles wait"):
        narrow.channel.send(ENDED)


def test_bundles_that_have_left_make_room_for_as_many(narrow: RawPeer) -> None:
    fill(narrow.channel)
    for _ in range(OUTGOING_BUNDLES_MAX):
        narrow.channel.send(response(PID), DescriptorBundle((PID,), memfds(1)))
    arrived = sum(count for _, count in drain(narrow))
    assert not narrow.channel.flush(), "some of them have left"
    sent, reason = send_until_refused(narrow.channel, response(PID))
    assert "the peer does not read: 256 bundles wait" in reason
    arrived += sum(count for _, count in drain(narrow))
    assert sent == arrived > 0


def test_exactly_as_much_may_wait_as_the_limit_says(narrow: RawPeer) -> None:
    fill(narrow.channel)
    frame_bytes = OUTGOING_BYTES_MAX // 16
    padding = frame_bytes - len(frame_of(AllocationEnded("x" * 60_000)))
    for _ in range(16):
        narrow.channel.send(AllocationEnded("x" * (60_000 + padding)))
    with pytest.raises(FdPassing, match="the peer does not read: 1048576 bytes wait"):
        narrow.channel.send(ENDED)


def test_what_has_left_does_not_wait_any_more(narrow: RawPeer) -> None:
    message = response(PID, path="x" * 30_000)
    arrived = 0
    for _ in range(2 * OUTGOING_BUNDLES_MAX):
        narrow.channel.send(message, DescriptorBundle((PID,), memfds(1)))
        while not narrow.channel.flush():
            arrived += sum(len(data) for data, _ in drain(narrow))
    more, reason = send_until_refused(narrow.channel, message)
    sent = (2 * OUTGOING_BUNDLES_MAX + more) * len(frame_of(message))
    arrived += sum(len(data) for data, _ in drain(narrow))
    assert reason.endswith(f"the peer does not read: {sent - arrived} bytes wait")


# The two calls themselves.


def test_bytes_are_needed_to_send_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Descriptor(os.memfd_create("test")) as descriptor:
        with pytest.raises(ValueError, match=r"^descriptors travel with bytes: at least one"):
            send_once(ours, b"", [descriptor.fileno()])
        with pytest.raises(ValueError, match="254 descriptors; at most 253"):
            send_once(ours, b"x", [descriptor.fileno()] * 254)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive_once(theirs, 1, 1)
        assert send_once(ours, b"x", [descriptor.fileno()] * SENDMSG_DESCRIPTORS_MAX) == 1
        reception = receive_once(theirs, 1, SENDMSG_DESCRIPTORS_MAX)
        assert not reception.is_truncated
        assert len(reception.descriptors) == SENDMSG_DESCRIPTORS_MAX
        close_all(reception.descriptors)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("room", range(5))
def test_never_more_descriptors_than_there_is_room_for(kind: int, room: int) -> None:
    sent = memfds(3)
    expected = [inode(descriptor) for descriptor in sent]
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        send_once(ours, b"x", [descriptor.fileno() for descriptor in sent])
        close_all(sent)
        data, descriptors, is_truncated, _ = receive_once(theirs, 10, room)
        assert data == b"x"
        assert [inode(descriptor) for descriptor in descriptors] == expected[:room]
        assert not any(os.get_inheritable(descriptor.fileno()) for descriptor in descriptors)
        assert is_truncated == (room < 3)
        close_all(descriptors)


class DenyingSocket(socket.socket):
    """A socket of a Linux that denies some descriptors (SO_RIGHTS_NOTRUNC, 7.3)."""

    denied: Sequence[int] = ()
    """Which slots of each set."""
    number: int = errno.EPERM
    """Why."""

    def recvmsg(self, *arguments: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        data, ancillary, flags, address = super().recvmsg(*arguments)
        for number, (level, kind, content) in enumerate(ancillary):
            fds = array.array("i", content)
            for slot in self.denied:
                os.close(fds[slot])
                fds[slot] = -self.number
            ancillary[number] = level, kind, fds.tobytes()
        return data, ancillary, flags, address


def test_a_descriptor_may_get_the_number_of_a_stream_that_is_closed(consumer: RawPeer) -> None:
    stdin = os.dup(0)
    os.close(0)
    try:
        consumer.give(frame_of(response(NET)), 1)
        (delivery,) = consumer.receive()
        assert isinstance(delivery, Delivery)
        with delivery.bundle as bundle:
            assert list(bundle.filenos()) == [0]
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)


@pytest.mark.clause("FD-14")
@pytest.mark.parametrize("denied", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("number", "name"), [(errno.EPERM, "EPERM"), (4000, "4000")])
def test_a_descriptor_that_is_denied_is_none(
    denied: tuple[int, ...], number: int, name: str
) -> None:
    before = descriptors_open()
    ours, theirs = socket.socketpair()
    receiving = DenyingSocket(fileno=theirs.detach())
    receiving.denied, receiving.number = denied, number
    with ours, Channel(receiving, accepts_descriptors=True) as receiver:
        sent = memfds(3)
        send_once(
            ours,
            encode_frame(encode_message(response(PID, NET, MOUNT))),
            [d.fileno() for d in sent],
        )
        close_all(sent)
        (rejected,) = receiver.receive()
        assert isinstance(rejected, Rejected)
        names = ", ".join([name] * len(denied))
        assert f"denies {len(denied)} of the descriptors ({names});" in rejected.error.reason
        assert receiver.receive() == []
        assert descriptors_open() == before + 2
    assert descriptors_open() == before


def test_a_packet_longer_than_the_read_is_truncated() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send_once(ours, b"packet")
        assert receive_once(theirs, 3, 0) == (b"pac", [], True, ())
        send_once(ours, memoryview(b"packet"))
        assert receive_once(theirs, 6, 0) == (b"packet", [], False, ())


def test_sending_to_a_closed_peer_is_an_error_and_no_signal() -> None:
    signals: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, frame: signals.append(number))
    ours, theirs = socket.socketpair()
    try:
        with ours:
            theirs.close()
            with pytest.raises(BrokenPipeError):
                send_once(ours, b"x")
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert signals == []


def test_credentials_that_come_with_bytes_are_no_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        send_once(ours, b"x")
        assert receive_once(theirs, 1, SENDMSG_DESCRIPTORS_MAX) == (b"x", [], False, ())


def test_a_peer_that_refuses_descriptors_is_told_by_the_sender(narrow: RawPeer) -> None:
    try:
        narrow.sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        pytest.skip("kernel lacks SO_PASSRIGHTS")
    bundle = DescriptorBundle((PID,), memfds(1))
    with pytest.raises(FdPassing, match="sending failed: Operation not permitted"):
        narrow.channel.send(response(PID), bundle)
    assert bundle.closed
    assert drain(narrow) == []
