"""A consumer finds out what only the provider knows: where the scope is, what can be entered."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linux.cgroups import CgroupUnavailable, Scope, ScopeError, find_cgroup, find_cgroup2
from linux.cli.exits import ExitCode
from linux.consumer import find_scope
from linux.scope_file import SUFFIX
from tests.support.programs import (
    COMMAND,
    PID,
    Daemon,
    daemon_in,
    environment,
    nshandoff,
    run_program,
    wait_until,
)
from transport.descriptors import Descriptor

pytestmark = pytest.mark.needs_root


def run(daemon: Daemon, name: str, *command: str) -> subprocess.CompletedProcess[str]:
    words = ("run", "--socket", daemon.socket, "--id", name, "--namespaces", "pid")
    return nshandoff(*words, "--", *command)


@pytest.mark.clause("NODE-22", "NODE-23")
def test_basic_scope_is_found_by_what_the_provider_says(
    daemon: Daemon, allocation_id: str, cgroup2: Path
) -> None:
    with daemon.obtain(allocation_id, PID) as handoff:
        path = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
        assert find_scope(daemon.socket, allocation_id) == path
        # Another provider may say nothing; then it is where everyone's is.
        Path(f"{daemon.socket}{SUFFIX}").unlink()
        assert find_scope(daemon.socket, allocation_id) == path
        handoff.end()


@pytest.mark.clause("NODE-23")
def test_a_scope_that_no_provider_made_is_refused(
    daemon: Daemon, allocation_id: str, cgroup2: Path
) -> None:
    with pytest.raises(ScopeError, match="should have made it, and it has no owner"):
        find_scope(daemon.socket, allocation_id)
    path = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
    path.mkdir(parents=True)
    try:
        with pytest.raises(ScopeError, match=f"ENODATA.*{path}; the provider at {daemon.socket}"):
            find_scope(daemon.socket, allocation_id)
    finally:
        path.rmdir()


@pytest.mark.clause("END-21")
def test_a_scope_that_is_removed_unused_ends_the_allocation(
    daemon: Daemon, allocation_id: str
) -> None:
    with daemon.obtain(allocation_id, PID):
        scope = find_scope(daemon.socket, allocation_id)
        assert scope is not None
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
        scope.rmdir()
        wait_until(lambda: daemon.alive() == [])
    assert "scope_emptied" in [line["event"] for line in daemon.events(allocation_id)]


OTHER_PLACE = ("--scope-parent", "jobs.slice/mine", "--scope-name", "alloc-{id}.scope")


@pytest.fixture
def elsewhere(tmp_path: Path, image_root: Path, cgroup2: Path) -> Iterator[Daemon]:
    """A provider with scopes that are not where others have them; its slices go with it."""
    with daemon_in(tmp_path, image_root, *OTHER_PLACE) as daemon:
        yield daemon
    assert not (cgroup2 / "jobs.slice").exists()


def other_scope(cgroup2: Path, name: str) -> Path:
    return cgroup2 / "jobs.slice" / "mine" / f"alloc-{name}.scope"


@pytest.mark.clause("NODE-1", "NODE-22")
def test_parent_and_name_are_settings(elsewhere: Daemon, allocation_id: str, cgroup2: Path) -> None:
    done = run(elsewhere, allocation_id, "cat", "/proc/self/cgroup")
    scope = other_scope(cgroup2, allocation_id)
    assert f"/{scope.relative_to(cgroup2)}\n" in done.stdout, done.stderr
    with elsewhere.obtain(allocation_id, PID):
        assert find_cgroup(scope.stat().st_ino) == scope


@pytest.mark.clause("CRASH-16", "NODE-1")
@pytest.mark.parametrize("is_lost", [False, True], ids=["kept", "lost"])
def test_scopes_are_found_where_earlier_settings_put_them(
    elsewhere: Daemon, allocation_id: str, cgroup2: Path, is_lost: bool
) -> None:
    with elsewhere.obtain(allocation_id, PID):
        wait_until(lambda: elsewhere.states() == {allocation_id: "handed_off"})
    elsewhere.stop(signal.SIGKILL)
    if is_lost:
        shutil.rmtree(elsewhere.state_dir)
    elsewhere.options = ()
    elsewhere.start()
    assert elsewhere.alive() == [allocation_id]
    with elsewhere.obtain(allocation_id, PID):
        wait_until(lambda: elsewhere.states() == {allocation_id: "handed_off"})
    words = ("--socket", elsewhere.socket, "--state-dir", elsewhere.state_dir)
    inside = nshandoff("exec", *words, allocation_id, "--", "cat", "/proc/self/cgroup")
    scope = other_scope(cgroup2, allocation_id)
    assert f"/{scope.relative_to(cgroup2)}\n" in inside.stdout, inside.stderr
    wait_until(lambda: elsewhere.alive() == [])  # it was used, and is empty
    assert not scope.exists()


@pytest.mark.clause("CRASH-19")
def test_doctor_finds_what_a_lost_provider_left_elsewhere(
    elsewhere: Daemon, allocation_id: str, cgroup2: Path, tmp_path: Path
) -> None:
    with elsewhere.obtain(allocation_id, PID):
        wait_until(lambda: elsewhere.states() == {allocation_id: "handed_off"})
    elsewhere.stop(signal.SIGKILL)
    shutil.rmtree(elsewhere.state_dir)
    scope = other_scope(cgroup2, allocation_id)
    with Scope(scope, "").open_procs() as procs:
        spawn_into(procs)
    new = tmp_path / "new"
    new.mkdir()
    wait_until(lambda: "DEAD" in nshandoff("doctor", "--state-dir", new).stdout)
    repaired = nshandoff("doctor", "--state-dir", new, "--repair").stdout
    assert f"released allocation {allocation_id}" in repaired
    assert not (cgroup2 / "jobs.slice").exists()


def spawn_into(procs: Descriptor) -> None:
    """Have a process enter a scope, and end."""
    enter = f"import os; os.write({procs.fileno()}, b'0'); sum(range(10**6))"
    subprocess.run([sys.executable, "-c", enter], check=True, pass_fds=[procs.fileno()])


@pytest.mark.clause("CRASH-10", "NODE-22")
def test_a_provider_that_cannot_listen_leaves_the_file_to_the_one_that_does(
    elsewhere: Daemon, tmp_path: Path
) -> None:
    said = Path(f"{elsewhere.socket}{SUFFIX}").read_text()
    words = ("--socket", elsewhere.socket, "--state-dir", tmp_path / "second")
    second = nshandoff("serve", *words, *elsewhere.places)
    assert second.returncode == ExitCode.ENVIRONMENT
    assert Path(f"{elsewhere.socket}{SUFFIX}").read_text() == said


@pytest.mark.parametrize(
    "options",
    [("--scope-name", "one"), ("--scope-name", "a/{id}"), ("--scope-parent", "../a"),
     ("--scope-parent", "pact.slice/a")],
    ids=" ".join,
)  # fmt: skip
def test_a_place_that_cannot_be_one_is_wrong_usage(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    told = nshandoff("serve", "--socket", tmp_path / "s", "--state-dir", tmp_path / "d", *options)
    assert told.returncode == ExitCode.USAGE
    assert "of scopes" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_works_without_scopes_and_says_what_is_missing(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    with daemon_in(tmp_path, image_root, "--no-scopes") as daemon:
        done = run(daemon, allocation_id, "echo", "inside")
        assert (done.returncode, done.stdout) == (0, "inside\n")
        assert f"{allocation_id}: the provider makes no cgroups" in done.stderr
        assert daemon.alive() == []


REMOUNT = 'umount --lazy "$0" && mount -t cgroup2 none "$0" && exec "$@"'
"""Show the own cgroup namespace, as a container does."""


def test_a_provider_that_sees_less_of_cgroup_v2_is_understood(
    tmp_path: Path, image_root: Path, allocation_id: str, cgroup2: Path
) -> None:
    inner = cgroup2 / f"{allocation_id}-inner"
    inner.mkdir()
    enter = f'echo 0 >"{inner}/cgroup.procs" && exec unshare -Cm sh -c "$0" "$@"'
    daemon = Daemon(tmp_path, image_root)
    wrapped = ["sh", "-c", enter, REMOUNT, str(cgroup2), *COMMAND]
    with subprocess.Popen([*wrapped, *daemon.words], env=environment()) as program:
        try:
            daemon.program = program  # type: ignore[assignment]
            wait_until(daemon.ready.exists)
            done = run(daemon, allocation_id, "cat", "/proc/self/cgroup")
            assert f"/{inner.name}/workload.slice/{allocation_id}.scope" in done.stdout, done.stderr
        finally:
            program.terminate()
    for path in (inner / "pact.slice", inner / "workload.slice", inner):
        if path.exists():
            path.rmdir()


def test_a_consumer_that_sees_less_of_cgroup_v2_is_told(
    daemon: Daemon, allocation_id: str, cgroup2: Path
) -> None:
    inner = cgroup2 / f"{allocation_id}-inner"
    inner.mkdir()
    enter = f'echo 0 >"{inner}/cgroup.procs" && exec unshare -Cm sh -c "$0" "$@"'
    words = ("run", "--socket", str(daemon.socket), "--id", allocation_id, "--namespaces", "pid")
    told = nshandoff(*words, "--", "true", within=("sh", "-c", enter, REMOUNT, cgroup2))
    assert told.returncode == ExitCode.RUN_FAILED
    assert "are outside of what" in told.stderr
    assert daemon.alive() == []
    inner.rmdir()


def test_a_cgroup_that_is_not_there_is_not_found() -> None:
    assert find_cgroup(find_cgroup2().stat().st_ino) == find_cgroup2()
    with pytest.raises(CgroupUnavailable, match="outside of what"):
        find_cgroup(2**62)


IN_ANOTHER = ("unshare", "--pid", "--fork", "--mount-proc")
"""A PID namespace below the provider's: those of the provider cannot be entered from there."""


@pytest.mark.clause("SELF-13")
@pytest.mark.parametrize("fallback", ["never", "unavailable"])
def test_a_pid_namespace_that_cannot_be_entered_is_not_asked_for(
    daemon: Daemon, allocation_id: str, fallback: str
) -> None:
    words = ("run", "--socket", str(daemon.socket), "--id", allocation_id, "--fallback", fallback)
    told = nshandoff(*words, "--namespaces", "pid", "--", "echo", "inside", within=IN_ANOTHER)
    assert "neither this one nor below it" in told.stderr
    expected = (ExitCode.RUN_FAILED, "") if fallback == "never" else (0, "inside\n")
    assert (told.returncode, told.stdout) == expected
    assert daemon.events(allocation_id) == []


def test_other_namespaces_can_be_entered_from_there(daemon: Daemon, allocation_id: str) -> None:
    words = ("run", "--socket", str(daemon.socket), "--id", allocation_id, "--fallback", "never")
    told = nshandoff(*words, "--namespaces", "net,mount", "--", "echo", "inside", within=IN_ANOTHER)
    assert (told.returncode, told.stdout) == (0, "inside\n"), told.stderr


@pytest.mark.clause("NODE-21")
def test_a_provider_that_could_not_return_says_so_at_its_start(
    tmp_path: Path, image_root: Path
) -> None:
    words = Daemon(tmp_path, image_root, "--no-scopes").words
    told = nshandoff(*words, within=("unshare", "-Urm"))
    assert told.returncode == ExitCode.ENVIRONMENT
    assert "namespace belongs to another one, so it cannot return there" in told.stderr


@pytest.mark.clause("NODE-21")
def test_a_provider_in_a_user_namespace_with_all_of_its_own_serves(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    daemon = Daemon(tmp_path, image_root, "--no-scopes")
    inside = f"{' '.join(COMMAND)} run --socket {daemon.socket} --id {allocation_id}"
    script = f"""
        {" ".join([*COMMAND, *daemon.words])} >{daemon.log} 2>&1 &
        provider=$!
        until [ -e {daemon.ready} ]; do sleep 0.05; done
        {inside} --fallback never --namespaces pid,net,mount -- echo inside
        kill $provider; wait $provider
    """
    told = run_program("unshare", "-Urmnpf", "--mount-proc", "sh", "-c", script)
    assert told.stdout == "inside\n", told.stderr + daemon.log.read_text()
