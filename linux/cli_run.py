"""`nshandoff run`: a command inside an allocation, as if it had been started here.

The command gets this one's standard streams, environment, working directory, terminal and signals;
this one gets its exit status. The allocation lives exactly as long as the command does: whatever
else is left in its cgroup is killed when the command exits.

From the moment there is a command, signals are not handled but taken: all that matter are blocked,
and one loop waits for the next of them (sigwaitinfo). So none comes at a bad moment and none is
missed, among them SIGCHLD, which says that the command exited or stopped.
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

from .cgroups import WORKLOAD_SLICE, CgroupUnavailable, Scope, find_cgroup2
from .cli_consumer import (
    END_TIMEOUT_S,
    consumer_of,
    obtain,
    own_namespaces,
    request_of,
    signals_taken,
)
from .cli_exit import SIGNAL_BASE, ExitCode, Failure, Interrupted, tell
from .features import Features
from .forge_spawn import restore_foreground, spawn_within
from .namespaces import KernelInspector, has_dead_init
from .self_service import OwnNamespaces
from .survey import states_of
from .syscalls import SyscallError

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
"""Signals that are the command's when this one gets them; but for the last, which is about it."""

SI_KERNEL: Final = 0x80
"""What sigwaitinfo(2) says of a signal that the Linux kernel sent: here, the terminal's."""

WITHDRAW_TIMEOUT_S: Final = 2.0
"""How long an interrupted command may take to withdraw its request."""

_TERMINAL: Final = 0
"""The terminal, if any, is the one on standard input."""


class Child(Protocol):
    """What is needed of a running command."""

    pid: int
    returncode: int | None
    """Set here when the command has exited; else its maker would wait for it in the end."""


def run(options: argparse.Namespace) -> int:
    """
    Run a command in an allocation that lives as long as it does.

    Returns:
        What to exit with: the command's exit status, or as a shell names what became of it.

    Raises:
        Failure: RUN_FAILED, NOT_FOUND or NOT_EXECUTABLE; no command runs, the allocation is ended.
        Interrupted: a signal came before there was a command; the allocation is ended.
    """
    try:
        return _run(options)
    except Failure as failure:
        if failure.code in (ExitCode.NOT_EXECUTABLE, ExitCode.NOT_FOUND):
            raise
        # One code for whatever is not the command's, as env(1) has it.
        raise Failure(ExitCode.RUN_FAILED, failure.text, failure.kind) from failure
    except (OSError, CgroupUnavailable) as error:
        raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error


def _run(options: argparse.Namespace) -> int:
    wanted = request_of(options)
    if not options.command:
        raise Failure(ExitCode.USAGE, "no command; it stands behind the options and a --")
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
            return _attend(child, taken, has_terminal=has_terminal)


def _obtain(
    consumer: Consumer,
    wanted: NamespaceRequest,
    own: OwnNamespaces | None,
    taken: set[signal.Signals],
) -> Handoff:
    """Obtain namespaces; when that is interrupted, see to it that there are none."""
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
) -> Child:
    with ExitStack() as stack:
        # Whose scope it is does not matter for entering it.
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
        return None  # removed under us: then the root, as everything that is nowhere


# --- While the command runs --------------------------------------------------------------------


@contextmanager
def _children_noticed() -> Iterator[None]:
    """Have SIGCHLD come, and an exit status stay: neither does where it is ignored."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _foreground() -> Iterator[bool]:
    """Say whether there is a terminal to hand on; take it back when the body is done."""
    has_terminal = os.isatty(_TERMINAL) and _owns_terminal()
    try:
        yield has_terminal
    finally:
        if has_terminal:
            with suppress(SyscallError):  # it has been hung up
                restore_foreground(_TERMINAL)


def _owns_terminal() -> bool:
    try:
        return os.tcgetpgrp(_TERMINAL) == os.getpgrp()
    except OSError:
        return False  # a terminal, but not the one of this session


def _attend(child: Child, taken: set[signal.Signals], *, has_terminal: bool) -> int:
    """Pass signals on to the command until it exits; say how it did, as a shell would."""
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            _stop_as_well(child, os.WSTOPSIG(status), has_terminal=has_terminal)
        elif pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode if child.returncode >= 0 else SIGNAL_BASE - child.returncode
        else:
            told = signal.sigwaitinfo(taken)
            if told.si_signo != signal.SIGCHLD:
                _pass_on(told, child, has_terminal=has_terminal)


def _pass_on(told: signal.struct_siginfo, child: Child, *, has_terminal: bool) -> None:
    """Pass a signal on: the terminal's to the whole job, as it would; others to the command."""
    if told.si_signo == signal.SIGCONT and has_terminal and _owns_terminal():
        # This one is in the foreground now, so that it may.
        os.tcsetpgrp(_TERMINAL, child.pid)
    is_for_all = told.si_code == SI_KERNEL or told.si_signo == signal.SIGCONT
    # Not reaped yet, so both numbers are still the command's. It may have left its group.
    with suppress(ProcessLookupError):
        (os.killpg if is_for_all else os.kill)(child.pid, told.si_signo)


def _stop_as_well(child: Child, cause: int, *, has_terminal: bool) -> None:
    """
    The command was stopped: stop, too, so that the shell takes over; `fg` comes as SIGCONT.

    Where no shell would ever continue it (an orphaned process group) the Linux kernel ignores
    Ctrl-Z. It sees a parent for the command, and so does not: that is made good here.
    """
    if has_terminal:
        with suppress(SyscallError):
            restore_foreground(_TERMINAL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})  # here it stops
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
    if signal.SIGCONT not in signal.sigpending() and cause == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGCONT)


# --- When it is over ---------------------------------------------------------------------------


def _end(handoff: Handoff, features: Features) -> None:
    """End the allocation, and say so if it does not end at once."""
    name = handoff.request.allocation_id
    is_confirmed = handoff.end(END_TIMEOUT_S)
    if handoff.is_degraded:
        return  # what the consumer cannot release it has warned of
    if not is_confirmed:
        tell(f"{name}: the provider did not confirm the end within {END_TIMEOUT_S:g} s")
    elif (left := _what_is_left(handoff, features)) is not None:
        tell(f"{name} has ended and is draining: {left}")


def _what_is_left(handoff: Handoff, features: Features) -> str | None:
    """Look for what the provider could not release by its deadline."""
    scope = _scope_of(handoff, None)
    if scope is not None and scope.is_dir():
        return f"processes in {scope}: {states_of(Scope(scope, '').processes())}"
    # Nobody proves anything about an init on Linux kernels before 6.11.
    is_provable = features.pidfd_namespaces and NamespaceType.PID in handoff.bundle.types
    if is_provable and not has_dead_init(handoff.bundle[NamespaceType.PID], features):
        return "the init of its PID namespace is being killed"
    return None
