"""The life of an allocation. If you open one file, open this one.

THE PROVIDER'S VIEW

A consumer asks for namespaces in the name of an allocation. The allocation is *requested* while
the provider's backend makes them, *created* when they exist, *handed off* when the descriptors have
left for the first consumer that asked, *ended* when it is of no more use to anybody, and *released*
when nothing of it is left on the machine. Before the first request it is unknown; after the release
only its name is remembered for a while, so that a late end can be answered kindly.

    unknown ──> requested ──> created ──> handed_off ──> ended ──> released

Five things a reader tends to expect otherwise:

*An allocation is not a connection.* It outlives the connection it was asked on, the consumer, and
the provider's own process. A lost connection changes nothing, except that an allocation which was
never used and which nobody is left to claim is ended after a while.

*The same request is not a second request.* While the allocation is alive, everyone who sends the
same request gets the same namespaces. Whoever sends another request under the same name is refused.

*Ended is a decision, released is a fact.* Whichever of the reasons to end comes first decides; the
later ones change nothing. From then on the backend is asked to release until it reports that
nothing is left. That may take for ever (a process in uninterruptible sleep), so nobody waits for
it: after the release deadline the end is announced all the same, and the allocation stays visibly
*ended*.

*Creation cannot be interrupted, only undone.* An end that arrives meanwhile ends the allocation at
once; the backend finishes creating and then releases, because work for one allocation is done in
the order in which it was asked for. Everyone who had asked is told `CreationFailed` once it is
undone.

*A request that comes too early waits.* When the allocation of that name is still being released,
the request waits for that, and starts a new incarnation.

THE CONSUMER'S VIEW

A consumer's allocation is *idle* until its caller wants it; then the consumer is *connecting*, then
*asking*. Either it gets the namespaces and they are *held*, or the provider *refused* this
allocation, or the provider could not be reached or could not be understood: then the consumer is
*serving itself*, loudly, and what it makes by itself is *self-held*. Self-service can fail, too:
then the request has *failed*. The caller's wish to end leads through *ending* to *ended*, the
provider's announcement leads there at once.

One debt may be left. When the consumer turned away from a provider that may have made a set of
namespaces all the same, it owes the provider a word, because there must never be two live sets for
one allocation. The second, small table is that word's life: *silent* (nothing to say), *owed*,
*dialling*, *told*, and *heard* when the provider has confirmed. A caller's own end takes the same
way.

HOW TO READ THE TABLES

Each row says: when this event happens in this state, go to that state and ask for these effects.
A decision is made by naming the event, never by a condition. What is tolerated is a row that stays
where it is; what has no row is an error, and the class of the event says whose.
"""

from __future__ import annotations

from enum import Enum
from types import ModuleType
from typing import Final

from . import effects as do
from . import events as on
from .effects import Order, Timer, start, stop
from .events import Event
from .table import Row, check_vocabulary, compile_table


class AllocationState(Enum):
    """Where an allocation stands, in the provider's view."""

    UNKNOWN = "unknown"
    """Nobody has asked for it, or it is forgotten."""
    REQUESTED = "requested"
    """The backend is making it."""
    CREATED = "created"
    """It exists; its descriptors have not left yet."""
    HANDED_OFF = "handed_off"
    """At least one consumer has its descriptors."""
    ENDED = "ended"
    """It is over; the backend is releasing it, or has not managed to yet."""
    RELEASED = "released"
    """Nothing of it is left on the machine; only the name is remembered."""


class ConsumerState(Enum):
    """Where an allocation stands, in the consumer's view."""

    IDLE = "idle"
    """Nothing has been asked."""
    CONNECTING = "connecting"
    """The provider is being called."""
    ASKING = "asking"
    """The request is on its way, or the answer is."""
    HELD = "held"
    """The caller has the provider's namespaces."""
    SERVING_SELF = "serving_self"
    """The consumer is making its own."""
    SELF_HELD = "self_held"
    """The caller has the consumer's own namespaces: degraded."""
    ENDING = "ending"
    """The caller is done; the provider has not confirmed yet."""
    REFUSED = "refused"
    """The provider cannot grant this request; there are no namespaces."""
    FAILED = "failed"
    """Neither the provider nor self-service could; there are no namespaces."""
    ENDED = "ended"
    """The allocation is over."""


class NoticeState(Enum):
    """The word of the end that a consumer may owe the provider."""

    SILENT = "silent"
    """Nothing is owed."""
    OWED = "owed"
    """It will be said at the next chance."""
    DIALLING = "dialling"
    """The provider is being called to hear it."""
    TOLD = "told"
    """It is said; the provider has not confirmed."""
    HEARD = "heard"
    """The provider has confirmed."""


def _stay(event: type[Event], *states: Enum, then: tuple[Order, ...] = ()) -> tuple[Row, ...]:
    """Tolerate an event in some states: a row each, back to where it was."""
    return tuple(Row(event, state, state, then) for state in states)


def _from(
    event: type[Event], *sources: Enum, to: Enum, then: tuple[Order, ...] = ()
) -> tuple[Row, ...]:
    """Do the same from some states."""
    return tuple(Row(event, source, to, then) for source in sources)


# --- The provider's table ----------------------------------------------------------------------

_UNKNOWN = AllocationState.UNKNOWN
_REQUESTED = AllocationState.REQUESTED
_CREATED = AllocationState.CREATED
_HANDED_OFF = AllocationState.HANDED_OFF
_ENDED = AllocationState.ENDED
_RELEASED = AllocationState.RELEASED

_GO: Final = (do.ReleaseNamespaces, start(Timer.RELEASE))
_GO_UNCLAIMED: Final = (stop(Timer.CLAIM), *_GO)
# Who holds it is told first: an answer may be the last word on its connection. (END-12)
_TELL: Final = (do.AnnounceEnd, do.Refuse)

PROVIDER: Final = compile_table(
    "provider",
    (
        # Somebody wants namespaces.
        Row(on.RequestReceived, _UNKNOWN, _REQUESTED, (do.CreateNamespaces,)),
        # The backend has made them, or it has not; then the release only sweeps up.
        Row(on.NamespacesCreated, _REQUESTED, _CREATED, (do.Watch, do.HandOver)),
        Row(on.NamespacesNotCreated, _REQUESTED, _ENDED, _GO),
        # The first descriptors have left. More may follow.
        Row(on.ResponseSent, _CREATED, _HANDED_OFF, (do.RecordHandoff,)),
        *_stay(on.ResponseSent, _HANDED_OFF),
        *_stay(on.ResponseNotSent, _CREATED, _HANDED_OFF),
        # The same request again gets the same namespaces; another request gets a refusal. One that
        # comes too early waits, and one that comes during the drain does not. (LIFE-3, LIFE-5,
        # LIFE-6, LIFE-7)
        *_stay(on.RequestRepeated, _REQUESTED),
        *_stay(on.RequestRepeated, _CREATED, _HANDED_OFF, then=(stop(Timer.CLAIM), do.HandOver)),
        *_stay(on.RequestConflicting, _REQUESTED, _CREATED, _HANDED_OFF, then=(do.Refuse,)),
        *_stay(on.RequestEarly, _ENDED),
        *_stay(on.RequestDuringDrain, _ENDED, then=(do.Refuse,)),
        # Nobody is there to use it. The clock runs until somebody asks again or uses it.
        *_stay(on.Unclaimed, _REQUESTED, _ENDED),
        *_stay(on.Unclaimed, _CREATED, _HANDED_OFF, then=(start(Timer.CLAIM),)),
        *_stay(on.ScopePopulated, _CREATED, _HANDED_OFF, then=(stop(Timer.CLAIM),)),
        # The five reasons to end. The first one counts. (END-1, END-2, END-16)
        *_from(on.EndReceived, _REQUESTED, to=_ENDED, then=_GO),
        *_from(on.ReleaseRequested, _REQUESTED, to=_ENDED, then=_GO),
        *_from(on.ScopeEmptied, _CREATED, _HANDED_OFF, to=_ENDED, then=_GO_UNCLAIMED),
        *_from(on.EndReceived, _CREATED, _HANDED_OFF, to=_ENDED, then=_GO_UNCLAIMED),
        *_from(on.InitDied, _CREATED, _HANDED_OFF, to=_ENDED, then=_GO_UNCLAIMED),
        *_from(on.ClaimExpired, _CREATED, _HANDED_OFF, to=_ENDED, then=_GO),
        *_from(on.ReleaseRequested, _CREATED, _HANDED_OFF, to=_ENDED, then=_GO_UNCLAIMED),
        # The later ones change nothing. An end's sender is answered when the release is done.
        *_stay(on.ScopePopulated, _ENDED),
        *_stay(on.ScopeEmptied, _ENDED),
        *_stay(on.InitDied, _ENDED),
        *_stay(on.EndReceived, _ENDED),
        *_stay(on.ReleaseRequested, _ENDED),
        # The hand-over that the end overtook on its way through the driver.
        *_stay(on.ResponseSent, _ENDED),
        *_stay(on.ResponseNotSent, _ENDED),
        # The creation that the end overtook. The release is queued behind it.
        *_stay(on.NamespacesCreated, _ENDED),
        *_stay(on.NamespacesNotCreated, _ENDED),
        # Releasing: tried until nothing is left, announced at the deadline at the latest. (END-9)
        *_stay(on.ReleaseDelayed, _ENDED, then=(start(Timer.RETRY),)),
        *_stay(on.RetryDue, _ENDED, then=(do.ReleaseNamespaces,)),
        *_stay(on.ReleaseOverdue, _ENDED, then=_TELL),
        Row(on.NamespacesReleased, _ENDED, _RELEASED, (stop(Timer.RELEASE), *_TELL)),
        # The end of what is over already, and of what never was.
        *_stay(on.EndRepeated, _ENDED, _RELEASED, then=(do.AnnounceEnd,)),
        *_stay(on.EndReceived, _UNKNOWN, then=(do.Refuse,)),
        # After a restart: what the journal and the Linux kernel agree on. (CRASH-2 to CRASH-4)
        Row(on.CreatedAdopted, _UNKNOWN, _CREATED, (do.Watch, start(Timer.CLAIM))),
        Row(on.HandedOffAdopted, _UNKNOWN, _HANDED_OFF, (do.Watch, start(Timer.CLAIM))),
        Row(on.RemainsFound, _UNKNOWN, _ENDED, _GO),
    ),
    initial=_UNKNOWN,
    finals=(_RELEASED,),
)
"""An allocation, in the provider's view."""

# --- The consumer's table ----------------------------------------------------------------------

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
        # It cannot be understood, or falls silent: what it has made, nobody knows. (ERR-6, SELF-8)
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

# --- The notice's table ------------------------------------------------------------------------

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
"""The word of the end that a consumer may owe the provider."""

TABLES: Final = (PROVIDER, CONSUMER, NOTICE)
"""Every table, in reading order."""

OUTSIDE_EVENTS: Final = (
    on.ConnectionOpened,
    on.ProviderReady,
    on.ReadinessOverdue,
    on.ProviderStopping,
)
"""Events of the provider as a whole, which concern no single allocation and no table."""

OUTSIDE_EFFECTS: Final = (do.CloseConnection,)
"""The effect that concerns a connection and no single allocation."""


def _leaves(module: ModuleType, root: type) -> set[type]:
    """Find the classes of a module below `root` that no other class of it refines."""
    kinds = {c for c in vars(module).values() if isinstance(c, type) and issubclass(c, root)}
    return {kind for kind in kinds if not any(c is not kind and issubclass(c, kind) for c in kinds)}


check_vocabulary(
    TABLES,
    events=_leaves(on, Event) - set(OUTSIDE_EVENTS),
    orders=_leaves(do, do.Effect) - {do.StartTimer, do.StopTimer, *OUTSIDE_EFFECTS},
)
