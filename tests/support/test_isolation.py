"""Test sessions and other providers on the same machine do not disturb each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import isolation
from tests.support.census import kill_all
from tests.support.isolation import find_cgroup2
from tests.support.programs import (
    DEADLINE_S,
    MOUNT,
    PID,
    Daemon,
    daemon_in,
    environment,
    run_program,
    wait_until,
)
from transport.request import Handoff

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.needs_root

SESSION = (
    "tests/linux/test_cgroups.py",
    "tests/linux/test_anchor.py",
    "tests/linux/test_cli_list.py::test_basic_everything_of_an_allocation_is_shown",
)
"""Tests that look at what is on the machine: scopes, anchors, loop devices, processes."""

PACE_S = 0.1
"""How long the other provider's customers pause; they are to be there, not to take the CPU."""

STAYING_MAX = 12

ISOLATED = """
import os, sys
from pathlib import Path
from tests.support import isolation
from tests.support.census import kill_all
isolation.enter(Path(sys.argv[1]))
"""

WITH_MOUNTS = """
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.support import census, isolation
session = census.Session()
with ThreadPoolExecutor(1) as outside:
    run = lambda *words: outside.submit(subprocess.run, words, check=True).result()
    run("true")
    isolated = isolation.enter(session.cgroup2)
    theirs, ours = sys.argv[1:]
    session.directories = (ours,)
    before = session.census()
    is_there = lambda: theirs in Path("/proc/self/mountinfo").read_text()
    run("mount", "-t", "tmpfs", "none", theirs)
    print(is_there(), session.left_since(before, ("mounts",), 0))
    subprocess.run(["mount", "-t", "tmpfs", "none", ours])
    print(list(session.left_since(before, ("mounts",), 0)["mounts"].values()) == [ours])
    run("umount", theirs)
    print(is_there())
own_isolation.leave()
"""


@contextmanager
def customers_of(daemon: Daemon, images: Path, name: str) -> Iterator[None]:
    """Have allocations come and go, and others come and stay to the end, each with an image."""
    over = threading.Event()
    ended: list[bool] = []

    def obtain(number: int) -> Handoff:
        image = shutil.copy(images / "hello.sqfs", images / f"{name}-{number}.sqfs").name
        return daemon.obtain(f"{name}-{number}", PID, MOUNT, image=image)

    def come() -> None:
        with ExitStack() as staying:
            while not over.wait(PACE_S) and len(ended) < STAYING_MAX:
                with obtain(2 * len(ended)) as goes:
                    ended.append(goes.end(DEADLINE_S))
                staying.enter_context(obtain(2 * len(ended) - 1))

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert len(ended) > STAYING_MAX / 4
    assert all(ended)


@pytest.mark.deep("long")
def test_two_sessions_at_once_beside_a_provider_at_work_are_green(
    image_root: Path, cgroup2: Path
) -> None:
    """Names and paths of the provider at work follow no convention of these tests."""
    job = f"job-{os.getpid()}"
    scope = cgroup2 / "workload.slice" / f"{job}.scope"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:  # short, as for sockets
        images = Path(shutil.copytree(image_root, f"{folder}/images"))
        daemon = stack.enter_context(daemon_in(Path(folder), images))
        scope.mkdir(parents=True)
        stack.callback(scope.rmdir)
        process = stack.enter_context(subprocess.Popen(["sleep", "infinity"]))
        stack.callback(process.kill)
        (scope / "cgroup.procs").write_text(str(process.pid))
        with customers_of(daemon, images, job):
            sessions = [session_in(Path(folder, name)) for name in ("a", "b")]
            said = [session.communicate()[0] for session in sessions]
        assert process.poll() is None
    assert [session.returncode for session in sessions] == [0, 0], "\n".join(said)
    assert not list(cgroup2.glob(f"{isolation.PREFIX}*"))


def session_in(directory: Path) -> subprocess.Popen[str]:
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={directory}"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *SESSION],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def test_a_mount_made_outside_is_not_taken_for_a_leak_and_can_be_unmounted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("theirs", "ours")]
    for folder in folders:
        folder.mkdir()
    words = ("unshare", "-m", "--propagation=shared", sys.executable, "-c", WITH_MOUNTS)
    run = run_program(*words, *folders)
    assert run.stdout.splitlines() == ["True {}", "True", "False"], run.stderr


def test_what_a_killed_session_left_is_removed_when_it_is_empty(cgroup2: Path) -> None:
    orphan = "os.posix_spawn('/bin/sleep', ['sleep', 'infinity'], {}, setsid=True);"
    above = os.open(cgroup2, os.O_RDONLY)
    with isolated() as empty, isolated(orphan) as in_use, isolated() as living:
        programs = (empty, in_use, living)
        cgroups = [cgroup2 / f"{isolation.PREFIX}{each.pid}-1" for each in programs]
        for program in (empty, in_use):
            program.kill()
            program.wait()
        isolation.remove_stale(above)
        assert [each.exists() for each in cgroups] == [False, True, True]
        kill_all(cgroups[1])
    wait_until(lambda: not (isolation.remove_stale(above) or any(map(Path.exists, cgroups))))
    os.close(above)


def test_where_the_kernel_refuses_a_session_runs_all_the_same_and_says_so(
    tmp_path: Path, cgroup2: Path
) -> None:
    (tmp_path / "test_one.py").write_text("def test(): pass")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    where = ["--rootdir", tmp_path, "--basetemp", tmp_path / "tmp", tmp_path]
    words = ("setpriv", "--bounding-set=-sys_admin", sys.executable, "-m", "pytest")
    run = run_program(*words, *options, *where)
    assert "not isolated, so others may disturb: [Errno 1] unshare" in run.stdout
    assert run.returncode == 0
    assert not list(cgroup2.glob(f"{isolation.PREFIX}*"))


@contextmanager
def isolated(more: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Have a program that isolates itself, does `more`, and lives until its input ends."""
    program = f"{ISOLATED}{more}print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, find_cgroup2()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdout.readline()
        yield running
        running.stdin.close()
