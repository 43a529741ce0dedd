"""`Backend`: the interface between the provider's driver and what makes namespaces on a node.

`linux.LinuxBackend` and `linux.SimulatedBackend` keep this contract; one suite holds both to it,
and can be run against any other backend.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from statemachine.messages import NamespaceRequest, NamespaceResponse
from statemachine.roles import NamespaceProvider

from .descriptors import DescriptorSource


class Sighting(Enum):
    """What a backend can see of a living allocation."""

    POPULATED = "populated"
    """Its cgroup has processes."""
    EMPTIED = "emptied"
    """Its cgroup has been used, and is empty now."""
    CHANGED = "changed"
    """Its cgroup has changed and is empty, and there is no proof yet that it was ever used.

    The Linux kernel books the time that a process has used a moment after its end. To be looked at
    again (`is_over`), because nothing else will be reported of a life that short.
    """
    INIT_DIED = "init_died"
    """The process that holds its namespaces is dead."""


class Observation(NamedTuple):
    """One sighting of one allocation."""

    allocation_id: str
    sighting: Sighting
    """What was seen of it."""


class Standing(Enum):
    """What a backend finds of an allocation after a restart."""

    CREATED = "created"
    """Alive and whole; not known to have been handed over."""
    HANDED_OFF = "handed_off"
    """Alive and whole; handed over before."""
    REMAINS = "remains"
    """Half made, half released, or dead meanwhile: to be released."""


class Adoption(NamedTuple):
    """One allocation that a backend found after a restart."""

    standing: Standing
    """What it counts as from now on."""
    request: NamespaceRequest
    response: NamespaceResponse | None
    """What was answered; None for remains."""


class Recovery(NamedTuple):
    """Everything a backend found after a restart."""

    adoptions: tuple[Adoption, ...] = ()
    """What was found on the node, in the order in which it had been asked for."""
    remembered: tuple[str, ...] = ()
    """Names of allocations that were released, oldest first."""


class SelfService(NamespaceProvider, DescriptorSource, Protocol):
    """
    Makes namespaces and gives out their descriptors.

    `create_namespaces` and `release_namespaces` may take their time, and are called from any
    thread; two calls for one allocation never overlap.
    """

    def why_alive(self, allocation_id: str) -> str | None:
        """
        Say what is left of an allocation whose release was tried.

        Returns:
            What is still there and why, or None when nothing is left.
        """
        ...

    def close(self) -> None:
        """Close what belongs to this object; a provider's allocations stay alive."""
        ...


class Backend(SelfService, Protocol):
    """
    What performs a provider's effects on a machine.

    `release_namespaces` is one try and never waits; it is repeated until `why_alive` says None,
    and harmless when repeated. The calls below that are said to be quick are made in the event
    loop, by one thread; the others in any thread.
    """

    def recover(self) -> Recovery:
        """
        Find what an earlier provider left, before anything else is asked.

        Adopts what is alive and whole. Touches nothing that it cannot prove to be its own.
        """
        ...

    def record_handed_off(self, allocation_id: str) -> None:
        """Note durably that an allocation was handed over. Quick."""
        ...

    def record_ended(self, allocation_id: str) -> None:
        """
        Note durably that an allocation is over. Quick.

        A creation that is under way fails at its end at the latest. A recovery after a crash finds
        remains, never a living allocation.
        """
        ...

    def watch(self, allocation_id: str) -> None:
        """
        Begin to observe an allocation, until it is released. Quick.

        What is so already is observed as if it had just happened.
        """
        ...

    def fileno(self) -> int:
        """Lend a descriptor that is readable when `observe` has something to say. Quick."""
        ...

    def observe(self) -> list[Observation]:
        """Say what has been seen since the last call, in order; never blocks. Quick."""
        ...

    def is_over(self, allocation_id: str) -> bool:
        """Read again whether the allocation's cgroup was used and is empty. Quick."""
        ...

    def tidy(self) -> float | None:
        """
        Drop what is kept only for a while and has been kept long enough (unused images).

        Returns:
            Seconds until there is something to drop, or None if nothing is kept.
        """
        ...
