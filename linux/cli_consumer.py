"""What do the verbs that act as a consumer have in common?

The request they make of their options, the consumer that carries it, and the namespaces that they
make themselves when the provider cannot be had. Used by `cli_run` and `cli_request`.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
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
    NamespaceType,
    objection,
    objection_to_id,
)
from transport.contract import SelfService
from transport.descriptors import Inspector
from transport.request import Consumer, Handoff

from .cli_exit import PROGRAM, ExitCode, Failure, Interrupted
from .features import Features
from .namespaces import KernelInspector
from .self_service import OwnNamespaces
from .simulated import SimulatedInspector

INTERRUPTIONS: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
"""What tells a command to stop, as long as it has nobody to pass it on to."""

END_TIMEOUT_S: Final = 5.0
"""How long an end may take to be confirmed; a provider does it within its release deadline."""

_KINDS: Final = {kind.value.lower(): kind for kind in NamespaceType}

_REFUSALS: Final = {
    SocketUnavailable: ExitCode.UNAVAILABLE,
    FdPassing: ExitCode.UNAVAILABLE,
    CreationFailed: ExitCode.NO,
    AllocationNotFound: ExitCode.NO,
}


def request_of(options: argparse.Namespace) -> NamespaceRequest:
    """
    Make a request of the options `--id`, `--namespaces` and `--uenv`; without an id, a new one.

    Raises:
        Failure: USAGE, it breaks a rule of the protocol; the text names field and rule.
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
    Take the allocation's id from the options.

    Raises:
        Failure: USAGE, it cannot be one.
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
    """Make the consumer that the options describe; it warns on standard error."""
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s")
    return Consumer(options.socket, inspector, service=service)


def inspector_of(options: argparse.Namespace, features: Features) -> Inspector:
    """Choose who is asked what a received descriptor is."""
    if getattr(options, "backend", "linux") == "simulated":
        return SimulatedInspector()
    return KernelInspector(features)


def own_namespaces(options: argparse.Namespace, features: Features) -> OwnNamespaces:
    """Make the self-service that the options `--image-root` and `--uenv-base` describe."""
    return OwnNamespaces(features, Path(options.image_root), Path(options.uenv_base))


def obtain(
    consumer: Consumer,
    request: NamespaceRequest,
    own: OwnNamespaces | None,
    taken: set[signal.Signals],
) -> Handoff:
    """
    Obtain namespaces; a signal that tells the command to stop interrupts the wait for them.

    Once the command has begun to make its own, the signal waits until they are made, because what
    is half made is hard to undo.

    Returns:
        The handoff; the caller owns it.

    Raises:
        Failure: there are no namespaces.
        Interrupted: a signal came; own namespaces are released, the provider may have made some.
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
    """Say one of the protocol's errors as the command does."""
    return Failure(_REFUSALS[type(error)], str(error), type(error).__name__)


@contextmanager
def signals_taken(numbers: Iterable[signal.Signals]) -> Iterator[set[signal.Signals]]:
    """
    Block signals, while the body runs: it takes them when it is ready for them, or never.

    Returns:
        Those that are blocked: not the ones that were ignored when the command started (nohup).
    """
    taken = {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        yield taken
    finally:
        while signal.sigtimedwait(taken, 0) is not None:
            pass  # it came when there was nothing left to be told
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible(
    taken: set[signal.Signals], is_interruptible: Callable[[], bool] = lambda: True
) -> Iterator[list[int]]:
    """
    Turn the signals that tell a command to stop into `Interrupted`, while the body runs.

    Args:
        taken: What `signals_taken` blocks, and blocks again afterwards.
        is_interruptible: Asked when a signal comes; False postpones it.

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
