"""Invariants of the protocol: predicates over plain values that hold after every event.

A predicate takes ids, types, numbers and messages, never a harness, so that the same one checks a
kernel, a provider on a socket, and a node. It returns one line for each finding; an empty list
means that nothing is wrong. `require` raises if there are findings. Ids such as FD-2 are clauses.

Values that the predicates only compare:

    incarnation   unique to one life of an allocation: a number, a token
    identity      unique to one namespace for ever: a number, (kind, NS_GET_ID)
    connection    unique to one connection, among earlier ones too
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
"""A message that the provider read or sent on a connection; None for an unreadable frame."""


class InvariantBroken(AssertionError):
    """An invariant does not hold; the message has every finding."""


def require(*findings: list[str]) -> None:
    """
    Raise if any predicate found anything.

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
    """A response has its request's id and types, in order, and a mount path if asked. (FD-2)"""
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
    """There is one descriptor for each announced type, of that type, in that order. (FD-1, FD-9)"""
    if list(fd_types) != list(kinds):
        return [f"announced {list(fd_types)}, attached {list(kinds)}"]
    return []


def namespaces_are_not_the_nodes_own(
    identities: Iterable[Hashable], own: Iterable[Hashable | None]
) -> list[str]:
    """
    No namespace that is handed over is the node's. (LIFE-9)

    Args:
        identities: the namespaces that were handed over.
        own: the node's; None where one is not known.
    """
    return [f"{one} is the node's own" for one in set(identities) & (set(own) - {None})]


def every_descriptor_has_one_owner(
    present: Mapping[Hashable, int], owners: Mapping[Hashable, Mapping[Hashable, int]]
) -> list[str]:
    """
    Every open descriptor has exactly one owner, and every owned one is open. (FD-6)

    Args:
        present: how many descriptors of each namespace are open.
        owners: how many of them each owner has: the provider, messages in transit, consumers.
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
    """
    No namespace belongs to two live sets. (LIFE-9)

    Args:
        live: the identities in each set.
    """
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
    """Each hand-over of an incarnation passes the same namespaces; another's others. (LIFE-3)"""
    sets: dict[Hashable, tuple[Hashable, ...]] = {}
    found = []
    for incarnation, identities in hand_overs:
        first = sets.setdefault(incarnation, identities)
        if first != identities:
            found.append(f"{incarnation} was handed over as {first} and as {identities}")
    return found + allocations_are_isolated(sets)


def ended_at_most_once(ends: Iterable[Hashable]) -> list[str]:
    """An incarnation ends once. (END-2)"""
    return [f"{one} ended {n} times" for one, n in Counter(ends).items() if n > 1]


def released_at_most_once(releases: Iterable[Hashable]) -> list[str]:
    """An incarnation is released once. (END-10)"""
    return [f"{one} was released {n} times" for one, n in Counter(releases).items() if n > 1]


def released_only_after_its_end(
    releases: Iterable[Hashable], alive: Iterable[Hashable]
) -> list[str]:
    """No incarnation that is alive has been released. (END-10)"""
    return [f"{one} is alive and released" for one in set(releases) & set(alive)]


# --- Announcing the end ------------------------------------------------------------------------


def end_is_pushed_at_most_once(pushes: Iterable[tuple[Hashable, Hashable]]) -> list[str]:
    """
    The end of an incarnation is pushed to a connection once at most. (END-12)

    Args:
        pushes: (connection, incarnation) of every push.
    """
    return [
        f"connection {connection} was told {n} times of the end of {incarnation}"
        for (connection, incarnation), n in Counter(pushes).items()
        if n > 1
    ]


def end_is_told_only_to_whom_it_concerns(
    pushes: Iterable[tuple[Hashable, Hashable]], handed: Iterable[tuple[Hashable, Hashable]]
) -> list[str]:
    """
    An end is pushed only to connections to which the incarnation was handed over. (END-12)

    Args:
        pushes: (connection, incarnation) of every push.
        handed: (connection, incarnation) of every hand-over.
    """
    wrong = set(pushes) - set(handed)
    return [f"connection {c} was told of the end of {i}, which it never had" for c, i in wrong]


def every_holder_has_heard(
    handed: Iterable[tuple[Hashable, Hashable]],
    told: Iterable[tuple[Hashable, Hashable]],
    ended: Iterable[Hashable],
    open_connections: Iterable[Hashable],
) -> list[str]:
    """
    At rest: every open connection that was handed an incarnation has been told its end. (END-12)

    Args:
        handed: (connection, incarnation) of every hand-over.
        told: (connection, incarnation) of every push, and of every end that was answered.
        ended: incarnations whose end was announced.
        open_connections: connections that are open.
    """
    over, is_open = set(ended), set(open_connections)
    holders = {(c, i) for c, i in handed if c in is_open and i in over}
    return [f"connection {c} was not told the end of {i}" for c, i in holders - set(told)]


def at_most_one_live_set(
    own: Iterable[tuple[Hashable, str]],
    owing: Iterable[Hashable],
    provided: Iterable[tuple[Hashable, str]],
) -> list[str]:
    """
    A consumer that has its own namespaces and owes no end has none at the provider. (SELF-7)

    Args:
        own: (consumer, allocation id) of every set made by self-service that is alive.
        owing: consumers that still have to tell the provider of an end.
        provided: (consumer, allocation id) of every set that is alive at the provider, or will be
            made there, for that consumer.
    """
    settled = set(own) - {(c, a) for c, a in own if c in set(owing)}
    return [f"{c} has {a} twice" for c, a in settled & set(provided)]


def one_outcome(*, is_delivered: bool, is_refused: bool) -> list[str]:
    """A request is granted or refused, not both."""
    return ["the caller got namespaces, and a refusal"] if is_delivered and is_refused else []


def self_service_is_loud_and_for_a_reason(
    *, has_turned: bool, audits: int, is_refused: bool
) -> list[str]:
    """
    A consumer serves itself once at most, reports it once, and not after a refusal. (SELF-4, ERR-5)

    Args:
        has_turned: whether it served itself.
        audits: how often it reported that.
        is_refused: whether the provider refused the request while the consumer waited.
    """
    found = []
    if audits != has_turned:
        found.append(f"served itself {has_turned:d} times, reported it {audits} times")
    if has_turned and is_refused:
        found.append("served itself after a refusal")
    return found


# --- One connection ----------------------------------------------------------------------------


def answers_come_in_order(history: Sequence[Spoken], *, is_closed: bool) -> list[str]:
    """
    Every reply answers the oldest message that has none, or is a pushed end. (WIRE-14, WIRE-15)

    Args:
        history: all messages on a connection, as the provider read and sent them.
        is_closed: whether the provider has closed it; only then may an error stand last that
            answers no message, because it concerns the connection as a whole.
    """
    matched = _match(history)
    found = [
        f"{message} was answered by {reply}"
        for message, reply in matched.answered
        if not _can_answer(message, reply)
    ]
    is_error = all(isinstance(reply, NamespaceError) for reply in matched.surplus)
    if len(matched.surplus) > (is_closed and is_error):
        found.append(f"nothing was asked, but answered: {matched.surplus}")
    return found


def every_message_is_answered(history: Sequence[Spoken]) -> list[str]:
    """At rest: no message of an open connection waits for its answer. (END-13, LIFE-13)"""
    return [f"{message} was never answered" for message in unanswered(history)]


def nothing_follows_a_close(actions: Sequence[str]) -> list[str]:
    """Nothing is sent on a connection after it is closed; items: "sent" or "closed"."""
    if "closed" in actions and actions.index("closed") != len(actions) - 1:
        return [f"after the close came {actions[actions.index('closed') + 1 :]}"]
    return []


def unanswered(history: Sequence[Spoken]) -> list[Message | None]:
    """List the messages that have no answer yet, the oldest first."""
    return _match(history).open


def told_unasked(history: Sequence[Spoken]) -> list[str]:
    """List the allocations whose end was pushed: no open message asked for it."""
    return _match(history).pushed


# --- Errors ------------------------------------------------------------------------------------


def an_error_changes_nothing(before: object, after: object) -> list[str]:
    """A refused event leaves the state as it was; both are snapshots. (LIFE-1, ERR-1)"""
    return [] if before == after else [f"an error changed {before} into {after}"]


@dataclass
class _Matched:
    """The messages of a connection, each reply matched to what it answers."""

    open: list[Message | None] = field(default_factory=list)
    answered: list[tuple[Message | None, Message]] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)
    surplus: list[Message] = field(default_factory=list)


def _match(history: Sequence[Spoken]) -> _Matched:
    matched = _Matched()
    for verb, message in history:
        oldest = matched.open[0] if matched.open else None
        if verb == "read":
            matched.open.append(message)
        elif isinstance(message, AllocationEnded) and message != oldest:
            matched.pushed.append(message.allocation_id)
        elif message is not None and matched.open:
            matched.answered.append((matched.open.pop(0), message))
        elif message is not None:
            matched.surplus.append(message)
    return matched


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
