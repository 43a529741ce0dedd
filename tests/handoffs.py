"""A machine that does to a provider whatever consumers and crashes do, and knows what is promised.

Consumers are of two kinds: ours, each on a connection of its own, and bare lines that carry several
allocations, say many things at once, and write down every word.

`Handoffs` is Hypothesis' half: rules, and the invariants of `specs/invariants.py` after every step.
The model beside it knows no states: only which allocation is alive, under which request, in which
incarnation, who holds it, and which namespaces it was handed over with.

`Adapter` is the other half: the provider, and what can be done to the machine that it runs on. Only
its socket is needed. Every further ability turns on the rules that need it. To hold a provider of
your own to the promises:

    class Yours(Handoffs):
        prefix = "nsh-test-mine"

        def open_adapter(self) -> Adapter:
            return Adapter(Path("/run/pact/handoff.sock"), KernelInspector(Features.probe()))

    TestYours = Yours.TestCase

and, to have it killed and started again between two steps, an adapter that can:

    class Killable(Adapter):
        abilities = frozenset({Ability.RESTART})

        def restart(self) -> None: ...
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from liar import Line, frame_of

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.events import Event
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from transport.descriptors import Inspector, NamespaceIdentity
from transport.request import Consumer, Handoff

WAIT_S: Final = 10.0
STEPS: Final = 25
LINES_MAX: Final = 3

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT

History = list[tuple[Event, tuple[Effect, ...]]]
"""What a provider of ours took in and decided, turn by turn."""

_pick: Final = st.integers(min_value=0, max_value=5)


class Ability(Enum):
    """What an adapter can do besides naming a socket."""

    PROCESSES = auto()
    """Start and end processes in an allocation's cgroup, and freeze them."""
    INITS = auto()
    """Kill the init of an allocation's PID namespace."""
    RESTART = auto()
    """Kill the provider, and start another on the same socket and the same state."""


class Adapter:
    """
    A provider under test. As it stands it has the wire, and nothing else.

    Subclass it to say more: name the abilities, and write the methods that each of them needs.
    What is not overridden is not called, or does nothing.

    Args:
        path: The provider's socket. It listens there, and whoever runs the machine may use it.
        inspector: Tells what a descriptor is that the provider passes.
        image: A uenv image that the provider has; None if there is none to be tried.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()

    def __init__(self, path: Path, inspector: Inspector, image: str | None = None) -> None:
        self.path = path
        self.inspector = inspector
        self.image = image

    # For PROCESSES.

    def join(self, name: str) -> None:
        """Let a process enter the allocation's cgroup and stay."""
        raise NotImplementedError

    def leave(self, name: str) -> None:
        """Let the process that joined last exit, and be reaped."""
        raise NotImplementedError

    def pass_through(self, name: str) -> None:
        """Let a process enter the cgroup and exit before anybody looks."""
        raise NotImplementedError

    def freeze(self, name: str, *, is_frozen: bool) -> None:
        """Freeze the cgroup, or thaw it."""
        raise NotImplementedError

    def bury(self, name: str) -> None:
        """Reap the processes that were killed with an allocation; called for each that ended."""

    # For INITS.

    def kill_init(self, name: str) -> None:
        """Kill the init of the allocation's PID namespace."""
        raise NotImplementedError

    # For RESTART.

    def restart(self) -> None:
        """Have another provider serve, on the state of the one before; return when it is ready."""
        raise NotImplementedError

    # For whoever can look inside.

    def wait_released(self, name: str) -> None:
        """Wait until nothing is left of an allocation that ended; over the wire, nothing tells."""

    def history(self) -> History:
        """What all providers so far took in and decided; empty for one that does not tell."""
        return []

    def leftovers(self) -> list[str]:
        """Whatever is left of allocations on the machine when all have ended."""
        return []

    def close(self) -> None:
        """Take back whatever was set up for this one run of the machine."""


def requests_of(prefix: str, image: str | None) -> tuple[NamespaceRequest, ...]:
    """Three allocations; the first also under another order, which is another request."""
    return (
        NamespaceRequest(f"{prefix}-a", (NET, PID, MOUNT), image),
        NamespaceRequest(f"{prefix}-a", (PID, NET, MOUNT), image),
        NamespaceRequest(f"{prefix}-b", (MOUNT, PID)),
        NamespaceRequest(f"{prefix}-c", (PID,)),
    )


@dataclass(slots=True)
class Life:
    """What the model knows of one incarnation."""

    number: int
    request: NamespaceRequest
    identities: tuple[object, ...]
    processes: int = 0
    holders: list[Handoff] = field(default_factory=list)


class Talker:
    """A consumer that speaks frame by frame, and keeps every word as the provider sees it."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.line = Line.to(path)
        self.said: list[always.Spoken] = []

    def say(self, *messages: Message) -> None:
        """Say all of it at once."""
        self.said += [("read", message) for message in messages]
        self.line.say(b"".join(map(frame_of, messages)))

    def hear(self) -> Message:
        message = self.line.hear()
        assert message is not None, "the provider has hung up"
        self.said.append(("sent", message))
        return message

    def hear_until(self, last: Message) -> list[Message]:
        """Hear something that must come, and whatever comes before it."""
        heard = [self.hear()]
        while heard[-1] != last:
            heard.append(self.hear())
        return heard[:-1]


class Handoffs(RuleBasedStateMachine):
    """
    What anybody may do with a provider, and what must be true meanwhile.

    Subclass it with `open_adapter` and a `prefix`. Of the allocations whose ids begin with the
    prefix none may be alive when it starts; when it is torn down, none is.
    """

    prefix = ""
    """What every id begins with; census and operators tell by it whose the allocations are."""

    def open_adapter(self) -> Adapter:
        """Get the provider; called once for each run, and closed by the machine."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.adapter = self.open_adapter()
        self.requests = requests_of(self.prefix, self.adapter.image)
        self.numbers = count(1)
        self.lives: dict[str, Life] = {}
        self.hand_overs: list[tuple[int, tuple[object, ...]]] = []
        self.over: set[str] = set()
        self.talkers: list[Talker] = []
        self.handed: set[tuple[int, int]] = set()
        """Which talker was handed which incarnation."""
        self.told: list[tuple[int, int]] = []
        """Which talker was told of the end of which incarnation, unless it had wished for it."""
        self.ended: set[int] = set()

    # Consumers.

    @rule(pick=_pick)
    def somebody_asks(self, pick: int) -> None:
        request = self.requests[pick % len(self.requests)]
        name = request.allocation_id
        life = self.lives.get(name)
        if life is not None and life.request != request:
            self.is_refused(request)
            return
        handoff = self.consumer.obtain(request)
        assert not handoff.is_degraded
        life = self.is_handed_over(request, handoff.response, handoff.identities)
        life.holders.append(handoff)

    def is_handed_over(
        self,
        request: NamespaceRequest,
        response: NamespaceResponse,
        identities: tuple[NamespaceIdentity, ...],
    ) -> Life:
        """Note what somebody was handed; it begins an incarnation if none was alive."""
        name = request.allocation_id
        if name not in self.lives:
            self.lives[name] = Life(next(self.numbers), request, identities)
            self.over.discard(name)
        life = self.lives[name]
        self.hand_overs.append((life.number, identities))
        always.require(
            always.response_answers_its_request(request, response),
            always.descriptors_are_what_the_response_says(
                response.fd_types, [identity.kind for identity in identities]
            ),
        )
        return life

    def is_refused(self, request: NamespaceRequest) -> None:
        with pytest.raises(CreationFailed):
            self.consumer.obtain(request)

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
    def somebody_else_ends_it(self, pick: int) -> None:
        life = self.one(pick)
        self.consumer.end(life.request.allocation_id, WAIT_S)
        self.has_ended(life)

    @precondition(lambda self: self.over)
    @rule(pick=_pick)
    def somebody_ends_what_is_over(self, pick: int) -> None:
        names = sorted(self.over)
        self.consumer.end(names[pick % len(names)], WAIT_S)

    @rule()
    def somebody_ends_what_never_was(self) -> None:
        with pytest.raises(AllocationNotFound):
            self.consumer.end(f"{self.prefix}-never", WAIT_S)

    @rule(name=st.sampled_from(["", "..", "a/b", "cgroup.procs", "x" * 129]))
    def somebody_asks_nonsense(self, name: str) -> None:
        with pytest.raises(CreationFailed):
            self.consumer.obtain(NamespaceRequest(name, (PID,)))

    # Bare lines.

    @precondition(lambda self: len(self.talkers) < LINES_MAX)
    @rule()
    def a_line_is_opened(self) -> None:
        self.talkers.append(Talker(next(self.numbers), self.adapter.path))

    @precondition(lambda self: self.talkers)
    @rule(who=_pick, picks=st.lists(_pick, min_size=1, max_size=5))
    def a_line_asks_many_things_at_once(self, who: int, picks: list[int]) -> None:
        talker = self.talkers[who % len(self.talkers)]
        wishes: list[NamespaceRequest | AllocationEnded] = [*self.requests, self.never]
        questions = [wishes[pick % len(wishes)] for pick in picks]
        talker.say(*questions)
        for question in questions:
            if isinstance(question, NamespaceRequest):
                self.is_answered(talker, question)
            else:
                assert talker.hear() == AllocationNotFound(question.allocation_id)

    def is_answered(self, talker: Talker, request: NamespaceRequest) -> None:
        answer = talker.hear()
        life = self.lives.get(request.allocation_id)
        if life is not None and life.request != request:
            assert isinstance(answer, CreationFailed), answer
            return
        assert isinstance(answer, NamespaceResponse), answer
        with talker.line.take() as bundle:
            inspect = self.adapter.inspector.inspect
            identities = tuple(inspect(descriptor.fileno()) for _, descriptor in bundle)
        life = self.is_handed_over(request, answer, identities)
        self.handed.add((talker.number, life.number))

    @precondition(lambda self: self.talkers and self.lives)
    @rule(who=_pick, pick=_pick)
    def a_line_ends_it(self, who: int, pick: int) -> None:
        talker, life = self.talkers[who % len(self.talkers)], self.one(pick)
        ended = AllocationEnded(life.request.allocation_id)
        talker.say(ended)
        assert talker.hear() == ended
        self.has_ended(life, by=talker)

    @precondition(lambda self: self.talkers)
    @rule(who=_pick)
    def a_line_is_hung_up(self, who: int) -> None:
        self.talkers.pop(who % len(self.talkers)).line.hang_up()

    def hears_of_the_end(self, talker: Talker, life: Life, *, has_wished: bool) -> None:
        """Whoever holds it is told once; a word may still cross the wish of whoever wished it."""
        talker.say(self.never)
        heard = talker.hear_until(AllocationNotFound(self.never.allocation_id))
        assert set(heard) <= {AllocationEnded(life.request.allocation_id)}, heard
        words = [(talker.number, life.number)] * len(heard)
        self.told += words
        if has_wished and not words:
            self.handed.discard((talker.number, life.number))

    # Processes.

    @precondition(lambda self: self.can(Ability.PROCESSES) and self.lives)
    @rule(pick=_pick)
    def a_process_joins(self, pick: int) -> None:
        life = self.one(pick)
        self.adapter.join(life.request.allocation_id)
        life.processes += 1

    @precondition(lambda self: any(life.processes for life in self.lives.values()))
    @rule(pick=_pick)
    def a_process_leaves(self, pick: int) -> None:
        used = [life for life in self.lives.values() if life.processes]
        life = used[pick % len(used)]
        self.adapter.leave(life.request.allocation_id)
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
        self.adapter.pass_through(life.request.allocation_id)
        self.has_ended(life)

    @precondition(lambda self: self.can(Ability.PROCESSES) and self.lives)
    @rule(pick=_pick)
    def it_is_frozen_and_thawed(self, pick: int) -> None:
        name = self.one(pick).request.allocation_id
        self.adapter.freeze(name, is_frozen=True)
        self.adapter.freeze(name, is_frozen=False)

    @precondition(lambda self: self.can(Ability.INITS) and self.lives)
    @rule(pick=_pick)
    def an_init_dies(self, pick: int) -> None:
        life = self.one(pick)
        self.adapter.kill_init(life.request.allocation_id)
        self.has_ended(life)

    # The provider.

    @precondition(lambda self: self.can(Ability.RESTART))
    @rule()
    def the_provider_starts_anew(self) -> None:
        self.adapter.restart()
        for life in self.lives.values():
            # What was handed over still is; only nobody is called any more.
            for handoff in life.holders:
                handoff.close()
            life.holders.clear()
        while self.talkers:
            self.talkers.pop().line.hang_up()

    # What is true.

    @invariant()
    def every_promise_is_kept(self) -> None:
        ends, releases = ends_and_releases(self.adapter.history())
        live = {name: life.identities for name, life in self.lives.items()}
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

    def teardown(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.adapter.close)
            for talker in self.talkers:
                stack.callback(talker.line.hang_up)
            for name, life in tuple(self.lives.items()):
                self.consumer.end(name, WAIT_S)
                self.has_ended(life)
            assert self.adapter.leftovers() == []

    # In one word.

    def can(self, ability: Ability) -> bool:
        return ability in self.adapter.abilities

    @property
    def consumer(self) -> Consumer:
        return Consumer(self.adapter.path, self.adapter.inspector)

    def one(self, pick: int) -> Life:
        names = sorted(self.lives)
        return self.lives[names[pick % len(names)]]

    @property
    def never(self) -> AllocationEnded:
        """The end of what never was: its answer tells that everything before it was heard."""
        return AllocationEnded(f"{self.prefix}-never")

    def has_ended(self, life: Life, by: Talker | None = None) -> None:
        """Everyone who holds it hears of it; then it is released, and its name is remembered."""
        name = life.request.allocation_id
        for handoff in life.holders:
            assert handoff.wait_ended(WAIT_S), f"{name}: a holder was not told of the end"
            handoff.close()
        self.adapter.wait_released(name)
        self.ended.add(life.number)
        for talker in self.talkers:
            self.hears_of_the_end(talker, life, has_wished=talker is by)
        del self.lives[name]
        self.over.add(name)
        self.adapter.bury(name)


Incarnation = tuple[str, int]
"""An allocation's name, and how often it had been created by then."""


def ends_and_releases(history: History) -> tuple[list[Incarnation], list[Incarnation]]:
    """Find every decision that an incarnation is over, and every report that nothing is left."""
    created: Counter[str] = Counter()
    ends: list[Incarnation] = []
    releases: list[Incarnation] = []
    for event, effects in history:
        if isinstance(event, on.NamespacesReleased):
            releases.append((event.allocation_id, created[event.allocation_id]))
        for effect in effects:
            if isinstance(effect, do.CreateNamespaces):
                created[effect.request.allocation_id] += 1
            elif isinstance(effect, do.StartTimer) and effect.timer is do.Timer.RELEASE:
                ends.append((effect.allocation_id, created[effect.allocation_id]))
    return ends, releases
