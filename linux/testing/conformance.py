"""Conformance suite for a provider in any language: it is tested over its socket alone.

    pytest --pyargs linux.testing.conformance --provider-socket PATH

In the order of the protocol: frames, messages, answers, descriptors, allocations, peers, and in the
end everything in any order. Every case is named for its clause, `FD-1/2`, with a number that stays.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Hashable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from specs import invariants as always
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.testing.strategies import ORDERS
from transport.channel import receive_once
from transport.codec import encode_message
from transport.descriptors import close_all
from transport.framing import FRAME_BYTES_MAX, HEADER_BYTES, encode_frame
from transport.testing.adapter import Adapter
from transport.testing.machine import SETTINGS, Handoffs
from transport.testing.peer import DEADLINE_S, Line, frame_of

from ..features import Features
from ..namespaces import KernelInspector
from ..simulated import SimulatedInspector
from .hostile import BODIES, IDS, ODD_IDS, body_of, request_body
from .wire import Ear, ProviderUnderTest, Wire, case, cases, number_cases

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT
LIGHT: Final = (PID, MOUNT)

pytest_generate_tests: Final = number_cases
_numbers: Final = count(1)


@pytest.fixture(scope="session")
def provider(pytestconfig: pytest.Config) -> ProviderUnderTest:
    """The provider that was named on the command line; without one there is nothing to try."""
    path = pytestconfig.getoption("--provider-socket")
    if path is None:
        pytest.exit("name a provider with --provider-socket=PATH", pytest.ExitCode.USAGE_ERROR)
    try:
        Line.to(Path(path)).hang_up()
    except OSError as error:
        pytest.exit(f"no provider listens on {path}: {error}", pytest.ExitCode.USAGE_ERROR)
    is_simulated = pytestconfig.getoption("--provider-backend") == "simulated"
    inspector = SimulatedInspector() if is_simulated else KernelInspector(Features.probe())
    return ProviderUnderTest(Path(path), inspector, pytestconfig.getoption("--provider-uenv"))


@pytest.fixture
def wire(provider: ProviderUnderTest) -> Iterator[Wire]:
    wire = Wire(provider, f"nsh-test-{os.getpid()}-w{next(_numbers)}")
    try:
        yield wire
    finally:
        wire.close()


# --- Frames ------------------------------------------------------------------------------------


@case("FD-1/1")
def test_basic_a_request_is_answered_with_its_descriptors(wire: Wire) -> None:
    wire.ask(wire.request(PID, NET, MOUNT))


@case("WIRE-5/1")
def test_a_frame_may_come_byte_by_byte(wire: Wire) -> None:
    line, request = wire.call(), wire.request(*LIGHT)
    for byte in frame_of(request):
        line.say(bytes([byte]))
        line.wait_read()
    wire.granted(request, line)


@case("WIRE-5/2")
def test_a_frame_may_be_cut_anywhere(wire: Wire) -> None:
    line, never = wire.call(), AllocationEnded(f"{wire.prefix}-never")
    frame = frame_of(never)
    for cut in range(1, len(frame)):
        line.say(frame[:cut])
        line.wait_read()
        line.say(frame[cut:])
        assert line.hear() == AllocationNotFound(never.allocation_id), f"cut after {cut} bytes"


@case("WIRE-5/3")
def test_frames_may_come_together(wire: Wire) -> None:
    line = wire.call()
    requests = [wire.request(PID) for _ in range(3)]
    line.say(b"".join(map(frame_of, requests)))
    for request in requests:
        wire.granted(request, line)


@case("WIRE-5/4")
def test_frames_may_come_together_and_be_cut_anywhere(wire: Wire) -> None:
    line, never = wire.call(), AllocationEnded(f"{wire.prefix}-never")
    frame = frame_of(never)
    for cut in range(1, len(frame)):
        line.say(frame + frame[:cut])
        assert line.hear() == AllocationNotFound(never.allocation_id), f"cut after {cut} bytes"
        line.say(frame[cut:])
        assert line.hear() == AllocationNotFound(never.allocation_id), f"cut after {cut} bytes"


@case("WIRE-3/1")
def test_the_longest_frame_is_read(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID)
    fields = {"allocation_id": request.allocation_id, "namespaces": ["Pid"], "padding": ""}
    padding = FRAME_BYTES_MAX - len(body_of("NamespaceRequest", fields)) - 2
    body = body_of("NamespaceRequest", {**fields, "padding": "x" * padding})
    assert len(body) == FRAME_BYTES_MAX
    line.say(encode_frame(body))
    wire.granted(request, line)


@cases(
    "WIRE-4/1",
    0,
    FRAME_BYTES_MAX + 1,
    2**31,
    2**32 - 1,
)
def test_a_length_out_of_bounds_is_refused_before_the_body_comes(wire: Wire, what: int) -> None:
    wire.watch()
    line = wire.call()
    line.say(what.to_bytes(HEADER_BYTES, "big"))
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        # More than any socket holds: it would have to read on.
        line.sock.sendall(bytes(64 * FRAME_BYTES_MAX))
    wire.check_rejected(line)


@case("WIRE-4/5")
def test_a_whole_message_in_too_long_a_frame_is_refused(wire: Wire) -> None:
    padding = FRAME_BYTES_MAX + 1 - len(request_body(padding="")) - 2
    body = request_body(padding="x" * padding)
    assert len(body) == FRAME_BYTES_MAX + 1
    wire.check_frame_rejected(len(body).to_bytes(HEADER_BYTES, "big") + body)


# --- Messages ----------------------------------------------------------------------------------


@case("WIRE-8/1")
def test_the_compact_form_is_read(wire: Wire) -> None:
    line, request = wire.call(), wire.request(MOUNT, PID)
    line.say(
        encode_frame(body_of("NamespaceRequest", [request.allocation_id, ["Mount", "Pid"], None]))
    )
    wire.granted(request, line)
    line.say(encode_frame(body_of("AllocationEnded", [request.allocation_id])))
    assert line.hear() == AllocationEnded(request.allocation_id)


@case("WIRE-8/2")
def test_keys_are_read_in_any_order(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID)
    fields = {"uenv_image": None, "namespaces": ["Pid"], "allocation_id": request.allocation_id}
    line.say(encode_frame(body_of("NamespaceRequest", fields)))
    wire.granted(request, line)


@case("WIRE-8/3")
def test_a_key_that_is_not_known_is_passed_over(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID)
    unknown = {"zeal": 1, "more": [1], "bytes": b"\0", "none": None, "number": 1.5}
    fields = {"allocation_id": request.allocation_id, "namespaces": ["Pid"], "uenv_image": None}
    line.say(encode_frame(body_of("NamespaceRequest", {**unknown, **fields})))
    wire.granted(request, line)


@case("WIRE-8/4")
def test_an_image_that_is_not_mentioned_is_none(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID)
    fields = {"allocation_id": request.allocation_id, "namespaces": ["Pid"]}
    line.say(encode_frame(body_of("NamespaceRequest", fields)))
    wire.granted(request, line)
    # It is the same request as one that says so.
    wire.ask(request, line)


@case("WIRE-8/5")
def test_numbers_in_the_long_form_are_read(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID)
    name = request.allocation_id.encode()
    line.say(
        encode_frame(
            b"\xde\x00\x01"  # map 16
            + (b"\xda" + len("NamespaceRequest").to_bytes(2, "big") + b"NamespaceRequest")
            + (b"\xdf\x00\x00\x00\x03" + msgpack.packb("allocation_id"))  # map 32
            + (b"\xdb" + len(name).to_bytes(4, "big") + name)  # str 32
            + (msgpack.packb("namespaces") + b"\xdc\x00\x01\xd9\x03Pid")  # array 16, str 8
            + (msgpack.packb("uenv_image") + b"\xc0")
        )
    )
    wire.granted(request, line)


@cases("WIRE-9/1", *BODIES.values())
def test_a_body_that_is_no_message_is_refused_and_no_other_peer_notices(
    wire: Wire, what: bytes
) -> None:
    wire.check_frame_rejected(encode_frame(what))


@cases(
    "WIRE-11/1",
    NamespaceResponse("nsh-test-role", (), None),
    NamespaceResponse("nsh-test-role", (PID,), None),
    CreationFailed("no"),
    AllocationNotFound("nsh-test-role"),
    FdPassing("no"),
)
def test_a_message_that_is_not_for_a_provider_is_refused(wire: Wire, what: Any) -> None:
    wire.check_frame_rejected(frame_of(what))


@case("WIRE-11/6")
def test_nothing_is_read_after_a_frame_that_is_refused(wire: Wire) -> None:
    request = wire.request(PID)
    wire.check_frame_rejected(encode_frame(b"\xc1") + frame_of(request))
    assert wire.call_end(request.allocation_id) == AllocationNotFound(request.allocation_id)


@case("WIRE-14/2")
def test_what_came_before_a_frame_that_is_refused_is_answered_first(wire: Wire) -> None:
    wire.watch()
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    line.say(frame_of(request) + encode_frame(b"\xc1"))
    identities = wire.granted(request, line)
    wire.check_rejected(line)
    # The allocation stays: it belongs to no connection.
    assert wire.ask(request) == identities


# --- Descriptors that are sent to the provider -------------------------------------------------


@cases("FD-11/1", 0, 1, HEADER_BYTES, 20)
def test_a_provider_takes_no_descriptors(wire: Wire, what: int) -> None:
    wire.watch()
    line, request = wire.call(), wire.request(PID)
    frame = frame_of(request)
    reader, writer = os.pipe()
    try:
        if what:
            line.say(frame[:what])
            line.wait_read()
        try:
            line.say(frame[what:], [writer])
            is_sent = True
        except PermissionError:
            is_sent = False  # SO_PASSRIGHTS is off at the other end, and nothing has left
    finally:
        os.close(writer)
    with open(reader, "rb") as pipe:
        if is_sent:
            wire.check_rejected(line)
            answer = wire.call_end(request.allocation_id)
            assert answer == AllocationNotFound(request.allocation_id)
        else:
            line.say(frame[what:])
            wire.granted(request, line)
        assert select.select([pipe], [], [], DEADLINE_S)[0], "the descriptor is kept"
        assert pipe.read() == b""


# --- Answers -----------------------------------------------------------------------------------


@case("WIRE-14/1")
def test_answers_come_in_the_order_of_what_they_answer(wire: Wire) -> None:
    line = wire.call()
    first, second = wire.request(PID, NET, MOUNT), wire.request(PID)
    refused = NamespaceRequest(wire.name(), (PID, PID))
    never = AllocationEnded(f"{wire.prefix}-never")
    messages: tuple[Message, ...] = (first, refused, never, second, refused, never)
    line.say(b"".join(map(frame_of, messages)))

    wire.granted(first, line)
    assert isinstance(line.hear(), CreationFailed)
    assert line.hear() == AllocationNotFound(never.allocation_id)
    wire.granted(second, line)
    assert isinstance(line.hear(), CreationFailed)
    assert line.hear() == AllocationNotFound(never.allocation_id)


@case("WIRE-16/1")
def test_many_requests_under_way_are_answered_in_order(wire: Wire) -> None:
    line = wire.call()
    requests = [wire.request(*kinds) for kinds in (LIGHT, (), (MOUNT,), (PID,)) * 4]
    line.say(b"".join(map(frame_of, requests)))
    granted = [wire.granted(request, line) for request in requests]
    always.require(always.allocations_are_isolated(dict(enumerate(granted))))


@case("LIFE-4/1")
def test_the_same_request_under_way_many_times_has_one_result(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    line.say(frame_of(request) * 8)
    assert len({wire.granted(request, line) for _ in range(8)}) == 1


@case("PEER-8/1")
def test_one_connection_does_not_wait_for_another(wire: Wire) -> None:
    lines = [wire.call() for _ in range(8)]
    requests = [wire.request(PID, NET, MOUNT) for _ in lines]
    for line, request in zip(lines, requests, strict=True):
        line.say(request)
    for line, request in reversed(list(zip(lines, requests, strict=True))):
        wire.granted(request, line)


# --- Descriptors that are handed over ----------------------------------------------------------


@pytest.mark.clause("LIFE-11")
@cases("FD-2/1", *ORDERS)
def test_descriptors_are_what_was_asked_for_in_the_order_of_the_request(
    wire: Wire, what: tuple[NamespaceType, ...]
) -> None:
    request = wire.request(*what)
    first, again = wire.ask(request), wire.ask(request)
    assert first == again
    own = {wire.provider.inspector.own(kind) for kind in NamespaceType}
    assert not own & set(first)


@case("FD-1/2")
def test_descriptors_come_with_the_first_byte_of_their_frame(wire: Wire) -> None:
    request = wire.request(NET, MOUNT, PID)
    wire.ask(request)
    line = wire.call()
    line.say(request)
    first = receive_once(line.sock, 1, 8)
    close_all(first.descriptors)
    assert len(first.descriptors) == 3

    header = first.data + _exactly(line.sock, HEADER_BYTES - 1)
    body = _exactly(line.sock, int.from_bytes(header, "big"))
    assert body == encode_message(NamespaceResponse(request.allocation_id, request.namespaces))


def _exactly(sock: socket.socket, size: int) -> bytes:
    """Read so many bytes; no descriptors may come with them."""
    data = b""
    while len(data) < size:
        reception = receive_once(sock, size - len(data), 8)
        close_all(reception.descriptors)
        assert reception.data
        assert not reception.descriptors
        assert not reception.is_truncated
        data += reception.data
    return data


@case("LIFE-9/1")
def test_allocations_are_isolated_from_one_another(wire: Wire) -> None:
    granted: dict[Hashable, Any]
    granted = {n: wire.ask(wire.request(PID, NET, MOUNT)) for n in range(3)}
    always.require(always.allocations_are_isolated(granted))


# --- Allocations: what may be asked ------------------------------------------------------------


@cases("LIFE-10/1", *list(ODD_IDS.values())[:7])
def test_an_id_is_any_component_of_a_path(wire: Wire, what: str) -> None:
    request = NamespaceRequest(what.format(wire.name()), (PID,))
    line = wire.call()
    wire.ask(request, line)
    wire.end(request.allocation_id, line)


@cases("LIFE-10/8", *IDS.values())
def test_an_id_that_could_be_no_directory_of_its_own_is_refused(wire: Wire, what: str) -> None:
    line = wire.call()
    line.say(NamespaceRequest(what, (PID,)))
    check_refused(wire, line)


@cases(
    "LIFE-12/1",
    (PID, PID),
    (NET, MOUNT, NET),
    (PID, NET, MOUNT, PID),
    (MOUNT,) * 16,
)
def test_a_repeated_type_is_refused(wire: Wire, what: tuple[NamespaceType, ...]) -> None:
    line = wire.call()
    request = wire.request(*what)
    line.say(request)
    check_refused(wire, line)
    line.say(AllocationEnded(request.allocation_id))
    assert line.hear() == AllocationNotFound(request.allocation_id)


def check_refused(wire: Wire, line: Ear) -> None:
    """Expect that a request is refused, and that nothing else is lost by it."""
    answer = line.hear()
    assert isinstance(answer, CreationFailed), answer
    assert answer.reason.strip()
    wire.barrier(line)


@cases("LIFE-12/5", (), (PID,), (NET, PID))
def test_an_image_needs_a_mount_namespace(wire: Wire, what: tuple[NamespaceType, ...]) -> None:
    line = wire.call()
    line.say(wire.request(*what, image=wire.provider.image or "hello.sqfs"))
    check_refused(wire, line)


@cases(
    "NODE-11/1",
    "nsh-test-there-is-none.sqfs",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "",
    ".",
    "nsh-test\0.sqfs",
)
def test_an_image_that_is_not_below_the_root_is_refused(wire: Wire, what: str) -> None:
    line = wire.call()
    line.say(wire.request(PID, MOUNT, image=what))
    check_refused(wire, line)


@case("NODE-12/1")
def test_an_image_is_mounted_where_the_answer_says(wire: Wire) -> None:
    image = wire.provider.image
    if image is None:
        pytest.skip("no image was named with --provider-uenv")
    line, first, second = wire.call(), *(wire.request(MOUNT, PID, image=image) for _ in range(2))
    paths = []
    for request in (first, second, first):
        wire.ask(request, line)
        answer = line.heard[-1]
        assert isinstance(answer, NamespaceResponse)
        paths.append(answer.uenv_mount_path)
    (path,) = set(paths)
    assert path is not None
    assert path.startswith("/")
    assert path.endswith(f"/{image.removesuffix('.sqfs')}")


# --- Allocations: the same again, another, and none --------------------------------------------


@case("LIFE-3/1")
def test_the_same_request_is_handed_the_same_namespaces(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    granted = [wire.ask(request, line), wire.ask(request, line), wire.ask(request)]
    assert len(set(granted)) == 1


@case("LIFE-4/2")
def test_who_asks_while_it_is_being_created_is_handed_the_one_result(wire: Wire) -> None:
    lines, request = [wire.call() for _ in range(8)], wire.request(PID, NET, MOUNT)
    for line in lines:
        line.say(request)
    assert len({wire.granted(request, line) for line in lines}) == 1


@cases(
    "LIFE-5/1",
    ((MOUNT, PID), None),
    ((PID,), None),
    ((PID, MOUNT, NET), None),
    ((), None),
    (LIGHT, "nsh-test-other.sqfs"),
)
def test_another_request_for_what_is_alive_is_refused_and_changes_nothing(
    wire: Wire, what: tuple[tuple[NamespaceType, ...], str | None]
) -> None:
    line, request = wire.call(), wire.request(*LIGHT)
    identities = wire.ask(request, line)
    other = wire.call()
    other.say(NamespaceRequest(request.allocation_id, *what))
    check_refused(wire, other)
    assert wire.ask(request, line) == wire.ask(request, other) == identities


@case("LIFE-2/1")
def test_an_allocation_outlives_its_connection(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    identities = wire.ask(request, line)
    line.hang_up()
    assert wire.ask(request) == identities


@case("LIFE-2/2")
def test_an_allocation_outlives_a_consumer_that_did_not_wait_for_its_answer(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    line.say(request)
    line.hang_up()
    assert wire.ask(request) == wire.ask(request)


@case("END-13/1")
def test_an_end_is_confirmed(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    wire.ask(request, line)
    wire.end(request.allocation_id, line)
    wire.barrier(line)


@case("PEER-3/1")
def test_any_peer_may_end_and_the_end_of_what_has_ended_is_confirmed_again(wire: Wire) -> None:
    request = wire.request(*LIGHT)
    wire.ask(request)
    other = wire.call()
    for _ in range(3):
        wire.end(request.allocation_id, other)
    wire.end(request.allocation_id)


@cases("END-13/2", "nsh-test-never-was", "a/b\0")
def test_the_end_of_what_never_was_is_not_confirmed(wire: Wire, what: str) -> None:
    line = wire.call()
    for _ in range(2):
        line.say(AllocationEnded(what))
        assert line.hear() == AllocationNotFound(what)


@cases("END-19/1", "", "x" * 129, "x" * 65_000)
def test_the_end_of_what_can_never_be_is_not_confirmed(wire: Wire, what: str) -> None:
    wire.watch()
    line = wire.call()
    line.say(AllocationEnded(what))
    answer = line.hear()
    # The protocol has two readings. It is the end of what never was; and no id, hence no message.
    if isinstance(answer, FdPassing):
        assert answer.reason.strip()
        assert line.hear() is None
    else:
        assert answer == AllocationNotFound(what)
        wire.barrier(line)
    wire.check_bystander()


@case("LIFE-8/1")
def test_a_refused_request_leaves_nothing_to_end(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, MOUNT, image="nsh-test-there-is-none.sqfs")
    line.say(request)
    check_refused(wire, line)
    # One that was tried and undone may be remembered; one that was refused at sight is not.
    assert wire.call_end(request.allocation_id) in (
        AllocationNotFound(request.allocation_id),
        AllocationEnded(request.allocation_id),
    )


@case("END-12/1")
def test_every_peer_that_holds_it_hears_of_the_end_once(wire: Wire) -> None:
    request = wire.request(*LIGHT)
    holders = [wire.call() for _ in range(4)]
    for line in holders:
        wire.ask(request, line)
        wire.ask(request, line)  # handed off twice, but one notice
    other_line = wire.call()
    other = wire.request(PID)
    wire.ask(other, other_line)
    wire.end(request.allocation_id)
    for line in holders:
        assert line.hear() == AllocationEnded(request.allocation_id)
        wire.barrier(line)
    wire.barrier(other_line)


@case("END-15/1")
def test_ends_that_cross_are_all_confirmed(wire: Wire) -> None:
    request = wire.request(*LIGHT)
    ended = AllocationEnded(request.allocation_id)
    holders = [wire.call() for _ in range(4)]
    for line in holders:
        wire.ask(request, line)
    for line in holders:
        line.say(ended)
    for line in holders:
        assert line.hear() == ended
    for line in holders:
        wire.end(request.allocation_id, line)


@case("LIFE-6/1")
def test_after_its_end_the_same_id_is_another_incarnation(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    lives = []
    for _ in range(3):
        lives.append(wire.ask(request, line))
        wire.end(request.allocation_id, line)
    always.require(always.allocations_are_isolated(dict(enumerate(lives))))


@case("LIFE-6/2")
def test_after_its_end_the_same_id_may_have_another_request(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, MOUNT)
    wire.ask(request, line)
    wire.end(request.allocation_id, line)
    wire.ask(NamespaceRequest(request.allocation_id, (MOUNT,)), line)


@case("LIFE-6/3")
def test_a_request_right_behind_the_end_is_for_the_next_incarnation(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, MOUNT)
    before = wire.ask(request, line)
    line.say(frame_of(AllocationEnded(request.allocation_id)) + frame_of(request))
    assert line.hear() == AllocationEnded(request.allocation_id)
    after = wire.granted(request, line)
    assert not set(before) & set(after)


@case("END-16/1")
def test_an_end_right_behind_the_request_is_confirmed_whatever_came_of_it(wire: Wire) -> None:
    line, request = wire.call(), wire.request(PID, NET, MOUNT)
    ended = AllocationEnded(request.allocation_id)
    line.say(frame_of(request) + frame_of(ended))
    answer = line.hear()
    assert isinstance(answer, (NamespaceResponse, CreationFailed)), answer
    assert line.hear() == ended
    wire.barrier(line)
    assert wire.call_end(request.allocation_id) == ended


@case("END-10/1")
def test_an_end_touches_no_other_allocation(wire: Wire) -> None:
    wire.watch()
    request = wire.request(*LIGHT)
    wire.ask(request)
    wire.end(request.allocation_id)
    wire.check_bystander()


@case("END-12/2")
def test_who_has_gone_is_missed_by_no_other_peer(wire: Wire) -> None:
    request = wire.request(*LIGHT)
    gone, stays = wire.call(), wire.call()
    wire.ask(request, gone)
    wire.ask(request, stays)
    gone.hang_up()
    wire.end(request.allocation_id)
    assert stays.hear() == AllocationEnded(request.allocation_id)


# --- Peers -------------------------------------------------------------------------------------


@case("PEER-10/1")
def test_a_peer_that_is_done_speaking_costs_no_other_anything(wire: Wire) -> None:
    wire.watch()
    line, request = wire.call(), wire.request(*LIGHT)
    line.say(request)
    line.sock.shutdown(socket.SHUT_WR)
    # Whether it is still answered is the provider's affair; that it gets no half answer is not.
    assert all(isinstance(answer, NamespaceResponse) for answer in line.hear_rest())
    wire.check_bystander()
    assert wire.ask(request) == wire.ask(request)


@case("PEER-8/2")
def test_a_peer_that_is_done_listening_costs_no_other_anything(wire: Wire) -> None:
    wire.watch()
    line, request = wire.call(), wire.request(*LIGHT)
    line.sock.shutdown(socket.SHUT_RD)
    line.say(request)
    wire.check_bystander()
    assert wire.ask(request) == wire.ask(request)


@case("PEER-8/3")
def test_peers_that_send_slowly_do_not_keep_others_waiting(wire: Wire) -> None:
    wire.watch()
    frame = frame_of(AllocationEnded(f"{wire.prefix}-never"))
    slow = [wire.call() for _ in range(len(frame) - 1)]
    for length, line in enumerate(slow, 1):
        line.say(frame[:length])
    wire.check_bystander()
    for length, line in enumerate(slow, 1):
        line.say(frame[length:])
        assert line.hear() == AllocationNotFound(f"{wire.prefix}-never")


@case("PEER-8/4")
def test_a_peer_that_does_not_read_does_not_keep_others_waiting(wire: Wire) -> None:
    wire.watch()
    line = wire.call()
    frame = frame_of(AllocationEnded(f"{wire.prefix}-never".ljust(120, "x")))
    line.sock.settimeout(0.0)
    try:
        for _ in range(20_000):
            line.sock.sendall(frame)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    wire.check_bystander()


@case("WIRE-3/2")
def test_peers_that_hang_up_in_the_middle_of_a_frame_leave_nothing(wire: Wire) -> None:
    wire.watch()
    request = wire.request(PID)
    frame = frame_of(request)
    for length in range(len(frame)):
        line = wire.call()
        if length:
            line.say(frame[:length])
        line.hang_up()
    wire.check_bystander()
    assert wire.call_end(request.allocation_id) == AllocationNotFound(request.allocation_id)


@case("END-12/3")
def test_many_connections_are_served_and_told(wire: Wire) -> None:
    request = wire.request(*LIGHT)
    lines = [wire.call() for _ in range(64)]
    for line in lines:
        line.say(request)
    assert len({wire.granted(request, line) for line in lines}) == 1
    wire.end(request.allocation_id)
    for line in lines:
        assert line.hear() == AllocationEnded(request.allocation_id)


@case("PEER-11/1")
def test_connections_that_come_and_go_wear_nothing_out(wire: Wire) -> None:
    wire.watch()
    for _ in range(300):
        wire.call().hang_up()
    wire.check_bystander()


# --- Everything, in any order ------------------------------------------------------------------


@case("END-2/1")
def test_every_promise_is_kept_whatever_consumers_do(
    wire: Wire, pytestconfig: pytest.Config
) -> None:
    provider = wire.provider

    class OverTheWire(Handoffs):
        prefix = wire.prefix

        def open_adapter(self) -> Adapter:
            return Adapter(provider.socket, provider.inspector, provider.image)

    examples = pytestconfig.getoption("--provider-examples") or settings().max_examples * 2 // 5
    run_state_machine_as_test(OverTheWire, settings=settings(SETTINGS, max_examples=examples))
