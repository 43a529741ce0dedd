"""Hypothesis strategies: messages, requests that can be granted, events, effects."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from itertools import permutations
from typing import Any, Final, get_args, get_type_hints

from hypothesis import strategies as st

from .. import effects as do
from ..effects import Effect
from ..errors import NAMESPACE_ERRORS, NamespaceError
from ..events import ConsumerInput, Event, ProviderInput
from ..lifecycle import _leaves
from ..messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    objection,
)

ORDERS: Final = tuple(order for size in range(4) for order in permutations(NamespaceType, size))
"""Every order of every subset of the types."""

PROVIDER_INPUTS: Final[tuple[type[Event], ...]] = get_args(ProviderInput)
CONSUMER_INPUTS: Final[tuple[type[Event], ...]] = get_args(ConsumerInput)
EFFECTS: Final = tuple(sorted(_leaves(do, Effect), key=lambda kind: kind.__name__))


def texts() -> st.SearchStrategy[str]:
    """Return any text that UTF-8 can say."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def messages(types_max: int = 64) -> st.SearchStrategy[Message]:
    """
    Return any message that can be written, sensible or not.

    Args:
        types_max: longest list of types; a frame has no more than 64.
    """
    types = st.lists(st.sampled_from(NamespaceType), max_size=types_max).map(tuple)
    return st.one_of(
        st.builds(NamespaceRequest, texts(), types, st.none() | texts()),
        st.builds(NamespaceResponse, texts(), types, st.none() | texts()),
        st.builds(AllocationEnded, texts()),
        *(st.builds(kind, texts()) for kind in NAMESPACE_ERRORS),
    )


def requests() -> st.SearchStrategy[NamespaceRequest]:
    """Return requests without objection, on names of which some come twice."""
    names, orders = st.sampled_from("abc"), st.sampled_from(ORDERS)
    images = st.sampled_from((None, "hello.sqfs", "deep/other.sqfs"))
    every = st.builds(NamespaceRequest, names, orders, images)
    return every.filter(lambda request: objection(request) is None)


def provider_inputs() -> st.SearchStrategy[ProviderInput]:
    """Return any event that a provider's kernel may be fed; most are impossible at most times."""
    return st.one_of([values_of(kind) for kind in PROVIDER_INPUTS])


def consumer_inputs() -> st.SearchStrategy[ConsumerInput]:
    """Return any event that a consumer's kernel may be fed; most are impossible at most times."""
    return st.one_of([values_of(kind) for kind in CONSUMER_INPUTS])


def effects() -> st.SearchStrategy[Effect]:
    """Return any effect."""
    return st.one_of([values_of(kind) for kind in EFFECTS])


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return every value that an annotation of an event or an effect allows."""
    if isinstance(hint, type) and issubclass(hint, NamespaceError):
        kinds = [kind for kind in NAMESPACE_ERRORS if issubclass(kind, hint)]
        return st.one_of([st.builds(kind, st.text()) for kind in kinds])
    if is_dataclass(hint):
        hints: dict[str, Any] = get_type_hints(hint)
        parts = {field.name: values_of(hints[field.name]) for field in fields(hint)}
        build: Any = hint
        return st.builds(build, **parts)
    return st.from_type(hint)
