"""Who plays in the demonstration besides itself: a provider, and a resident in each allocation.

A provider is a process of its own, `nshandoff serve`, or a thread for a node that is simulated.
Both tell which states the allocations reach. A resident is `inside`, started in an
allocation's namespaces and scope.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from statemachine.events import Event
from statemachine.lifecycle import AllocationState
from statemachine.messages import NamespaceRequest
from statemachine.provider import Limits
from transport.descriptors import Descriptor, DescriptorBundle, Inspector
from transport.endpoint import listen
from transport.request import Handoff
from transport.serve import Provider

from .. import syscalls
from ..cgroups import WORKLOAD_SLICE, Scope
from ..features import Features
from ..forge.spawn import spawn_within
from ..namespaces import KernelInspector
from ..simulated import SimulatedBackend, SimulatedInspector, SimulatedNode
from ..syscalls import SyscallError
from . import inside
from .stage import Stage, StageError

READY_TIMEOUT_S: Final = 15.0
"""How long a provider may take until it serves."""

STOP_TIMEOUT_S: Final = 15.0
"""How long it may take to stop; then it is killed."""

ANSWER_TIMEOUT_S: Final = 10.0
"""How long a resident may take to answer a question, or to leave."""

PIPE_BYTES_MAX: Final = 65536
"""Most that is read from a pipe at a time."""

LOG_LINES_KEPT_MAX: Final = 5
"""How much of what a provider said is quoted when it fails."""


class CastError(Exception):
    """Somebody who plays in the demonstration is gone, or does not answer."""


class Company(Protocol):
    """A provider, as the demonstration sees it."""

    @property
    def inspector(self) -> Inspector:
        """Tells what the provider's descriptors are."""
        ...

    @property
    def description(self) -> str:
        """Who it is, for people."""
        ...

    @property
    def is_running(self) -> bool:
        """Whether it can still be asked for anything."""
        ...

    def next_state(self, timeout_s: float) -> tuple[str, str] | None:
        """
        Tell the next state that an allocation has reached.

        Returns:
            The allocation and the state; None if nothing happened in time.

        Raises:
            CastError: the provider is gone.
        """
        ...

    def stop(self) -> int:
        """
        Stop the provider and wait for it; again is harmless.

        Returns:
            What it exited with.
        """
        ...


class LinuxCompany:
    """
    A provider in a process of its own.

    Serving when constructed. Stopped with `stop`, and only by that: what a terminal sends to the
    demonstration does not reach it.

    Raises:
        StageError: it cannot serve on this machine; it is gone.
    """

    def __init__(self, stage: Stage) -> None:
        self.inspector: Final = KernelInspector(Features.probe())
        self._log: Final = _Lines()
        with ExitStack() as undo:
            undo.callback(self._log.close)
            with self._log.writable() as stderr, _open_null() as null:
                self._child = spawn_within(
                    _serve_command(stage),
                    DescriptorBundle((), ()),
                    env=_environment(),
                    stdin=null.fileno(),
                    stdout=null.fileno(),
                    stderr=stderr.fileno(),
                )
            undo.callback(self.stop)
            self._await_ready()
            undo.pop_all()

    @property
    def description(self) -> str:
        """Who it is."""
        return f"nshandoff serve, process {self._child.pid}"

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._child.poll() is None

    def next_state(self, timeout_s: float) -> tuple[str, str] | None:
        """Read on in its log."""
        while True:
            line = self._log.take(timeout_s)
            if line is None:
                return None
            reached = _state_in(line)
            if reached is not None:
                return reached

    def stop(self) -> int:
        """Ask it to stop, and wait; kill it if it does not."""
        if self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
            if not _has_ended(self._child.pid, STOP_TIMEOUT_S):
                self._child.kill()
            self._child.wait()
        self._log.close()
        return int(self._child.returncode)

    def _await_ready(self) -> None:
        try:
            while not _says_ready(self._log.take(READY_TIMEOUT_S)):
                pass
        except CastError as error:
            raise StageError(f"the provider does not serve: {error}") from error


_SERVE: Final = (sys.executable, "-P", "-m", "linux", "serve")


def _serve_command(stage: Stage) -> list[str]:
    options = {
        "--socket": stage.socket,
        "--state-dir": stage.state_dir,
        "--image-root": stage.image_root,
        "--uenv-base": stage.uenv_base,
        "--hold-time": "0",
        "--backend": "linux",
    }
    words = [str(word) for option in options.items() for word in option]
    return [*_SERVE, *words, *([] if stage.cgroup2 else ["--no-scopes"])]


def _environment() -> dict[str, str]:
    packages = str(Path(__file__).resolve().parents[2])
    paths = [packages, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class SimulatedCompany:
    """A provider in a thread, on a simulated node."""

    def __init__(self, stage: Stage) -> None:
        self.inspector: Final = SimulatedInspector()
        images = frozenset() if stage.image is None else frozenset({stage.image})
        self.node: Final = SimulatedNode(images, uenv_base=str(stage.uenv_base))
        self._socket: Final = stage.socket
        self._states: Final[queue.SimpleQueue[tuple[str, str]]] = queue.SimpleQueue()
        self._stop: Callable[[], object] | None = None
        self._is_ready: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._play, name="simulated provider")
        self._thread.start()
        if not self._is_ready.wait(READY_TIMEOUT_S):
            self.stop()
            raise StageError("the simulated provider does not serve")

    @property
    def description(self) -> str:
        """Who it is."""
        return "a thread of this process, on a simulated node"

    @property
    def is_running(self) -> bool:
        """Whether it was not stopped."""
        return self._stop is not None

    def next_state(self, timeout_s: float) -> tuple[str, str] | None:
        """Wait for the kernel to move an allocation."""
        try:
            return self._states.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop(self) -> int:
        """Stop its event loop, and wait."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        self._thread.join(STOP_TIMEOUT_S)
        self.node.close()
        return int(self._thread.is_alive())

    def _play(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        backend = SimulatedBackend(self.node, hold_time_s=0.0)
        last: dict[str, AllocationState] = {}

        def observe(event: Event, _: object) -> None:
            for name in (getattr(event, "allocation_id", None), _requested_id(event)):
                if name is not None and provider.kernel.state_of(name) is not last.get(name):
                    last[name] = provider.kernel.state_of(name)
                    self._states.put((name, last[name].value))

        limits = Limits(allowed_uids=frozenset({os.geteuid()}))
        provider = Provider(listen(self._socket), backend, limits=limits, observer=observe)
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(provider.stop)
        try:
            await provider.run(self._is_ready.set)
        finally:
            backend.close()


def _requested_id(event: Event) -> str | None:
    request = getattr(event, "request", None)
    return None if request is None else str(request.allocation_id)


class Resident:
    """
    `inside`, inside an allocation, until it is told to leave.

    Args:
        bundle: The allocation's namespaces; lent.
        scope: The allocation's `cgroup.procs`; lent. None for this process's own cgroup.
        image: Where the image is in there; None without one.
    """

    def __init__(
        self, bundle: DescriptorBundle, scope: Descriptor | None, image: str | None
    ) -> None:
        self._answers: Final = _Lines()
        with ExitStack() as undo:
            undo.callback(self._answers.close)
            hears, self._says = (undo.enter_context(Descriptor(fd)) for fd in os.pipe())
            with self._answers.writable() as stdout, hears:
                self._child = spawn_within(
                    _inside_command(image),
                    bundle,
                    scope=scope,
                    stdin=hears.fileno(),
                    stdout=stdout.fileno(),
                )
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Its number as seen from here."""
        return self._child.pid

    def ask(self, question: str) -> Any:
        """
        Ask it something.

        Raises:
            CastError: it is gone, or does not answer.
        """
        try:
            os.write(self._says.fileno(), f"{question}\n".encode())
        except OSError as error:
            raise CastError(f"the process inside cannot be asked: {error}") from error
        answer = self._answers.take(ANSWER_TIMEOUT_S)
        if answer is None:
            raise CastError(f"the process inside has not answered {question!r}")
        return json.loads(answer)

    def leave(self) -> None:
        """Let it exit, without waiting."""
        self._says.close()

    def wait(self) -> int | None:
        """Wait for its end and reap it; what it exited with, or None if it does not end."""
        if self._child.returncode is None and not _has_ended(self.pid, ANSWER_TIMEOUT_S):
            return None
        return int(self._child.wait())

    def close(self) -> None:
        """End it if it is there, reap it, and close everything."""
        self.leave()
        self._answers.close()
        if self._child.returncode is None:
            self._child.kill()
            self.wait()


@dataclass(slots=True)
class Part:
    """One allocation, as its consumer sees it."""

    subject: str
    """What it is called here."""
    request: NamespaceRequest
    cgroup2: Path | None
    """Where its scope is made; None without one."""
    handoff: Handoff | None = None
    resident: Resident | None = None

    @property
    def name(self) -> str:
        """Its id."""
        return self.request.allocation_id

    @property
    def scope(self) -> Path | None:
        """Its scope; None without one."""
        root = self.cgroup2
        return None if root is None else root / WORKLOAD_SLICE / f"{self.name}.scope"

    @property
    def held(self) -> Handoff:
        """The handoff, once there is one."""
        assert self.handoff is not None, "nothing has been handed over yet"
        return self.handoff

    @property
    def settled(self) -> Resident:
        """The resident, once there is one."""
        assert self.resident is not None, "nobody has been started inside yet"
        return self.resident

    def types(self) -> str:
        """Name the types, in the order asked."""
        return " ".join(kind.value for kind in self.request.namespaces)

    @contextmanager
    def open_scope(self) -> Iterator[Descriptor | None]:
        """Lend what a process enters the scope by; None without a scope."""
        if self.scope is None:
            yield None
            return
        with Scope(self.scope, "").open_procs() as procs:
            yield procs

    def settle(self) -> None:
        """Start a resident inside."""
        with self.open_scope() as scope:
            path = self.held.response.uenv_mount_path
            self.resident = Resident(self.held.bundle, scope, path)

    def leave_orphan(self) -> tuple[int, Descriptor]:
        """Start a process inside whose parent has exited; as the function of this name."""
        with self.open_scope() as scope:
            return leave_orphan(self.held.bundle, scope)

    def close(self) -> None:
        """End the resident and close the descriptors; the allocation is the provider's affair."""
        if self.resident is not None:
            self.resident.close()
        if self.handoff is not None:
            self.handoff.close()


def leave_orphan(bundle: DescriptorBundle, scope: Descriptor | None) -> tuple[int, Descriptor]:
    """
    Start a process in an allocation whose parent has exited.

    Returns:
        Its number inside, and what ends it when closed; the caller owns that.
    """
    said = _Lines()
    with ExitStack() as undo:
        undo.callback(said.close)
        hears, says = (undo.enter_context(Descriptor(fd)) for fd in os.pipe())
        with said.writable() as stdout, hears:
            script = "exec 3<&0; cat <&3 >/dev/null & echo $!"
            child = spawn_within(
                ["sh", "-c", script],
                bundle,
                scope=scope,
                stdin=hears.fileno(),
                stdout=stdout.fileno(),
            )
        answer = said.take(ANSWER_TIMEOUT_S)
        child.wait()
        if answer is None:
            raise CastError("no orphan could be made")
        said.close()
        undo.pop_all()
    return int(answer), says


def _inside_command(image: str | None) -> list[str]:
    program = [sys.executable, "-I", "-S", str(Path(inside.__file__).resolve())]
    return program if image is None else [*program, image]


class _Lines:
    """A pipe that somebody else writes lines into; close-on-exec at both ends."""

    def __init__(self) -> None:
        self._readable, self._writable = map(Descriptor, os.pipe())
        self._bytes = b""
        self._said: list[str] = []

    def writable(self) -> Descriptor:
        """Give the end that is written to; the caller closes it when the writer has it."""
        return self._writable

    def take(self, timeout_s: float) -> str | None:
        """
        Take the next line; None if it is not there in time.

        Raises:
            CastError: there is no more; the text quotes what was last said.
        """
        poll = select.poll()
        poll.register(self._readable, select.POLLIN)
        while b"\n" not in self._bytes:
            if not poll.poll(timeout_s * 1000):
                return None
            more = os.read(self._readable.fileno(), PIPE_BYTES_MAX)
            if not more:
                raise CastError(" | ".join(self._said) or "it is gone, without a word")
            self._bytes += more
        line, _, self._bytes = self._bytes.partition(b"\n")
        text = line.decode("utf-8", "replace")
        self._said = [*self._said, text][-LOG_LINES_KEPT_MAX:]
        return text

    def close(self) -> None:
        """Close both ends; again is harmless."""
        self._readable.close()
        self._writable.close()


def _has_ended(pid: int, timeout_s: float) -> bool:
    """Wait for a child of ours to end, without reaping it."""
    with suppress(SyscallError), syscalls.pidfd_open(pid) as pidfd:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    return True


def _open_null() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))


def _says_ready(line: str | None) -> bool:
    if line is None:
        raise CastError(f"nothing is heard from it for {READY_TIMEOUT_S:g} s")
    return _record(line).get("event") == "ready"


def _state_in(line: str) -> tuple[str, str] | None:
    record = _record(line)
    name, before, after = (record.get(key) for key in ("allocation_id", "from", "to"))
    if before == after or not isinstance(name, str) or not isinstance(after, str):
        return None
    return name, after


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
