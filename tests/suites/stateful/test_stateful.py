"""Whatever consumers, processes and crashes do in whatever order, every promise is kept.

Two machines. `Handoffs` (`transport.testing.machine`) is to a provider whatever consumers could be;
`AdversarialProvider` (`linux.testing.adversary`) is to a consumer whatever a provider could be.
Both run on the model, on the bare kernels, on real sockets over a simulated node, and on real
sockets over this one, and take every row of the tables on each.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from linux.simulated import SimulatedBackend
from linux.testing.adversary import STEPS as ADVERSARY_STEPS
from linux.testing.adversary import AdversarialProvider, adversary_for
from linux.testing.worlds import SimulatedWorld
from specs.invariants import InvariantBroken
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.lifecycle import ALLOCATION, CONSUMER, NOTICE
from statemachine.provider import Limits, ProviderKernel
from statemachine.states import AllocationState
from statemachine.table import compile_table
from statemachine.testing.tables import HOMES
from tests.campaign import stateful_campaign
from tests.suites.stateful.adapters import InProcess, LinuxNode, machine
from tests.suites.stateful.cells import counted, missing
from tests.suites.stateful.names import (
    NAMES,
    ON_LINUX,
    PROCESSES,
    SHARES,
    adapter_of,
    counterpart_of,
)
from tests.suites.stateful.processes import OnProcessOfOurs
from tests.suites.stateful.tour import CONSUMER_TOUR, PROVIDER_TOUR, C, RuleCall, take
from transport.contract import Recovery
from transport.descriptors import DescriptorBundle
from transport.testing.adapter import Adapter
from transport.testing.gated_backend import GatedBackend
from transport.testing.in_process import Pipe
from transport.testing.machine import STEPS, Handoffs
from transport.testing.possible import Inexplicable


def parameter(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.needs_root] if name in ON_LINUX else [])


ADAPTERS: Final = [parameter(name) for name in NAMES]
"""Those that have every ability but to be killed, and can be looked into."""


@pytest.fixture
def node(request: pytest.FixtureRequest, tmp_path: Path, allocation_id: str) -> LinuxNode | None:
    """What the adapter of this node needs; the others need nothing."""
    if request.getfixturevalue("name") not in ON_LINUX:
        return None
    found = (request.getfixturevalue(name) for name in ("cgroup2", "image_root"))
    return LinuxNode(tmp_path, *found)


@pytest.fixture
def handoffs(name: str, node: LinuxNode | None, allocation_id: str) -> type[Handoffs]:
    return machine(allocation_id, lambda: adapter_of(name, node))


@pytest.fixture
def adversary(
    name: str, node: LinuxNode | None, allocation_id: str
) -> Iterator[type[AdversarialProvider]]:
    counterpart = counterpart_of(name, allocation_id, node)
    yield adversary_for(counterpart)
    counterpart.close()


def examples(share: float, steps: int) -> settings:
    most = max(1, round(settings().max_examples * share))
    return settings(max_examples=most, stateful_step_count=steps)


@pytest.mark.parametrize("name", [*ADAPTERS, *map(parameter, PROCESSES)])
def test_a_provider_keeps_its_promises(name: str, handoffs: type[Handoffs]) -> None:
    run_state_machine_as_test(handoffs, settings=examples(SHARES[name], STEPS))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_consumer_keeps_its_promises(name: str, adversary: type[AdversarialProvider]) -> None:
    run_state_machine_as_test(adversary, settings=examples(SHARES[name], ADVERSARY_STEPS))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_row_of_a_provider_is_taken(name: str, handoffs: type[Handoffs]) -> None:
    with counted() as hits:
        take(handoffs, PROVIDER_TOUR)
    assert missing(hits, ALLOCATION) == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_row_of_a_consumer_is_taken(name: str, adversary: type[AdversarialProvider]) -> None:
    with counted() as hits:
        take(adversary, CONSUMER_TOUR)
    assert missing(hits, CONSUMER, NOTICE) == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_request_may_wait_for_a_release_that_an_operator_wanted(
    name: str, handoffs: type[Handoffs]
) -> None:
    steps: list[tuple[str, dict[str, Any]]] = [
        ("a_line_is_opened", {}),
        ("a_line_asks_many_things_at_once", {"who": 0, "picks": [0]}),
        ("its_release_takes_time", {"pick": 0, "how": "operator", "meanwhile": ["ask"]}),
    ]
    take(handoffs, tuple(steps))


def test_a_row_that_is_not_taken_is_named(allocation_id: str) -> None:
    with counted() as hits:
        take(machine(allocation_id, lambda: adapter_of("kernels", None)), PROVIDER_TOUR[:2])
    assert "allocation unknown RequestAdmitted" not in missing(hits, ALLOCATION)
    assert "allocation handed_off InitDied" in missing(hits, ALLOCATION)


# --- The machines can fail ---------------------------------------------------------------------


@pytest.fixture
def kernels(allocation_id: str) -> type[Handoffs]:
    return machine(allocation_id, lambda: adapter_of("kernels", None))


def test_a_descriptor_without_an_owner_is_found(
    kernels: type[Handoffs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transport.testing.peer.DEADLINE_S", 0.05)
    kept: list[DescriptorBundle] = []
    pass_on = GatedBackend.bundle_of

    def keeping_a_copy(self: GatedBackend, name: str) -> DescriptorBundle:
        bundle = pass_on(self, name)
        kept.append(bundle.duplicate())
        return bundle

    monkeypatch.setattr(GatedBackend, "bundle_of", keeping_a_copy)
    try:
        with pytest.raises(AssertionError, match=r"are open, and \d have an owner"):
            take(kernels, PROVIDER_TOUR)
    finally:
        for bundle in kept:
            bundle.close()


def test_descriptors_in_another_order_are_found(
    kernels: type[Handoffs], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Pipe.send

    def reversing(self: Pipe, message: Any, bundle: DescriptorBundle | None = None) -> None:
        if bundle:
            parts = [descriptor for _, descriptor in bundle][::-1]
            bundle = DescriptorBundle(bundle.types, parts)
        send(self, message, bundle)

    monkeypatch.setattr(Pipe, "send", reversing)
    steps = [
        ("a_line_is_opened", {}),
        ("a_line_asks_many_things_at_once", {"who": 0, "picks": [2]}),
    ]
    with pytest.raises(InvariantBroken, match="announced"):
        take(kernels, tuple(steps))


@pytest.mark.parametrize(
    ("row", "leaves_out"),
    [
        (("InitDied", "handed_off"), do.ReleaseNamespaces),
        (("NamespacesReleased", "ended"), do.PushEnd),
        (("RequestRepeated", "handed_off"), do.GrantAskers),
        (("Unclaimed", "created"), "start claim timer"),
    ],
    ids=["never released", "never told", "never answered", "never claimed"],
)
def test_an_effect_that_is_left_out_is_found(
    kernels: type[Handoffs],
    monkeypatch: pytest.MonkeyPatch,
    row: tuple[str, str],
    leaves_out: Any,
) -> None:
    monkeypatch.setattr("transport.testing.peer.DEADLINE_S", 0.05)
    rows = [
        type(each)(
            each.event,
            each.source,
            each.target,
            tuple(x for x in each.effects if x is not leaves_out and str(x) != leaves_out)
            if (each.event.__name__, each.source.value) == row
            else each.effects,
        )
        for each in ALLOCATION.rows
    ]
    mutant = compile_table("allocation", rows, initial=ALLOCATION.initial, finals=ALLOCATION.finals)
    with HOMES.replaced(mutant), pytest.raises((AssertionError, KeyError)):
        take(kernels, PROVIDER_TOUR)


SAID: Final = ("something_is_said_and_not_waited_for", {"who": 0, "pick": C, "is_end": False})
ANSWERED: Final = ("what_was_said_is_answered", {"who": 0})
KILLED: Final = ("the_provider_is_killed", {})
SETTLED: Final = ("all_that_is_under_way_comes_to_its_end", {})
TOO_MUCH: Final = "another_user_asks_too_much"


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ("allocations_per_uid", [("some_consumer_asks", {"pick": n}) for n in (0, 2, C)]),
        ("connections_per_uid", [("another_user_connects_too_often", {})]),
        ("open_per_connection", [(TOO_MUCH, {"pick": 0, "lines": 1, "is_flood": False})]),
        ("open_per_connection", [(TOO_MUCH, {"pick": 0, "lines": 1, "is_flood": True})]),
        ("open_per_uid", [(TOO_MUCH, {"pick": 0, "lines": 3, "is_flood": False})]),
    ],
)
def test_a_limit_that_is_one_too_high_is_found(
    allocation_id: str, limit: str, steps: list[RuleCall]
) -> None:
    def brain(limits: Limits) -> ProviderKernel:
        return ProviderKernel(replace(limits, **{limit: getattr(limits, limit) + 1}))

    def adapter(make: Callable[[Limits], ProviderKernel]) -> Adapter:
        return InProcess(SimulatedWorld(), make, ConsumerKernel)

    take(machine(allocation_id, lambda: adapter(ProviderKernel)), tuple(steps))
    with pytest.raises(AssertionError):
        take(machine(allocation_id, lambda: adapter(brain)), tuple(steps))


@pytest.mark.parametrize("name", ["kernels", "process"])
def test_what_was_told_before_a_kill_and_is_not_true_after_it_is_found(
    name: str, allocation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machine(allocation_id, lambda: adapter_of(name, None))
    steps = (SAID, ANSWERED, KILLED, SETTLED)
    take(made, steps)
    recover = SimulatedBackend.recover

    def forgetting(self: SimulatedBackend) -> Recovery:
        found = recover(self)
        for adoption in found.adoptions:
            self.release_namespaces(adoption.request.allocation_id)
        return Recovery()

    monkeypatch.setattr(SimulatedBackend, "recover", forgetting)
    with pytest.raises(Inexplicable, match="explains NamespaceResponse"):
        take(made, steps)


def test_an_end_under_way_that_is_confirmed_and_does_not_happen_is_found(
    kernels: type[Handoffs], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(r for r in ALLOCATION.rows if (r.event, r.source) == _END_OF_WHAT_IS_HELD)
    rows = [replace(r, target=r.source, effects=(do.ConfirmEnd,)) if r is row else r for r in ROWS]
    mutant = compile_table("allocation", rows, initial=ALLOCATION.initial, finals=ALLOCATION.finals)
    end = ("something_is_said_and_not_waited_for", {"who": 0, "pick": C, "is_end": True})
    steps = (SAID, ANSWERED, end, ("what_was_said_is_answered", {"who": 1}), SETTLED)
    take(kernels, steps)
    with HOMES.replaced(mutant), pytest.raises(Inexplicable):
        take(kernels, steps)


ROWS: Final = ALLOCATION.rows
_END_OF_WHAT_IS_HELD: Final = (on.EndReceived, AllocationState.HANDED_OFF)


def test_a_provider_is_killed_in_the_middle_of_a_creation(allocation_id: str) -> None:
    adapters: list[OnProcessOfOurs] = []

    def adapter() -> Adapter:
        adapters.append(OnProcessOfOurs(SimulatedWorld()))
        return adapters[-1]

    begun = ("a_creation_is_begun_that_takes_long", {"pick": C, "is_made": False})
    take(machine(allocation_id, adapter), (begun, KILLED, SETTLED))
    assert adapters[0].statuses[0] == signal.SIGKILL
    created = [e for e, _ in adapters[0].past if isinstance(e, on.NamespacesCreated)]
    assert len(created) == 1, "the creation that was held up when it was killed went on"


# --- As a part of a campaign -------------------------------------------------------------------


def test_a_campaign_has_a_task_for_everything_and_each_can_be_repeated() -> None:
    tasks = stateful_campaign.tasks(1.0)
    assert len({task.name for task in tasks}) == len(tasks)
    assert len(stateful_campaign.tasks(3.0)) == 3 * len(tasks)
    one, same = (stateful_campaign.run(7, "kernels", "adversary", 5) for _ in range(2))
    assert one.discoveries == []
    assert missing(one.cells["kernels"], CONSUMER, NOTICE) == []
    assert one.cells == same.cells
    assert one.figures["steps"] == same.figures["steps"] > one.figures["examples"] > 5


def test_what_a_campaign_finds_comes_as_a_test_that_does_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = AssertionError("a promise")
    steps = ["state = Machine()", "state.some_consumer_asks(pick=3)", "state.teardown()"]
    error.add_note("\n".join(["Failing test case:", *steps]))
    (found,) = stateful_campaign.discoveries(error, "kernels", "handoffs", "again")
    assert found.title == "AssertionError: a promise"
    namespace: dict[str, Any] = {}
    exec(found.script, namespace)
    asked: list[int] = []
    monkeypatch.setattr(Handoffs, "some_consumer_asks", lambda self, pick: asked.append(pick))
    namespace["test_a_promise_that_is_not_kept"]()
    assert asked == [3]
