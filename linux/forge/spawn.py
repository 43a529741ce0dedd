"""`spawn_within`: start a command in an allocation's namespaces and cgroup.

The command is our child, in all of the allocation's namespaces, in its scope before it executes
anything, and without any descriptor of ours. What else it has is either that of a new program, or
what the caller `Inherited` from the one that executed it. Three rules of the Linux kernel decide
how:

*   Only a thread that does not share its root and working directory can enter a mount namespace. So
    a thread is made for this command, which ends with it. It enters the mount namespace last.
*   The next child enters a PID namespace, not the thread itself.
*   To be in the cgroup from the start, a process has to enter it itself before its exec (`exec`).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final, TypeAlias

from statemachine.messages import NamespaceType
from statemachine.record import record
from transport.calls import syscall
from transport.descriptors import Descriptor, DescriptorBundle

from .. import syscalls
from ..namespaces import CLONE_FLAGS
from ..syscalls import SyscallError, calling
from ..threads import call_in_thread
from .exec import READY

START_TIMEOUT_S: Final = 30.0
"""How long a command may take to start; with a frozen scope it never would."""

STATUS_BYTES_MAX: Final = 8192
"""Longest report of a failed start; a path of PATH_MAX fits."""

Stream: TypeAlias = int | IO[bytes] | None
"""A standard stream, as for `subprocess.Popen`."""

Child: TypeAlias = subprocess.Popen[bytes]
"""A running command; for annotations in modules that do not import subprocess."""

_PROGRAM: Final = Path(__file__).with_name("exec.py")

# The mount namespace last, as long as possible this thread sees the node's files.
_ENTRY_ORDER: Final = (NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT)

# The call of each phase of `exec`, except the exec itself.
_PHASE_CALLS: Final[Mapping[str, str]] = {"prepare": "read(2)", "scope": "write(2)"}

_TIE: Final = "echo 0 >cgroup.procs; read -r line || echo 1 >cgroup.kill"
"""Waits in the scope for a line; without one, all in it are killed."""

_TIMERS: Final = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class InitDead(SyscallError):
    """The PID namespace's init is dead: nothing can be started in it any more."""

    def __str__(self) -> str:
        return "the PID namespace's init is dead; nothing can be started in it any more"


class HelperDied(SyscallError):
    """The helper that starts the command ended without a word. Nothing runs."""

    def __str__(self) -> str:
        return "the helper that starts the command died before it said that the command runs"


class OtherDirectory(SyscallError):
    """The working directory's path leads to another directory inside the allocation, or nowhere."""

    def __str__(self) -> str:
        if self.path is None:
            return "the working directory has been removed; start in one that is there"
        return (
            f"the working directory is {'absent' if self.errno == errno.ENOENT else 'another one'} "
            f"inside the allocation: {self.path}; its mount namespace has the provider's view of "
            "the node's files; start in one of both"
        )


@record
class Inherited:
    """
    What survives an exec, of this process, and would not survive the start of a child by itself.

    What is not here does: limits, groups, umask, priorities, session, process group, terminal.
    """

    environment: tuple[bytes, ...]
    """`NAME=VALUE` each, in their order, also names that occur twice."""
    descriptors: tuple[int, ...] = ()
    """Open ones above the standard streams, as they are to stay; borrowed until it has started."""
    ignored: frozenset[int] = frozenset()
    """Signals that are ignored."""
    blocked: frozenset[int] = frozenset()
    """Signals that are blocked."""
    pending: frozenset[int] = frozenset()
    """Blocked signals that have come."""
    timers: tuple[tuple[int, float, float], ...] = ()
    """Interval timers: which, the time that is left and the interval, in seconds."""


def spawn_within(
    command: Sequence[str],
    bundle: DescriptorBundle,
    *,
    scope: Descriptor | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    inherited: Inherited | None = None,
) -> Child:
    """
    Start a command in an allocation's namespaces and scope.

    It has default signal dispositions, a process group of its own, and no open descriptor but its
    three standard streams; or else what the caller has inherited, its process group and its working
    directory. When this returns, the command's own program runs.

    Args:
        command: What to execute; the first is looked up in the PATH of the command's environment,
            in the allocation, as execvp(3) does.
        bundle: The namespaces to be in, in any order; borrowed. All others are the caller's.
        scope: The scope's `cgroup.procs`, open for writing; borrowed. None for the caller's cgroup.
        env: The command's whole environment; None for the caller's.
        cwd: Working directory, in the allocation; None for `/`. Not with `inherited`.
        stdin: As for `subprocess.Popen`.
        stdout: Likewise.
        stderr: Likewise.
        inherited: What survives, as if the caller executed the command. Its environment counts,
            not `env`. The working directory has to be the same directory inside.

    Returns:
        The running command, our child. The caller waits for it.

    Raises:
        FileNotFoundError, PermissionError, other OSError: the command cannot be executed, or the
            working directory not be entered; `filename` is what was tried.
        InitDead: the PID namespace can take no process any more.
        OtherDirectory: the working directory is not the same directory in the allocation.
        HelperDied: it is not known why nothing runs.
        SyscallError: a namespace or the scope cannot be entered; ETIMEDOUT, the scope is frozen.
        ValueError: a NUL, or `=` in the name of a variable. In all cases nothing runs.

    Source:
        setns(2); cgroups(7); execvp(3). Protocol, "Conventions on the node".
    """
    if inherited is None:
        variables = _entries(os.environ if env is None else env)
        settings, directory, identity = Inherited(variables), os.fsencode(cwd or "/"), b""
    else:
        settings, (directory, identity) = inherited, _own_directory(bundle)
    plan = _plan(command, settings, directory, identity)
    with ExitStack() as stack:
        (answer, question), (order, source) = (map(stack.enter_context, _pipe()) for _ in range(2))
        passed = [question, order, *([scope] if scope is not None else [])]
        numbers = (question.fileno(), order.fileno(), scope.fileno() if scope is not None else -1)

        def start() -> Child:
            return syscall(
                subprocess.Popen,
                [sys.executable, "-I", "-S", "-B", str(_PROGRAM), *map(str, numbers)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={},
                pass_fds=[*settings.descriptors, *(descriptor.fileno() for descriptor in passed)],
                process_group=0 if inherited is None else None,
            )

        with calling("execve(2)"):
            child = call_in_thread(lambda: _start_within(bundle, start))
        question.close()
        order.close()
        _send(plan, source)
        _await_start(child, answer, command)
        child.args = list(command)
        return child


@contextmanager
def scope_tied(scope: Path) -> Iterator[None]:
    """
    Have everything in a scope killed if this process dies before the body ends, however it dies.

    A shell does it, which is in the scope itself: who kills the caller with all that is around it
    (a scheduler a job step, the Linux kernel a cgroup without memory) does not reach it there.

    Args:
        scope: The scope's directory.

    Raises:
        SyscallError: it cannot be started.
    """
    # Keeps RUN-7.
    reading, writing = _pipe()
    with reading, writing:
        with calling("execve(2)"):
            shell = syscall(
                subprocess.Popen,
                ["/bin/sh", "-c", _TIE],
                stdin=reading.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=scope,
                env={},
                start_new_session=True,
            )
        reading.close()
        try:
            yield
        finally:
            with suppress(BrokenPipeError):  # it was killed with the scope
                syscall(os.write, writing.fileno(), b"\n")
            shell.wait()


def own_timers() -> tuple[tuple[int, float, float], ...]:
    """Return this process' interval timers that run, for `Inherited`."""
    timers = ((int(which), *signal.getitimer(which)) for which in _TIMERS)
    return tuple(timer for timer in timers if timer[1])


def _pipe() -> tuple[Descriptor, Descriptor]:
    with calling("pipe(2)"):
        reading, writing = syscall(os.pipe)
    return Descriptor(reading), Descriptor(writing)


def _enter(bundle: DescriptorBundle) -> None:
    # From here on this thread has a root and a working directory of its own.
    syscalls.unshare(syscalls.CLONE_FS)
    for kind in _ENTRY_ORDER:
        if kind in bundle.types:
            syscalls.setns(bundle[kind], CLONE_FLAGS[kind])


def _start_within(bundle: DescriptorBundle, start: Callable[[], Child]) -> Child:
    _enter(bundle)
    try:
        return start()
    except OSError as error:
        # A PID namespace whose init has ended can be entered; only the fork fails.
        if error.errno == errno.ENOMEM and NamespaceType.PID in bundle.types:
            raise InitDead("fork(2)", errno.ENOMEM) from error
        raise


def _own_directory(bundle: DescriptorBundle) -> tuple[bytes, bytes]:
    """Return path and identity of the working directory; empty, where it stays by itself."""
    if NamespaceType.MOUNT not in bundle.types:
        return b"", b""
    try:
        path, status = syscall(os.getcwdb), syscall(os.stat, b".")
    except OSError as error:
        raise OtherDirectory("getcwd(3)", error.errno or errno.ENOENT) from error
    return path, b"%d:%d" % (status.st_dev, status.st_ino)


def _plan(command: Sequence[str], settings: Inherited, directory: bytes, identity: bytes) -> bytes:
    """Write for `exec` what to do: strings that end with a NUL."""
    words = [os.fsencode(word) for word in command]
    if any(b"\0" in word for word in words):
        raise ValueError(f"no argument of a command can contain a null byte: {list(command)}")
    timers = ",".join(":".join(map(str, timer)) for timer in settings.timers)
    signals = (settings.ignored, settings.blocked, settings.pending)
    numbers = ";".join([str(len(words)), *map(_joined, signals), timers])
    parts = [numbers.encode(), directory, identity, *words, *settings.environment]
    return b"".join(part + b"\0" for part in parts)


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(str(int(number)) for number in numbers)


def _entries(variables: Mapping[str, str]) -> tuple[bytes, ...]:
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"no environment can contain {name!r}={value!r}")
    return tuple(os.fsencode(f"{name}={value}") for name, value in variables.items())


def _send(plan: bytes, source: Descriptor) -> None:
    """Write the plan; give up when its reader is gone or does not read, which is seen later."""
    syscall(os.set_blocking, source.fileno(), False)
    poll = select.poll()
    poll.register(source, select.POLLOUT)
    remaining = memoryview(plan)
    with source:
        while remaining and poll.poll(START_TIMEOUT_S * 1000):
            try:
                remaining = remaining[syscall(os.write, source.fileno(), remaining) :]
            except BrokenPipeError:
                return


def _await_start(child: Child, answer: Descriptor, command: Sequence[str]) -> None:
    """Wait until the helper says that the command runs; if not, reap it and raise the reason."""
    # Keeps RUN-2.
    poll = select.poll()
    poll.register(answer, select.POLLIN)
    report, part = b"", b"?"
    while part and poll.poll(START_TIMEOUT_S * 1000):
        part = syscall(os.read, answer.fileno(), STATUS_BYTES_MAX)
        report += part
    if part == b"" and report == READY:
        return
    child.kill()
    with child:
        if part:
            raise SyscallError("execve(2)", errno.ETIMEDOUT, Path(command[0]))
        raise _failure(report.removeprefix(READY))


def _failure(report: bytes) -> OSError:
    phase, number, path = os.fsdecode(report or b"died\x000\x00").split("\0")
    if phase == "died":
        return HelperDied("execve(2)", errno.ECHILD)
    if phase == "identity":
        return OtherDirectory("stat(2)", int(number), Path(path))
    if phase in _PHASE_CALLS:
        return SyscallError(_PHASE_CALLS[phase], int(number), Path(path) if path else None)
    # The subclass that fits the errno, as subprocess would raise it.
    return OSError(int(number), os.strerror(int(number)), path)
