"""The processes of the demonstration: a provider, and one process inside each allocation.

The provider is `nshandoff serve` in a process of its own, or a thread if the node is simulated.
Both report the states that allocations reach. The process inside an allocation executes
`demo/inside.py` in the allocation's namespaces and scope.
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
from typing import Any, Final, TypeAlias

from statemachine.events import Event
from statemachine.messages import NamespaceRequest
from statemachine.provider import Limits
from statemachine.states import AllocationState
from transport.descriptors import Descriptor, DescriptorBundle
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
from .host import CannotShow, Host, environment_for_us

READY_TIMEOUT_S: Final = 60.0
"""How long a provider may take to start."""

STOP_TIMEOUT_S: Final = 60.0
"""How long it may take to stop; then it is killed."""

ANSWER_TIMEOUT_S: Final = 60.0
"""How long a process inside may take to answer a question, or to exit."""

PIPE_BYTES_MAX: Final = 65536
"""Most that is read from a pipe at a time."""

LOG_LINES_QUOTED_MAX: Final = 5
"""How many lines of a provider's log are quoted when it fails."""


class DemoError(Exception):
    """A process of the demonstration is gone, or does not answer."""


class ProviderProcess:
    """
    A provider in a process of its own.

    It serves when constructed. Only `stop` stops it: signals from the terminal do not reach it.

    Raises:
        CannotShow: it cannot serve on this machine; it has ended.
    """

    def __init__(self, host: Host) -> None:
        self.inspector: Final = KernelInspector(Features.probe())
        self._log: Final = _Lines()
        with ExitStack() as undo:
            undo.callback(self._log.close)
            with self._log.writable() as stderr, _open_null() as null:
                self._child = spawn_within(
                    _serve_command(host),
                    DescriptorBundle((), ()),
                    env=environment_for_us(),
                    stdin=null.fileno(),
                    stdout=null.fileno(),
                    stderr=stderr.fileno(),
                )
            undo.callback(self.stop)
            self._await_ready()
            undo.pop_all()

    @property
    def description(self) -> str:
        """What it is."""
        return f"nshandoff serve, process {self._child.pid}"

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._child.poll() is None

    def next_state(self, timeout_s: float) -> tuple[str, str] | None:
        """
        Return the next state that an allocation has reached.

        Returns:
            The allocation and the state; None if none was reached in time.

        Raises:
            DemoError: the provider is gone.
        """
        while True:
            line = self._log.take(timeout_s)
            if line is None:
                return None
            reached = _state_in(line)
            if reached is not None:
                return reached

    def stop(self) -> int:
        """Send SIGTERM and wait for it; kill it if it does not stop; return its exit code."""
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
        except DemoError as error:
            raise CannotShow(f"the provider does not serve: {error}") from error


_SERVE: Final = (sys.executable, "-P", "-m", "linux", "serve")


def _serve_command(host: Host) -> list[str]:
    options = {
        "--socket": host.socket,
        "--state-dir": host.state_dir,
        "--image-root": host.image_root,
        "--uenv-base": host.uenv_base,
        "--hold-time": "0",
        "--backend": "linux",
    }
    words = [str(word) for option in options.items() for word in option]
    return [*_SERVE, *words, *([] if host.cgroup2 else ["--no-scopes"])]


class ProviderThread:
    """A provider in a thread, on a simulated node."""

    def __init__(self, host: Host) -> None:
        self.inspector: Final = SimulatedInspector()
        images = frozenset() if host.image is None else frozenset({host.image})
        self.node: Final = SimulatedNode(images, uenv_base=str(host.uenv_base))
        self._socket: Final = host.socket
        self._states: Final[queue.SimpleQueue[tuple[str, str]]] = queue.SimpleQueue()
        self._stop: Callable[[], object] | None = None
        self._is_ready: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="simulated provider")
        self._thread.start()
        if not self._is_ready.wait(READY_TIMEOUT_S):
            self.stop()
            raise CannotShow("the simulated provider does not serve")

    @property
    def description(self) -> str:
        """What it is."""
        return "a thread of this process, on a simulated node"

    @property
    def is_running(self) -> bool:
        """Whether it was not stopped."""
        return self._stop is not None

    def next_state(self, timeout_s: float) -> tuple[str, str] | None:
        """Wait until an allocation has reached another state."""
        try:
            return self._states.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop(self) -> int:
        """Stop its event loop and wait for it; return 0 if it has ended."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        self._thread.join(STOP_TIMEOUT_S)
        self.node.close()
        return int(self._thread.is_alive())

    def _run(self) -> None:
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


RunningProvider: TypeAlias = ProviderProcess | ProviderThread
"""A provider that the demonstration has started."""


def _requested_id(event: Event) -> str | None:
    request = getattr(event, "request", None)
    return None if request is None else str(request.allocation_id)


class InnerProcess:
    """
    A process inside an allocation, which executes `inside` until it is told to exit.

    Args:
        bundle: The allocation's namespaces; borrowed.
        scope: The allocation's `cgroup.procs`; borrowed. None for this process's own cgroup.
        image: Where the image is mounted in the allocation; None without one.
    """

    def __init__(
        self, bundle: DescriptorBundle, scope: Descriptor | None, image: str | None
    ) -> None:
        self._answers: Final = _Lines()
        with ExitStack() as undo:
            undo.callback(self._answers.close)
            reading, self._questions = (undo.enter_context(Descriptor(fd)) for fd in os.pipe())
            with self._answers.writable() as stdout, reading:
                self._child = spawn_within(
                    _inside_command(image),
                    bundle,
                    scope=scope,
                    stdin=reading.fileno(),
                    stdout=stdout.fileno(),
                )
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Its pid, as this process sees it."""
        return self._child.pid

    def ask(self, question: str) -> Any:
        """
        Ask it a question.

        Raises:
            DemoError: it is gone, or does not answer.
        """
        try:
            os.write(self._questions.fileno(), f"{question}\n".encode())
        except OSError as error:
            raise DemoError(f"the process inside cannot be asked: {error}") from error
        answer = self._answers.take(ANSWER_TIMEOUT_S)
        if answer is None:
            raise DemoError(f"the process inside has not answered {question!r}")
        return json.loads(answer)

    def leave(self) -> None:
        """Tell it to exit, without waiting."""
        self._questions.close()

    def wait(self) -> int | None:
        """Wait for its end and reap it; return its exit code, or None if it does not end."""
        if self._child.returncode is None and not _has_ended(self.pid, ANSWER_TIMEOUT_S):
            return None
        return int(self._child.wait())

    def close(self) -> None:
        """Kill it if it runs, reap it, and close everything."""
        self.leave()
        self._answers.close()
        if self._child.returncode is None:
            self._child.kill()
            self.wait()


@dataclass(slots=True)
class DemoAllocation:
    """One allocation of the demonstration, as its consumer has it."""

    subject: str
    """Its name in the output: first, second."""
    request: NamespaceRequest
    cgroup2: Path | None
    """Where its scope is made; None without one."""
    handoff: Handoff | None = None
    process: InnerProcess | None = None

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
    def inner(self) -> InnerProcess:
        """The process, once there is one."""
        assert self.process is not None, "no process has been started inside yet"
        return self.process

    def types(self) -> str:
        """Return the types as text, in request order."""
        return " ".join(kind.value for kind in self.request.namespaces)

    @contextmanager
    def open_scope(self) -> Iterator[Descriptor | None]:
        """Lend the scope's `cgroup.procs`; None without a scope."""
        if self.scope is None:
            yield None
            return
        with Scope(self.scope, "").open_procs() as procs:
            yield procs

    def start_inner(self) -> None:
        """Start a process inside."""
        with self.open_scope() as scope:
            path = self.held.response.uenv_mount_path
            self.process = InnerProcess(self.held.bundle, scope, path)

    def leave_orphan(self) -> tuple[int, Descriptor]:
        """Start a process inside whose parent has exited, as `leave_orphan` does."""
        with self.open_scope() as scope:
            return leave_orphan(self.held.bundle, scope)

    def close(self) -> None:
        """End the process and close the descriptors; does not end the allocation."""
        if self.process is not None:
            self.process.close()
        if self.handoff is not None:
            self.handoff.close()


def leave_orphan(bundle: DescriptorBundle, scope: Descriptor | None) -> tuple[int, Descriptor]:
    """
    Start a process in an allocation whose parent has exited.

    Returns:
        Its pid inside, and a descriptor that ends it when closed; the caller owns that.
    """
    output = _Lines()
    with ExitStack() as undo:
        undo.callback(output.close)
        reading, writing = (undo.enter_context(Descriptor(fd)) for fd in os.pipe())
        with output.writable() as stdout, reading:
            script = "exec 3<&0; cat <&3 >/dev/null & echo $!"
            child = spawn_within(
                ["sh", "-c", script],
                bundle,
                scope=scope,
                stdin=reading.fileno(),
                stdout=stdout.fileno(),
            )
        answer = output.take(ANSWER_TIMEOUT_S)
        child.wait()
        if answer is None:
            raise DemoError("no orphan could be made")
        output.close()
        undo.pop_all()
    return int(answer), writing


def _inside_command(image: str | None) -> list[str]:
    program = [sys.executable, "-I", "-S", str(Path(inside.__file__).resolve())]
    return program if image is None else [*program, image]


class _Lines:
    """A pipe into which another process writes lines; close-on-exec at both ends."""

    def __init__(self) -> None:
        self._readable, self._writable = map(Descriptor, os.pipe())
        self._bytes = b""
        self._last: list[str] = []

    def writable(self) -> Descriptor:
        """Return the writing end; the caller closes it when the other process has it."""
        return self._writable

    def take(self, timeout_s: float) -> str | None:
        """
        Return the next line; None if it does not come in time.

        Raises:
            DemoError: the other process is gone; the text quotes its last lines.
        """
        poll = select.poll()
        poll.register(self._readable, select.POLLIN)
        while b"\n" not in self._bytes:
            if not poll.poll(timeout_s * 1000):
                return None
            more = os.read(self._readable.fileno(), PIPE_BYTES_MAX)
            if not more:
                raise DemoError(" | ".join(self._last) or "it is gone, and has printed nothing")
            self._bytes += more
        line, _, self._bytes = self._bytes.partition(b"\n")
        text = line.decode("utf-8", "replace")
        self._last = [*self._last, text][-LOG_LINES_QUOTED_MAX:]
        return text

    def close(self) -> None:
        """Close both ends. Idempotent."""
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
        raise DemoError(f"it has printed nothing for {READY_TIMEOUT_S:g} s")
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
