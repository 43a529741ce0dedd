"""Frozen value classes: a dataclass with slots, at a fraction of the import time.

`dataclass(frozen=True, slots=True)` compiles eight functions for each class and builds the class
twice, which was most of what importing this package cost: it has some eighty events, effects and
messages. `record` compiles one small source for each class, when the class is first used, which few
of them are in one process; and does not import `dataclasses`. Its classes work with
`dataclasses.fields`, `replace`, `asdict` and `is_dataclass`, with `match`, `copy` and `pickle`;
mypy takes them for frozen dataclasses.
"""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, ClassVar, Final, TypeVar, dataclass_transform

T = TypeVar("T")

# A slot's own `__set__` passes by the `__setattr__` that refuses every change.
_SOURCE: Final = """
def make({known}):
    def __init__(self{parameters}):
        {body}
    def __eq__(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        return {equal}
    def __hash__(self):
        return hash((self.__class__, {values}))
    return __init__, __eq__, __hash__
"""


class _OfDataclass:
    """What `dataclasses` looks for in a class, made on demand."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, instance: object, owner: Any) -> Any:
        return getattr(_dataclass_like(owner), self._attribute)


class _CompiledWhenUsed:
    """A method of one record, compiled when it or another of its kind is first used."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self._record = owner
        self._name = name

    def __get__(self, instance: object, owner: Any) -> Any:
        # In the place of this, so that the next call finds the method itself.
        for method in _methods(self._record):
            setattr(self._record, method.__name__, method)
        return getattr(self._record, self._name).__get__(instance, owner)


@cache
def _dataclass_like(cls: Any) -> type:
    import dataclasses

    fields = [
        (name, cls._types[name], dataclasses.field(default=cls._defaults[name]))
        if name in cls._defaults
        else (name, cls._types[name])
        for name in cls.__match_args__
    ]
    return dataclasses.make_dataclass(cls.__name__, fields, frozen=True)


class _Record:
    """What all records have in common."""

    __slots__ = ()
    __match_args__: tuple[str, ...] = ()
    __dataclass_fields__ = _OfDataclass("__dataclass_fields__")
    __dataclass_params__ = _OfDataclass("__dataclass_params__")
    _types: ClassVar[dict[str, Any]] = {}
    _defaults: ClassVar[dict[str, Any]] = {}
    _module: ClassVar[dict[str, Any]]

    def __setattr__(self, name: str, value: object) -> None:
        raise _frozen(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise _frozen(f"cannot delete field {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__qualname__}({fields})"


# What is annotated above is no field, for which `typing.get_type_hints` would take it.
del _Record.__annotations__


class Typed(_Record):
    """
    A base of records that are built by others' code: a value of another type raises a TypeError.

    A field is checked whose annotation names a class of its module, or that or None. The others
    are for `__post_init__`.
    """

    __slots__ = ()


def expect(field: str, value: object, kind: type) -> None:
    """Raise a TypeError that names the field if the value is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{field} must be {kind.__name__}, not {type(value).__name__}")


def _frozen(text: str) -> AttributeError:
    from dataclasses import FrozenInstanceError

    return FrozenInstanceError(text)


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """
    Make a class of immutable values out of its annotated fields.

    Two values are equal, and hash alike, if they are of one class and their fields are equal. A
    default value must be immutable; `__post_init__` is called if there is one. To change a field
    raises `dataclasses.FrozenInstanceError`.
    """
    own: dict[str, Any] = vars(cls).get("__annotations__", {})
    namespace = {
        name: value
        for name, value in vars(cls).items()
        if name not in own and name not in ("__dict__", "__weakref__")
    }
    bases = cls.__bases__ if issubclass(cls, _Record) else (_Record,)
    parent: Any = bases[0]
    names = (*parent.__match_args__, *own)
    types = parent._types | own
    defaults = parent._defaults | {name: vars(cls)[name] for name in own if name in vars(cls)}
    namespace |= {
        "__qualname__": cls.__qualname__,
        "__slots__": tuple(own),
        "__match_args__": names,
        "_types": types,
        "_defaults": defaults,
        "_module": vars(sys.modules[cls.__module__]),
        "__init__": _CompiledWhenUsed(),
        "__eq__": _CompiledWhenUsed(),
        "__hash__": _CompiledWhenUsed(),
    }
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, namespace)  # type: ignore[no-any-return]


def fields_of(value: object) -> dict[str, Any]:
    """Return a record's fields by name. Unlike `dataclasses.asdict`, it copies none of them."""
    return {name: getattr(value, name) for name in type(value).__match_args__}  # type: ignore[attr-defined]


def changed(value: T, **fields: object) -> T:
    """Return a record with other values of some fields, as `dataclasses.replace` does."""
    return type(value)(**{**fields_of(value), **fields})


def _methods(made: Any) -> tuple[FunctionType, ...]:
    """Compile what is called often: construction, comparison and hash."""
    types, defaults = made._types, made._defaults
    names = tuple(types)
    known = {f"set_{name}": getattr(made, name).__set__ for name in names}
    known |= {f"default_{name}": value for name, value in defaults.items()}
    known["expect"] = expect
    body = _checks(types) if issubclass(made, Typed) else []
    body += [f"set_{name}(self, {name})" for name in names]
    if hasattr(made, "__post_init__"):
        body.append("self.__post_init__()")
    source = _SOURCE.format(
        known=", ".join(known),
        parameters="".join(
            f", {name}=default_{name}" if name in defaults else f", {name}" for name in names
        ),
        body="\n        ".join(body) or "pass",
        equal=" and ".join(f"self.{name} == other.{name}" for name in names) or "True",
        values="".join(f"self.{name}, " for name in names),
    )
    scope: dict[str, Any] = {}
    # In the class's own module, whose names its annotations are.
    exec(_code(source), made._module, scope)
    methods: tuple[FunctionType, ...] = scope["make"](**known)
    for method in methods:
        method.__qualname__ = f"{made.__qualname__}.{method.__name__}"
    methods[0].__annotations__ = {**types, "return": None}
    return methods


def _checks(types: dict[str, str]) -> list[str]:
    """Write a statement for every field whose annotation names a class, or that or None."""
    lines = []
    for name, annotation in types.items():
        kind = annotation.removesuffix(" | None")
        if kind.isidentifier():
            is_given = "" if kind == annotation else f"{name} is not None and "
            lines.append(
                f"if {is_given}not isinstance({name}, {kind}): expect({name!r}, {name}, {kind})"
            )
    return lines


@lru_cache
def _code(source: str) -> Any:
    # Many records have the same fields.
    return compile(source, __name__, "exec")
