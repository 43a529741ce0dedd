"""What is heard while messages are under way has an order in which it can have come about."""

from __future__ import annotations

import pytest

from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from statemachine.messages import NamespaceType as Kind
from transport.testing.possible import FIRST, OVER, Inexplicable, Possible

REQUEST = NamespaceRequest("a", (Kind.PID,))
OTHER = NamespaceRequest("a", (Kind.NET,))
RESPONSE = NamespaceResponse("a", (Kind.PID,))
END = AllocationEnded("a")
ONE, TWO = ("pid 1",), ("pid 2",)


def never() -> Possible:
    return Possible("a", None)


def alive() -> Possible:
    return Possible("a", REQUEST, ONE)


def test_basic_a_request_under_way_may_be_granted_or_its_end_may_come_first() -> None:
    for answers in (
        [(RESPONSE, ONE), (END, None)],
        [(CreationFailed("ended"), None), (END, None)],
        [(RESPONSE, ONE), (AllocationNotFound("a"), None)],
    ):
        possible = never()
        numbers = [possible.said(REQUEST), possible.said(END)]
        for number, (answer, identities) in zip(numbers, answers, strict=True):
            possible.answered(number, answer, identities)
    assert possible.alive == {FIRST}


def test_without_an_end_under_way_nothing_is_refused_and_nothing_replaced() -> None:
    possible = alive()
    with pytest.raises(Inexplicable, match="explains namespace creation failed"):
        possible.answered(possible.said(REQUEST), CreationFailed("no"))
    with pytest.raises(Inexplicable):
        possible.answered(possible.said(REQUEST), RESPONSE, TWO)


def test_another_request_is_refused_as_long_as_the_first_may_be_alive() -> None:
    possible = alive()
    possible.answered(possible.said(OTHER), CreationFailed("another"))
    with pytest.raises(Inexplicable):
        possible.answered(possible.said(OTHER), RESPONSE, TWO)
    possible = alive()
    possible.said(END)
    possible.answered(possible.said(OTHER), RESPONSE, TWO)
    assert possible.alive == {1, OVER} - {OVER}


def test_what_has_ended_is_seen_by_no_later_request() -> None:
    possible = alive()
    possible.answered(possible.said(END), END)
    with pytest.raises(Inexplicable):
        possible.answered(possible.said(REQUEST), RESPONSE, ONE)


def test_an_end_is_announced_only_if_something_can_have_ended_it() -> None:
    with pytest.raises(Inexplicable, match="was announced"):
        alive().told_of_the_end(ONE)
    possible = alive()
    possible.may_have_ended()
    assert possible.alive == {FIRST, OVER}
    possible.told_of_the_end(ONE)
    assert possible.alive == {OVER}


def test_what_is_abandoned_may_have_taken_effect_and_takes_none_later() -> None:
    possible = alive()
    possible.said(END)
    possible.all_abandoned()
    possible.answered(possible.said(REQUEST), RESPONSE, ONE)
    assert possible.alive == {FIRST}
    with pytest.raises(Inexplicable):
        possible.answered(possible.said(REQUEST), RESPONSE, TWO)


def test_what_a_provider_has_told_outlives_it_and_what_it_has_not_may_be_undone() -> None:
    possible = never()
    possible.said(REQUEST)
    possible.provider_died()
    assert possible.alive > {FIRST, OVER}
    possible = never()
    possible.answered(possible.said(REQUEST), RESPONSE, ONE)
    possible.provider_died()
    assert possible.alive == {FIRST}
