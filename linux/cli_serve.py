"""`nshandoff serve`: the provider as a program.

Puts backend, endpoint and driver together, tells what happens as JSON lines on standard error, and
says when it is ready: in a file, and to systemd.

The state directory is locked first, so that of two providers the second changes nothing. Then the
endpoint is opened, so that nobody is refused; then what is alive is adopted, while requests wait.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import logging
import os
import re
import signal
import socket
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.errors import SocketUnavailable
from statemachine.events import Event
from statemachine.lifecycle import PROVIDER, AllocationState
from statemachine.provider import Limits, ProviderKernel
from transport.contract import Backend
from transport.endpoint import listen
from transport.serve import Observer, Provider, Spans

from .backend import LinuxBackend, NodeSettings
from .cgroups import CgroupUnavailable, find_cgroup2
from .cli_exit import ExitCode
from .cli_trace import TraceFile
from .forge_plan import ForgeError
from .journal import JournalError
from .self_service import make_directory
from .simulated import SimulatedBackend, SimulatedNode
from .survey import READY_NAME

NOTIFY_VARIABLE: Final = "NOTIFY_SOCKET"
"""Where systemd waits for word, if it does."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_log: Final = logging.getLogger(__name__)

_START_FAULTS: Final = (SocketUnavailable, JournalError, CgroupUnavailable, ForgeError, OSError)
"""What can keep a provider from starting and is no mistake of ours."""


def serve(options: argparse.Namespace) -> ExitCode:
    """
    Be this node's provider until told to stop.

    Returns:
        OK after a stop; ENVIRONMENT if it could not start, which has been said.
    """
    _log_json_lines()
    _tell("starting", pid=os.getpid(), socket=options.socket, backend=options.backend)
    try:
        with ExitStack() as stack:
            _serve(options, stack)
    except _START_FAULTS as error:
        _log.error("%s", error, extra=_as("start_failed", error=type(error).__name__))
        return ExitCode.ENVIRONMENT
    except Exception:
        _log.exception("the provider cannot go on", extra=_as("failed"))
        return ExitCode.ENVIRONMENT
    _tell("stopped")
    return ExitCode.OK


def _serve(options: argparse.Namespace, stack: ExitStack) -> None:
    """Put the provider together and let it run; whatever was opened is closed by the stack."""
    state_dir, path = Path(options.state_dir), Path(options.socket)
    make_directory(path.parent)
    backend = _backend(options, stack)
    readiness = Readiness(state_dir / READY_NAME, path)
    readiness.withdraw()  # that of a provider which was killed: the lock is ours now
    listener = listen(path, mode=options.mode, gid=options.group)
    stack.callback(listener.close)
    limits = Limits(allowed_uids=frozenset({os.geteuid(), *options.allow_uid}))
    events = EventLog()
    trace = stack.enter_context(TraceFile(options.trace, limits)) if options.trace else None
    provider = Provider(
        listener,
        backend,
        limits=limits,
        spans=Spans(
            claim_s=options.claim_timeout,
            release_s=options.release_deadline,
            empty_grace_s=options.empty_grace,
        ),
        observer=events if trace is None else _both(trace, events),
    )
    events.kernel = provider.kernel
    stack.callback(readiness.withdraw)
    asyncio.run(_run(provider, readiness, trace))


def _both(first: Observer, second: Observer) -> Observer:
    def observe(event: Event, effects: tuple[Effect, ...]) -> None:
        first(event, effects)
        second(event, effects)

    return observe


async def _run(provider: Provider, readiness: Readiness, trace: TraceFile | None) -> None:
    def announce() -> None:
        readiness.announce()
        _tell("ready", allocations=len(provider.kernel.states))

    def stop(number: signal.Signals) -> None:
        _tell("stopping", signal=number.name)
        readiness.withdraw()
        readiness.notify("STOPPING=1")
        provider.stop()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    await provider.run(announce, on_recovered=None if trace is None else trace.recovered)
    if provider.has_hung:
        # The socket is closed and what is alive stays alive. Closing the backend could wait for
        # the very work that hangs (an image on a file server that is gone, say).
        _log.warning("backend work hangs and is left to the kernel", extra=_as("stopped"))
        logging.shutdown()
        os._exit(ExitCode.OK)


def _backend(options: argparse.Namespace, stack: ExitStack) -> Backend:
    image_root, uenv_base = Path(options.image_root), Path(options.uenv_base)
    if not image_root.is_dir():
        _log.warning("no such directory: %s", image_root, extra=_as("image_root_missing"))
    if options.backend == "simulated":
        Path(options.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        images = (path.relative_to(image_root) for path in image_root.rglob("*") if path.is_file())
        node = SimulatedNode(frozenset(map(str, images)), uenv_base=str(uenv_base))
        stack.callback(node.close)
        simulated = SimulatedBackend(node, hold_time_s=options.hold_time, clock=time.monotonic)
        return stack.enter_context(closing(simulated))
    make_directory(uenv_base)
    cgroup2 = None if options.no_scopes else find_cgroup2()
    settings = NodeSettings(cgroup2, image_root, uenv_base, options.hold_time)
    state_dir = Path(options.state_dir)
    backend = LinuxBackend.for_provider(settings, state_dir, clock=time.monotonic)
    return stack.enter_context(closing(backend))


# --- Saying that it is ready -------------------------------------------------------------------


class Readiness:
    """
    Says whether requests are served: in a file, and to systemd if it started this process.

    Args:
        file: There while requests are served, and after a crash.
        path: The socket that is written into it.

    Source:
        sd_notify(3).
    """

    def __init__(self, file: Path, path: Path) -> None:
        self._file: Final = file
        self._content: Final = json.dumps({"pid": os.getpid(), "socket": str(path.absolute())})
        # Not for the processes that are started from here.
        self._address: Final = os.environ.pop(NOTIFY_VARIABLE, "")

    def announce(self) -> None:
        """Say that requests are served."""
        draft = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        draft.write_text(f"{self._content}\n", encoding="utf-8")
        draft.replace(self._file)
        self.notify("READY=1")

    def withdraw(self) -> None:
        """Take the file away; nothing happens if there is none."""
        self._file.unlink(missing_ok=True)

    def notify(self, word: str) -> None:
        """Tell systemd; nothing happens without it. That it cannot be told is no reason to end."""
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = f"\0{address[1:]}"  # abstract, in the notation of systemd
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(word.encode(), address)
            except OSError as error:
                _log.warning("%s: %s", self._address, error, extra=_as("notify_failed"))


# --- Saying what happens -----------------------------------------------------------------------


class EventLog:
    """
    Writes down every event of a provider, with the row it made an allocation take: an `Observer`.

    An event's name here is its class', in snake case. An event that moves further allocations (the
    readiness, on which requests have waited) is written down once more for each of these.
    """

    kernel: ProviderKernel

    def __init__(self) -> None:
        self._states: dict[str, AllocationState] = {}
        self._delays: dict[str, str] = {}
        """What was last said to be in the way of a release."""

    def __call__(self, event: Event, effects: tuple[Effect, ...]) -> None:
        """Write down one event."""
        name = _allocation_of(event)
        if self._is_repetition(event):
            return
        self._write(event, effects, name)
        for other in {_allocation_of(effect) for effect in effects} - {name, ""}:
            if self.kernel.state_of(other) is not self._states.get(other, _UNKNOWN):
                self._write(event, effects, other)

    def _is_repetition(self, event: Event) -> bool:
        """Say whether it is just another try to release what cannot be released yet."""
        if isinstance(event, on.NamespacesReleased):
            self._delays.pop(event.allocation_id, None)
        if isinstance(event, on.ReleaseDelayed):
            before = self._delays.get(event.allocation_id)
            self._delays[event.allocation_id] = event.reason
            return before == event.reason
        return isinstance(event, on.RetryDue)

    def _write(self, event: Event, effects: tuple[Effect, ...], name: str) -> None:
        fields: dict[str, Any] = {"allocation_id": name} if name else {}
        if name:
            fields |= self._row(event, name)
        fields |= _details_of(event)
        fields["effects"] = [_word_for(effect) for effect in effects]
        _tell(_snake(type(event).__name__), **fields)

    def _row(self, event: Event, name: str) -> dict[str, str]:
        before = self._states.pop(name, _UNKNOWN)
        after = self.kernel.state_of(name)
        if after not in (_UNKNOWN, AllocationState.RELEASED):
            self._states[name] = after
        if before is after and PROVIDER.row(type(event), before) is None:
            return {}
        return {"from": before.value, "to": after.value}


_UNKNOWN: Final = AllocationState.UNKNOWN


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, event, message, and whatever fields it brings."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
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


def _log_json_lines() -> None:
    lines = logging.StreamHandler()
    lines.setFormatter(JsonLines())
    logging.basicConfig(handlers=[lines])
    _log.setLevel(logging.INFO)  # of what others have to say, only what is wrong
    logging.captureWarnings(True)
    # Whoever read them may be gone; that is no reason to end, nor to say so in the same place.
    logging.raiseExceptions = False


def _tell(event: str, **fields: Any) -> None:
    _log.info("", extra=_as(event, **fields))


def _as(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "fields": fields}


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _allocation_of(something: Event | Effect) -> str:
    """Name the allocation that an event or an effect concerns; empty if none."""
    for part in (something, *(getattr(something, x, None) for x in ("request", "response"))):
        name = getattr(part, "allocation_id", "")
        if name:
            return str(name)
    return ""


def _details_of(event: Event) -> dict[str, Any]:
    """Take from an event what says more about it."""
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
    """Name an effect, with what it says if it says something."""
    word = _snake(type(effect).__name__)
    match effect:
        case do.StartTimer(timer=timer) | do.StopTimer(timer=timer):
            return f"{word}:{timer.value}"
        case do.Refuse(error=error):
            return f"{word}:{type(error).__name__}"
        case _:
            return word
