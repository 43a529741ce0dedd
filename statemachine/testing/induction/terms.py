"""Formulas over variables and connections: one source for z3 and for Python.

A term is built once, by functions of a `View`, and read in three ways: `python_of` makes Python
source of it that is evaluated on plain values, `proof` makes a formula for z3 of it, and `names_in`
says which variables it is about.

A variable has one value, or one for each element of one unbounded set. Here the elements are called
connections, which is what they are for a provider; for another table they may be anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final


class Sort(Enum):
    """What a variable's values are."""

    TRUTH = "truth"
    COUNT = "count"
    STATE = "state"
    ELEMENT = "element"


class Term:
    """A formula, a count, a state or a connection."""

    def __and__(self, other: Term) -> Term:
        return all_of(self, other)

    def __or__(self, other: Term) -> Term:
        return any_of(self, other)

    def __invert__(self) -> Term:
        return negated(self)

    def __add__(self, other: Term | int) -> Term:
        return Applied("+", (self, as_term(other)))

    def __sub__(self, other: Term | int) -> Term:
        return Applied("-", (self, as_term(other)))

    def __gt__(self, other: Term | int) -> Term:
        return Applied("<", (as_term(other), self))

    def __ge__(self, other: Term | int) -> Term:
        return Applied("<=", (as_term(other), self))

    def __le__(self, other: Term | int) -> Term:
        return Applied("<=", (self, as_term(other)))

    def implies(self, other: Term) -> Term:
        return any_of(negated(self), other)

    def equals(self, other: Term | Enum | int) -> Term:
        """Say that two counts, states, connections or formulas are the same."""
        right = as_term(other)
        if isinstance(self, Constant) and isinstance(right, Constant):
            return Constant(self.value == right.value)
        return TRUE if self == right else Applied("==", (self, right))

    def among(self, *states: Enum) -> Term:
        """Say that it is one of some states."""
        return any_of(*(self.equals(state) for state in states))


@dataclass(frozen=True)
class Constant(Term):
    """A plain value."""

    value: Any


@dataclass(frozen=True)
class Variable(Term):
    """The value of a variable, `of` one connection if each has its own; or a connection."""

    name: str
    sort: Sort
    of: Term | None = None


@dataclass(frozen=True)
class Applied(Term):
    """An operator and what it is applied to."""

    operator: str
    arguments: tuple[Term, ...]


@dataclass(frozen=True)
class Quantified(Term):
    """`all` or `any` over connections."""

    quantifier: str
    bound: Variable
    body: Term


TRUE: Final = Constant(True)
FALSE: Final = Constant(False)


def as_term(value: Term | Enum | int) -> Term:
    return value if isinstance(value, Term) else Constant(value)


def negated(term: Term) -> Term:
    if isinstance(term, Constant):
        return Constant(not term.value)
    if isinstance(term, Applied) and term.operator == "not":
        return term.arguments[0]
    return Applied("not", (term,))


def all_of(*terms: Term) -> Term:
    return _joined("and", terms, unit=TRUE, zero=FALSE)


def any_of(*terms: Term) -> Term:
    return _joined("or", terms, unit=FALSE, zero=TRUE)


def _joined(operator: str, terms: Iterable[Term], *, unit: Term, zero: Term) -> Term:
    kept: list[Term] = []
    for term in terms:
        is_same = isinstance(term, Applied) and term.operator == operator
        parts = term.arguments if is_same and isinstance(term, Applied) else (term,)
        kept += [part for part in parts if part != unit and part not in kept]
    if zero in kept:
        return zero
    return Applied(operator, tuple(kept)) if len(kept) > 1 else kept[0] if kept else unit


def choice(condition: Term, then: Term | int, otherwise: Term | int) -> Term:
    """Make the term that is one of two, by a condition."""
    yes, no = as_term(then), as_term(otherwise)
    if isinstance(condition, Constant):
        return yes if condition.value else no
    return yes if yes == no else Applied("if", (condition, yes, no))


# --- Quantifiers -------------------------------------------------------------------------------

_fresh = itertools.count()


def every(body: Callable[[Term], Term]) -> Term:
    """Say something of every connection, however many there are."""
    return _quantified("all", body)


def some(body: Callable[[Term], Term]) -> Term:
    """Say something of at least one connection."""
    return _quantified("any", body)


def _quantified(quantifier: str, make: Callable[[Term], Term]) -> Term:
    placeholder = Variable(f"?{next(_fresh)}", Sort.ELEMENT)
    body = make(placeholder)
    if isinstance(body, Constant):
        return body
    # Named by what is bound within it, so that equal formulas are equal and none binds another's.
    bound = Variable(f"c{1 + _depth(body)}", Sort.ELEMENT)
    return Quantified(quantifier, bound, replaced_in(body, {placeholder: bound}))


def _depth(term: Term) -> int:
    inner = max(map(_depth, parts_of(term)), default=0)
    return inner + 1 if isinstance(term, Quantified) else inner


def parts_of(term: Term) -> tuple[Term, ...]:
    match term:
        case Applied(arguments=arguments):
            return arguments
        case Quantified(body=body):
            return (body,)
        case Variable(of=Term() as of):
            return (of,)
        case _:
            return ()


def replaced_in(term: Term, new: Mapping[Term, Term]) -> Term:
    """Put other terms in the place of variables."""
    if term in new:
        return new[term]
    match term:
        case Applied(operator=operator, arguments=arguments):
            return Applied(operator, tuple(replaced_in(each, new) for each in arguments))
        case Quantified(quantifier=quantifier, bound=bound, body=body):
            return Quantified(quantifier, bound, replaced_in(body, new))
        case Variable(name=name, sort=sort, of=Term() as of):
            return Variable(name, sort, replaced_in(of, new))
        case _:
            return term


def names_in(term: Term) -> set[str]:
    """List the variables that a term is about; connections are none."""
    own = {term.name} if isinstance(term, Variable) and term.sort is not Sort.ELEMENT else set()
    return own.union(*map(names_in, parts_of(term)))


# --- In Python ---------------------------------------------------------------------------------

Values = Mapping[str, Any]
"""Plain values by the names of variables; of one that each connection has, a mapping from these."""

Evaluated = Callable[[Values, Iterable[Hashable]], Any]
"""A term as a function of values, and of the connections that there are."""

_OPERATORS: Final = {"not": "(not {})", "if": "({1} if {0} else {2})"}


def compiled(term: Term) -> Evaluated:
    """Compile a term to a function that evaluates it on plain values."""
    constants: list[Any] = []
    source = f"lambda v, connections: {_python_of(term, constants)}"
    made: Evaluated = eval(source, {"k": constants})
    return made


def _python_of(term: Term, constants: list[Any]) -> str:
    match term:
        case Constant(value=value):
            if isinstance(value, bool | int):
                return repr(value)
            constants.append(value)
            return f"k[{len(constants) - 1}]"
        case Variable(name=name, sort=Sort.ELEMENT):
            return name if name[0] == "c" and name[1:].isdigit() else f"v[{name!r}]"
        case Variable(name=name, of=None):
            return f"v[{name!r}]"
        case Variable(name=name, of=Term() as of):
            return f"v[{name!r}][{_python_of(of, constants)}]"
        case Quantified(quantifier=quantifier, bound=bound, body=body):
            inner = _python_of(body, constants)
            return f"{quantifier}({inner} for {bound.name} in connections)"
        case Applied(operator=operator, arguments=arguments):
            parts = [_python_of(each, constants) for each in arguments]
            if operator in _OPERATORS:
                return _OPERATORS[operator].format(*parts)
            return f"({f' {operator} '.join(parts)})"
        case _:
            raise TypeError(f"no term: {term!r}")
