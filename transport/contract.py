"""The backend contract: what a provider's driver calls to make, watch and end allocations.

`linux.LinuxBackend` and `linux.SimulatedBackend` fulfil it. One test suite checks both, and can be
run against any other backend.

`SelfService` is the part that a consumer needs to make namespaces of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from statemachine.messages import NamespaceRequest, NamespaceResponse
from statemachine.record import record
from statemachine.roles import NamespaceProvider
from statemachine.states import AllocationState

from .descriptors import DescriptorSource


class Step(Enum):
    """One step of a backend's work for an allocation; the value names it in errors."""

    INTEND = "journal the intent"
    """Write the request down, before anything is made for it."""
    SCOPE = "make the scope"
    """Make the allocation's cgroup."""
    IMAGE = "mount the image"
    """Mount the image, attached nowhere yet. Only if the request names one."""
    ANCHOR = "make the namespaces"
    """Start the init in new namespaces, and attach the image inside."""
    PUBLISH = "publish the result"
    """Journal what was made; fails if the end was recorded meanwhile."""
    RECORD_HANDOFF = "journal the hand-over"
    """Note the hand-over durably: in the journal, or on the cgroup itself."""
    RECORD_END = "journal the end"
    """Note the end durably: in the journal, or on the cgroup itself."""
    END_INIT = "end the init"
    """Kill the init, and with it the processes of its PID namespace."""
    RELEASE_IMAGE = "release the image"
    """Count one user less; the image is unmounted when its hold time is over."""
    REMOVE_SCOPE = "remove the scope"
    """Kill what is left in the cgroup, and remove it."""
    FORGET = "remove the journal entry"
    """Replace the entry by the name alone, which is remembered."""


CREATION: Final = (Step.INTEND, Step.SCOPE, Step.IMAGE, Step.ANCHOR, Step.PUBLISH)
"""
The steps that make an allocation, in order.

The scope comes first because its name is what two makers of one allocation collide on. The image
comes before the namespaces because it is attached inside them while they are made.
"""

RELEASE: Final = (
    Step.RECORD_END,
    Step.END_INIT,
    Step.RELEASE_IMAGE,
    Step.REMOVE_SCOPE,
    Step.FORGET,
)
"""
The steps that release an allocation, in order: each undoes one of `CREATION`, the last one first.

A step that fails, or cannot be finished yet, does not hold up the ones after it, with two
exceptions: the image is not released before the init has ended, and the journal entry is not
removed before everything else. A journal that cannot be written at RECORD_END (or RECORD_HANDOFF)
is logged and changes nothing else.

A creation that fails is released at once.
"""

UNDONE_BY: Final[Mapping[Step, Step]] = MappingProxyType(
    dict(zip(CREATION, reversed(RELEASE), strict=True))
)
"""Which step undoes which."""

LEFT_BY_CRASH: Final[Mapping[Step, frozenset[Step]]] = MappingProxyType(
    {
        step: frozenset(left)
        for step, left in (
            (Step.INTEND, ()),
            (Step.SCOPE, CREATION[:1]),
            (Step.IMAGE, CREATION[:2]),
            # A detached mount is an open file of the program, and is closed when it dies.
            (Step.ANCHOR, CREATION[:2]),
            (Step.PUBLISH, CREATION[:4]),
            (Step.RECORD_END, CREATION),
            (Step.END_INIT, CREATION[:4]),
            (Step.RELEASE_IMAGE, CREATION[:2]),
            (Step.REMOVE_SCOPE, CREATION[:2]),
            (Step.FORGET, CREATION[:1]),
        )
    }
)
"""What is on the node when the program dies just before a step, by the steps that made it."""

LEFT_BY_FAILURE: Final[Mapping[Step, frozenset[Step]]] = MappingProxyType(
    {
        **dict.fromkeys((*CREATION, Step.RECORD_END), frozenset[Step]()),
        Step.END_INIT: frozenset({Step.INTEND, Step.IMAGE, Step.ANCHOR}),
        Step.RELEASE_IMAGE: frozenset({Step.INTEND, Step.IMAGE}),
        Step.REMOVE_SCOPE: frozenset({Step.INTEND, Step.SCOPE}),
        Step.FORGET: frozenset({Step.INTEND}),
    }
)
"""What is on the node after a creation or one try to release in which a step failed."""


def plan(
    request: NamespaceRequest, *, has_scopes: bool = True, has_journal: bool = True
) -> tuple[Step, ...]:
    """
    List the steps that make what a request asks for.

    Args:
        request: what is asked for.
        has_scopes: False where no cgroups can be made.
        has_journal: False in self-service, where everything ends with the consumer.
    """
    is_needed = {
        Step.INTEND: has_journal,
        Step.SCOPE: has_scopes,
        Step.IMAGE: request.uenv_image is not None,
        Step.PUBLISH: has_journal,
    }
    return tuple(step for step in CREATION if is_needed.get(step, True))


class Sighting(Enum):
    """What a backend can see of a living allocation."""

    POPULATED = "populated"
    """Its cgroup has processes."""
    EMPTIED = "emptied"
    """Its cgroup has been used, and is empty now."""
    CHANGED = "changed"
    """
    Its cgroup has changed and is empty, and there is no proof yet that it was ever used.

    The Linux kernel counts the CPU time of a process a moment after its end. Call `is_over` again:
    nothing else will be reported of a process that ended so soon.
    """
    INIT_DIED = "init_died"
    """The process that holds its namespaces is dead."""


class Observation(NamedTuple):
    """One sighting of one allocation."""

    allocation_id: str
    sighting: Sighting
    """What was seen of it."""


@record
class Adoption:
    """One allocation that a backend found after a restart."""

    state: AllocationState
    """CREATED or HANDED_OFF if it is alive and whole; ENDED if it is half made, half released or
    dead, and is to be released."""
    request: NamespaceRequest
    response: NamespaceResponse | None
    """What was answered; None if it is ENDED."""


class Recovery(NamedTuple):
    """Everything a backend found after a restart."""

    adoptions: tuple[Adoption, ...] = ()
    """What was found on the node, in the order in which it had been asked for."""
    remembered: tuple[str, ...] = ()
    """Names of allocations that were released, oldest first."""


class SelfService(NamespaceProvider, DescriptorSource, Protocol):
    """
    What makes namespaces and gives out their descriptors.

    `create_namespaces` and `release_namespaces` may take their time, and are called from any
    thread; two calls for one allocation never overlap. `create_namespaces` refuses a request that
    breaks a rule (`statemachine.messages.objection`).
    """

    def why_alive(self, allocation_id: str) -> str | None:
        """
        Say what is left of an allocation whose release was tried.

        Returns:
            The steps that could not be finished, each with the reason; None when nothing is left.
        """
        ...

    def close(self) -> None:
        """Close what belongs to this object; a provider's allocations stay alive."""
        ...


class Backend(SelfService, Protocol):
    """
    What performs a provider's effects on a node.

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
        """Note durably that an allocation was handed over; nothing if there is none. Quick."""
        ...

    def record_ended(self, allocation_id: str) -> None:
        """
        Note durably that an allocation is over. Quick.

        A creation that is under way fails at PUBLISH at the latest. After a crash `recover` reports
        the allocation as ENDED, never as alive.
        """
        ...

    def watch(self, allocation_id: str) -> None:
        """
        Begin to observe an allocation, until it is released. Quick.

        What is so already is observed as if it had just happened. Nothing is observed of an
        allocation whose release has begun.

        Raises:
            AllocationNotFound: there is no such allocation.
            ValueError: it is watched already. Nothing has changed in both cases.
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
        Unmount the images whose hold time is over.

        Returns:
            Seconds until the next one is due, or None if none is waiting.
        """
        ...
