"""The kernel beside the model in open environments, to the end of small ones."""

from __future__ import annotations

import pytest

from statemachine.effects import Effect
from statemachine.errors import LocalProtocolError
from statemachine.events import ProviderInput, ScopeEmptied
from statemachine.provider import ProviderKernel
from statemachine.testing.kit import ViolatingPath
from statemachine.testing.open_environment import OpenEnvironment
from statemachine.testing.open_lockstep import compare

ONE = OpenEnvironment(1, 1, 1)


class Silent(ProviderKernel):
    """Forgets the last effect where there are several."""

    def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
        effects = super().receive(event)
        return effects[:-1] if len(effects) > 1 else effects


class Lax(ProviderKernel):
    """Takes what cannot be."""

    def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
        try:
            return super().receive(event)
        except LocalProtocolError:
            return ()


class Strict(ProviderKernel):
    """Refuses what can be."""

    def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
        if isinstance(event, ScopeEmptied):
            raise LocalProtocolError(event, "any", "not that")
        return super().receive(event)


class Careless(ProviderKernel):
    """Has changed something when it refuses."""

    def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
        try:
            return super().receive(event)
        except LocalProtocolError:
            self.remember(("another",))
            raise


@pytest.mark.parametrize(
    ("environment", "snapshots", "steps"),
    [
        (ONE, 730, 6_134),
        (OpenEnvironment(1, 1, 2), 1_536, 13_390),
        (OpenEnvironment(1, 1, 1, readiness=True, crash=True), 2_000, 10_000),
        (OpenEnvironment(1, 1, 1, images=True, refusals=True), 730, 6_800),
    ],
    ids=["ready", "two messages", "starts, stops and dies", "images, refusals"],
)
def test_basic_they_agree_in_every_state(
    environment: OpenEnvironment, snapshots: int, steps: int
) -> None:
    compared = compare(environment)
    assert compared.is_complete
    assert compared.snapshots >= snapshots
    assert compared.steps >= steps
    assert compared.refused > compared.snapshots


def test_what_is_not_fed_is_named() -> None:
    assert "ProviderStopping" in compare(ONE, pairs_max=1).left_out
    assert compare(OpenEnvironment(1, 1, 1, readiness=True), pairs_max=1).left_out == ()
    assert not compare(ONE, pairs_max=1).is_complete


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (Silent, "after\n"),
        (Lax, "which cannot be"),
        (Strict, "the kernel does not take"),
        (Careless, "changed something"),
    ],
)
def test_a_kernel_that_differs_is_found_with_a_script(
    kernel: type[ProviderKernel], what: str
) -> None:
    with pytest.raises(ViolatingPath, match=what):
        compare(ONE, kernel)
