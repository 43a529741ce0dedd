"""A consumer's program in a world: what its caller asks for, and what its driver does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from specs import invariants as always

from ... import effects as do
from ... import events as on
from ...consumer import event_of as consumer_event_of
from ...effects import Effect, Timer
from ...errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    SocketUnavailable,
)
from ...events import ConsumerInput
from ...messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
)
from ...states import ConsumerState, NoticeState
from .kernels import ConsumerView
from .server import LIVE, ServerDraft, Setting, may
from .world import (
    CUT,
    FAILED_TO_PASS,
    MISMATCHED,
    NOT_FOUND,
    Client,
    Link,
    Move,
    ServerState,
    Violation,
    bit_of,
    has_news_for_consumer,
    timers_in,
)

DONE: Final = frozenset({ConsumerState.REFUSED, ConsumerState.FAILED, ConsumerState.ENDED})
_ENDABLE: Final = frozenset(
    {
        ConsumerState.CONNECTING,
        ConsumerState.ASKING,
        ConsumerState.HELD,
        ConsumerState.SELF_HELD,
    }
)
_FATES: Final = (
    "",
    ", cut off",
    ", mismatched",
    ", turned into NotFound",
    ", turned into FdPassing",
)


def link_of(server: ServerState, index: int) -> Link | None:
    """Find the connection that a client has."""
    for link in server.links:
        if link.client == index + 1 and link.has_consumer:
            return link
    return None


def client_moves(setting: Setting, server: ServerState, index: int, client: Client) -> list[Move]:
    """List what may happen now to a client."""
    found: list[Move] = []
    bounds = setting.bounds
    view: ConsumerView | None = setting.kernels.consumer_views[client.kernel]
    is_free = view is None or (view.hold in DONE and not view.owes_end)
    if is_free and (bounds.requests_each is None or client.requests_made < bounds.requests_each):
        for number in range(len(bounds.requests)):
            found.append(("want", index, number))
            found.append(("end by name", index, number))
    if view is not None:
        _moves_of_program(setting, server, index, client, view, found)
    return [move for move in found if may(setting, server, move)]


def _moves_of_program(
    setting: Setting,
    server: ServerState,
    index: int,
    client: Client,
    view: ConsumerView,
    found: list[Move],
) -> None:
    if client.is_calling:
        if not server.provider:
            found.append(("unreached", index))
        else:
            found.append(("refuse call", index))
            if len(server.links) < setting.bounds.connections:
                found.append(("connect", index))
    link = link_of(server, index)
    if link is not None and has_news_for_consumer(link):
        found.append(("hear", index))
    if client.is_serving:
        found.append(("serve self", index))
        found.append(("fail self", index))
    if view.hold in _ENDABLE:
        found.append(("end", index))
    for timer in timers_in(client.timers):
        word = "redial" if timer is Timer.REDIAL else "overdue"
        found.append((word, index, timer.value))
    found.append(("die", index))


class ClientDraft:
    """A client and the server state beside it, while a move is made."""

    def __init__(self, setting: Setting, server: ServerState, index: int, client: Client) -> None:
        self.setting = setting
        self.server = ServerDraft(setting, server)
        self.index = index
        self.client = client
        link = link_of(server, index)
        self.link = link.number if link else 0
        self.has_parcel = False

    def make(self, move: Move) -> None:
        """Make a move; raises `Violation` or `InvariantBroken` if it breaks a promise."""
        self.server.spend(move)
        CLIENT_MOVES[move[0]](self, *move[2:])
        self._check()
        if self._is_over():
            self.leave()

    def set(self, **changes: Any) -> None:
        self.client = self.client._replace(**changes)

    @property
    def view(self) -> ConsumerView:
        view: ConsumerView = self.setting.kernels.consumer_views[self.client.kernel]
        return view

    def _check(self) -> None:
        if not self.client.kernel:
            return
        view = self.view
        if view.is_connected != bool(self.link):
            raise Violation("a consumer's kernel is wrong about its connection")
        is_expecting = view.hold in (ConsumerState.ASKING, ConsumerState.HELD)
        if self.link and not is_expecting and view.notice is not NoticeState.TOLD:
            raise Violation("a connection is kept on which nothing is expected")

    def _is_over(self) -> bool:
        """Whether nothing can come of this request any more."""
        client = self.client
        if not client.kernel or self.link:
            return False
        is_idle = not (client.timers or client.is_calling or client.is_serving or client.has_own)
        return is_idle and self.view.hold in DONE and not self.view.owes_end

    # --- The caller ----------------------------------------------------------------------------

    def join(self, request: int, event: ConsumerInput) -> None:
        self._disown()
        is_counted = self.setting.bounds.requests_each is not None
        if self.client.requests_made:
            self.setting.see("another request")
        wanted = self.setting.bounds.requests[request]
        kernel = self.setting.kernels.new_consumer(wanted)
        self.client = Client(kernel, requests_made=self.client.requests_made + is_counted)
        self.tell(event)

    def leave(self) -> None:
        """The request is over, or the program is dead."""
        self._disown()
        self.client = Client(requests_made=self.client.requests_made)

    def _disown(self) -> None:
        self.hang_up()
        for number, link in self.server.links.items():
            if link.client == self.index + 1:
                self.server.set_link(number, client=0, is_doubtful=0)
        self.server.drop_holder(self.index)

    # --- The driver ----------------------------------------------------------------------------

    def tell(self, event: ConsumerInput) -> None:
        """Feed the kernel, and perform what it says."""
        kernels = self.setting.kernels
        step = kernels.step_consumer(self.client.kernel, event)
        if step is None:
            self.setting.see("the provider says what it may not say now")
            step = kernels.step_consumer(self.client.kernel, on.FrameRejected("not now"))
            if step is None:
                raise Violation(f"a consumer can neither take {event} nor reject it")
            # A driver closes what a refused message brought.
            self.has_parcel = False
        self.set(kernel=step.after)
        for effect in step.effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case do.Connect():
                self.set(is_calling=1)
            case do.SendRequest(request=request):
                self._post(request)
            case do.SendEnd(allocation_id=name):
                self._post(AllocationEnded(name))
            case do.SendFault(reason=reason):
                self._post(FdPassing(reason))
            case do.CloseChannel():
                self.hang_up()
                self.set(is_calling=0)
            case do.StartTimer(timer=timer):
                self.set(timers=self.client.timers | bit_of(timer))
            case do.StopTimer(timer=timer):
                if not self.client.timers & bit_of(timer):
                    raise Violation(f"{effect} stops what does not run")
                self.set(timers=self.client.timers & ~bit_of(timer))
            case do.ServeSelf():
                self.set(is_serving=1)
            case do.ReleaseOwn():
                if not self.client.has_own:
                    raise Violation("what was never made by self-service is released")
                self.set(has_own=0)
            case do.DeliverDescriptors():
                self._deliver(effect)
            case do.DiscardDescriptors():
                self.has_parcel = False
            case do.ReportRefusal(error=error):
                is_over = self.view.hold is ConsumerState.ENDED
                if not (is_over and isinstance(error, AllocationNotFound)):
                    self._tell_outcome()
            case do.ReportEnd():
                if self.client.has_end:
                    raise Violation("a caller is told twice of the end")
                self.set(has_end=1)
            case do.ReportFallback(error=error):
                self.setting.see(f"fallback: {error.kind}")

    def _deliver(self, effect: do.DeliverDescriptors) -> None:
        self._tell_outcome()
        if not effect.is_degraded:
            self.has_parcel = False
            request = self.view.request
            always.require(always.response_answers_its_request(request, effect.response))

    def _tell_outcome(self) -> None:
        if self.client.has_outcome:
            raise Violation("a caller is told of two outcomes")
        self.set(has_outcome=1)

    def _post(self, message: Message) -> None:
        if not self.link:
            raise Violation(f"{message} is to be sent, and there is no connection")
        link = self.server.links[self.link]
        if link.has_provider and not link.is_broken and not link.is_read_closed:
            sent = self.setting.kernels.messages.of(message)
            self.server.set_link(self.link, to_provider=(*link.to_provider, sent))

    def hang_up(self) -> None:
        if self.link:
            self.server.set_link(self.link, has_consumer=0, to_consumer=())
            self.link = 0

    def connect(self) -> None:
        self.link = self.server.new_number()
        self.server.links[self.link] = Link(self.link, self.index + 1)
        self.set(is_calling=0)
        self.tell(on.Connected())

    def miss(self) -> None:
        self.set(is_calling=0)
        self.tell(on.ProviderUnreachable(SocketUnavailable("connection refused")))

    def hear(self) -> None:
        """Take the next message, or hear that the connection is lost."""
        link, story = self.server.links[self.link], self.setting.story
        if not link.to_consumer:
            if story is not None:
                story.draw(f"P--xC{self.index}: gone")
            self.hang_up()
            self.tell(on.ConnectionLost(reason="closed by the provider"))
            return
        (arrived, fate), *rest = link.to_consumer
        self.server.set_link(self.link, to_consumer=tuple(rest))
        message = self.setting.message(arrived)
        assert message is not None
        if story is not None:
            story.say(f"P->>C{self.index}", message, _FATES[fate])
        if isinstance(message, Exception):
            self.setting.see(f"{type(message).__name__} reaches a consumer")
        if fate:
            self.tell(_spoilt(self.view.request, fate))
        else:
            self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        self.has_parcel = isinstance(message, NamespaceResponse)
        has_own = self.view.hold in (ConsumerState.SERVING_SELF, ConsumerState.SELF_HELD)
        if self.has_parcel and has_own:
            self.setting.see("an answer after the fallback")
        is_end = isinstance(message, AllocationEnded)
        if is_end and any(self.setting.message(m) == message for m in link.to_provider):
            self.setting.see("ends cross")
        self.tell(consumer_event_of(self.view.request, message))
        if self.has_parcel:
            raise Violation("descriptors are neither delivered nor discarded")

    def serve_self(self, *, is_able: bool) -> None:
        self.set(is_serving=0, has_own=int(is_able))
        request = self.view.request
        if is_able:
            response = NamespaceResponse(request.allocation_id, request.namespaces)
            self.tell(on.SelfServed(response))
        else:
            self.tell(on.SelfServiceFailed(CreationFailed("not allowed")))

    def expire(self, timer: str) -> None:
        which = Timer(timer)
        self.set(timers=self.client.timers & ~bit_of(which))
        self.tell(_EXPIRIES[which]())


def may_have_two_sets(setting: Setting, client: Client) -> bool:
    """Whether a client has a set of its own, and owes nothing: then it has none elsewhere."""
    view = setting.kernels.consumer_views[client.kernel]
    return bool(client.has_own or client.is_serving) and not view.owes_end


def is_provided(setting: Setting, server: ServerState, index: int) -> bool:
    """Whether the provider has a set for a client's request, or will make one, for all it knows."""
    if not server.provider:
        return False
    coming = [
        setting.message(m)
        for link in server.links
        if link.client == index + 1 and link.has_provider and not link.is_doubtful
        for m in (*link.open, *link.to_provider)
    ]
    if any(isinstance(m, AllocationEnded) for m in coming):
        return False
    states = setting.kernels.provider_views[server.provider].states
    is_held = any(
        node.holders >> index & 1 and state in LIVE
        for node, state in zip(server.nodes, states, strict=True)
    )
    return is_held or any(isinstance(m, NamespaceRequest) for m in coming)


def _spoilt(request: NamespaceRequest, fate: int) -> ConsumerInput:
    said: dict[int, ConsumerInput] = {
        CUT: on.FrameRejected("descriptors were cut off"),
        MISMATCHED: on.ResponseMismatched("fd_types is another"),
        NOT_FOUND: on.NotFoundReceived(AllocationNotFound(request.allocation_id)),
        FAILED_TO_PASS: on.PassingFailed(FdPassing("no descriptor is left")),
    }
    return said[fate]


_EXPIRIES: Final[dict[Timer, Callable[[], ConsumerInput]]] = {
    Timer.ANSWER: on.AnswerOverdue,
    Timer.NOTICE: on.NoticeOverdue,
    Timer.REDIAL: on.NoticeDue,
}

CLIENT_MOVES: Final[dict[str, Callable[..., None]]] = {
    "want": lambda d, r: d.join(r, on.NamespacesWanted()),
    "end by name": lambda d, r: d.join(r, on.EndWanted()),
    "end": lambda d: d.tell(on.EndWanted()),
    "die": ClientDraft.leave,
    "connect": ClientDraft.connect,
    "unreached": ClientDraft.miss,
    "refuse call": ClientDraft.miss,
    "hear": ClientDraft.hear,
    "serve self": lambda d: d.serve_self(is_able=True),
    "fail self": lambda d: d.serve_self(is_able=False),
    "overdue": ClientDraft.expire,
    "redial": ClientDraft.expire,
}
"""Every move of a client."""
