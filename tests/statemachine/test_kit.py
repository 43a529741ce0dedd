"""The kit on a machine that is not ours, a turnstile: what is wrong in it is found, by a script."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest

from statemachine.effects import Effect
from statemachine.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from statemachine.events import Event, LocalEvent, PeerEvent
from statemachine.lifecycle import CONSUMER, NOTICE
from statemachine.table import Row, Table, compile_table
from statemachine.testing import kit
from statemachine.testing.kit import (
    Difference,
    KernelTrial,
    Mutant,
    Reached,
    Reference,
    RowKey,
    TableHomes,
    ViolatingPath,
    all_rows,
    edited,
    mutants,
    row_key,
    try_mutants,
)
from statemachine.testing.lockstep import consumer_trial
from statemachine.testing.tables import HOMES


class CoinInserted(PeerEvent): ...


class Pushed(PeerEvent): ...


class Jammed(LocalEvent): ...


class Unlock(Effect): ...


class Lock(Effect): ...


class GiveBack(Effect): ...


class TurnstileState(Enum):
    LOCKED = "locked"
    OPEN = "open"
    BROKEN = "broken"


LOCKED, OPEN, BROKEN = TurnstileState

TURNSTILE = compile_table(
    "turnstile",
    [
        Row(CoinInserted, LOCKED, OPEN, (Unlock,)),
        Row(CoinInserted, OPEN, OPEN, (GiveBack,)),
        Row(CoinInserted, BROKEN, BROKEN, (GiveBack,)),
        Row(Pushed, OPEN, LOCKED, (Lock,)),
        Row(Jammed, LOCKED, BROKEN),
        Row(Jammed, OPEN, BROKEN, (Lock,)),
    ],
    initial=LOCKED,
    finals=[BROKEN],
)


class Turnstile:
    """Moves by its table, and knows whether the bolt is drawn."""

    table: ClassVar[Any] = TURNSTILE
    subject = "the turnstile"

    def __init__(self) -> None:
        self.state = LOCKED
        self.is_unlocked = False

    def receive(self, event: Any) -> tuple[Effect, ...]:
        orders = self.table.fire(self, type(event))
        if Unlock in orders or Lock in orders:
            self.is_unlocked = Unlock in orders
        return tuple(order() for order in orders)

    def snapshot(self) -> object:
        return self.state, self.is_unlocked


TURNSTILE_HOMES = TableHomes({"turnstile": (Turnstile, "table")})
TURNSTILE_EVENTS = [CoinInserted(), Pushed(), Jammed()]
TRIAL: KernelTrial[Any] = KernelTrial(
    Turnstile,
    TURNSTILE_EVENTS,
    {"unlocked while open": lambda kernel: kernel.is_unlocked == (kernel.state is OPEN)},
    homes=TURNSTILE_HOMES,
)


def turnstile_model(state: str, event: Event) -> tuple[str, list[Effect]]:
    match state, event:
        case "paid", CoinInserted():
            return "paid", [GiveBack()]
        case "jammed", CoinInserted():
            return "jammed", [GiveBack()]
        case "", CoinInserted():
            return "paid", [Unlock()]
        case "paid", Pushed():
            return "", [Lock()]
        case "paid", Jammed():
            return "jammed", [Lock()]
        case "", Jammed():
            return "jammed", []
    raise Unheard("peer's" if isinstance(event, PeerEvent) else "ours")


class Unheard(Exception):
    def __init__(self, whose: str) -> None:
        self.whose = whose


MODEL: Reference[str] = Reference(turnstile_model, Unheard, initial="")
BESIDE = replace(TRIAL, reference=MODEL)


def with_row(event: type[Event], state: TurnstileState, **changes: Any) -> Table:
    row = TURNSTILE.row(event, state)
    assert row is not None
    return edited(TURNSTILE, event, state, replace(row, **changes))


def running(table: Table) -> AbstractContextManager[None]:
    return TURNSTILE_HOMES.replaced(table)


def violation(trial: KernelTrial[Any]) -> ViolatingPath:
    with pytest.raises(ViolatingPath) as caught:
        trial.explore()
    return caught.value


# --- Every event in every snapshot -------------------------------------------------------------


def test_basic_every_event_is_put_in_every_snapshot() -> None:
    found = TRIAL.explore()
    assert (found.snapshots, found.steps, found.refused) == (3, 9, 3)
    assert found.is_complete
    assert found.rows == all_rows(TURNSTILE)
    assert found.missing(TURNSTILE) == []


def test_a_broken_invariant_is_found_by_a_shortest_script() -> None:
    with running(with_row(Jammed, OPEN, effects=())):
        path = violation(TRIAL)
        assert path.script == (CoinInserted(), Jammed())
        assert str(path) == "unlocked while open does not hold, after\nCoinInserted()\nJammed()"
        with pytest.raises(ViolatingPath) as again:
            TRIAL.replay(path.script)
        assert again.value.script == path.script
    assert TRIAL.replay(path.script).state is BROKEN


def test_what_is_broken_in_the_beginning_needs_no_script() -> None:
    path = violation(replace(TRIAL, invariants={"open": lambda kernel: kernel.state is OPEN}))
    assert (path.script, path.finding) == ((), "open does not hold")


def test_a_kernel_that_fails_is_found_by_a_script() -> None:
    class Failing(Turnstile):
        def receive(self, event: Any) -> tuple[Effect, ...]:
            return {OPEN: (), LOCKED: super().receive(event)}[self.state]

    assert violation(replace(TRIAL, make=Failing)).finding.startswith("KeyError")


def test_an_event_that_is_refused_changes_nothing() -> None:
    assert "changed something" in violation(replace(TRIAL, make=Hasty)).finding


def test_a_kernel_without_a_snapshot_is_known_by_what_it_consists_of() -> None:
    class Opaque:
        def __init__(self) -> None:
            self._inner = Turnstile()

        def receive(self, event: Any) -> tuple[Effect, ...]:
            return self._inner.receive(event)

    found = KernelTrial(Opaque, TURNSTILE_EVENTS).explore()
    assert (found.snapshots, found.steps, found.refused) == (3, 9, 3)
    assert found.rows == set()  # without homes nothing is known of them


def test_events_may_depend_on_the_kernel() -> None:
    def possible(kernel: Turnstile) -> Iterator[Event]:
        yield from (e for e in TURNSTILE_EVENTS if TURNSTILE.row(type(e), kernel.state))

    found = replace(TRIAL, events=possible).explore()
    assert (found.steps, found.refused) == (6, 0)


def test_a_search_with_a_bound_goes_through_what_it_has_found() -> None:
    found = TRIAL.explore(snapshots_max=2)
    assert (found.snapshots, found.steps, found.is_complete) == (2, 6, False)


def test_what_was_reached_is_numbered_in_the_order_of_its_distance() -> None:
    reached: Reached[int, str] = Reached()
    reached.arrive(7)
    for number in reached.in_order():
        node = reached.nodes[number]
        for move, after in (("half", node // 2), ("less", node - 1)):
            reached.arrive(max(after, 0), number, move)
    assert reached.nodes == [7, 3, 6, 1, 2, 5, 0, 4]
    assert reached.script_of(reached.number_of(0)) == ("half", "half", "half")
    assert len(reached) == 8
    assert reached.violation(reached.number_of(5), "five", "x").script == ("less", "less", "x")
    with pytest.raises(KeyError):
        reached.number_of(8)


def test_a_violating_path_can_be_copied() -> None:
    path = copy.copy(ViolatingPath((Pushed(),), [], "so"))
    assert (str(path), path.script) == ("so, after\nPushed()", (Pushed(),))


# --- Tours -------------------------------------------------------------------------------------


def rows_of(trial: KernelTrial[Any], script: tuple[Event, ...]) -> list[RowKey]:
    taken: list[RowKey] = []
    assert trial.homes is not None
    with trial.homes.watched(lambda *row: taken.append(row_key(*row))):
        trial.replay(script)
    return taken


def test_a_tour_takes_every_row_by_shortest_scripts() -> None:
    found = TRIAL.explore()
    tour = found.tour()
    assert {row for script in tour for row in rows_of(TRIAL, script)} == all_rows(TURNSTILE)
    assert all(rows_of(TRIAL, found.script_to(row))[-1] == row for row in found.rows)
    lengths = sorted(len(found.script_to(row)) for row in found.rows)
    assert lengths == [1, 1, 2, 2, 2, 2]
    assert len(tour) == 4  # both scripts of one event are the beginnings of others


def test_a_row_that_cannot_be_taken_is_missing_in_the_tour() -> None:
    found = replace(TRIAL, events=TURNSTILE_EVENTS[:2]).explore()
    assert {row[1] for row in found.missing(TURNSTILE)} == {"Jammed", "CoinInserted"}
    assert len(found.missing(TURNSTILE)) == 3


def test_the_tour_of_our_consumer_takes_every_row_of_its_tables() -> None:
    trial = consumer_trial()
    found = trial.explore()
    assert found.missing(CONSUMER, NOTICE) == []
    scripts = found.tour()
    rows = {row for script in scripts for row in rows_of(trial, script)}
    assert rows == all_rows(CONSUMER, NOTICE)


# --- In lock-step ------------------------------------------------------------------------------


def test_basic_a_kernel_agrees_with_its_model() -> None:
    assert BESIDE.explore().steps == 9
    assert BESIDE.explore().snapshots == 3


def refusing(error: type[ProtocolError]) -> type[Turnstile]:
    class Refusing(Turnstile):
        def receive(self, event: Any) -> tuple[Effect, ...]:
            if isinstance(event, Pushed) and self.state is LOCKED:
                raise error(event, "locked", "the turnstile")
            return super().receive(event)

    return Refusing


class Hasty(Turnstile):
    """Has changed something when it refuses."""

    def receive(self, event: Any) -> tuple[Effect, ...]:
        try:
            return super().receive(event)
        except ProtocolError:
            self.state = BROKEN
            raise


class Sticking(Turnstile):
    """Refuses what can be."""

    def receive(self, event: Any) -> tuple[Effect, ...]:
        if isinstance(event, Jammed):
            raise LocalProtocolError(event, "any", "the turnstile")
        return super().receive(event)


class Generous(Turnstile):
    """Takes what cannot be."""

    def receive(self, event: Any) -> tuple[Effect, ...]:
        is_pushed = isinstance(event, Pushed) and self.state is LOCKED
        return () if is_pushed else super().receive(event)


class Taciturn(Turnstile):
    """Does what it should, and does not say so."""

    def receive(self, event: Any) -> tuple[Effect, ...]:
        super().receive(event)
        return ()


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (refusing(LocalProtocolError), "or is peer's"),
        (Hasty, "changed something"),
        (Sticking, "the kernel does not take Jammed()"),
        (Generous, "which cannot be"),
        (Taciturn, "the kernel asks for [], the model for [Unlock()]"),
    ],
    ids=["whose fault", "changes", "refuses", "takes", "effects"],
)
def test_a_difference_is_found_by_a_script(kernel: type[Turnstile], says: str) -> None:
    path = violation(replace(BESIDE, make=kernel))
    assert says in path.finding
    assert len(path.script) == 1
    assert isinstance(path.__cause__, Difference)


def test_the_fault_is_compared_only_if_the_model_names_it() -> None:
    def anonymous(state: str, event: Event) -> tuple[str, list[Effect]]:
        try:
            return turnstile_model(state, event)
        except Unheard:
            raise LookupError from None

    trial = replace(BESIDE, reference=replace(MODEL, step=anonymous, impossible=LookupError))
    assert replace(trial, make=refusing(LocalProtocolError)).explore().is_complete
    assert replace(trial, make=refusing(RemoteProtocolError)).explore().is_complete


def test_what_a_kernel_may_take_though_it_cannot_be_leaves_it_as_it_was() -> None:
    lax = replace(MODEL, is_lax=lambda state, event: isinstance(event, Pushed))
    found = replace(BESIDE, make=Generous, reference=lax).explore()
    assert found.snapshots == 3


def test_states_are_compared_as_well() -> None:
    def other_states(kernel: Turnstile, state: str) -> list[str]:
        return ["it is open"] if kernel.state is OPEN and state == "paid" else []

    reference = replace(MODEL, other_states=other_states)
    assert "it is open" in violation(replace(BESIDE, reference=reference)).finding


# --- Mutants -----------------------------------------------------------------------------------


def test_basic_the_model_notices_every_mutant_and_invariants_do_not() -> None:
    beside = try_mutants(TURNSTILE, TURNSTILE_HOMES, BESIDE.explore)
    alone = try_mutants(TURNSTILE, TURNSTILE_HOMES, TRIAL.explore)
    assert beside.survivors == []
    assert beside.total == alone.total == len(list(mutants(TURNSTILE)))
    assert "drop an effect: CoinInserted in broken without GiveBack" in map(str, alone.survivors)
    assert beside.counts.total() == beside.total
    killer = alone.killers["drop an effect: Pushed in open without Lock"]
    assert killer == "ViolatingPath: unlocked while open does not hold"
    assert alone.counts.total() == len(alone.killers)


def test_a_mutant_that_is_no_sound_table_is_killed_by_that() -> None:
    killers = try_mutants(TURNSTILE, TURNSTILE_HOMES, lambda: None).killers
    assert killers["redirect a row: CoinInserted in locked to locked"].startswith("unsound: ")
    assert killers.keys() < {str(mutant) for mutant in mutants(TURNSTILE)}


def test_a_check_that_fails_without_a_mutant_tells_nothing() -> None:
    with running(with_row(Jammed, OPEN, effects=())), pytest.raises(ViolatingPath):
        try_mutants(TURNSTILE, TURNSTILE_HOMES, TRIAL.explore)


def test_a_mutant_says_what_is_more_in_it() -> None:
    added: list[Mutant] = [m for m in mutants(TURNSTILE) if m.edit == "add an effect"]
    assert added != []
    assert all(str(m).endswith(f"with {m.surplus.__name__} as well") for m in added)  # type: ignore[union-attr]
    others = [m for m in mutants(TURNSTILE) if m.edit == "redirect a row"]
    assert {m.surplus for m in others} == {None}


# --- Where the tables are ----------------------------------------------------------------------


def test_a_table_is_back_in_its_home_also_after_a_failure() -> None:
    other = with_row(Jammed, OPEN, effects=())

    def fail() -> None:
        with TURNSTILE_HOMES.replaced(other):
            assert Turnstile.table is other
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Turnstile.table is TURNSTILE
    assert TURNSTILE_HOMES.running("turnstile") is TURNSTILE


def test_rows_and_lookups_are_told_apart() -> None:
    taken: list[RowKey] = []
    asked: list[RowKey] = []
    with TURNSTILE_HOMES.watched(
        lambda *row: taken.append(row_key(*row)), lambda *row: asked.append(row_key(*row))
    ):
        kernel = Turnstile()
        with pytest.raises(RemoteProtocolError):
            kernel.receive(Pushed())
        kernel.receive(CoinInserted())
        kernel.table.row(Jammed, OPEN)
    assert taken == [("turnstile", "CoinInserted", "locked")]
    assert [event for _, event, _ in asked] == ["Pushed", "CoinInserted", "Jammed"]


def test_every_table_of_ours_is_watched_where_the_kernels_look() -> None:
    before = {name: HOMES.running(name) for name in ("allocation", "consumer", "notice")}
    with HOMES.watched(lambda *row: None):
        assert all(HOMES.running(name) is not table for name, table in before.items())
    assert all(HOMES.running(name) is table for name, table in before.items())


def test_the_kit_knows_nothing_of_this_protocol() -> None:
    general = r"\.\.\.(effects|errors|events|table)\b|\.\w+"
    for path in sorted(Path(kit.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert re.fullmatch(general, "." * node.level + (node.module or "")), path
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"specs", "transport", "linux"} & {n.split(".")[0] for n in names if n}
