"""`nshandoff serve`: run the provider.

Starts backend, endpoint and driver, logs events as JSON lines on standard error, and says when it
is ready: in a file, and to systemd.

The state directory is locked first, so that a second provider changes nothing. Then the endpoint is
opened, so that no consumer is refused, and requests wait while living allocations are adopted.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from statemachine.effects import Effect
from statemachine.errors import SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.messages import NamespaceType
from statemachine.provider import Limits
from statemachine.record import record
from transport.calls import syscall
from transport.contract import Backend
from transport.endpoint import listen
from transport.serve import Observer, Provider, Spans

from ..backend import LinuxBackend, NodeSettings
from ..cgroups import CgroupUnavailable, ScopePlace, find_cgroup2
from ..files import OwnFile, replace_file
from ..forge.plan import ForgeError
from ..instance import InstanceBusy
from ..journal import JournalError
from ..limits import (
    descriptors_for,
    fit_to_descriptors,
    protect_from_oom_killer,
    raise_descriptor_limit,
)
from ..mounts import why_no_image
from ..pool import POOL_MAX, NamespaceTypes
from ..root import CHROOT, PRIVATE, has_propagation, is_chroot
from ..scope_file import write_scope_file
from ..self_service import make_directory
from ..shortage import fault_of
from ..survey import READY_NAME
from ..syscalls import SyscallError, calling, limit_heaps
from .event_log import EventLog
from .exits import ExitCode, Failure
from .log import (
    LogHandler,
    as_event,
    log_event,
    logging_failure,
    logging_to_stderr,
    open_standard_streams,
)
from .place import PlaceLost, PlaceWatch
from .ready_socket import READY_SOCKET_NAME, ReadySocket
from .signals import Signals, Stopped

if TYPE_CHECKING:
    from .trace import TraceFile

NOTIFY_VARIABLE: Final = "NOTIFY_SOCKET"
"""The environment variable with systemd's socket, sd_notify(3)."""

SWITCH_INTERVAL_S: Final = 0.00001
"""How long a thread that has the interpreter keeps it while another one waits. With the usual 5 ms
a peer that keeps the event loop busy delays each system call of a creation, of which there are
dozens, by so much: the loop's own calls are over before the waiting thread has woken."""

_log: Final = logging.getLogger(__name__)

_START_FAULTS: Final = (
    SocketUnavailable,
    JournalError,
    InstanceBusy,
    CgroupUnavailable,
    ForgeError,
    OSError,
)
"""Errors of the node that keep a provider from starting."""


def serve(options: argparse.Namespace) -> ExitCode:
    """
    Run this node's provider until it is told to stop.

    Returns:
        OK after a stop; ENVIRONMENT if it could not start, which has been logged.

    Raises:
        Failure: USAGE, the scopes cannot be where the options say, or no pool can be as they say;
            ENVIRONMENT, there cannot be a log.
    """
    try:
        ScopePlace(options.scope_parent, options.scope_name)
        options.pool = _pool_of(options)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, str(error)) from error
    open_standard_streams()
    # Before there are threads. They take turns at the interpreter, so that a heap for each saves no
    # waiting, and what one allocates and another frees leaves holes in each.
    limit_heaps(1)
    try:
        with logging_to_stderr() as log:
            return _serve_logged(options, log)
    except SyscallError as error:  # there is no log yet
        raise Failure(ExitCode.ENVIRONMENT, str(error)) from error


def _serve_logged(options: argparse.Namespace, log: LogHandler) -> ExitCode:
    try:
        with Signals() as signals, ExitStack() as stack:
            _serve(options, log, signals, stack)
    except _START_FAULTS as error:
        _log.error(
            "%s",
            _explained(error, options),
            extra=as_event("start_failed", error=type(error).__name__),
        )
        return ExitCode.ENVIRONMENT
    except PlaceLost as error:
        _log.error("%s", error, extra=as_event("place_lost"))
        return ExitCode.ENVIRONMENT
    except Exception:
        _log.exception("the provider cannot go on", extra=as_event("failed"))
        return ExitCode.ENVIRONMENT
    log_event("stopped")
    return ExitCode.OK


@record
class _StartedProvider:
    """What is made before requests are served."""

    provider: Provider
    readiness: Readiness
    ready_socket: ReadySocket
    trace: TraceFile | None
    place: PlaceWatch | None


def _serve(
    options: argparse.Namespace, log: LogHandler, signals: Signals, stack: ExitStack
) -> None:
    """Start the provider and run it; the stack closes what was opened."""
    try:
        service = signals.wait_for(lambda: _start(options, log, stack))
    except Stopped as stopped:
        log_event("stopping", signal=_name_of(stopped.number))
        if stopped.has_hung:
            _leave("what it does to start hangs and is left to the kernel")
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(_run(service, signals))


def _start(options: argparse.Namespace, log: LogHandler, stack: ExitStack) -> _StartedProvider:
    descriptors, oom_score_adj = raise_descriptor_limit(), protect_from_oom_killer()
    log_event(
        "starting",
        pid=os.getpid(),
        socket=options.socket,
        backend=options.backend,
        descriptors=descriptors,
        oom_score_adj=oom_score_adj,
    )
    limits = _limits(options, descriptors)
    state_dir, path = Path(options.state_dir), Path(options.socket)
    _make_directory(path.parent)
    backend = _backend(options, stack)
    readiness = Readiness(state_dir / READY_NAME, path)
    readiness.clear()  # that of a provider that was killed
    listener = listen(path, mode=options.mode, gid=options.group)
    stack.callback(listener.close)
    # Only now: while another provider listens there, they are that one's.
    readiness.show_at(Path(options.ready_file or path.with_name(READY_NAME)))
    ready_path = Path(options.ready_socket or path.with_name(READY_SOCKET_NAME))
    ready_socket = ReadySocket(ready_path, options.mode, options.group, readiness.content)
    place = None
    if isinstance(backend, LinuxBackend):
        place = PlaceWatch(backend, path, readiness.announce)
        settings = backend.settings
        stack.callback(write_scope_file(path, settings.cgroup2, settings.place).remove)
    events = EventLog(log.tell)
    observers: list[Observer] = [events]
    trace = None
    # Imported here, because what reads and writes all kinds of values takes long to make.
    if options.audit:
        from .audit import AuditFile

        observers.insert(0, stack.enter_context(AuditFile(options.audit)))
    if options.trace:
        from .trace import TraceFile

        trace = stack.enter_context(TraceFile(options.trace, limits))
        observers.insert(0, trace)
    provider = Provider(
        listener,
        backend,
        limits=limits,
        spans=Spans(
            claim_s=options.claim_timeout,
            release_s=options.release_deadline,
            empty_grace_s=options.empty_grace,
        ),
        observer=_all(observers),
    )
    events.kernel = provider.kernel
    stack.callback(readiness.withdraw)
    return _StartedProvider(provider, readiness, ready_socket, trace, place)


def _limits(options: argparse.Namespace, descriptors: int) -> Limits:
    # Keeps PEER-4.
    wanted = Limits(
        allowed_uids=frozenset({os.geteuid(), *options.allow_uid}),
        allocations_per_uid=options.max_allocations,
        connections_per_uid=options.max_connections,
    )
    limits = fit_to_descriptors(wanted, descriptors)
    if limits != wanted:
        _log.warning(
            "the hard limit of open descriptors is %d, and the limits of connections and "
            "allocations need %d: they are lowered. Raise RLIMIT_NOFILE of the service.",
            descriptors,
            descriptors_for(wanted),
            extra=as_event(
                "limits_lowered",
                connections_per_uid=limits.connections_per_uid,
                allocations_per_uid=limits.allocations_per_uid,
            ),
        )
    return limits


def _explained(error: Exception, options: argparse.Namespace) -> str:
    """Say what is wrong with the file that an error is about, if it does not say that itself."""
    default = options.socket if isinstance(error, SocketUnavailable) else None
    path = getattr(error, "path", default)
    fault = fault_of(Path(path)) if path is not None else ""
    return f"{error}; {fault}" if fault and fault not in str(error) else str(error)


def _all(observers: list[Observer]) -> Observer:
    def observe(event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        for one in observers:
            one(event, effects)

    return observe


async def _run(service: _StartedProvider, signals: Signals) -> None:
    provider, place, trace = service.provider, service.place, service.trace
    readiness, ready_socket = service.readiness, service.ready_socket

    def announce() -> None:
        readiness.announce()
        ready_socket.announce()
        log_event("ready", allocations=len(provider.kernel.states))

    def stop(number: int) -> None:
        if watching is not None:
            # From here on the socket is gone because this provider removes it.
            watching.cancel()
        log_event("stopping", signal=_name_of(number))
        readiness.withdraw()
        ready_socket.close()
        readiness.notify("STOPPING=1")
        provider.stop()

    def note(number: int) -> None:
        text = "there is nothing to read again" if number == signal.SIGHUP else ""
        _log.warning(text, extra=as_event("signal_ignored", signal=_name_of(number)))

    loop = asyncio.get_running_loop()
    watching = None if place is None else loop.create_task(place.run(provider.stop))
    signals.watch(stop, note)
    with logging_failure("ready_socket_failed"):
        await ready_socket.open()
    try:
        await provider.run(announce, on_recovered=None if trace is None else trace.recovered)
    finally:
        ready_socket.close()
    if watching is not None and not watching.done():
        watching.cancel()
    if provider.has_hung:
        # The socket is closed, and allocations stay alive. Closing the backend could wait for the
        # work that hangs (an image on a file server that is gone, for example).
        _leave("backend work hangs and is left to the kernel")
    if watching is not None and watching.done() and not watching.cancelled():
        watching.result()  # PlaceLost


def _leave(why: str) -> NoReturn:
    """End the program at once, whatever its threads do."""
    _log.warning(why, extra=as_event("stopped"))
    logging.shutdown()
    os._exit(ExitCode.OK)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _backend(options: argparse.Namespace, stack: ExitStack) -> Backend:
    image_root, uenv_base = Path(options.image_root), Path(options.uenv_base)
    if not image_root.is_dir():
        _log.warning("no such directory: %s", image_root, extra=as_event("image_root_missing"))
    if options.backend == "simulated":
        from ..simulated import SimulatedBackend, SimulatedNode

        with calling("mkdir(2)"):
            syscall(Path(options.state_dir).mkdir, mode=0o700, parents=True, exist_ok=True)
        images = (path.relative_to(image_root) for path in image_root.rglob("*") if path.is_file())
        node = SimulatedNode(frozenset(map(str, images)), uenv_base=str(uenv_base))
        stack.callback(node.close)
        simulated = SimulatedBackend(node, hold_time_s=options.hold_time, clock=time.monotonic)
        return stack.enter_context(closing(simulated))
    _warn_of_root()
    if image_root.is_dir() and (fault := why_no_image()) is not None:
        _log.warning("no image can be mounted: %s", fault, extra=as_event("images_unavailable"))
    _make_directory(uenv_base)
    cgroup2 = None if options.no_scopes else find_cgroup2()
    place = ScopePlace(options.scope_parent, options.scope_name)
    settings = NodeSettings(cgroup2, image_root, uenv_base, options.hold_time, place)
    state_dir = Path(options.state_dir)
    _refuse_foreign(state_dir)
    backend = LinuxBackend.for_provider(
        settings, state_dir, clock=time.monotonic, pool=options.pool
    )
    stack.enter_context(closing(backend))
    backend.start()
    return backend


def _pool_of(options: argparse.Namespace) -> dict[NamespaceTypes, int]:
    """Read what `--pool` says; ValueError if it cannot be had."""
    known = {kind.value.lower(): kind for kind in NamespaceType}
    pool: dict[NamespaceTypes, int] = {}
    for text in options.pool:
        types, _, count = text.rpartition("=")
        names = [name.strip().lower() for name in types.split(",")]
        if not (set(names) <= set(known) and len(set(names)) == len(names)):
            raise ValueError(f"--pool {text!r}: before the = are types, of {', '.join(known)}")
        if not (count.isdecimal() and 0 < int(count) <= POOL_MAX):
            raise ValueError(f"--pool {text!r}: after the = is a number from 1 to {POOL_MAX}")
        pool[frozenset(known[name] for name in names)] = int(count)
    if sum(pool.values()) > POOL_MAX:
        raise ValueError(f"--pool: at most {POOL_MAX} anchors are made ahead, in sum")
    if pool and (options.no_scopes or options.backend != "linux"):
        raise ValueError("--pool needs real namespaces and scopes")
    return pool


def _warn_of_root() -> None:
    # Keeps DAEMON-10.
    if is_chroot():
        _log.warning(CHROOT, extra=as_event("root_is_chroot"))
    elif not has_propagation():
        _log.warning(PRIVATE, extra=as_event("root_is_private"))


def _refuse_foreign(state_dir: Path) -> None:
    """Raise an error if another user could exchange the journal in the state directory."""
    # Keeps DAEMON-9.
    try:
        status = syscall(os.stat, state_dir)
    except OSError:
        return  # it is absent, or the journal finds out
    advice = ""
    if status.st_uid != os.geteuid():
        advice = f"it belongs to user {status.st_uid}; choose another, or change its owner"
    elif stat.S_ISDIR(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        advice = "other users may write to it; choose another, or chmod go-w"
    if advice:
        raise SyscallError("stat(2)", errno.EPERM, state_dir, advice)


def _make_directory(path: Path) -> None:
    with calling("mkdir(2)"):
        make_directory(path)


# --- Readiness ---------------------------------------------------------------------------------


class Readiness:
    """
    Shows whether requests are served: by files, and to systemd if that started this process.

    Args:
        file: Exists while requests are served, and after a crash.
        path: The socket, whose path is written into it.

    Source:
        sd_notify(3).
    """

    def __init__(self, file: Path, path: Path) -> None:
        self._files: Final = [file]
        self._made: Final[dict[Path, OwnFile]] = {}
        plain = json.dumps({"pid": os.getpid(), "socket": str(path.absolute())})
        self.content: Final = f"{plain}\n"
        # Taken out of the environment of child processes.
        self._address: Final = os.environ.pop(NOTIFY_VARIABLE, "")

    def show_at(self, file: Path) -> None:
        """Have one more file, which is removed if it is there."""
        self._files.append(file)
        self.clear()

    def announce(self) -> None:
        """Make the files, and notify systemd; a failure is only logged."""
        # Keeps DAEMON-5, DAEMON-12.
        for file in self._files:
            with logging_failure("ready_file_failed"):
                self._made[file] = OwnFile(file, replace_file(file, self.content))
        self.notify("READY=1")

    def withdraw(self) -> None:
        """Remove the files that were made; a failure is only logged."""
        for file in self._files:
            made = self._made.pop(file, None)
            if made is not None:
                with logging_failure("ready_file_failed"), calling("unlink(2)", file):
                    made.remove()

    def clear(self) -> None:
        """Remove what a provider has left that was killed; a failure is only logged."""
        for file in self._files:
            with logging_failure("ready_file_failed"), calling("unlink(2)", file):
                syscall(file.unlink, missing_ok=True)

    def notify(self, state: str) -> None:
        """Notify systemd, if it started this process; a failure is only logged."""
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = f"\0{address[1:]}"  # abstract, in the notation of systemd
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(state.encode(), address)
            except OSError as error:
                _log.warning("%s: %s", self._address, error, extra=as_event("notify_failed"))
