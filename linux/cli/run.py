"""`nshandoff run`: run a command inside an allocation.

The command gets the standard streams, environment, working directory, terminal and signals of
`nshandoff`, which returns the command's exit code. The allocation lives as long as the command:
what else is left in its cgroup is killed when the command exits.

Once the command runs, signals have no handlers. All that matter are blocked, and one loop waits for
the next of them (sigwaitinfo). So none is missed and none interrupts anything else, also SIGCHLD,
which says that the command exited or stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from statemachine.errors import NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceType
from transport.request import Consumer, Handoff

from ..cgroups import WORKLOAD_SLICE, CgroupUnavailable, Scope, find_cgroup2
from ..features import Features
from ..forge.spawn import restore_foreground, spawn_within
from ..namespaces import KernelInspector, has_dead_init
from ..self_service import OwnNamespaces
from ..survey import states_of
from ..syscalls import SyscallError
from .consumer import (
    END_TIMEOUT_S,
    consumer_of,
    obtain,
    own_namespaces,
    request_of,
    signals_taken,
)
from .exits import SIGNAL_BASE, ExitCode, Failure, Interrupted, print_error

PASSED_ON: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
    signal.SIGCONT,
    signal.SIGTSTP,
    signal.SIGCHLD,
)
"""Signals that are passed on to the command, except SIGCHLD, which is about the command."""

SI_KERNEL: Final = 0x80
"""`si_code` of a signal that the Linux kernel sent: here, that of a terminal."""

WITHDRAW_TIMEOUT_S: Final = 2.0
"""How long an interrupted command may take to withdraw its request."""

_TERMINAL: Final = 0
"""The terminal is that on standard input, if there is one."""


class RunningCommand(Protocol):
    """The running command, a `subprocess.Popen`."""

    pid: int
    returncode: int | None
    """Set here when the command has exited, so that `Popen` does not wait for it."""


def run(options: argparse.Namespace) -> int:
    """
    Run a command in an allocation that lives as long as it does.

    Returns:
        The exit code: the command's, or 128 plus the signal that ended it.

    Raises:
        Failure: RUN_FAILED, NOT_FOUND or NOT_EXECUTABLE; no command runs, the allocation is ended.
        Interrupted: a signal came before there was a command; the allocation is ended.
    """
    try:
        return _run(options)
    except Failure as failure:
        if failure.code in (ExitCode.NOT_EXECUTABLE, ExitCode.NOT_FOUND):
            raise
        # One exit code for everything that is not the command's, as in env(1).
        raise Failure(ExitCode.RUN_FAILED, failure.text, failure.kind) from failure
    except (OSError, CgroupUnavailable) as error:
        raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error


def _run(options: argparse.Namespace) -> int:
    wanted = request_of(options)
    if not options.command:
        raise Failure(ExitCode.USAGE, "no command; it comes after the options and --")
    features = Features.probe()
    with _children_noticed(), signals_taken(PASSED_ON) as taken, ExitStack() as stack:
        own = None
        if options.fallback != "never":
            own = stack.enter_context(closing(own_namespaces(options, features)))
        consumer = consumer_of(options, KernelInspector(features), own)
        handoff = stack.enter_context(_obtain(consumer, wanted, own, taken))
        stack.callback(_end, handoff, features)
        scope = _scope_of(handoff, own)
        with _foreground() as has_terminal:
            child = _start(options.command, handoff, scope, has_terminal=has_terminal)
            return _wait_for(child, taken, has_terminal=has_terminal)


def _obtain(
    consumer: Consumer,
    wanted: NamespaceRequest,
    own: OwnNamespaces | None,
    taken: set[signal.Signals],
) -> Handoff:
    """Obtain namespaces; if that is interrupted, withdraw the request."""
    try:
        return obtain(consumer, wanted, own, taken)
    except Interrupted:
        if own is None or not own.is_begun:
            with suppress(NamespaceError):
                consumer.end(wanted.allocation_id, WITHDRAW_TIMEOUT_S)
        raise


def _scope_of(handoff: Handoff, own: OwnNamespaces | None) -> Path | None:
    name = handoff.request.allocation_id
    if handoff.is_degraded:
        assert own is not None
        return own.scope_of(name)
    return find_cgroup2() / WORKLOAD_SLICE / f"{name}.scope"


def _start(
    command: Sequence[str], handoff: Handoff, scope: Path | None, *, has_terminal: bool
) -> RunningCommand:
    with ExitStack() as stack:
        # A scope is entered without its owner's token.
        procs = None if scope is None else stack.enter_context(Scope(scope, "").open_procs())
        try:
            return spawn_within(
                command, handoff.bundle, scope=procs, cwd=_directory(), foreground=has_terminal
            )
        except (SyscallError, ValueError) as error:
            raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error
        except OSError as error:
            if error.filename != command[0]:
                raise
            is_absent = isinstance(error, FileNotFoundError)
            code = ExitCode.NOT_FOUND if is_absent else ExitCode.NOT_EXECUTABLE
            raise Failure(code, f"{command[0]}: {error.strerror}") from error


def _directory() -> str | None:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return None  # it was removed; then the root


# --- While the command runs --------------------------------------------------------------------


@contextmanager
def _children_noticed() -> Iterator[None]:
    """Reset SIGCHLD: if it is ignored, it does not come and exit statuses are lost."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _foreground() -> Iterator[bool]:
    """Say whether there is a terminal to pass on; take it back after the body."""
    has_terminal = os.isatty(_TERMINAL) and _owns_terminal()
    try:
        yield has_terminal
    finally:
        if has_terminal:
            with suppress(SyscallError):  # the terminal was closed
                restore_foreground(_TERMINAL)


def _owns_terminal() -> bool:
    try:
        return os.tcgetpgrp(_TERMINAL) == os.getpgrp()
    except OSError:
        return False  # not the terminal of this session


def _wait_for(child: RunningCommand, taken: set[signal.Signals], *, has_terminal: bool) -> int:
    """Pass signals on to the command until it exits; return its exit code."""
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            _stop_too(child, os.WSTOPSIG(status), has_terminal=has_terminal)
        elif pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode if child.returncode >= 0 else SIGNAL_BASE - child.returncode
        else:
            received = signal.sigwaitinfo(taken)
            if received.si_signo != signal.SIGCHLD:
                _pass_on(received, child, has_terminal=has_terminal)


def _pass_on(received: signal.struct_siginfo, child: RunningCommand, *, has_terminal: bool) -> None:
    """Pass a signal on: one of the terminal to the process group, others to the command."""
    if received.si_signo == signal.SIGCONT and has_terminal and _owns_terminal():
        # Allowed, because this process is in the foreground now.
        os.tcsetpgrp(_TERMINAL, child.pid)
    is_for_all = received.si_code == SI_KERNEL or received.si_signo == signal.SIGCONT
    # It is not reaped, so pid and process group are still its own. It may have left its group.
    with suppress(ProcessLookupError):
        (os.killpg if is_for_all else os.kill)(child.pid, received.si_signo)


def _stop_too(child: RunningCommand, cause: int, *, has_terminal: bool) -> None:
    """
    Stop when the command was stopped, so that the shell takes over; `fg` sends SIGCONT.

    In an orphaned process group, which no shell would continue, the Linux kernel ignores Ctrl-Z.
    The command's group is never orphaned, because this process is its parent; so it is continued
    here.
    """
    if has_terminal:
        with suppress(SyscallError):
            restore_foreground(_TERMINAL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})  # here it stops
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
    if signal.SIGCONT not in signal.sigpending() and cause == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGCONT)


# --- At the end --------------------------------------------------------------------------------


def _end(handoff: Handoff, features: Features) -> None:
    """End the allocation, and print a line if that takes longer."""
    name = handoff.request.allocation_id
    is_confirmed = handoff.end(END_TIMEOUT_S)
    if handoff.is_degraded:
        return  # the consumer warns of what it cannot release
    if not is_confirmed:
        print_error(f"{name}: the provider did not confirm the end within {END_TIMEOUT_S:g} s")
    elif (left := _what_is_left(handoff, features)) is not None:
        print_error(f"{name} has ended and is draining: {left}")


def _what_is_left(handoff: Handoff, features: Features) -> str | None:
    """Look for what the provider could not release by its deadline."""
    scope = _scope_of(handoff, None)
    # One that was there before is given back: it has no owner then.
    if scope is not None and Scope(scope, "").owner() is not None:
        return f"processes in {scope}: {states_of(Scope(scope, '').processes())}"
    # On Linux kernels before 6.11 it cannot be found out whether an init is dead.
    is_provable = features.pidfd_namespaces and NamespaceType.PID in handoff.bundle.types
    if is_provable and not has_dead_init(handoff.bundle[NamespaceType.PID], features):
        return "the init of its PID namespace is being killed"
    return None
