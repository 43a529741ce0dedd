"""The kernels and the reference model, step by step: the same outputs, the same states."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Final

import pytest

from specs import model
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.events import Event
from statemachine.provider import Limits, ProviderKernel
from statemachine.testing.kit import ViolatingPath
from statemachine.testing.lockstep import (
    CONSUMED,
    LIMITS,
    MODEL_LIMITS,
    REQUESTS,
    explore_consumer,
    explore_provider,
    model_limits,
    response_to,
    step,
    walk_provider,
)

# --- They agree --------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "steps"), [("a", 6_000), ("ab", 10_000), ("abc", 6_000)])
def test_the_provider_does_what_the_model_says(names: str, steps: int) -> None:
    walk_provider(len(names), names, steps)


def test_the_consumer_does_what_the_model_says() -> None:
    assert explore_consumer() > 500


class Opaque:
    """A kernel of which nothing is known but `receive`."""

    def __init__(self, limits: Limits) -> None:
        self._kernel = ProviderKernel(limits)

    def receive(self, event: Event) -> tuple[Effect, ...]:
        return self._kernel.receive(event)


class Lazy(Opaque):
    def receive(self, event: Event) -> tuple[Effect, ...]:
        return super().receive(event)[:1]


def test_anything_with_receive_is_held_to_the_model() -> None:
    assert explore_provider(Opaque, states_max=30) == explore_provider(states_max=30)
    with pytest.raises(ViolatingPath):
        explore_provider(Lazy, states_max=30)


def test_equal_states_are_equal_values() -> None:
    script = [on.ConnectionOpened(1, 0), on.ProviderReady(), on.RequestReceived(1, CONSUMED)]
    ends = []
    for _ in range(2):
        state = model.Provider(MODEL_LIMITS)
        for event in script:
            state, _said = model.provider_step(state, event)
        ends.append(state)
    assert ends[0] == ends[1]
    assert len({*ends, model.Provider(MODEL_LIMITS)}) == 2


# --- Where they do not agree -------------------------------------------------------------------

A, A_OTHERWISE = REQUESTS["a"]
B: Final = REQUESTS["b"][0]
ENDED_A: Final = (on.RemainsFound("a", A), on.ProviderReady())

MENDED: Final[dict[str, list[Event]]] = {
    # It never learned what is alive, so it cannot know that this allocation is not.
    "a provider stopped before it was ready says AllocationNotFound": [
        on.ConnectionOpened(1, 0),
        on.ProviderStopping(),
        on.EndReceived(1, "a"),
    ],
    # The refusal waits for its turn behind the answer about b; the release takes it back.
    "an early request refused at the deadline starts an incarnation": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, B),
        on.RequestReceived(1, A),
        on.ReleaseOverdue("a"),
        on.NamespacesReleased("a"),
    ],
    "an early request refused at the deadline is refused otherwise at the stop": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, B),
        on.RequestReceived(1, A),
        on.ReleaseOverdue("a"),
        on.ProviderStopping(),
        on.NamespacesCreated("b", response_to(B)),
    ],
    # Connection 1 takes its request back; its next one, after that of 2, is put before that of 2.
    "an early request takes the place of one that was taken back": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.ConnectionOpened(2, 0),
        on.RequestReceived(1, A),
        on.EndReceived(1, "a"),
        on.RequestReceived(2, A_OTHERWISE),
        on.RequestReceived(1, A),
        on.NamespacesReleased("a"),
    ],
    # Limits are on requests (protocol); what would end an allocation must not be kept from it.
    "an end over the limit is refused with CreationFailed and ends nothing": [
        on.ProviderReady(),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, A),
        on.RequestReceived(1, B),
        on.EndReceived(1, "a"),
    ],
    # It is refused its second request, then its fault is answered and it is closed, and only then
    # would it be told: but it was there when the end was announced.
    "a holder whose unreadable frame waits for its answer is not told of the end": [
        on.ProviderReady(),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, A),
        on.NamespacesCreated("a", response_to(A)),
        on.ResponseSent("a", 1),
        on.ReleaseRequested("a"),
        on.RequestReceived(1, A),
        on.FrameRejected("x", 1),
        on.ReleaseOverdue("a"),
    ],
}


@pytest.mark.parametrize("limits", [Limits(), LIMITS], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", MENDED)
def test_what_the_model_found_stays_mended(name: str, limits: Limits) -> None:
    kernel, state = ProviderKernel(limits), model.Provider(model_limits(limits))
    for event in MENDED[name]:
        kernel, state = step(kernel, state, event)


# --- It is a model of its own ------------------------------------------------------------------


def test_the_model_knows_nothing_of_the_kernels() -> None:
    tree = ast.parse(Path(model.__file__).read_text(encoding="utf-8"))
    origins = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            origins |= set(inner) if node.module == "statemachine" else {str(node.module)}
    allowed = {f"statemachine.{name}" for name in ("effects", "errors", "events", "messages")}
    assert {o for o in origins if o.partition(".")[0] not in sys.stdlib_module_names} == allowed
