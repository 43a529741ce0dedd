"""A command starts in the allocation, in its scope, and with nothing of ours; or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from linux.cgroups import Scope, remove_slices
from linux.features import Features
from linux.forge import spawn as forge_spawn
from linux.forge.client import Forge
from linux.forge.spawn import InitDead, restore_foreground, spawn_within
from linux.syscalls import SyscallError
from tests.support.forging import (
    ALL,
    MOUNT,
    NET,
    PID,
    allocation,
    end,
    features,
    forge,
    own_links,
    run_within,
    wait_until,
)
from transport.descriptors import Descriptor, DescriptorBundle

__all__ = ["features", "forge"]

pytestmark = pytest.mark.needs_root

PACKAGES = str(Path(__file__).parents[2])


@pytest.fixture
def scope(cgroup2: Path, allocation_id: str) -> Iterator[Scope]:
    scope = Scope.create(cgroup2, allocation_id, "the owner")
    yield scope
    scope.kill()
    wait_until(scope.remove)
    remove_slices(cgroup2)


def output(*command: str, **how: object) -> str:
    """What a command prints that is started in no namespace at all."""
    with (
        DescriptorBundle() as nothing,
        spawn_within(command, nothing, stdout=subprocess.PIPE, **how) as child,  # type: ignore[arg-type]
    ):
        return os.fsdecode(child.communicate()[0])


def test_basic_command_is_our_child_in_all_namespaces(forge: Forge, features: Features) -> None:
    with (
        allocation(forge, features) as (anchor, bundle),
        spawn_within(["sleep", "infinity"], bundle) as child,
    ):
        assert child.args == ["sleep", "infinity"]
        for name in ("pid", "net", "mnt"):
            theirs = os.readlink(f"/proc/{child.pid}/ns/{name}")
            assert theirs == os.readlink(f"/proc/{anchor.pid}/ns/{name}")
        assert child.poll() is None
        assert f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{child.pid}/status").read_text()
        child.terminate()
        assert child.wait() == -signal.SIGTERM


@pytest.mark.clause("NODE-6")
@pytest.mark.parametrize("kinds", [(PID,), (NET,), (MOUNT,), (MOUNT, PID), (NET, MOUNT)])
def test_command_is_in_the_bundles_namespaces_and_else_in_ours(
    forge: Forge, features: Features, kinds: tuple[object, ...]
) -> None:
    wanted = tuple(kind for kind in ALL if kind in kinds)
    own = own_links()
    with (
        allocation(forge, features, wanted) as (_, bundle),
        spawn_within(["sleep", "infinity"], bundle) as child,
    ):
        theirs = {name: os.readlink(f"/proc/{child.pid}/ns/{name}") for name in own}
        assert {name for name in own if own[name] != theirs[name]} == {
            {PID: "pid", NET: "net", MOUNT: "mnt"}[kind] for kind in wanted
        }
        child.kill()


def test_caller_stays_where_it_was(forge: Forge, features: Features, tmp_path: Path) -> None:
    """Threads share root and working directory; the entering one must not take them along."""
    before = caller()
    with allocation(forge, features) as (_, bundle):
        assert run_within(bundle, "true") == ""
        with subprocess.Popen(["sleep", "infinity"]) as ordinary:
            assert os.readlink(f"/proc/{ordinary.pid}/ns/pid") == own_links()["pid"]
            ordinary.kill()
    assert caller() == before


def caller() -> tuple[object, ...]:
    return own_links(), Path.cwd(), Path("/").stat().st_ino, os.listdir("/proc/self/task")


@pytest.mark.clause("NODE-5")
def test_command_is_in_its_scope_from_the_start(
    forge: Forge, features: Features, scope: Scope, cgroup2: Path
) -> None:
    with allocation(forge, features) as (_, bundle), scope.open_procs() as procs:
        with spawn_within(
            ["cat", "/proc/self/cgroup"], bundle, scope=procs, stdout=subprocess.PIPE
        ) as child:
            shown = child.communicate()[0].decode().splitlines()
        assert f"0::/{scope.path.relative_to(cgroup2)}" in shown
        with spawn_within(["sleep", "infinity"], bundle, scope=procs) as child:
            assert scope.processes() == [child.pid]
            child.kill()


def test_scope_that_is_gone_is_an_error_and_nothing_runs(
    forge: Forge, features: Features, cgroup2: Path, allocation_id: str, tmp_path: Path
) -> None:
    gone = Scope.create(cgroup2, allocation_id, "the owner")
    mark = tmp_path / "it ran"
    with allocation(forge, features, (NET,)) as (_, bundle), gone.open_procs() as procs:
        assert gone.remove()
        with pytest.raises(SyscallError, match=r"^write\(2\): ENODEV .*: cgroup.procs$"):
            spawn_within(["touch", str(mark)], bundle, scope=procs)
    assert not mark.exists()
    remove_slices(cgroup2)


def test_frozen_scope_is_an_error_after_a_while(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scope.path / "cgroup.freeze").write_text("1")
    monkeypatch.setattr(forge_spawn, "START_TIMEOUT_S", 0.5)
    with (
        DescriptorBundle() as nothing,
        scope.open_procs() as procs,
        pytest.raises(SyscallError, match=r"^execve\(2\): ETIMEDOUT .*: true$"),
    ):
        spawn_within(["true"], nothing, scope=procs)
    assert not scope.is_populated()


GLIBC_SIGNALS = 1 << (32 - 1) | 1 << (33 - 1)
"""SIGCANCEL and SIGSETXID, as a mask."""


def test_signals_are_as_a_shell_would_give_them() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        status = output("cat", "/proc/self/status").splitlines()
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    fields = dict(line.split(":", 1) for line in status)
    blocked, ignored = int(fields["SigBlk"], 16), int(fields["SigIgn"], 16)
    assert blocked == 0
    # What starts this suite (make, say) may do so by a posix_spawn that leaves glibc's own two
    # signals ignored; only glibc can change that, and none can be sent by mistake.
    assert ignored & ~GLIBC_SIGNALS == 0


def test_command_leads_a_process_group_of_its_own() -> None:
    with (
        DescriptorBundle() as nothing,
        spawn_within(["sleep", "infinity"], nothing) as child,
    ):
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) == os.getsid(0)
        child.kill()


def test_no_descriptor_of_ours_reaches_the_command(
    forge: Forge, features: Features, scope: Scope
) -> None:
    with ExitStack() as stack:
        _, bundle = stack.enter_context(allocation(forge, features))
        procs = stack.enter_context(scope.open_procs())
        inheritable = stack.enter_context(Descriptor(os.open("/dev/null", os.O_RDONLY)))
        os.set_inheritable(inheritable.fileno(), True)
        child = stack.enter_context(
            spawn_within(
                ["sh", "-c", "echo $$; ls /proc/$$/fd"],
                bundle,
                scope=procs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        )
        _, *fds = child.communicate()[0].decode().split()
    assert fds == ["0", "1", "2"]


def test_environment_is_exactly_what_is_given() -> None:
    given = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/no/python/here", "ÄÖ": "\udcff=x\n"}
    shown = output("env", "-0", env=given).split("\0")[:-1]
    assert set(shown) == {f"{name}={value}" for name, value in given.items()}


def test_environment_is_the_callers_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_HERE", "yes")
    assert "ONLY_HERE=yes" in output("env").splitlines()
    assert "ONLY_HERE" not in output("/usr/bin/env", env={})


@pytest.mark.parametrize("variables", [{"": "x"}, {"a=b": "x"}, {"a": "x\0y"}])
def test_invalid_environment_is_refused(variables: dict[str, str]) -> None:
    with (
        DescriptorBundle() as nothing,
        pytest.raises(ValueError, match="no environment can contain"),
    ):
        spawn_within(["true"], nothing, env=variables)


def test_invalid_command_is_refused() -> None:
    with DescriptorBundle() as nothing, pytest.raises(ValueError, match="null byte"):
        spawn_within(["tr\0ue"], nothing)


def test_working_directory_is_the_root_unless_given(tmp_path: Path) -> None:
    assert output("pwd") == "/\n"
    assert output("pwd", cwd=str(tmp_path)) == f"{tmp_path}\n"


def test_arguments_that_are_no_text_arrive_unchanged() -> None:
    assert output("printf", "%s", "\udcff\n ä") == "\udcff\n ä"


def test_missing_command_is_named_and_reaped(forge: Forge, features: Features) -> None:
    with allocation(forge, features) as (_, bundle):
        with pytest.raises(FileNotFoundError) as caught:
            spawn_within(["no-such-command"], bundle)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "no-such-command")


def test_command_that_may_not_be_executed_is_named(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("no permission to execute this")
    with DescriptorBundle() as nothing, pytest.raises(PermissionError) as caught:
        spawn_within([str(program)], nothing)
    assert caught.value.filename == str(program)


def test_missing_working_directory_is_named() -> None:
    with DescriptorBundle() as nothing, pytest.raises(FileNotFoundError) as caught:
        spawn_within(["true"], nothing, cwd="/nowhere/at/all")
    assert caught.value.filename == "/nowhere/at/all"


def test_dead_init_is_reported_as_such_and_never_as_lack_of_memory(
    forge: Forge, features: Features
) -> None:
    with allocation(forge, features) as (anchor, bundle):
        end(anchor)
        with pytest.raises(InitDead) as caught:
            spawn_within(["true"], bundle)
        assert "init is dead" in str(caught.value)
        assert "memory" not in str(caught.value)


def test_descriptor_of_another_type_enters_nothing(forge: Forge, features: Features) -> None:
    with (
        allocation(forge, features, (NET,)) as (_, bundle),
        DescriptorBundle((MOUNT,), [bundle[NET].duplicate()]) as mistaken,
        pytest.raises(SyscallError, match=r"^setns\(2\): EINVAL"),
    ):
        spawn_within(["true"], mistaken)


def test_command_comes_to_the_foreground_of_its_terminal_and_goes_back() -> None:
    """Under a terminal of its own, as the leader of its session, like a shell."""
    program = """
import fcntl, os, sys, termios
from linux.forge.spawn import restore_foreground, spawn_within
from transport.descriptors import DescriptorBundle

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
show = "import os; print(os.tcgetpgrp(0) == os.getpgrp(), flush=True)"
for foreground in (True, False):
    with DescriptorBundle() as nothing:
        command = [sys.executable, "-I", "-S", "-c", show]
        with spawn_within(command, nothing, foreground=foreground) as child:
            child.wait()
    restore_foreground(0)
    print(os.tcgetpgrp(0) == os.getpgrp(), flush=True)
"""
    leader, terminal = map(Descriptor, os.openpty())
    with leader, terminal:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "PYTHONPATH": PACKAGES},
            stdin=terminal.fileno(),
            stdout=subprocess.PIPE,
            start_new_session=True,
            check=True,
            text=True,
        )
    assert done.stdout.split() == ["True", "True", "False", "True"]


def test_foreground_without_a_terminal_changes_nothing() -> None:
    assert output("true", foreground=True, stdin=subprocess.DEVNULL) == ""
    with Descriptor(os.open("/dev/null", os.O_RDONLY)) as no_terminal:
        restore_foreground(no_terminal.fileno())
