"""Every property of the protocol has a place where it is checked, and every check can fail.

`PROPERTIES` is the index: a predicate of `specs/invariants.py`, which every suite holds everything
to, or a test. A name that does not exist any more fails here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from specs import invariants as always
from tests.suites import test_pair

PROPERTIES: Final[Mapping[str, tuple[str, ...]]] = {
    # Safety.
    "S01 descriptors are of the announced types, in their order": (
        "descriptors_are_what_the_response_says",
    ),
    "S02 types come in the request's order": (
        "response_answers_its_request",
        "conformance::test_a_repeated_type_is_refused",
        "test_metamorphic::test_namespaces_asked_for_in_another_order_come_in_that_order",
    ),
    "S03 all of it or nothing": (
        "contract::test_a_missing_image_undoes_everything",
        "contract::test_a_taken_scope_undoes_everything",
        "test_descriptors::test_a_bundle_is_duplicated_whole_or_not_at_all",
    ),
    "S04 an incarnation has one set of namespaces": ("an_incarnation_is_one_set_of_namespaces",),
    "S05 allocations are isolated, from each other and from the node": (
        "allocations_are_isolated",
        "namespaces_are_not_the_nodes_own",
        "test_metamorphic::test_lives_that_share_nothing_do_not_notice_each_other",
    ),
    "S06 every descriptor of the provider has one owner": (
        "every_descriptor_has_one_owner",
        "test_stateful::test_a_provider_keeps_its_promises",
    ),
    "S07 every descriptor of the consumer has one owner, and is not inherited": (
        "every_descriptor_has_one_owner",
        "test_stateful::test_a_consumer_keeps_its_promises",
        "test_request::test_basic_a_handoff_has_what_was_asked_for_in_that_order",
    ),
    "S08 closed once, and not used afterwards": (
        "test_descriptors::test_closing_twice_spares_what_has_the_number_now",
        "test_descriptors::test_a_closed_descriptor_has_no_number",
    ),
    "S09 descriptors belong to their frame, however it is cut": (
        "test_channel::test_any_messages_survive_any_cuts",
        "test_channel::test_cuts_into_three_deliver_the_same",
        "test_channel::test_a_wrong_number_of_descriptors_is_rejected",
    ),
    "S10 asked again, the same; asked otherwise, refused": (
        "an_incarnation_is_one_set_of_namespaces",
        "conformance::test_another_request_for_what_is_alive_is_refused_and_changes_nothing",
        "conformance::test_who_asks_while_it_is_being_created_is_handed_the_one_result",
    ),
    "S11 an error changes nothing": (
        "an_error_changes_nothing",
        "test_provider::test_an_impossible_event_raises_and_changes_nothing",
    ),
    "S12 released once": ("released_at_most_once",),
    "S13 released only after its end": ("released_only_after_its_end",),
    "S14 ended once": ("ended_at_most_once",),
    "S15 told of the end once, and only whom it concerns": (
        "end_is_pushed_at_most_once",
        "end_is_told_only_to_whom_it_concerns",
        "every_holder_has_heard",
    ),
    "S16 answered on the connection that asked": (
        "answers_come_in_order",
        "nothing_follows_a_close",
        "conformance::test_an_allocation_outlives_its_connection",
    ),
    "S17 the id is echoed": ("response_answers_its_request",),
    "S18 any bytes are a message or a refusal": (
        "test_codec::test_any_bytes_are_a_message_or_a_refusal",
        "test_codec::test_reading_is_bounded_in_memory",
        "test_codec::test_reading_is_linear",
    ),
    "S19 before it is ready, messages wait": (
        "test_provider::test_before_it_is_ready_messages_wait_in_order",
        "test_provider::test_no_more_wait_than_the_limit_allows",
        "test_provider::test_who_waited_too_long_is_told_that_it_is_unavailable",
    ),
    "S20 self-service for a reason, once and loudly": (
        "self_service_is_loud_and_for_a_reason",
        "one_outcome",
        "test_request::test_only_this_allocation_is_self_served",
    ),
    "S21 never two live sets": (
        "at_most_one_live_set",
        "test_request::test_a_late_answer_is_closed_answered_with_the_end_and_changes_nothing",
    ),
    "S22 an image is mounted as long as it has users": (
        "test_mounts::test_a_user_who_acquires_twice_counts_once",
        "test_mounts::test_the_hold_time_begins_with_the_last_user",
        "contract::test_an_image_in_use_is_not_tidied",
    ),
    "S23 images stay below their root": (
        "conformance::test_an_image_that_is_not_below_the_root_is_refused",
        "test_mounts::test_magic_links_are_not_followed_even_inside",
    ),
    "S24 a crash refines": (
        "test_explore::test_basic_every_world_keeps_every_promise",
        "contract::test_what_a_crash_leaves_is_released_after_it",
        "contract::test_what_is_alive_is_adopted_with_its_namespaces",
        "test_journal::test_whatever_was_written_survives_kill_9",
    ),
    "S25 credentials before any effect": (
        "test_provider::test_a_user_who_is_not_allowed_is_turned_away_before_anything_is_read",
        "test_serve::test_a_user_who_is_not_allowed_is_told_and_has_no_effect",
    ),
    "S26 equal inputs, equal effects": (
        "test_provider::test_the_same_events_have_the_same_effects",
        "test_provider::test_effects_do_not_depend_on_how_python_hashes",
    ),
    # Liveness: on the graph of all worlds where it is about always, by example where about time.
    "L01 every request has an outcome": (
        "every_message_is_answered",
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L02 empty, then ended, then released": (
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L03 all released, nothing left": (
        "every_descriptor_has_one_owner",
        "test_stateful::test_a_provider_keeps_its_promises",
    ),
    "L04 a consumer is not blocked for longer than it says": (
        "test_request::test_without_a_provider_the_consumer_serves_itself_loudly_and_in_time",
    ),
    "L05 an end that is owed is told": (
        "every_holder_has_heard",
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L06 after a crash, everything is served again or released": (
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L07 no cycle in which each waits for ever": (
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L08 who waits for the provider to be ready is served": (
        "test_provider::test_before_it_is_ready_messages_wait_in_order",
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    "L09 from everywhere one can come to rest": (
        "test_explore::test_basic_every_world_keeps_every_promise",
    ),
    # Metamorphic.
    "M1 what concerns different allocations commutes": (
        "test_metamorphic::test_lives_that_share_nothing_do_not_notice_each_other",
    ),
    "M2 a stream may be cut anywhere": (
        "test_channel::test_any_messages_survive_any_cuts",
        "conformance::test_frames_may_come_together_and_be_cut_anywhere",
    ),
    "M3 names mean nothing": ("test_metamorphic::test_names_mean_nothing",),
    "M4 said twice is said once": ("test_metamorphic::test_a_request_said_twice_is_said_once",),
    "M5 a crash at rest is not noticed": ("test_metamorphic::test_a_crash_at_rest_is_not_noticed",),
    "M6 permuted types, permuted descriptors": (
        "test_metamorphic::test_namespaces_asked_for_in_another_order_come_in_that_order",
    ),
}

NUMBERS: Final = [("S", 26), ("L", 9), ("M", 6)]
WIDTHS: Final = {"S": 2, "L": 2, "M": 1}

PREDICATES: Final = {
    name
    for name, each in vars(always).items()
    if inspect.isfunction(each)
    and each.__module__ == always.__name__
    and not name.startswith("_")
    and name not in ("require", "unanswered", "told_unasked")
}


FOLDERS: Final = [Path(__file__).resolve().parents[2] / name for name in ("tests", "linux/testing")]


@cache
def names_in(module: str) -> frozenset[str]:
    (path,) = (path for folder in FOLDERS for path in folder.rglob(f"{module}.py"))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_property_has_its_place() -> None:
    expected = [
        f"{letter}{number:0{WIDTHS[letter]}}"
        for letter, most in NUMBERS
        for number in range(1, most + 1)
    ]
    assert [name.split()[0] for name in PROPERTIES] == expected


@pytest.mark.parametrize("name", PROPERTIES)
def test_its_place_exists(name: str) -> None:
    for place in PROPERTIES[name]:
        module, _, test = place.rpartition("::")
        assert test in (names_in(module) if module else PREDICATES), f"{place} does not exist"


def test_no_predicate_is_in_vain() -> None:
    assert {place for places in PROPERTIES.values() for place in places} >= PREDICATES


BROKEN: Final[list[tuple[str, list[str]]]] = [
    ("own", always.namespaces_are_not_the_nodes_own([1, 2], [2, None])),
    ("leaked", always.every_descriptor_has_one_owner({1: 2}, {"a": {1: 1}})),
    ("shared", always.every_descriptor_has_one_owner({1: 1}, {"a": {1: 1}, "b": {1: 1}})),
    ("gone", always.every_descriptor_has_one_owner({}, {"a": {1: 1}})),
    (
        "silent",
        always.self_service_is_loud_and_for_a_reason(has_turned=True, audits=0, is_refused=False),
    ),
    (
        "papered over",
        always.self_service_is_loud_and_for_a_reason(has_turned=True, audits=1, is_refused=True),
    ),
    ("both", always.one_outcome(is_delivered=True, is_refused=True)),
]


@pytest.mark.parametrize(("name", "finding"), BROKEN, ids=[name for name, _ in BROKEN])
def test_an_invariant_sees_when_it_is_broken(name: str, finding: list[str]) -> None:
    assert len(finding) == 1
    with pytest.raises(always.InvariantBroken):
        always.require([], finding)


def test_no_invariant_forbids_what_is_right() -> None:
    always.require(
        always.namespaces_are_not_the_nodes_own([1], [2, None]),
        always.every_descriptor_has_one_owner({1: 2, 2: 0}, {"a": {1: 1}, "b": {1: 1}}),
        always.self_service_is_loud_and_for_a_reason(has_turned=True, audits=1, is_refused=False),
        always.self_service_is_loud_and_for_a_reason(has_turned=False, audits=0, is_refused=True),
        always.one_outcome(is_delivered=True, is_refused=False),
    )


def test_every_predicate_has_been_seen_to_find_something() -> None:
    """By the examples here, and by those that have been in `test_pair.py` from the beginning."""
    sources = [Path(__file__), Path(test_pair.__file__)]
    called = {
        node.func.attr
        for source in sources
        for statement in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "BROKEN"
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called == PREDICATES
