"""What is true at every moment, whatever happened before: one small predicate for each promise.

Every predicate takes plain values (ids, types, numbers, messages), never a harness, so that the
same sentence holds the kernels to it, a provider on a real socket, and a real node. It returns what
is wrong, one line for each finding; nothing wrong is an empty list. `require` turns findings into a
failure.

What a value stands for:

    incarnation   whatever tells one life of an allocation from the next: a number, a token
    identity      whatever is unique to one namespace for ever: a number, (kind, NS_GET_ID)
    connection    whatever tells one connection from every other one, those before it included
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from statemachine.errors import AllocationNotFound, FdPassing, NamespaceError
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)

Spoken: TypeAlias = tuple[Literal["read", "sent"], Message | None]
"""Something the provider read or sent on a connection; None for a frame that is unreadable."""


class InvariantBroken(AssertionError):
    """Something was found that must never be."""


def require(*findings: list[str]) -> None:
    """
    Fail if any predicate found anything.

    Raises:
        InvariantBroken: with every finding.
    """
    lines = [line for finding in findings for line in finding]
    if lines:
        raise InvariantBroken("\n".join(lines))


# --- One hand-over -----------------------------------------------------------------------------


def response_answers_its_request(
    request: NamespaceRequest, response: NamespaceResponse
) -> list[str]:
    """The id is echoed, the types are the request's in the request's order, the mount as asked."""
    found = []
    if response.allocation_id != request.allocation_id:
        found.append(f"asked for {request.allocation_id!r}, answered {response.allocation_id!r}")
    if response.fd_types != request.namespaces:
        found.append(f"asked for {request.namespaces}, answered {response.fd_types}")
    if (response.uenv_mount_path is None) != (request.uenv_image is None):
        found.append(f"image {request.uenv_image!r} is mounted at {response.uenv_mount_path!r}")
    return found


def descriptors_are_what_the_response_says(
    fd_types: Sequence[NamespaceType], kinds: Sequence[NamespaceType]
) -> list[str]:
    """There is one descriptor for each announced type, of that type, in that order."""
    if list(fd_types) != list(kinds):
        return [f"announced {list(fd_types)}, attached {list(kinds)}"]
    return []


def namespaces_are_not_the_nodes_own(
    identities: Iterable[Hashable], own: Iterable[Hashable | None]
) -> list[str]:
    """Nobody is handed a namespace of the node; `own` may have None where nothing is known."""
    return [f"{one} is the node's own" for one in set(identities) & (set(own) - {None})]


def every_descriptor_has_one_owner(
    present: Mapping[Hashable, int], owners: Mapping[Hashable, Mapping[Hashable, int]]
) -> list[str]:
    """
    Whatever is open belongs to exactly one, and what belongs to anybody is open.

    Args:
        present: how many descriptors of each namespace are open.
        owners: how many of them each owner has: the provider, what is on its way, consumers.
    """
    owned: Counter[Hashable] = Counter()
    for has in owners.values():
        owned.update(has)
    return [
        f"{present.get(one, 0)} descriptors of {one} are open, and {owned[one]} have an owner"
        for one in {*present, *owned}
        if present.get(one, 0) != owned[one]
    ]


# --- Allocations and their incarnations --------------------------------------------------------


def allocations_are_isolated(live: Mapping[Hashable, Iterable[Hashable]]) -> list[str]:
    """No namespace belongs to two live sets; `live` has the identities in each set."""
    owners: dict[Hashable, Hashable] = {}
    found = []
    for owner, identities in live.items():
        for identity in identities:
            if owners.setdefault(identity, owner) != owner:
                found.append(f"{identity} belongs to {owners[identity]} and to {owner}")
    return found


def an_incarnation_is_one_set_of_namespaces(
    hand_overs: Iterable[tuple[Hashable, tuple[Hashable, ...]]],
) -> list[str]:
    """Every hand-over of an incarnation passes the same namespaces; of another one, others."""
    sets: dict[Hashable, tuple[Hashable, ...]] = {}
    found = []
    for incarnation, identities in hand_overs:
        first = sets.setdefault(incarnation, identities)
        if first != identities:
            found.append(f"{incarnation} was handed over as {first} and as {identities}")
    return found + allocations_are_isolated(sets)


def ended_at_most_once(ends: Iterable[Hashable]) -> list[str]:
    """Exactly one reason to end counts for an incarnation."""
    return [f"{one} ended {n} times" for one, n in Counter(ends).items() if n > 1]


def released_at_most_once(releases: Iterable[Hashable]) -> list[str]:
    """What an incarnation has is freed once."""
    return [f"{one} was released {n} times" for one, n in Counter(releases).items() if n > 1]


def released_only_after_its_end(
    releases: Iterable[Hashable], alive: Iterable[Hashable]
) -> list[str]:
    """Nothing is freed of an incarnation that counts as alive."""
    return [f"{one} is alive and released" for one in set(releases) & set(alive)]


# --- The word of the end -----------------------------------------------------------------------


def end_is_pushed_at_most_once(pushes: Iterable[tuple[Hashable, Hashable]]) -> list[str]:
    """A connection hears unasked of the end of an incarnation once; items: (connection, it)."""
    return [
        f"connection {connection} was told {n} times of the end of {incarnation}"
        for (connection, incarnation), n in Counter(pushes).items()
        if n > 1
    ]


def end_is_told_only_to_whom_it_concerns(
    pushes: Iterable[tuple[Hashable, Hashable]], handed: Iterable[tuple[Hashable, Hashable]]
) -> list[str]:
    """Nobody hears unasked of an allocation that was not handed over on that connection."""
    strangers = set(pushes) - set(handed)
    return [f"connection {c} heard of {i}, which it never had" for c, i in strangers]


def every_holder_has_heard(
    handed: Iterable[tuple[Hashable, Hashable]],
    told: Iterable[tuple[Hashable, Hashable]],
    ended: Iterable[Hashable],
    open_connections: Iterable[Hashable],
) -> list[str]:
    """At rest: every open connection that was handed what has ended knows of the end."""
    over, is_open = set(ended), set(open_connections)
    concerned = {(c, i) for c, i in handed if c in is_open and i in over}
    return [f"connection {c} never heard of the end of {i}" for c, i in concerned - set(told)]


def at_most_one_live_set(
    own: Iterable[tuple[Hashable, str]],
    in_debt: Iterable[Hashable],
    provided: Iterable[tuple[Hashable, str]],
) -> list[str]:
    """
    A consumer that made its own namespaces and owes nothing has none at the provider.

    Args:
        own: (consumer, allocation id) of every set made by self-service that is alive.
        in_debt: consumers that still have to tell the provider of an end.
        provided: (consumer, allocation id) of every set that is alive at the provider, or will be
            made there, at the wish of that consumer.
    """
    settled = set(own) - {(c, a) for c, a in own if c in set(in_debt)}
    return [f"{c} has {a} twice" for c, a in settled & set(provided)]


def one_outcome(*, is_delivered: bool, is_refused: bool) -> list[str]:
    """A request is granted or refused, never both."""
    return ["the caller got namespaces, and a refusal"] if is_delivered and is_refused else []


def self_service_is_loud_and_for_a_reason(
    *, has_turned: bool, audits: int, is_refused: bool
) -> list[str]:
    """
    A consumer turns to self-service once at most, says so once, and not over a refusal.

    Args:
        has_turned: whether it has.
        audits: how often it said so.
        is_refused: whether the provider refused the request while the consumer waited.
    """
    found = [] if audits == has_turned else [f"turned {has_turned:d} times, said so {audits} times"]
    return [*found, *(["it papered over a refusal"] if has_turned and is_refused else [])]


# --- One connection ----------------------------------------------------------------------------


def answers_come_in_order(history: Sequence[Spoken], *, is_closed: bool) -> list[str]:
    """
    Every reply answers the oldest message that has none, or is an end that is told unasked.

    Args:
        history: all that was said on a connection, as the provider read and sent it.
        is_closed: whether the provider has closed it; only then may an error stand last that
            answers no message, because it concerns the connection as a whole.
    """
    talk = _match(history)
    found = [
        f"{message} was answered by {reply}"
        for message, reply in talk.answered
        if not _can_answer(message, reply)
    ]
    is_farewell = is_closed and all(isinstance(reply, NamespaceError) for reply in talk.surplus)
    if len(talk.surplus) > is_farewell:
        found.append(f"nothing was asked, but answered: {talk.surplus}")
    return found


def every_message_is_answered(history: Sequence[Spoken]) -> list[str]:
    """At rest: no message of an open connection waits for its answer."""
    return [f"{message} was never answered" for message in unanswered(history)]


def nothing_follows_a_close(actions: Sequence[str]) -> list[str]:
    """After a connection is closed nothing is sent on it; items: "sent" or "closed"."""
    if "closed" in actions and actions.index("closed") != len(actions) - 1:
        return [f"after the close came {actions[actions.index('closed') + 1 :]}"]
    return []


def unanswered(history: Sequence[Spoken]) -> list[Message | None]:
    """List the messages that have no answer yet, the oldest first."""
    return _match(history).open


def told_unasked(history: Sequence[Spoken]) -> list[str]:
    """List the allocations whose end was told without an end that it could answer."""
    return _match(history).pushed


# --- Errors ------------------------------------------------------------------------------------


def an_error_changes_nothing(before: object, after: object) -> list[str]:
    """What is refused leaves the state as it was; both are snapshots."""
    return [] if before == after else [f"an error changed {before} into {after}"]


@dataclass
class _Talk:
    """What was said on a connection, taken apart."""

    open: list[Message | None] = field(default_factory=list)
    answered: list[tuple[Message | None, Message]] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)
    surplus: list[Message] = field(default_factory=list)


def _match(history: Sequence[Spoken]) -> _Talk:
    talk = _Talk()
    for verb, message in history:
        oldest = talk.open[0] if talk.open else None
        if verb == "read":
            talk.open.append(message)
        elif isinstance(message, AllocationEnded) and message != oldest:
            talk.pushed.append(message.allocation_id)
        elif message is not None and talk.open:
            talk.answered.append((talk.open.pop(0), message))
        elif message is not None:
            talk.surplus.append(message)
    return talk


def _can_answer(message: Message | None, reply: Message) -> bool:
    match reply:
        case NamespaceResponse():
            if not isinstance(message, NamespaceRequest):
                return False
            return not response_answers_its_request(message, reply)
        case AllocationNotFound(allocation_id=name):
            return message == AllocationEnded(name)
        case FdPassing():
            return not isinstance(message, AllocationEnded)
        case _:
            return True
