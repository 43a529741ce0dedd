"""`nshandoff serve`: run the provider.

Starts backend, endpoint and driver, logs events as JSON lines on standard error, and says when it
is ready: in a file, and to systemd.

The state directory is locked first, so that a second provider changes nothing. Then the endpoint is
opened, so that no consumer is refused, and requests wait while living allocations are adopted.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import errno
import json
import logging
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.errors import SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.lifecycle import ALLOCATION
from statemachine.provider import Limits, ProviderKernel
from statemachine.record import record
from statemachine.states import AllocationState
from transport.calls import syscall
from transport.contract import Backend
from transport.endpoint import listen
from transport.serve import Observer, Provider, Spans

from ..backend import LinuxBackend, NodeSettings
from ..cgroups import CgroupUnavailable, ScopePlace, find_cgroup2
from ..files import replace_file
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
from ..root import CHROOT, PRIVATE, has_propagation, is_chroot
from ..scope_file import write_scope_file
from ..self_service import make_directory
from ..shortage import fault_of
from ..sinks import Sink
from ..survey import READY_NAME
from ..syscalls import SyscallError, calling
from .exits import ExitCode, Failure
from .place import PlaceLost, PlaceWatch
from .ready_socket import READY_SOCKET_NAME, ReadySocket
from .signals import Signals, Stopped

if TYPE_CHECKING:
    from .trace import TraceFile

NOTIFY_VARIABLE: Final = "NOTIFY_SOCKET"
"""The environment variable with systemd's socket, sd_notify(3)."""

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
        Failure: USAGE, the scopes cannot be where the options say; ENVIRONMENT, there cannot be a
            log.
    """
    try:
        ScopePlace(options.scope_parent, options.scope_name)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, str(error)) from error
    _open_standard_streams()
    try:
        with _logging_to_stderr():
            return _serve_logged(options)
    except SyscallError as error:  # there is no log yet
        raise Failure(ExitCode.ENVIRONMENT, str(error)) from error


def _serve_logged(options: argparse.Namespace) -> ExitCode:
    try:
        with Signals() as signals, ExitStack() as stack:
            _serve(options, signals, stack)
    except _START_FAULTS as error:
        _log.error(
            "%s", _explained(error, options), extra=_as("start_failed", error=type(error).__name__)
        )
        return ExitCode.ENVIRONMENT
    except PlaceLost as error:
        _log.error("%s", error, extra=_as("place_lost"))
        return ExitCode.ENVIRONMENT
    except Exception:
        _log.exception("the provider cannot go on", extra=_as("failed"))
        return ExitCode.ENVIRONMENT
    _log_event("stopped")
    return ExitCode.OK


@record
class _StartedProvider:
    """What is made before requests are served."""

    provider: Provider
    readiness: Readiness
    ready_socket: ReadySocket
    trace: TraceFile | None
    place: PlaceWatch | None


def _serve(options: argparse.Namespace, signals: Signals, stack: ExitStack) -> None:
    """Start the provider and run it; the stack closes what was opened."""
    try:
        service = signals.wait_for(lambda: _start(options, stack))
    except Stopped as stopped:
        _log_event("stopping", signal=_name_of(stopped.number))
        if stopped.has_hung:
            _leave("what it does to start hangs and is left to the kernel")
        return
    asyncio.run(_run(service, signals))


def _start(options: argparse.Namespace, stack: ExitStack) -> _StartedProvider:
    descriptors, oom_score_adj = raise_descriptor_limit(), protect_from_oom_killer()
    _log_event(
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
    readiness.withdraw()  # that of a provider that was killed
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
    events = EventLog()
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
            extra=_as(
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
        _log_event("ready", allocations=len(provider.kernel.states))

    def stop(number: int) -> None:
        if watching is not None:
            # From here on the socket is gone because this provider removes it.
            watching.cancel()
        _log_event("stopping", signal=_name_of(number))
        readiness.withdraw()
        ready_socket.close()
        readiness.notify("STOPPING=1")
        provider.stop()

    def note(number: int) -> None:
        text = "there is nothing to read again" if number == signal.SIGHUP else ""
        _log.warning(text, extra=_as("signal_ignored", signal=_name_of(number)))

    loop = asyncio.get_running_loop()
    watching = None if place is None else loop.create_task(place.run(provider.stop))
    signals.watch(stop, note)
    with _logging_failure("ready_socket_failed"):
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
    _log.warning(why, extra=_as("stopped"))
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
        _log.warning("no such directory: %s", image_root, extra=_as("image_root_missing"))
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
        _log.warning("no image can be mounted: %s", fault, extra=_as("images_unavailable"))
    _make_directory(uenv_base)
    cgroup2 = None if options.no_scopes else find_cgroup2()
    place = ScopePlace(options.scope_parent, options.scope_name)
    settings = NodeSettings(cgroup2, image_root, uenv_base, options.hold_time, place)
    state_dir = Path(options.state_dir)
    _refuse_foreign(state_dir)
    backend = LinuxBackend.for_provider(settings, state_dir, clock=time.monotonic)
    stack.enter_context(closing(backend))
    backend.start()
    return backend


def _warn_of_root() -> None:
    # Keeps DAEMON-10.
    if is_chroot():
        _log.warning(CHROOT, extra=_as("root_is_chroot"))
    elif not has_propagation():
        _log.warning(PRIVATE, extra=_as("root_is_private"))


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
        plain = json.dumps({"pid": os.getpid(), "socket": str(path.absolute())})
        self.content: Final = f"{plain}\n"
        # Taken out of the environment of child processes.
        self._address: Final = os.environ.pop(NOTIFY_VARIABLE, "")

    def show_at(self, file: Path) -> None:
        """Have one more file, which is removed if it is there."""
        self._files.append(file)
        self.withdraw()

    def announce(self) -> None:
        """Make the files, and notify systemd; a failure is only logged."""
        # Keeps DAEMON-5, DAEMON-12.
        for file in self._files:
            with _logging_failure("ready_file_failed"):
                replace_file(file, self.content)
        self.notify("READY=1")

    def withdraw(self) -> None:
        """Remove the files that are there; a failure is only logged."""
        for file in self._files:
            with _logging_failure("ready_file_failed"), calling("unlink(2)", file):
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
                _log.warning("%s: %s", self._address, error, extra=_as("notify_failed"))


# --- Logging -----------------------------------------------------------------------------------


class EventLog:
    """
    Logs every event of a provider, with the transition of its allocation: an `Observer`.

    The name of an event in the log is that of its class in snake case. An event that moves further
    allocations (readiness, after which waiting requests are handled) is logged again for each.
    """

    kernel: ProviderKernel

    def __init__(self) -> None:
        self._states: dict[str, AllocationState] = {}
        self._delays: dict[str, str] = {}
        """The reason that was last logged for a release that is not finished."""

    def __call__(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Log one event."""
        name = _allocation_of(event)
        if self._is_repetition(event):
            return
        self._write(event, effects, name)
        for other in {_allocation_of(effect) for effect in effects} - {name, ""}:
            if self.kernel.state_of(other) is not self._states.get(other, _UNKNOWN):
                self._write(event, effects, other)

    def _is_repetition(self, event: ProviderInput) -> bool:
        """Say whether it is another try to release, with the same reason as before."""
        if isinstance(event, on.NamespacesReleased):
            self._delays.pop(event.allocation_id, None)
        if isinstance(event, on.ReleaseDelayed):
            before = self._delays.get(event.allocation_id)
            self._delays[event.allocation_id] = event.reason
            return before == event.reason
        return isinstance(event, on.RetryDue)

    def _write(self, event: ProviderInput, effects: tuple[Effect, ...], name: str) -> None:
        fields: dict[str, Any] = {"allocation_id": name} if name else {}
        if name:
            fields |= self._row(event, name)
        fields |= _details_of(event)
        fields["effects"] = [_word_for(effect) for effect in effects]
        _log_event(_snake(type(event).__name__), **fields)

    def _row(self, event: ProviderInput, name: str) -> dict[str, str]:
        before = self._states.pop(name, _UNKNOWN)
        after = self.kernel.state_of(name)
        if after not in (_UNKNOWN, AllocationState.RELEASED):
            self._states[name] = after
        if before is after and ALLOCATION.row(type(event), before) is None:
            return {}
        return {"from": before.value, "to": after.value}


_UNKNOWN: Final = AllocationState.UNKNOWN


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, event, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            **getattr(record, "fields", {}),
        }
        message = record.getMessage()
        if message:
            line["message"] = message
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _LogHandler(logging.Handler):
    """Gives lines to a sink of standard error, which is borrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._sink: Final = Sink(_STDERR, preface=self._say_lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; never waits."""
        self._sink.write(self._line_of(record))

    def close(self) -> None:
        """Write what waits, as far as that is possible in a short time."""
        self._sink.close()
        super().close()

    def _line_of(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode()

    def _say_lost(self, count: int, why: str) -> bytes:
        record = _log.makeRecord(
            *(_log.name, logging.WARNING, __file__, 0, "lines of this log were lost: %s", (why,)),
            exc_info=None,
            extra=_as("lines_lost", count=count),
        )
        return self._line_of(record)


_STDERR: Final = 2


def _open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed, lest another file gets their number."""
    for fd in range(_STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            syscall(os.open, os.devnull, os.O_RDWR)  # takes the lowest number that is free


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Log JSON lines on standard error, all that Python itself would print there included."""
    handler = _LogHandler()
    logging.getLogger().addHandler(handler)
    _log.setLevel(logging.INFO)  # of other loggers only warnings
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    sys.unraisablehook = lambda hook: _log.error(
        "%s", hook.err_msg or "unraisable", exc_info=hook.exc_value
    )
    threading.excepthook = lambda hook: _log.error("in a thread", exc_info=hook.exc_value)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__


@contextmanager
def _logging_failure(event: str) -> Iterator[None]:
    """Log an error of the body, which goes no further."""
    try:
        yield
    except OSError as error:
        _log.warning("%s", error, extra=_as(event))


def _log_event(event: str, **fields: Any) -> None:
    _log.info("", extra=_as(event, **fields))


def _as(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "fields": fields}


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _allocation_of(something: ProviderInput | Effect) -> str:
    """Name the allocation that an event or an effect concerns; empty if none."""
    for part in (something, *(getattr(something, x, None) for x in ("request", "response"))):
        name = getattr(part, "allocation_id", "")
        if name:
            return str(name)
    return ""


def _details_of(event: ProviderInput) -> dict[str, Any]:
    """Return further fields of an event."""
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    details = {name: fields[name] for name in ("connection", "uid", "reason") if fields.get(name)}
    if isinstance(event, on.ConnectionOpened):
        details["uid"] = event.uid
    if "error" in fields:
        details["error"] = str(fields["error"])
    request = fields.get("request")
    if request is not None:
        details["namespaces"] = [kind.value for kind in request.namespaces]
        details["uenv_image"] = request.uenv_image
    return details


def _word_for(effect: Effect) -> str:
    """Return the name of an effect, with its timer or error."""
    word = _snake(type(effect).__name__)
    match effect:
        case do.StartTimer(timer=timer) | do.StopTimer(timer=timer):
            return f"{word}:{timer.value}"
        case do.Refuse(error=error):
            return f"{word}:{type(error).__name__}"
        case _:
            return word
