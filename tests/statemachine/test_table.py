"""A table that is not sound is never run, and a sound one moves exactly what its rows say."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Final

import pytest
from transitions import Machine

from statemachine import effects as do
from statemachine.effects import Timer, start, stop
from statemachine.errors import LocalProtocolError, RemoteProtocolError
from statemachine.events import Event, LocalEvent, PeerEvent
from statemachine.lifecycle import TABLES
from statemachine.machine import TableMachine
from statemachine.table import Row, Table, UnsoundTable, check_vocabulary, compile_table


class Light(Enum):
    RED = "red"
    GREEN = "green"
    DARK = "dark"


class Elsewhere(Enum):
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Pressed(PeerEvent):
    """The other side did it."""


@dataclass(frozen=True, slots=True)
class Expired(LocalEvent):
    """Our own clock did it."""


@dataclass(frozen=True, slots=True)
class LampFailed(LocalEvent):
    """Our own lamp did it."""


@dataclass(frozen=True, slots=True)
class Orphan(Event):
    """Neither side did it."""


@dataclass(slots=True, weakref_slot=True)
class Lamp:
    state: Any = Light.RED
    subject: ClassVar[str] = "the lamp"


ROWS = (
    Row(Pressed, Light.RED, Light.GREEN, (do.Connect, start(Timer.ANSWER))),
    Row(Expired, Light.GREEN, Light.RED, (stop(Timer.ANSWER),)),
    Row(Pressed, Light.GREEN, Light.GREEN),
    Row(LampFailed, Light.GREEN, Light.DARK),
)


def lights() -> Table:
    return compile_table("lights", ROWS, initial=Light.RED, finals=(Light.DARK,))


def to_dark(event: type[Event], *orders: Any) -> Row:
    return Row(event, Light.RED, Light.DARK, orders)


def test_basic_a_row_moves_the_model_and_gives_its_effects() -> None:
    lamp = Lamp()
    effects = lights().fire(lamp, Pressed)
    assert lamp.state is Light.GREEN
    assert effects == (do.Connect, start(Timer.ANSWER))


def test_a_table_shows_its_rows_states_and_events() -> None:
    sound = lights()
    assert sound.states == (Light.RED, Light.GREEN, Light.DARK)
    assert sound.events == (Pressed, Expired, LampFailed)
    assert sound.row(Pressed, Light.RED) is ROWS[0]
    assert sound.row(LampFailed, Light.RED) is None
    assert sound.finals == {Light.DARK}
    assert sound.name == "lights"


def test_a_row_that_stays_is_no_error() -> None:
    lamp = Lamp(Light.GREEN)
    assert lights().fire(lamp, Pressed) == ()
    assert lamp.state is Light.GREEN


@pytest.mark.parametrize(
    ("event", "blame"), [(Pressed, RemoteProtocolError), (Expired, LocalProtocolError)]
)
def test_a_refusal_names_the_culprit_and_leaves_the_model_untouched(
    event: type[Event], blame: type[Exception]
) -> None:
    lamp = Lamp(Light.DARK)
    with pytest.raises(blame, match=f"{event.__name__} is not possible while the lamp is dark"):
        lights().fire(lamp, event)
    assert lamp.state is Light.DARK


def test_an_event_of_another_table_is_refused() -> None:
    lamp = Lamp()
    with pytest.raises(LocalProtocolError):
        lights().fire(lamp, Orphaned)
    assert lamp.state is Light.RED


@dataclass(frozen=True, slots=True)
class Orphaned(LocalEvent):
    """In no row."""


def test_slotted_models_that_are_registered_nowhere_are_moved_side_by_side() -> None:
    sound = lights()
    one, other = Lamp(), Lamp()
    assert one == other
    sound.fire(one, Pressed)
    assert (one.state, other.state) == (Light.GREEN, Light.RED)
    assert not hasattr(one, "__dict__")
    assert not hasattr(one, "trigger")


def test_a_table_keeps_no_reference_to_a_model() -> None:
    sound, lamp = lights(), Lamp()
    sound.fire(lamp, Pressed)
    watch = weakref.ref(lamp)
    del lamp
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("sound", TABLES, ids=lambda sound: sound.name)
def test_there_is_no_way_past_the_rows(sound: Table) -> None:
    machine = sound.machine(TableMachine)
    assert set(machine.events) == {event.__name__ for event in sound.events}
    assert machine.models == []
    assert machine.initial == sound.initial.name
    assert set(machine.states) == {state.name for state in sound.states}
    # A queue would be one for all models; a `to_<state>` would pass by the rows.
    assert machine.has_queue is False
    assert machine.auto_transitions is False
    for event in sound.events:
        rows = [row for row in sound.rows if row.event is event]
        moves = machine.get_transitions(event.__name__)
        assert {(move.source, move.dest) for move in moves} == {
            (row.source.name, row.target.name) for row in rows
        }
        assert not any(move.conditions or move.before or move.after for move in moves)


def test_a_stock_machine_moves_a_model_by_the_rows() -> None:
    class Bulb:
        """It has whatever `transitions` adds."""

    sound, bulb = lights(), Bulb()
    machine = sound.machine(model=bulb, send_event=True)
    assert type(machine) is Machine
    assert machine.models == [bulb]
    assert machine.send_event
    row = next(row for row in sound.rows if row.source is sound.initial)
    assert machine.get_model_state(bulb).value is row.source
    assert machine.events[row.event.__name__].trigger(bulb)
    assert machine.get_model_state(bulb).value is row.target
    with_more = sound.machine(model=None, auto_transitions=True)
    assert set(machine.events) != set(with_more.events)
    assert with_more.models == []


# --- What is not sound -------------------------------------------------------------------------


class Both(PeerEvent, LocalEvent):
    """Whose?"""


TO_GREEN: Final = Row(Pressed, Light.RED, Light.GREEN)
LOST_STATE: Final = (TO_GREEN, Row(Expired, Light.DARK, Light.GREEN))
DEAD_END: Final = (TO_GREEN, Row(Expired, Light.RED, Light.DARK))
NO_ORDER: Final = "is not an order"

UNSOUND: Final[dict[str, tuple[tuple[Row, ...], Enum, str]]] = {
    "two rows": (
        (*ROWS, Row(Pressed, Light.RED, Light.DARK)),
        Light.DARK,
        r"lights: two rows for Pressed in Light\.RED",
    ),
    "an equal row": ((*ROWS, replace(ROWS[0])), Light.DARK, "two rows for Pressed"),
    "the same row again": ((*ROWS, ROWS[0]), Light.DARK, "two rows for Pressed"),
    "no blame": ((*ROWS, to_dark(Orphan)), Light.DARK, "lights: Orphan is neither"),
    "two blames": ((*ROWS, to_dark(Both)), Light.DARK, "lights: Both is neither"),
    "a class": ((*ROWS, to_dark(LampFailed, Lamp)), Light.DARK, NO_ORDER),
    "a text": ((*ROWS, to_dark(LampFailed, "Connect")), Light.DARK, NO_ORDER),
    "an effect itself": ((*ROWS, to_dark(LampFailed, do.Connect())), Light.DARK, NO_ORDER),
    "never reached": (LOST_STATE, Light.GREEN, "lights: never reached: dark"),
    "no way to an end": (DEAD_END, Light.DARK, "lights: no way to an end from: green"),
    "a source of another enum": (
        (*ROWS, Row(LampFailed, Elsewhere.NOWHERE, Light.DARK)),
        Light.DARK,
        r"^lights: no state of this table: nowhere$",
    ),
    "a target of another enum": (
        (*ROWS, Row(LampFailed, Light.RED, Elsewhere.NOWHERE)),
        Light.DARK,
        r"^lights: no state of this table: nowhere$",
    ),
}


@pytest.mark.parametrize(("rows", "final", "named"), UNSOUND.values(), ids=UNSOUND)
def test_invalid_a_table_that_is_not_sound(rows: tuple[Row, ...], final: Enum, named: str) -> None:
    with pytest.raises(UnsoundTable, match=named):
        compile_table("lights", rows, initial=Light.RED, finals=(final,))


def test_invalid_a_table_without_an_end() -> None:
    with pytest.raises(UnsoundTable, match=r"no way to an end from: dark, green, red$"):
        compile_table("lights", ROWS, initial=Light.RED, finals=())


def test_invalid_an_event_that_no_table_uses() -> None:
    with pytest.raises(UnsoundTable, match=r"defined, but in no table: Orphaned$"):
        check_vocabulary([lights()], events=[Pressed, Orphaned], orders=[do.Connect])


def test_invalid_an_effect_that_no_table_asks_for() -> None:
    with pytest.raises(
        UnsoundTable, match=r"defined, but in no table: SendEnd, start claim timer$"
    ):
        check_vocabulary([lights()], events=[], orders=[do.SendEnd, start(Timer.CLAIM)])


def test_a_vocabulary_that_is_all_used_is_sound() -> None:
    orders: list[do.Order] = [do.Connect, start(Timer.ANSWER), stop(Timer.ANSWER)]
    check_vocabulary([lights()], events=[Pressed, Expired, LampFailed], orders=orders)


def test_every_timer_that_is_started_anywhere_is_one_of_the_timers() -> None:
    orders = [order for sound in TABLES for row in sound.rows for order in row.effects]
    started = {x.timer for x in orders if isinstance(x, do.Timing) and x.starts}
    # The readiness timer runs while messages are held: `HoldMessage` starts it with the first.
    assert started == set(Timer) - {Timer.READINESS}
