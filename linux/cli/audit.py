"""`AuditFile`: what a provider did, as audit events in the form of upstream's `hpc-audit`.

One JSON object a line. Each event has all fields that the form requires; what is not known in text
is empty, and absent in `scope`. Chapter 16 has the form, and which actions there are.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.events import Event, ProviderInput
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from ..sinks import Sink
from ..syscalls import calling

SOURCE: Final = "PactAgent"
"""Upstream's name for the program that a provider is part of."""

PRINCIPAL: Final = {"identity": "nshandoff", "principal_type": "Service", "role": "provider"}
"""Who acts in every event: the provider; who asked it is one of few users, and in the log."""

_log: Final = logging.getLogger(__name__)


class Said(NamedTuple):
    """What is said of an event."""

    action: str
    outcome: str
    """`Success`, `Failure` or `Denied`."""
    allocation_id: str = ""
    detail: str = ""
    metadata: dict[str, Any] | None = None


class AuditFile(Owner):
    """
    Appends audit events to a file, for every event of a provider that is one: an `Observer`.

    A file that is slow or full costs lines, which are counted in the log, and no time.

    Args:
        path: Appended to; made with mode 0600 if it does not exist.

    Raises:
        SyscallError: it cannot be opened.
    """

    # Keeps DAEMON-6, DAEMON-11.

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._path: Final = path
        with calling("open(2)", path):
            self._file: Final = Descriptor(syscall(os.open, path, flags, 0o600))
        self._sink: Final = Sink(self._file, report=self._report)
        self._node: Final = socket.gethostname()
        self._started: Final[set[str]] = set()
        self._overdue: Final[set[str]] = set()
        self._reasons: Final[dict[str, str]] = {}

    def __call__(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Write what an event and its effects are to an auditor, if anything."""
        for said in (*self._of_event(event), *_of_effects(event, effects)):
            self._sink.write(self._line_of(said))

    def close(self) -> None:
        """Write what waits, as far as that is possible in a short time, and close the file."""
        if self._sink.close():
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _of_event(self, event: ProviderInput) -> Iterator[Said]:
        match event:
            case on.ProviderReady():
                yield Said("boot.ready", "Success")
            case on.RemainsFound(allocation_id=name):
                yield Said("namespace.leak_detected", "Success", name, "left by a crash")
            case on.NamespacesNotCreated(allocation_id=name, error=error):
                yield Said("namespace.handoff_failed", "Failure", name, error.text)
            case on.ResponseNotSent(allocation_id=name, error=error):
                yield Said("namespace.handoff_failed", "Failure", name, error.text)
            case on.ResponseSent(allocation_id=name):
                yield Said("namespace.handoff", "Success", name)
            case on.ScopePopulated(allocation_id=name) if name not in self._started:
                self._started.add(name)
                yield Said("workload.allocation_start", "Success", name)
            case on.ReleaseDelayed(allocation_id=name, reason=reason):
                self._reasons[name] = reason
            case on.ReleaseOverdue(allocation_id=name):
                self._overdue.add(name)
                count = {"overdue": len(self._overdue)}
                detail = self._reasons.get(name, "")
                yield Said("cgroup.kill_failed", "Failure", name, detail, count)
            case on.NamespacesReleased(allocation_id=name):
                self._started.discard(name)
                self._overdue.discard(name)
                self._reasons.pop(name, None)
                yield Said("namespace.cleanup", "Success", name)

    def _line_of(self, said: Said) -> bytes:
        allocation = {"allocation_id": said.allocation_id} if said.allocation_id else {}
        line = {
            "id": str(uuid.uuid4()),
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "principal": PRINCIPAL,
            "action": said.action,
            "scope": {"node_id": self._node, **allocation},
            "outcome": said.outcome,
            "detail": said.detail,
            "metadata": said.metadata,
            "source": SOURCE,
        }
        return f"{json.dumps(line)}\n".encode()

    def _report(self, count: int, why: str) -> None:
        text = f"{self._path}: lines of the audit {'were' if count else 'are being'} lost: {why}"
        extra = {"event": "audit_lines_lost", "fields": {"count": count} if count else {}}
        _log.warning(text, extra=extra)


def _of_effects(event: Event, effects: tuple[Effect, ...]) -> Iterator[Said]:
    for effect in effects:
        if isinstance(effect, do.ReleaseNamespaces) and not isinstance(event, _NO_ENDS):
            why = type(event).__name__
            yield Said("workload.allocation_end", "Success", effect.allocation_id, why)
        elif isinstance(effect, do.Refuse) and isinstance(event, on.RequestReceived):
            name = event.request.allocation_id
            yield Said("namespace.handoff_failed", "Denied", name, effect.error.text)


_NO_ENDS: Final = (on.RetryDue, on.RemainsFound, on.NamespacesNotCreated)
"""With these a release begins, or goes on, of what no workload has been in."""
