"""Stateful test of a consumer against a provider that may do anything, at any time.

The provider sends the right answer, a wrong one, another one, garbage, or nothing. The consumer
runs on the driver of `transport.request`, one step at a time, so that every step may be late.
`AdversarialProvider` has the rules and the invariants; a `Counterpart` says what the consumer is
connected with: pipes, or real sockets and the Linux kernel's namespaces.
"""

from __future__ import annotations

import socket
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.states import ConsumerState, NoticeState
from transport.channel import Channel, Delivery, Rejected
from transport.contract import SelfService
from transport.descriptors import DescriptorBundle, Inspector
from transport.request import Fallback, Patience
from transport.request.blocking import perform
from transport.request.exchange import Exchange
from transport.testing.in_process import ConsumerBrain, Pipe, pipe, put_through
from transport.testing.machine import open_namespaces

from ..backend import LinuxBackend
from ..simulated import SimulatedBackend, SimulatedNode
from .worlds import LinuxWorld, SimulatedWorld, World

PID: Final = NamespaceType.PID
MOUNT: Final = NamespaceType.MOUNT
KINDS: Final = (PID, MOUNT)
STEPS: Final = 20

FOREVER: Final = Patience(connect_s=1e6, answer_s=1e6, redial_s=1e6)
"""No deadline passes unless a rule lets it."""

ENDABLE: Final = frozenset(
    {
        ConsumerState.CONNECTING,
        ConsumerState.ASKING,
        ConsumerState.HELD,
        ConsumerState.SELF_HELD,
    }
)
OWN: Final = frozenset({ConsumerState.SERVING_SELF, ConsumerState.SELF_HELD})
"""Where a consumer has namespaces of its own, or is making them."""

RESPONSES: Final = ("response", "response of another", "response of other kinds")
OTHERS: Final = (
    "creation failed",
    "not found",
    "unavailable",
    "passing failed",
    "ended",
    "garbage",
)
REFUSALS: Final = ("creation failed", "not found")
"""Answers that the caller is given, and no reason for self-service."""
NOTHING_MADE: Final = (*REFUSALS, "unavailable")
"""Answers to a request after which the provider has made nothing."""
CONFIRMATIONS: Final = ("ended", "not found")
"""Answers to an end after which the provider has nothing any more."""


class Counterpart(ABC):
    """
    What a consumer is connected with.

    Args:
        world: where the namespaces come from that the provider passes; closed with this.
        prefix: begins every id.
        brain: decides for the consumer.
    """

    def __init__(self, world: World, prefix: str, brain: ConsumerBrain) -> None:
        self.request = NamespaceRequest(f"{prefix}-dealt", KINDS)
        self._world = world
        self._stock = f"{prefix}-stock"
        self._node = SimulatedNode()
        self._service = self._serves(world)
        self._brain = brain
        world.start()
        world.backend.create_namespaces(NamespaceRequest(self._stock, KINDS))

    def _serves(self, world: World) -> SelfService:
        """Make a backend for self-service, of the kind of the provider's."""
        if not isinstance(world, LinuxWorld):
            return SimulatedBackend(self._node, has_journal=False)
        return LinuxBackend.for_self_service(
            world.settings, clock=lambda: 0.0, features=world.features
        )

    def kept(self) -> Counter[Hashable]:
        """Count a simulated node's descriptors of what the consumer made itself."""
        return self._node.identities

    @property
    def inspector(self) -> Inspector:
        return self._world.inspector

    @abstractmethod
    def connect(self, exchange: Exchange) -> Pipe | Channel:
        """Let it connect; return the provider's end."""

    @abstractmethod
    def fail_to_connect(self, exchange: Exchange) -> None:
        """Let its attempt to connect fail."""

    @abstractmethod
    def garble(self) -> None:
        """Let the provider send what is no message."""

    def begin(self, audit: Callable[[Fallback], None]) -> Exchange:
        """Make a consumer that has done nothing yet."""
        brain, path = self._brain(self.request), self.socket
        return Exchange(brain, self.inspector, self._service, FOREVER, audit, path)

    @property
    def socket(self) -> Path:
        """The path it connects to."""
        return Path("nowhere")

    def bundle(self) -> DescriptorBundle:
        """What a provider would pass."""
        return self._world.backend.bundle_of(self._stock)

    def close(self) -> None:
        self._service.close()
        self._node.close()
        self._world.release(self._stock)
        self._world.close()


class OnPipes(Counterpart):
    """A consumer without a socket, over memory."""

    def __init__(self, prefix: str, brain: ConsumerBrain) -> None:
        super().__init__(SimulatedWorld(), prefix, brain)

    def connect(self, exchange: Exchange) -> Pipe:
        self._end, theirs = pipe()
        put_through(exchange, theirs)
        return self._end

    def fail_to_connect(self, exchange: Exchange) -> None:
        exchange.not_connected(SocketUnavailable("no provider is there"))

    def garble(self) -> None:
        self._end.put(Rejected(FdPassing("unreadable")))


class OnSockets(Counterpart):
    """A consumer that connects to a real socket."""

    def __init__(self, world: World, prefix: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nsh-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen(8)
        super().__init__(world, prefix, ConsumerKernel)

    @property
    def socket(self) -> Path:
        return Path(self._folder.name) / "handoff.sock"

    def connect(self, exchange: Exchange) -> Channel:
        exchange.path = self.socket
        perform(exchange, do.Connect())
        self._line, _ = self._listener.accept()
        return Channel(self._line, accepts_descriptors=False)

    def fail_to_connect(self, exchange: Exchange) -> None:
        exchange.path = self.socket.with_name("absent.sock")
        perform(exchange, do.Connect())

    def garble(self) -> None:
        self._line.send(bytes(4))

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._folder.cleanup)
            stack.callback(self._listener.close)
            stack.callback(super().close)


class AdversarialProvider(RuleBasedStateMachine):
    """
    Rules for what may happen to a consumer, and invariants of what must be true meanwhile.

    Subclass it with `counterpart`. One run has a few consumers, one after the other.
    """

    counterpart: Counterpart

    def __init__(self) -> None:
        super().__init__()
        self.before = open_namespaces(self.counterpart.inspector)
        self.request = self.counterpart.request
        self._begin()

    def _begin(self) -> None:
        self.fallbacks: list[Fallback] = []
        self.exchange = self.counterpart.begin(self.fallbacks.append)
        self.end: Pipe | Channel | None = None
        self.heard: list[list[Message]] = []
        """What the provider received, on each connection."""
        self.may_be_made = False
        """Whether the provider may have a set for this consumer."""
        self.is_refused = False
        """Whether the provider refused the request while it was waited for."""

    # The caller.

    @precondition(lambda self: self.is_in(ConsumerState.IDLE))
    @rule()
    def the_caller_asks(self) -> None:
        self.exchange.feed(on.NamespacesWanted())

    @precondition(lambda self: self.is_in(ConsumerState.IDLE))
    @rule()
    def the_caller_ends_what_it_does_not_hold(self) -> None:
        self.exchange.feed(on.EndWanted())

    @precondition(lambda self: self.is_in(*ENDABLE))
    @rule()
    def the_caller_is_done(self) -> None:
        self.exchange.feed(on.EndWanted())

    # That it goes while something is under way is every run's end.
    @precondition(lambda self: not (self.exchange.slow or self.exchange.channel or self.is_idle))
    @rule()
    def the_caller_goes(self) -> None:
        if self.is_in(ConsumerState.SELF_HELD):
            self.the_caller_is_done()
        if any(isinstance(effect, do.ReleaseOwn) for effect in self.exchange.slow):
            self.exchange.release_own()
        self.exchange.close()
        self._hang_up()
        self._begin()

    # The way to the provider.

    @precondition(lambda self: self.is_to(do.Connect))
    @rule()
    def the_call_gets_through(self) -> None:
        is_asking = self.is_in(ConsumerState.CONNECTING)
        self.exchange.slow.popleft()
        self._hang_up()
        self.end = self.counterpart.connect(self.exchange)
        self.heard.append([])
        self.may_be_made |= is_asking

    @precondition(lambda self: self.is_to(do.Connect))
    @rule()
    def the_call_reaches_no_provider(self) -> None:
        self.exchange.slow.popleft()
        self.counterpart.fail_to_connect(self.exchange)

    # The provider.

    @precondition(lambda self: self.exchange.channel is not None)
    @rule(what=st.sampled_from(RESPONSES))
    def the_provider_responds(self, what: str) -> None:
        self._hears(what)

    @precondition(lambda self: self.exchange.channel is not None)
    @rule(what=st.sampled_from(OTHERS))
    def the_provider_says(self, what: str) -> None:
        self._hears(what)

    def _hears(self, what: str) -> None:
        kernel, end = self.exchange.kernel, self.end
        assert end is not None
        is_waited_for = kernel.state is ConsumerState.ASKING
        is_told = kernel.notice is NoticeState.TOLD
        if what == "garbage":
            self.counterpart.garble()
        else:
            message = self._message(what)
            is_response = isinstance(message, NamespaceResponse)
            end.send(message, self._bundle(what) if is_response else None)
        self.exchange.read()
        if (is_waited_for and what in NOTHING_MADE) or (is_told and what in CONFIRMATIONS):
            self.may_be_made = False
        self.is_refused |= is_waited_for and what in REFUSALS

    @precondition(lambda self: self.exchange.channel is not None)
    @rule()
    def the_provider_hangs_up(self) -> None:
        self._hang_up()
        self.exchange.read()

    def _message(self, what: str) -> Message:
        name = self.request.allocation_id
        messages: dict[str, Message] = {
            "response": NamespaceResponse(name, KINDS),
            "response of another": NamespaceResponse(f"{name}-other", KINDS),
            "response of other kinds": NamespaceResponse(name, KINDS),
            "creation failed": CreationFailed("no"),
            "not found": AllocationNotFound(name),
            "unavailable": SocketUnavailable("not now"),
            "passing failed": FdPassing("no descriptors"),
            "ended": AllocationEnded(name),
        }
        return messages[what]

    def _bundle(self, what: str) -> DescriptorBundle:
        bundle = self.counterpart.bundle()
        if what != "response of other kinds":
            return bundle
        # Announced in one order, attached in the other: only who asks the kernel can tell.
        first, second = (descriptor for _, descriptor in bundle)
        return DescriptorBundle(KINDS, (second, first))

    # What the consumer does by itself, and time.

    @precondition(lambda self: self.is_to(do.ServeSelf))
    @rule(is_able=st.booleans())
    def it_serves_itself(self, is_able: bool) -> None:
        effect = self.exchange.slow.popleft()
        service = self.exchange.service
        if not is_able:
            self.exchange.service = None
        assert isinstance(effect, do.ServeSelf)
        self.exchange.feed(self.exchange.serve_self(effect))
        self.exchange.service = service

    @precondition(lambda self: self.exchange.deadlines)
    @rule(pick=st.integers(min_value=0, max_value=2))
    def it_has_waited_long_enough(self, pick: int) -> None:
        deadlines = self.exchange.deadlines
        timers = sorted(deadlines, key=lambda timer: timer.value)
        deadlines[timers[pick % len(timers)]] = 0.0
        self.exchange.expire()

    @precondition(lambda self: self.is_to(do.ReleaseOwn))
    @rule()
    def it_releases_its_own(self) -> None:
        perform(self.exchange, self.exchange.slow.popleft())

    # What is true.

    @invariant()
    def every_promise_is_kept(self) -> None:
        exchange, name = self.exchange, self.request.allocation_id
        kernel, me = exchange.kernel, "the consumer"
        self._listen()
        own = [(me, name)] if self.is_in(*OWN) else []
        always.require(
            always.at_most_one_live_set(
                own, [me] if kernel.owes_end else [], [(me, name)] if self.may_be_made else []
            ),
            always.self_service_is_loud_and_for_a_reason(
                has_turned=exchange.fallback is not None,
                audits=len(self.fallbacks),
                is_refused=self.is_refused,
            ),
            always.one_outcome(
                is_delivered=exchange.response is not None,
                is_refused=self.is_in(ConsumerState.REFUSED, ConsumerState.FAILED),
            ),
        )
        # A connection is only kept for something that is still expected on it.
        if exchange.channel is not None:
            is_expecting = self.is_in(ConsumerState.ASKING, ConsumerState.HELD)
            assert is_expecting or kernel.notice is NoticeState.TOLD
        for said in self.heard:
            asked = [message for message in said if isinstance(message, NamespaceRequest)]
            assert asked == ([self.request] if said[:1] == [self.request] else [])
            faults = [message for message in said if isinstance(message, FdPassing)]
            assert len(faults) <= 1
            assert said[len(said) - len(faults) :] == faults, "something follows a fault"
        self._check_descriptors()

    def _check_descriptors(self) -> None:
        bundle = self.exchange.bundle
        is_held = bundle is not None and not bundle.closed
        owners: dict[Hashable, Counter[Hashable]] = {
            "the caller": Counter(self.exchange.identities if is_held else ()),
            "the node": self.counterpart.kept(),
        }
        present = open_namespaces(self.counterpart.inspector)
        present.subtract(self.before)
        always.require(always.every_descriptor_has_one_owner(present, owners))

    def _listen(self) -> None:
        if self.end is None or self.end.closed:
            return
        for received in self.end.receive():
            if isinstance(received, Delivery):
                self.heard[-1].append(received.message)

    def teardown(self) -> None:
        self.the_caller_goes()
        self._check_descriptors()

    # In one word.

    @property
    def is_idle(self) -> bool:
        return self.is_in(ConsumerState.IDLE)

    def is_in(self, *states: ConsumerState) -> bool:
        return self.exchange.kernel.state in states

    def is_to(self, effect: type[Effect]) -> bool:
        slow = self.exchange.slow
        return bool(slow) and isinstance(slow[0], effect)

    def _hang_up(self) -> None:
        if self.end is not None:
            self._listen()
            self.end.close()
            self.end = None


def adversary_for(counterpart: Counterpart) -> type[AdversarialProvider]:
    """Make a class for one test; Hypothesis makes its instances."""
    return type("Machine", (AdversarialProvider,), {"counterpart": counterpart})
