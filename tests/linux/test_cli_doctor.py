"""`nshandoff doctor`: what is alive, dead or unknown, and that only what is dead is released."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from linux.cgroups import ALLOCATION_ATTRIBUTE, STATE_ATTRIBUTE, Scope
from linux.cli.exits import ExitCode
from linux.doctor import examine, repair
from linux.features import Features
from linux.instance import Instance, instance_of
from linux.journal import JOURNAL_NAME
from tests.support.programs import (
    NET,
    PID,
    Daemon,
    nshandoff,
    wait_until,
)
from tests.support.spared import is_spared

pytestmark = pytest.mark.needs_root


@pytest.fixture
def new_dir(tmp_path: Path) -> Path:
    """A state directory that no provider has used."""
    path = tmp_path / "new"
    path.mkdir()
    return path


def examined(state_dir: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]], list[str]]:
    """What `doctor` says of each thing, by the last word of its name."""
    result = nshandoff("doctor", "--state-dir", state_dir, "--json", *words)
    assert result.stderr == ""
    shown = json.loads(result.stdout)
    assert (shown["schema"], shown["state_dir"]) == (1, str(state_dir))
    found = {it["what"].partition(",")[0].split()[-1]: it for it in shown["findings"]}
    needs_attention = any(it["needs_attention"] for it in shown["findings"])
    assert result.returncode == (ExitCode.NO if needs_attention else ExitCode.OK)
    return result.returncode, found, shown["repaired"]


def obtain(daemon: Daemon, name: str, *kinds: Any) -> None:
    with daemon.obtain(name, *(kinds or (NET,))):
        wait_until(lambda: daemon.states().get(name) == "handed_off")


def join(cgroup2: Path, name: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "infinity"])
    (cgroup2 / "workload.slice" / f"{name}.scope" / "cgroup.procs").write_text(str(process.pid))
    return process


def test_basic_a_healthy_provider_needs_nothing(daemon: Daemon, allocation_id: str) -> None:
    obtain(daemon, allocation_id)
    code, found, _ = examined(daemon.state_dir)
    assert code == ExitCode.OK
    assert found[str(daemon.state_dir)]["verdict"] == "ALIVE"
    daemon.stop(signal.SIGKILL)
    code, found, _ = examined(daemon.state_dir)
    assert code == ExitCode.OK
    assert found[allocation_id]["verdict"] == "ALIVE"
    result = nshandoff("doctor", "--state-dir", daemon.state_dir)
    assert f"ALIVE   allocation {allocation_id}, init " in result.stdout
    assert "nothing needs attention" in result.stdout


@pytest.mark.parametrize("verb", ["list", "doctor"])
def test_a_state_directory_that_is_not_there_is_named(tmp_path: Path, verb: str) -> None:
    result = nshandoff(verb, "--state-dir", tmp_path / "typo")
    assert (result.returncode, result.stdout) == (ExitCode.ENVIRONMENT, "")
    assert f"{tmp_path}/typo: there is no such state directory" in result.stderr
    assert not (tmp_path / "typo").exists()


@pytest.mark.clause("CRASH-19")
def test_leftovers_of_a_lost_state_directory_are_released_once_they_are_dead(
    daemon: Daemon, allocation_id: str, cgroup2: Path, new_dir: Path
) -> None:
    idle, busy = f"{allocation_id}-idle", f"{allocation_id}-busy"
    for name in (idle, busy):
        obtain(daemon, name)
    job = join(cgroup2, busy)
    daemon.stop(signal.SIGKILL)
    shutil.rmtree(daemon.state_dir)

    code, found, done = examined(new_dir, "--repair")
    assert (code, done) == (ExitCode.NO, [])
    for name in (idle, busy):
        assert found[name]["verdict"] == "UNKNOWN"
        assert found[name]["advice"].endswith(f"--state-dir {daemon.state_dir}: it adopts it")
    assert is_spared(job)

    job.kill()
    job.wait()
    wait_until(lambda: examined(new_dir)[1][busy]["verdict"] == "DEAD")
    _, found, done = examined(new_dir, "--repair")
    assert done == [f"released allocation {busy}"]
    assert busy not in found
    assert not (cgroup2 / "workload.slice" / f"{busy}.scope").exists()
    # Another provider is none of its business, and the advice is right.
    daemon.start()
    assert list(daemon.states()) == [idle]
    assert "holds its anchors" in examined(new_dir)[1][str(daemon.state_dir)]["why"]


@pytest.mark.clause("CRASH-19")
def test_what_another_state_directory_knows_of_is_left_to_it(
    daemon: Daemon, allocation_id: str, cgroup2: Path, new_dir: Path
) -> None:
    obtain(daemon, allocation_id)
    daemon.stop(signal.SIGKILL)
    job = join(cgroup2, allocation_id)
    job.kill()
    job.wait()
    _, found, done = examined(new_dir, "--repair")
    assert done == []
    assert f"--state-dir {daemon.state_dir}` looks at it" in found[str(daemon.state_dir)]["why"]
    assert (cgroup2 / "workload.slice" / f"{allocation_id}.scope").exists()


@pytest.mark.clause("CRASH-15", "CRASH-19")
def test_nothing_is_released_while_its_instance_is_locked(
    daemon: Daemon, allocation_id: str, cgroup2: Path, new_dir: Path
) -> None:
    obtain(daemon, allocation_id)
    daemon.stop(signal.SIGKILL)
    shutil.rmtree(daemon.state_dir)
    features = Features.probe()
    scope = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
    os.setxattr(scope, STATE_ATTRIBUTE, b"ended")
    findings = examine(new_dir, features)
    assert any(it.is_repairable for it in findings)
    with Instance.lock(cgroup2, instance_of(daemon.state_dir), None):
        assert repair(findings, new_dir, features) == []
        assert scope.exists()
    assert repair(findings, new_dir, features) == [f"released allocation {allocation_id}"]
    assert not scope.exists()


@pytest.mark.clause("CRASH-11", "CRASH-18", "CRASH-19")
def test_a_damaged_journal_is_set_aside_and_its_jobs_adopted(
    daemon: Daemon, allocation_id: str, cgroup2: Path
) -> None:
    obtain(daemon, allocation_id)
    job = join(cgroup2, allocation_id)
    daemon.stop()
    journal = daemon.state_dir / JOURNAL_NAME
    content = bytearray(journal.read_bytes())
    content[content.index(allocation_id.encode())] ^= 1
    journal.write_bytes(content)

    code, found, _ = examined(daemon.state_dir)
    assert code == ExitCode.NO
    assert found[str(journal)]["verdict"] == "UNKNOWN"
    assert "--repair" in found[str(journal)]["advice"]
    _, _, (done,) = examined(daemon.state_dir, "--repair")
    assert Path(done.removeprefix("set aside as ")).read_bytes() == content
    # Its loss is still seen, until a provider has looked at the node.
    code, found, _ = examined(daemon.state_dir)
    assert "changes" in found[str(journal)]["why"]
    assert found[allocation_id]["verdict"] == "UNKNOWN"
    daemon.start()
    assert daemon.states() == {allocation_id: "handed_off"}  # as its scope says
    assert examined(daemon.state_dir)[0] == ExitCode.OK
    assert is_spared(job)
    job.kill()
    job.wait()
    daemon.wait_until_none_is_alive()


@pytest.mark.clause("CRASH-16", "CRASH-19")
def test_what_another_version_made_is_kept(
    daemon: Daemon, allocation_id: str, cgroup2: Path, new_dir: Path
) -> None:
    obtain(daemon, allocation_id, PID)
    scope = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
    for attribute in (ALLOCATION_ATTRIBUTE, STATE_ATTRIBUTE):
        os.removexattr(scope, attribute)
    daemon.stop(signal.SIGKILL)
    shutil.rmtree(daemon.state_dir)
    for _ in range(2):
        code, found, done = examined(new_dir, "--repair")
        assert (code, done) == (ExitCode.NO, [])
        (kept,) = (it for it in found.values() if "kill -9" in str(it["advice"]))
        assert kept["verdict"] == "UNKNOWN"
    init = int(kept["advice"].split()[-1])
    os.kill(init, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{init}").exists())
    scope.rmdir()


@pytest.mark.clause("CRASH-15")
def test_a_copy_beside_a_running_provider_is_said(
    daemon: Daemon, allocation_id: str, tmp_path: Path, image_root: Path
) -> None:
    obtain(daemon, allocation_id)
    shutil.copytree(daemon.state_dir, tmp_path / "copy")
    code, found, done = examined(tmp_path / "copy", "--repair")
    assert (code, done) == (ExitCode.NO, [])
    assert f"process {daemon.pid}" in found[str(tmp_path / "copy")]["why"]
    second = Daemon(tmp_path / "second", image_root)
    second.state_dir = tmp_path / "copy"
    result = nshandoff(*second.words)
    assert result.returncode == ExitCode.ENVIRONMENT
    last = json.loads(result.stderr.splitlines()[-1])
    assert last["error"] == "InstanceBusy"
    assert f"process {daemon.pid}, whose state directory is {daemon.state_dir}," in last["message"]
    assert daemon.states() == {allocation_id: "handed_off"}


def test_a_scope_without_an_owner_is_said(allocation_id: str, cgroup2: Path, new_dir: Path) -> None:
    scope = Scope.create(cgroup2, allocation_id, "a token that no process has")
    try:
        code, found, done = examined(new_dir, "--repair")
        assert (code, done) == (ExitCode.NO, [])
        assert found[allocation_id]["verdict"] == "UNKNOWN"
        assert instance_of(new_dir) not in found
    finally:
        scope.remove()


@pytest.mark.clause("CRASH-17")
def test_a_provider_makes_again_what_is_removed_under_it(
    daemon: Daemon, allocation_id: str
) -> None:
    obtain(daemon, allocation_id)
    shutil.rmtree(daemon.state_dir)
    wait_until(daemon._is_ready)
    assert daemon.states() == {allocation_id: "handed_off"}
    # It is ready again before a thread of it has written that line.
    wait_until(lambda: "made_again" in [line["event"] for line in daemon.events()])
    (line,) = (line for line in daemon.events() if line["event"] == "made_again")
    assert line["message"].startswith("the journal of 1 allocations was removed")
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert daemon.states() == {allocation_id: "handed_off"}


@pytest.mark.clause("CRASH-17")
def test_a_provider_without_its_socket_stops_and_leaves_alive(
    daemon: Daemon, allocation_id: str
) -> None:
    obtain(daemon, allocation_id)
    daemon.socket.unlink()
    assert daemon.program is not None
    assert daemon.program.wait(10) == ExitCode.ENVIRONMENT
    last = daemon.events()[-1]
    assert (last["event"], str(daemon.socket) in last["message"]) == ("place_lost", True)
    daemon.start()
    assert daemon.states() == {allocation_id: "handed_off"}
