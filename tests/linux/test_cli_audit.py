"""Audit events have upstream's form, and tell one life of an allocation."""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from linux.cli.audit import AuditFile
from statemachine import CreationFailed, FdPassing, NamespaceRequest, ProviderKernel
from statemachine import events as on
from statemachine.events import ProviderInput
from statemachine.messages import NamespaceResponse
from tests.support.programs import DEADLINE_S, NET, PID, daemon_in, nshandoff

FIELDS = {
    *("id", "timestamp", "principal", "action", "scope", "outcome", "detail", "metadata", "source")
}


def audited(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert set(line) == FIELDS
        assert set(line["principal"]) == {"identity", "principal_type", "role"}
        assert line["outcome"] in ("Success", "Failure", "Denied")
        assert (
            datetime.datetime.fromisoformat(line["timestamp"]).utcoffset() == datetime.timedelta()
        )
        uuid.UUID(line["id"])
    assert len({line["id"] for line in lines}) == len(lines)
    return lines


def told(path: Path, name: str) -> list[tuple[str, str, str]]:
    """Action, outcome and detail of the events of one allocation."""
    lines = [x for x in audited(path) if x["scope"].get("allocation_id") == name]
    return [(line["action"], line["outcome"], line["detail"]) for line in lines]


@pytest.mark.needs_root
@pytest.mark.clause("DAEMON-11")
def test_basic_a_life_is_told_from_the_hand_over_to_the_cleanup(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    audit = tmp_path / "audit"
    with daemon_in(tmp_path, image_root, "--audit", str(audit)) as daemon:
        words = ("--socket", daemon.socket, "--id", allocation_id, "--namespaces", "net")
        assert nshandoff("run", *words, "--", "sleep", "0.2").returncode == 0
        with daemon.obtain(f"{allocation_id}-2", NET) as handoff:
            with pytest.raises(CreationFailed):
                daemon.obtain(f"{allocation_id}-2", PID)
            handoff.end(DEADLINE_S)
        daemon.wait_until_none_is_alive()
    assert [x["action"] for x in audited(audit) if "allocation_id" not in x["scope"]] == [
        "boot.ready"
    ]
    first, *_, last_but_one, last = told(audit, allocation_id)
    assert first == ("namespace.handoff", "Success", "")
    assert last_but_one[:2] == ("workload.allocation_end", "Success")
    assert last_but_one[2] in ("ScopeEmptied", "EndReceived")
    assert last == ("namespace.cleanup", "Success", "")
    assert [action for action, _, _ in told(audit, f"{allocation_id}-2")] == [
        "namespace.handoff",
        "namespace.handoff_failed",
        "workload.allocation_end",
        "namespace.cleanup",
    ]
    assert told(audit, f"{allocation_id}-2")[1][1] == "Denied"


@pytest.mark.clause("DAEMON-11")
def test_what_goes_wrong_is_told_with_its_reason_and_counted(tmp_path: Path) -> None:
    audit, kernel = tmp_path / "audit", ProviderKernel()
    wanted = {name: NamespaceRequest(name, (NET,)) for name in "abcd"}
    with AuditFile(str(audit)) as file:

        def happens(event: ProviderInput) -> None:
            file(event, kernel.receive(event))

        happens(on.RemainsFound("d", wanted["d"]))
        happens(on.ProviderReady())
        happens(on.ConnectionOpened(1, 0))
        for name in "abc":
            happens(on.RequestReceived(1, wanted[name]))
        happens(on.NamespacesNotCreated("c", CreationFailed("no room")))
        for name in "ab":
            happens(on.NamespacesCreated(name, NamespaceResponse(name, (NET,))))
        happens(on.ResponseNotSent("b", 1, FdPassing("no descriptor")))
        happens(on.ResponseSent("a", 1))
        for name in "ab":
            happens(on.ScopePopulated(name))
            happens(on.EndReceived(1, name))
            happens(on.ReleaseDelayed(name, f"{name} cannot die"))
            happens(on.ReleaseOverdue(name))
        happens(on.RetryDue("a"))
        happens(on.NamespacesReleased("a"))
    assert told(audit, "a") == [
        ("namespace.handoff", "Success", ""),
        ("workload.allocation_start", "Success", ""),
        ("workload.allocation_end", "Success", "EndReceived"),
        ("cgroup.kill_failed", "Failure", "a cannot die"),
        ("namespace.cleanup", "Success", ""),
    ]
    assert told(audit, "b")[0] == ("namespace.handoff_failed", "Failure", "no descriptor")
    assert told(audit, "c") == [("namespace.handoff_failed", "Failure", "no room")]
    assert told(audit, "d") == [("namespace.leak_detected", "Success", "left by a crash")]
    counts = [x["metadata"] for x in audited(audit) if x["action"] == "cgroup.kill_failed"]
    assert counts == [{"overdue": 1}, {"overdue": 2}]
