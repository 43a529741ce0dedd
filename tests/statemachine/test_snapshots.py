"""A snapshot says what is what, is a value, and has all that its kernel knows."""

from __future__ import annotations

import pickle

import pytest

from statemachine import (
    AllocationEnded,
    ConsumerKernel,
    NamespaceRequest,
    NamespaceResponse,
    ProviderKernel,
)
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.provider.models import Allocation, Message
from statemachine.snapshots import (
    AllocationSnapshot,
    ConnectionSnapshot,
    ConsumerSnapshot,
    HeldMessage,
    MessageSnapshot,
    ProviderSnapshot,
)
from statemachine.states import (
    AllocationState,
    ConsumerState,
    MessageState,
    NoticeState,
    ServiceState,
)

REQUEST, RESPONSE = NamespaceRequest("a", ()), NamespaceResponse("a", ())
HELD = (
    on.ConnectionOpened(1, 0),
    on.RequestReceived(1, NamespaceRequest("b", ())),
    on.RequestReceived(1, REQUEST),
)
ALIVE = (
    on.ProviderReady(),
    on.ConnectionOpened(1, 0),
    on.RequestReceived(1, REQUEST),
    on.NamespacesCreated("a", RESPONSE),
    on.ResponseSent("a", 1),
    on.EndReceived(1, "a"),
)


def after(*events: on.ProviderInput) -> ProviderKernel:
    kernel = ProviderKernel()
    kernel.remember(["before"])
    for event in events:
        kernel.receive(event)
    return kernel


def test_basic_a_provider_says_all_that_it_knows() -> None:
    ends = MessageSnapshot(AllocationEnded("a"), MessageState.OPEN, None)
    assert after(*ALIVE).snapshot() == ProviderSnapshot(
        service=ServiceState.READY,
        connections=(ConnectionSnapshot(number=1, uid=0, is_closing=False, messages=(ends,)),),
        allocations=(
            AllocationSnapshot(
                allocation_id="a",
                request=REQUEST,
                response=RESPONSE,
                uid=0,
                state=AllocationState.ENDED,
                asked=frozenset({1}),
                parties=frozenset({1}),
                holders=frozenset({1}),
                deferred=(),
                is_being_made=False,
                is_populated=False,
                is_announced=False,
                timers=frozenset({Timer.RELEASE}),
                failure="",
                drain="",
            ),
        ),
        held=(),
        remembered=("before",),
    )


def test_basic_a_consumer_says_all_that_it_knows() -> None:
    kernel = ConsumerKernel(REQUEST)
    kernel.receive(on.NamespacesWanted())
    assert kernel.snapshot() == ConsumerSnapshot(
        request=REQUEST,
        state=ConsumerState.CONNECTING,
        notice=NoticeState.SILENT,
        is_connected=False,
        is_calling=True,
        timers=frozenset(),
    )


def test_printed_it_names_every_field() -> None:
    text = repr(after(*HELD, on.ProviderReady()).snapshot())
    kinds = (ProviderSnapshot, ConnectionSnapshot, MessageSnapshot, AllocationSnapshot)
    for kind in kinds:
        assert f"{kind.__name__}({kind._fields[0]}=" in text
        assert all(f"{name}=" in text for name in kind._fields)
    assert repr(ConsumerKernel(REQUEST).snapshot()).startswith("ConsumerSnapshot(request=")


def test_a_held_message_is_found_by_its_place() -> None:
    held = after(*HELD).snapshot().held
    assert held == (HeldMessage(connection=1, place=0), HeldMessage(connection=1, place=1))


@pytest.mark.parametrize(
    ("kind", "frozen", "apart"),
    [(Allocation, AllocationSnapshot, ()), (Message, MessageSnapshot, ("connection",))],
)
def test_the_fields_of_a_model_are_those_of_its_snapshot(
    kind: type[Allocation | Message], frozen: type[AllocationSnapshot], apart: tuple[str, ...]
) -> None:
    assert {*apart, *frozen._fields} == set(kind.__slots__)


def test_a_snapshot_with_another_field_is_restored() -> None:
    snapshot = after(*ALIVE).snapshot()
    changed = snapshot._replace(remembered=("after",))
    kernel = ProviderKernel.restore(changed)
    assert kernel.snapshot() == changed != snapshot
    assert kernel.state_of("after") is AllocationState.RELEASED


def test_what_is_read_back_from_a_file_is_the_same() -> None:
    for snapshot in (after(*HELD).snapshot(), ConsumerKernel(REQUEST).snapshot()):
        again = pickle.loads(pickle.dumps(snapshot))
        assert (again, type(again)) == (snapshot, type(snapshot))
        assert hash(again) == hash(snapshot)
