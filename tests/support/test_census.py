"""The watch over the tests is itself able to see: every sort of leak, made on purpose."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import session_census as session
from tests.support.census import MACHINE_WIDE, Census, remove_scopes_of

SLEEP = shutil.which("sleep") or "sleep"


def test_basic_a_test_that_leaves_nothing_is_told_so_at_once(census: Census) -> None:
    left, right = os.pipe()
    os.close(left)
    os.close(right)
    assert session.left_since(census, patience_s=0) == {}


def test_a_descriptor_is_named_by_what_it_is_open_on(census: Census, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        left = session.left_since(census, patience_s=0)
        assert session.clean(left) == [f"descriptor {file.fileno()}: {tmp_path}/open"]


def test_a_number_open_on_something_else_than_before_is_a_leak() -> None:
    with open(os.devnull) as file:
        before = session.census()
        left, right = os.pipe()
        os.dup2(left, file.fileno())
        os.close(left)
        os.close(right)
        assert list(session.left_since(before, patience_s=0)) == ["descriptors"]


def test_a_thread_is_named(census: Census) -> None:
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait, name="forgotten")
    thread.start()
    account = session.clean(session.left_since(census, patience_s=0))
    leave.set()
    thread.join()
    assert [line.partition(": ")[2] for line in account] == ["forgotten"]


def test_a_child_that_was_not_waited_for_is_reaped(census: Census) -> None:
    child = subprocess.Popen([SLEEP, "0"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    account = session.clean(session.left_since(census, ("processes",), patience_s=0))
    assert account == [f"process {child.pid}: dead, and its parent has not waited for it: killed"]
    child.wait()


@pytest.mark.needs_root
def test_an_anchor_that_lost_its_parent_and_its_session_is_found_and_killed(census: Census) -> None:
    pid = _start_orphan()
    pidfd = os.pidfd_open(pid)
    account = session.clean(session.left_since(census, MACHINE_WIDE, patience_s=0))
    died, _, _ = select.select([pidfd], [], [], 0)
    os.close(pidfd)
    assert died
    assert account == [f"process {pid}: anchor of-a-test ({SLEEP} infinity): killed"]


@pytest.mark.needs_root
def test_what_was_there_before_the_test_is_let_live() -> None:
    pid = _start_orphan()
    before = session.census()
    assert session.clean(session.left_since(before, patience_s=0)) == []
    os.kill(pid, signal.SIGKILL)


@pytest.mark.needs_root
def test_a_scope_of_ours_is_killed_and_removed(
    census: Census, cgroup2: Path, allocation_id: str
) -> None:
    scope = cgroup2 / "workload.slice" / f"{allocation_id}.scope"
    (scope / "inner").mkdir(parents=True)
    with subprocess.Popen([SLEEP, "infinity"]) as child:
        (scope / "inner" / "cgroup.procs").write_text(str(child.pid))
        account = session.clean(session.left_since(census, ("scopes",), patience_s=0))
    assert account == [f"scope {scope}: killed and removed"]
    _remove_empty(scope.parent)


@pytest.mark.needs_root
def test_a_tests_own_root_of_slices_is_removed_with_all_below(
    census: Census, cgroup2: Path, allocation_id: str
) -> None:
    root = cgroup2 / allocation_id
    (root / "workload.slice" / "a.scope").mkdir(parents=True)
    account = session.clean(session.left_since(census, ("scopes",), patience_s=0))
    assert account == [f"scope {root}: killed and removed"]


@pytest.mark.needs_root
def test_a_scope_that_may_be_of_another_run_is_reported_and_left(
    census: Census, cgroup2: Path, allocation_id: str
) -> None:
    scope = cgroup2 / "workload.slice" / f"job-of-{allocation_id.replace('nsh-', '')}.scope"
    scope.mkdir(parents=True)
    account = session.clean(session.left_since(census, ("scopes",), patience_s=0))
    scope.rmdir()
    _remove_empty(scope.parent)
    assert f"scope {scope}: left alone, not provably ours" in account


@pytest.mark.needs_root
def test_a_scope_of_another_test_session_is_not_counted(census: Census, cgroup2: Path) -> None:
    scope = cgroup2 / "workload.slice" / f"nsh-test-1-{os.getpid()}.scope"
    scope.mkdir(parents=True)
    assert str(scope) not in session.census().scopes
    scope.rmdir()
    _remove_empty(scope.parent)


@pytest.mark.needs_root
def test_a_mounted_image_is_unmounted_and_its_loop_device_detached(
    census: Census, image_root: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "loop,ro", image_root / "hello.sqfs", tmp_path], check=True)
    assert (tmp_path / "hello.txt").read_text() == "hello from the image\n"
    account = session.clean(session.left_since(census, MACHINE_WIDE, patience_s=0))
    assert [line.split()[0] for line in account] == ["mount", "loop"]
    assert session.left_since(census, MACHINE_WIDE) == {}


def test_an_image_holds_what_the_fixture_promises(image_root: Path) -> None:
    listing = subprocess.run(
        ["unsquashfs", "-lls", image_root / "hello.sqfs"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout.splitlines()
    files = [line.split() for line in listing if line.startswith("-")]
    assert [(mode, owner) for mode, owner, *_ in files] == [
        ("-rwxr-xr-x", "root/root"),
        ("-rw-r--r--", "root/root"),
    ]
    assert [Path(line[-1]).name for line in files] == ["marker", "hello.txt"]


LEAKING_SESSION = """
import pytest, subprocess
from tests.conftest import session_census
session_census.patience_s = 0

@pytest.fixture(scope="session")
def program(): return subprocess.Popen(["sleep", "99"])
@pytest.fixture(scope="session", autouse=True)
def started_before_the_test(program): pass
def test(): pass
"""

WORKERS = pytest.mark.parametrize(
    "workers",
    [
        pytest.param(1, id="in a worker"),
        pytest.param(0, id="in one process", marks=pytest.mark.deep("long")),
    ],
)

INNER_TESTS = """
import os, pytest
from tests.conftest import session_census
session_census.patience_s = 0

def test_passing(): pass
def test_skipping(): pytest.skip("no time")
@pytest.mark.skip("no time")
def test_marked(): pass
def test_too_old(): pytest.skip("kernel lacks it")
def test_leaking(): os.open("/dev/zero", 0)
def test_failing(): os.open("/dev/zero", 0); assert False
"""


@WORKERS
def test_under_ci_what_is_skipped_or_left_behind_has_failed(tmp_path: Path, workers: int) -> None:
    (tmp_path / "test_skipped_module.py").write_text(
        "import pytest; pytest.skip('no time', allow_module_level=True)"
    )
    run = _run_pytest(tmp_path, INNER_TESTS, "true", workers)
    assert run.returncode == 1
    assert "2 failed, 2 passed, 1 skipped, 3 errors" in run.stdout
    assert "skipped, which CI does not permit: no time" in run.stdout
    assert ": /dev/zero" in run.stdout


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    run = _run_pytest(tmp_path, "import pytest\ndef test(): pytest.skip('no time')", "")
    assert run.returncode == 0


@WORKERS
def test_a_run_under_ci_in_which_nothing_ran_is_not_green(tmp_path: Path, workers: int) -> None:
    tests = "import pytest\ndef test(): pytest.skip('kernel lacks')"
    run = _run_pytest(tmp_path, tests, "1", workers)
    assert "not one test has run" in run.stdout
    assert run.returncode != 0


def test_a_run_under_ci_that_is_to_collect_only_may_be_green(tmp_path: Path) -> None:
    run = _run_pytest(tmp_path, "def test(): pass", "true", options="--collect-only")
    assert run.returncode == 0, run.stdout


@WORKERS
def test_what_a_script_has_its_background_ignore_is_not_ignored(
    tmp_path: Path, workers: int
) -> None:
    program = ["sh", "-c", "kill -INT $$; exit 7"]
    tests = f"import subprocess\ndef test(): subprocess.run({program}, check=True)"
    run = _run_pytest(tmp_path, tests, "", workers, under=("env", "--ignore-signal=HUP,INT,QUIT"))
    assert "died with <Signals.SIGINT: 2>" in run.stdout


@WORKERS
def test_what_is_left_behind_by_no_single_test_is_a_failure(tmp_path: Path, workers: int) -> None:
    run = _run_pytest(tmp_path, LEAKING_SESSION, "", workers)
    assert "1 passed" in run.stdout
    assert re.search(r"left behind by the session:\n  process \d+: sleep 99: killed", run.stdout)
    assert run.returncode == 1


def _run_pytest(
    directory: Path,
    tests: str,
    ci: str,
    workers: int = 0,
    options: str = "",
    under: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    (directory / "test_inner.py").write_text(tests)
    options += " -p tests.conftest -p no:cacheprovider -p no:randomly"
    options += " --continue-on-collection-errors"
    where = ["-c", os.devnull, "--rootdir", directory, "--basetemp", directory / "tmp", directory]
    where += ["-n", str(workers)]
    return subprocess.run(
        [*under, sys.executable, "-m", "pytest", *options.split(), *where],
        env={**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def _start_orphan() -> int:
    """A process as the forge leaves one: own session, its parent gone, its environment a token."""
    parent = (
        "import os, sys; print(os.posix_spawn(sys.argv[1], [sys.argv[1], 'infinity'],"
        " {'NSHANDOFF_ANCHOR': 'of-a-test'}, setsid=True,"
        " file_actions=[(os.POSIX_SPAWN_CLOSE, 1)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", parent, SLEEP], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(run.stdout)


def _remove_empty(slice_: Path) -> None:
    with contextlib.suppress(OSError):
        slice_.rmdir()


@pytest.mark.needs_root
def test_scopes_of_a_session_that_is_over_can_be_removed(cgroup2: Path) -> None:
    """Its number is that of a child that is not reaped: no other session can have it."""
    with subprocess.Popen(["true"]) as over, subprocess.Popen(["sleep", "infinity"]) as left:
        scope = cgroup2 / "workload.slice" / f"nsh-test-{over.pid}-1.scope"
        (scope / "below").mkdir(parents=True)
        (scope / "below" / "cgroup.procs").write_text(str(left.pid))
        assert remove_scopes_of(over.pid) == []
        assert left.wait() == -signal.SIGKILL
    assert not scope.exists()
    with contextlib.suppress(OSError):
        scope.parent.rmdir()
