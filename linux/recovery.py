"""Decide what a starting provider does with what it finds: the table store x kernel -> action.

The *store* is the journal. The *kernel* is what the Linux kernel shows of an incarnation: its init
(the anchor), and its scope, with the state that is marked on the scope itself. `ROWS` has a row for
each combination, with a verdict and an action. Only what is proved dead is released: by a recorded
end, by an init that has ended, by a scope that was removed or was used and is empty, or because it
was never handed to anyone. What may be alive is adopted, or kept and reported.

The journal may be damaged, older than the node, or lost. So no row releases anything because an
entry is missing.

    find_cases      what there is, for `linux.backend` and `linux.doctor`
    decide          the row for it
    ROWS            the table; chapter 7 of the book shows it
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from statemachine.messages import NamespaceRequest, objection, objection_to_id
from statemachine.record import record
from statemachine.states import AllocationState

from .anchor import (
    Anchor,
    AnchorIdentity,
    adopt,
    find_anchors,
    find_tokens,
    has_hidden_members,
    own_pid_namespace,
)
from .cgroups import Scope, anchor_path, described_scopes
from .features import Features
from .instance import OWN_TOKEN_PREFIX, scope_parents_of
from .journal import STATES, Entry, decode_request, encode_request

CREATED_MARK: Final = "created"
"""Marked on a scope before its allocation is answered: what has no mark was never handed over."""

HANDED_MARK: Final = "handed_off"
"""Marked on a scope once its allocation was handed over."""

ENDED_MARK: Final = "ended"
"""Marked on a scope before the end of its allocation is announced."""


class Store(Enum):
    """What the journal says of an incarnation."""

    NONE = "no entry"
    REQUESTED = "requested"
    MADE = "created or handed off"
    ENDED = "ended"


class Init(Enum):
    """What the Linux kernel says of its init."""

    HERE = "alive, in the anchors' cgroup"
    ELSEWHERE = "alive, outside it"
    DEAD = "proved dead"
    UNSEEN = "not to be seen from here"


class ScopeSeen(Enum):
    """What the Linux kernel says of its scope."""

    NOT_MADE = "none is ever made"
    GONE = "gone, or another's"
    UNDESCRIBED = "there, and does not say for what"
    UNMARKED = "not marked, empty"
    ENTERED = "not marked, with processes"
    UNUSED = "created, never used"
    BUSY = "created, with processes"
    OVER = "created, used and empty"
    ENDED = "ended"


class Verdict(Enum):
    """Whether an incarnation is alive."""

    ALIVE = "ALIVE"
    DEAD = "DEAD"
    UNKNOWN = "UNKNOWN"


class Action(Enum):
    """What a starting provider does with it."""

    ADOPT = "adopt"
    RELEASE = "release"
    KEEP = "keep and report"


class RecoveryRow(NamedTuple):
    """One row of the table, for every combination of its facts."""

    store: tuple[Store, ...]
    """What the journal may say in this row."""
    init: tuple[Init, ...]
    """What may be seen of the init in this row."""
    scope: tuple[ScopeSeen, ...]
    """What may be seen of the scope in this row."""
    verdict: Verdict
    """What is proved."""
    action: Action
    """What a starting provider does."""
    why: str
    """The proof, or what is missing for one."""


_ANY_SCOPE: Final = tuple(ScopeSeen)
_NOT_ENDED: Final = tuple(each for each in ScopeSeen if each is not ScopeSeen.ENDED)
_CREATED: Final = (ScopeSeen.UNUSED, ScopeSeen.BUSY, ScopeSeen.OVER)
_SEEN: Final = (Init.HERE, Init.ELSEWHERE, Init.DEAD)
_LIVING: Final = (Init.HERE, Init.ELSEWHERE)

ROWS: Final = (
    RecoveryRow(
        tuple(Store),
        (Init.UNSEEN,),
        _ANY_SCOPE,
        Verdict.UNKNOWN,
        Action.KEEP,
        "its init belongs to another PID namespace; nothing can be proved from this one",
    ),
    RecoveryRow(
        (Store.ENDED,),
        _SEEN,
        _ANY_SCOPE,
        Verdict.DEAD,
        Action.RELEASE,
        "its end was recorded before it was announced",
    ),
    RecoveryRow(
        (Store.MADE,),
        _SEEN,
        (ScopeSeen.ENDED,),
        Verdict.DEAD,
        Action.RELEASE,
        "its end is marked on the scope, and so the journal need not have it",
    ),
    RecoveryRow(
        (Store.MADE,),
        _LIVING,
        (ScopeSeen.NOT_MADE, ScopeSeen.UNMARKED, ScopeSeen.ENTERED, *_CREATED),
        Verdict.ALIVE,
        Action.ADOPT,
        "init and scope are there; if it is over, the adopting provider sees that",
    ),
    RecoveryRow(
        (Store.MADE,),
        (Init.HERE,),
        (ScopeSeen.GONE,),
        Verdict.DEAD,
        Action.RELEASE,
        "its scope was removed, which the Linux kernel allows only for an empty one",
    ),
    RecoveryRow(
        (Store.MADE,),
        (Init.ELSEWHERE,),
        (ScopeSeen.GONE,),
        Verdict.UNKNOWN,
        Action.KEEP,
        "neither init nor scope is where it was made; the cgroups seen may be others",
    ),
    RecoveryRow(
        (Store.MADE, Store.REQUESTED),
        (Init.DEAD,),
        _NOT_ENDED,
        Verdict.DEAD,
        Action.RELEASE,
        "its init has ended, and with it the allocation",
    ),
    RecoveryRow(
        (Store.REQUESTED,),
        (Init.HERE, Init.DEAD),
        (ScopeSeen.ENDED,),
        Verdict.DEAD,
        Action.RELEASE,
        "its end is marked on the scope, and so the journal need not have it",
    ),
    RecoveryRow(
        (Store.REQUESTED,),
        (Init.HERE,),
        _CREATED,
        Verdict.ALIVE,
        Action.ADOPT,
        "the scope is marked as created: the journal is older than the allocation",
    ),
    RecoveryRow(
        (Store.REQUESTED,),
        (Init.HERE,),
        (ScopeSeen.GONE, ScopeSeen.UNMARKED, ScopeSeen.ENTERED),
        Verdict.DEAD,
        Action.RELEASE,
        "half made: journal and scope agree that it was never handed over",
    ),
    RecoveryRow(
        (Store.REQUESTED, Store.NONE),
        (Init.ELSEWHERE,),
        _ANY_SCOPE,
        Verdict.UNKNOWN,
        Action.KEEP,
        "a process has its token, and is not where anchors are; nothing proves what it is",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE, Init.DEAD),
        (ScopeSeen.UNDESCRIBED,),
        Verdict.UNKNOWN,
        Action.KEEP,
        "its scope does not say what it was made for; another version may have made it",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE,),
        (ScopeSeen.UNUSED, ScopeSeen.BUSY),
        Verdict.UNKNOWN,
        Action.ADOPT,
        "init and scope are there, and the journal has lost it; the scope says what was asked for",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE,),
        (ScopeSeen.OVER,),
        Verdict.DEAD,
        Action.ADOPT,
        "its scope was used and is empty; the adopting provider ends it, after its grace",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE, Init.DEAD),
        (ScopeSeen.ENDED,),
        Verdict.DEAD,
        Action.RELEASE,
        "its end is marked on the scope",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE,),
        (ScopeSeen.UNMARKED,),
        Verdict.DEAD,
        Action.RELEASE,
        "half made: its scope was not marked as created, so it was never handed over",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE,),
        (ScopeSeen.GONE,),
        Verdict.DEAD,
        Action.RELEASE,
        "it was made ahead of any request, or its scope was removed, and only an empty one can be",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.HERE,),
        (ScopeSeen.ENTERED,),
        Verdict.UNKNOWN,
        Action.KEEP,
        "its scope was not marked as created, and processes run in it",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.DEAD,),
        (ScopeSeen.UNMARKED, ScopeSeen.UNUSED, ScopeSeen.OVER),
        Verdict.DEAD,
        Action.RELEASE,
        "it has no init, and nothing runs in its scope",
    ),
    RecoveryRow(
        (Store.NONE,),
        (Init.DEAD,),
        (ScopeSeen.ENTERED, ScopeSeen.BUSY),
        Verdict.UNKNOWN,
        Action.KEEP,
        "it has no init, but processes run in its scope",
    ),
)
"""
The decision table; each combination of facts that there can be is in exactly one row.

There is no anchors' cgroup where no scopes are made, what has neither entry, init nor scope is
nothing, and what has an entry needs no description: those combinations are not found.
"""


def decide(store: Store, init: Init, scope: ScopeSeen) -> RecoveryRow:
    """
    Find the row for a combination of facts.

    Raises:
        LookupError: there is no such combination.
    """
    for row in ROWS:
        if store in row.store and init in row.init and scope in row.scope:
            return row
    raise LookupError(f"{store}, {init}, {scope}: no row")


@record
class Case:
    """One incarnation that was found, and what it was decided by."""

    token: str
    """The incarnation's token."""
    store: Store
    """What the journal says."""
    init: Init
    """What the Linux kernel says of its init."""
    seen: ScopeSeen
    """What the Linux kernel says of its scope."""
    request: NamespaceRequest | None
    """What was asked for; None if neither entry nor scope says."""
    entry: Entry | None = None
    """Its entry in the journal, if it has one."""
    anchor: Anchor | None = None
    """The init, if it may be killed or adopted; owned by the holder of this case."""
    scope: Scope | None = None
    """Its scope, if there is one that is its own."""

    @property
    def row(self) -> RecoveryRow:
        """The row that decides."""
        return decide(self.store, self.init, self.seen)

    @property
    def action(self) -> Action:
        """What a starting provider does."""
        return self.row.action

    @property
    def name(self) -> str | None:
        """The allocation's id, if it is known."""
        return None if self.request is None else self.request.allocation_id

    def close(self) -> None:
        """Close the init's pidfd; the init lives on."""
        if self.anchor is not None:
            self.anchor.close()


def _is_nothing(case: Case) -> bool:
    """Say whether neither entry, init nor scope is there: it was removed since it was found."""
    is_gone = case.seen in (ScopeSeen.GONE, ScopeSeen.NOT_MADE)
    return case.entry is None and case.init is Init.DEAD and is_gone


def describe(instance: str, request: NamespaceRequest) -> str:
    """Write what a scope has to say of its allocation for the case that the journal is lost."""
    return json.dumps({"instance": instance, "request": encode_request(request)})


def read_description(text: str | None) -> tuple[str, NamespaceRequest] | None:
    """Read what `describe` wrote: instance and request; None if it is something else."""
    try:
        plain = json.loads(text or "")
        instance, request = str(plain["instance"]), decode_request(plain["request"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    # A workload can have written it: the instance becomes a path here, and so does the request.
    return None if objection_to_id(instance) or objection(request) else (instance, request)


def find_cases(
    entries: Iterable[Entry], instance: str, root: Path | None, features: Features
) -> list[Case]:
    """
    Find everything of one provider instance: its entries, its anchors, its scopes.

    Call it when no provider of the instance works on them.

    Args:
        entries: What its journal says.
        instance: Its name.
        root: Where cgroup v2 is mounted; None makes no scopes.
        features: What the Linux kernel can do.

    Returns:
        The entries' cases in their order, then those without an entry; the caller owns them.

    Raises:
        SyscallError: something cannot be read; nothing stays open.
    """
    # Keeps CRASH-8, CRASH-16.
    known = tuple(entries)
    search = _InstanceSearch(instance, known, root, features)
    try:
        return search.run(known)
    except BaseException:
        search.close()
        raise


class _InstanceSearch:
    """What was found so far of one instance."""

    def __init__(
        self, instance: str, entries: tuple[Entry, ...], root: Path | None, features: Features
    ) -> None:
        self._root: Final = root
        self._features: Final = features
        self._anchors: dict[str, Anchor] = {}
        self._is_partial = False
        self._requests: dict[str, NamespaceRequest] = {}
        """Of the scopes of this instance, by their owners' tokens."""
        self._paths: dict[str, Path] = {}
        """Of all scopes that have an owner, by its token."""
        self._elsewhere: Mapping[str, int] = {}
        self._own_pids: Final = own_pid_namespace()
        if root is not None:
            anchors = anchor_path(root, instance)
            self._is_partial = has_hidden_members(anchors)
            for scope in described_scopes(root, _parents(root, instance, entries)):
                found = read_description(scope.description)
                if scope.owner is not None:
                    self._paths[scope.owner] = scope.path
                    # A consumer that serves itself claims what a provider left that died between
                    # describing it and owning it: the description stays, and is not the consumer's.
                    is_its_own = scope.owner.startswith(OWN_TOKEN_PREFIX)
                    if found is not None and found[0] == instance and not is_its_own:
                        self._requests[scope.owner] = found[1]
            self._anchors = find_anchors(anchors)

    def run(self, entries: tuple[Entry, ...]) -> list[Case]:
        known = {entry.incarnation for entry in entries}
        unnamed = sorted({*self._anchors, *self._requests} - known)
        inits = {entry.incarnation: self._adopt(entry) for entry in entries}
        # An entry with an identity needs no search: the identity proves more than a token does.
        lost = {entry.incarnation for entry in entries if entry.anchor is None} | {*unnamed}
        self._elsewhere = find_tokens(lost - set(self._anchors))
        cases = [self._case_of(entry, inits[entry.incarnation]) for entry in entries]
        return cases + [case for case in map(self._unnamed, unnamed) if not _is_nothing(case)]

    def close(self) -> None:
        for anchor in self._anchors.values():
            anchor.close()

    def _adopt(self, entry: Entry) -> Init:
        if entry.incarnation in self._anchors:
            return Init.HERE
        if self._is_partial:
            return Init.UNSEEN
        if entry.anchor is None:
            return Init.DEAD
        identity = AnchorIdentity.from_json(entry.anchor)
        if identity.seen_from not in (0, self._own_pids):
            return Init.UNSEEN
        found = adopt(identity, entry.incarnation, self._features)
        if found is None:
            return Init.DEAD
        self._anchors[entry.incarnation] = found
        return Init.ELSEWHERE

    def _case_of(self, entry: Entry, init: Init) -> Case:
        token, store = entry.incarnation, _STORES[entry.state]
        if init is Init.DEAD and token in self._elsewhere:
            init = Init.ELSEWHERE
        scope = self._open(entry)
        seen = _see(scope, self._root)
        return Case(token, store, init, seen, entry.request, entry, self._anchors.get(token), scope)

    def _unnamed(self, token: str) -> Case:
        anchor, request = self._anchors.get(token), self._requests.get(token)
        if anchor is not None:
            init = Init.HERE
        elif token in self._elsewhere:
            init = Init.ELSEWHERE
        else:
            init = Init.UNSEEN if self._is_partial else Init.DEAD
        scope = None if token not in self._paths else Scope.at(self._paths[token], token)
        seen = _see(scope, self._root)
        if scope is not None and (request is None or request.allocation_id not in scope.path.name):
            request, seen = None, ScopeSeen.UNDESCRIBED
        return Case(token, Store.NONE, init, seen, request, None, anchor, scope)

    def _open(self, entry: Entry) -> Scope | None:
        if self._root is None:
            return None
        # What has its token is its own, also if cgroup v2 is mounted elsewhere now.
        path = self._paths.get(entry.incarnation)
        if path is None and entry.scope_path is not None:
            path = Path(entry.scope_path)
        if path is None:
            return Scope.open(self._root, entry.allocation_id, entry.incarnation)
        return Scope.at(path, entry.incarnation)


def _parents(root: Path, instance: str, entries: Iterable[Entry]) -> Iterator[str]:
    """Say in which cgroups scopes can be; settings may have been others when they were made."""
    yield from scope_parents_of(root, instance)
    for entry in entries:
        if entry.scope_path is not None:
            path = Path(entry.scope_path)
            if path.is_relative_to(root):
                yield str(path.parent.relative_to(root))


_STORES: Final = {
    AllocationState.REQUESTED: Store.REQUESTED,
    AllocationState.CREATED: Store.MADE,
    AllocationState.HANDED_OFF: Store.MADE,
    AllocationState.ENDED: Store.ENDED,
}


_MARKED: Final = {
    HANDED_MARK: AllocationState.HANDED_OFF,
    ENDED_MARK: AllocationState.ENDED,
}
"""What the journal may lack, because the scope says it."""


def state_noted(entry: Entry, scope: Scope | None) -> AllocationState:
    """Return the last state that is noted of an allocation: in its entry, or on its scope."""
    if scope is None or scope.is_gone():
        return entry.state
    marked = _MARKED.get(scope.marked() or "", entry.state)
    return max(entry.state, marked, key=STATES.index)


def _see(scope: Scope | None, root: Path | None) -> ScopeSeen:
    if root is None:
        return ScopeSeen.NOT_MADE
    if scope is None or scope.is_gone():
        return ScopeSeen.GONE
    mark = scope.marked()
    if mark == ENDED_MARK:
        return ScopeSeen.ENDED
    is_busy = scope.is_populated()
    if mark not in (CREATED_MARK, HANDED_MARK):
        return ScopeSeen.ENTERED if is_busy else ScopeSeen.UNMARKED
    if is_busy:
        return ScopeSeen.BUSY
    # Empty in two readings, as for every end.
    is_over = scope.was_used() and not scope.is_populated()
    return ScopeSeen.OVER if is_over else ScopeSeen.UNUSED
