"""One request between a consumer and its provider, without waiting: the core of both consumers.

An `Exchange` feeds a `ConsumerKernel` and performs at once what it decides: sends, receives,
verifies descriptors, keeps deadlines. What takes time (connecting, self-service) it leaves in
`slow`, and waiting to its driver: `blocking` or `asynchronous`. A driver for another event loop
needs nothing else.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel, event_of
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    RemoteProtocolError,
    SocketUnavailable,
)
from statemachine.events import ConsumerInput
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    objection,
    objection_to_id,
)
from statemachine.record import expect
from statemachine.states import ConsumerState

from ..channel import Channel, Delivery, Lost, Received, Rejected
from ..descriptors import DescriptorBundle, Inspector, NamespaceIdentity, Owner, verify_bundle
from ..endpoint import begin_connect, is_provider_visible
from .kept import KeptConnection, KeptConnections, is_about

if TYPE_CHECKING:
    from ..contract import SelfService

CONNECT_TIMEOUT_S: Final = 1.0
"""How long a consumer tries to reach the provider before it serves itself."""

ANSWER_TIMEOUT_S: Final = 30.0
"""How long it waits for a whole answer."""

REDIAL_S: Final = 1.0
"""Pause before it connects again to tell of an end."""

CONNECT_WAIT_S: Final = 0.5
"""How long it waits in turn for room in a full backlog, before it looks whether it is to go on."""

SETTLE_TIMEOUT_S: Final = 2.0
"""How long leaving a handoff's context may take to tell the provider of an end that is owed."""

OWN_RELEASE_PAUSE_FIRST_S: Final = 0.001
"""Pause before the second try to release what self-service made; doubles with each."""

OWN_RELEASE_PAUSE_MAX_S: Final = 1.0
"""With a pause this long the tries end; what is left is visible and dies with this process."""

AUDIT_EVENT: Final = "namespace.handoff_failed"
"""The audit event of a consumer that turns to self-service."""

_UNCONFIRMED: Final = "the provider did not confirm the end in time"
_NOT_ABOVE: Final = (
    "the provider is in a PID namespace that is neither this one nor below it, so its PID"
    " namespaces cannot be entered; run this where the provider runs, or without a PID namespace"
)

_STANDALONE: Final = "the node is said to have no provider"
_FULL: Final = "the provider takes no connection: its backlog is full"

_GONE_ASKING: Final = "the connection was lost while the provider was asked"

_log: Final = logging.getLogger(__name__)


class Patience(NamedTuple):
    """How long a consumer waits, in seconds. The defaults are the constants above."""

    connect_s: float = CONNECT_TIMEOUT_S
    """For the socket to take the connection; where its backlog is full, `answer_s` if longer."""
    answer_s: float = ANSWER_TIMEOUT_S
    """For a whole answer."""
    redial_s: float = REDIAL_S
    """Between two connections to tell of an end."""


class Fallback(NamedTuple):
    """A turn to self-service, as it is reported to the audit."""

    allocation_id: str
    error: NamespaceError
    """Why the provider's namespaces could not be had."""
    event: str = AUDIT_EVENT


Audit: TypeAlias = Callable[[Fallback], None]
"""Where fallbacks are reported besides the log; must not raise."""


class Exchange:
    """
    One allocation of one consumer: its kernel, its connection, its timers, its descriptors.

    Owns the channel, and every descriptor until the caller has taken it out of `bundle`. For one
    thread; only `serve_self` and `release_own` may run in another.

    Args:
        kernel: decides; fed by this object alone.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does.
        patience: how long the timers run.
        audit: told of the turn to self-service.
        path: the provider's socket; None: the node has no provider, and none is asked.
        clock: monotonic seconds, for the timers.
        kept: where connections come from, and go to when they are free again; lent.
    """

    def __init__(
        self,
        kernel: ConsumerKernel,
        inspector: Inspector,
        service: SelfService | None,
        patience: Patience,
        audit: Audit | None,
        path: str | os.PathLike[str] | None,
        clock: Callable[[], float] = time.monotonic,
        kept: KeptConnections | None = None,
    ) -> None:
        self.kernel = kernel
        self.inspector = inspector
        self.service = service
        self.patience = patience
        self.audit = audit
        self.path = path
        self.clock = clock
        # Whether the provider is told to end what it may have made.
        self.tells_end = True
        self.channel: Channel | None = None
        # Effects that take time, for the driver to perform, in order.
        self.slow: deque[Effect] = deque()
        # When each running timer expires, on the clock.
        self.deadlines: dict[Timer, float] = {}
        # What the caller gets; each is None until it is known.
        self.bundle: DescriptorBundle | None = None
        self.response: NamespaceResponse | None = None
        self.identities: tuple[NamespaceIdentity, ...] = ()
        self.fallback: NamespaceError | None = None
        self.refusal: NamespaceError | None = None
        self._unreachable: SocketUnavailable | None = None
        self._kept = kept
        # What was had on this connection before.
        self._former: frozenset[str] = frozenset()
        # Whether something was said on it about this allocation.
        self._is_heard = False
        # Whether nothing more will be said about it, but for what has crossed it.
        self._is_last_word = False
        # Whether a kept connection was lost before that, and the request is said again on another.
        self._asks_again = False
        # A connection that is free again, until everything that came with the last word is seen.
        self._freed: Channel | None = None
        # Of the message that is being fed to the kernel: its effects say whose they become.
        self._arrived: DescriptorBundle | None = None
        self._arrived_identities: tuple[NamespaceIdentity, ...] = ()

    @property
    def _name(self) -> str:
        return self.kernel.request.allocation_id

    @property
    def _is_asking(self) -> bool:
        """Whether a connection is wanted to say a request on."""
        return self.kernel.state is ConsumerState.CONNECTING or self._asks_again

    @property
    def is_settled(self) -> bool:
        """Whether the request has its outcome."""
        return self.response is not None or self.refusal is not None

    @property
    def is_over(self) -> bool:
        """Whether the allocation has ended, as far as is known here."""
        return self.kernel.state is ConsumerState.ENDED

    @property
    def owes_end(self) -> bool:
        """Whether the provider still has to be told of an end."""
        return self.kernel.owes_end

    @property
    def is_done(self) -> bool:
        """Whether it is over, and nothing is left to be told to the provider or to be undone."""
        return self.is_over and not self.owes_end and not self.slow

    def raise_unless_over(self) -> None:
        """
        Say why an end that was asked for did not come about.

        Raises:
            AllocationNotFound: the provider does not know the allocation.
            SocketUnavailable: it could not be reached, or has not confirmed.
        """
        if self.refusal is not None:
            raise self.refusal
        if not self.is_over:
            raise self._unreachable or SocketUnavailable(_UNCONFIRMED)

    # --- Events in -----------------------------------------------------------------------------

    def feed(self, event: ConsumerInput) -> None:
        """
        Give the kernel an event, and perform what it decides.

        Raises:
            ProtocolError: the kernel refuses the event; nothing changed.
        """
        for effect in self.kernel.receive(event):
            perform = _PERFORMERS.get(type(effect))
            if perform is None:
                self.slow.append(effect)
            else:
                perform(self, effect)

    def read(self) -> None:
        """Take in what has arrived; call it when the channel is readable."""
        channel = self.channel
        if channel is None:
            return
        for received in channel.receive():
            if self.channel is channel:
                self._feed_received(received)
                continue
            # The message before it was the last that is wanted.
            self._drop_freed()
            if isinstance(received, Delivery):
                received.bundle.close()
        self._keep_freed()

    def write(self) -> None:
        """Send what waits for room; call it when the channel is writable."""
        if self.channel is not None:
            with suppress(FdPassing):
                self.channel.flush()

    def expire(self) -> None:
        """Feed the expiry of every timer that is due."""
        now = self.clock()
        for timer, deadline in sorted(self.deadlines.items(), key=lambda item: item[1]):
            # Feeding one expiry can stop the next timer.
            if deadline <= now and self.deadlines.pop(timer, None) is not None:
                self.feed(_EXPIRIES[timer]())

    def hurry(self) -> None:
        """Connect now where a pause was to come first."""
        if self.deadlines.pop(Timer.REDIAL, None) is not None:
            self.feed(on.NoticeDue())

    def want_end(self) -> None:
        """Ask for the end of what the caller has; nothing happens if there is nothing to end."""
        if self.kernel.state in _ENDABLE:
            # A caller that says so ends also what it has joined; after self-service, only its own.
            self.tells_end |= self.kernel.state is ConsumerState.HELD
            self.feed(on.EndWanted())

    def withdraw(self) -> None:
        """Tell the provider to end what it has made, or may yet make: the caller has given up."""
        if self.kernel.state in _WITHDRAWABLE:
            self.feed(on.EndWanted())

    def withdraw_from_any_state(self) -> None:
        """Do so after an exception that may have come between two instructions."""
        if self.channel is not None and self.channel.wants_write:
            # What is kept for sending may have been sent, and would be sent again.
            self._drop_channel()
        self.withdraw()

    def close(self) -> None:
        """Close the channel and all descriptors that the caller has not taken out."""
        if self.channel is not None and self.kernel.state is ConsumerState.HELD:
            # It is held on, without the provider: an end that is wanted later has to connect.
            self.feed(on.ConnectionLost(reason="closed here"))
        self._drop_channel()
        self._drop_freed()
        self.deadlines.clear()
        self.slow.clear()
        if self.bundle is not None:
            self.bundle.close()

    def _feed_received(self, received: Received) -> None:
        match received:
            case Delivery(message=message, bundle=bundle):
                self._feed_message(message, bundle)
            case Rejected(error=error):
                self._feed_fault(error.reason)
            case Lost(reason=reason):
                self._drop_channel()
                if self._former and not self._is_heard and self.kernel.state is _ASKING:
                    # Keeps SELF-17.
                    self._asks_again, self._former = True, frozenset()
                    self.slow.append(do.Connect())
                    return
                self.feed(on.ConnectionLost(reason=reason))

    def _feed_message(self, message: Message, bundle: DescriptorBundle) -> None:
        self._arrived = bundle
        try:
            if self._is_stale(message):
                return
            event = self._verified(event_of(self.kernel.request, message), bundle)
            self._is_heard = True
            self._is_last_word = isinstance(event, _LAST_WORDS)
            self.feed(event)
        except RemoteProtocolError as error:
            self._feed_fault(str(error))
        finally:
            self._is_last_word = False
            if self._arrived is not None:
                self._arrived.close()
                self._arrived = None

    def _is_stale(self, message: Message) -> bool:
        """Say whether it is the end of an allocation that was had on this connection before."""
        # Keeps END-22.
        # What has crossed the last word about that comes before the first about this.
        former = self._former - {self._name} if self._is_heard else self._former
        return is_about(message, former)

    def _verified(self, event: ConsumerInput, bundle: DescriptorBundle) -> ConsumerInput:
        """Ask the Linux kernel whether the descriptors are what the response says they are."""
        # Keeps FD-8, FD-10.
        if isinstance(event, on.ResponseReceived):
            try:
                self._arrived_identities = verify_bundle(bundle, self.inspector)
            except FdPassing as error:
                return on.ResponseMismatched(error.reason)
        return event

    def _feed_fault(self, reason: str) -> None:
        self._is_last_word = False
        event = on.FrameRejected(reason)
        try:
            self.feed(event)
        except RemoteProtocolError:
            # Nothing is expected from this connection any more: closing it is all there is to do.
            self._drop_channel()

    # --- What takes time: the driver calls these -------------------------------------------------

    def connect_deadline(self) -> float:
        """Say until when it is tried to connect, on the clock."""
        # Only a request waits to get into a full backlog. To tell of an end, another connection is
        # tried later, and a caller who waits for self-service must not wait for that as well.
        if self._asks_again:
            return self.deadlines.get(Timer.ANSWER, self.clock())
        if self.kernel.state is not ConsumerState.CONNECTING:
            return self.clock()
        # A provider listens, and has much to do: it is its answer that is waited for.
        return self.clock() + max(self.patience.connect_s, self.patience.answer_s)

    def try_to_connect(self, wait_s: float = 0.0) -> socket.socket | SocketUnavailable | None:
        """
        Connect; may run in a thread. `take_connection` takes what is returned, and owns it.

        Args:
            wait_s: for room in a full backlog.

        Returns:
            A connected socket, which the caller owns; why there is none; None if there was no room.
        """
        # Keeps SELF-16.
        if self.path is None:
            return SocketUnavailable(_STANDALONE)
        try:
            sock = begin_connect(self.path, wait_s)
        except BlockingIOError:
            return None
        except SocketUnavailable as error:
            # Anew: a fallback may be kept for long, and this one has the frames it came through.
            return SocketUnavailable(error.reason)
        if self._could_enter(sock):
            return sock
        sock.close()
        return SocketUnavailable(_NOT_ABOVE)

    def take_connection(
        self, outcome: socket.socket | SocketUnavailable | None, deadline: float
    ) -> float:
        """
        Go on with what `try_to_connect` returned.

        Args:
            outcome: owned from here on.
            deadline: see `connect_deadline`.

        Returns:
            How long to wait for room in another try; 0.0 if none is to follow.
        """
        if outcome is None:
            left_s = deadline - self.clock()
            if left_s > 0:
                return min(left_s, CONNECT_WAIT_S)
            outcome = SocketUnavailable(_FULL)
        if isinstance(outcome, SocketUnavailable):
            self.not_connected(outcome)
        else:
            self.connected(outcome)
        return 0.0

    def _could_enter(self, sock: socket.socket) -> bool:
        """Say whether a PID namespace of this provider could be entered, if one is wanted."""
        # Keeps SELF-13.
        is_wanted = self._is_asking and NamespaceType.PID in self.kernel.request.namespaces
        return not is_wanted or is_provider_visible(sock)

    def connected(self, sock: socket.socket) -> None:
        """Go on with a connected socket, which is owned from here on."""
        self._go_on_with(Channel(sock, accepts_descriptors=True))

    def reuse(self) -> bool:
        """Go on with a connection that was kept; say whether there is one that will do."""
        kept = None if self._kept is None or self._asks_again else self._kept.take()
        if kept is None:
            return False
        # Of an end that is said again it could not be told which of the two is answered.
        is_clear = self._is_asking or self._name not in kept.former
        if not is_clear or not self._could_enter(kept.channel.sock):
            kept.channel.close()
            return False
        self._former = kept.former
        self._go_on_with(kept.channel)
        return True

    def _go_on_with(self, channel: Channel) -> None:
        self.channel = channel
        self._unreachable = None
        asks_again, self._asks_again = self._asks_again, False
        if not asks_again:
            self.feed(on.Connected())
        elif self.kernel.state is _ASKING:
            self._send(self.kernel.request)
        else:
            self._drop_channel()
            self.feed(on.ConnectionLost(reason=_GONE_ASKING))

    def not_connected(self, error: SocketUnavailable) -> None:
        """Go on without a connection."""
        self._unreachable = error
        if self._asks_again:
            self._asks_again = False
            self.feed(on.ConnectionLost(reason=error.reason))
        else:
            self.feed(on.ProviderUnreachable(error))

    def serve_self(self, effect: do.ServeSelf) -> ConsumerInput:
        """Make the namespaces here; may run in a thread. The event returned is to be fed."""
        if self.service is None:
            assert self.fallback is not None
            return on.SelfServiceFailed(self.fallback)
        try:
            return on.SelfServed(self._make_own(self.service, effect.request))
        except NamespaceError as error:
            why = error.text
        except Exception as error:
            # A bug of the service costs this allocation, and the caller does not wait for ever.
            _log.exception("self-service of %s failed", effect.request.allocation_id)
            why = f"{type(error).__name__}: {error}"
        reason = f"self-service failed too: {why} (the provider: {self.fallback})"
        return on.SelfServiceFailed(CreationFailed(reason))

    def _make_own(self, service: SelfService, request: NamespaceRequest) -> NamespaceResponse:
        """Make the namespaces and open them: both, or nothing is left of either."""
        # Keeps SELF-2, SELF-5.
        is_free = service.why_alive(request.allocation_id) is None
        try:
            response = service.create_namespaces(request)
        except CreationFailed:
            if is_free:  # else the name is that of another handoff's set
                self.release_own()
            raise
        try:
            self.bundle = service.bundle_of(request.allocation_id)
            self.identities = tuple(
                self.inspector.inspect(descriptor.fileno()) for _, descriptor in self.bundle
            )
        except BaseException:
            # Also when interrupted: the kernel does not know of this set, and would not end it.
            self.release_own()
            raise
        return response

    def release_own(self) -> None:
        """Release what self-service made, or log why not; may run in a thread."""
        assert self.service is not None
        name = self.kernel.request.allocation_id
        if self.bundle is not None:
            # An open namespace is a live one: with these the release could never be complete.
            self.bundle.close()
        pause_s = OWN_RELEASE_PAUSE_FIRST_S
        while (why := _try_to_release(self.service, name)) is not None:
            if pause_s >= OWN_RELEASE_PAUSE_MAX_S:
                _log.warning("%s: what self-service made is not released: %s", name, why)
                return
            time.sleep(pause_s)
            pause_s *= 2.0

    # --- Effects that are performed at once ------------------------------------------------------

    def _start_timer(self, effect: do.StartTimer) -> None:
        is_redial = effect.timer is Timer.REDIAL
        span_s = self.patience.redial_s if is_redial else self.patience.answer_s
        self.deadlines[effect.timer] = self.clock() + span_s

    def _stop_timer(self, effect: do.StopTimer) -> None:
        self.deadlines.pop(effect.timer, None)

    def _send_request(self, effect: do.SendRequest) -> None:
        self._send(effect.request)

    def _send_end(self, effect: do.SendEnd) -> None:
        # Keeps RUN-6.
        if self.tells_end:
            self._send(AllocationEnded(effect.allocation_id))

    def _send_fault(self, effect: do.SendFault) -> None:
        self._send(FdPassing(effect.reason))

    def _send(self, message: Message) -> None:
        if self.channel is None:
            return
        # If the provider is gone, the channel says so again when it is read, as `Lost`.
        with suppress(FdPassing):
            self.channel.send(message)

    def _close_channel(self, effect: do.CloseChannel) -> None:
        # Keeps END-23.
        if self._is_last_word and self._kept is not None:
            self._freed, self.channel = self.channel, None
        self._drop_channel()
        # The kernel gave up the call that is under way, too; it will not hear of its outcome.
        for other in tuple(self.slow):
            if isinstance(other, do.Connect):
                self.slow.remove(other)

    def _drop_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _keep_freed(self) -> None:
        if self._freed is not None:
            assert self._kept is not None
            self._kept.put(KeptConnection(self._freed, self._former | {self._name}))
            self._freed = None

    def _drop_freed(self) -> None:
        if self._freed is not None:
            self._freed.close()
            self._freed = None

    def _deliver(self, effect: do.DeliverDescriptors) -> None:
        # Keeps FD-12.
        # What self-service made is in `bundle` already.
        if not effect.is_degraded:
            self.bundle, self._arrived = self._arrived, None
            self.identities = self._arrived_identities
        self.response = effect.response

    def _discard(self, effect: do.DiscardDescriptors) -> None:
        # Keeps SELF-9.
        if self._arrived is not None:
            self._arrived.close()

    def _report_fallback(self, effect: do.ReportFallback) -> None:
        # Keeps SELF-4, SELF-16.
        self.fallback = effect.error
        if self.path is None:
            return
        _log.warning(
            "%s: %s: %s; %s",
            AUDIT_EVENT,
            effect.allocation_id,
            effect.error,
            "no self-service is allowed" if self.service is None else "serving itself",
            extra={"event": AUDIT_EVENT, "allocation_id": effect.allocation_id},
        )
        if self.audit is not None:
            self.audit(Fallback(effect.allocation_id, effect.error))

    def _report_refusal(self, effect: do.ReportRefusal) -> None:
        self.refusal = effect.error

    def _report_end(self, effect: do.ReportEnd) -> None:
        """Nothing to do: the kernel's state says it."""


def _try_to_release(service: SelfService, name: str) -> str | None:
    """Try once; say what is left, or None when nothing is."""
    try:
        service.release_namespaces(name)
        return service.why_alive(name)
    except AllocationNotFound:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


_PERFORMERS: Final[dict[type[Effect], Callable[[Exchange, Any], None]]] = {
    do.StartTimer: Exchange._start_timer,
    do.StopTimer: Exchange._stop_timer,
    do.SendRequest: Exchange._send_request,
    do.SendEnd: Exchange._send_end,
    do.SendFault: Exchange._send_fault,
    do.CloseChannel: Exchange._close_channel,
    do.DeliverDescriptors: Exchange._deliver,
    do.DiscardDescriptors: Exchange._discard,
    do.ReportFallback: Exchange._report_fallback,
    do.ReportRefusal: Exchange._report_refusal,
    do.ReportEnd: Exchange._report_end,
}
"""What is performed at once; every other effect is slow."""

_LAST_WORDS: Final = (on.EndAnnounced, on.NotFoundReceived, on.CreationRefused)
"""With these the provider has answered everything, where the kernel then hangs up."""

_ASKING: Final = ConsumerState.ASKING
_ENDABLE: Final = frozenset({ConsumerState.HELD, ConsumerState.SELF_HELD})
_WITHDRAWABLE: Final = _ENDABLE | {ConsumerState.CONNECTING, ConsumerState.ASKING}

_EXPIRIES: Final[dict[Timer, Callable[[], ConsumerInput]]] = {
    Timer.ANSWER: on.AnswerOverdue,
    Timer.NOTICE: on.NoticeOverdue,
    Timer.REDIAL: on.NoticeDue,
}


# --- What both forms of a consumer show ----------------------------------------------------------


class BaseHandoff(Owner):
    """What `Handoff` and `AsyncHandoff` have in common: the namespaces, and how they were had."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def request(self) -> NamespaceRequest:
        """What was asked for."""
        return self._exchange.kernel.request

    @property
    def response(self) -> NamespaceResponse:
        """The metadata; from the provider, or in the same form from self-service."""
        assert self._exchange.response is not None
        return self._exchange.response

    @property
    def bundle(self) -> DescriptorBundle:
        """The descriptors, in request order and each by type; the handoff's caller owns them."""
        assert self._exchange.bundle is not None
        return self._exchange.bundle

    @property
    def identities(self) -> tuple[NamespaceIdentity, ...]:
        """Which namespaces they are, verified with the Linux kernel, in request order."""
        return self._exchange.identities

    @property
    def is_own(self) -> bool:
        """Whether self-service made them."""
        return self._exchange.fallback is not None

    @property
    def is_degraded(self) -> bool:
        """Whether self-service made them because the provider's could not be had."""
        return self.fallback is not None

    @property
    def fallback(self) -> NamespaceError | None:
        """Why the provider's namespaces could not be had; None if they were, or none was asked."""
        return None if self._exchange.path is None else self._exchange.fallback

    @property
    def is_ended(self) -> bool:
        """Whether the allocation is over, as far as is known here."""
        return self._exchange.is_over

    @property
    def owes_end(self) -> bool:
        """Whether the provider still has to be told of an end."""
        return self._exchange.owes_end

    def __repr__(self) -> str:
        maker = "self-service" if self.is_own else "the provider"
        state = self._exchange.kernel.state.value
        name = self.request.allocation_id
        return f"<{type(self).__name__} {name!r} by {maker}, {state}: {self.bundle!r}>"


H = TypeVar("H", bound=BaseHandoff)


class BaseConsumer(Owner, Generic[H]):
    """
    What `Consumer` and `AsyncConsumer` have in common: how the provider is reached.

    Args:
        path: the provider's socket; None: the node has no provider, and none is asked.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does.
        patience: how long to wait.
        audit: told of every turn to self-service.
        joins: what it asks for is there already and others use it: giving up does not end it.
        keeps: how many connections are kept for later requests, once their allocation is over.

    Raises:
        TypeError: `path` is no path in text.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        inspector: Inspector,
        *,
        service: SelfService | None = None,
        patience: Patience | None = None,
        audit: Audit | None = None,
        joins: bool = False,
        keeps: int = 0,
    ) -> None:
        if path is not None:
            expect("path", os.fspath(path) if isinstance(path, os.PathLike) else path, str)
        self._path = path
        self._inspector = inspector
        self._service = service
        self._patience = patience or Patience()
        self._audit = audit
        self._joins = joins
        self._kept = KeptConnections(keeps) if keeps else None
        self._handoffs: dict[str, H] = {}
        self._is_closed = False

    def handoff_of(self, allocation_id: str) -> H:
        """
        Take the handoff that `request_namespaces` kept; the caller owns it from here on.

        Raises:
            KeyError: nothing is kept for this allocation.
            ValueError: the consumer is closed.
        """
        self._expect_open()
        return self._handoffs.pop(allocation_id)

    def __repr__(self) -> str:
        fallback = "without self-service" if self._service is None else "with self-service"
        place = "no provider" if self._path is None else repr(os.fspath(self._path))
        state = ", closed" if self._is_closed else ""
        return f"<{type(self).__name__} of {place}, {fallback}{state}>"

    @property
    def _clock(self) -> Callable[[], float]:
        return time.monotonic

    def _expect_open(self) -> None:
        if self._is_closed:
            raise ValueError("the consumer is closed")

    def _close_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def _keep(self, handoff: H) -> H | None:
        """Keep a handoff for `handoff_of`; return what is to be closed instead."""
        if self._is_closed:  # since it was asked for
            return handoff
        name = handoff.request.allocation_id
        replaced = self._handoffs.pop(name, None)
        self._handoffs[name] = handoff
        return replaced

    def _exchange(self, request: NamespaceRequest) -> Exchange:
        self._expect_open()
        return Exchange(
            ConsumerKernel(request),
            self._inspector,
            self._service,
            self._patience,
            self._audit,
            self._path,
            self._clock,
            self._kept,
        )

    def _begin(self, request: NamespaceRequest) -> Exchange:
        reason = objection(request)
        if reason is not None:
            raise CreationFailed(reason)
        exchange = self._exchange(request)
        exchange.tells_end = not self._joins
        exchange.feed(on.NamespacesWanted())
        return exchange

    def _begin_end(self, allocation_id: str) -> Exchange:
        if objection_to_id(allocation_id) is not None:
            raise AllocationNotFound(allocation_id)
        exchange = self._exchange(NamespaceRequest(allocation_id, ()))
        exchange.feed(on.EndWanted())
        return exchange
