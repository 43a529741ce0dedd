"""A command starts in the allocation, in its scope, and with nothing of ours; or not at all."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from linux.cgroups import Scope, remove_slices
from linux.features import Features
from linux.forge import spawn as forge_spawn
from linux.forge.client import Forge
from linux.forge.spawn import HelperDied, Inherited, InitDead, OtherDirectory, spawn_within
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
    scope,
)
from transport.calls import hook_syscalls
from transport.descriptors import Descriptor, DescriptorBundle

__all__ = ["features", "forge", "scope"]

pytestmark = pytest.mark.needs_root

PACKAGES = str(Path(__file__).parents[2])


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


# --- How it is said that the command runs -------------------------------------------------------


@pytest.mark.clause("RUN-2")
@pytest.mark.parametrize(
    "helper",
    [
        "raise SystemExit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import os, sys; os.close(int(sys.argv[1])); import time; time.sleep(1000)",
    ],
)
def test_helper_that_says_nothing_is_no_command_that_runs(
    helper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text(helper)
    monkeypatch.setattr(forge_spawn, "_PROGRAM", silent)
    with DescriptorBundle() as nothing, pytest.raises(HelperDied, match="died before it said"):
        spawn_within(["true"], nothing)


def test_interpreter_that_is_missing_is_not_the_commands_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with (
        DescriptorBundle() as nothing,
        pytest.raises(SyscallError, match=r"^execve\(2\): ENOENT .*: /nowhere/python$"),
    ):
        spawn_within(["/nowhere/python"], nothing)


def test_pipe_that_cannot_be_made_is_not_the_commands_fault() -> None:
    def refuse(function: Any, arguments: Any, options: Any) -> Any:
        if function is os.pipe:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return function(*arguments, **options)

    with (
        DescriptorBundle() as nothing,
        hook_syscalls(refuse),
        pytest.raises(SyscallError, match=r"^pipe\(2\): EMFILE"),
    ):
        spawn_within(["true"], nothing)


def test_large_environment_is_passed_whole() -> None:
    large = {f"V{number}": "x" * 100_000 for number in range(8)}
    assert len(output("env", "-0", env={**large, "PATH": "/usr/bin:/bin"})) > 800_000


def test_limits_that_bind_the_command_do_not_stop_its_start() -> None:
    """A limit of no bytes in a file, also of one without a name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert output("echo", "started") == "started\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.clause("RUN-5")
def test_helper_is_isolated_from_the_commands_environment(tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("raise SystemExit(1)")
    given = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": "/nowhere",
        "LD_PRELOAD": "/nowhere/lib.so",
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    for library in ("libm.so.6", "libc.so.6"):
        (tmp_path / library).write_text("no library")
    with DescriptorBundle() as nothing, spawn_within(["/bin/true"], nothing, env=given) as child:
        assert child.wait() == 127  # the dynamic linker's, of the command itself


# --- The rules of execvp(3) ---------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for folder, mode, text in (
        ("denied", 0o644, "#!/bin/sh\necho denied"),
        ("script", 0o755, "echo script $0 $1"),
        ("empty", 0o755, ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").write_text(text)
        (tmp_path / folder / "tool").chmod(mode)
    return tmp_path


def test_file_without_a_first_line_for_an_interpreter_is_run_by_sh(folders: Path) -> None:
    tool = str(folders / "script" / "tool")
    assert output(tool, "word") == f"script {tool} word\n"
    assert output(str(folders / "empty" / "tool")) == ""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{0}/nowhere:{0}/script:{0}/empty", "script {0}/script/tool word\n"),
        ("{0}/denied:{0}/script", "script {0}/script/tool word\n"),
        ("{0}/script/tool:{0}/script", "script {0}/script/tool word\n"),
    ],
)
def test_command_is_looked_for_as_execvp_does(folders: Path, path: str, says: str) -> None:
    env = {"PATH": path.format(folders)}
    assert output("tool", "word", env=env) == says.format(folders)


def test_empty_part_of_path_is_the_working_directory(folders: Path) -> None:
    for path in (":/nowhere", "/nowhere:", "/nowhere::/nowhere"):
        shown = output("tool", "x", env={"PATH": path}, cwd=str(folders / "script"))
        assert shown == "script tool x\n"


@pytest.mark.parametrize(
    ("command", "path", "number"),
    [
        ("", "{0}/script", errno.ENOENT),
        ("tool", "{0}/denied", errno.EACCES),
        ("tool", "{0}/denied:{0}/nowhere", errno.EACCES),
        ("tool", "", errno.ENOENT),
        ("tool", "{0}/nowhere", errno.ENOENT),
        ("./tool", "{0}/script", errno.ENOENT),
        ("/", "", errno.EACCES),
    ],
)
def test_command_that_is_not_found_has_the_errno_of_execvp(
    folders: Path, command: str, path: str, number: int
) -> None:
    env = {"PATH": path.format(folders)}
    with DescriptorBundle() as nothing, pytest.raises(OSError, match=os.strerror(number)) as caught:
        spawn_within([command], nothing, env=env)
    assert (caught.value.errno, caught.value.filename) == (number, command)


def test_without_a_path_the_search_is_that_of_the_c_library() -> None:
    assert "A=1" in output("env", env={"A": "1"}).splitlines()


# --- What the caller inherited ------------------------------------------------------------------


def test_inherited_environment_keeps_its_order_and_its_doubles() -> None:
    entries = (
        b"B=1",
        b"A=2",
        b"B=3",
        b"\xff=\xfe",
        b"E=",
        b"=F=5",
        b"G==",
        b"no equals sign",
        b"=",
    )
    with (
        DescriptorBundle() as nothing,
        spawn_within(
            ["cat", "/proc/self/environ"],
            nothing,
            stdout=subprocess.PIPE,
            inherited=Inherited(entries),
        ) as child,
    ):
        shown = child.communicate()[0].split(b"\0")[:-1]
    assert shown == list(entries[:-2])


@pytest.mark.clause("RUN-3")
def test_inherited_working_directory_is_the_same_one_or_nothing_starts(
    forge: Forge, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = Inherited((b"PATH=/usr/bin:/bin",))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    with allocation(forge, features, (MOUNT,)) as (_, bundle):
        with spawn_within(["pwd"], bundle, stdout=subprocess.PIPE, inherited=inherited) as child:
            assert child.communicate()[0] == f"{place}\n".encode()
        run_within(bundle, "mount", "-t", "tmpfs", "tmpfs", str(place))
        with pytest.raises(OtherDirectory, match=re.escape(str(place))):
            spawn_within(["true"], bundle, inherited=inherited)
        run_within(bundle, "umount", str(place))
        place.rmdir()
        with pytest.raises(OtherDirectory, match="has been removed"):
            spawn_within(["true"], bundle, inherited=inherited)
    with (
        DescriptorBundle() as nothing,
        spawn_within(["true"], nothing, inherited=inherited) as child,
    ):
        assert child.wait() == 0  # as exec(2): a removed directory is as good as any
