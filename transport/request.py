"""The consumer's driver, in two forms over one kernel: `Consumer` blocks, `AsyncConsumer` awaits.

A call to `obtain` opens one connection, carries one allocation on it, and returns a handoff that
holds the descriptors. The connection stays open as long as the handoff does, because the provider
announces the end on it.

What both forms share is `_Exchange`: the kernel, the channel, and everything that can be done at
once. What can take time (calling the provider, self-service) and waiting itself is left to the
form.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TypeAlias

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
from statemachine.events import Event
from statemachine.lifecycle import ConsumerState
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    objection,
    objection_to_id,
)

from .channel import Channel, Delivery, Lost, Received, Rejected
from .contract import SelfService
from .descriptors import (
    DescriptorBundle,
    Inspector,
    NamespaceIdentity,
    verify_bundle,
)
from .endpoint import begin_connect

CONNECT_TIMEOUT_S: Final = 1.0
"""How long a consumer tries to reach the provider before it serves itself."""

ANSWER_TIMEOUT_S: Final = 30.0
"""How long it waits for a whole answer."""

REDIAL_S: Final = 1.0
"""Pause before it calls again to tell of an end."""

CONNECT_PAUSE_S: Final = 0.01
"""Pause between two tries to get into a full backlog."""

SETTLE_TIMEOUT_S: Final = 2.0
"""How long leaving a handoff's context may take to tell the provider of an end that is owed."""

AUDIT_EVENT: Final = "namespace.handoff_failed"
"""The audit event of a consumer that turns to self-service."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a consumer waits, in seconds. The defaults are the constants above."""

    connect_s: float = CONNECT_TIMEOUT_S
    """For the socket to take the call."""
    answer_s: float = ANSWER_TIMEOUT_S
    """For a whole answer."""
    redial_s: float = REDIAL_S
    """Between two calls to tell of an end."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Told to the audit when a consumer turns to self-service."""

    allocation_id: str
    error: NamespaceError
    """Why the provider's namespaces could not be had."""
    event: str = AUDIT_EVENT


Audit: TypeAlias = Callable[[Fallback], None]
"""Where fallbacks are reported besides the log; must not raise."""


@dataclass(slots=True)
class _Exchange:
    """One allocation under way: all that both forms of the consumer have in common."""

    kernel: ConsumerKernel
    inspector: Inspector
    service: SelfService | None
    patience: Patience
    audit: Audit | None
    path: str | os.PathLike[str]
    channel: Channel | None = None
    slow: deque[Effect] = field(default_factory=deque)
    """Effects that take time, for the form to perform."""
    deadlines: dict[Timer, float] = field(default_factory=dict)
    """When each running timer expires, on the monotonic clock."""
    arrived: DescriptorBundle | None = None
    """Descriptors of the message that is being fed to the kernel."""
    arrived_identities: tuple[NamespaceIdentity, ...] = ()
    """Which namespaces those are."""
    bundle: DescriptorBundle | None = None
    """What the caller gets."""
    response: NamespaceResponse | None = None
    identities: tuple[NamespaceIdentity, ...] = ()
    fallback: NamespaceError | None = None
    refusal: NamespaceError | None = None
    unreachable: SocketUnavailable | None = None
    """Why the last call to the provider did not get through."""

    @property
    def is_settled(self) -> bool:
        """Whether the request has its outcome."""
        return self.response is not None or self.refusal is not None

    @property
    def is_over(self) -> bool:
        return self.kernel.state is ConsumerState.ENDED

    @property
    def is_done(self) -> bool:
        """Whether it is over, and nothing is left to be said to the provider or to be undone."""
        return self.is_over and not self.kernel.owes_end and not self.slow

    # Feeding.

    def feed(self, event: Event) -> None:
        for effect in self.kernel.receive(event):
            perform = _AT_ONCE.get(type(effect))
            if perform is None:
                self.slow.append(effect)
            else:
                perform(self, effect)

    def feed_received(self, received: Received) -> None:
        """Name what came off the channel, and feed that."""
        match received:
            case Delivery(message=message, bundle=bundle):
                self._feed_message(message, bundle)
            case Rejected(error=error):
                self._feed_fault(error.reason)
            case Lost(reason=reason):
                self._drop_channel()
                self.feed(on.ConnectionLost(reason=reason))

    def _feed_message(self, message: Message, bundle: DescriptorBundle) -> None:
        self.arrived = bundle
        try:
            self.feed(self._verified(event_of(self.kernel.request, message), bundle))
        except RemoteProtocolError as error:
            self._feed_fault(str(error))
        finally:
            if self.arrived is not None:
                self.arrived.close()
                self.arrived = None

    def _verified(self, event: Event, bundle: DescriptorBundle) -> Event:
        """Ask the Linux kernel whether the descriptors are what the response says they are."""
        # Keeps FD-8, FD-10.
        if isinstance(event, on.ResponseReceived):
            try:
                self.arrived_identities = verify_bundle(bundle, self.inspector)
            except FdPassing as error:
                return on.ResponseMismatched(error.reason)
        return event

    def _feed_fault(self, reason: str) -> None:
        event = on.FrameRejected(reason)
        try:
            self.feed(event)
        except RemoteProtocolError:
            # Nothing is expected from this connection any more: closing it is all there is to do.
            self._drop_channel()

    def expire(self, now: float) -> None:
        """Feed the expiry of every timer that is due."""
        for timer, deadline in sorted(self.deadlines.items(), key=lambda item: item[1]):
            if deadline <= now and self.deadlines.pop(timer, None) is not None:
                self.feed(_EXPIRIES[timer]())

    def read(self) -> None:
        """Take in whatever has arrived."""
        channel = self.channel
        if channel is None:
            return
        for received in channel.receive():
            if self.channel is channel:
                self.feed_received(received)
            elif isinstance(received, Delivery):
                received.bundle.close()

    def write(self) -> None:
        """Send what waits for room."""
        if self.channel is not None:
            with suppress(FdPassing):
                self.channel.flush()

    def hurry(self) -> None:
        """Call the provider now that was to be called later."""
        if self.deadlines.pop(Timer.REDIAL, None) is not None:
            self.feed(on.NoticeDue())

    def withdraw(self) -> None:
        """Tell a provider that is being asked that nobody waits for its answer any more."""
        if self.channel is not None and self.kernel.state is ConsumerState.ASKING:
            self.feed(on.EndWanted())

    def close(self) -> None:
        """Close the channel and whatever descriptors the caller has not taken out."""
        if self.channel is not None and self.kernel.state is ConsumerState.HELD:
            # It is held on, without the provider: an end that is wanted later has to call it.
            self.feed(on.ConnectionLost(reason="closed here"))
        self._drop_channel()
        self.deadlines.clear()
        self.slow.clear()
        if self.bundle is not None:
            self.bundle.close()

    # What the form reports of slow effects.

    def connected(self, sock: socket.socket) -> None:
        self.channel = Channel(sock, accepts_descriptors=True)
        self.unreachable = None
        self.feed(on.Connected())

    def not_connected(self, error: SocketUnavailable) -> None:
        self.unreachable = error
        self.feed(on.ProviderUnreachable(error))

    def serve_self(self, effect: do.ServeSelf) -> Event:
        """Make the namespaces here; takes its time, and may run in a thread."""
        if self.service is None:
            assert self.fallback is not None
            return on.SelfServiceFailed(self.fallback)
        try:
            return on.SelfServed(self._make_own(self.service, effect.request))
        except NamespaceError as error:
            why = error.text
        except Exception as error:
            # A bug of the service costs this allocation, and nobody waits for it for ever.
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
            if is_free:  # else there is one of that name, which is not this one's to release
                self.release_own()
            raise
        try:
            self.bundle = service.bundle_of(request.allocation_id)
            self.identities = tuple(
                self.inspector.inspect(descriptor.fileno()) for _, descriptor in self.bundle
            )
        except BaseException:
            self.release_own()
            raise
        return response

    def release_own(self) -> None:
        """Release what self-service made; takes its time, and may run in a thread."""
        assert self.service is not None
        name = self.kernel.request.allocation_id
        if self.bundle is not None:
            self.bundle.close()
        pause_s = OWN_RELEASE_PAUSE_FIRST_S
        while (why := _try_to_release(self.service, name)) is not None:
            if pause_s >= OWN_RELEASE_PAUSE_MAX_S:
                _log.warning("%s: what self-service made is not released: %s", name, why)
                return
            time.sleep(pause_s)
            pause_s *= 2.0

    # Effects that are done at once.

    def _start_timer(self, effect: do.StartTimer) -> None:
        spans = {
            Timer.ANSWER: self.patience.answer_s,
            Timer.NOTICE: self.patience.answer_s,
            Timer.REDIAL: self.patience.redial_s,
        }
        self.deadlines[effect.timer] = time.monotonic() + spans[effect.timer]

    def _stop_timer(self, effect: do.StopTimer) -> None:
        self.deadlines.pop(effect.timer, None)

    def _send_request(self, effect: do.SendRequest) -> None:
        self._send(effect.request)

    def _send_end(self, effect: do.SendEnd) -> None:
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
        self._drop_channel()
        for other in tuple(self.slow):
            if isinstance(other, do.Connect):
                self.slow.remove(other)

    def _drop_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _deliver(self, effect: do.DeliverDescriptors) -> None:
        # Keeps FD-12.
        if not effect.is_degraded:
            self.bundle, self.arrived = self.arrived, None
            self.identities = self.arrived_identities
        self.response = effect.response

    def _discard(self, effect: do.DiscardDescriptors) -> None:
        # Keeps SELF-9.
        if self.arrived is not None:
            self.arrived.close()

    def _report_fallback(self, effect: do.ReportFallback) -> None:
        # Keeps SELF-4.
        self.fallback = effect.error
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


OWN_RELEASE_PAUSE_FIRST_S: Final = 0.001
"""Pause before the second try to release what self-service made; doubles with each."""

OWN_RELEASE_PAUSE_MAX_S: Final = 1.0
"""With a pause this long the tries end; what is left is visible and dies with this process."""


def _try_to_release(service: SelfService, name: str) -> str | None:
    """Try once; say what is left, or None when nothing is."""
    try:
        service.release_namespaces(name)
        return service.why_alive(name)
    except AllocationNotFound:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


_AT_ONCE: Final[dict[type[Effect], Callable[[_Exchange, Any], None]]] = {
    do.StartTimer: _Exchange._start_timer,
    do.StopTimer: _Exchange._stop_timer,
    do.SendRequest: _Exchange._send_request,
    do.SendEnd: _Exchange._send_end,
    do.SendFault: _Exchange._send_fault,
    do.CloseChannel: _Exchange._close_channel,
    do.DeliverDescriptors: _Exchange._deliver,
    do.DiscardDescriptors: _Exchange._discard,
    do.ReportFallback: _Exchange._report_fallback,
    do.ReportRefusal: _Exchange._report_refusal,
    do.ReportEnd: _Exchange._report_end,
}

_EXPIRIES: Final[dict[Timer, Callable[[], Event]]] = {
    Timer.ANSWER: on.AnswerOverdue,
    Timer.NOTICE: on.NoticeOverdue,
    Timer.REDIAL: on.NoticeDue,
}


class _Held:
    """What a handoff shows, in both forms."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: _Exchange) -> None:
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
    def is_degraded(self) -> bool:
        """Whether self-service made them."""
        return self._exchange.fallback is not None

    @property
    def fallback(self) -> NamespaceError | None:
        """Why the provider's namespaces could not be had; None if they were."""
        return self._exchange.fallback

    @property
    def is_ended(self) -> bool:
        """Whether the allocation is over, as far as is known here."""
        return self._exchange.is_over

    @property
    def owes_end(self) -> bool:
        """Whether the provider still has to hear of an end."""
        return self._exchange.kernel.owes_end


@dataclass(frozen=True, slots=True)
class _Settings:
    """How a consumer reaches its provider; the same for both forms."""

    path: str | os.PathLike[str]
    inspector: Inspector
    service: SelfService | None = None
    patience: Patience = field(default_factory=Patience)
    audit: Audit | None = None

    def exchange(self, request: NamespaceRequest) -> _Exchange:
        kernel = ConsumerKernel(request)
        return _Exchange(kernel, self.inspector, self.service, self.patience, self.audit, self.path)

    def begin(self, request: NamespaceRequest) -> _Exchange:
        reason = objection(request)
        if reason is not None:
            raise CreationFailed(reason)
        exchange = self.exchange(request)
        exchange.feed(on.NamespacesWanted())
        return exchange


# --- The blocking form -------------------------------------------------------------------------


class Consumer:
    """
    A consumer that blocks; fulfils the seed's `NamespaceConsumer`.

    Starts no thread and no event loop, so that its caller may fork and execute right after.

    Args:
        path: the provider's socket.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does.
        patience: how long to wait.
        audit: told of every turn to self-service.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inspector: Inspector,
        *,
        service: SelfService | None = None,
        patience: Patience | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._settings = _Settings(path, inspector, service, patience or Patience(), audit)
        self._handoffs: dict[str, Handoff] = {}

    def obtain(self, request: NamespaceRequest) -> Handoff:
        """
        Obtain namespaces, from the provider or by self-service.

        When it is interrupted, the provider is told to end what it may have made, once, and
        nothing is left open here.

        Returns:
            The handoff; the caller owns it and its descriptors. `is_degraded` says whether
            self-service made them.

        Raises:
            CreationFailed: the request breaks a rule, the provider refused it, or self-service
                failed too. There are no namespaces and no descriptors.
            AllocationNotFound: the provider does not know the allocation.
            SocketUnavailable, FdPassing: the provider could not be had, and there is no
                self-service.
        """
        # Keeps SELF-3, SELF-6.
        exchange = self._settings.begin(request)
        try:
            _run(exchange, lambda: exchange.is_settled, deadline=None)
            if exchange.refusal is not None:
                raise exchange.refusal
        except BaseException:
            exchange.withdraw()
            exchange.close()
            raise
        return Handoff(exchange)

    def request_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Obtain namespaces and keep their descriptors here, to be taken with `handoff_of`.

        Raises:
            As `obtain`.

        Source:
            Seed 94-104.
        """
        handoff = self.obtain(request)
        previous = self._handoffs.pop(request.allocation_id, None)
        self._handoffs[request.allocation_id] = handoff
        if previous is not None:
            previous.close()
        return handoff.response

    def handoff_of(self, allocation_id: str) -> Handoff:
        """
        Take the handoff that `request_namespaces` kept; the caller owns it from here on.

        Raises:
            KeyError: nothing is kept for this allocation.
        """
        return self._handoffs.pop(allocation_id)

    def end(self, allocation_id: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """
        End an allocation that this consumer need not hold, and wait until the provider confirms.

        Raises:
            AllocationNotFound: the provider does not know it; no provider can, if it is no valid
                id, and none is asked.
            SocketUnavailable: the provider did not confirm in time; it may have heard.
        """
        if objection_to_id(allocation_id) is not None:
            raise AllocationNotFound(allocation_id)
        exchange = self._settings.exchange(NamespaceRequest(allocation_id, ()))
        try:
            exchange.feed(on.EndWanted())
            _run(exchange, lambda: exchange.is_over, time.monotonic() + timeout_s)
            if exchange.refusal is not None:
                raise exchange.refusal
            if not exchange.is_over:
                raise exchange.unreachable or SocketUnavailable(_UNCONFIRMED)
        finally:
            exchange.close()

    def close(self) -> None:
        """Close every handoff that was not taken."""
        while self._handoffs:
            self._handoffs.popitem()[1].close()


class Handoff(_Held):
    """
    Namespaces in hand. Leaving its context closes the descriptors and the connection.

    The allocation goes on when the handoff is closed: it ends when its cgroup empties, or when
    `end` says so.
    """

    __slots__ = ()

    def wait_ended(self, timeout_s: float) -> bool:
        """
        Wait for the allocation to be over.

        Args:
            timeout_s: seconds to wait; 0.0 only looks.

        Returns:
            Whether it is over. A provider that is gone cannot announce anything.
        """
        deadline = time.monotonic() + timeout_s
        _run(self._exchange, lambda: self._exchange.is_over, deadline)
        return self._exchange.is_over

    def end(self, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
        """
        End the allocation, and wait until the provider has confirmed.

        What self-service made is released here.

        Args:
            timeout_s: seconds to wait.

        Returns:
            Whether it is over, and everything that was owed to the provider is said. If not, a
            later call goes on.
        """
        exchange = self._exchange
        deadline = time.monotonic() + timeout_s
        if exchange.kernel.state in _ENDABLE:
            exchange.feed(on.EndWanted())
        _run(exchange, lambda: exchange.is_done, deadline)
        return exchange.is_done

    def settle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> bool:
        """
        Tell the provider of an end that is owed to it, if there is one.

        Returns:
            Whether nothing is owed any more.
        """
        deadline = time.monotonic() + timeout_s
        _run(self._exchange, lambda: not self._exchange.kernel.owes_end, deadline)
        return not self._exchange.kernel.owes_end

    def close(self) -> None:
        """
        Close the descriptors and the connection; may be called again.

        An end that is owed to the provider is said, if that can be done at once.
        """
        try:
            self._exchange.hurry()
            self.settle(0.0)
        finally:
            self._exchange.close()

    def __enter__(self) -> Handoff:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.settle()
        finally:
            self.close()


_ENDABLE: Final = frozenset({ConsumerState.HELD, ConsumerState.SELF_HELD})


def _run(exchange: _Exchange, is_done: Callable[[], bool], deadline: float | None) -> None:
    """Drive an exchange until it is done, or the deadline has passed."""
    exchange.read()
    while not is_done():
        if exchange.slow:
            _perform(exchange, exchange.slow.popleft())
            continue
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return
        if exchange.channel is None and not exchange.deadlines and deadline is None:
            raise AssertionError("nothing is left that could settle this exchange")
        _wait(exchange, now, deadline)
        exchange.expire(time.monotonic())


def _wait(exchange: _Exchange, now: float, deadline: float | None) -> None:
    ends = [*exchange.deadlines.values(), *([] if deadline is None else [deadline])]
    # One millisecond more: poll rounds down, and would return just before the deadline.
    timeout_ms = max(0.0, min(ends) - now) * 1000.0 + 1.0 if ends else None
    poll = select.poll()
    channel = exchange.channel
    if channel is not None:
        wants = select.POLLIN | (select.POLLOUT if channel.wants_write else 0)
        poll.register(channel.fileno(), wants)
    for _, happened in poll.poll(timeout_ms):
        if happened & select.POLLOUT:
            exchange.write()
        exchange.read()


def _perform(exchange: _Exchange, effect: Effect) -> None:
    match effect:
        case do.Connect():
            _connect(exchange)
        case do.ServeSelf():
            exchange.feed(exchange.serve_self(effect))
        case do.ReleaseOwn():
            exchange.release_own()
        case _:
            raise AssertionError(f"no driver performs {effect}")


def _connect(exchange: _Exchange) -> None:
    deadline = _connect_deadline(exchange)
    while not _try_to_connect(exchange, deadline):
        time.sleep(CONNECT_PAUSE_S)


def _connect_deadline(exchange: _Exchange) -> float:
    # Only a request waits to get into a full backlog. To tell of an end it is called again later,
    # and a caller who waits for self-service meanwhile must not wait for that as well.
    is_asking = exchange.kernel.state is ConsumerState.CONNECTING
    return time.monotonic() + (exchange.patience.connect_s if is_asking else 0.0)


def _try_to_connect(exchange: _Exchange, deadline: float) -> bool:
    """Call the provider once; say whether that has an outcome, or is worth another try."""
    try:
        exchange.connected(begin_connect(exchange.path))
    except SocketUnavailable as error:
        exchange.not_connected(error)
    except BlockingIOError:
        if time.monotonic() < deadline:
            return False
        exchange.not_connected(SocketUnavailable(_FULL))
    return True


_UNCONFIRMED: Final = "the provider did not confirm the end in time"
_FULL: Final = "the provider takes no connection: its backlog is full"


# --- The asyncio form --------------------------------------------------------------------------


class AsyncConsumer:
    """
    A consumer for an event loop; the same kernel, the same outcomes as `Consumer`.

    Args:
        path: the provider's socket.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does. It is
            called in a thread.
        patience: how long to wait.
        audit: told of every turn to self-service.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inspector: Inspector,
        *,
        service: SelfService | None = None,
        patience: Patience | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._settings = _Settings(path, inspector, service, patience or Patience(), audit)

    async def obtain(self, request: NamespaceRequest) -> AsyncHandoff:
        """
        Obtain namespaces, from the provider or by self-service.

        When it is cancelled, the provider is told to end what it may have made, once, and nothing
        is left open here.

        Returns:
            The handoff; the caller owns it and its descriptors.

        Raises:
            As `Consumer.obtain`.
        """
        exchange = self._settings.begin(request)
        loop = _LoopDriver(exchange)
        try:
            await loop.until(lambda: exchange.is_settled)
            if exchange.refusal is not None:
                raise exchange.refusal
        except asyncio.CancelledError:
            await loop.withdraw()
            raise
        except BaseException:
            await loop.close()
            raise
        return AsyncHandoff(exchange, loop)


class AsyncHandoff(_Held):
    """
    Namespaces in hand, in an event loop. Leaving its context closes descriptors and connection.

    While it is open, ends are noticed and debts to the provider are paid in the background.
    """

    __slots__ = ("_loop",)

    def __init__(self, exchange: _Exchange, loop: _LoopDriver) -> None:
        super().__init__(exchange)
        self._loop = loop

    async def wait_ended(self) -> None:
        """Wait for the allocation to be over; use `asyncio.wait_for` for a limit."""
        await self._loop.until(lambda: self._exchange.is_over)

    async def end(self) -> None:
        """End the allocation, and wait until the provider has confirmed."""
        exchange = self._exchange
        if exchange.kernel.state in _ENDABLE:
            self._loop.feed(on.EndWanted())
        await self._loop.until(lambda: exchange.is_done and self._loop.is_idle)

    async def close(self) -> None:
        """
        Close the descriptors and the connection; may be called again.

        An end that is owed to the provider is said, if that can be done at once.
        """
        await self._loop.close()

    async def __aenter__(self) -> AsyncHandoff:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._settle(), SETTLE_TIMEOUT_S)
        finally:
            await self.close()

    async def _settle(self) -> None:
        await self._loop.until(lambda: not self._exchange.kernel.owes_end)


class _LoopDriver:
    """Drives one exchange in an event loop: readers, one timer, and tasks for what takes time."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange
        self._loop = asyncio.get_running_loop()
        self._registered: Channel | None = None
        self._registered_fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._moved = asyncio.Event()
        self._arm()

    def feed(self, event: Event) -> None:
        self._exchange.feed(event)
        self._arm()

    async def until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            self._moved.clear()
            await self._moved.wait()

    @property
    def is_idle(self) -> bool:
        """Whether no work that takes time is under way."""
        return self._task is None

    async def withdraw(self) -> None:
        """Say goodbye to a request that nobody waits for any more, as far as goes at once."""
        await _undisturbed(self._withdraw())

    async def close(self) -> None:
        await _undisturbed(self._close())

    async def _withdraw(self) -> None:
        await self._finish_task()
        if self._exchange.kernel.state in _WITHDRAWABLE:
            self._exchange.feed(on.EndWanted())
        await self._close()

    async def _close(self) -> None:
        try:
            await self._finish_task()
            self._exchange.hurry()
            await self._perform_rest()
        finally:
            self._unregister()
            self._stop_timer()
            self._exchange.close()
            self._is_closing = False

    async def _perform_rest(self) -> None:
        slow = self._exchange.slow
        while slow:
            effect = slow.popleft()
            # Nobody wants own namespaces any more that have not even been begun.
            if not isinstance(effect, do.ServeSelf):
                await self._perform(effect)

    async def _finish_task(self) -> None:
        """
        Let work that is under way finish, and begin no more: what it makes must not be lost.

        Only waiting to get into a full backlog makes nothing.
        """
        self._is_closing = True
        if self._task is None:
            return
        if self._exchange.kernel.state is ConsumerState.CONNECTING:
            self._task.cancel()
        await asyncio.wait({self._task})

    # Keeping the loop's view in step with the exchange.

    def _arm(self) -> None:
        exchange = self._exchange
        if exchange.channel is not self._registered:
            self._unregister()
            self._register()
        if self._registered is not None:
            if self._registered.wants_write:
                self._loop.add_writer(self._registered_fd, self._on_writable)
            else:
                self._loop.remove_writer(self._registered_fd)
        self._stop_timer()
        if exchange.deadlines:
            delay_s = max(0.0, min(exchange.deadlines.values()) - time.monotonic())
            self._timer = self._loop.call_later(delay_s, self._on_time)
        if exchange.slow and self._task is None and not self._is_closing:
            self._task = self._loop.create_task(self._work(exchange.slow.popleft()))
        self._moved.set()

    def _register(self) -> None:
        channel = self._exchange.channel
        if channel is not None:
            self._registered = channel
            self._registered_fd = channel.fileno()
            self._loop.add_reader(self._registered_fd, self._on_readable)

    def _unregister(self) -> None:
        if self._registered is not None:
            self._loop.remove_reader(self._registered_fd)
            self._loop.remove_writer(self._registered_fd)
            self._registered = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_readable(self) -> None:
        self._exchange.read()
        self._arm()

    def _on_writable(self) -> None:
        self._exchange.write()
        self._arm()

    def _on_time(self) -> None:
        self._exchange.expire(time.monotonic())
        self._arm()

    async def _work(self, effect: Effect) -> None:
        try:
            await self._perform(effect)
        finally:
            self._task = None
            self._arm()

    async def _perform(self, effect: Effect) -> None:
        exchange = self._exchange
        match effect:
            case do.Connect():
                await self._connect()
            case do.ServeSelf():
                event = await self._loop.run_in_executor(None, exchange.serve_self, effect)
                exchange.feed(event)
            case do.ReleaseOwn():
                await self._loop.run_in_executor(None, exchange.release_own)
            case _:
                raise AssertionError(f"no driver performs {effect}")

    async def _connect(self) -> None:
        deadline = _connect_deadline(self._exchange)
        while not _try_to_connect(self._exchange, deadline):
            await asyncio.sleep(CONNECT_PAUSE_S)


_WITHDRAWABLE: Final = frozenset({*_ENDABLE, ConsumerState.CONNECTING, ConsumerState.ASKING})


async def _undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Await work to its end; a cancellation that comes meanwhile is passed on afterwards."""
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancellation = error
    task.result()
    if cancellation is not None:
        raise cancellation
