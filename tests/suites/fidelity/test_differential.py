"""Random programs find no difference between the simulation and Linux, and find one that is there.

As many programs as a few seconds allow; `differential_campaign` has the rest.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from linux.simulated import SimulatedBackend
from linux.simulated.cgroups import SimulatedCgroup
from linux.simulated.mounts import SimulatedMount
from linux.simulated.namespaces import SimulatedNamespace
from tests.campaign.differential_campaign import PROGRAMS, run, tasks
from tests.suites.fidelity import socket_model as simulated_socket
from tests.suites.fidelity.differential import (
    FAMILIES,
    MOUNT,
    PID,
    Comparison,
    Family,
    Operation,
    comparing,
    script,
    search,
    shrink,
)

pytestmark = pytest.mark.needs_root

PROGRAMS_IN_CI = {
    "sockets": 2_000,
    "cgroups": 500,
    "namespaces": 250,
    "mounts": 120,
    "backends": 20,
}

ANSWERS = {
    "sockets": {
        "send": "EAGAIN EBADF EINVAL EPERM EPIPE ENOTSOCK",
        "receive": "ECONNRESET EAGAIN EBADF",
        "open": "EMFILE",
        "pair": "EMFILE",
        "duplicate": "EMFILE",
        "alive": "nothing something",
    },
    "cgroups": {
        "remove": "EBUSY None",
        "enter": "ESRCH None",
        "frozen": "True False",
        "has_changed": "True False",
        "populated": "True False",
    },
    "namespaces": {
        "fork": "ENOMEM something",
        "open": "ESRCH True",
        "open_own": "ENOENT True",
        "enter": "EINVAL None",
        "unshare": "EINVAL None",
        "is_dead": "True False",
        "reap": "EAGAIN None",
    },
    "mounts": {"unmount": "EBUSY EINVAL None", "open_in": "ENOENT None", "loops": "something"},
    "backends": {
        "bundle": "FdPassing AllocationNotFound True",
        "create": "CreationFailed None",
        "is_over": "True False",
        "release": "stays gone",
    },
}
"""What must come up, or the programs of a family have become too tame."""


@pytest.fixture(autouse=True)
def _in_the_sessions_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other sessions see of this one's images has its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("name", FAMILIES)
def test_basic_the_simulation_is_not_told_from_linux(name: str) -> None:
    with comparing(FAMILIES[name]) as comparison:
        found = list(search(comparison, range(PROGRAMS_IN_CI[name]), findings_max=1))
    assert [script(FAMILIES[name], each.program) for each in found] == []
    expected = {f"{call} {word}" for call, text in ANSWERS[name].items() for word in text.split()}
    assert expected - set(comparison.cells) == set()


HANGING = (
    Operation("create", (0, (PID, MOUNT), None)),
    Operation("watch", (0,)),
    Operation("block_release", (0,)),
)
ONCE_DIFFERENT = {
    "a removed scope is seen": (*HANGING[:2], ("seen", 0), ("seen", 0), ("remove_scope", 0)),
    "a killed init ends": (*HANGING, ("kill_init", 0), ("unblock_release", 0), ("restart",)),
    "a released init ends": (*HANGING, ("release", 0), ("unblock_release", 0), ("restart",)),
    "it ends in the next": (*HANGING, ("release", 0), ("restart",), ("unblock_release", 0)),
}
"""Programs of backends on which Linux was looked at too early, up to the last look."""


@pytest.mark.parametrize("name", ONCE_DIFFERENT)
def test_programs_that_once_differed_are_the_same_on_both(name: str) -> None:
    calls = [
        each if isinstance(each, Operation) else Operation(str(each[0]), each[1:])
        for each in ONCE_DIFFERENT[name]
    ]
    looks = [Operation("seen", (0,)), Operation("restart"), Operation("bundle", (0,))]
    with comparing(FAMILIES["backends"]) as comparison:
        assert comparison.run((*calls, *looks)) is None


SABOTAGES: list[tuple[str, object, str, Any]] = [
    ("sockets", simulated_socket, "SENDMSG_DESCRIPTORS_MAX", 300),
    ("sockets", simulated_socket.SimulatedSocket, "released", lambda self: None),
    ("cgroups", SimulatedCgroup, "is_populated", property(lambda self: bool(self.members))),
    ("namespaces", SimulatedNamespace, "takes_tasks", property(lambda self: True)),
    ("mounts", SimulatedMount, "receivers", lambda self: []),
    ("backends", SimulatedBackend, "watch", lambda self, name: None),
]


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "lie"), SABOTAGES, ids=[each[2] for each in SABOTAGES]
)
def test_a_simulation_that_lies_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: object, attribute: str, lie: Any
) -> None:
    monkeypatch.setattr(owner, attribute, lie)
    with comparing(FAMILIES[name]) as comparison:
        found = next(search(comparison, range(2_000)), None)
    assert found is not None
    assert len(found.program) <= 6


def test_a_failing_program_is_shrunk_to_what_it_fails_with() -> None:
    program = tuple(Operation(name) for name in "abcdefghij")
    assert shrink(program, lambda p: {"c", "h"} <= {call.name for call in p}) == (
        Operation("c"),
        Operation("h"),
    )


class _Stub:
    """A machine that says what it is told to."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def reset(self) -> None: ...

    def told(self, call: Operation, answer: object) -> None: ...

    def ask(self, *_: object) -> int:
        return self.answer


def test_a_difference_is_said_as_a_program_that_runs() -> None:
    family = Family("stub", "stub", lambda _: (), lambda: None, lambda: None)  # type: ignore[arg-type,return-value]
    program = (Operation("ask", ((PID, MOUNT), None)),)
    difference = Comparison(family, _Stub(1), _Stub(2)).run(program)
    assert str(difference).endswith("Linux says 1, the simulation 2")
    names: dict[str, Any] = {}
    exec(script(family, program), names)
    assert names["PROGRAM"] == program


def test_a_campaign_runs_a_hundred_thousand_programs_and_more() -> None:
    planned = [task.arguments for task in tasks(1.0)]
    assert sum(each["programs"] for each in planned) >= 100_000
    assert {each["family"] for each in planned} == set(PROGRAMS) == set(FAMILIES)
    assert len({task.name for task in tasks(3.0)}) == len(tasks(3.0))


def test_a_task_says_what_it_did() -> None:
    outcome = run(7, "sockets", 0, 100)
    assert outcome.figures["socket programs"] == 100
    assert (outcome.figures["differences"], outcome.discoveries) == (0, [])
