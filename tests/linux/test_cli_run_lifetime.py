"""Who ends an allocation: who made it, also by being killed, and not who entered it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from linux.cgroups import Scope
from linux.cli.exits import ExitCode
from linux.cli.run import _claimed
from tests.support.programs import (
    DEADLINE_S,
    MOUNT,
    NET,
    PID,
    Daemon,
    daemon_in,
    nshandoff,
    running,
    wait_until,
    warm_daemon,
)

__all__ = ["warm_daemon"]

pytestmark = pytest.mark.needs_root

READY = ("sh", "-c", "echo ready; read line; exit 3")
LEFT = ("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo ready; exec sleep 1000")


def run_words(daemon: Daemon, name: str, namespaces: str = "pid,net,mount") -> tuple[str, ...]:
    return ("run", "--socket", str(daemon.socket), "--id", name, "--namespaces", namespaces)


def exec_words(daemon: Daemon, name: str, *command: str) -> tuple[str, ...]:
    places = ("--socket", str(daemon.socket), "--state-dir", str(daemon.state_dir))
    return ("exec", *places, name, "--", *command)


def wait_ready(program: subprocess.Popen[str]) -> None:
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"


# --- exec ---------------------------------------------------------------------------------------


@pytest.mark.clause("RUN-6")
def test_basic_ranks_enter_one_allocation_and_none_of_them_ends_it(
    tmp_path: Path, image_root: Path, allocation_id: str, cgroup2: Path
) -> None:
    show = ("sh", "-c", "readlink /proc/self/ns/pid /proc/self/ns/net /proc/self/ns/mnt; exit 4")
    with daemon_in(tmp_path, image_root, "--empty-grace", "60") as daemon:
        with daemon.obtain(allocation_id, MOUNT, PID, NET, image="hello.sqfs"):
            first = running(*exec_words(daemon, allocation_id, *READY))
            second = running(*exec_words(daemon, allocation_id, *READY))
            with first as one, second as two:
                wait_ready(one)
                wait_ready(two)
                scope = Scope(cgroup2 / "workload.slice" / f"{allocation_id}.scope", "")
                assert len(scope.processes()) == 2
                for program in (one, two):
                    assert program.communicate("\n") == ("", "")
                    assert program.returncode == 3
        results = [nshandoff(*exec_words(daemon, allocation_id, *show)) for _ in range(2)]
        assert [result.returncode for result in results] == [4, 4]
        assert results[0].stdout == results[1].stdout != ""
        inside = nshandoff(
            *exec_words(daemon, allocation_id, "cat", f"{daemon.uenv_base}/hello/hello.txt")
        )
        assert inside.stdout == "hello from the image\n"
        assert daemon.alive() == [allocation_id]
        assert nshandoff("end", allocation_id, "--socket", daemon.socket).returncode == 0


def test_what_is_not_alive_is_not_made(daemon: Daemon, allocation_id: str) -> None:
    result = nshandoff(*exec_words(daemon, allocation_id, "echo", "never"))
    assert (result.returncode, result.stdout) == (ExitCode.RUN_FAILED, "")
    assert f"there is no living allocation {allocation_id} in {daemon.state_dir}" in result.stderr
    assert allocation_id not in daemon.alive()


@pytest.mark.clause("RUN-6")
def test_interrupted_exec_ends_nothing(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    """While it waits for a provider that does not go on."""

    def connections() -> int:
        return Path("/proc/net/unix").read_text().count(f" {daemon.socket}\n")

    with daemon_in(tmp_path, image_root) as daemon, daemon.obtain(allocation_id, NET) as handoff:
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            before = connections()
            with running(*exec_words(daemon, allocation_id, "echo", "never")) as rank:
                wait_until(lambda: connections() > before)
                rank.terminate()
                assert rank.wait(DEADLINE_S) == -signal.SIGTERM
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        results = nshandoff(*exec_words(daemon, allocation_id, "echo", "alive"))
        assert (results.stdout, results.stderr) == ("alive\n", "")
        handoff.end(DEADLINE_S)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("x",), "no command"),
        (("x", "--"), "no command"),
        (("--",), "ID"),
        (("x", "--socket", "s", "--", "true"), "options come first"),
        (("--sockt", "s", "x", "--", "true"), "did you mean --socket?"),
        (("a/b", "--", "true"), "slash"),
    ],
)
def test_wrong_usage_is_no_exit_code_of_a_command(words: tuple[str, ...], says: str) -> None:
    result = nshandoff("exec", *words)
    assert (result.returncode, result.stdout) == (ExitCode.RUN_FAILED, "")
    assert result.stderr.startswith("usage: nshandoff exec ")
    assert says in result.stderr


# --- Several run --------------------------------------------------------------------------------


@pytest.mark.clause("RUN-6")
def test_run_ends_what_it_made_and_not_what_it_joined(daemon: Daemon, allocation_id: str) -> None:
    with running(*run_words(daemon, allocation_id), "--", *READY) as maker:
        wait_ready(maker)
        joined = nshandoff(*run_words(daemon, allocation_id), "--", "sh", "-c", "exit 5")
        assert (joined.returncode, joined.stderr) == (5, "")
        assert maker.poll() is None
        assert allocation_id in daemon.alive()
        assert maker.communicate("\n") == ("", "")
        assert maker.returncode == 3
    wait_until(lambda: allocation_id not in daemon.alive())


@pytest.mark.clause("RUN-6")
def test_run_does_not_end_what_another_program_requested(
    daemon: Daemon, allocation_id: str
) -> None:
    with (
        daemon.obtain(allocation_id, NET) as handoff,
        running(*exec_words(daemon, allocation_id, *READY)) as rank,
    ):
        wait_ready(rank)
        joined = nshandoff(*run_words(daemon, allocation_id, "net"), "--", "sh", "-c", "exit 5")
        assert (joined.returncode, joined.stderr) == (5, "")
        assert rank.poll() is None
        rank.communicate("\n")
        handoff.end(DEADLINE_S)


def test_of_several_at_the_same_time_one_has_made_it(tmp_path: Path) -> None:
    (tmp_path / "cgroup.kill").touch()
    with _claimed(tmp_path) as first, _claimed(tmp_path) as second:
        assert (first, second) == (True, False)
    with _claimed(tmp_path) as third, _claimed(tmp_path / "absent") as fourth:
        assert (third, fourth) == (True, True)


# --- The provider is killed ----------------------------------------------------------------------


@pytest.mark.clause("CRASH-13", "RUN-4")
def test_a_provider_that_starts_again_under_a_job_changes_no_word_of_it(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    with daemon_in(tmp_path, image_root) as daemon:
        with running(*run_words(daemon, allocation_id), "--", *READY) as program:
            wait_ready(program)
            daemon.stop(signal.SIGKILL)
            daemon.start()
            assert program.communicate("\n", DEADLINE_S) == ("", "")
        assert program.returncode == 3
        assert daemon.alive() == []


# --- run is killed ------------------------------------------------------------------------------


@pytest.mark.clause("RUN-7")
@pytest.mark.parametrize("namespaces", ["pid,net,mount", "net", ""])
def test_killed_run_takes_all_of_its_allocation_along(
    daemon: Daemon, allocation_id: str, namespaces: str, cgroup2: Path
) -> None:
    words = (*run_words(daemon, allocation_id, namespaces), "--", *LEFT)
    with running(*words, start_new_session=True) as program:
        wait_ready(program)
        os.killpg(program.pid, signal.SIGKILL)
        assert program.wait(DEADLINE_S) == -signal.SIGKILL
    daemon.wait_until_none_is_alive()
    assert not (cgroup2 / "workload.slice" / f"{allocation_id}.scope").exists()


def test_untied_allocation_outlives_its_run(
    daemon: Daemon, allocation_id: str, cgroup2: Path
) -> None:
    words = (*run_words(daemon, allocation_id), "--no-tie", "--", *LEFT)
    with running(*words) as program:
        wait_ready(program)
        scope = Scope(cgroup2 / "workload.slice" / f"{allocation_id}.scope", "")
        processes = scope.processes()
        program.kill()
        program.wait(DEADLINE_S)
    assert scope.processes() == processes
    assert daemon.alive() == [allocation_id]
    assert nshandoff("end", allocation_id, "--socket", daemon.socket).returncode == 0


@pytest.mark.clause("RUN-7")
@pytest.mark.parametrize("tie", [(), ("--no-tie",)])
def test_by_self_service_a_killed_run_takes_it_along_in_any_case(
    tmp_path: Path, allocation_id: str, tie: tuple[str, ...], cgroup2: Path
) -> None:
    where = ("--socket", str(tmp_path / "absent"), "--id", allocation_id)
    words = ("run", *where, "--namespaces", "pid,net", *tie, "--", *LEFT)
    scope = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
    with running(*words) as program:
        wait_ready(program)
        assert scope.exists()
        program.kill()
        program.wait(DEADLINE_S)
    wait_until(lambda: not scope.exists())


@pytest.mark.clause("RUN-7", "SELF-15")
def test_by_self_service_a_run_that_is_killed_with_its_forge_takes_all_along(
    tmp_path: Path, allocation_id: str, cgroup2: Path
) -> None:
    words = ("run", "--socket", tmp_path / "absent", "--id", allocation_id, "--namespaces", "net")
    scope = Scope(cgroup2 / "workload.slice" / f"{allocation_id}.scope", "")
    with running(*words, "--", *LEFT) as program:
        wait_ready(program)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        (forge,) = (x for x in children if "forge.child" in Path(f"/proc/{x}/cmdline").read_text())
        assert scope.processes()
        os.kill(int(forge), signal.SIGKILL)
        program.kill()
        program.wait(DEADLINE_S)
    wait_until(lambda: not scope.processes())
    assert nshandoff(*words, "--", "true").returncode == 0
    assert not scope.path.exists()
