"""A message that exists is well typed; whether it can be granted is said by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statemachine.messages import (
    ALLOCATION_ID_BYTES_MAX,
    HANDOFF_SOCKET_PATH,
    SHOWN_CHARACTERS_MAX,
    UENV_IMAGE_BYTES_MAX,
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    mount_path_below,
    objection,
    objection_to_id,
    shown,
)
from statemachine.testing.strategies import ORDERS

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT


def test_basic_the_request_of_the_seed_can_be_granted() -> None:
    request = NamespaceRequest("alloc-42", (PID, NET, MOUNT), "pytorch-2.5.sqfs")
    assert objection(request) is None


@pytest.mark.clause("WIRE-1")
def test_the_socket_is_where_the_seed_says() -> None:
    assert HANDOFF_SOCKET_PATH == "/run/pact/handoff.sock"


def test_the_types_are_spelt_as_in_the_seed() -> None:
    assert [kind.value for kind in NamespaceType] == ["Pid", "Net", "Mount"]
    assert repr(PID) == "NamespaceType.PID"


@pytest.mark.clause("WIRE-6")
@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (NamespaceRequest, ["allocation_id", "namespaces", "uenv_image"]),
        (NamespaceResponse, ["allocation_id", "fd_types", "uenv_mount_path"]),
        (AllocationEnded, ["allocation_id"]),
    ],
)
def test_the_fields_stand_in_the_order_of_the_seed(message: Any, fields: list[str]) -> None:
    assert [field.name for field in dataclasses.fields(message)] == fields


def test_messages_are_values() -> None:
    request = NamespaceRequest("a", (PID,))
    assert request == NamespaceRequest("a", (PID,), None)
    assert hash(request) == hash(NamespaceRequest("a", (PID,)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.allocation_id = "b"  # type: ignore[misc]


def test_a_response_in_another_order_is_another_response() -> None:
    assert NamespaceResponse("a", (PID, NET)) != NamespaceResponse("a", (NET, PID))


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (NamespaceRequest, (b"a", ()), "allocation_id must be str, not bytes"),
        (NamespaceRequest, ("a", [PID]), "namespaces must be a tuple of NamespaceType"),
        (NamespaceRequest, ("a", ("Pid",)), "namespaces must be a tuple of NamespaceType"),
        (NamespaceRequest, ("a", (), 7), "uenv_image must be str, not int"),
        (NamespaceResponse, (None, ()), "allocation_id must be str, not NoneType"),
        (NamespaceResponse, ("a", None), "fd_types must be a tuple of NamespaceType"),
        (NamespaceResponse, ("a", (), b"/"), "uenv_mount_path must be str, not bytes"),
        (AllocationEnded, (1,), "allocation_id must be str, not int"),
    ],
)
def test_a_message_of_other_types_cannot_exist(
    kind: Any, fields: tuple[object, ...], named: str
) -> None:
    with pytest.raises(TypeError, match=named):
        kind(*fields)


# --- allocation_id -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "allocation_id",
    ["a", "alloc-42", "job.7", "...", "cgroup", "mycgroup.procs", "é" * 64, "a b", "🚀" * 32],
)
def test_an_id_that_names_one_directory_is_allowed(allocation_id: str) -> None:
    assert objection_to_id(allocation_id) is None


@pytest.mark.clause("LIFE-10")
@pytest.mark.parametrize(
    ("allocation_id", "named"),
    [
        ("", "0 bytes; 1 to 128 are allowed"),
        ("a" * 129, "129 bytes; 1 to 128 are allowed"),
        ("é" * 65, "130 bytes; 1 to 128 are allowed"),
        ("a/b", "a slash or a control character"),
        ("/", "a slash or a control character"),
        ("a\0b", "a slash or a control character"),
        ("a\nb", "a slash or a control character"),
        ("\x7f", "a slash or a control character"),
        ("\x85", "a slash or a control character"),
        ("a\ud800", "a slash or a control character"),
        (".", "a name that the kernel reserves"),
        ("..", "a name that the kernel reserves"),
        ("cgroup.procs", "a name that the kernel reserves"),
        ("cgroup.", "a name that the kernel reserves"),
    ],
)
def test_an_id_that_names_no_directory_of_its_own_is_refused(
    allocation_id: str, named: str
) -> None:
    reason = objection(NamespaceRequest(allocation_id, ()))
    assert reason is not None
    assert reason.startswith("allocation_id")
    assert named in reason


def test_the_longest_id_still_names_a_scope() -> None:
    assert objection_to_id("a" * ALLOCATION_ID_BYTES_MAX) is None
    assert len("a" * ALLOCATION_ID_BYTES_MAX + ".scope") <= 255


@pytest.mark.clause("LIFE-10")
@given(st.text(max_size=200))
def test_an_id_without_objection_is_one_path_component(allocation_id: str) -> None:
    if objection_to_id(allocation_id) is None:
        encoded = allocation_id.encode()
        assert 1 <= len(encoded) <= 128
        assert not {b"/"[0], 0} & set(encoded)
        assert allocation_id not in (".", "..")
        assert "\n" not in allocation_id


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_no_id_makes_the_objection_fail(allocation_id: str) -> None:
    reason = objection_to_id(allocation_id)
    assert reason is None or reason.startswith("allocation_id")


# --- namespaces --------------------------------------------------------------------------------


@pytest.mark.clause("LIFE-11")
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_any_order_of_any_choice_of_types_can_be_granted(
    order: tuple[NamespaceType, ...],
) -> None:
    assert objection(NamespaceRequest("a", order)) is None


@pytest.mark.clause("LIFE-12")
@pytest.mark.parametrize(
    ("types", "named"),
    [((PID, PID), "Pid"), ((NET, PID, NET), "Net"), ((MOUNT, PID, MOUNT, PID), "Pid, Mount")],
)
def test_a_repeated_type_is_refused_by_name(types: tuple[NamespaceType, ...], named: str) -> None:
    reason = objection(NamespaceRequest("a", types))
    assert reason == f"namespaces repeats {named}; each type may be asked for once"


# --- uenv_image --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        *("hello.sqfs", "tools/gcc/13.sqfs", "no-ending", ".hidden.sqfs", "a..b.sqfs"),
        *("i", "i" * UENV_IMAGE_BYTES_MAX),
    ],
)
def test_an_image_below_the_root_can_be_granted(image: str) -> None:
    assert objection(NamespaceRequest("a", (MOUNT,), image)) is None


def test_an_image_without_a_mount_namespace_is_refused() -> None:
    reason = objection(NamespaceRequest("a", (PID, NET), "hello.sqfs"))
    assert reason is not None
    named = "uenv_image needs a Mount namespace to be mounted in; add Mount to namespaces"
    assert reason == named


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("", "1 to 4096 bytes"),
        ("i" * (UENV_IMAGE_BYTES_MAX + 1), "1 to 4096 bytes"),
        ("a\0.sqfs", "control character"),
        ("a\n.sqfs", "control character"),
        ("\udfff.sqfs", "control character"),
        ("/etc/shadow", "not a plain path"),
        ("../secret.sqfs", "not a plain path"),
        ("a/../../b.sqfs", "not a plain path"),
        ("a//b.sqfs", "not a plain path"),
        ("./a.sqfs", "not a plain path"),
        ("a/", "not a plain path"),
        # What is left of these without the ending would be no name of its own.
        (".sqfs", "not a plain path"),
        ("a/.sqfs", "not a plain path"),
        ("..sqfs", "not a plain path"),
        ("...sqfs", "not a plain path"),
    ],
)
def test_an_image_that_leaves_the_root_is_refused(image: str, named: str) -> None:
    reason = objection(NamespaceRequest("a", (MOUNT,), image))
    assert reason is not None
    assert reason.startswith("uenv_image")
    assert named in reason


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_the_mount_point_of_an_accepted_image_is_below_the_base(image: str) -> None:
    if objection(NamespaceRequest("a", (MOUNT,), image)) is None:
        path = mount_path_below("/run/pact/uenv", image)
        parts = path.split("/")
        assert parts[:4] == ["", "run", "pact", "uenv"]
        assert len(parts) > 4
        assert not {"", ".", ".."} & set(parts[4:])


@pytest.mark.parametrize(
    ("image", "path"),
    [
        ("pytorch-2.5.sqfs", "/run/pact/uenv/pytorch-2.5"),
        ("a/x.sqfs", "/run/pact/uenv/a/x"),
        ("b/x.sqfs", "/run/pact/uenv/b/x"),
        ("x.sqfs.sqfs", "/run/pact/uenv/x.sqfs"),
        ("x.sqfs.bak", "/run/pact/uenv/x.sqfs.bak"),
    ],
)
def test_only_the_ending_of_an_image_goes(image: str, path: str) -> None:
    assert mount_path_below("/run/pact/uenv", image) == path
    assert mount_path_below("/run/pact/uenv/", image) == path
    assert mount_path_below("/run/LINUX", "x.sqfs") == "/run/LINUX/x"


def test_a_text_from_outside_is_quoted_and_cut() -> None:
    longest = "x" * SHOWN_CHARACTERS_MAX
    assert shown("a\nb") == "'a\\nb'"
    assert shown(longest) == f"'{longest}'"
    assert shown(longest + "x") == f"'{longest}'..."


def test_the_first_rule_that_is_broken_is_named() -> None:
    reason = objection(NamespaceRequest("", (PID, PID), "/"))
    assert reason is not None
    assert reason.startswith("allocation_id")
