"""Users take turns, and of each user its connections; what one puts in stays in order."""

from __future__ import annotations

import pytest

from transport.serve.turns import IDLE_IN_A_ROW_MAX, Turns


def taken(turns: Turns[str]) -> list[str]:
    items = []
    while (item := turns.take()) is not None:
        items.append(item)
    return items


@pytest.mark.clause("PEER-12")
def test_basic_users_take_turns_and_of_each_its_connections() -> None:
    turns = Turns[str]()
    for lane, items in (((0, 1), "abc"), ((0, 2), "de"), ((7, 3), "xyz")):
        for item in items:
            turns.put(lane, item)
    assert taken(turns) == ["a", "x", "d", "y", "b", "z", "e", "c"]
    assert not turns


@pytest.mark.clause("PEER-12")
def test_who_was_idle_comes_before_who_goes_on() -> None:
    turns = Turns[str]()
    for connection in range(3):
        for number in range(100):
            turns.put((0, connection), f"{connection}-{number}")
    assert [turns.take() for _ in range(3)] == ["0-0", "1-0", "2-0"]
    turns.put((0, 9), "late")
    turns.put((1, 1), "other user")
    assert [turns.take() for _ in range(4)] == ["other user", "late", "0-1", "1-1"]


def test_who_was_served_and_has_more_only_now_goes_on() -> None:
    turns = Turns[str]()
    for connection in range(3):
        for number in range(100):
            turns.put((0, connection), f"{connection}-{number}")
    turns.put((0, 9), "first")
    assert [turns.take() for _ in range(4)] == ["0-0", "1-0", "2-0", "first"]
    turns.put((0, 9), "second")
    assert [turns.take() for _ in range(4)] == ["0-1", "1-1", "2-1", "second"]


def test_who_goes_on_is_served_whatever_else_comes() -> None:
    turns = Turns[str]()
    turns.put((0, 0), "first")
    turns.put((0, 0), "second")
    assert turns.take() == "first"
    for connection in range(1, 100):
        turns.put((0, connection), "other")
    assert "second" in [turns.take() for _ in range(IDLE_IN_A_ROW_MAX + 1)]


def test_a_connection_that_sends_nothing_more_is_not_kept() -> None:
    turns = Turns[str]()
    turns.put((0, 0), "always")
    for connection in range(1, 100):
        turns.put((0, connection), "once")
        turns.put((0, 0), "always")
        assert sorted([str(turns.take()), str(turns.take())]) == ["always", "once"]
    lanes = turns._users.find(0)
    assert lanes is not None
    assert len(lanes) < 5


def test_what_may_not_be_taken_keeps_its_place_and_holds_up_only_its_connection() -> None:
    turns = Turns[str]()
    for lane, item in (((0, 1), "busy"), ((0, 1), "behind"), ((0, 2), "free"), ((1, 1), "other")):
        turns.put(lane, item)
    first = [turns.take(lambda item: item != "busy") for _ in range(3)]
    assert first == ["free", "other", None]
    assert taken(turns) == ["busy", "behind"]


def test_what_is_removed_is_not_taken() -> None:
    turns = Turns[str]()
    for item in "abc":
        turns.put((0, 1), item)
    assert turns.remove((0, 1), "b")
    assert not turns.remove((0, 1), "b")
    assert not turns.remove((5, 1), "a")
    assert taken(turns) == ["a", "c"]
    turns.put((0, 1), "d")
    assert turns.remove((0, 1), "d")
    assert not turns


def test_cleared_nothing_is_left() -> None:
    turns = Turns[str]()
    turns.put((None, 0), "a")
    turns.clear()
    assert turns.take() is None
