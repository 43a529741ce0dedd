"""The seed's four errors, word for word; and whose doing an illegal event is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from statemachine.errors import (
    NAMESPACE_ERRORS,
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    NamespaceError,
    ProtocolError,
    RemoteProtocolError,
    SocketUnavailable,
)

RENDERED = [
    # kind, its field, and the text of `#[error("…")]` in the seed with the field filled in
    (SocketUnavailable, "reason", "handoff socket unavailable: X"),
    (CreationFailed, "reason", "namespace creation failed: X"),
    (AllocationNotFound, "allocation_id", "allocation not found: X"),
    (FdPassing, "reason", "FD passing failed: X"),
]


@pytest.mark.parametrize(("kind", "field", "rendered"), RENDERED)
def test_basic_an_error_reads_as_in_the_seed(
    kind: Callable[[str], NamespaceError], field: str, rendered: str
) -> None:
    error = kind("X")
    assert str(error) == rendered
    assert getattr(error, field) == error.text == "X"


def test_there_are_the_four_kinds_of_the_seed_and_no_other() -> None:
    assert [kind.kind for kind in NAMESPACE_ERRORS] == [
        "SocketUnavailable",
        "CreationFailed",
        "AllocationNotFound",
        "FdPassing",
    ]
    assert set(NamespaceError.__subclasses__()) == set(NAMESPACE_ERRORS)
    assert [kind.__name__ for kind in NAMESPACE_ERRORS] == [kind.kind for kind in NAMESPACE_ERRORS]


def test_errors_of_the_same_kind_and_text_are_equal() -> None:
    assert CreationFailed("x") == CreationFailed("x")
    assert hash(CreationFailed("x")) == hash(CreationFailed("x"))
    assert len({hash(kind("x")) for kind in (CreationFailed, FdPassing, SocketUnavailable)}) == 3
    assert CreationFailed("x") != CreationFailed("y")
    assert CreationFailed("x") != SocketUnavailable("x")
    assert CreationFailed("x") != "x"
    assert len({CreationFailed("x"), CreationFailed("x"), FdPassing("x")}) == 2


def test_an_error_shows_its_kind_and_its_text() -> None:
    assert repr(FdPassing("MSG_CTRUNC")) == "FdPassing('MSG_CTRUNC')"


@pytest.mark.parametrize("kind", NAMESPACE_ERRORS)
def test_an_error_can_be_raised_and_caught_as_what_it_is(
    kind: Callable[[str], NamespaceError],
) -> None:
    with pytest.raises(NamespaceError) as caught:
        raise kind("x")
    assert caught.value == kind("x")


@pytest.mark.parametrize("blame", [LocalProtocolError, RemoteProtocolError])
def test_an_illegal_event_is_reported_with_event_state_and_subject(
    blame: type[ProtocolError],
) -> None:
    error = blame("ScopeEmptied", "unknown", "allocation a")
    assert (error.event, error.state, error.subject) == ("ScopeEmptied", "unknown", "allocation a")
    assert str(error) == "ScopeEmptied is not possible while allocation a is unknown"


def test_a_protocol_error_never_travels() -> None:
    assert not issubclass(ProtocolError, NamespaceError)
    assert not issubclass(LocalProtocolError, RemoteProtocolError)
    assert not issubclass(RemoteProtocolError, LocalProtocolError)
