"""A provider under test for the stateful machine, and what can be done to the node it runs on.

Only its socket is needed. Every further `Ability` turns on the rules of `machine` that need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from pathlib import Path
from typing import ClassVar, Protocol

from statemachine.effects import Effect, Timer
from statemachine.events import Event
from statemachine.messages import Message, NamespaceRequest, NamespaceResponse
from statemachine.provider import Limits

from ..descriptors import DescriptorBundle, Inspector, NamespaceIdentity
from ..request import Consumer
from .peer import Line, frame_of

History = list[tuple[Event, tuple[Effect, ...]]]
"""What a provider of ours took in and decided, turn by turn."""


class Ability(Enum):
    """What an adapter can do besides naming a socket."""

    PROCESSES = auto()
    """Start and end processes in an allocation's cgroup, and freeze them."""
    INITS = auto()
    """Kill the init of an allocation's PID namespace."""
    HANGS = auto()
    """Let something be in an allocation that does not die."""
    RESTART = auto()
    """Stop the provider, and start another on the same socket and the same state."""
    KILL = auto()
    """Kill the provider's process, whatever it does, and start another, as after a stop."""
    OPERATOR = auto()
    """End an allocation as an operator does, without a connection."""
    HOLD = auto()
    """Hold up the provider's work where it is to be disturbed."""
    SCARCITY = auto()
    """Have the provider find no descriptors to pass."""
    TIME = auto()
    """Let a span that the provider measures run out."""
    USERS = auto()
    """Connect as a second user."""
    LIMITS = auto()
    """Say what the limits of the provider are, which are low enough to be reached."""


class StalledWork(Enum):
    """What can be held up."""

    RECOVER = auto()
    """Finding what is alive, after a start: the provider listens, and is not ready."""
    CREATE = auto()
    """Making an allocation."""
    REPORT = auto()
    """Telling the provider that one has been made."""
    RELEASE = auto()
    """Releasing one."""


class Held(Protocol):
    """What a consumer of ours has been handed: of `transport.request.Handoff`, what is used."""

    @property
    def response(self) -> NamespaceResponse: ...
    @property
    def bundle(self) -> DescriptorBundle: ...
    @property
    def identities(self) -> tuple[NamespaceIdentity, ...]: ...
    @property
    def is_degraded(self) -> bool: ...
    def wait_ended(self, timeout_s: float) -> bool: ...
    def end(self, timeout_s: float) -> bool: ...
    def close(self) -> None: ...


class Asker(Protocol):
    """A consumer of ours: of `transport.request.Consumer`, what is used."""

    def obtain(self, request: NamespaceRequest) -> Held: ...
    def end(self, allocation_id: str, timeout_s: float) -> None: ...


class Voice(Protocol):
    """One end of a connection to the provider."""

    def say(self, *messages: Message) -> None:
        """Say all of it in one breath."""

    def hear(self) -> Message | None:
        """Wait for the next message; None when the provider has hung up."""

    def take(self) -> DescriptorBundle:
        """Take the descriptors that came with the last message, which was a response."""

    def hang_up(self) -> None:
        """Close it, and whatever has arrived on it."""


class OnSocket:
    """A voice on a real connection."""

    def __init__(self, path: Path, connect: Callable[[Path], Line] = Line.to) -> None:
        self._line = connect(path)
        self.hear = self._line.hear
        self.take = self._line.take
        self.hang_up = self._line.hang_up

    def say(self, *messages: Message) -> None:
        self._line.say(b"".join(map(frame_of, messages)))


class Adapter:
    """
    A provider under test. As it stands it has the wire, and nothing else.

    Subclass it to say more: name the abilities, and write the methods that each of them needs.
    What is not overridden is not called, or does nothing.

    Args:
        path: The provider's socket. It listens there, and the user who runs the machine may use it.
        inspector: Tells what a descriptor is that the provider passes.
        image: A uenv image that the provider has; None if there is none to be tried.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()
    limits: Limits = Limits()
    """For LIMITS: what they are, none below that of `TIGHT`."""

    def __init__(self, path: Path, inspector: Inspector, image: str | None = None) -> None:
        self.path = path
        self.inspector = inspector
        self.image = image

    # How it is reached.

    def voice(self) -> Voice:
        """Open a connection to the provider."""
        return OnSocket(self.path)

    def consumer(self) -> Asker:
        """Make a consumer of ours, which serves itself under no circumstances."""
        return Consumer(self.path, self.inspector)

    # For PROCESSES.

    def join(self, name: str) -> None:
        """Let a process enter the allocation's cgroup and stay."""
        raise NotImplementedError

    def leave(self, name: str) -> None:
        """Let the process that joined last exit, and be reaped."""
        raise NotImplementedError

    def pass_through(self, name: str) -> None:
        """Let a process enter the cgroup and exit before it is looked for."""
        raise NotImplementedError

    def freeze(self, name: str, *, is_frozen: bool) -> None:
        """Freeze the cgroup, or thaw it."""
        raise NotImplementedError

    def reap_killed(self, name: str) -> None:
        """Reap the processes that were killed with an allocation; called for each that ended."""

    # For INITS.

    def kill_init(self, name: str) -> None:
        """Kill the init of the allocation's PID namespace."""
        raise NotImplementedError

    # For HANGS.

    def block_release(self, name: str) -> None:
        """Let something be in the allocation that cannot be ended for now."""
        raise NotImplementedError

    def unblock_release(self, name: str) -> None:
        """Let it go."""
        raise NotImplementedError

    # For RESTART.

    def stop(self) -> None:
        """Stop the provider; what it has made stays."""
        raise NotImplementedError

    def start(self) -> None:
        """Have another serve, on the state of the one before; return when it is ready.

        If `StalledWork.RECOVER` is held: when it listens.
        """
        raise NotImplementedError

    # For KILL, with `start` as above.

    def kill(self) -> None:
        """Kill the provider with SIGKILL, in the middle of whatever; what it has made stays."""
        raise NotImplementedError

    # For OPERATOR.

    def release(self, name: str) -> None:
        """End the allocation as an operator does; returns when that is decided."""
        raise NotImplementedError

    # For HOLD.

    def hold(self, work: StalledWork, name: str = "") -> None:
        """Hold up all work of a kind from now on, or that on one allocation."""
        raise NotImplementedError

    def wait_held(self, work: StalledWork, name: str = "") -> None:
        """Wait until such work is held up, on any allocation or on one."""
        raise NotImplementedError

    def let_go(self, work: StalledWork, name: str = "") -> None:
        """Let go on what was held up so."""
        raise NotImplementedError

    # For SCARCITY.

    def scarcity(self) -> AbstractContextManager[None]:
        """Meanwhile, the provider finds no descriptors to pass."""
        raise NotImplementedError

    # For TIME.

    def is_running(self, timer: Timer, name: str) -> bool:
        """Say whether the provider measures a span."""
        raise NotImplementedError

    def expire(self, timer: Timer, name: str) -> None:
        """Let a span that is measured run out now; returns when the provider knows."""
        raise NotImplementedError

    # For USERS.

    def voice_of_another(self) -> Voice:
        """Open a connection as a second user, whom the provider serves as well."""
        raise NotImplementedError

    # For adapters that can look inside.

    def seeing(self, kind: type[Event], name: str) -> AbstractContextManager[None]:
        """Wait, at the end of the block, until the provider has seen what is done in it."""
        return nullcontext()

    def wait_released(self, name: str) -> None:
        """Wait until nothing is left of an allocation that ended; over the wire, nothing tells."""

    def history(self) -> History:
        """What all providers so far took in and decided; empty for one that does not tell."""
        return []

    def kept(self) -> Counter[Hashable]:
        """How many descriptors of each namespace are the provider's own, in this process."""
        return Counter()

    def leftovers(self) -> list[str]:
        """Whatever is left of allocations on the machine when all have ended."""
        return []

    def close(self) -> None:
        """Take back whatever was set up for this one run of the machine."""
