"""`nshandoff run` and `exec`: run a command inside an allocation, a new one or a living one.

The command is started as env(1) would start it: all that survives exec(2) survives, as chapter 9
lists. `nshandoff` stays its parent, in the same process group, passes signals on to it and ends as
it does. The allocation that `run` made lives as long as the command: what else is left in its
cgroup is killed when the command exits. What was there before is only entered, and not ended.

Once the command runs, signals have no handlers. All are blocked, and one loop waits for the next of
them (sigwaitinfo). So none is missed and none interrupts anything else, also SIGCHLD, which says
that the command exited or stopped.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from statemachine.errors import NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.states import AllocationState
from transport.descriptors import Descriptor
from transport.request import Consumer, Handoff

from ..cgroups import CgroupUnavailable, Scope, ScopeError
from ..consumer import find_scope
from ..features import Features
from ..forge.spawn import Inherited, own_timers, scope_tied, spawn_within
from ..launch import Launch, launch
from ..namespaces import KernelInspector, has_dead_init
from ..self_service import OwnNamespaces
from ..syscalls import SyscallError
from .consumer import (
    END_TIMEOUT_S,
    consumer_of,
    id_of,
    obtain,
    own_namespaces,
    request_of,
    signals_taken,
)
from .exits import SIGNAL_BASE, ExitCode, Failure, Interrupted, flush, print_error

if TYPE_CHECKING:
    from ..journal import Entry

ALL_SIGNALS: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
"""What is passed on to the command: all that can be."""

OF_TERMINAL: Final = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGCONT,
        signal.SIGWINCH,
    }
)
"""Signals that a terminal sends to a process group, so that the command has them already."""

OF_HANGUP: Final = frozenset({signal.SIGHUP, signal.SIGCONT})
"""Those that it sends to the leader of the session alone."""

SI_KERNEL: Final = 0x80
"""`si_code` of a signal that the Linux kernel sent."""

WITHDRAW_TIMEOUT_S: Final = 2.0
"""How long an interrupted command may take to withdraw its request."""


class RunningCommand(Protocol):
    """The running command, a `subprocess.Popen`."""

    pid: int
    returncode: int | None
    """Set here when the command has exited, so that `Popen` does not wait for it."""


def run(options: argparse.Namespace) -> int:
    """
    Run a command in an allocation that lives as long as it does.

    Returns:
        The exit code of the command. If a signal ended it, this process ends by that signal too.

    Raises:
        Failure: RUN_FAILED, NOT_FOUND or NOT_EXECUTABLE; no command runs, the allocation is ended.
            USAGE; nothing was done.
    """
    return _as_launcher(_run, options)


def enter(options: argparse.Namespace) -> int:
    """
    Run a command in a living allocation, which is neither made nor ended by it (`exec`).

    Returns:
        As for `run`.

    Raises:
        Failure: as for `run`; RUN_FAILED also if the allocation is not alive.
    """
    return _as_launcher(_enter, options)


def _as_launcher(verb: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Have one exit code for everything that is not the command's, as env(1) has."""
    try:
        if not options.command:
            raise Failure(ExitCode.USAGE, "no command; it comes after the options and --")
        code = verb(options)
    except Interrupted as interruption:
        code = -interruption.number
    except Failure as failure:
        if failure.code in (ExitCode.NOT_EXECUTABLE, ExitCode.NOT_FOUND, ExitCode.USAGE):
            raise
        raise Failure(ExitCode.RUN_FAILED, failure.text, failure.kind) from failure
    except (OSError, CgroupUnavailable) as error:
        raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error
    return code if code >= 0 else _die_of(-code)


def _run(options: argparse.Namespace) -> int:
    wanted = request_of(options)
    features = Features.probe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _all_signals_taken() as taken, ExitStack() as stack:
        is_alone = options.fallback == "always"
        was_alive = not is_alone and _is_alive(options.socket, wanted.allocation_id)
        own = None
        if options.fallback != "never":
            own = stack.enter_context(closing(own_namespaces(options, features)))
        consumer = consumer_of(options, KernelInspector(features), own, joins=was_alive)
        handoff = stack.enter_context(
            _obtain(consumer, wanted, own, taken - blocked, withdraws=not was_alive)
        )
        try:
            scope = _scope_of(handoff, own, options.socket)
            # Keeps RUN-6.
            is_own = handoff.is_own or (not was_alive and stack.enter_context(_claimed(scope)))
        except BaseException:
            if not was_alive:
                _end(handoff, features, None)
            raise
        if is_own:
            # Untied after the end: before, an empty scope would end the allocation a second time.
            ties = stack.enter_context(ExitStack())
            stack.callback(_end, handoff, features, scope)
            if options.tie and scope is not None:
                ties.enter_context(scope_tied(scope))
        return _execute(options.command, handoff, scope, blocked, taken)


def _enter(options: argparse.Namespace) -> int:
    entry = _living(options)
    features = Features.probe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _all_signals_taken() as taken:
        consumer = consumer_of(options, KernelInspector(features), joins=True)
        with obtain(consumer, entry.request, None, taken - blocked) as handoff:
            # Otherwise it has ended meanwhile, and this is a new one, which is not used.
            if _living(options).incarnation != entry.incarnation:
                raise Failure(ExitCode.RUN_FAILED, f"{entry.allocation_id} has ended just now")
            scope = _scope_noted(entry, options.socket)
            return _execute(options.command, handoff, scope, blocked, taken)


_LIVING: Final = (AllocationState.CREATED, AllocationState.HANDED_OFF)


def _living(options: argparse.Namespace) -> Entry:
    """Return what the provider has noted of the allocation; it only knows its request."""
    # Not with this module: `run` reads no journal, and should start quickly.
    from ..journal import JournalError, read_journal

    name, directory = id_of(options), Path(options.state_dir)
    try:
        noted = read_journal(directory)
    except JournalError as error:
        raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error
    for entry in noted.entries:
        # Whether it was handed over is noted on its scope, which may not be seen from here.
        if entry.allocation_id == name and entry.state in _LIVING:
            return entry
    raise Failure(ExitCode.RUN_FAILED, f"there is no living allocation {name} in {directory}")


def _scope_noted(entry: Entry, socket: str) -> Path | None:
    """Find the scope where the journal says; in another view of cgroup v2, where the provider says.

    It can have been made where earlier settings put it.
    """
    noted = None if entry.scope_path is None else Path(entry.scope_path)
    if noted is None or Scope(noted, "").owner() == entry.incarnation:
        return noted
    return _find_scope(socket, entry.allocation_id)


def _is_alive(socket: str, name: str) -> bool:
    """Say whether a provider has an allocation of this id, by the owner of its scope."""
    try:
        return find_scope(socket, name) is not None
    except ScopeError as error:
        if error.errno != errno.ENODATA:
            raise
    except (CgroupUnavailable, ValueError):
        pass  # told by `_scope_of`, unless the namespaces are made here
    return False


@contextmanager
def _claimed(scope: Path | None) -> Iterator[bool]:
    """Say whether this is the first of several `run` that made one allocation at the same time."""
    # Keeps PEER-18.
    with ExitStack() as stack:
        is_first = True
        try:
            if scope is not None:
                # Of all that is in a scope, only this cannot be opened by other users.
                kill = stack.enter_context(Descriptor(os.open(scope / "cgroup.kill", os.O_WRONLY)))
                fcntl.flock(kill, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass  # it has ended
        except BlockingIOError:
            is_first = False
        yield is_first


def _execute(
    command: Sequence[str],
    handoff: Handoff,
    scope: Path | None,
    blocked: Set[int],
    taken: Set[signal.Signals],
) -> int:
    """Start the command and wait for it; return its exit code, -N for signal N."""
    had = launch()
    with _terminal_kept():
        child = _start(command, handoff, scope, _inherited(had, blocked))
        _leave_to_command(had)
        return _wait_for(child, scope, taken)


def _obtain(
    consumer: Consumer,
    wanted: NamespaceRequest,
    own: OwnNamespaces | None,
    taken: set[signal.Signals],
    *,
    withdraws: bool,
) -> Handoff:
    """Obtain namespaces; if that is interrupted, withdraw the request for a new allocation."""
    try:
        return obtain(consumer, wanted, own, taken)
    except Interrupted:
        if withdraws and (own is None or not own.is_begun):
            with suppress(NamespaceError):
                consumer.end(wanted.allocation_id, WITHDRAW_TIMEOUT_S)
        raise


def _scope_of(handoff: Handoff, own: OwnNamespaces | None, socket: str) -> Path | None:
    name = handoff.request.allocation_id
    if handoff.is_own:
        assert own is not None
        return own.scope_of(name)
    scope = _find_scope(socket, name)
    if scope is None:
        print_error(f"{name}: the provider makes no cgroups: what the command leaves running stays")
    return scope


def _find_scope(socket: str, name: str) -> Path | None:
    try:
        return find_scope(socket, name)
    except ValueError as error:
        raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error


def _start(
    command: Sequence[str], handoff: Handoff, scope: Path | None, inherited: Inherited
) -> RunningCommand:
    with ExitStack() as stack:
        # A scope is entered without its owner's token.
        procs = None if scope is None else stack.enter_context(Scope(scope, "").open_procs())
        try:
            return spawn_within(command, handoff.bundle, scope=procs, inherited=inherited)
        except (SyscallError, ValueError) as error:
            raise Failure(ExitCode.RUN_FAILED, str(error), type(error).__name__) from error
        except OSError as error:
            is_absent = isinstance(error, FileNotFoundError)
            code = ExitCode.NOT_FOUND if is_absent else ExitCode.NOT_EXECUTABLE
            raise Failure(code, f"{command[0] or repr('')}: {error.strerror}") from error


# --- What the command inherits ------------------------------------------------------------------


def _inherited(had: Launch, blocked: Set[int]) -> Inherited:
    """Collect what survives an exec and that a child does not have by itself."""
    # Keeps RUN-1.
    pending = signal.sigpending() & blocked
    for number in pending:
        signal.sigwait({number})  # it is the command's now
    return Inherited(
        environment=had.environment,
        descriptors=had.descriptors,
        ignored=frozenset(n for n in ALL_SIGNALS if had.ignored >> (n - 1) & 1),
        blocked=frozenset(blocked),
        pending=frozenset(pending),
        timers=own_timers(),
    )


def _leave_to_command(had: Launch) -> None:
    """
    Let go of what is the command's alone now: timers, and all open files but standard error.

    Otherwise the other end of a pipe would not notice that the command closes it. A regular file
    stays open, because record locks on it belong to this process (fcntl(2)).
    """
    for which, _, _ in own_timers():
        signal.setitimer(which, 0)
    for number in (*had.streams, *had.descriptors):
        with suppress(OSError):  # a library has closed it
            if not stat.S_ISREG(os.fstat(number).st_mode):
                Descriptor(number).close()
                if number in had.streams:
                    os.open(os.devnull, os.O_RDWR)  # gets the number that has become free


# --- While the command runs --------------------------------------------------------------------


@contextmanager
def _all_signals_taken() -> Iterator[set[signal.Signals]]:
    """Block all signals; reset SIGCHLD, because exit statuses are lost if that is ignored."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with signals_taken(ALL_SIGNALS, ignored_too=True) as taken:
            yield taken
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """
    After the body, take the terminal over from a process group that is gone.

    A shell that was the command gives it back to the process group it was started in, but cannot
    name that in a PID namespace of its own.
    """
    try:
        terminal = Descriptor(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        yield  # there is none
        return
    with terminal:
        yield
        with suppress(OSError):  # it was taken away
            try:
                os.killpg(os.tcgetpgrp(terminal.fileno()), 0)
            except ProcessLookupError:
                os.tcsetpgrp(terminal.fileno(), os.getpgrp())


def _wait_for(child: RunningCommand, scope: Path | None, taken: Set[signal.Signals]) -> int:
    """Pass signals on to the command until it exits; return its exit code, -N for signal N."""
    # Keeps RUN-4.
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            _stop_too(child, signal.Signals(os.WSTOPSIG(status)))
        elif pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode
        else:
            received = signal.sigwaitinfo(taken)
            if _is_for_command(received) and not _is_from_within(received.si_pid, child, scope):
                # It is not reaped, so the pid is still its own.
                os.kill(child.pid, received.si_signo)


def _is_for_command(received: signal.struct_siginfo) -> bool:
    """Say whether the command lacks this signal: it has what a terminal sends to its group."""
    if received.si_signo == signal.SIGCHLD and received.si_code > 0:
        return False
    if received.si_code != SI_KERNEL or received.si_signo not in OF_TERMINAL:
        return True
    return received.si_signo in OF_HANGUP and os.getsid(0) == os.getpid()


def _is_from_within(pid: int, child: RunningCommand, scope: Path | None) -> bool:
    """
    Say whether the command sent it, to its group (kill 0) and not to its parent.

    A sender in another PID namespace is given by its number there. If a program here has the same
    number, it is taken for the sender: a signal may come twice, but none is lost.
    """
    if not pid:
        return False  # the Linux kernel, or a sender in a PID namespace above
    members = {child.pid} if scope is None else {child.pid, *Scope(scope, "").processes()}
    if pid in (os.getpid(), *members):
        return True
    return pid in map(_inner_pid, members) and not _read(f"/proc/{pid}/cmdline")


def _inner_pid(pid: int) -> int:
    """Return a process' number in its own PID namespace; 0 if it is gone."""
    lines = _read(f"/proc/{pid}/status").splitlines()
    return next((int(x.split()[-1]) for x in lines if x.startswith(b"NSpid:")), 0)


def _read(path: str) -> bytes:
    """Read a file of a process; nothing, if that is gone or a thread of the Linux kernel."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _stop_too(child: RunningCommand, cause: signal.Signals) -> None:
    """Stop as the command did, so that a shell takes over; what continues both is SIGCONT."""
    if os.waitpid(child.pid, os.WNOHANG | os.WCONTINUED)[0]:
        return  # continued already
    if signal.getsignal(cause) is signal.SIG_IGN:
        cause = signal.SIGSTOP
    os.kill(os.getpid(), cause)  # SIGSTOP stops here, what is blocked in the next line
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {cause})
    signal.pthread_sigmask(signal.SIG_BLOCK, {cause})


# --- At the end --------------------------------------------------------------------------------


def _die_of(number: int) -> int:
    """End by a signal, so that who waits for this process sees what became of the command."""
    flush(sys.stderr)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    return SIGNAL_BASE + number  # the init of a PID namespace lives on


def _end(handoff: Handoff, features: Features, scope: Path | None) -> None:
    """End the allocation, and print a line if that takes longer."""
    name = handoff.request.allocation_id
    is_confirmed = handoff.end(END_TIMEOUT_S)
    if handoff.is_own:
        return  # the consumer warns of what it cannot release
    if not is_confirmed:
        print_error(f"{name}: the provider did not confirm the end within {END_TIMEOUT_S:g} s")
    elif (left := _what_is_left(handoff, features, scope)) is not None:
        print_error(f"{name} has ended and is draining: {left}")


def _what_is_left(handoff: Handoff, features: Features, scope: Path | None) -> str | None:
    """Look for what the provider could not release by its deadline."""
    # One that was there before is given back: it has no owner then.
    if scope is not None and Scope(scope, "").owner() is not None:
        from ..survey import states_of

        return f"processes in {scope}: {states_of(Scope(scope, '').processes())}"
    # On Linux kernels before 6.11 it cannot be found out whether an init is dead.
    is_provable = features.pidfd_namespaces and NamespaceType.PID in handoff.bundle.types
    if is_provable and not has_dead_init(handoff.bundle[NamespaceType.PID], features):
        return "the init of its PID namespace is being killed"
    return None
