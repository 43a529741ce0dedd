"""Consumers' programs in a virtual world, and what their drivers must keep to.

A consumer that blocks is a virtual thread, in which any system call is a step; one with an event
loop has a `VirtualLoop`. Every exchange of either is followed by `ExchangeRules`: what its kernel
is fed must be what the provider has sent on that connection, in order and once, or a timer that has
run its time; what it decides must be what the model decides, and be done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from specs import model
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect, Timer
from statemachine.events import ConsumerInput
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
)

from ...request import AsyncConsumer, Consumer, Patience
from ...request.exchange import Exchange
from .drivers import LoopProgram
from .network import VirtualConnection
from .program import VirtualStage
from .rules import Broken, expect

_EXPIRED: Final[dict[type[Any], Timer]] = {
    on.AnswerOverdue: Timer.ANSWER,
    on.NoticeOverdue: Timer.NOTICE,
    on.NoticeDue: Timer.REDIAL,
}

_SAID_BY_PROVIDER: Final = (
    on.ResponseReceived,
    on.ResponseMismatched,
    on.CreationRefused,
    on.NotFoundReceived,
    on.ProviderUnavailable,
    on.PassingFailed,
    on.EndAnnounced,
)


class ExchangeRules:
    """
    Follows one exchange of a consumer.

    Args:
        stage: where it is.
        request: what it is for.
        patience: how long its timers run.
    """

    exchange: Exchange

    def __init__(self, stage: VirtualStage, request: NamespaceRequest, patience: Patience) -> None:
        self._stage, self._world = stage, stage.world
        self._patience = patience
        self._request = request
        self._started: dict[Timer, float] = {}
        self.model = model.Consumer(request)
        self.is_over = False

    def observe(self, event: ConsumerInput, effects: tuple[Effect, ...]) -> None:
        """Take note of what the kernel was fed and has decided."""
        try:
            self._observe(event, effects)
        except Broken as error:
            self._world.fail(error)
            raise

    def _observe(self, event: ConsumerInput, effects: tuple[Effect, ...]) -> None:
        self._world.story.append(f"    consumer's event {event}")
        timer = _EXPIRED.get(type(event))
        if timer is not None:
            since = self._started.pop(timer)
            # To tell of an end it may connect before the pause is over, when it is closed.
            is_due = timer is Timer.REDIAL or self._world.now >= since + self._span_of(timer) - 1e-9
            expect(is_due, f"{event} after {self._world.now - since:g} s")
        if isinstance(event, _SAID_BY_PROVIDER):
            self._check_heard(event)
        if isinstance(event, on.Connected):
            expect(self.exchange.channel is not None, "it is connected by nothing")
        try:
            self.model, said = model.consumer_step(self.model, event)
        except model.Impossible:
            raise Broken(f"{event} cannot be") from None
        found = model.differences(effects, said)
        expect(not found, f"{event}: {found}")
        for effect in effects:
            self._world.story.append(f"        consumer's effect {effect}")
            self._note(effect)

    def _note(self, effect: Effect) -> None:
        match effect:
            case do.StartTimer(timer=timer):
                self._started[timer] = self._world.now
            case do.StopTimer(timer=timer):
                self._started.pop(timer, None)
            case do.SendRequest(request=request):
                self._due(request)
            case do.SendEnd(allocation_id=name) if self.exchange.tells_end:
                self._due(AllocationEnded(name))

    def _due(self, message: Message) -> None:
        link = self._link()
        if link is not None:
            link.due_of_client.append(message)

    def _link(self) -> VirtualConnection | None:
        channel = self.exchange.channel
        return None if channel is None else self._stage.network.of_client(channel.sock)

    def _check_heard(self, event: Any) -> None:
        link = self._link()
        expect(link is not None, f"{event}, and it is not connected")
        assert link is not None
        while link.fed < len(link.sent_messages):
            message = link.sent_messages[link.fed]
            link.fed += 1
            if _means(event, message, self._request.allocation_id):
                return
            # Of what was had on this connection before, the end may be said again.
            other = getattr(message, "allocation_id", None)
            is_of_another = other is not None and other != self._request.allocation_id
            expect(is_of_another, f"{event}: the provider has said {message}")
        raise Broken(f"{event}: the provider has not said so")

    def _span_of(self, timer: Timer) -> float:
        is_redial = timer is Timer.REDIAL
        return self._patience.redial_s if is_redial else self._patience.answer_s

    def check_step(self) -> None:
        """Check the timers; between two steps of the driver."""
        if self.is_over:
            return
        spans = {timer: since + self._span_of(timer) for timer, since in self._started.items()}
        expect(
            self.exchange.deadlines == spans,
            f"deadlines are {self.exchange.deadlines}, and should be {spans}",
        )

    def check_rest(self) -> None:
        """Check that what is decided is done, when only time can bring anything about."""
        link = None if self.is_over else self._link()
        if link is not None and link.served is not None and link.served.fileno() >= 0:
            expect(
                link.said_messages == link.due_of_client,
                f"{link} has said {link.said_messages}, and should have {link.due_of_client}",
            )


def _means(event: Any, message: Message, name: str) -> bool:
    match event:
        case on.ResponseReceived(response=response):
            return message == response
        case on.ResponseMismatched():
            return isinstance(message, NamespaceResponse)
        case on.EndAnnounced():
            return message == AllocationEnded(name)
        case _:
            said: object = event.error
            return bool(message == said)


class FollowedKernel(ConsumerKernel):
    """A kernel that shows its rules what it is fed."""

    def __init__(self, request: NamespaceRequest, rules: ExchangeRules) -> None:
        super().__init__(request)
        self._rules = rules

    def receive(self, event: ConsumerInput) -> tuple[Effect, ...]:
        effects = super().receive(event)
        self._rules.observe(event, effects)
        return effects


class _Followed:
    """What both kinds of consumers have in common here."""

    stage: VirtualStage
    followed: list[ExchangeRules]
    _patience: Patience

    def _follow(self, exchange: Exchange) -> Exchange:
        request = exchange.kernel.request
        rules = ExchangeRules(self.stage, request, self._patience)
        rules.exchange = exchange
        exchange.kernel = FollowedKernel(request, rules)
        self.followed.append(rules)
        return exchange


class FollowedConsumer(_Followed, Consumer):
    """`Consumer`, on the world's clock, whose exchanges are followed."""

    @property
    def _clock(self) -> Callable[[], float]:
        return lambda: self.stage.world.now

    def _exchange(self, request: NamespaceRequest) -> Exchange:
        return self._follow(super()._exchange(request))


class FollowedAsyncConsumer(_Followed, AsyncConsumer):
    """`AsyncConsumer`, whose exchanges are followed."""

    def _exchange(self, request: NamespaceRequest) -> Exchange:
        return self._follow(super()._exchange(request))


class ConsumerProgram:
    """
    A consumer's program: it does what it is for, and ends.

    Args:
        stage: where it runs.
        name: its own.
        keeps: how many connections are kept.
        patience: how long its timers run.
    """

    steps_at_calls = True

    def __init__(
        self, stage: VirtualStage, name: str, keeps: int = 0, patience: Patience | None = None
    ) -> None:
        self.stage, self.name = stage, name
        self.followed: list[ExchangeRules] = []
        self.has_ended = False
        self.was_killed = False
        self._keeps, self._patience = keeps, patience or Patience()
        stage.consumers.append(self)
        stage.world.at_rest.append(self._check_rest)

    def start(self, life: Callable[[Consumer], object]) -> None:
        """Run it with a consumer that blocks."""

        def main() -> None:
            with self._made(FollowedConsumer) as consumer:
                life(consumer)
            self.has_ended = True

        self.stage.world.start(main, self.name, self)

    def _made(self, kind: Any) -> Any:
        inspector = self.stage.backend.inspector
        consumer = kind(self.stage.path, inspector, patience=self._patience, keeps=self._keeps)
        consumer.stage, consumer.followed = self.stage, self.followed
        return consumer

    def kill(self) -> None:
        """Kill it where it stands."""
        self.was_killed = True
        for rules in self.followed:
            rules.is_over = True
        self.stage.world.end_program(self)
        self.stage.world.urgent.append(self.drop)

    def drop(self) -> None:
        """Close what the kernel closes when a program is killed."""
        self.has_ended = True
        for rules in self.followed:
            rules.is_over = True
            for owned in (rules.exchange.channel, rules.exchange.bundle):
                if owned is not None:
                    owned.close()
        self._bury()

    def _bury(self) -> None:
        """Nothing more to do without a loop."""

    def _check_rest(self) -> None:
        if not self.has_ended:
            for rules in self.followed:
                rules.check_rest()


class LoopConsumerProgram(ConsumerProgram):
    """A consumer's program with an event loop."""

    steps_at_calls = False

    def __init__(
        self, stage: VirtualStage, name: str, keeps: int = 0, patience: Patience | None = None
    ) -> None:
        super().__init__(stage, name, keeps, patience)
        self._running = LoopProgram(stage.world, name, self)
        self.loop = self._running.loop
        stage.world.after_step.append(self._check_step)

    def start_async(self, life: Callable[[AsyncConsumer], Awaitable[object]]) -> None:
        """Run it."""

        async def work() -> None:
            async with self._made(FollowedAsyncConsumer) as consumer:
                await life(consumer)

        self._running.run(work, then=self._end)

    def _end(self) -> None:
        self.has_ended = True

    def cancel(self) -> None:
        """Cancel what it does."""
        self._running.cancel()

    def _check_step(self) -> None:
        if self.has_ended or self.loop.firing is not None:
            return
        for rules in self.followed:
            if not rules.exchange.slow and rules.exchange.deadlines:
                rules.check_step()
                first = min(rules.exchange.deadlines.values())
                running = [t.when() for t, _ in self.loop.timers()]
                expect(first in running, f"a deadline at {first:g} is not timed: {running}")

    def _bury(self) -> None:
        self._running.abandon()
