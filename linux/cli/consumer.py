"""What `nshandoff run` and `request` share: the request, the consumer, self-service, signals."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.messages import (
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    objection,
    objection_to_id,
)
from transport.contract import SelfService
from transport.descriptors import DescriptorBundle, Inspector
from transport.request import Consumer, Handoff

from ..backend import LinuxBackend, NodeSettings
from ..cgroups import CgroupUnavailable, find_cgroup2
from ..features import Features
from ..namespaces import KernelInspector
from ..simulated import SimulatedInspector
from .exits import PROGRAM, ExitCode, Failure, Interrupted, print_error

INTERRUPTIONS: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
"""Signals that tell the command to stop, while there is no other to pass them on to."""

END_TIMEOUT_S: Final = 5.0
"""How long the confirmation of an end may take; a provider has its release deadline for that."""

DIRECTORY_MODE: Final = 0o755
"""Permissions of a missing directory that is made."""

_KINDS: Final = {kind.value.lower(): kind for kind in NamespaceType}

_REFUSALS: Final = {
    SocketUnavailable: ExitCode.UNAVAILABLE,
    FdPassing: ExitCode.UNAVAILABLE,
    CreationFailed: ExitCode.NO,
    AllocationNotFound: ExitCode.NO,
}


def request_of(options: argparse.Namespace) -> NamespaceRequest:
    """
    Make a request from the options `--id`, `--namespaces` and `--uenv`; without `--id`, a new id.

    Raises:
        Failure: USAGE, it breaks a rule of the protocol, which the text names.
    """
    names = [name.strip() for name in options.namespaces.split(",") if name.strip()]
    unknown = [name for name in names if name.lower() not in _KINDS]
    if unknown:
        known = ", ".join(_KINDS)
        raise Failure(ExitCode.USAGE, f"no type of namespace: {', '.join(unknown)} (has {known})")
    request = NamespaceRequest(
        allocation_id=_new_id() if options.id is None else options.id,
        namespaces=tuple(_KINDS[name.lower()] for name in names),
        uenv_image=options.uenv,
    )
    fault = objection(request)
    if fault is not None:
        raise Failure(ExitCode.USAGE, fault)
    return request


def id_of(options: argparse.Namespace) -> str:
    """
    Return the allocation's id from the options.

    Raises:
        Failure: USAGE, it is not valid.
    """
    fault = objection_to_id(options.id)
    if fault is not None:
        raise Failure(ExitCode.USAGE, fault)
    return str(options.id)


def consumer_of(
    options: argparse.Namespace,
    inspector: Inspector,
    service: SelfService | None = None,
) -> Consumer:
    """Make the consumer for the options; its warnings go to standard error."""
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s")
    return Consumer(options.socket, inspector, service=service)


def inspector_of(options: argparse.Namespace, features: Features) -> Inspector:
    """Choose what identifies a received descriptor."""
    if getattr(options, "backend", "linux") == "simulated":
        return SimulatedInspector()
    return KernelInspector(features)


def obtain(
    consumer: Consumer,
    request: NamespaceRequest,
    own: OwnNamespaces | None,
    taken: set[signal.Signals],
) -> Handoff:
    """
    Obtain namespaces; a signal that tells the command to stop interrupts that.

    Once the command has begun to make its own, the signal is handled after they are made, because
    what is half made is hard to undo.

    Returns:
        The handoff; the caller owns it.

    Raises:
        Failure: there are no namespaces.
        Interrupted: a signal came; own namespaces are released, those of the provider may not be.
    """
    try:
        with interruptible(taken, lambda: own is None or not own.is_begun) as postponed:
            handoff = consumer.obtain(request)
    except NamespaceError as error:
        raise failure_of(error) from error
    if postponed:
        with handoff:
            handoff.end(END_TIMEOUT_S)
        raise Interrupted(postponed[0])
    return handoff


def failure_of(error: NamespaceError) -> Failure:
    """Turn an error of the protocol into one of the command."""
    return Failure(_REFUSALS[type(error)], str(error), type(error).__name__)


class OwnNamespaces:
    """
    Namespaces that the command makes itself, and that end with it: a `SelfService`.

    Nothing is started before it is needed, which is when the provider cannot be reached.

    Args:
        options: With `image_root` and `uenv_base`.
        features: What the Linux kernel can do.
    """

    def __init__(self, options: argparse.Namespace, features: Features) -> None:
        self._options: Final = options
        self._features: Final = features
        self._backend: LinuxBackend | None = None

    @property
    def is_begun(self) -> bool:
        """Whether any were requested."""
        return self._backend is not None

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """As `LinuxBackend.create_namespaces`."""
        return self._made().create_namespaces(request)

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """As `LinuxBackend.bundle_of`."""
        return self._made().bundle_of(allocation_id)

    def scope_of(self, allocation_id: str) -> Path | None:
        """As `LinuxBackend.scope_of`."""
        return self._made().scope_of(allocation_id)

    def release_namespaces(self, allocation_id: str) -> None:
        """As `LinuxBackend.release_namespaces`."""
        self._made().release_namespaces(allocation_id)

    def why_alive(self, allocation_id: str) -> str | None:
        """As `LinuxBackend.why_alive`."""
        return self._made().why_alive(allocation_id)

    def close(self) -> None:
        """End what was made, if anything was."""
        if self._backend is not None:
            self._backend.close()

    def _made(self) -> LinuxBackend:
        if self._backend is None:
            base = Path(self._options.uenv_base)
            settings = NodeSettings(_cgroup2_if_any(), Path(self._options.image_root), base)
            self._backend = LinuxBackend.for_self_service(
                settings, clock=time.monotonic, features=self._features
            )
            if self._options.uenv is not None:
                _make_base(base)
        return self._backend


def make_directory(path: Path) -> None:
    """
    Make a directory and its parents with `DIRECTORY_MODE`, unless it is there.

    Raises:
        OSError: it is not there and cannot be made.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    path.chmod(DIRECTORY_MODE)  # mkdir applies the umask


@contextmanager
def signals_taken(numbers: Iterable[signal.Signals]) -> Iterator[set[signal.Signals]]:
    """
    Block signals while the body runs, which waits for them when it is ready (sigwaitinfo).

    Returns:
        The blocked ones: without those that were ignored when the command started (nohup).
    """
    taken = {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        yield taken
    finally:
        while signal.sigtimedwait(taken, 0) is not None:
            pass  # it came too late
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible(
    taken: set[signal.Signals], is_interruptible: Callable[[], bool] = lambda: True
) -> Iterator[list[int]]:
    """
    Turn the signals that tell a command to stop into `Interrupted` while the body runs.

    Args:
        taken: What `signals_taken` blocks, and blocks again afterwards.
        is_interruptible: Called when a signal comes; False postpones it.

    Returns:
        The signals that were postponed.
    """
    postponed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_interruptible():
            raise Interrupted(number)
        postponed.append(number)

    before = {number: signal.signal(number, interrupt) for number in taken & INTERRUPTIONS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        yield postponed
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, disposition in before.items():
            signal.signal(number, disposition)


def _new_id() -> str:
    return f"run-{os.getpid()}-{secrets.token_hex(4)}"


def _cgroup2_if_any() -> Path | None:
    try:
        return find_cgroup2()
    except CgroupUnavailable as error:
        print_error(f"WARNING: {error}; there will be no cgroup for the processes")
        return None


def _make_base(base: Path) -> None:
    try:
        make_directory(base)
    except OSError as error:
        raise CreationFailed(f"make {base}: {error.strerror}") from error
