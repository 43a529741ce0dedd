"""`spawn_within`: start a command in an allocation's namespaces and cgroup.

The command is our child, in all of the allocation's namespaces, in its scope before it executes
anything, and without any descriptor of ours. Three rules of the Linux kernel decide how:

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
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, TypeAlias

from statemachine.messages import NamespaceType
from transport.calls import syscall
from transport.descriptors import Descriptor, DescriptorBundle

from .. import syscalls
from ..namespaces import CLONE_FLAGS
from ..syscalls import SyscallError, calling

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
_PHASE_CALLS: Final[Mapping[str, str]] = {
    "prepare": "pread(2)",
    "scope": "write(2)",
    "foreground": "tcsetpgrp(3)",
}


class InitDead(SyscallError):
    """The PID namespace's init is dead: nothing can be started in it any more."""

    def __str__(self) -> str:
        return "the PID namespace's init is dead; nothing can be started in it any more"


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
    foreground: bool = False,
) -> Child:
    """
    Start a command in an allocation's namespaces and scope.

    It has default signal dispositions, a process group of its own, and no open descriptor but its
    three standard streams. When this returns, the command's own program runs.

    Args:
        command: What to execute; the first is looked up in the PATH of `env`, in the allocation.
        bundle: The namespaces to be in, in any order; borrowed. All others are the caller's.
        scope: The scope's `cgroup.procs`, open for writing; borrowed. None for the caller's cgroup.
        env: The command's whole environment; None for the caller's.
        cwd: Working directory, in the allocation; None for `/`.
        stdin: As for `subprocess.Popen`.
        stdout: Likewise.
        stderr: Likewise.
        foreground: Whether to bring the command to the foreground of the terminal that is its
            standard input; no effect if that is no terminal. `restore_foreground` undoes it.

    Returns:
        The running command, our child. The caller waits for it.

    Raises:
        FileNotFoundError, PermissionError, other OSError: the command cannot be executed, or the
            working directory not be entered; `filename` is what was tried.
        InitDead: the PID namespace can take no process any more.
        SyscallError: a namespace or the scope cannot be entered; ETIMEDOUT, the scope is frozen.
        ValueError: a NUL, or `=` in the name of a variable. In all cases nothing runs.

    Source:
        setns(2); cgroups(7). Protocol, "Conventions on the node".
    """
    with ExitStack() as stack:
        variables = stack.enter_context(_environment_file(os.environ if env is None else env))
        answer, question = (stack.enter_context(Descriptor(fd)) for fd in syscall(os.pipe))
        passed = [question, variables, *([scope] if scope is not None else [])]

        def start() -> Child:
            tty = 0 if foreground and _is_terminal(stdin) else -1
            numbers = (question.fileno(), variables.fileno(), scope.fileno() if scope else -1, tty)
            return syscall(
                subprocess.Popen,
                [sys.executable, "-I", "-S", str(_PROGRAM), *map(str, numbers), *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd or "/",
                pass_fds=[descriptor.fileno() for descriptor in passed],
                process_group=0,
            )

        child = _in_thread_within(bundle, start)
        question.close()
        _await_start(child, answer, command)
        child.args = list(command)
        return child


def restore_foreground(tty: int) -> None:
    """
    Bring the caller's process group back to the foreground, after a command had it.

    Args:
        tty: The terminal; borrowed. No effect if it is none, or not the caller's.

    Raises:
        SyscallError: it failed; nothing has changed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        syscall(os.tcsetpgrp, tty, os.getpgrp())
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise SyscallError.of("tcsetpgrp(3)", error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_thread_within(bundle: DescriptorBundle, start: Callable[[], Child]) -> Child:
    """Call `start` in a thread that is in the bundle's namespaces; the thread ends with it."""
    results: list[Child] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _enter(bundle)
            results.append(_start_or_say_dead(start, bundle))
        except BaseException as error:  # raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="spawn within an allocation")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(bundle: DescriptorBundle) -> None:
    # From here on this thread has a root and a working directory of its own.
    syscalls.unshare(syscalls.CLONE_FS)
    for kind in _ENTRY_ORDER:
        if kind in bundle.types:
            syscalls.setns(bundle[kind], CLONE_FLAGS[kind])


def _start_or_say_dead(start: Callable[[], Child], bundle: DescriptorBundle) -> Child:
    try:
        return start()
    except OSError as error:
        # A PID namespace whose init has ended can be entered; only the fork fails.
        if error.errno == errno.ENOMEM and NamespaceType.PID in bundle.types:
            raise InitDead("fork(2)", errno.ENOMEM) from error
        raise


def _await_start(child: Child, answer: Descriptor, command: Sequence[str]) -> None:
    """Wait until the command runs; if it never will, reap the child and raise the reason."""
    poll = select.poll()
    poll.register(answer, select.POLLIN)
    if not poll.poll(START_TIMEOUT_S * 1000):
        child.kill()
        with child:
            raise SyscallError("execve(2)", errno.ETIMEDOUT, command[0])
    report = syscall(os.read, answer.fileno(), STATUS_BYTES_MAX)
    if report:
        with child:
            raise _failure(report)


def _failure(report: bytes) -> OSError:
    phase, number, path = os.fsdecode(report).split("\0")
    if phase in _PHASE_CALLS:
        return SyscallError(_PHASE_CALLS[phase], int(number), path or None)
    # The subclass that fits the errno, as subprocess would raise it.
    return OSError(int(number), os.strerror(int(number)), path)


def _environment_file(variables: Mapping[str, str]) -> Descriptor:
    """Write an environment for `exec` into a file without a name."""
    content = bytearray()
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"no environment can contain {name!r}={value!r}")
        content += os.fsencode(f"{name}={value}") + b"\0"
    with ExitStack() as undo, calling("memfd_create(2)"):
        file = undo.enter_context(
            Descriptor(syscall(os.memfd_create, "environment", os.MFD_CLOEXEC))
        )
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[syscall(os.write, file.fileno(), remaining) :]
        undo.pop_all()
    return file


def _is_terminal(stream: Stream) -> bool:
    if stream is None:
        return os.isatty(0)
    fd = stream if isinstance(stream, int) else stream.fileno()
    return fd >= 0 and os.isatty(fd)
