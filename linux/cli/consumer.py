"""What `nshandoff run`, `exec` and `request` share: request, consumer, self-service, signals."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
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
from transport.request import Cancelled, Consumer, Handoff

from ..features import Features
from ..namespaces import KernelInspector
from ..self_service import OwnNamespaces
from ..syscalls import signalfd
from .exits import PROGRAM, ExitCode, Failure, Interrupted

INTERRUPTIONS: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
"""Signals that stop the command, while there is no inner command to pass them on to."""

END_TIMEOUT_S: Final = 5.0
"""How long the confirmation of an end may take; a provider has its release deadline for that."""

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
    *,
    joins: bool = False,
) -> Consumer:
    """Make the consumer for the options; its warnings go to standard error."""
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s")
    is_alone = getattr(options, "fallback", None) == "always"
    path = None if is_alone else options.socket
    return Consumer(path, inspector, service=service, joins=joins)


def inspector_of(options: argparse.Namespace, features: Features) -> Inspector:
    """Choose what identifies a received descriptor."""
    if getattr(options, "backend", "linux") == "simulated":
        from ..simulated import SimulatedInspector

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
    Obtain namespaces, until a signal tells the command to stop.

    Once the command has begun to make its own, the signal is handled after they are made, because
    what is half made is hard to undo.

    Returns:
        The handoff; the caller owns it.

    Raises:
        Failure: there are no namespaces.
        Interrupted: a signal came; own namespaces are released, those of the provider may not be.
    """
    wanted = stopping(taken)
    try:
        with signalfd(wanted) as cancel:
            handoff = consumer.obtain(request, cancel=cancel.fileno())
    except NamespaceError as error:
        raise failure_of(error) from error
    except Cancelled:
        raise Interrupted(signal.sigwait(wanted)) from None
    if handoff.is_own and (number := signal.sigtimedwait(wanted, 0)) is not None:
        with handoff:
            handoff.end(END_TIMEOUT_S)
        raise Interrupted(number.si_signo)
    return handoff


def failure_of(error: NamespaceError) -> Failure:
    """Turn an error of the protocol into one of the command."""
    return Failure(_REFUSALS[type(error)], str(error), type(error).__name__)


@contextmanager
def signals_taken(
    numbers: Iterable[signal.Signals], *, ignored_too: bool = False
) -> Iterator[set[signal.Signals]]:
    """
    Block signals while the body runs, which waits for them when it is ready (sigwaitinfo).

    Args:
        numbers: Which.
        ignored_too: Whether also those that were ignored when the command started (nohup); blocked,
            they come all the same.

    Returns:
        The blocked ones.
    """
    taken = {n for n in numbers if ignored_too or signal.getsignal(n) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    try:
        yield taken
    finally:
        while signal.sigtimedwait(taken, 0) is not None:
            pass  # it came too late
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stopping(taken: Set[signal.Signals]) -> Set[signal.Signals]:
    """Return those that stop the command, of the signals that `signals_taken` blocks."""
    # One that was ignored when the command started comes all the same, because it is blocked.
    return {n for n in taken & INTERRUPTIONS if signal.getsignal(n) is not signal.SIG_IGN}


def _new_id() -> str:
    return f"run-{os.getpid()}-{os.urandom(4).hex()}"
