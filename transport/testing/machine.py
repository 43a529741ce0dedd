"""A machine that does to a provider whatever consumers and crashes do, and knows what is promised.

Consumers are of two kinds: ours, each on a connection of its own, and bare lines that carry several
allocations, say many things at once, and write down every word.

`Handoffs` is Hypothesis' half: rules, and the invariants of `specs/invariants.py` after every step.
The model beside it knows no states: only which allocation is alive, under which request, in which
incarnation, who holds it, and which namespaces it was handed over with; and, while messages about
it are under way, all that it may be (`possible`). Some rules begin what takes time (a creation, a
release, a provider that is not ready), disturb it and wait for its end. Others begin and do not
wait: later rules run meanwhile, until all that is under way is heard, or its provider is killed.

`adapter` has the other half: the provider, and what can be done to the machine that it runs on. To
hold a provider of your own to the promises:

    class Yours(Handoffs):
        prefix = "nsh-test-mine"

        def open_adapter(self) -> Adapter:
            return Adapter(Path("/run/pact/handoff.sock"), KernelInspector(Features.probe()))

    TestYours = Yours.TestCase

and, to have it killed and started again between two steps, an adapter that can:

    class Killable(Adapter):
        abilities = frozenset({Ability.RESTART})

        def stop(self) -> None: ...
        def start(self) -> None: ...

Nor need there be a socket: an adapter that says how to open a line, and how to ask as a consumer of
ours does, is as good (`in_process` has the bare kernels, and the model).
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Container, Hashable, Iterable, Iterator
from contextlib import (
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import Final, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    SocketUnavailable,
)
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits

from ..descriptors import Inspector, NamespaceIdentity
from .adapter import Ability, Adapter, Asker, Held, History, StalledWork, Voice
from .peer import wait_until
from .possible import FIRST, Possible

WAIT_S: Final = 10.0
STEPS: Final = 25
"""How many things happen in one run of the machine."""

SETTINGS: Final = settings(
    deadline=None, stateful_step_count=STEPS, suppress_health_check=[HealthCheck.too_slow]
)
"""Of `Handoffs.TestCase`: how fast a machine is today is no property of a provider."""

LINES_MAX: Final = 3
SPEAKERS_MAX: Final = 2
"""Most lines of each kind that speak and are not listened to."""
UNDER_WAY_MAX: Final = 2
"""Most allocations that messages are under way about."""
UNANSWERED_MAX: Final = 4
"""Most messages under way about one allocation."""
HOLDERS_MAX: Final = 6
"""Most consumers of ours that hold something."""

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT

_pick: Final = st.integers(min_value=0, max_value=5)


def requests_of(prefix: str, image: str | None) -> tuple[NamespaceRequest, ...]:
    """Three allocations; the first also under another order, which is another request."""
    return (
        NamespaceRequest(f"{prefix}-a", (NET, PID, MOUNT), image),
        NamespaceRequest(f"{prefix}-a", (PID, NET, MOUNT), image),
        NamespaceRequest(f"{prefix}-b", (MOUNT, PID)),
        NamespaceRequest(f"{prefix}-c", (PID,)),
    )


TIGHT: Final = Limits(
    open_per_connection=8, open_per_uid=20, allocations_per_uid=2, connections_per_uid=28
)
"""The lowest limits with which whatever is not to reach them has room."""


def another(request: NamespaceRequest) -> NamespaceRequest:
    """Ask for the same allocation in another way."""
    return NamespaceRequest(request.allocation_id, (*request.namespaces[1:], NET, MOUNT)[:2])


class User(Enum):
    """Who speaks."""

    OURS = auto()
    """The user who runs the machine."""
    ANOTHER = auto()


OwnedBy = User | Literal["one of them"] | None


@dataclass(slots=True)
class Incarnation:
    """What the model knows of one incarnation."""

    number: int
    request: NamespaceRequest
    identities: tuple[NamespaceIdentity, ...] | None = None
    """None as long as it was not handed over."""
    owner: OwnedBy = None
    """Whose it is: it counts for the user who asked for it first, until the provider is another."""
    processes: int = 0
    was_used: bool = False
    holders: list[Held] = field(default_factory=list)
    askers: set[int] = field(default_factory=set)
    """The talkers that asked for it and have not hung up."""

    @property
    def name(self) -> str:
        return self.request.allocation_id

    @property
    def is_claimed(self) -> bool:
        """Whether a consumer is there for it, or has been in it."""
        return bool(self.was_used or self.holders or self.askers)


class Talker:
    """A consumer that speaks message by message, and keeps every word as the provider sees it."""

    def __init__(
        self, number: int, voice: Voice, unsettled: Container[str], user: User = User.OURS
    ) -> None:
        self.number = number
        self.voice = voice
        self.user = user
        self.said: list[always.Spoken] = []
        self.overheard: Counter[str] = Counter()
        """Ends that it was told of while nothing was certain of the allocation."""
        self._unsettled = unsettled

    def say(self, *messages: Message) -> None:
        """Say all of it in one breath."""
        self.said += [("read", message) for message in messages]
        self.voice.say(*messages)

    def hear(self) -> Message:
        while True:
            message = self.voice.hear()
            assert message is not None, "the provider has hung up"
            self.said.append(("sent", message))
            if isinstance(message, AllocationEnded) and message.allocation_id in self._unsettled:
                self.overheard[message.allocation_id] += 1
            else:
                return message

    def hears(self, *messages: Message) -> None:
        """Hear just these."""
        for message in messages:
            heard = self.hear()
            assert heard == message, f"{heard} instead of {message}"

    def is_told(self, kind: type[Message]) -> None:
        """Hear something of a kind."""
        heard = self.hear()
        assert isinstance(heard, kind), f"{heard} instead of {kind.__name__}"

    def hear_until(self, last: Message) -> list[Message]:
        """Hear something that must come, and whatever comes before it."""
        heard = [self.hear()]
        while heard[-1] != last:
            heard.append(self.hear())
        return heard[:-1]


@dataclass(eq=False, slots=True)
class Speaker:
    """A line on which things are said and not waited for: either requests or ends."""

    talker: Talker
    is_asker: bool
    unheard: deque[tuple[str, int]] = field(default_factory=deque)
    """Whose answers come next: the allocation, and the number of the message."""
    handed: Counter[tuple[str, tuple[NamespaceIdentity, ...]]] = field(default_factory=Counter)
    """What it was handed, and has not been told the end of."""


class Handoffs(RuleBasedStateMachine):
    """
    What peers and the node may do with a provider, and what must be true meanwhile.

    Subclass it with `open_adapter` and a `prefix`. Of the allocations whose ids begin with the
    prefix none may be alive when it starts; when it is torn down, none is.
    """

    prefix = ""
    """The prefix of every id, which shows whose the allocations are."""

    def open_adapter(self) -> Adapter:
        """Get the provider; called once for each run, and closed by the machine."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.adapter = self.open_adapter()
        self.before = open_namespaces(self.adapter.inspector)
        self.requests = requests_of(self.prefix, self.adapter.image)
        self.numbers = count(1)
        self.lives: dict[str, Incarnation] = {}
        self.hand_overs: list[tuple[int, tuple[object, ...]]] = []
        self.over: set[str] = set()
        self.possible: dict[str, Possible] = {}
        """The allocations of which nothing is certain; they are not among `lives`."""
        self.before_that: dict[str, Incarnation] = {}
        """What those were when it was certain, if they were alive."""
        self.speakers: list[Speaker] = []
        self.stuck: dict[str, StalledWork] = {}
        """Whose creation or release is held up until further notice."""
        self.talkers: list[Talker] = []
        self.handed: set[tuple[int, int]] = set()
        """Which talker was handed which incarnation."""
        self.told: list[tuple[int, int]] = []
        """Which talker was told of the end of which incarnation, unless it had asked for it."""
        self.ended: set[int] = set()

    # Consumers.

    @rule(pick=_pick)
    def some_consumer_asks(self, pick: int) -> None:
        request = self.settled[pick % len(self.settled)]
        life = self.lives.get(request.allocation_id)
        if life is None:
            has_room = self.has_room(User.OURS)
            if has_room is None:
                return
            is_granted = has_room
        else:
            is_granted = life.request == request
        if not is_granted:
            self.is_refused(request)
        elif sum(len(each.holders) for each in self.known_lives) < HOLDERS_MAX:
            self.is_obtained(request)

    def is_obtained(self, request: NamespaceRequest) -> None:
        handoff = self.consumer.obtain(request)
        assert not handoff.is_degraded
        life = self.is_handed_over(request, handoff.response, handoff.identities)
        life.holders.append(handoff)

    def is_handed_over(
        self,
        request: NamespaceRequest,
        response: NamespaceResponse,
        identities: tuple[NamespaceIdentity, ...],
        user: User = User.OURS,
    ) -> Incarnation:
        """Note what a consumer was handed; it begins an incarnation if none was alive."""
        life = self.begins(request, user)
        if life.identities is None:
            life.identities = identities
        self.hand_overs.append((life.number, identities))
        self.is_as_asked(request, response, identities)
        return life

    def is_as_asked(
        self,
        request: NamespaceRequest,
        response: NamespaceResponse,
        identities: tuple[NamespaceIdentity, ...],
    ) -> None:
        own = map(self.adapter.inspector.own, request.namespaces)
        always.require(
            always.response_answers_its_request(request, response),
            always.descriptors_are_what_the_response_says(
                response.fd_types, [identity.kind for identity in identities]
            ),
            always.namespaces_are_not_the_nodes_own(identities, own),
        )

    def begins(self, request: NamespaceRequest, owner: OwnedBy = User.OURS) -> Incarnation:
        """Note that an allocation is alive."""
        name = request.allocation_id
        if name not in self.lives:
            self.lives[name] = Incarnation(next(self.numbers), request, owner=owner)
            self.over.discard(name)
        return self.lives[name]

    def is_refused(self, request: NamespaceRequest) -> None:
        with pytest.raises(CreationFailed), closing(self.consumer.obtain(request)):
            raise AssertionError(f"{request} was granted")

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_consumer_goes(self, pick: int) -> None:
        life = self.one(pick)
        if life.holders:
            life.holders.pop().close()

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_holder_ends_it(self, pick: int) -> None:
        life = self.one(pick)
        if life.holders:
            assert life.holders[0].end(WAIT_S)
            self.has_ended(life)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def some_consumer_ends_it(self, pick: int) -> None:
        life = self.one(pick)
        self.consumer.end(life.name, WAIT_S)
        self.has_ended(life)

    @precondition(lambda self: self.over)
    @rule(pick=_pick)
    def some_consumer_ends_what_is_over(self, pick: int) -> None:
        names = sorted(self.over)
        self.consumer.end(names[pick % len(names)], WAIT_S)

    @rule()
    def some_consumer_ends_what_never_was(self) -> None:
        with pytest.raises(AllocationNotFound):
            self.consumer.end(self.never.allocation_id, WAIT_S)

    @rule(name=st.sampled_from(["", "..", "a/b", "cgroup.procs", "x" * 129]))
    def some_consumer_asks_nonsense(self, name: str) -> None:
        self.is_refused(NamespaceRequest(name, (PID,)))

    @rule()
    def some_consumer_asks_for_an_image_that_is_not_there(self) -> None:
        self.is_refused(NamespaceRequest(f"{self.prefix}-d", (MOUNT,), "no/such.sqfs"))

    # Bare lines.

    @precondition(lambda self: len(self.talkers) < LINES_MAX)
    @rule(is_another=st.booleans())
    def a_line_is_opened(self, is_another: bool = False) -> None:
        can = self.can(Ability.USERS)
        self.talkers.append(self.caller(User.ANOTHER if is_another and can else User.OURS))

    @precondition(lambda self: self.talkers)
    @rule(who=_pick, picks=st.lists(_pick, min_size=1, max_size=5))
    def a_line_asks_many_things_at_once(self, who: int, picks: list[int]) -> None:
        talker = self.talkers[who % len(self.talkers)]
        messages: list[NamespaceRequest | AllocationEnded] = [*self.settled, self.never]
        questions = [messages[pick % len(messages)] for pick in picks]
        talker.say(*questions)
        for question in questions:
            if isinstance(question, NamespaceRequest):
                self.is_answered(talker, question)
            else:
                talker.hears(AllocationNotFound(question.allocation_id))

    def is_answered(self, talker: Talker, request: NamespaceRequest) -> None:
        life = self.lives.get(request.allocation_id)
        answer = talker.hear()
        has_room = life is not None or self.has_room(talker.user)
        if life is not None and life.request != request:
            assert isinstance(answer, CreationFailed), answer
        elif isinstance(answer, NamespaceResponse):
            assert has_room is not False, f"{talker.user} has more than the limit allows"
            self.is_taken(talker, request, answer)
        else:
            assert is_over_limit(answer), answer
            assert has_room is not True, f"{talker.user} has less than the limit allows: {answer}"

    def is_taken(
        self, talker: Talker, request: NamespaceRequest, response: NamespaceResponse
    ) -> Incarnation:
        """Look at what a line was handed, and close it."""
        with talker.voice.take() as bundle:
            inspect = self.adapter.inspector.inspect
            identities = tuple(inspect(descriptor.fileno()) for _, descriptor in bundle)
        life = self.is_handed_over(request, response, identities, talker.user)
        self.handed.add((talker.number, life.number))
        life.askers.add(talker.number)
        return life

    @precondition(lambda self: self.talkers and self.lives)
    @rule(who=_pick, pick=_pick)
    def a_line_ends_it(self, who: int, pick: int) -> None:
        talker, life = self.talkers[who % len(self.talkers)], self.one(pick)
        ended = AllocationEnded(life.name)
        talker.say(ended)
        talker.hears(ended)
        self.has_ended(life, by=talker)

    @precondition(lambda self: self.talkers)
    @rule(who=_pick)
    def a_line_is_hung_up(self, who: int) -> None:
        self.hangs_up(self.talkers.pop(who % len(self.talkers)))

    @rule(pick=_pick)
    def a_line_is_lost_while_it_asks(self, pick: int) -> None:
        request = self.one_to_ask_for(pick)
        if request is None:
            return
        with self.calling() as talker:
            talker.say(request)
        self.is_obtained(request)

    @precondition(lambda self: self.one_free(0))
    @rule(pick=_pick)
    def a_line_changes_its_mind(self, pick: int) -> None:
        request = self.one_free(pick)
        assert request is not None
        ended = AllocationEnded(request.allocation_id)
        with self.calling() as talker:
            talker.say(request, ended)
            answer = talker.hear()
            if isinstance(answer, NamespaceResponse):
                life = self.is_taken(talker, request, answer)
                talker.hears(ended)
                self.has_ended(life)
            else:
                assert isinstance(answer, CreationFailed), answer
                talker.hears(ended)
                self.has_come_to_nothing(request)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_line_ends_it_and_begins_anew(self, pick: int) -> None:
        life = self.one(pick)
        if life.owner is not User.OURS and not self.has_room(User.OURS):
            return
        with self.calling() as talker:
            talker.say(AllocationEnded(life.name), life.request)
            talker.hears(AllocationEnded(life.name))
            answer = talker.hear()
            assert isinstance(answer, NamespaceResponse), answer
            self.has_ended(life, is_last=False)
            self.is_taken(talker, life.request, answer)

    def hears_of_the_end(self, talker: Talker, life: Incarnation, *, has_asked: bool) -> None:
        """Each holder is told once; the push may still cross an end that a consumer sends."""
        talker.say(self.never)
        heard = talker.hear_until(AllocationNotFound(self.never.allocation_id))
        assert set(heard) <= {AllocationEnded(life.name)}, heard
        words = [(talker.number, life.number)] * (len(heard) + talker.overheard.pop(life.name, 0))
        self.told += words
        if has_asked and not words:
            self.handed.discard((talker.number, life.number))

    # Processes.

    @precondition(lambda self: self.can(Ability.PROCESSES) and self.lives)
    @rule(pick=_pick)
    def a_process_joins(self, pick: int) -> None:
        self.joins(self.one(pick))

    def joins(self, life: Incarnation) -> None:
        # The second one changes nothing that a provider could see.
        is_first = not life.processes
        name = life.name
        with self.adapter.seeing(on.ScopePopulated, name) if is_first else nullcontext():
            self.adapter.join(name)
        life.processes += 1
        life.was_used = True

    @precondition(lambda self: any(life.processes for life in self.lives.values()))
    @rule(pick=_pick)
    def a_process_leaves(self, pick: int) -> None:
        used = [life for life in self.lives.values() if life.processes]
        life = used[pick % len(used)]
        self.adapter.leave(life.name)
        life.processes -= 1
        if not life.processes:
            self.has_ended(life)

    @precondition(
        lambda self: (
            self.can(Ability.PROCESSES) and any(not life.processes for life in self.lives.values())
        )
    )
    @rule(pick=_pick)
    def a_process_passes_through(self, pick: int) -> None:
        unused = [life for life in self.lives.values() if not life.processes]
        life = unused[pick % len(unused)]
        self.adapter.pass_through(life.name)
        self.has_ended(life)

    @precondition(lambda self: self.can(Ability.PROCESSES) and self.lives)
    @rule(pick=_pick)
    def it_is_frozen_and_thawed(self, pick: int) -> None:
        name = self.one(pick).name
        self.adapter.freeze(name, is_frozen=True)
        self.adapter.freeze(name, is_frozen=False)

    @precondition(lambda self: self.can(Ability.INITS) and self.lives)
    @rule(pick=_pick)
    def an_init_dies(self, pick: int) -> None:
        life = self.one(pick)
        self.adapter.kill_init(life.name)
        self.has_ended(life)

    # An operator, and time.

    @precondition(lambda self: self.can(Ability.OPERATOR) and self.lives)
    @rule(pick=_pick)
    def an_operator_releases_it(self, pick: int) -> None:
        life = self.one(pick)
        self.adapter.release(life.name)
        self.has_ended(life)

    @precondition(lambda self: self.can(Ability.TIME) and self.lives)
    @rule(pick=_pick)
    def no_consumer_claims_it_in_time(self, pick: int) -> None:
        life = self.one(pick)
        self.is_noticed()
        runs, name = self.adapter.is_running, life.name
        wait_until(
            lambda: runs(Timer.CLAIM, name) is not life.is_claimed,
            f"{name}: the claim timer runs if and only if it is not claimed",
        )
        if not life.is_claimed:
            self.adapter.expire(Timer.CLAIM, name)
            self.has_ended(life)

    def is_noticed(self) -> None:
        """Have the provider take in every loss; it does so before any newer connection."""
        with self.calling() as talker:
            talker.say(self.never)
            talker.hears(AllocationNotFound(self.never.allocation_id))

    # What takes time, and is disturbed.

    @precondition(lambda self: self.can(Ability.HOLD) and self.one_free(0))
    @rule(
        pick=_pick,
        is_made=st.booleans(),
        goes=st.booleans(),
        others=st.lists(st.sampled_from(["same", "other"]), max_size=2),
        fate=st.sampled_from(["made", "ended", "released"]),
    )
    def its_creation_takes_time(
        self, pick: int, is_made: bool, goes: bool, others: list[str], fate: str
    ) -> None:
        request = self.one_free(pick)
        assert request is not None
        name = request.allocation_id
        if fate == "released" and not self.can(Ability.OPERATOR):
            fate = "made"
        work = StalledWork.REPORT if is_made else StalledWork.CREATE
        seeing = self.adapter.seeing(on.NamespacesCreated, name)
        with ExitStack() as calls:
            first, ender = calls.enter_context(self.calling()), calls.enter_context(self.calling())
            asking = [first]
            with seeing if fate == "made" else nullcontext(), self.held(work):
                first.say(request)
                self.adapter.wait_held(work, name)
                for other in others:
                    talker = calls.enter_context(self.calling())
                    if other == "same":
                        self.says(talker, request)
                        asking.append(talker)
                    else:
                        talker.say(another(request))
                        talker.is_told(CreationFailed)
                if goes:
                    self.hangs_up(asking.pop(0))
                    self.is_noticed()
                if fate == "ended":
                    self.says(ender, AllocationEnded(name))
                elif fate == "released":
                    self.adapter.release(name)
            if fate == "made":
                self.begins(request)
                for talker in asking:
                    self.is_answered(talker, request)
                return
            for talker in asking:
                talker.is_told(CreationFailed)
            if fate == "ended":
                ender.hears(AllocationEnded(name))
            self.has_come_to_nothing(request)

    @precondition(lambda self: self.can(Ability.HOLD) and self.lives)
    @rule(
        pick=_pick,
        how=st.sampled_from(["word", "operator", "init"]),
        meanwhile=st.lists(
            st.sampled_from(
                ["ask", "end", "operator", "process", "init", "holder goes", "overdue"]
            ),
            max_size=5,
        ),
    )
    def its_release_takes_time(self, pick: int, how: str, meanwhile: list[str]) -> None:
        life = self.one(pick)
        with ExitStack() as calls:
            # Only what is released has been announced; with requests waiting, nothing else tells.
            with (
                self.adapter.seeing(on.NamespacesReleased, life.name),
                self.held(StalledWork.RELEASE),
            ):
                ending = _Ending(self, life, calls)
                if how == "word" or not ending.is_disturbed(how):
                    ending.is_disturbed("end")
                self.adapter.wait_held(StalledWork.RELEASE)
                for disturbance in meanwhile:
                    ending.is_disturbed(disturbance)
            ending.is_over()

    @precondition(lambda self: self.can(Ability.HANGS) and self.lives)
    @rule(pick=_pick, meanwhile=st.lists(st.sampled_from(["ask", "end", "overdue"]), max_size=3))
    def something_in_it_does_not_die(self, pick: int, meanwhile: list[str]) -> None:
        life = self.one(pick)
        if PID not in life.request.namespaces:
            return
        with ExitStack() as calls:
            self.adapter.block_release(life.name)
            try:
                ending = _Ending(self, life, calls)
                with self.adapter.seeing(on.ReleaseDelayed, life.name):
                    ending.is_disturbed("end")
                for disturbance in meanwhile:
                    ending.is_disturbed(disturbance)
            finally:
                self.adapter.unblock_release(life.name)
            ending.is_over()

    @precondition(lambda self: self.can(Ability.SCARCITY) and not self.possible)
    @rule(pick=_pick)
    def there_are_no_descriptors(self, pick: int) -> None:
        request = self.one_to_ask_for(pick)
        if request is None:
            return
        with self.calling() as talker:
            with self.adapter.scarcity():
                talker.say(request)
                talker.is_told(FdPassing)
            self.begins(request)

    # The provider.

    @precondition(lambda self: self.can(Ability.RESTART))
    @rule()
    def the_provider_starts_anew(self) -> None:
        self.the_provider_stops()
        self.adapter.start()

    @precondition(lambda self: self.can(Ability.RESTART) and self.lives)
    @rule(pick=_pick, what=st.sampled_from(["init", "process leaves", "process passes"]))
    def something_happens_while_no_provider_serves(self, pick: int, what: str) -> None:
        life = self.one(pick)
        self.the_provider_stops()
        if what == "init" and self.can(Ability.INITS):
            self.adapter.kill_init(life.name)
        elif not self.can(Ability.PROCESSES):
            what = "nothing"
        elif what == "process leaves" and life.processes:
            for _ in range(life.processes):
                self.adapter.leave(life.name)
        elif not life.processes:
            self.adapter.pass_through(life.name)
        else:
            what = "nothing"
        self.adapter.start()
        if what != "nothing":
            self.has_ended(life)

    @precondition(lambda self: self.can(Ability.RESTART) and self.can(Ability.HOLD) and self.lives)
    @rule(pick=_pick, what=st.sampled_from(["handed over", "no descriptors", "overdue"]))
    def it_is_asked_and_ended_before_the_provider_is_ready(self, pick: int, what: str) -> None:
        life = self.one(pick)
        ended = AllocationEnded(life.name)
        self.the_provider_stops()
        with ExitStack() as calls:
            with self.held(StalledWork.RECOVER):
                self.adapter.start()
                talker = calls.enter_context(self.calling())
                with self.adapter.seeing(on.EndReceived, life.name):
                    talker.say(life.request, ended)
                if what == "overdue" and self.can(Ability.TIME):
                    self.adapter.expire(Timer.READINESS, "")
                    talker.is_told(SocketUnavailable)
                    talker.is_told(SocketUnavailable)
                    return
                if what == "no descriptors" and self.can(Ability.SCARCITY):
                    calls.enter_context(self.adapter.scarcity())
            answer = talker.hear()
            if isinstance(answer, NamespaceResponse):
                self.is_taken(talker, life.request, answer)
            else:
                assert isinstance(answer, FdPassing), answer
            talker.hears(ended)
            self.has_ended(life)

    @precondition(lambda self: self.can(Ability.KILL))
    @rule()
    def the_provider_is_killed(self) -> None:
        self.adapter.kill()
        self.let_go_on(StalledWork.CREATE, StalledWork.REPORT)
        self.the_provider_is_gone()
        self.adapter.start()

    def the_provider_stops(self) -> None:
        """Stop the provider: what was handed over still is; only new messages are refused."""
        self.let_go_on(StalledWork.CREATE, StalledWork.REPORT)
        self.adapter.stop()
        self.the_provider_is_gone()

    def the_provider_is_gone(self) -> None:
        """Hear what it has still said, and let everyone hang up; the next one knows no users."""
        while self.speakers:
            speaker = self.speakers.pop()
            self.hears_last_words(speaker)
            self.hangs_up(speaker.talker)
        for possible in self.possible.values():
            possible.provider_died()
        for life in self.known_lives:
            life.owner = None
            for handoff in life.holders:
                handoff.close()
            life.holders.clear()
        while self.talkers:
            self.hangs_up(self.talkers.pop())

    # What is under way, and not waited for.

    @rule(who=_pick, pick=_pick, is_end=st.booleans())
    def something_is_said_and_not_waited_for(self, who: int, pick: int, is_end: bool) -> None:
        request = self.requests[pick % len(self.requests)]
        message = AllocationEnded(request.allocation_id) if is_end else request
        if self.is_unsettled(request):
            self.says_without_waiting(self.speaker(who, is_asker=not is_end), message)

    @precondition(lambda self: self.heard_soon)
    @rule(who=_pick)
    def what_was_said_is_answered(self, who: int) -> None:
        speakers = self.heard_soon
        self.hears_next(speakers[who % len(speakers)])

    @precondition(lambda self: self.speakers)
    @rule(who=_pick)
    def a_speaker_goes(self, who: int) -> None:
        speaker = self.speakers.pop(who % len(self.speakers))
        self.hangs_up(speaker.talker)

    @precondition(
        lambda self: self.can(Ability.HOLD) and not self.stuck and self.one_free(0) is not None
    )
    @rule(pick=_pick, is_made=st.booleans())
    def a_creation_is_begun_that_takes_long(self, pick: int, is_made: bool) -> None:
        request = self.one_free(pick)
        if request is None or not self.is_unsettled(request):
            return
        work = StalledWork.REPORT if is_made else StalledWork.CREATE
        self.stuck[request.allocation_id] = work
        self.adapter.hold(work, request.allocation_id)
        self.says_without_waiting(self.speaker(pick, is_asker=True), request)
        self.adapter.wait_held(work, request.allocation_id)

    @precondition(lambda self: self.can(Ability.HANGS) and not self.stuck and self.lives)
    @rule(pick=_pick)
    def a_release_is_begun_that_takes_long(self, pick: int) -> None:
        life = self.one(pick)
        if PID not in life.request.namespaces or not self.is_unsettled(life.request):
            return
        self.stuck[life.name] = StalledWork.RELEASE
        self.adapter.block_release(life.name)
        ended = AllocationEnded(life.name)
        with self.adapter.seeing(on.ReleaseDelayed, life.name):
            self.says_without_waiting(self.speaker(pick, is_asker=False), ended)

    @precondition(lambda self: self.stuck and self.can(Ability.OPERATOR))
    @rule()
    def an_operator_releases_what_takes_long(self) -> None:
        for name in self.stuck:
            self.adapter.release(name)
            self.possible[name].may_have_ended()

    @precondition(lambda self: self.stuck)
    @rule()
    def what_takes_long_goes_on(self) -> None:
        self.let_go_on(*StalledWork)

    @precondition(lambda self: self.possible)
    @rule()
    def all_that_is_under_way_comes_to_its_end(self) -> None:
        self.settles()

    def is_unsettled(self, request: NamespaceRequest) -> bool:
        """Leave open what becomes of an allocation from now on; say whether it may be spoken of."""
        name = request.allocation_id
        if name not in self.possible:
            if len(self.possible) >= UNDER_WAY_MAX:
                return False
            life = self.lives.get(name)
            # An end that is under way may make room, and a request may take it.
            if life is None and self.has_room(User.OURS) is not True:
                return False
            if life is not None and life.owner is not User.OURS and not self.has_room(User.OURS):
                return False
            alive, identities = (life.request, life.identities) if life else (None, None)
            self.possible[name] = Possible(name, alive, identities, was_ever=name in self.over)
            if life is not None:
                self.before_that[name] = self.lives.pop(name)
            self.over.discard(name)
        return self.possible[name].unanswered < UNANSWERED_MAX

    def speaker(self, who: int, *, is_asker: bool) -> Speaker:
        """One that says such things; who speaks already, or who has not spoken yet."""
        known = [each for each in self.speakers if each.is_asker is is_asker]
        if len(known) < SPEAKERS_MAX and who % (len(known) + 1) == 0:
            self.speakers.append(Speaker(self.caller(), is_asker))
            return self.speakers[-1]
        return known[who % len(known)]

    def says_without_waiting(
        self, speaker: Speaker, message: NamespaceRequest | AllocationEnded
    ) -> None:
        name = message.allocation_id
        speaker.unheard.append((name, self.possible[name].said(message)))
        speaker.talker.say(message)

    @property
    def heard_soon(self) -> list[Speaker]:
        """Those whose next answer comes whatever else happens."""
        return [x for x in self.speakers if x.unheard and x.unheard[0][0] not in self.stuck]

    def hears_next(self, speaker: Speaker) -> None:
        """Hear the next answer; who was handed something may hear of its end before."""
        message = speaker.talker.voice.hear()
        assert message is not None, "the provider has hung up"
        while self.is_push(speaker, message):
            message = speaker.talker.voice.hear()
            assert message is not None, "the provider has hung up"
        self.takes_answer(speaker, message)

    def hears_last_words(self, speaker: Speaker) -> None:
        """Hear what has arrived from a provider that is gone, but for its excuses."""
        while (message := speaker.talker.voice.hear()) is not None:
            if isinstance(message, SocketUnavailable):
                return
            if not self.is_push(speaker, message):
                self.takes_answer(speaker, message)

    def is_push(self, speaker: Speaker, message: Message) -> bool:
        """Take in the end of what a speaker was handed, if that is what it hears."""
        if not (speaker.is_asker and isinstance(message, AllocationEnded)):
            return False
        mine = [each for each in speaker.handed if each[0] == message.allocation_id]
        assert mine, f"told of the end of {message.allocation_id}, which it was not handed"
        # Of two that it was handed the older one has ended first.
        self.possible[mine[0][0]].told_of_the_end(mine[0][1])
        del speaker.handed[mine[0]]
        return True

    def takes_answer(self, speaker: Speaker, answer: Message) -> None:
        assert speaker.unheard, f"{answer}, and nothing is unanswered"
        name, number = speaker.unheard.popleft()
        identities = None
        if isinstance(answer, NamespaceResponse):
            identities = self.looks_at(speaker.talker)
            self.is_as_asked(self.possible[name].request_of(number), answer, identities)
            speaker.handed[name, identities] = 1
        self.possible[name].answered(number, answer, identities)

    def looks_at(self, talker: Talker) -> tuple[NamespaceIdentity, ...]:
        """Say which namespaces came with the last message, and close them."""
        inspect = self.adapter.inspector.inspect
        with talker.voice.take() as bundle:
            return tuple(inspect(descriptor.fileno()) for _, descriptor in bundle)

    def let_go_on(self, *works: StalledWork) -> None:
        """Let go on what is held up."""
        for name, work in tuple(self.stuck.items()):
            if work in works:
                del self.stuck[name]
                if work is StalledWork.RELEASE:
                    self.adapter.unblock_release(name)
                else:
                    self.adapter.let_go(work, name)

    def settles(self) -> None:
        """Hear all answers; then ask what each allocation has come to."""
        self.let_go_on(*StalledWork)
        for speaker in self.speakers:
            while speaker.unheard:
                self.hears_next(speaker)
        self.is_noticed()
        for possible in self.possible.values():
            possible.all_abandoned()
        for name in sorted(self.possible):
            self.is_settled(name, *self.is_found(self.possible[name]))
        while self.speakers:
            speaker = self.speakers.pop()
            assert not speaker.handed, f"not told of the end of {list(speaker.handed)}"
            self.hangs_up(speaker.talker)

    def is_found(
        self, possible: Possible
    ) -> tuple[NamespaceRequest, tuple[NamespaceIdentity, ...]]:
        """Ask for an allocation: what it has is what it had, unless that has ended."""
        otherwise = next(r for r in self.requests if r.allocation_id == possible.name)
        while True:
            request = possible.request_for(otherwise)
            with self.calling() as talker:
                number = possible.said(request)
                talker.voice.say(request)
                answer = talker.voice.hear()
                assert answer is not None, "the provider has hung up"
                if isinstance(answer, NamespaceResponse):
                    identities = self.looks_at(talker)
                    self.is_as_asked(request, answer, identities)
                    possible.answered(number, answer, identities)
                    return request, identities
            possible.answered(number, answer)

    def is_settled(
        self,
        name: str,
        request: NamespaceRequest,
        identities: tuple[NamespaceIdentity, ...],
    ) -> None:
        """Note that it is certain again what an allocation is; let all hear it whom it concerns."""
        possible = self.possible.pop(name)
        earlier = self.before_that.pop(name, None)
        for speaker in self.speakers:
            self.hears_up_to_now(speaker, possible, identities)
        if earlier is not None and possible.alive == {FIRST}:
            life = self.lives[name] = earlier
            life.identities = identities
        else:
            if earlier is not None:
                self.lives[name] = earlier
                self.has_ended(earlier, is_last=False)
            life = self.begins(request, "one of them")
            life.identities = identities
        self.hand_overs.append((life.number, identities))

    def hears_up_to_now(
        self, speaker: Speaker, possible: Possible, alive: tuple[NamespaceIdentity, ...]
    ) -> None:
        """Hear the ends of all that a speaker was handed but what is alive."""
        self.possible[possible.name] = possible
        speaker.talker.voice.say(self.never)
        while (message := speaker.talker.voice.hear()) != AllocationNotFound(
            self.never.allocation_id
        ):
            assert message is not None, "the provider has hung up"
            assert self.is_push(speaker, message), message
        del self.possible[possible.name]
        speaker.handed.pop((possible.name, alive), None)
        missed = [each for each in speaker.handed if each[0] == possible.name]
        assert not missed, f"not told of the end of {missed}"

    # Limits.

    @precondition(lambda self: self.can(Ability.LIMITS) and self.can(Ability.USERS))
    @rule()
    def another_user_connects_too_often(self) -> None:
        most = self.adapter.limits.connections_per_uid
        have = sum(talker.user is User.ANOTHER for talker in self.talkers)
        with ExitStack() as calls:
            for _ in range(most - have):
                calls.enter_context(self.calling(User.ANOTHER))
            with self.calling(User.ANOTHER) as refused:
                self.is_closed(refused, CreationFailed)
            self.is_noticed()
        with self.calling(User.ANOTHER) as talker:
            talker.say(self.never)
            talker.hears(AllocationNotFound(self.never.allocation_id))

    @precondition(
        lambda self: self.can(Ability.LIMITS) and self.can(Ability.USERS) and self.can(Ability.HOLD)
    )
    @rule(pick=_pick, lines=st.integers(1, 3), is_flood=st.booleans())
    def another_user_asks_too_much(self, pick: int, lines: int, is_flood: bool) -> None:
        request = self.one_free(pick, User.ANOTHER)
        if request is None or self.stuck:
            return
        limits = self.adapter.limits
        most = limits.flood if is_flood else limits.open_per_connection
        # One line is over its own limit, several only over that of their user.
        each = most + (is_flood or lines == 1)
        with ExitStack() as calls:
            talkers = []
            seeing = self.adapter.seeing(on.NamespacesCreated, request.allocation_id)
            with seeing, self.held(StalledWork.CREATE):
                with self.hearing_requests(request, lines * each):
                    for _ in range(lines):
                        talkers.append(calls.enter_context(self.calling(User.ANOTHER)))
                        talkers[-1].voice.say(*[request] * each)
                self.adapter.wait_held(StalledWork.CREATE, request.allocation_id)
                if is_flood:
                    for talker in talkers:
                        self.is_closed(talker, FdPassing)
            life = self.begins(request, User.ANOTHER)
            if not is_flood:
                granted = sum(self.count_granted(talker, request, each) for talker in talkers)
                assert granted == min(lines * most, limits.open_per_uid), f"{granted} granted"
        assert life.owner is User.ANOTHER

    @contextmanager
    def hearing_requests(self, request: NamespaceRequest, count: int) -> Iterator[None]:
        """Wait, at the end of a block, until a provider that tells has read so many requests."""

        def times() -> int:
            read = (event for event, _ in self.adapter.history())
            return sum(isinstance(x, on.RequestReceived) and x.request == request for x in read)

        before = times()
        yield
        if self.adapter.history():
            wait_until(lambda: times() - before >= count, f"{count} requests")

    def count_granted(self, talker: Talker, request: NamespaceRequest, answers: int) -> int:
        """Count the answers that grant a request; all others name a limit."""
        granted = 0
        for _ in range(answers):
            answer = talker.voice.hear()
            if isinstance(answer, NamespaceResponse):
                granted += 1
                self.is_handed_over(request, answer, self.looks_at(talker), talker.user)
            else:
                assert is_over_limit(answer), answer
        return granted

    def is_closed(self, talker: Talker, why: type[Message]) -> None:
        answer = talker.voice.hear()
        assert isinstance(answer, why), answer
        assert talker.voice.hear() is None, "and not hung up on"

    # What is true.

    @invariant()
    def every_promise_is_kept(self) -> None:
        ends, releases = ends_and_releases(self.adapter.history())
        live: dict[Hashable, Iterable[Hashable]]
        live = {name: life.identities or () for name, life in self.lives.items()}
        always.require(
            always.allocations_are_isolated(live),
            always.an_incarnation_is_one_set_of_namespaces(self.hand_overs),
            always.ended_at_most_once(ends),
            always.released_at_most_once(releases),
            always.end_is_pushed_at_most_once(self.told),
            always.end_is_told_only_to_whom_it_concerns(self.told, self.handed),
            always.every_holder_has_heard(
                self.handed, self.told, self.ended, [talker.number for talker in self.talkers]
            ),
        )
        for talker in self.talkers:
            always.require(
                always.answers_come_in_order(talker.said, is_closed=False),
                always.every_message_is_answered(talker.said),
            )
        for name, life in self.lives.items():
            assert not any(handoff.wait_ended(0.0) for handoff in life.holders), name
        for name, possible in self.possible.items():
            earlier = self.before_that.get(name)
            if earlier is not None and any(each.wait_ended(0.0) for each in earlier.holders):
                assert possible.may_have_ended_first(), f"{name}: a holder was told of no end"
        self.every_descriptor_has_one_owner()

    def every_descriptor_has_one_owner(self) -> None:
        """What is not the provider's, nor on its way with an answer, is a consumer's, or closed."""
        held = [handoff for life in self.known_lives for handoff in life.holders]
        on_their_way = sum(possible.unanswered for possible in self.possible.values())
        assert not any(os.get_inheritable(fd) for each in held for fd in each.bundle.filenos())

        def found() -> list[str]:
            owners: dict[Hashable, Counter[Hashable]] = {
                "the provider": self.adapter.kept(),
                **{f"consumer {n}": Counter(each.identities) for n, each in enumerate(held)},
            }
            present = open_namespaces(self.adapter.inspector)
            present.subtract(self.before)
            owned = sum(owners.values(), Counter())
            more = {x: min(present[x] - owned[x], on_their_way) for x in present}
            owners["what is under way"] = Counter({x: n for x, n in more.items() if n > 0})
            return always.every_descriptor_has_one_owner(present, owners)

        # A provider closes its copies only after they have left; a simulated node keeps what they
        # are copies of until then.
        if found():
            wait_until(lambda: not found(), "; ".join(found()))

    def teardown(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.adapter.close)
            for talker in (*self.talkers, *(each.talker for each in self.speakers)):
                stack.callback(talker.voice.hang_up)
            for life in self.known_lives:
                for handoff in life.holders:
                    stack.callback(handoff.close)
            stack.callback(self.let_go_on, *StalledWork)
            if self.possible:
                self.settles()
            for life in tuple(self.lives.values()):
                self.consumer.end(life.name, WAIT_S)
                self.has_ended(life)
            assert self.adapter.leftovers() == []

    # In one word.

    def can(self, ability: Ability) -> bool:
        return ability in self.adapter.abilities

    @property
    def consumer(self) -> Asker:
        return self.adapter.consumer()

    def caller(self, user: User = User.OURS) -> Talker:
        adapter = self.adapter
        voice = adapter.voice() if user is User.OURS else adapter.voice_of_another()
        return Talker(next(self.numbers), voice, self.possible, user)

    @contextmanager
    def calling(self, user: User = User.OURS) -> Iterator[Talker]:
        """Have a line for the length of a block."""
        talker = self.caller(user)
        try:
            yield talker
        finally:
            self.hangs_up(talker)

    def hangs_up(self, talker: Talker) -> None:
        talker.voice.hang_up()
        for life in self.known_lives:
            life.askers.discard(talker.number)

    def says(self, talker: Talker, message: Message) -> None:
        """Say something that is not answered yet, and have the provider read it."""
        talker.say(self.never, message)
        talker.hears(AllocationNotFound(self.never.allocation_id))
        self.is_noticed()  # connections take turns: this one's second message before a newer one's

    @contextmanager
    def held(self, work: StalledWork) -> Iterator[None]:
        """Hold up work for the length of a block."""
        self.adapter.hold(work)
        try:
            yield
        finally:
            self.adapter.let_go(work)

    def one(self, pick: int) -> Incarnation:
        names = sorted(self.lives)
        return self.lives[names[pick % len(names)]]

    @property
    def settled(self) -> list[NamespaceRequest]:
        """The requests for the allocations that nothing is under way about."""
        return [each for each in self.requests if each.allocation_id not in self.possible]

    @property
    def known_lives(self) -> list[Incarnation]:
        """Everything that was alive when that was certain last."""
        return [*self.lives.values(), *self.before_that.values()]

    def has_room(self, user: User) -> bool | None:
        """Say whether a user may have another allocation; None if that is not certain."""
        if not self.can(Ability.LIMITS):
            return True
        owners = [life.owner for life in self.lives.values()]
        # What is under way may be there for any user.
        at_most = sum(owner in (user, "one of them") for owner in owners) + len(self.possible)
        if at_most < self.adapter.limits.allocations_per_uid:
            return True
        is_full = owners.count(user) >= self.adapter.limits.allocations_per_uid
        return False if is_full else None

    def one_to_ask_for(self, pick: int) -> NamespaceRequest | None:
        """One of the requests that the provider must grant."""
        lives, has_room = self.lives, self.has_room(User.OURS) is True
        granted = [
            r
            for r in self.settled
            if (lives[r.allocation_id].request == r if r.allocation_id in lives else has_room)
        ]
        return granted[pick % len(granted)] if granted else None

    def one_free(self, pick: int, user: User = User.OURS) -> NamespaceRequest | None:
        """One of the requests whose allocation is not alive, and which a user must be granted."""
        free = [each for each in self.settled if each.allocation_id not in self.lives]
        has_room = self.has_room(user) is True
        return free[pick % len(free)] if free and has_room else None

    @property
    def never(self) -> AllocationEnded:
        """The end of what never was: its answer tells that everything before it was heard."""
        return AllocationEnded(f"{self.prefix}-never")

    def has_ended(
        self, life: Incarnation, by: Talker | None = None, *, is_last: bool = True
    ) -> None:
        """Everyone who holds it hears of it; then it is released, and its name is remembered."""
        for handoff in life.holders:
            assert handoff.wait_ended(WAIT_S), f"{life.name}: a holder was not told of the end"
            handoff.close()
        if is_last:
            self.adapter.wait_released(life.name)
        self.ended.add(life.number)
        for talker in self.talkers:
            self.hears_of_the_end(talker, life, has_asked=talker is by)
        del self.lives[life.name]
        self.over.add(life.name)
        self.adapter.reap_killed(life.name)

    def has_come_to_nothing(self, request: NamespaceRequest) -> None:
        """It ended before it was alive."""
        self.adapter.wait_released(request.allocation_id)
        self.over.add(request.allocation_id)


class _Ending:
    """An allocation that has ended and is not released, and what is done to it."""

    def __init__(self, machine: Handoffs, life: Incarnation, calls: ExitStack) -> None:
        self.machine = machine
        self.life = life
        self.ended = AllocationEnded(life.name)
        self._calls = calls
        self._enders: list[Talker] = []
        self._early: list[Talker] = []
        self._is_announced = False
        self._has_init = True

    def is_disturbed(self, how: str) -> bool:
        """Disturb it; say whether that can be done here."""
        disturb = {
            "ask": self._ask,
            "end": self._end,
            "operator": self._operate,
            "process": self._populate,
            "init": self._kill_init,
            "holder goes": self._hang_up,
            "overdue": self._expire,
        }
        return disturb[how]()

    def is_over(self) -> None:
        """Let each hear what it waits for."""
        if not self._is_announced:
            for talker in self._enders:
                talker.hears(self.ended)
        machine, life = self.machine, self.life
        machine.has_ended(life, is_last=not self._early)
        for talker in self._early:
            machine.is_answered(talker, life.request)

    def _ask(self) -> bool:
        talker = self._call()
        if self._is_announced:
            talker.say(self.life.request)
            talker.is_told(CreationFailed)
        else:
            self.machine.says(talker, self.life.request)
            self._early.append(talker)
        return True

    def _end(self) -> bool:
        talker = self._call()
        if self._is_announced:
            talker.say(self.ended)
            talker.hears(self.ended)
        else:
            self.machine.says(talker, self.ended)
            self._enders.append(talker)
        return True

    def _operate(self) -> bool:
        if self.machine.can(Ability.OPERATOR):
            self.machine.adapter.release(self.life.name)
        return self.machine.can(Ability.OPERATOR)

    def _populate(self) -> bool:
        machine, life = self.machine, self.life
        if machine.can(Ability.PROCESSES):
            machine.joins(life)
            if life.processes == 1:
                with machine.adapter.seeing(on.ScopeEmptied, life.name):
                    machine.adapter.leave(life.name)
                life.processes = 0
        return machine.can(Ability.PROCESSES)

    def _kill_init(self) -> bool:
        machine = self.machine
        if machine.can(Ability.INITS) and self._has_init:
            self._has_init = False
            with machine.adapter.seeing(on.InitDied, self.life.name):
                machine.adapter.kill_init(self.life.name)
        return machine.can(Ability.INITS)

    def _hang_up(self) -> bool:
        while self.life.holders:
            self.life.holders.pop().close()
        self.machine.is_noticed()
        return True

    def _expire(self) -> bool:
        if self.machine.can(Ability.TIME) and not self._is_announced:
            self.machine.adapter.expire(Timer.RELEASE, self.life.name)
            self._is_announced = True
            for talker in self._enders:
                talker.hears(self.ended)
            while self._early:
                self._early.pop().is_told(CreationFailed)
        return self.machine.can(Ability.TIME)

    def _call(self) -> Talker:
        return self._calls.enter_context(self.machine.calling())


def is_over_limit(answer: Message | None) -> bool:
    """Say whether something is refused because of a limit, by its name."""
    return isinstance(answer, CreationFailed) and "limit" in str(answer)


IncarnationKey = tuple[str, int]
"""An allocation's name, and how often it had been created by then."""


def ends_and_releases(history: History) -> tuple[list[IncarnationKey], list[IncarnationKey]]:
    """Find every decision that an incarnation is over, and every report that nothing is left."""
    created: Counter[str] = Counter()
    ends: list[IncarnationKey] = []
    releases: list[IncarnationKey] = []
    for event, effects in history:
        if isinstance(event, on.NamespacesReleased):
            releases.append((event.allocation_id, created[event.allocation_id]))
        for effect in effects:
            if isinstance(effect, do.CreateNamespaces):
                created[effect.request.allocation_id] += 1
            elif isinstance(event, on.RemainsFound):
                continue  # An earlier provider had decided that, or died before anything was told.
            elif isinstance(effect, do.StartTimer) and effect.timer is Timer.RELEASE:
                ends.append((effect.allocation_id, created[effect.allocation_id]))
    return ends, releases


def open_namespaces(inspector: Inspector) -> Counter[Hashable]:
    """Count the descriptors of each namespace that this process has open."""
    found: Counter[Hashable] = Counter()
    for number in os.listdir("/proc/self/fd"):
        # Another thread may close it at any time.
        with suppress(FdPassing, OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(_MAY_BE_NAMESPACES):
                found[inspector.inspect(int(number))] += 1
    return found


_MAY_BE_NAMESPACES: Final = ("pid:[", "net:[", "mnt:[", "/memfd:")
"""How `/proc/self/fd` tells of them; not worth asking is whatever else a process has open."""
