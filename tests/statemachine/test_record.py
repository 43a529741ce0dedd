"""`record` against `dataclass(frozen=True, slots=True)`, which is the oracle: what a user sees."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Final, NamedTuple, get_type_hints

import pytest

from statemachine import (
    AllocationEnded,
    CreationFailed,
    FdPassing,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    SocketUnavailable,
    effects,
    events,
)
from statemachine.record import Typed, changed, fields_of, record

Decorator = Callable[[type], Any]


class Kinds(NamedTuple):
    """Classes that one decorator has made of the same sources."""

    point: Any
    """Two fields, one with a default value."""
    checked: Any
    """A subclass that adds a field and looks at what it is given."""
    empty: Any


def kinds_of(decorated: Decorator) -> Kinds:
    @decorated
    class Point:
        """A place."""

        x: int
        y: int = 2

        def sum(self) -> int:
            return self.x + self.y

        @property
        def double(self) -> int:
            return 2 * self.x

    @decorated
    class Checked(Point):
        z: int = 3

        def __post_init__(self) -> None:
            if self.z < 0:
                raise ValueError("z is negative")

    @decorated
    class Empty:
        pass

    return Kinds(Point, Checked, Empty)


RECORDS: Final = kinds_of(record)
DATACLASSES: Final = kinds_of(dataclass(frozen=True, slots=True))


def outcome(act: Callable[[Kinds], object], kinds: Kinds) -> object:
    """What an act returns, or what it raises and says."""
    try:
        return act(kinds)
    except Exception as error:
        return type(error), str(error)


ACTS: Final[dict[str, Callable[[Kinds], object]]] = {
    "positional": lambda k: (k.point(1, 5).x, k.point(1, 5).y),
    "by name": lambda k: (k.point(y=5, x=1).x, k.point(y=5, x=1).y),
    "default": lambda k: k.point(1).y,
    "default of the subclass": lambda k: (k.checked(1).y, k.checked(1).z, k.checked(1, 5, 6).z),
    "equal": lambda k: k.point(1, 2) == k.point(1),
    "first differs": lambda k: k.point(1, 2) == k.point(3, 2),
    "last differs": lambda k: k.point(1, 2) == k.point(1, 3),
    "another class": lambda k: k.point(1, 2) == (1, 2),
    "a subclass": lambda k: k.point(1, 2) == k.checked(1, 2),
    "empty": lambda k: (k.empty() == k.empty(), hash(k.empty()) == hash(k.empty())),
    "hash": lambda k: len({k.point(1), k.point(1, 2), k.point(2), k.point(1, 3)}),
    "hash alike": lambda k: [
        hash(k.point(1)) == hash(k.point(1, 2)),
        hash(k.point(1)) == hash(k.point(2)),
        hash(k.point(1)) == hash(k.point(1, 3)),
    ],
    "method": lambda k: k.point(1, 5).sum(),
    "property": lambda k: k.checked(4).double,
    "docstring": lambda k: k.point.__doc__,
    "post init": lambda k: k.checked(1, 2, -3),
    "names": lambda k: (k.point.__name__, k.checked.__mro__[1].__name__),
    "module": lambda k: k.point.__module__,
    "qualified name": lambda k: k.point.__qualname__,
    "subclass": lambda k: issubclass(k.checked, k.point),
    "pattern": lambda k: (k.point.__match_args__, k.checked.__match_args__, k.empty.__match_args__),
    "fields": lambda k: [[f.name for f in fields(kind)] for kind in k],
    "defaults": lambda k: [f.default for f in fields(k.checked)],
    "types": lambda k: [f.type for f in fields(k.checked)],
    "is one": lambda k: [is_dataclass(kind) for kind in k],
    "frozen": lambda k: k.point.__dataclass_params__.frozen,
    "replace": lambda k: repr(replace(k.point(1), y=7)),
    "as dict": lambda k: asdict(k.checked(1)),
    "repr": lambda k: (repr(k.point(1)), repr(k.checked(1)), repr(k.empty())),
    "copy": lambda k: copy.copy(k.checked(1, 4, 5)) == k.checked(1, 4, 5),
    "slots": lambda k: [hasattr(kind, "__dict__") for kind in (k.point(1), k.checked(1))],
    "slots of each": lambda k: (k.point.__slots__, k.checked.__slots__),
    "signature": lambda k: [str(inspect.signature(kind)) for kind in k],
    "hints": lambda k: [get_type_hints(kind) for kind in k],
    "hints of the parameters": lambda k: get_type_hints(k.checked.__init__),
    "an argument too few": lambda k: k.point(),
    "set": lambda k: setattr(k.point(1), "x", 3),
    "delete": lambda k: delattr(k.point(1), "x"),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_record_does_what_a_frozen_dataclass_does(act: Callable[[Kinds], object]) -> None:
    assert outcome(act, RECORDS) == outcome(act, DATACLASSES)
    # Also one that is made now.
    assert outcome(act, kinds_of(record)) == outcome(act, DATACLASSES)


def test_a_record_has_no_room_for_a_weak_reference() -> None:
    # A dataclass with slots seems to, in Python 3.11.2.
    assert not hasattr(RECORDS.point(1), "__weakref__")


def test_no_field_can_be_added() -> None:
    # In a dataclass with slots it is a TypeError (python/cpython#90562).
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        setattr(RECORDS.point(1), "name", 3)  # noqa: B010


def test_fields_and_changes() -> None:
    values = [1]
    point = RECORDS.checked(1, values)
    assert fields_of(point) == {"x": 1, "y": values, "z": 3}
    assert fields_of(point)["y"] is values
    assert changed(point, z=4) == replace(point, z=4)


def test_the_parameters_have_types_by_the_names_of_the_module_they_are_in() -> None:
    signature = inspect.signature(NamespaceRequest, eval_str=True)
    types = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    assert types == get_type_hints(NamespaceRequest)
    assert types["namespaces"] == tuple[NamespaceType, ...]


def test_pickle() -> None:
    value = AllocationEnded("a")
    assert pickle.loads(pickle.dumps(value)) == value


REQUEST: Final = NamespaceRequest("a", ())
RESPONSE: Final = NamespaceResponse("a", ())
SAMPLES: Final[dict[str, object]] = {
    "str": "a",
    "str | None": None,
    "int": 1,
    "bool": True,
    "ConnectionId": 1,
    "NamespaceRequest": REQUEST,
    "NamespaceResponse": RESPONSE,
    "NamespaceError": FdPassing("x"),
    "CreationFailed": CreationFailed("x"),
    "FdPassing": FdPassing("x"),
    "SocketUnavailable": SocketUnavailable("x"),
    "Timer": effects.Timer.ANSWER,
    "tuple[NamespaceType, ...]": (),
}
"""A value for each annotation of an event, an effect or a message."""


def test_every_field_of_an_event_an_effect_and_a_message_is_held_to_its_type() -> None:
    everything = [*vars(events).values(), *vars(effects).values()]
    kinds = [kind for kind in everything if isinstance(kind, type) and issubclass(kind, Typed)]
    kinds.append(AllocationEnded)
    assert {events.RequestReceived, effects.Refuse, effects.Timing, NamespaceResponse} < set(kinds)
    for kind in kinds:
        good = {field.name: SAMPLES[field.type] for field in fields(kind)}
        made = kind(**good)
        for name in good:
            with pytest.raises(TypeError, match=f"^{name} must be .* not "):
                changed(made, **{name: 1.5})


@pytest.mark.parametrize("wrong", ["x", None])
def test_an_event_says_which_field_has_what_type(wrong: Any) -> None:
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^request must be NamespaceRequest, not {kind}$"):
        events.RequestReceived(1, wrong)
