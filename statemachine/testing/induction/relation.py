"""Transition relation of a table: what each row does to variables, as terms.

A row says which state follows and what is asked for. What its orders do to the variables around it
is declared once, as a function of an `Execution`; so is what happens outside of the table, an
*occurrence*: a message arrives, a connection is lost. `Relation.transitions` executes the
occurrences symbolically. Where one depends on what is so, there is a transition for each case, and
a transition has the condition under which it is made and a term for the value of each variable
after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Final

from ...effects import Order, Timer, Timing, order_name
from ...events import Event
from ...table import Table
from .terms import (
    FALSE,
    TRUE,
    Constant,
    Evaluated,
    Sort,
    Term,
    Variable,
    all_of,
    as_term,
    choice,
    compiled,
    names_in,
    replaced_in,
)

STATE: Final = "state"
"""The variable that a table moves."""
ACTING: Final = Variable("acting", Sort.ELEMENT)
"""The connection on which something happens, if it happens on one."""
ANY: Final = Variable("any", Sort.ELEMENT)
"""Stands for each connection in the terms of a transition."""


@dataclass(frozen=True)
class Declared:
    """A variable: its name, what its values are, and whether each connection has its own."""

    name: str
    sort: Sort = Sort.TRUTH
    is_of_each: bool = False
    is_ghost: bool = False
    """Whether it is only of use in proofs: no program has it."""

    @property
    def initial(self) -> Term:
        return Constant(0 if self.sort is Sort.COUNT else False)


class View:
    """The variables at one moment, as attributes: a term, or a function of a connection."""

    def __init__(self, now: Mapping[str, Any]) -> None:
        self._now = now

    def __getattr__(self, name: str) -> Any:
        try:
            return self._now[name]
        except KeyError:
            raise AttributeError(f"no variable {name!r} is declared") from None


class _NeedsChoice(Exception):
    """A step depends on something that was not decided yet; one of so many cases."""


class _NoSuchStep(Exception):
    """In this case nothing happens."""


class Execution:
    """One occurrence, while it is executed symbolically: variables change as terms."""

    def __init__(self, relation: Relation, decisions: list[int]) -> None:
        self.relation = relation
        self.conditions: list[Term] = []
        """What must be so for this case."""
        self.insisted: list[tuple[tuple[Term, ...], Term, str]] = []
        """What has to be true on the way: conditions so far, what, and why."""
        self.rows: list[tuple[type[Event], Enum]] = []
        """Rows that were taken."""
        self.now: dict[str, Any] = relation.before()
        self._decisions = decisions
        self._used = 0
        self.cases: list[int] = []
        """How many cases there were at each decision."""

    @property
    def v(self) -> View:
        """The variables as they are now."""
        return View(self.now)

    def put(self, name: str, value: Term | Enum | int) -> None:
        """Change a variable."""
        self.now[name] = as_term(value)

    def put_each(self, name: str, value: Callable[[Term], Term | int]) -> None:
        """Change a variable for every connection at once."""
        self.now[name] = lambda c: as_term(value(c))

    def put_of(self, name: str, connection: Term, value: Term | int) -> None:
        """Change a variable for one connection."""
        before = self.now[name]
        self.put_each(name, lambda c: choice(c.equals(connection), value, before(c)))

    def require(self, condition: Term) -> None:
        """Say that this happens only if something is so."""
        if condition == FALSE:
            raise _NoSuchStep
        if condition != TRUE:
            self.conditions.append(condition)

    def insist(self, claim: Term, why: str) -> None:
        """Say that something must be so by now: one more obligation."""
        if claim != TRUE:
            self.insisted.append((tuple(self.conditions), claim, why))

    def decide(self, condition: Term) -> bool:
        """Ask whether something is so; there will be a transition for either case."""
        if isinstance(condition, Constant):
            return bool(condition.value)
        return self._choose((condition, ~condition)) == 0

    def state(self) -> Enum:
        """Ask in which state the model is; there will be a transition for each."""
        now = self.now[STATE]
        if isinstance(now, Constant):
            known: Enum = now.value
            return known
        states = self.relation.table.states
        chosen = states[self._choose(tuple(now.equals(state) for state in states))]
        self.put(STATE, chosen)
        return chosen

    def fire(self, event: type[Event], *, is_refusable: bool = False) -> None:
        """
        Take the row of the table for an event, and carry out its orders.

        Without a row nothing happens, if `is_refusable`; else there has to be one.
        """
        state = self.state()
        row = self.relation.table.row(event, state)
        if row is None:
            if not is_refusable:
                name = self.relation.table.name
                why = f"{name}: {event.__name__} has no row in {state.value}"
                self.insist(FALSE, why)
            raise _NoSuchStep
        if len(self.rows) > len(self.relation.table.rows):
            self.insist(FALSE, f"{self.relation.table.name}: one row leads to the next for ever")
            raise _NoSuchStep
        self.rows.append((event, state))
        self.put(STATE, row.target)
        for order in row.effects:
            self.obey(order)

    def obey(self, order: Order) -> None:
        """Carry out an order of a row."""
        if isinstance(order, Timing):
            self.put(self.relation.timers[order.timer], Constant(order.starts))
        else:
            self.relation.orders[order](self)

    def _choose(self, cases: tuple[Term, ...]) -> int:
        self.cases.append(len(cases))
        if self._used == len(self._decisions):
            self._decisions.append(0)
        taken = self._decisions[self._used]
        self._used += 1
        self.conditions.append(cases[taken])
        return taken


Happening = Callable[[Execution], None]
"""Says what an order or an occurrence does."""


def occurrences_of(table: Table) -> dict[str, Happening]:
    """Say that each event of a table may happen at any time, and is refused where it has no row."""

    def happening(event: type[Event]) -> Happening:
        return lambda step: step.fire(event, is_refusable=True)

    return {event.__name__: happening(event) for event in table.events}


@dataclass(frozen=True)
class Transition:
    """One case of an occurrence: when it is made, and what is so afterwards."""

    occurrence: str
    rows: tuple[tuple[type[Event], Enum], ...]
    """The rows that it takes, in order."""
    conditions: tuple[Term, ...]
    insisted: tuple[tuple[tuple[Term, ...], Term, str], ...]
    after: tuple[tuple[str, Term], ...]
    """The variables that may change; of those that each connection has, for `ANY` connection."""
    is_made: bool = True
    """False: something is insisted on that ends it; there is no state after it."""

    @property
    def name(self) -> str:
        """Name it by the rows that it takes."""
        rows = ", ".join(f"{event.__name__} in {state.value}" for event, state in self.rows)
        return f"{self.occurrence}: {rows}" if rows else self.occurrence

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.after)

    @cached_property
    def applies(self) -> Evaluated:
        """Evaluate whether it is made from plain values."""
        return compiled(all_of(*self.conditions))

    @cached_property
    def values(self) -> dict[str, Evaluated]:
        """Evaluate each variable after it; the connection is the value `any`."""
        return {name: compiled(term) for name, term in self.after}


class Relation:
    """
    What a table and what is declared around it allow.

    Args:
        table: any table of `compile_table`.
        variables: what there is besides the state.
        orders: what each order of a row does to the variables.
        occurrences: what may happen, by name; each takes rows of the table, or none.
        timers: which variable says that a timer runs.
    """

    def __init__(
        self,
        table: Table,
        variables: Iterable[Declared],
        *,
        orders: Mapping[Order, Happening],
        occurrences: Mapping[str, Happening],
        timers: Mapping[Timer, str] | None = None,
    ) -> None:
        self.table = table
        self.variables = (Declared(STATE, Sort.STATE), *variables)
        self.orders = dict(orders)
        self.occurrences = dict(occurrences)
        self.timers = dict(timers or {})
        asked = {order for row in table.rows for order in row.effects}
        for order in asked:
            known = order.timer in self.timers if isinstance(order, Timing) else order in orders
            if not known:
                raise ValueError(f"{table.name}: it is not declared what {order_name(order)} does")

    def before(self) -> dict[str, Any]:
        """Make the variables as they are before a step."""
        return {each.name: _unknown(each) for each in self.variables}

    def initially(self) -> dict[str, Any]:
        """Make the variables as they are in the beginning."""
        made: dict[str, Any] = {}
        for each in self.variables:
            value = each.initial if each.name != STATE else Constant(self.table.initial)
            made[each.name] = _constantly(value) if each.is_of_each else value
        return made

    @cached_property
    def transitions(self) -> tuple[Transition, ...]:
        """Every case of every occurrence."""
        return tuple(
            transition
            for name, happening in self.occurrences.items()
            for transition in self._cases(name, happening)
        )

    def after(self, transition: Transition) -> dict[str, Any]:
        """Make the variables as they are after a transition."""
        now = self.before()
        by_name = {each.name: each for each in self.variables}
        for name, term in transition.after:
            if by_name[name].is_of_each:
                now[name] = lambda c, term=term: replaced_in(term, {ANY: c})
            else:
                now[name] = term
        return now

    def _cases(self, name: str, happening: Happening) -> Iterator[Transition]:
        """Execute an occurrence again and again, until every decision has had every case."""
        decisions: list[int] = []
        while True:
            step = Execution(self, decisions)
            is_made = True
            try:
                happening(step)
            except _NoSuchStep:
                is_made = False
            if is_made or step.insisted:
                yield self._transition(name, step, is_made)
            while decisions and decisions[-1] + 1 == step.cases[len(decisions) - 1]:
                decisions.pop()
            if not decisions:
                return
            decisions[-1] += 1

    def _transition(self, name: str, step: Execution, is_made: bool) -> Transition:
        before, after = self.before(), []
        for each in self.variables if is_made else ():
            old, new = before[each.name], step.now[each.name]
            if each.is_of_each:
                old, new = old(ANY), new(ANY)
            if new != old:
                after.append((each.name, new))
        return Transition(
            name,
            tuple(step.rows),
            tuple(step.conditions),
            tuple(step.insisted),
            tuple(after),
            is_made,
        )


def _unknown(variable: Declared) -> Any:
    if variable.is_of_each:
        return lambda c: Variable(variable.name, variable.sort, c)
    return Variable(variable.name, variable.sort)


def _constantly(value: Term) -> Callable[[Term], Term]:
    return lambda c: value


@dataclass(frozen=True)
class Invariant:
    """What is so at every moment: a name, a sentence, and the formula that both mean."""

    name: str
    says: str
    formula: Callable[[View], Term]
    clauses: tuple[str, ...] = ()
    """Which clauses of the book it is about."""

    def term(self, now: Mapping[str, Any]) -> Term:
        """Say it of the variables at one moment."""
        return self.formula(View(now))

    def names(self, relation: Relation) -> set[str]:
        """List the variables that it is about."""
        return names_in(self.term(relation.before()))


@dataclass(frozen=True)
class Obligation:
    """What has to be shown: of the beginning, or of a transition."""

    invariant: str
    """The invariant that must hold afterwards; or why it is insisted on."""
    transition: Transition | None
    conditions: tuple[Term, ...]
    claim: Term


def obligations(relation: Relation, invariants: Iterable[Invariant]) -> Iterator[Obligation]:
    """List all that makes invariants inductive, and every step defined."""
    listed = tuple(invariants)
    initially = relation.initially()
    for invariant in listed:
        yield Obligation(invariant.name, None, (), invariant.term(initially))
    for transition in relation.transitions:
        for conditions, claim, why in transition.insisted:
            yield Obligation(why, transition, conditions, claim)
        if transition.is_made:
            after = relation.after(transition)
            for invariant in listed:
                claim = invariant.term(after)
                yield Obligation(invariant.name, transition, transition.conditions, claim)


def told(values: Mapping[str, Any]) -> str:
    """Say values in a line: what is so or counted; then each connection, with the same of it."""
    said: list[str] = []
    connections: dict[Any, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            for connection, own in value.items():
                connections.setdefault(connection, []).extend(_told_one(name, own))
        else:
            said += _told_one(name, value)
    said += [
        f"{connection} ({', '.join(own) or 'nothing'})" for connection, own in connections.items()
    ]
    return "; ".join(said)


def _told_one(name: str, value: Any) -> list[str]:
    if isinstance(value, Enum):
        return [f"{name} {value.value}"]
    if isinstance(value, bool):
        return [name] if value else []
    return [f"{name} {value}"] if value else []
