"""Proof by induction with z3: each obligation is discharged, or has a counterexample.

Connections are an uninterpreted sort, so that nothing is said of how many there are. A
counterexample is a state, not necessarily a reachable one, in which all invariants hold, with
those connections that matter; and what happens in it.

z3 is imported here alone, and only when something is proved; the extra `proof` brings it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .relation import (
    ACTING,
    ANY,
    Declared,
    Invariant,
    Obligation,
    Relation,
    Transition,
    obligations,
    told,
)
from .terms import (
    Applied,
    Constant,
    Quantified,
    Sort,
    Term,
    Variable,
    all_of,
    parts_of,
)

EFFORT_MAX: Final = 20_000_000
"""How much z3 may do for one obligation, in its own unit, which no clock has a part in."""


@dataclass(frozen=True)
class Refuted:
    """An obligation that does not hold, with a counterexample."""

    obligation: Obligation
    before: dict[str, Any]
    """Values by variable; of one that each connection has, by connection."""
    inputs: dict[str, Any]
    """What else was so of what happened: on which connection, and how."""
    after: dict[str, Any]
    """The same variables as `before`, afterwards."""

    def __str__(self) -> str:
        transition = self.obligation.transition
        what = transition.name if transition else "in the beginning"
        inputs = ", ".join(f"{name} {value}" for name, value in self.inputs.items())
        lines = [f"before: {told(self.before)}", f"event:  {what}" + (inputs and f" ({inputs})")]
        lines.append(f"after:  {told(self.after)}")
        return "\n".join([f"{self.obligation.invariant} does not hold", *lines])


@dataclass
class Proof:
    """What became of all obligations."""

    discharged: int = 0
    """How many hold."""
    refuted: list[Refuted] = field(default_factory=list)
    undecided: list[Obligation] = field(default_factory=list)
    """Those of which z3 could not say with that effort."""

    @property
    def is_complete(self) -> bool:
        """Whether everything holds."""
        return not self.refuted and not self.undecided


class Prover:
    """
    Discharges obligations of a relation.

    Args:
        relation: what may happen.
        invariants: what is to be so before, and to be shown afterwards.
    """

    def __init__(self, relation: Relation, invariants: Iterable[Invariant]) -> None:
        import z3

        self._z3 = z3
        self.relation = relation
        self.invariants = tuple(invariants)
        self._context = z3.Context()
        name = f"{relation.table.name} state"
        names = [state.name for state in relation.table.states]
        _, members = z3.EnumSort(name, names, ctx=self._context)
        self._states = dict(zip(relation.table.states, members, strict=True))
        self._members = {str(member): state for state, member in self._states.items()}
        self._connection = z3.DeclareSort("connection", self._context)
        self._sorts = {
            Sort.TRUTH: z3.BoolSort(self._context),
            Sort.COUNT: z3.IntSort(self._context),
            Sort.STATE: members[0].sort(),
            Sort.ELEMENT: self._connection,
        }
        self._solver = z3.Solver(ctx=self._context)
        self._solver.set("rlimit", EFFORT_MAX)
        for invariant in self.invariants:
            self._solver.add(self._formula(invariant.term(relation.before())))

    def prove(self) -> Proof:
        """Discharge every obligation, those of one transition together where they all hold."""
        proof = Proof()
        for group in self._groups():
            if self._holds(group[0].transition, group):
                proof.discharged += len(group)
                continue
            for one in group:
                self.judge(one, proof)
        return proof

    def judge(self, obligation: Obligation, proof: Proof) -> None:
        """Discharge one obligation, or find out why it cannot be."""
        z3 = self._z3
        self._solver.push()
        try:
            self._suppose(obligation.transition, obligation.conditions, [obligation.claim])
            answer = self._solver.check()
            if answer == z3.unsat:
                proof.discharged += 1
            elif answer == z3.sat:
                proof.refuted.append(self._example(obligation, self._solver.model()))
            else:
                proof.undecided.append(obligation)
        finally:
            self._solver.pop()

    def are_consistent(self) -> bool:
        """Whether there is a state at all in which the invariants hold, with two connections."""
        z3 = self._z3
        self._solver.push()
        one, other = (z3.Const(name, self._connection) for name in ("one", "other"))
        self._solver.add(one != other)
        answer = self._solver.check()
        self._solver.pop()
        return bool(answer == z3.sat)

    def is_possible(self, transition: Transition) -> bool:
        """Whether a transition can be made from a state in which the invariants hold."""
        self._solver.push()
        for condition in transition.conditions:
            self._solver.add(self._formula(condition))
        answer = self._solver.check()
        self._solver.pop()
        return bool(answer == self._z3.sat)

    # --- What z3 is asked --------------------------------------------------------------------

    def _groups(self) -> Iterator[list[Obligation]]:
        group: list[Obligation] = []
        for one in obligations(self.relation, self.invariants):
            is_alike = group and (one.transition, one.conditions) == (
                group[0].transition,
                group[0].conditions,
            )
            if group and not is_alike:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _holds(self, transition: Transition | None, group: list[Obligation]) -> bool:
        self._solver.push()
        self._suppose(transition, group[0].conditions, [one.claim for one in group])
        answer = self._solver.check()
        self._solver.pop()
        return bool(answer == self._z3.unsat)

    def _suppose(
        self, transition: Transition | None, conditions: Iterable[Term], claims: Iterable[Term]
    ) -> None:
        for condition in conditions:
            self._solver.add(self._formula(condition))
        self._solver.add(self._z3.Not(self._formula(all_of(*claims))))

    def _formula(self, term: Term) -> Any:
        z3 = self._z3
        match term:
            case Constant(value=bool() as value):
                return z3.BoolVal(value, self._context)
            case Constant(value=int() as value):
                return z3.IntVal(value, self._context)
            case Constant(value=value):
                return self._states[value]
            case Variable(name=name, sort=sort, of=None):
                return z3.Const(name, self._sorts[sort])
            case Variable(name=name, sort=sort, of=Term() as of):
                return z3.Function(name, self._connection, self._sorts[sort])(self._formula(of))
            case Quantified(quantifier=quantifier, bound=bound, body=body):
                kind = z3.ForAll if quantifier == "all" else z3.Exists
                return kind([z3.Const(bound.name, self._connection)], self._formula(body))
            case Applied(operator=operator, arguments=arguments):
                return self._applied(operator, [self._formula(each) for each in arguments])
            case _:
                raise TypeError(f"no term: {term!r}")

    def _applied(self, operator: str, parts: list[Any]) -> Any:
        z3 = self._z3
        match operator:
            case "and":
                return z3.And(*parts)
            case "or":
                return z3.Or(*parts)
            case "not":
                return z3.Not(*parts)
            case "if":
                return z3.If(*parts)
            case "==":
                return parts[0] == parts[1]
            case "<":
                return parts[0] < parts[1]
            case "<=":
                return parts[0] <= parts[1]
            case "+":
                return parts[0] + parts[1]
            case "-":
                return parts[0] - parts[1]
            case _:
                raise ValueError(f"no operator: {operator!r}")

    # --- What z3 answers ---------------------------------------------------------------------

    def _example(self, obligation: Obligation, model: Any) -> Refuted:
        """Read the values off a model, for the connections that it needs."""
        universe = model.get_universe(self._connection) or []
        names = {element: f"connection {i}" for i, element in enumerate(universe, 1)}
        transition = obligation.transition
        if transition is None:
            before = after = self._values(self.relation.initially(), model, names)
            return Refuted(obligation, before, {}, after)
        before = self._values(self.relation.before(), model, names)
        after = self._values(self.relation.after(transition), model, names)
        inputs = {}
        for variable in sorted(_inputs(obligation), key=lambda each: each.name):
            value = model.eval(self._formula(variable), model_completion=True)
            inputs[variable.name] = names.get(value, self._plain(value))
        return Refuted(obligation, before, inputs, after if transition.is_made else before)

    def _values(self, now: Mapping[str, Any], model: Any, names: Mapping[Any, str]) -> Any:
        values: dict[str, Any] = {}
        for each in self.relation.variables:
            values[each.name] = self._value(each, now[each.name], model, names)
        return values

    def _value(self, declared: Declared, now: Any, model: Any, names: Mapping[Any, str]) -> Any:
        if not declared.is_of_each:
            return self._plain(model.eval(self._formula(now), model_completion=True))
        formula = self._formula(now(ANY))
        any_one = self._formula(ANY)
        own = {}
        for element, name in names.items():
            value = self._z3.substitute(formula, (any_one, element))
            own[name] = self._plain(model.eval(value, model_completion=True))
        return own

    def _plain(self, value: Any) -> Any:
        z3 = self._z3
        if z3.is_int_value(value):
            return value.as_long()
        if z3.is_true(value) or z3.is_false(value):
            return z3.is_true(value)
        return self._members.get(str(value), str(value))


def _inputs(obligation: Obligation) -> set[Variable]:
    """List what an obligation's transition depends on besides the variables."""
    transition = obligation.transition
    terms = [] if transition is None else [term for _, term in transition.after]
    found: set[Variable] = set()
    frontier: list[Term] = [*terms, *obligation.conditions]
    while frontier:
        term = frontier.pop()
        frontier += parts_of(term)
        if isinstance(term, Variable) and (term == ACTING or term.name.startswith("is_it_")):
            found.add(term)
    return found
