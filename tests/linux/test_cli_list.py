"""What is on the node is shown while its provider runs, while it does not, and while it drains."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linux.cli.exits import ExitCode
from linux.forge.spawn import spawn_within
from linux.journal import JOURNAL_NAME, Entry, Journal
from statemachine import AllocationState, NamespaceRequest
from tests.support.programs import (
    DEADLINE_S,
    MOUNT,
    PID,
    Daemon,
    daemon_in,
    identities_of,
    nshandoff,
    running,
    wait_until,
)

pytestmark = pytest.mark.needs_root


@pytest.fixture
def daemon(tmp_path: Path, image_root: Path) -> Iterator[Daemon]:
    with daemon_in(tmp_path, image_root, "--release-deadline", "0.2") as daemon:
        yield daemon


def listed(state_dir: Path) -> dict[str, Any]:
    result = nshandoff("list", "--state-dir", state_dir, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    shown: dict[str, Any] = json.loads(result.stdout)
    assert shown["schema"] == 1
    # Images are the whole node's; other providers on it come and go.
    below = str(state_dir.parent.parent)
    shown["images"] = [one for one in shown["images"] if one["file"].startswith(below)]
    return shown


def table(state_dir: Path) -> list[str]:
    result = nshandoff("list", "--state-dir", state_dir)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_basic_everything_of_an_allocation_is_shown(
    daemon: Daemon, allocation_id: str, image_root: Path, cgroup2: Path
) -> None:
    run = ("run", "--socket", daemon.socket, "--id", allocation_id, "--namespaces", "mount,pid")
    command = ("--no-tie", "--uenv", "hello.sqfs", "--", "sh", "-c", "echo ready; exec cat")
    with running(*run, *command) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with daemon.obtain(allocation_id, MOUNT, PID, image="hello.sqfs") as handoff:
            ids = [identity.key[0] for identity in handoff.identities]
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
        shown = listed(daemon.state_dir)
        lines = table(daemon.state_dir)
        program.communicate("")
    assert shown["provider"] == {"pid": daemon.pid, "socket": str(daemon.socket)}
    (allocation,) = shown["allocations"]
    assert allocation["allocation_id"] == allocation_id
    assert allocation["state"] == "handed_off"
    assert allocation["requested"] == ["Mount", "Pid"]
    assert [one["namespace_id"] for one in allocation["namespaces"]] == ids
    assert allocation["scope"] == f"{cgroup2}/workload.slice/{allocation_id}.scope"
    assert [one["command"] for one in allocation["processes"]] == ["cat"]
    assert allocation["image"] == "hello.sqfs"
    assert allocation["mount_path"] == f"{daemon.uenv_base}/hello"
    assert allocation["why"] is None
    (image,) = (one for one in shown["images"] if allocation_id in one["users"])
    assert (image["image"], image["file"]) == ("hello.sqfs", f"{image_root}/hello.sqfs")
    assert image["device"].startswith("/dev/loop")

    assert lines[0] == f"provider {daemon.pid} serves {daemon.socket}"
    namespaces = " ".join(f"{kind}:{inode}" for kind, inode in identities_of(allocation).items())
    words = f"{allocation_id} handed_off {allocation['init_pid']} 1 {namespaces} hello.sqfs"
    assert words.split() in [line.split() for line in lines]


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_works_without_the_provider_and_leaves_no_trace(
    daemon: Daemon, allocation_id: str, number: signal.Signals
) -> None:
    with daemon.obtain(allocation_id, PID):
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
    before = listed(daemon.state_dir)
    daemon.stop(number)
    files = {path: path.stat().st_mtime_ns for path in daemon.state_dir.iterdir()}
    after = listed(daemon.state_dir)
    assert table(daemon.state_dir)[0] == f"no provider serves from {daemon.state_dir}"
    assert {path: path.stat().st_mtime_ns for path in daemon.state_dir.iterdir()} == files
    assert after == {**before, "provider": None}
    daemon.start()
    assert listed(daemon.state_dir)["allocations"] == before["allocations"]


def test_dead_init_is_seen_without_the_provider(daemon: Daemon, allocation_id: str) -> None:
    with daemon.obtain(allocation_id, PID):
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
    (before,) = listed(daemon.state_dir)["allocations"]
    daemon.stop(signal.SIGKILL)
    os.kill(before["init_pid"], signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{before['init_pid']}").exists())
    (after,) = listed(daemon.state_dir)["allocations"]
    assert (after["state"], after["init_pid"], after["namespaces"]) == ("handed_off", None, [])
    assert after["why"] == "its init is dead; a provider will release it"
    assert "dead" in table(daemon.state_dir)[3].split()


def test_it_says_why_what_is_draining_is_still_there(daemon: Daemon, allocation_id: str) -> None:
    """A process whose parent does not reap it, and which so holds up its PID namespace's init."""
    with (
        daemon.obtain(allocation_id, PID) as handoff,
        spawn_within(["sleep", "1000"], handoff.bundle) as unreaped,
    ):
        assert handoff.end(DEADLINE_S)
        (seen,) = listed(daemon.state_dir)["allocations"]
        assert (seen["state"], seen["namespaces"]) == ("ended", [])
        assert f"init {seen['init_pid']} is being killed" in seen["why"]
        assert f"{unreaped.pid} (child of {os.getpid()})" in seen["why"]
        reason = f"{allocation_id}: init {seen['init_pid']} is being killed"
        assert any(line.startswith(reason) for line in table(daemon.state_dir))
        unreaped.wait(DEADLINE_S)
    daemon.wait_until_none_is_alive()
    assert listed(daemon.state_dir)["remembered"] == [allocation_id]


def test_directory_of_no_provider_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    result = nshandoff("list", "--state-dir", tmp_path)
    assert (result.returncode, result.stdout) == (ExitCode.ENVIRONMENT, "")
    assert f"{tmp_path}: it is no provider's state directory" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [JOURNAL_NAME, "lock", "ready"])
@pytest.mark.parametrize("verb", ["list", "doctor"])
def test_pipe_in_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, verb: str, name: str
) -> None:
    Journal(tmp_path, "another boot").close()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    result = nshandoff(verb, "--state-dir", tmp_path)
    if name == JOURNAL_NAME:
        assert result.returncode == ExitCode.ENVIRONMENT
        assert f"{tmp_path / name}: it is no regular file" in result.stderr
    else:
        assert result.returncode in (ExitCode.OK, ExitCode.NO)


def test_what_was_before_the_boot_is_shown_as_gone(tmp_path: Path, allocation_id: str) -> None:
    with Journal(tmp_path, "another boot") as journal:
        request = NamespaceRequest(allocation_id, (PID,))
        journal.intend(Entry(allocation_id, "token", AllocationState.REQUESTED, request))
    (seen,) = listed(tmp_path)["allocations"]
    assert seen["why"] == "the node was booted since; nothing of it is left"


def test_readiness_of_a_provider_that_was_killed_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "ready").write_text(json.dumps({"pid": os.getpid(), "socket": "/nowhere"}))
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    assert listed(tmp_path)["provider"] is None


def test_damaged_journal_is_named(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL_NAME
    journal.write_bytes(b"not a database" * 100)
    result = nshandoff("list", "--state-dir", tmp_path)
    assert (result.returncode, result.stdout) == (ExitCode.ENVIRONMENT, "")
    assert f"JournalCorrupt: {journal}" in result.stderr
