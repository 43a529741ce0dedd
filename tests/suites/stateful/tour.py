"""The shortest way through every row of the tables, as steps of the same machines.

Random steps take most rows in a minute; that *every* row is taken on every adapter, in every run
of the suite, is not left to chance.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from linux.testing.adversary import RESPONSES

RuleCall = tuple[str, dict[str, Any]]
"""A rule and its arguments."""


def _step(rule: str, **arguments: Any) -> RuleCall:
    return rule, arguments


# `_pick`s, while nothing else is alive: which request of `machine.requests_of`.
A: Final = 0
OTHER_A: Final = 1
C: Final = 3

_ASKED: Final = _step("some_consumer_asks", pick=C)
_GONE: Final = _step("a_consumer_goes", pick=0)
_ENDED: Final = _step("some_consumer_ends_it", pick=0)
_OVERDUE: Final = _step("no_consumer_claims_it_in_time", pick=0)
_RELEASED: Final = _step("an_operator_releases_it", pick=0)
_RESTARTED: Final = _step("the_provider_starts_anew")
_USED: Final = (_step("a_process_joins", pick=0), _step("a_process_leaves", pick=0))


def _made(pick: int = C) -> RuleCall:
    """It is made, and its asker has gone."""
    return _created(pick=pick, goes=True)


def _created(
    *,
    pick: int = C,
    is_made: bool = False,
    goes: bool = False,
    others: tuple[str, ...] = (),
    fate: str = "made",
) -> RuleCall:
    arguments = {"pick": pick, "is_made": is_made, "goes": goes, "others": others, "fate": fate}
    return _step("its_creation_takes_time", **arguments)


def _ends(how: str, *meanwhile: str) -> RuleCall:
    return _step("its_release_takes_time", pick=0, how=how, meanwhile=meanwhile)


PROVIDER_TOUR: Final = (
    # Unknown.
    _step("some_consumer_ends_what_never_was"),
    _step("some_consumer_asks_for_an_image_that_is_not_there"),
    # Requested.
    _created(others=("same", "other"), fate="ended"),
    _created(is_made=True, fate="ended"),
    _created(fate="released"),
    # Created.
    _made(),
    _step("there_are_no_descriptors", pick=2),
    _RESTARTED,
    _ASKED,
    _ENDED,
    *(_made(), _OVERDUE),
    *(_made(), _RELEASED),
    *(_made(), _ENDED),
    *(_made(), _step("an_init_dies", pick=0)),
    *(_made(), *_USED),
    *(_made(A), _step("some_consumer_asks", pick=OTHER_A)),
    # Handed off.
    _step("some_consumer_asks", pick=A),
    _step("some_consumer_asks", pick=OTHER_A),
    _step("there_are_no_descriptors", pick=0),
    _RESTARTED,
    _step("some_consumer_asks", pick=A),
    _GONE,
    _OVERDUE,
    *(_ASKED, _RELEASED),
    *(_ASKED, *_USED),
    *(_ASKED, _step("an_init_dies", pick=0)),
    *(_ASKED, _step("a_holder_ends_it", pick=0)),
    # Ended.
    *(_ASKED, _ends("word", "holder goes", "end", "operator", "process", "init", "ask"), _ENDED),
    *(_ASKED, _ends("operator", "ask", "overdue", "ask", "end")),
    *(_ASKED, _step("something_in_it_does_not_die", pick=0, meanwhile=("overdue",))),
    _ASKED,
    _step("it_is_asked_and_ended_before_the_provider_is_ready", pick=0, what="handed over"),
    _ASKED,
    _step("it_is_asked_and_ended_before_the_provider_is_ready", pick=0, what="no descriptors"),
    _ASKED,
    _step("something_happens_while_no_provider_serves", pick=0, what="init"),
    # Released.
    _step("some_consumer_ends_what_is_over", pick=0),
)
"""Every row of the provider's table, for an adapter that has every ability."""

_ASK: Final = _step("the_caller_asks")
_DONE: Final = _step("the_caller_is_done")
_GO: Final = _step("the_caller_goes")
_THROUGH: Final = _step("the_call_gets_through")
_UNREACHED: Final = _step("the_call_reaches_no_provider")
_LOST: Final = _step("the_provider_hangs_up")
_WAITED: Final = _step("it_has_waited_long_enough", pick=0)
_AGAIN: Final = (_WAITED, _THROUGH)


def _said(*answers: str) -> tuple[RuleCall, ...]:
    return tuple(
        _step(f"the_provider_{'responds' if what in RESPONSES else 'says'}", what=what)
        for what in answers
    )


def _served(*, is_able: bool) -> RuleCall:
    return _step("it_serves_itself", is_able=is_able)


_ASKING: Final = (_ASK, _THROUGH)
_TURNED_AWAY: Final = (*_ASKING, _WAITED)
"""On a deadline: the connection stays, and the end is told on it."""
_LATE: Final = _said("response", "response of another", "creation failed")


def _late(*steps: RuleCall) -> tuple[RuleCall, ...]:
    """Turn away, take some steps, and let whatever can still come, come."""
    last = ("not found", "ended")
    return tuple(
        step for what in last for step in (*_TURNED_AWAY, *steps, *_LATE, *_said(what), _GO)
    )


CONSUMER_TOUR: Final = (
    # Idle, connecting, asking.
    *(_ASK, _DONE, _GO),
    *(_ASK, _UNREACHED, _GO),
    *(*_ASKING, _DONE, _GO),
    *(*_ASKING, *_said("creation failed"), _GO),
    *(*_ASKING, *_said("not found"), _GO),
    *(*_ASKING, *_said("unavailable"), _GO),
    *(*_ASKING, *_said("passing failed"), _GO),
    *(*_ASKING, *_said("garbage"), _GO),
    *(*_ASKING, *_said("response of other kinds"), _GO),
    *(*_ASKING, _LOST, _GO),
    # Held.
    *(*_ASKING, *_said("response", "ended"), _GO),
    *(*_ASKING, *_said("response"), _LOST, _DONE, _GO),
    *(*_ASKING, *_said("response", "passing failed"), _GO),
    *(*_ASKING, *_said("response", "garbage"), _GO),
    *(*_ASKING, *_said("response"), _DONE, *_said("ended"), _GO),
    # Ending, and the notice.
    *(_step("the_caller_ends_what_it_does_not_hold"), _UNREACHED, *_AGAIN, *_LATE),
    *(*_said("unavailable"), *_AGAIN, *_said("passing failed"), *_AGAIN, *_said("garbage")),
    *(*_AGAIN, _LOST, *_AGAIN, _WAITED, *_AGAIN, *_said("not found"), _GO),
    # What comes after the consumer has turned away.
    *_late(),
    *_late(_served(is_able=True)),
    *_late(_served(is_able=False)),
    *_late(_served(is_able=True), _DONE),
)
"""Every row of the consumer's table and of the notice's."""


def take(machine: type[Any], steps: tuple[RuleCall, ...]) -> None:
    """Take some steps of a machine, and hold every one of them to its invariants."""
    it = machine()
    try:
        it.every_promise_is_kept()
        for rule, arguments in steps:
            getattr(it, rule)(**arguments)
            it.every_promise_is_kept()
    except BaseException:
        with suppress(Exception):  # what comes of it is not what was wrong
            it.teardown()
        raise
    it.teardown()
