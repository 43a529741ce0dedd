"""The lifecycles: five tables that hold every decision of the protocol. Open this file first.

ONE HAND-OVER

A consumer asks the provider for namespaces in the name of an allocation. The provider's backend
makes them; the provider sends their descriptors; the consumer runs its workload in them. When the
allocation's cgroup has emptied, the provider releases everything and announces the end.

AN ALLOCATION, IN THE PROVIDER'S VIEW (`ALLOCATION`)

The allocation is *requested* while the backend makes its namespaces, *created* when they exist,
*handed off* when the descriptors have left for the first consumer that asked, *ended* when it is of
no more use, and *released* when nothing of it is left on the node. Before the first request it is
unknown; after the release only its name is remembered for a while, so that a late `AllocationEnded`
is acknowledged and not answered with `AllocationNotFound`.

    unknown ──> requested ──> created ──> handed_off ──> ended ──> released

Five things a reader tends to expect otherwise:

*An allocation is not a connection.* It outlives the connection it was asked on, the consumer, and
the provider's own process. A lost connection changes nothing, except that an allocation which was
never used, and which no connection asks for any more, is ended after a while.

*The same request is not a second request.* While the allocation is alive, every consumer that sends
the same request gets the same namespaces. Another request under the same name is refused.

*Ended is a decision, released is a fact.* Whichever of the reasons to end comes first decides; the
later ones change nothing. From then on the backend is asked to release until it reports that
nothing is left. That may take for ever (a process in uninterruptible sleep), so no message waits
for it: after the release deadline the end is announced all the same, and the allocation stays
visibly *ended*.

*Creation cannot be interrupted, only undone.* An end that arrives meanwhile ends the allocation at
once; the backend finishes creating and then releases, because work for one allocation is done in
the order in which it was asked for. Each consumer that had asked is told `CreationFailed` once it
is undone.

*A request that comes too early waits.* When the allocation of that name is still being released,
the request waits for that, and starts a new incarnation.

AN ALLOCATION, IN THE CONSUMER'S VIEW (`CONSUMER`, `NOTICE`)

A consumer's allocation is *idle* until its caller wants it; then the consumer is *connecting*, then
*asking*. Either it gets the namespaces and they are *held*, or the provider *refused* this
allocation, or the provider could not be reached or could not be understood: then the consumer is
*serving itself*, loudly, and what it makes by itself is *self-held*. Self-service can fail, too:
then the request has *failed*. When the caller is done, the allocation is *ending* until the
provider has confirmed, then *ended*; the provider's own announcement ends it at once.

A consumer may have to send `AllocationEnded` after its own part is over. When it turned away from a
provider that may have made a set of namespaces all the same, the provider must be told, because
there must never be two live sets for one allocation. The notice tracks that: *silent* (nothing to
send), *owed*, *dialling*, *told*, and *heard* when the provider has confirmed. A caller's own end
takes the same way.

THE PROVIDER AS A WHOLE, AND A MESSAGE ON A CONNECTION (`SERVICE`, `MESSAGE`)

The service is *starting* while it adopts what is alive from before; messages are held meanwhile. It
is *ready*, then *stopping*: it refuses requests and still takes ends. If it is stopped before it
was ready it is *aborted*: it does not know what is alive, so it cannot answer an end either.

Errors carry no id, so a consumer matches answers to messages by their order. Every message a
provider has read is *arrived*, then *held* until the service is ready, then *open* while its
allocation has no answer; a request may be *deferred* to the release of the allocation before it,
and is *granted* when its namespaces exist. Its answer is known when it is granted, *refused* (an
error), *confirmed* (an end) or *unreadable*; it is *answered* when its turn has come. A message
whose connection is lost or closed is dropped with it.

HOW TO READ THE TABLES

Each row says: when this event happens in this state, go to that state and ask for these effects.
A decision is made by naming the event: a driver reports that a request arrived, and the kernel
names what that is, from what it knows. What is tolerated is a row that stays where it is; what has
no row is an error, and the class of the event says whose. A few events must meet a condition
besides: `GUARDS`, at the end, lists them all.
"""

from __future__ import annotations

from enum import Enum
from types import ModuleType
from typing import Final, get_args

from . import effects as do
from . import events as on
from .effects import Order, Timer, start, stop
from .events import Event
from .record import record
from .states import (
    AllocationState,
    ConsumerState,
    MessageState,
    NoticeState,
    ServiceState,
)
from .table import Row, check_vocabulary, compile_table


def _leaves(module: ModuleType, root: type) -> set[type]:
    """Find the classes of a module below `root` that no other class of it refines."""
    kinds = {c for c in vars(module).values() if isinstance(c, type) and issubclass(c, root)}
    return {kind for kind in kinds if not any(c is not kind and issubclass(c, kind) for c in kinds)}


def _stay(event: type[Event], *states: Enum, then: tuple[Order, ...] = ()) -> tuple[Row, ...]:
    """Tolerate an event in some states: a row each, back to where it was."""
    return tuple(Row(event, state, state, then) for state in states)


def _from(
    event: type[Event], *sources: Enum, to: Enum, then: tuple[Order, ...] = ()
) -> tuple[Row, ...]:
    """Do the same from some states."""
    return tuple(Row(event, source, to, then) for source in sources)


# --- An allocation, in the provider's view ------------------------------------------------------

_UNKNOWN = AllocationState.UNKNOWN
_REQUESTED = AllocationState.REQUESTED
_CREATED = AllocationState.CREATED
_HANDED_OFF = AllocationState.HANDED_OFF
_ENDED = AllocationState.ENDED
_RELEASED = AllocationState.RELEASED

_RELEASE: Final = (do.ReleaseNamespaces, start(Timer.RELEASE))
_RELEASE_GRANTED: Final = (stop(Timer.CLAIM), do.WithdrawGrants, *_RELEASE)

ALLOCATION: Final = compile_table(
    "allocation",
    (
        # A consumer wants namespaces.
        Row(on.RequestAdmitted, _UNKNOWN, _REQUESTED, (do.AddAsker, do.CreateNamespaces)),
        # The backend has made them, or it has not; then the release only sweeps up.
        Row(
            on.NamespacesCreated,
            _REQUESTED,
            _CREATED,
            (do.Watch, do.GrantAskers, do.CheckClaim),
        ),
        Row(on.NamespacesNotCreated, _REQUESTED, _ENDED, _RELEASE),
        # The first descriptors have left. More may follow.
        Row(on.ResponseSent, _CREATED, _HANDED_OFF, (do.RecordHandoff,)),
        *_stay(on.ResponseSent, _HANDED_OFF),
        *_stay(on.ResponseNotSent, _CREATED, _HANDED_OFF),
        # The same request again gets the same namespaces; another request gets a refusal. One that
        # comes too early waits, and one that comes during the drain does not. (LIFE-3, LIFE-5,
        # LIFE-6, LIFE-7)
        *_stay(on.RequestRepeated, _REQUESTED, then=(do.AddAsker,)),
        *_stay(
            on.RequestRepeated,
            _CREATED,
            _HANDED_OFF,
            then=(do.AddAsker, stop(Timer.CLAIM), do.GrantAskers),
        ),
        *_stay(on.RequestConflicting, _REQUESTED, _CREATED, _HANDED_OFF, then=(do.RefuseConflict,)),
        *_stay(on.RequestEarly, _ENDED, then=(do.DeferRequest,)),
        *_stay(on.RequestDuringDrain, _ENDED, then=(do.RefuseDraining,)),
        # No connection asks for it. The clock runs until one asks again or it is used.
        *_stay(on.Unclaimed, _REQUESTED, _ENDED),
        *_stay(on.Unclaimed, _CREATED, _HANDED_OFF, then=(start(Timer.CLAIM),)),
        *_stay(on.ScopePopulated, _CREATED, _HANDED_OFF, then=(stop(Timer.CLAIM),)),
        # The five reasons to end. The first one counts. (END-1, END-2, END-16)
        *_from(on.EndReceived, _REQUESTED, to=_ENDED, then=_RELEASE),
        *_from(on.ReleaseRequested, _REQUESTED, to=_ENDED, then=_RELEASE),
        *_from(on.ScopeEmptied, _CREATED, _HANDED_OFF, to=_ENDED, then=_RELEASE_GRANTED),
        *_from(on.EndReceived, _CREATED, _HANDED_OFF, to=_ENDED, then=_RELEASE_GRANTED),
        *_from(on.InitDied, _CREATED, _HANDED_OFF, to=_ENDED, then=_RELEASE_GRANTED),
        *_from(on.ClaimExpired, _CREATED, _HANDED_OFF, to=_ENDED, then=_RELEASE),
        *_from(on.ReleaseRequested, _CREATED, _HANDED_OFF, to=_ENDED, then=_RELEASE_GRANTED),
        # The later ones change nothing. An end's sender is answered when the release is done; what
        # it asked for before is taken back. (END-17)
        *_stay(on.ScopePopulated, _ENDED),
        *_stay(on.ScopeEmptied, _ENDED),
        *_stay(on.InitDied, _ENDED),
        *_stay(on.EndReceived, _ENDED, then=(do.WithdrawDeferred,)),
        *_stay(on.ReleaseRequested, _ENDED),
        # The hand-over that the end overtook on its way through the driver.
        *_stay(on.ResponseSent, _ENDED),
        *_stay(on.ResponseNotSent, _ENDED),
        # The creation that the end overtook. The release is queued behind it.
        *_stay(on.NamespacesCreated, _ENDED),
        *_stay(on.NamespacesNotCreated, _ENDED),
        # Releasing: tried until nothing is left, announced at the deadline at the latest. What is
        # answered is not pushed as well. The push comes before a refusal, which may be the last
        # frame on its connection. (END-9, END-12, END-13)
        *_stay(on.ReleaseDelayed, _ENDED, then=(start(Timer.RETRY),)),
        *_stay(on.RetryDue, _ENDED, then=(do.ReleaseNamespaces,)),
        *_stay(on.ReleaseOverdue, _ENDED, then=(do.AnswerEnd, do.PushEnd, do.FailAllAskers)),
        Row(
            on.NamespacesReleased,
            _ENDED,
            _RELEASED,
            (stop(Timer.RELEASE), do.AnswerEnd, do.PushEnd, do.FailAskers, do.Forget),
        ),
        # The end of what is over already, and of what never was.
        *_stay(on.EndRepeated, _ENDED, _RELEASED, then=(do.ConfirmEnd,)),
        *_stay(on.EndReceived, _UNKNOWN, then=(do.RefuseUnknown,)),
        # After a restart: what the journal and the Linux kernel agree on. (CRASH-2 to CRASH-4)
        Row(on.CreatedAdopted, _UNKNOWN, _CREATED, (do.Watch, start(Timer.CLAIM))),
        Row(on.HandedOffAdopted, _UNKNOWN, _HANDED_OFF, (do.Watch, start(Timer.CLAIM))),
        Row(on.RemainsFound, _UNKNOWN, _ENDED, _RELEASE),
    ),
    initial=_UNKNOWN,
    finals=(_RELEASED,),
)
"""An allocation, in the provider's view."""

# --- An allocation, in the consumer's view ------------------------------------------------------

_IDLE = ConsumerState.IDLE
_CONNECTING = ConsumerState.CONNECTING
_ASKING = ConsumerState.ASKING
_HELD = ConsumerState.HELD
_SERVING_SELF = ConsumerState.SERVING_SELF
_SELF_HELD = ConsumerState.SELF_HELD
_ENDING = ConsumerState.ENDING
_REFUSED = ConsumerState.REFUSED
_FAILED = ConsumerState.FAILED
_OVER = ConsumerState.ENDED

_SELF: Final = (do.ReportFallback, do.ServeSelf)
_SELF_OWING: Final = (do.OweEnd, *_SELF)
_HANG_UP: Final = (stop(Timer.ANSWER), do.CloseChannel)
_FAULT: Final = (stop(Timer.ANSWER), do.SendFault, do.CloseChannel)
_TURNED_AWAY: Final = (_SERVING_SELF, _SELF_HELD, _ENDING, _FAILED, _OVER)
"""States in which an answer may still come that is no longer wanted."""

CONSUMER: Final = compile_table(
    "consumer",
    (
        # Ask.
        Row(on.NamespacesWanted, _IDLE, _CONNECTING, (do.Connect,)),
        Row(on.Connected, _CONNECTING, _ASKING, (do.SendRequest, start(Timer.ANSWER))),
        # The provider hands over, or refuses this request. (ERR-5)
        Row(on.ResponseReceived, _ASKING, _HELD, (stop(Timer.ANSWER), do.DeliverDescriptors)),
        Row(on.CreationRefused, _ASKING, _REFUSED, (*_HANG_UP, do.ReportRefusal)),
        Row(on.NotFoundReceived, _ASKING, _REFUSED, (*_HANG_UP, do.ReportRefusal)),
        # It cannot be reached, or says that it cannot serve: it has made nothing. (ERR-6, SELF-10)
        Row(on.ProviderUnreachable, _CONNECTING, _SERVING_SELF, _SELF),
        Row(on.ProviderUnavailable, _ASKING, _SERVING_SELF, (*_HANG_UP, *_SELF)),
        # It cannot be understood, or falls silent: it may have made a set. (ERR-6, SELF-8)
        Row(on.PassingFailed, _ASKING, _SERVING_SELF, (*_HANG_UP, *_SELF_OWING)),
        Row(on.FrameRejected, _ASKING, _SERVING_SELF, (*_FAULT, *_SELF_OWING)),
        Row(
            on.ResponseMismatched,
            _ASKING,
            _SERVING_SELF,
            (do.DiscardDescriptors, *_FAULT, *_SELF_OWING),
        ),
        Row(on.ConnectionLost, _ASKING, _SERVING_SELF, (stop(Timer.ANSWER), *_SELF_OWING)),
        # On a deadline the connection stays: an answer may still come, and the end can be told.
        # (SELF-1, SELF-7)
        Row(on.AnswerOverdue, _ASKING, _SERVING_SELF, _SELF_OWING),
        Row(on.SelfServed, _SERVING_SELF, _SELF_HELD, (do.DeliverDescriptors,)),
        Row(on.SelfServiceFailed, _SERVING_SELF, _FAILED, (do.ReportRefusal,)),
        # Held: the provider may announce the end; losing it is no end. (CRASH-13)
        Row(on.EndAnnounced, _HELD, _OVER, (do.CloseChannel, do.ReportEnd)),
        *_stay(on.ConnectionLost, _HELD),
        *_stay(on.PassingFailed, _HELD, then=(do.CloseChannel,)),
        *_stay(on.FrameRejected, _HELD, then=(do.SendFault, do.CloseChannel)),
        # The caller is done, at any time. (SELF-11)
        Row(on.EndWanted, _IDLE, _ENDING, (do.OweEnd,)),
        Row(on.EndWanted, _CONNECTING, _OVER, (do.CloseChannel, do.ReportEnd)),
        Row(on.EndWanted, _ASKING, _ENDING, (stop(Timer.ANSWER), do.OweEnd)),
        Row(on.EndWanted, _HELD, _ENDING, (do.OweEnd,)),
        Row(on.EndWanted, _SELF_HELD, _OVER, (do.ReleaseOwn, do.ReportEnd)),
        Row(on.EndAnnounced, _ENDING, _OVER, (do.ReportEnd,)),
        Row(on.NotFoundReceived, _ENDING, _OVER, (do.ReportRefusal, do.ReportEnd)),
        # What still arrives after the consumer has turned away. (SELF-9) The rest is the notice's:
        # a consumer that has turned away and is still connected is telling the end.
        *_stay(on.ResponseReceived, *_TURNED_AWAY, then=(do.DiscardDescriptors,)),
        *_stay(on.ResponseMismatched, *_TURNED_AWAY, then=(do.DiscardDescriptors,)),
    ),
    initial=_IDLE,
    finals=(_REFUSED, _FAILED, _OVER),
)
"""An allocation, in the consumer's view."""

# --- The end notice of a consumer ---------------------------------------------------------------

_SILENT = NoticeState.SILENT
_OWED = NoticeState.OWED
_DIALLING = NoticeState.DIALLING
_TOLD = NoticeState.TOLD
_HEARD = NoticeState.HEARD

_SAY: Final = (do.SendEnd, start(Timer.NOTICE))
_LATER: Final = (start(Timer.REDIAL),)
_BREAK_OFF: Final = (stop(Timer.NOTICE), do.CloseChannel, *_LATER)

NOTICE: Final = compile_table(
    "notice",
    (
        Row(on.EndOwed, _SILENT, _TOLD, _SAY),
        Row(on.EndOwedApart, _SILENT, _DIALLING, (do.Connect,)),
        Row(on.Connected, _DIALLING, _TOLD, _SAY),
        Row(on.ProviderUnreachable, _DIALLING, _OWED, _LATER),
        Row(on.NoticeDue, _OWED, _DIALLING, (do.Connect,)),
        # Confirmed: ended now, or not known, which is as good. (END-15)
        Row(on.EndAnnounced, _TOLD, _HEARD, (stop(Timer.NOTICE), do.CloseChannel)),
        Row(on.NotFoundReceived, _TOLD, _HEARD, (stop(Timer.NOTICE), do.CloseChannel)),
        # Not confirmed: again, on a new connection.
        Row(on.ConnectionLost, _TOLD, _OWED, (stop(Timer.NOTICE), *_LATER)),
        Row(on.NoticeOverdue, _TOLD, _OWED, (do.CloseChannel, *_LATER)),
        Row(on.ProviderUnavailable, _TOLD, _OWED, _BREAK_OFF),
        Row(on.PassingFailed, _TOLD, _OWED, _BREAK_OFF),
        Row(on.FrameRejected, _TOLD, _OWED, (do.SendFault, *_BREAK_OFF)),
        # The refusal of the request that this end overtook. (A response is the hold's to discard.)
        *_stay(on.CreationRefused, _TOLD),
    ),
    initial=_SILENT,
    finals=(_HEARD,),
)
"""The `AllocationEnded` that a consumer may have to send to the provider."""

# --- The provider as a whole --------------------------------------------------------------------

_STARTING = ServiceState.STARTING
_READY = ServiceState.READY
_STOPPING = ServiceState.STOPPING
_ABORTED = ServiceState.ABORTED

SERVICE: Final = compile_table(
    "service",
    (
        # What is alive from before is adopted first; then requests can be served. (LIFE-13)
        *_stay(on.CreatedAdopted, _STARTING),
        *_stay(on.HandedOffAdopted, _STARTING),
        *_stay(on.RemainsFound, _STARTING),
        Row(on.ProviderReady, _STARTING, _READY, (stop(Timer.READINESS), do.DispatchHeld)),
        *_stay(on.ReadinessOverdue, _STARTING, then=(do.RefuseUnready,)),
        # What is alive stays alive. (LIFE-14, LIFE-15)
        Row(on.ProviderStopping, _STARTING, _ABORTED, (stop(Timer.READINESS), do.RefuseHeld)),
        Row(on.ProviderStopping, _READY, _STOPPING, (do.RefuseDeferred,)),
        # Connections come and go at any time. (PEER-2)
        *_stay(on.ConnectionOpened, *ServiceState, then=(do.AddConnection,)),
        *_stay(
            on.PeerRefused,
            *ServiceState,
            then=(do.RefusePeer, do.AddConnection, do.CloseConnection),
        ),
        *_stay(on.ConnectionLost, *ServiceState, then=(do.ForgetConnection,)),
        # What becomes of a message. An end frees something, so it is taken as long as it can be
        # answered. (LIFE-14, LIFE-15, LIFE-16)
        *_stay(on.RequestReceived, _STARTING, then=(do.HoldMessage,)),
        *_stay(on.RequestReceived, _READY, then=(do.DispatchMessage,)),
        *_stay(on.RequestReceived, _STOPPING, _ABORTED, then=(do.RefuseLate,)),
        *_stay(on.EndReceived, _STARTING, then=(do.HoldMessage,)),
        *_stay(on.EndReceived, _READY, _STOPPING, then=(do.DispatchMessage,)),
        *_stay(on.EndReceived, _ABORTED, then=(do.RefuseLate,)),
        # Limits. (PEER-4, PEER-5, PEER-6, END-20)
        *_stay(on.QueueFull, _STARTING, then=(do.RefuseMessage,)),
        *_stay(on.RequestOverLimit, *ServiceState, then=(do.RefuseMessage,)),
        # (An aborted provider answers every message at once, so no connection is flooded.)
        *_stay(
            on.ConnectionFlooded,
            _STARTING,
            _READY,
            _STOPPING,
            then=(do.RefuseFlood, do.CloseConnection),
        ),
        *_stay(on.FrameRejected, *ServiceState, then=(do.RefuseFrame,)),
    ),
    initial=_STARTING,
    finals=(_STOPPING, _ABORTED),
)
"""The provider as a whole."""

# --- A message on a connection ------------------------------------------------------------------

_ARRIVED = MessageState.ARRIVED
_HELD_BACK = MessageState.HELD
_OPEN = MessageState.OPEN
_DEFERRED = MessageState.DEFERRED
_GRANTED = MessageState.GRANTED
_DENIED = MessageState.REFUSED
_CONFIRMED = MessageState.CONFIRMED
_UNREADABLE = MessageState.UNREADABLE
_ANSWERED = MessageState.ANSWERED

MESSAGE: Final = compile_table(
    "message",
    (
        Row(on.MessageHeld, _ARRIVED, _HELD_BACK),
        *_from(on.MessageDispatched, _ARRIVED, _HELD_BACK, _DEFERRED, to=_OPEN),
        Row(on.MessageDeferred, _OPEN, _DEFERRED),
        # Its answer becomes known; or it is known no more, because the allocation has ended.
        Row(on.MessageGranted, _OPEN, _GRANTED),
        Row(on.GrantWithdrawn, _GRANTED, _OPEN),
        *_from(on.MessageRefused, _ARRIVED, _HELD_BACK, _OPEN, _DEFERRED, to=_DENIED),
        Row(on.EndConfirmed, _OPEN, _CONFIRMED),
        Row(on.FrameRejected, _ARRIVED, _UNREADABLE),
        # Answers leave in the order of the messages. Without one, all behind it wait. (WIRE-14)
        *_stay(on.TurnCame, _HELD_BACK, _OPEN, _DEFERRED),
        Row(on.TurnCame, _GRANTED, _ANSWERED, (do.HandOver,)),
        Row(on.TurnCame, _DENIED, _ANSWERED, (do.Refuse,)),
        Row(on.TurnCame, _CONFIRMED, _ANSWERED, (do.AnnounceEnd,)),
        Row(on.TurnCame, _UNREADABLE, _ANSWERED, (do.Refuse, do.CloseConnection)),
    ),
    initial=_ARRIVED,
    finals=(_ANSWERED,),
)
"""A message that a provider has read, until its answer has left."""

TABLES: Final = (ALLOCATION, CONSUMER, NOTICE, SERVICE, MESSAGE)
"""Every table, in reading order."""

# --- Guards -------------------------------------------------------------------------------------


EXPIRIES: Final[dict[type[Event], Timer]] = {
    on.ReadinessOverdue: Timer.READINESS,
    on.ClaimExpired: Timer.CLAIM,
    on.RetryDue: Timer.RETRY,
    on.ReleaseOverdue: Timer.RELEASE,
    on.AnswerOverdue: Timer.ANSWER,
    on.NoticeOverdue: Timer.NOTICE,
    on.NoticeDue: Timer.REDIAL,
}
"""Which timer it is that an event says has expired."""


@record
class Guard:
    """A condition that an event must meet besides having a row; else it is refused all the same."""

    name: str
    """What it is about, in a word."""
    events: tuple[type[Event], ...]
    """Which events it is for."""
    condition: str
    """What must be so, as chapter 3 says it."""
    violation: str
    """What is so if not, as the error says it after the state."""


_CREATION_REPORTS: Final = (on.NamespacesCreated, on.NamespacesNotCreated)
_RELEASE_REPORTS: Final = (on.ReleaseDelayed, on.NamespacesReleased)
_FROM_PEER: Final = (on.RequestReceived, on.EndReceived, on.FrameRejected)

IS_RUNNING: Final = Guard(
    "timer",
    (on.ReadinessOverdue, on.ClaimExpired, on.RetryDue, on.ReleaseOverdue),
    "the timer that it says has expired is running",
    "without a {timer} timer",
)
"""A timer expires only while it runs."""
IS_BEING_MADE: Final = Guard(
    "creation",
    _CREATION_REPORTS,
    "the backend was asked to create, and has not reported yet",
    "and not being made",
)
"""A creation is reported once, after it was asked for."""
IS_MADE: Final = Guard(
    "creation before release",
    _RELEASE_REPORTS,
    "the backend has reported what came of the creation",
    "and still being made",
)
"""A release is reported after the creation."""
IS_BEING_RELEASED: Final = Guard(
    "release",
    _RELEASE_REPORTS,
    "the backend was asked to release, and has not reported since",
    "and not being released",
)
"""Each try to release is reported once."""
IS_NEW: Final = Guard(
    "new connection", (on.ConnectionOpened,), "its number is of no open connection", "open"
)
"""A connection is opened once."""
IS_OPEN: Final = Guard(
    "connection",
    (on.ConnectionLost, *_FROM_PEER),
    "the connection was opened, and its loss is not reported",
    "not open",
)
"""What comes on a connection comes between its opening and its loss."""
IS_READ: Final = Guard(
    "reading",
    _FROM_PEER,
    "the provider still reads from the connection: it has not closed it, and every frame before "
    "was readable",
    "closing",
)
"""Nothing is read from a connection that the provider has closed, or is about to close."""
HAS_PROVIDER: Final = Guard(
    "peer",
    tuple(event for event in get_args(on.ConsumerInput) if issubclass(event, on.PeerEvent)),
    "the consumer is connected to the provider",
    "",
)
"""A provider is heard only while there is a connection to it."""

PROVIDER_GUARDS: Final = (
    IS_RUNNING,
    IS_BEING_MADE,
    IS_MADE,
    IS_BEING_RELEASED,
    IS_NEW,
    IS_OPEN,
    IS_READ,
)
"""What a provider's kernel checks of an event, besides its row."""

CONSUMER_GUARDS: Final = (HAS_PROVIDER,)
"""What a consumer's kernel checks."""

check_vocabulary(
    TABLES,
    events=_leaves(on, Event),
    orders=_leaves(do, do.Effect) - {do.StartTimer, do.StopTimer} | _leaves(do, do.KernelOrder),
)
