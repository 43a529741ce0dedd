"""The contract of a backend, as a suite to subclass: `transport.contract.Backend`, call by call."""

from __future__ import annotations

from itertools import count
from typing import Final

import pytest

from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.states import AllocationState
from statemachine.testing.strategies import ORDERS
from transport.contract import (
    CREATION,
    LEFT_BY_CRASH,
    LEFT_BY_FAILURE,
    RELEASE,
    Sighting,
    Step,
    plan,
)
from transport.testing.peer import wait_until

from .worlds import (
    HOLD_TIME_S,
    IMAGE,
    LIGHT,
    MOUNT,
    OCCUPATIONS,
    OTHER_IMAGE,
    PID,
    SCOPE_PREFIX,
    World,
)

ALL: Final = tuple(NamespaceType)

_numbers: Final = count(1)


def create(
    world: World,
    name: str,
    kinds: tuple[NamespaceType, ...] = LIGHT,
    image: str | None = None,
) -> NamespaceResponse:
    return world.backend.create_namespaces(NamespaceRequest(name, kinds, image))


def assert_never_was(world: World, name: str) -> None:
    assert world.backend.why_alive(name) is None
    assert world.leftovers() == []
    for ask in (world.backend.bundle_of, world.backend.release_namespaces):
        with pytest.raises(AllocationNotFound):
            ask(name)
    create(world, name)


class BackendContract:
    """
    What every backend promises the provider's driver. Subclass it with a fixture `world`:

        class TestMine(BackendContract):
            @pytest.fixture
            def world(self) -> Iterator[World]: ...

    It gives a `World` that was started, and closes it. Ids begin with `worlds.SCOPE_PREFIX`.
    """

    @pytest.fixture
    def allocation_id(self) -> str:
        """A valid id that was never used."""
        return f"{SCOPE_PREFIX}c{next(_numbers)}"

    @pytest.fixture
    def name(self, world: World, allocation_id: str) -> str:
        """An allocation that is alive and watched."""
        create(world, allocation_id)
        world.backend.watch(allocation_id)
        return allocation_id

    # --- Creating -------------------------------------------------------------------------------

    def test_basic_life(self, world: World, allocation_id: str) -> None:
        response = create(world, allocation_id, ALL, IMAGE)
        with world.backend.bundle_of(allocation_id) as bundle:
            assert bundle.types == response.fd_types == ALL
        world.release(allocation_id)
        assert world.leftovers() == []

    def test_every_order_of_every_subset_is_given_out_as_asked(
        self, world: World, allocation_id: str
    ) -> None:
        for number, order in enumerate(ORDERS):
            name = f"{allocation_id}-{number}"
            assert create(world, name, order) == NamespaceResponse(name, order, None)
            with world.backend.bundle_of(name) as bundle:
                assert bundle.types == order
                assert tuple(identity.kind for identity in world.inspect(bundle)) == order

    def test_the_response_says_where_the_image_is(self, world: World, allocation_id: str) -> None:
        response = create(world, allocation_id, (MOUNT,), OTHER_IMAGE)
        assert response.uenv_mount_path is not None
        assert response.uenv_mount_path.endswith("/uenv/deep/other")

    def test_an_allocation_keeps_its_namespaces(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id, ALL)
        assert world.identities(allocation_id) == world.identities(allocation_id)

    @pytest.mark.clause("LIFE-9")
    def test_two_allocations_share_no_namespace(self, world: World, allocation_id: str) -> None:
        create(world, f"{allocation_id}-a", ALL)
        create(world, f"{allocation_id}-b", ALL)
        ones, others = (
            world.identities(f"{allocation_id}-a"),
            world.identities(f"{allocation_id}-b"),
        )
        assert not set(ones) & set(others)

    def test_descriptors_outlive_the_allocation(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id)
        with world.backend.bundle_of(allocation_id) as bundle:
            before = world.inspect(bundle)
            world.release(allocation_id)
            assert world.inspect(bundle) == before

    def test_a_live_id_is_not_created_again(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id)
        before = world.identities(allocation_id)
        with pytest.raises(CreationFailed, match="alive"):
            create(world, allocation_id)
        assert world.identities(allocation_id) == before

    @pytest.mark.parametrize(
        ("kinds", "image"),
        [((PID, PID), None), ((PID,), IMAGE), ((MOUNT,), "../outside.sqfs")],
        ids=["a type twice", "an image without Mount", "an image outside"],
    )
    def test_a_request_that_breaks_a_rule_is_refused(
        self, world: World, allocation_id: str, kinds: tuple[NamespaceType, ...], image: str | None
    ) -> None:
        with pytest.raises(CreationFailed):
            create(world, allocation_id, kinds, image)
        assert world.leftovers() == []

    @pytest.mark.parametrize("bad", ["", "..", "a/b", "cgroup.procs", "a\nb", "x" * 129])
    def test_an_id_that_is_no_name_is_refused(self, world: World, bad: str) -> None:
        with pytest.raises(CreationFailed):
            create(world, bad)
        assert world.leftovers() == []

    @pytest.mark.clause("LIFE-8")
    def test_a_missing_image_undoes_everything(self, world: World, allocation_id: str) -> None:
        with pytest.raises(CreationFailed, match=r"missing\.sqfs"):
            create(world, allocation_id, LIGHT, "missing.sqfs")
        assert_never_was(world, allocation_id)

    @pytest.mark.clause("NODE-18")
    @pytest.mark.parametrize("how", OCCUPATIONS)
    def test_a_taken_scope_undoes_everything(
        self, world: World, allocation_id: str, how: str
    ) -> None:
        world.occupy_scope(allocation_id, how)
        with pytest.raises(CreationFailed, match=r"EEXIST|File exists"):
            create(world, allocation_id, LIGHT, IMAGE)
        assert world.has_scope(allocation_id)
        world.vacate_scope(allocation_id)
        assert_never_was(world, allocation_id)

    @pytest.mark.clause("NODE-18", "NODE-19")
    def test_a_scope_that_was_prepared_is_adopted_and_given_back(
        self, world: World, allocation_id: str
    ) -> None:
        world.prepare_scope(allocation_id)
        # The second life begins with a cgroup that has been used.
        for _ in range(2):
            create(world, allocation_id)
            world.backend.watch(allocation_id)
            assert set(world.sightings(allocation_id)) <= {Sighting.CHANGED}
            assert not world.backend.is_over(allocation_id)
            world.pass_through(allocation_id)
            wait_until(lambda: world.backend.is_over(allocation_id))
            world.release(allocation_id)
            assert world.has_scope(allocation_id)
        world.vacate_scope(allocation_id)
        assert world.leftovers() == []

    @pytest.mark.clause("NODE-19")
    def test_an_adopted_scope_is_given_back_by_a_later_program(
        self, world: World, allocation_id: str
    ) -> None:
        world.prepare_scope(allocation_id)
        create(world, allocation_id)
        (adoption,) = world.restart().adoptions
        assert adoption.state is AllocationState.CREATED
        world.join(allocation_id)
        world.release(allocation_id)
        assert world.has_scope(allocation_id)
        world.vacate_scope(allocation_id)
        assert world.leftovers() == []

    @pytest.mark.clause("NODE-19")
    def test_a_creation_that_fails_gives_back_what_it_adopted(
        self, world: World, allocation_id: str
    ) -> None:
        world.prepare_scope(allocation_id)
        with pytest.raises(CreationFailed, match=r"missing\.sqfs"):
            create(world, allocation_id, LIGHT, "missing.sqfs")
        assert world.has_scope(allocation_id)
        create(world, allocation_id)
        world.release(allocation_id)
        world.vacate_scope(allocation_id)
        assert_never_was(world, allocation_id)

    def test_an_id_that_failed_is_free_once_its_end_is_over(
        self, world: World, allocation_id: str
    ) -> None:
        with pytest.raises(CreationFailed):
            create(world, allocation_id, LIGHT, "missing.sqfs")
        world.backend.record_ended(allocation_id)
        world.release(allocation_id)
        create(world, allocation_id)

    # --- Steps ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("image", [None, IMAGE])
    def test_the_steps_are_those_of_the_contract_in_its_order(
        self, world: World, allocation_id: str, image: str | None
    ) -> None:
        request = NamespaceRequest(allocation_id, LIGHT, image)
        world.backend.create_namespaces(request)
        assert tuple(world.steps) == plan(request)
        world.steps.clear()
        world.release(allocation_id)
        needless = {Step.RELEASE_IMAGE} if image is None else set()
        # An init that takes longer to die is tried again, and the image after it.
        assert tuple(dict.fromkeys(world.steps)) == tuple(s for s in RELEASE if s not in needless)

    @pytest.mark.clause("LIFE-8")
    @pytest.mark.parametrize("step", LEFT_BY_FAILURE, ids=lambda step: step.value)
    def test_a_step_that_fails_leaves_what_the_contract_says(
        self, world: World, allocation_id: str, step: Step
    ) -> None:
        request = NamespaceRequest(allocation_id, LIGHT, IMAGE)
        if step in CREATION:
            world.fails_at = step
            with pytest.raises(CreationFailed, match=f"{step.value}: test"):
                world.backend.create_namespaces(request)
        else:
            world.backend.create_namespaces(request)
            world.fails_at = step

        def is_as_promised() -> bool:
            is_released = world.is_released(allocation_id)
            world.now_s += HOLD_TIME_S
            world.backend.tidy()
            left = LEFT_BY_FAILURE[step]
            return world.remains(allocation_id) == left and is_released is not bool(left)

        wait_until(is_as_promised)
        if LEFT_BY_FAILURE[step]:
            assert f"{step.value}: test" in str(world.backend.why_alive(allocation_id))
        world.fails_at = None
        world.release(allocation_id)
        assert world.leftovers() == []

    # --- Releasing ------------------------------------------------------------------------------

    @pytest.mark.clause("END-10")
    def test_what_is_released_is_not_found(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id)
        world.release(allocation_id)
        assert_never_was(world, allocation_id)

    @pytest.mark.parametrize("ask", ["bundle_of", "release_namespaces"])
    def test_what_never_was_is_not_found(self, world: World, allocation_id: str, ask: str) -> None:
        with pytest.raises(AllocationNotFound) as caught:
            getattr(world.backend, ask)(allocation_id)
        assert caught.value.allocation_id == allocation_id

    def test_nothing_of_what_never_was_is_alive(self, world: World, allocation_id: str) -> None:
        assert world.backend.why_alive(allocation_id) is None
        assert not world.backend.is_over(allocation_id)

    @pytest.mark.clause("END-8")
    def test_a_release_ends_the_processes(self, world: World, name: str) -> None:
        world.join(name)
        world.release(name)
        assert world.leftovers() == []

    def test_a_new_incarnation_has_new_namespaces(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id)
        with world.backend.bundle_of(allocation_id) as first:
            world.release(allocation_id)
            create(world, allocation_id)
            assert not set(world.inspect(first)) & set(world.identities(allocation_id))

    @pytest.mark.clause("END-9")
    def test_what_cannot_end_yet_is_said_and_goes_later(self, world: World, name: str) -> None:
        world.block_release(name)
        for _ in range(10):
            world.backend.release_namespaces(name)
            assert world.backend.why_alive(name)
        world.unblock_release(name)
        world.release(name)
        assert world.leftovers() == []

    def test_what_is_being_released_is_not_given_out_and_blocks_no_other(
        self, world: World, name: str
    ) -> None:
        world.block_release(name)
        world.backend.release_namespaces(name)
        with pytest.raises(AllocationNotFound):
            world.backend.bundle_of(name)
        with pytest.raises(CreationFailed, match="alive"):
            create(world, name)
        create(world, f"{name}-other")
        world.release(f"{name}-other")
        # To be watched for nothing.
        world.backend.watch(name)
        assert world.sightings(name) == []
        world.unblock_release(name)

    # --- Observing ------------------------------------------------------------------------------

    def test_an_unused_scope_is_not_over(self, world: World, name: str) -> None:
        assert set(world.sightings(name)) <= {Sighting.CHANGED}
        assert not world.backend.is_over(name)

    def test_a_process_is_seen(self, world: World, name: str) -> None:
        world.join(name)
        world.sees(name, Sighting.POPULATED)
        assert not world.backend.is_over(name)

    def test_the_last_exit_is_seen(self, world: World, name: str) -> None:
        world.join(name)
        world.join(name)
        world.leave(name)
        assert not world.backend.is_over(name)
        world.leave(name)
        world.sees(name, Sighting.EMPTIED)
        assert world.backend.is_over(name)

    def test_a_process_that_was_not_seen_counts(self, world: World, name: str) -> None:
        world.pass_through(name)
        # The proof may come a moment after the event, which is what CHANGED says.
        wait_until(lambda: Sighting.EMPTIED in world.sightings(name) or world.backend.is_over(name))

    def test_a_zombie_does_not_count(self, world: World, name: str) -> None:
        world.join(name)
        world.leave(name, is_reaped=False)
        world.sees(name, Sighting.EMPTIED)

    def test_freezing_is_not_ending(self, world: World, name: str) -> None:
        world.join(name)
        world.sees(name, Sighting.POPULATED)
        world.freeze(name)
        assert Sighting.EMPTIED not in world.sightings(name)
        assert not world.backend.is_over(name)

    def test_freezing_is_not_use(self, world: World, name: str) -> None:
        world.freeze(name)
        world.freeze(name, is_frozen=False)
        assert set(world.sightings(name)) <= {Sighting.CHANGED}
        assert not world.backend.is_over(name)

    def test_what_is_frozen_can_be_released(self, world: World, name: str) -> None:
        world.join(name)
        world.freeze(name)
        world.release(name)
        assert world.leftovers() == []

    @pytest.mark.clause("END-21")
    @pytest.mark.parametrize("is_used", [False, True], ids=["unused", "used"])
    @pytest.mark.parametrize("is_adopted", [False, True], ids=["made here", "adopted"])
    def test_a_scope_that_was_removed_is_over(
        self, world: World, allocation_id: str, is_used: bool, is_adopted: bool
    ) -> None:
        name = allocation_id
        if is_adopted:
            world.prepare_scope(name)
        create(world, name)
        world.backend.watch(name)
        if is_used:
            world.join(name)
            world.sees(name, Sighting.POPULATED)
            world.leave(name)
            world.sees(name, Sighting.EMPTIED)
        # Nothing that was reported before is left to be noticed.
        wait_until(lambda: world.sightings(name) == [])
        world.remove_scope(name)
        world.sees(name, Sighting.EMPTIED)
        assert world.backend.is_over(name)
        world.release(name)
        assert world.leftovers() == []

    def test_a_dead_init_is_seen_and_its_descriptors_are_refused(
        self, world: World, name: str
    ) -> None:
        world.kill_init(name)
        world.sees(name, Sighting.INIT_DIED)
        with pytest.raises(FdPassing):
            world.backend.bundle_of(name)

    def test_one_allocation_is_seen_and_not_the_other(self, world: World, name: str) -> None:
        other = f"{name}-other"
        create(world, other)
        world.backend.watch(other)
        world.join(name)
        world.leave(name)
        world.sees(name, Sighting.EMPTIED)
        assert not world.backend.is_over(other)

    @pytest.mark.parametrize(
        ("happens", "sighting"),
        [
            ("join", Sighting.POPULATED),
            ("pass_through", Sighting.EMPTIED),
            ("kill_init", Sighting.INIT_DIED),
            ("remove_scope", Sighting.EMPTIED),
        ],
    )
    def test_what_happened_before_the_watch_is_seen(
        self, world: World, allocation_id: str, happens: str, sighting: Sighting
    ) -> None:
        create(world, allocation_id)
        getattr(world, happens)(allocation_id)
        world.backend.watch(allocation_id)
        world.sees(allocation_id, sighting)

    def test_nothing_is_seen_of_what_is_being_released(self, world: World, name: str) -> None:
        world.join(name)
        world.sees(name, Sighting.POPULATED)
        world.release(name)
        assert world.sightings(name) == []

    def test_what_is_watched_cannot_be_watched_again(self, world: World, name: str) -> None:
        world.join(name)
        world.sees(name, Sighting.POPULATED)
        with pytest.raises(ValueError, match="watched already"):
            world.backend.watch(name)
        assert world.sightings(name) == []
        world.leave(name)
        world.sees(name, Sighting.EMPTIED)

    def test_what_is_not_there_cannot_be_watched(self, world: World, allocation_id: str) -> None:
        with pytest.raises(AllocationNotFound):
            world.backend.watch(allocation_id)

    # --- Starting again -------------------------------------------------------------------------

    def test_a_new_machine_has_nothing_to_recover(self, world: World) -> None:
        recovery = world.restart()
        assert (recovery.adoptions, recovery.remembered) == ((), ())

    @pytest.mark.clause("CRASH-2")
    @pytest.mark.parametrize("state", [AllocationState.CREATED, AllocationState.HANDED_OFF])
    def test_what_is_alive_is_adopted_with_its_namespaces(
        self, world: World, allocation_id: str, state: AllocationState
    ) -> None:
        response = create(world, allocation_id, ALL, IMAGE)
        if state is AllocationState.HANDED_OFF:
            world.backend.record_handed_off(allocation_id)
        before = world.identities(allocation_id)
        (adoption,) = world.restart().adoptions
        assert (adoption.state, adoption.response) == (state, response)
        assert adoption.request == NamespaceRequest(allocation_id, ALL, IMAGE)
        assert world.identities(allocation_id) == before

    def test_what_was_adopted_is_observed_and_released(self, world: World, name: str) -> None:
        world.join(name)
        world.restart()
        world.backend.watch(name)
        world.leave(name)
        world.sees(name, Sighting.EMPTIED)
        world.release(name)
        assert world.leftovers() == []

    @pytest.mark.clause("CRASH-3")
    @pytest.mark.parametrize("step", LEFT_BY_CRASH, ids=lambda step: step.value)
    def test_what_a_crash_leaves_is_released_after_it(
        self, world: World, allocation_id: str, step: Step
    ) -> None:
        request = NamespaceRequest(allocation_id, LIGHT, IMAGE)
        world.crash(request, step)
        left = LEFT_BY_CRASH[step]
        wait_until(lambda: world.remains(allocation_id) == left)
        adoptions = world.start().adoptions
        assert [adoption.request for adoption in adoptions] == [request] * (Step.INTEND in left)
        if Step.PUBLISH not in left:
            assert {adoption.state for adoption in adoptions} <= {AllocationState.ENDED}
            assert {adoption.response for adoption in adoptions} <= {None}
        world.release(allocation_id)
        assert world.leftovers() == []

    def test_what_was_being_released_is_still_to_be_released(self, world: World, name: str) -> None:
        world.block_release(name)
        world.backend.release_namespaces(name)
        (adoption,) = world.restart().adoptions
        assert adoption.state is AllocationState.ENDED
        world.unblock_release(name)
        world.release(name)

    def test_what_ended_meanwhile_is_seen_at_once(self, world: World, name: str) -> None:
        world.join(name)
        world.backend.close()
        world.leave(name)
        (adoption,) = world.start().adoptions
        assert adoption.state is AllocationState.CREATED
        world.backend.watch(name)
        world.sees(name, Sighting.EMPTIED)

    @pytest.mark.clause("CRASH-4")
    @pytest.mark.parametrize("loses", ["kill_init", "remove_scope"])
    def test_what_lost_its_init_or_scope_leaves_remains_and_the_others_are_adopted(
        self, world: World, name: str, loses: str
    ) -> None:
        other = f"{name}-other"
        create(world, other)
        before = world.identities(other)
        getattr(world, loses)(name)
        if loses == "kill_init":
            world.sees(name, Sighting.INIT_DIED)
        states = {a.request.allocation_id: a.state for a in world.restart().adoptions}
        assert states == {name: AllocationState.ENDED, other: AllocationState.CREATED}
        assert world.identities(other) == before
        world.release(name)
        world.release(other)
        assert world.leftovers() == []

    @pytest.mark.clause("CRASH-6")
    def test_what_was_released_is_remembered_in_order(
        self, world: World, allocation_id: str
    ) -> None:
        names = [f"{allocation_id}-{number}" for number in range(3)]
        for name in names:
            create(world, name)
        for name in reversed(names):
            world.release(name)
        recovery = world.restart()
        assert recovery.adoptions == ()
        assert recovery.remembered == tuple(reversed(names))

    def test_what_failed_is_remembered_too(self, world: World, allocation_id: str) -> None:
        # A consumer that ended it meanwhile may send the end again, which is confirmed again.
        with pytest.raises(CreationFailed):
            create(world, allocation_id, LIGHT, "missing.sqfs")
        assert world.restart().remembered == (allocation_id,)

    # --- Images ---------------------------------------------------------------------------------

    @pytest.mark.clause("NODE-13")
    def test_an_image_is_mounted_once_for_all(self, world: World, allocation_id: str) -> None:
        for number in range(3):
            create(world, f"{allocation_id}-{number}", (MOUNT,), IMAGE)
        assert world.mounted() == [IMAGE]

    def test_two_images_are_two_mounts(self, world: World, allocation_id: str) -> None:
        create(world, f"{allocation_id}-a", (MOUNT,), IMAGE)
        create(world, f"{allocation_id}-b", (MOUNT,), OTHER_IMAGE)
        assert world.mounted() == sorted([IMAGE, OTHER_IMAGE])

    @pytest.mark.clause("NODE-14")
    def test_an_image_is_held_for_a_while_and_then_gone(
        self, world: World, allocation_id: str
    ) -> None:
        create(world, allocation_id, (MOUNT,), IMAGE)
        world.release(allocation_id)
        assert world.backend.tidy() == HOLD_TIME_S
        assert world.mounted() == [IMAGE]
        world.now_s += HOLD_TIME_S
        assert world.backend.tidy() is None
        wait_until(lambda: world.mounted() == [])

    def test_an_image_in_use_is_not_tidied(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id, (MOUNT,), IMAGE)
        world.now_s += 10 * HOLD_TIME_S
        assert world.backend.tidy() is None
        assert world.mounted() == [IMAGE]

    def test_an_image_that_is_held_is_used_again(self, world: World, allocation_id: str) -> None:
        create(world, allocation_id, (MOUNT,), IMAGE)
        world.release(allocation_id)
        world.now_s += HOLD_TIME_S / 2
        create(world, allocation_id, (MOUNT,), IMAGE)
        world.now_s += HOLD_TIME_S
        assert world.backend.tidy() is None
        assert world.mounted() == [IMAGE]

    def test_a_descriptor_that_is_kept_keeps_the_image_mounted(
        self, world: World, allocation_id: str
    ) -> None:
        create(world, allocation_id, (MOUNT,), IMAGE)
        with world.backend.bundle_of(allocation_id):
            world.release(allocation_id)
            world.now_s += HOLD_TIME_S
            assert world.backend.tidy() is None
            assert world.mounted() == [IMAGE]
            create(world, f"{allocation_id}-next", (MOUNT,), IMAGE)
            assert world.mounted() == [IMAGE, IMAGE]
        wait_until(lambda: world.mounted() == [IMAGE])

    def test_an_adopted_image_is_shared_with_the_next_user(
        self, world: World, allocation_id: str
    ) -> None:
        create(world, f"{allocation_id}-a", (MOUNT,), IMAGE)
        world.restart()
        create(world, f"{allocation_id}-b", (MOUNT,), IMAGE)
        assert world.mounted() == [IMAGE]

    # --- An end that is recorded ----------------------------------------------------------------

    def test_an_end_recorded_during_creation_leaves_nothing_alive(
        self, world: World, allocation_id: str
    ) -> None:
        request = NamespaceRequest(allocation_id, (PID, MOUNT))
        # As when the end is performed while the creation still waits in its lane.
        world.backend.record_ended(allocation_id)

        with pytest.raises(CreationFailed, match="ended meanwhile"):
            world.backend.create_namespaces(request)

        world.release(allocation_id)
        world.backend.create_namespaces(request)
        world.release(allocation_id)

    @pytest.mark.clause("END-14", "CRASH-5")
    def test_an_end_that_was_recorded_is_found_after_a_crash(
        self, world: World, allocation_id: str
    ) -> None:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, (PID,)))
        world.backend.record_handed_off(allocation_id)
        world.backend.record_ended(allocation_id)

        recovery = world.restart()

        assert [adoption.state for adoption in recovery.adoptions] == [AllocationState.ENDED]
        world.release(allocation_id)
